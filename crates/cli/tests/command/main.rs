//! The command against a fake agent behind the real API: exit codes, what goes to stdout and stderr, and in which shape.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

#[path = "../../../agent/tests/fake/mod.rs"]
mod fake;
mod gang;
mod postcopy;
mod template;

use assert_cmd::Command;
use fake::{Server, wait_until};
use serde_json::Value;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use sterna_agent::model::CompressionMode;

/// A command that hangs fails the test instead of blocking it.
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(100);

fn sterna(server: &Server, args: &[&str]) -> Output {
    sterna_at(&server.socket(), args)
}

fn sterna_at(socket: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sterna"));
    command.env("STERNA_SOCKET", socket).args(args).timeout(DEADLINE).output().unwrap()
}

/// Starts a command that will wait, for tests that do something meanwhile.
fn begin(server: &Server, args: &[&str]) -> Child {
    std::process::Command::new(env!("CARGO_BIN_EXE_sterna"))
        .env("STERNA_SOCKET", server.socket())
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn interrupt(child: &Child) {
    let id = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[track_caller]
fn ends(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "stdout: {}\nstderr: {}", out(output), err(output));
}

#[track_caller]
fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|why| panic!("{why}: {}", out(output)))
}

fn active(server: &Server) {
    wait_until(|| {
        let migrations = server.fake.migrations.lock().unwrap();
        migrations.first().is_some_and(|(_, sender)| sender.borrow().ram.dirty_sync_count == 3)
    });
}

#[test]
fn a_migration_is_waited_for_and_its_figures_are_shown() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "web", "hostb", "--verify"]);
    ends(&output, 0);
    let table = out(&output);
    for text in [
        "Total time:",
        "Total downtime:    9.5 ms",
        "Rounds:            3",
        "9 blocks of RAM equal",
        "stop 0.6",
    ] {
        assert!(table.contains(text), "{text}: {table}");
    }
    let lines = err(&output);
    assert!(lines.starts_with("web: setup, to hostb\nweb: active, "), "{lines}");
    assert!(lines.contains("941.5 mbps") && lines.contains("expected downtime 12 ms"), "{lines}");
    assert!(!lines.contains('\r') && !lines.contains('\u{1b}'), "plain lines off a terminal: {lines:?}");
    assert_eq!(server.fake.keys.lock().unwrap().len(), 1, "the request had an idempotency key");
}

#[test]
fn flags_become_the_request() {
    let server = Server::start();
    let args = ["migrate", "web", "hostb", "--bandwidth", "64", "--max-downtime", "50", "--timeout", "2.5"];
    ends(
        &sterna(&server, &[&args[..], &["--parallel-connections", "4", "--timeout-suspend", "-q"]].concat()),
        0,
    );
    ends(&sterna(&server, &["migrate", "web", "hostb", "--bandwidth", "0", "--verbose"]), 0);
    let paced =
        ["--min-bandwidth", "100Mbit/s", "--max-bandwidth", "800Mbit/s", "--bandwidth-step", "10Mbit/s"];
    let packed = ["--auto-converge", "--balloon", "--compression", "zstd", "--delta-cache", "256MiB", "-q"];
    ends(&sterna(&server, &[&["migrate", "web", "hostb"], &paced[..], &packed].concat()), 0);
    ends(&sterna(&server, &["migrate", "web", "hostb", "--bandwidth-step", "10Mbit/s"]), 2);
    let requests = server.fake.requests.lock().unwrap();
    let [first, second, third] = requests.as_slice() else { panic!("{requests:?}") };
    assert_eq!((first.vm.as_str(), first.host.as_str()), ("web", "hostb"));
    assert_eq!((first.max_bandwidth, first.downtime_limit, first.timeout), (Some(64 << 20), 50, Some(2.5)));
    assert_eq!((first.parallel_connections, first.verify), (Some(4), false));
    assert_eq!((second.max_bandwidth, second.downtime_limit, second.timeout), (None, 300, None));
    assert_eq!((second.min_bandwidth, second.auto_converge, second.balloon), (None, false, false));
    assert_eq!((second.compression, second.delta_cache), (CompressionMode::Auto, None));
    let rates = (third.min_bandwidth, third.max_bandwidth, third.bandwidth_step);
    assert_eq!(rates, (Some(12_500_000), Some(100_000_000), Some(1_250_000)));
    assert_eq!((third.auto_converge, third.balloon), (true, true));
    assert_eq!((third.compression, third.delta_cache), (CompressionMode::Zstd, Some(256 << 20)));
}

#[test]
fn json_is_the_final_view_and_jsonl_each_of_them() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "web", "hostb", "-o", "json"]);
    ends(&output, 0);
    let view = json(&output);
    assert_eq!((&view["status"], &view["runs-at"]), (&"completed".into(), &"hostb".into()));
    assert_eq!(view["ram"]["dirty-sync-count"], 3);
    assert_eq!(view["downtime"], 9.5);

    let output = sterna(&server, &["migrate", "web", "hostb", "-o", "jsonl"]);
    ends(&output, 0);
    assert_eq!(err(&output), "", "progress is on stdout then");
    let lines: Vec<Value> = out(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() >= 2, "{lines:?}");
    assert_eq!(lines[0]["status"], "setup");
    let completed = lines.iter().filter(|view| view["status"] == "completed").count();
    assert_eq!((completed, &lines.last().unwrap()["status"]), (1, &"completed".into()));
}

#[test]
fn quiet_says_nothing_and_detach_prints_the_id() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "web", "hostb", "--quiet"]);
    ends(&output, 0);
    assert_eq!(err(&output), "");
    let output = sterna(&server, &["migrate", "stuck", "hostb", "--detach"]);
    ends(&output, 0);
    assert_eq!((out(&output).as_str(), err(&output).as_str()), ("m2\n", ""));
    let view = json(&sterna(&server, &["status", "m2", "-o", "json"]));
    assert_eq!(view["vm"], "stuck");
}

#[test]
fn each_fate_of_a_vm_has_its_exit_code() {
    let server = Server::start();
    let broken = sterna(&server, &["migrate", "broken", "hostb", "-q"]);
    ends(&broken, 1);
    assert_eq!(err(&broken), "sterna: VM broken did not move to hostb: the link was cut; it runs at hosta\n");
    assert_eq!(out(&broken), "");
    let json_of_failure = sterna(&server, &["migrate", "broken", "hostb", "-q", "-o", "json"]);
    ends(&json_of_failure, 1);
    assert_eq!(json(&json_of_failure)["status"], "failed");
    ends(&sterna(&server, &["migrate", "nobody", "hostb"]), 2);
    ends(&sterna(&server, &["migrate", "panics", "hostb"]), 1);
}

#[test]
fn a_refusal_has_a_line_for_each_reason() {
    let server = Server::start();
    // Before it began, and by the migration itself.
    for vm in ["refused", "refused-later"] {
        let output = sterna(&server, &["migrate", vm, "hostb", "-q"]);
        ends(&output, 5);
        let text = err(&output);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].starts_with(&format!("sterna: VM {vm} cannot move to hostb; it runs")), "{lines:?}");
        assert_eq!(lines[1], "  vfio: a device of the host is passed through: hostpci0");
        assert!(lines[2].starts_with("  memory: "), "{lines:?}");
    }
}

#[test]
fn a_vm_whose_owner_is_not_known_needs_attention() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "lost", "hostb"]);
    ends(&output, 4);
    let text = err(&output);
    assert!(text.contains("sterna: VM lost needs attention: it was handed to hostb"), "{text}");
    assert!(text.contains("Do not start it anywhere"), "{text}");
}

#[test]
fn a_vm_that_could_not_be_resumed_needs_attention_too() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "stranded", "hostb", "-q"]);
    ends(&output, 4);
    let expected = "sterna: VM stranded needs attention: VM stranded is stopped at hosta: look at its log\n";
    assert_eq!(err(&output), expected);
}

#[test]
fn a_vm_whose_missing_pages_are_lost_does_not_run_at_its_source() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "torn", "hostb", "-q"]);
    ends(&output, 4);
    assert!(
        err(&output).starts_with("sterna: VM torn needs attention: VM torn runs at hostb"),
        "{}",
        err(&output)
    );
}

#[test]
fn ctrl_c_cancels_and_waits_for_the_end() {
    let server = Server::start();
    let child = begin(&server, &["migrate", "stuck", "hostb"]);
    active(&server);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    ends(&output, 3);
    let text = err(&output);
    assert!(text.contains("sterna: cancelling; the VM stays where it runs"), "{text}");
    assert!(
        text.ends_with("sterna: the migration of VM stuck to hostb was cancelled; it runs at hosta\n"),
        "{text}"
    );
}

#[test]
fn ctrl_c_that_comes_too_late_says_so_and_tells_the_end() {
    let server = Server::start();
    let child = begin(&server, &["migrate", "late", "hostb", "-q"]);
    active(&server);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    ends(&output, 0);
    assert!(out(&output).contains("from hosta to hostb"), "{}", out(&output));
    assert!(err(&output).contains("sterna: too late to cancel"), "{}", err(&output));
}

#[test]
fn a_restarted_agent_is_asked_again() {
    let mut server = Server::start();
    let child = begin(&server, &["migrate", "stuck", "hostb"]);
    active(&server);
    server.end();
    server.begin();
    let id = server.fake.migrations.lock().unwrap()[0].0.clone();
    sterna_agent::api::Control::cancel(&*server.fake, &id).unwrap();
    let output = child.wait_with_output().unwrap();
    ends(&output, 3);
    let text = err(&output);
    assert!(
        text.contains("sterna: lost the agent (it ended the stream); asking again for up to 60 s"),
        "{text}"
    );
}

#[test]
fn a_decision_ends_with_what_became_of_the_vm() {
    let server = Server::start();
    let state = |state: &str| {
        server.fake.vms.lock().unwrap().get_mut("web").unwrap().state = state.to_owned();
    };
    ends(&sterna(&server, &["recover", "web"]), 2);
    ends(&sterna(&server, &["recover", "web", "--here", "--there"]), 2);
    ends(&sterna(&server, &["recover", "nobody", "--here"]), 2);
    let refused = sterna(&server, &["recover", "web", "--here"]);
    ends(&refused, 2);
    assert!(err(&refused).contains("is not unresolved"), "{}", err(&refused));
    state("unresolved");
    let done = sterna(&server, &["recover", "web", "--here"]);
    ends(&done, 0);
    assert_eq!(out(&done), "web: runs at hosta\n");
    assert_eq!(json(&sterna(&server, &["recover", "web", "--here", "-o", "json"]))["runs-at"], "hosta");
    ends(&sterna(&server, &["recover", "web", "--there"]), 4);
    state("released");
    ends(&sterna(&server, &["recover", "web", "--here"]), 4);
}

/// An agent that died in the middle keeps no record of a migration that had released nothing: the VM is at the source,
/// and saying so is the whole point of asking.
#[test]
fn an_agent_that_forgot_the_migration_says_where_the_vm_is() {
    let mut server = Server::start();
    for (state, code, expected) in [
        (Some("running"), 1, "the VM is running at hosta"),
        (Some("released"), 4, "released now"),
        (None, 4, "has left hosta"),
    ] {
        let child = begin(&server, &["migrate", "stuck", "hostb", "-q"]);
        active(&server);
        server.end();
        server.fake.migrations.lock().unwrap().remove(0);
        match state {
            Some(state) => server.fake.vms.lock().unwrap().get_mut("stuck").unwrap().state = state.to_owned(),
            None => drop(server.fake.vms.lock().unwrap().remove("stuck")),
        }
        server.begin();
        let output = child.wait_with_output().unwrap();
        ends(&output, code);
        assert!(err(&output).contains(expected), "{}", err(&output));
    }
}

#[test]
fn no_agent_is_told_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("none.sock");
    let output = sterna_at(&nowhere, &["ps"]);
    ends(&output, 2);
    let text = err(&output);
    assert!(text.starts_with(&format!("sterna: no agent at {}: start one", nowhere.display())), "{text}");

    let dead = folder.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let output = sterna_at(&dead, &["migrate", "web", "hostb"]);
    ends(&output, 2);
    assert!(err(&output).contains("does not run: start it"), "{}", err(&output));
}

#[test]
fn what_answers_and_is_no_agent_is_told_apart() {
    use std::io::{Read, Write};
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("other.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let other = std::thread::spawn(move || {
        for answer in ["HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", "SSH-2.0-other\r\n", ""] {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    let output = sterna_at(&socket, &["ps"]);
    ends(&output, 1);
    assert!(err(&output).contains("is no agent of this version"), "{}", err(&output));
    for _ in 0..2 {
        let output = sterna_at(&socket, &["ps"]);
        ends(&output, 1);
        assert!(err(&output).contains("did not answer"), "{}", err(&output));
    }
    other.join().unwrap();
}

#[test]
fn virsh_flags_that_cannot_be_honoured_are_refused_with_the_reason() {
    let server = Server::start();
    for flags in [&["--persistent"][..], &["--copy-storage-all"], &["--abort-on-error"]] {
        let output = sterna(&server, &[&["migrate", "web", "hostb"], flags].concat());
        ends(&output, 2);
        assert!(
            err(&output).starts_with("sterna: --") && err(&output).contains("not supported yet"),
            "{}",
            err(&output)
        );
    }
    let live = sterna(&server, &["migrate", "web", "hostb", "--live"]);
    ends(&live, 2);
    assert!(err(&live).contains("--live: not needed: every migration is live"), "{}", err(&live));
    let compressed = sterna(&server, &["migrate", "web", "hostb", "--compressed"]);
    ends(&compressed, 2);
    assert!(err(&compressed).contains("--compressed: not needed; leave it out"), "{}", err(&compressed));
    let resumed = sterna(&server, &["migrate", "web", "hostb", "--postcopy-resume"]);
    ends(&resumed, 2);
    assert!(err(&resumed).contains("goes on by itself"), "{}", err(&resumed));
    for (flags, instead) in [
        (["--comp-methods", "xbzrle"], "write `--compression"),
        (["--comp-xbzrle-cache", "1000"], "write `--delta-cache"),
        (["--auto-converge-initial", "30"], "not needed: `--auto-converge` slows"),
        (["--postcopy-bandwidth", "30"], "write `--bandwidth"),
    ] {
        let output = sterna(&server, &[&["migrate", "web", "hostb"], &flags[..]].concat());
        ends(&output, 2);
        assert!(err(&output).contains(instead), "{}", err(&output));
    }
    let abort = sterna(&server, &["abort", "web", "--postcopy"]);
    ends(&abort, 2);
    assert!(err(&abort).contains("--postcopy: cannot be done: the VM runs at its target"), "{}", err(&abort));
    assert!(server.fake.requests.lock().unwrap().is_empty(), "nothing was asked of the agent");
}

#[test]
fn wrong_arguments_are_usage() {
    let server = Server::start();
    for args in [
        &["fly"][..],
        &["migrate", "web"],
        &["migrate", "web", "hostb", "--bandwidth", "1Gb/s"],
        &["migrate", "web", "hostb", "--max-downtime", "0"],
        &["migrate", "web", "hostb", "--timeout", "-1"],
        &["migrate", "web", "hostb", "--timeout-suspend"],
        &["migrate", "web", "hostb", "--timeout-postcopy"],
        &["migrate", "web", "hostb", "--timeout", "5", "--timeout-postcopy", "--timeout-suspend"],
        &["migrate", "web", "hostb", "--timeout", "5", "--timeout-postcopy", "--postcopy-after-precopy"],
        &["migrate", "web", "hostb", "--postcopy", "--postcopy-after-precopy"],
        &["migrate", "web", "hostb", "--postcopy", "--timeout", "5"],
        &["migrate", "web", "hostb", "--postcopy", "--auto-converge"],
        &["migrate", "web", "hostb", "--postcopy", "--min-bandwidth", "1"],
        &["migrate", "web", "hostb", "--postcopy", "--max-downtime", "50"],
        &["migrate", "web", "hostb", "--postcopy-after-precopy", "--auto-converge"],
        &["postcopy"],
        &["migrate", "web", "hostb", "--parallel-connections", "0"],
        &["run", "new"],
        &["set", "web"],
        &["ps", "-o", "yaml"],
    ] {
        let output = sterna(&server, args);
        ends(&output, 2);
        assert!(err(&output).starts_with("sterna: "), "{args:?}: {}", err(&output));
    }
}

#[test]
fn vms_are_run_listed_and_stopped() {
    let server = Server::start();
    let output = sterna(&server, &["run", "new", "--", "qemu-system-x86_64", "-m", "1G", "-o"]);
    ends(&output, 0);
    assert_eq!(server.fake.vms.lock().unwrap()["new"].argv, ["qemu-system-x86_64", "-m", "1G", "-o"]);
    let output = sterna(&server, &["ps"]);
    ends(&output, 0);
    let table = out(&output);
    assert!(table.lines().next().unwrap().starts_with("NAME"), "{table}");
    assert!(table.lines().any(|line| line.starts_with("new ") && line.contains("256.0 MiB")), "{table}");
    assert_eq!(err(&output), "lost: look at hostb\n", "a notice is shown and does not disturb the table");
    assert!(
        json(&sterna(&server, &["ps", "-o", "json"]))
            .as_array()
            .unwrap()
            .iter()
            .any(|vm| vm["name"] == "new")
    );
    let one = json(&sterna(&server, &["run", "other", "-o", "json", "--", "qemu-system-x86_64"]));
    assert_eq!(one["name"], "other");
    ends(&sterna(&server, &["run", "new", "--", "qemu-system-x86_64"]), 1);
    ends(&sterna(&server, &["run", "bad", "--", "/bin/sh"]), 2);
    ends(&sterna(&server, &["stop", "new"]), 0);
    ends(&sterna(&server, &["stop", "new"]), 2);
    let hosts = out(&sterna(&server, &["hosts"]));
    assert!(hosts.lines().any(|line| line.starts_with("hosta") && line.ends_with("this host")), "{hosts}");
}

#[test]
fn status_has_the_labels_of_virsh() {
    let server = Server::start();
    ends(&sterna(&server, &["migrate", "web", "hostb", "-q"]), 0);
    let output = sterna(&server, &["status", "web"]);
    ends(&output, 0);
    let table = out(&output);
    let value = |label: &str| {
        let line = table.lines().find_map(|line| line.strip_prefix(&format!("{label}:")));
        line.unwrap_or_else(|| panic!("no {label}: {table}")).trim().to_owned()
    };
    assert_eq!(value("Job type"), "Completed");
    assert_eq!(value("Memory total"), "256.000 MiB");
    assert_eq!(value("Page size"), "4096 bytes");
    assert_eq!(value("Iteration"), "3");
    assert_eq!(value("Total downtime"), "9.5 ms");
    let idle = sterna(&server, &["status", "idle"]);
    ends(&idle, 0);
    assert!(out(&idle).starts_with("Job type: "), "{}", out(&idle));
    assert_eq!(json(&sterna(&server, &["status", "idle", "-o", "json"]))["status"], "none");
    ends(&sterna(&server, &["status", "nobody"]), 2);
    let list = out(&sterna(&server, &["migrations"]));
    assert!(
        list.lines().nth(1).is_some_and(|line| line.starts_with("m1 ") && line.contains("completed")),
        "{list}"
    );
}

#[test]
fn a_migration_is_changed_and_aborted_by_its_vms_name() {
    let server = Server::start();
    ends(&sterna(&server, &["migrate", "stuck", "hostb", "--detach"]), 0);
    ends(&sterna(&server, &["set", "stuck", "--bandwidth", "1Gbit/s", "--max-downtime", "40"]), 0);
    let sets = server.fake.sets.lock().unwrap().clone();
    assert_eq!((sets[0].max_bandwidth, sets[0].downtime_limit), (Some(125_000_000), Some(40)));
    assert_eq!((sets[0].min_bandwidth, sets[0].auto_converge), (None, None));
    ends(&sterna(&server, &["set", "stuck", "--min-bandwidth", "0", "--auto-converge", "off"]), 0);
    let sets = server.fake.sets.lock().unwrap().clone();
    assert_eq!((sets[1].min_bandwidth, sets[1].auto_converge), (Some(0), Some(false)));
    let output = sterna(&server, &["abort", "stuck"]);
    ends(&output, 0);
    assert_eq!(out(&output), "stuck: cancelled; it runs at hosta\n");
    for args in [&["abort", "stuck"][..], &["set", "stuck", "--bandwidth", "1"]] {
        let output = sterna(&server, args);
        ends(&output, 2);
        assert!(err(&output).contains("is not being moved"), "{}", err(&output));
    }
}

#[test]
fn a_measurement_is_drawn_and_told() {
    let server = Server::start();
    let plot = tempfile::NamedTempFile::new().unwrap();
    let file = plot.path().to_str().unwrap();
    let args = ["wws", "web", "--bandwidth", "100Mbit/s", "--bandwidth", "1Gbit/s", "--plot", file];
    let output = sterna(&server, &args);
    ends(&output, 0);
    let table = out(&output);
    for text in [
        "VM:           web at hosta",
        "Working set:  360 pages (1.4 MiB)",
        "about 0.02 % of a processor",
        "Pages written in each interval",
        "████",
        "62 ms  14 ",
        "pc.ram  0x400000  16.0 MiB  300    98.5 %",
        "100 Mbit/s  5       -           -          22 ms     does not converge",
        "1 Gbit/s    5       4.0 s       256.0 MiB  22 ms",
    ] {
        assert!(table.contains(text), "{text}: {table}");
    }
    assert!(!table.contains('\u{1b}') && table.lines().all(|line| line.chars().count() <= 100), "{table}");
    let lines = err(&output);
    assert!(lines.starts_with("web: 1.0 of 60.0 s, 100 pages/s, 120 pages so far"), "{lines}");
    assert_eq!(lines.lines().count(), 3, "{lines}");
    let svg = std::fs::read_to_string(plot.path()).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("VM web: pages written in each interval"), "{svg}");
    assert_eq!(svg.matches("<polyline").count().min(2), 2, "a line in each panel: {svg}");
}

#[test]
fn a_measurements_flags_become_the_request_and_its_json_the_result() {
    let server = Server::start();
    let args = [
        "wws",
        "web",
        "--interval",
        "250ms",
        "--duration",
        "2m",
        "--max-cost",
        "0.5",
        "--max-downtime",
        "50",
    ];
    let output = sterna(&server, &[&args[..], &["--timeout", "30", "-q", "-o", "json"]].concat());
    ends(&output, 0);
    assert_eq!(err(&output), "");
    let view = json(&output);
    assert_eq!((&view["status"], &view["unique-pages"]), (&"completed".into(), &360.into()));
    assert_eq!(view["intervals"].as_array().unwrap().len(), 3);
    let asked = server.fake.measures.lock().unwrap()[0].clone();
    assert_eq!((asked.interval, asked.duration, asked.max_cost), (250, 120_000, 0.5));
    assert_eq!((asked.downtime_limit, asked.timeout, asked.bandwidths.len()), (50, Some(30.0), 4));
    let lines = sterna(&server, &["wws", "web", "-o", "jsonl"]);
    ends(&lines, 0);
    assert_eq!((out(&lines).lines().count(), err(&lines).as_str()), (4, ""));
    for args in [&["--interval", "often"][..], &["--bandwidth", "0"], &["--duration", "-1s"]] {
        ends(&sterna(&server, &[&["wws", "web"], args].concat()), 2);
    }
}

#[test]
fn a_measurement_that_does_not_complete_says_why() {
    let server = Server::start();
    let cut = sterna(&server, &["wws", "late", "-q"]);
    ends(&cut, 0);
    assert_eq!(err(&cut), "sterna: the measurement of VM late at hosta was cut short\n");
    assert!(out(&cut).contains("Working set:"), "what was measured is told: {}", out(&cut));
    let broken = sterna(&server, &["wws", "broken", "-q"]);
    ends(&broken, 1);
    assert!(err(&broken).ends_with("failed: its QEMU ended\n"), "{}", err(&broken));
    ends(&sterna(&server, &["wws", "nobody"]), 2);
    ends(&sterna(&server, &["wws", "lost"]), 1);
}

#[test]
fn ctrl_c_ends_a_measurement() {
    use std::sync::atomic::Ordering;
    let server = Server::start();
    let child = begin(&server, &["wws", "stuck"]);
    wait_until(|| server.fake.measuring.load(Ordering::SeqCst));
    let refused = sterna(&server, &["wws", "stuck"]);
    ends(&refused, 1);
    assert!(err(&refused).contains("is being measured already"), "{}", err(&refused));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    ends(&output, 3);
    assert!(err(&output).contains("the measurement of VM stuck was cancelled"), "{}", err(&output));
    wait_until(|| !server.fake.measuring.load(Ordering::SeqCst));
}

#[test]
fn keys_are_made_and_shown() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("pki");
    let dir = dir.to_str().unwrap();
    let run = |args: &[&str]| sterna_at(Path::new("/nonexistent"), &[&["pki"], args].concat());
    ends(&run(&["issue", dir, "hosta"]), 2);
    ends(&run(&["init", dir]), 0);
    ends(&run(&["init", dir]), 2);
    ends(&run(&["issue", dir, "hosta", "--name", "192.0.2.7"]), 0);
    let shown = out(&run(&["show", &format!("{dir}/hosta.crt")]));
    assert!(shown.contains("192.0.2.7") && shown.contains("hosta"), "{shown}");
    ends(&run(&["show", &format!("{dir}/hosta.key")]), 2);
}

#[test]
fn man_pages_and_completions_are_made() {
    let folder = tempfile::tempdir().unwrap();
    ends(&sterna_at(folder.path(), &["man", folder.path().to_str().unwrap()]), 0);
    let page = std::fs::read_to_string(folder.path().join("sterna-migrate.1")).unwrap();
    assert!(page.contains("max\\-downtime") && !page.contains("comp\\-methods"), "{page}");
    assert!(page.contains("postcopy\\-after\\-precopy") && page.contains("timeout\\-postcopy"), "{page}");
    let page = std::fs::read_to_string(folder.path().join("sterna-postcopy.1")).unwrap();
    assert!(page.contains("sterna postcopy web"), "{page}");
    let script = out(&sterna_at(folder.path(), &["completion", "bash"]));
    assert!(script.contains("--max-downtime") && script.contains("--timeout-postcopy"), "{script}");
}

#[test]
fn an_agent_without_a_configuration_says_so() {
    let output = sterna_at(Path::new("/nonexistent"), &["agent", "--config", "/nonexistent/agent.toml"]);
    ends(&output, 2);
    assert!(err(&output).contains("/nonexistent/agent.toml cannot be read"), "{}", err(&output));
}
