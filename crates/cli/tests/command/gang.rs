//! Several VMs that leave together: one request, a line for each, and the gravest end as the exit code.

use super::{begin, ends, err, interrupt, json, out, sterna};
use crate::fake::{Server, wait_until};
use serde_json::Value;
use sterna_agent::model::{Dedup, SendTemplate};

/// Those of the arguments, without progress.
fn quiet(server: &Server, args: &[&str]) -> std::process::Output {
    sterna(server, &[&["migrate", "-q"], args].concat())
}

#[test]
fn several_vms_leave_by_one_request_and_have_a_row_each() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "web", "idle", "hostb", "--bandwidth", "64"]);
    ends(&output, 0);
    let table = out(&output);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    let heads = ["VM", "FROM", "TO", "STATUS", "TOTAL", "MS", "DOWNTIME", "MS", "WIRE", "SHARED"];
    assert_eq!(rows[0], heads, "{table}");
    assert_eq!(rows[1][..6], ["web", "hosta", "hostb", "completed", "61.0", "9.5"], "{table}");
    assert_eq!(rows[2][..6], ["idle", "hosta", "hostb", "completed", "61.0", "9.5"], "{table}");
    assert_eq!((rows.len(), rows[1].last()), (3, Some(&"-")), "nothing was shared: {table}");
    let lines = err(&output);
    for vm in ["web", "idle"] {
        assert!(lines.contains(&format!("{vm}: setup, to hostb\n")), "{lines}");
        assert!(lines.contains(&format!("{vm}: active, ")), "{lines}");
    }
    assert!(!lines.contains('\r') && !lines.contains('\u{1b}'), "plain lines off a terminal: {lines:?}");

    let requests = server.fake.requests.lock().unwrap();
    let asked: Vec<_> = requests
        .iter()
        .map(|asked| (asked.vm.as_str(), asked.host.as_str(), asked.max_bandwidth, asked.dedup))
        .collect();
    let limit = Some(64 << 20);
    assert_eq!(asked, [("web", "hostb", limit, Dedup::Frames), ("idle", "hostb", limit, Dedup::Frames)]);
    let keys: Vec<String> = server.fake.keys.lock().unwrap().keys().cloned().collect();
    let one = keys[0].trim_end_matches("/idle");
    assert_eq!(keys, [format!("{one}/idle"), format!("{one}/web")], "one request, with an idempotency key");
}

#[test]
fn what_travels_once_is_in_the_request() {
    let server = Server::start();
    for args in [
        &["web", "idle", "hostb", "--dedup", "hash"][..],
        &["web", "idle", "hostb", "--dedup", "none"],
        &["web", "hostb", "--dedup", "hash"],
        &["web", "hostb"],
    ] {
        ends(&quiet(&server, args), 0);
    }
    ends(&quiet(&server, &["web", "idle", "hostb", "--dedup", "content"]), 2);
    let requests = server.fake.requests.lock().unwrap();
    let asked: Vec<Dedup> = requests.iter().map(|asked| asked.dedup).collect();
    assert_eq!(asked, [Dedup::Hash, Dedup::Hash, Dedup::None, Dedup::None, Dedup::Hash, Dedup::Frames]);
}

#[test]
fn when_a_template_goes_is_in_the_request() {
    let server = Server::start();
    for args in [
        &["web", "hostb"][..],
        &["web", "hostb", "--send-template", "beside"],
        &["web", "hostb", "--send-template", "after", "--postcopy"],
    ] {
        ends(&quiet(&server, args), 0);
    }
    let output = quiet(&server, &["web", "hostb", "--send-template", "after"]);
    ends(&output, 2);
    assert!(err(&output).contains("give --postcopy too"), "{}", err(&output));
    ends(&quiet(&server, &["web", "hostb", "--send-template", "never"]), 2);
    let requests = server.fake.requests.lock().unwrap();
    let asked: Vec<SendTemplate> = requests.iter().map(|asked| asked.send_template).collect();
    assert_eq!(asked, [SendTemplate::Before, SendTemplate::Beside, SendTemplate::After]);
}

#[test]
fn json_is_a_list_of_final_views_and_jsonl_each_of_all() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "web", "idle", "hostb", "-o", "json"]);
    ends(&output, 0);
    let views = json(&output);
    let told: Vec<_> = views.as_array().unwrap().iter().map(|view| (&view["vm"], &view["status"])).collect();
    let completed = Value::from("completed");
    assert_eq!(told, [(&"web".into(), &completed), (&"idle".into(), &completed)]);
    for figure in ["common-pages", "common-bytes", "common-fallback-pages"] {
        assert_eq!(views[0]["ram"][figure], 0, "{figure}: {views}");
    }

    let output = sterna(&server, &["migrate", "web", "idle", "hostb", "-o", "jsonl"]);
    ends(&output, 0);
    assert_eq!(err(&output), "", "progress is on stdout then");
    let lines: Vec<Value> = out(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for vm in ["web", "idle"] {
        let of_vm: Vec<&Value> = lines.iter().filter(|view| view["vm"] == vm).collect();
        let ended = of_vm.iter().filter(|view| view["status"] == "completed").count();
        assert_eq!((&of_vm[0]["status"], ended), (&"setup".into(), 1), "{of_vm:?}");
    }
    let last: Vec<&Value> = lines[lines.len() - 2..].iter().map(|view| &view["status"]).collect();
    assert_eq!(last, [&completed, &completed], "the results come last");
}

#[test]
fn one_that_is_refused_does_not_stop_the_others() {
    let server = Server::start();
    // It is no mere mistake: the other has moved.
    let output = quiet(&server, &["nobody", "web", "hostb"]);
    ends(&output, 1);
    assert_eq!(err(&output), "sterna: there is no VM nobody here\n");
    let table = out(&output);
    assert!(table.lines().count() == 2 && table.contains("web") && table.contains("completed"), "{table}");

    // By the pre-check, with every reason.
    let output = quiet(&server, &["web", "refused-later", "hostb"]);
    ends(&output, 5);
    let (table, lines) = (out(&output), err(&output));
    assert!(table.contains("completed") && table.contains("failed"), "{table}");
    let reasons = "  vfio: a device of the host is passed through: hostpci0\n  memory: hostb has 1 GiB free, 2 GiB are needed\n";
    assert!(lines.contains("VM refused-later cannot move to hostb") && lines.ends_with(reasons), "{lines}");
}

#[test]
fn the_gravest_end_is_the_exit_code_and_is_said_last() {
    let server = Server::start();
    let output = quiet(&server, &["torn", "web", "nobody", "broken", "refused-later", "hostb"]);
    ends(&output, 4);
    let lines = err(&output);
    let at = |text: &str| lines.find(text).unwrap_or_else(|| panic!("{text}: {lines}"));
    let broken = at("sterna: VM broken did not move to hostb: the link was cut; it runs at hosta\n");
    let attention = at("sterna: VM torn needs attention: ");
    let others = [broken, at("VM refused-later cannot move to hostb"), at("there is no VM nobody here")];
    assert!(others.iter().all(|other| *other < attention), "{lines}");
    assert_eq!(out(&output).lines().count(), 5, "a row for each that began: {}", out(&output));

    ends(&quiet(&server, &["broken", "refused-later", "web", "nobody", "hostb"]), 1);
    let output = quiet(&server, &["broken", "web", "hostb", "-o", "json"]);
    ends(&output, 1);
    assert_eq!(
        (&json(&output)[0]["status"], &json(&output)[1]["status"]),
        (&"failed".into(), &"completed".into())
    );
}

#[test]
fn a_vm_that_is_named_twice_is_usage() {
    let server = Server::start();
    let output = quiet(&server, &["web", "idle", "web", "hostb"]);
    ends(&output, 2);
    assert_eq!((out(&output).as_str(), err(&output).as_str()), ("", "sterna: a VM is named twice\n"));
    assert!(server.fake.requests.lock().unwrap().is_empty(), "nothing was begun");
}

#[test]
fn detach_prints_an_id_for_each() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "stuck", "web", "hostb", "--detach"]);
    ends(&output, 0);
    assert_eq!((out(&output).as_str(), err(&output).as_str()), ("m1\nm2\n", ""));
    for (id, vm) in [("m1", "stuck"), ("m2", "web")] {
        assert_eq!(json(&sterna(&server, &["status", id, "-o", "json"]))["vm"], vm);
    }
    let output = sterna(&server, &["migrate", "nobody", "idle", "hostb", "--detach"]);
    ends(&output, 1);
    let told = (out(&output), err(&output));
    assert_eq!(told, ("m3\n".to_owned(), "sterna: there is no VM nobody here\n".to_owned()));
}

#[test]
fn an_interrupt_cancels_all_of_them() {
    let server = Server::start();
    let child = begin(&server, &["migrate", "stuck", "late", "hostb", "-q"]);
    wait_until(|| {
        let migrations = server.fake.migrations.lock().unwrap();
        let far = |(_, sender): &(_, tokio::sync::watch::Sender<sterna_agent::model::MigrationView>)| {
            sender.borrow().ram.dirty_sync_count == 3
        };
        migrations.len() == 2 && migrations.iter().all(far)
    });
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    ends(&output, 3);
    let mut cancels = server.fake.cancels.lock().unwrap().clone();
    cancels.sort();
    assert_eq!(cancels, ["m1", "m2"]);
    let (table, lines) = (out(&output), err(&output));
    assert!(table.contains("cancelled") && table.contains("completed"), "{table}");
    assert!(lines.contains("it is too late: the VM was handed over"), "{lines}");
    let end = "sterna: the migration of VM stuck to hostb was cancelled; it runs at hosta\n";
    assert!(lines.ends_with(end), "{lines}");
}

#[test]
fn help_tells_of_several() {
    let server = Server::start();
    let help = out(&sterna(&server, &["migrate", "--help"]));
    for text in [
        "<VM>... <HOST>",
        "Several VMs leave together",
        "sterna migrate web1 web2 web3 hostb",
        "--dedup <WHAT>",
    ] {
        assert!(help.contains(text), "{text}: {help}");
    }
    ends(&sterna(&server, &["migrate", "web"]), 2);
}

#[test]
fn where_none_can_begin_nothing_was_changed() {
    let server = Server::start();
    let output = quiet(&server, &["nobody", "neither", "hostb"]);
    ends(&output, 2);
    assert_eq!(out(&output), "");
    assert!(err(&output).contains("no VM nobody here") && err(&output).contains("no VM neither here"));
}
