//! The QMP client against a scripted server that says what a sane QEMU never would, and against real events.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use common::{Stage, WITHIN, versions};
use serde_json::{Value, json};
use sterna_vmm::qemu::{Qemu, Qmp, QmpError, Version};
use sterna_vmm::{RunState, Vmm};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 3, "minor": 2, "major": 7}, "package": "x", "new": 1}, "capabilities": ["oob"]}}"#;
const SHORT: Duration = Duration::from_millis(200);

/// A server that answers the n-th command with the n-th text; `ID` in it stands for the command's id, `ID-1` for the
/// one before.
fn server(answers: Vec<String>) -> (UnixStream, JoinHandle<Vec<Value>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut out = theirs.try_clone().unwrap();
        writeln!(out, "{GREETING}").unwrap();
        let mut seen = Vec::new();
        let mut answers = std::iter::once(r#"{"return": {}, "id": ID}"#.to_owned() + "\n").chain(answers);
        for line in BufReader::new(theirs).lines().map_while(Result::ok) {
            let command: Value = serde_json::from_str(&line).unwrap();
            let before = seen.last().map_or(0, |command: &Value| command["id"].as_u64().unwrap());
            let answer = answers.next();
            let id = command["id"].as_u64().unwrap();
            seen.push(command);
            match answer {
                // A client that is gone is no failure of the server's.
                Some(answer) => drop(out.write_all(
                    answer.replace("ID-1", &before.to_string()).replace("ID", &id.to_string()).as_bytes(),
                )),
                None => break,
            }
        }
        seen
    });
    (ours, thread)
}

fn client(answers: &[&str]) -> (Qmp, JoinHandle<Vec<Value>>) {
    let (socket, thread) = server(answers.iter().map(|answer| (*answer).to_owned()).collect());
    (Qmp::over(socket, WITHIN).unwrap(), thread)
}

fn one_error(answer: &str) -> (Qmp, QmpError) {
    let (mut qmp, _) = client(&[answer]);
    let error = qmp.execute("query-status", Value::Null, SHORT).unwrap_err();
    (qmp, error)
}

#[test]
fn the_greeting_gives_the_version_and_unknown_keys_pass() {
    let (qmp, _) = client(&[]);
    assert_eq!(qmp.version(), Version { major: 7, minor: 2, micro: 3 });
    assert!(qmp.version() < Version::new(7, 3));
}

#[test]
fn commands_carry_their_arguments_and_ids() {
    let (mut qmp, thread) = client(&["{\"return\": 1, \"id\": ID}\n", "{\"return\": 2, \"id\": ID}\n"]);
    assert_eq!(qmp.execute("a", json!({ "x": 1 }), WITHIN).unwrap(), 1);
    assert_eq!(qmp.execute("b", Value::Null, WITHIN).unwrap(), 2);
    drop(qmp);
    let seen = thread.join().unwrap();
    assert_eq!(seen[1], json!({ "execute": "a", "arguments": { "x": 1 }, "id": seen[1]["id"] }));
    assert_eq!(seen[2], json!({ "execute": "b", "id": seen[2]["id"] }));
    assert_ne!(seen[1]["id"], seen[2]["id"]);
}

#[test]
fn answers_out_of_order_find_their_commands() {
    let (mut qmp, _) =
        client(&["", "{\"return\": \"second\", \"id\": ID}\n{\"return\": \"first\", \"id\": ID-1}\n"]);
    let first = qmp.send("slow", Value::Null, WITHIN).unwrap();
    let second = qmp.send("quick", Value::Null, WITHIN).unwrap();
    assert_eq!(qmp.wait(&first, WITHIN).unwrap(), "first");
    assert_eq!(qmp.wait(&second, WITHIN).unwrap(), "second");
}

#[test]
fn events_are_kept_and_unknown_ones_do_no_harm() {
    let events = "{\"event\": \"NEW_IN_QEMU_99\", \"timestamp\": {}, \"odd\": []}\n{\"event\": \"STOP\"}\n\
                  {\"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\n{\"return\": {}, \"id\": ID}\n";
    let (mut qmp, _) = client(&[events]);
    qmp.execute("x", Value::Null, WITHIN).unwrap();
    let event = qmp.next_event(&["MIGRATION"], WITHIN).unwrap();
    assert_eq!(event.data["status"], "active");
    assert_eq!(qmp.next_event(&["STOP", "RESUME"], WITHIN).unwrap().name, "STOP");
    let none = qmp.next_event(&["STOP"], SHORT).unwrap_err();
    assert!(matches!(none, QmpError::TimedOut { .. }), "{none}");
}

#[test]
fn a_flood_of_events_does_not_fill_memory() {
    let mut flood = "{\"event\": \"FLOOD\"}\n".repeat(5000);
    flood.push_str("{\"event\": \"LAST\"}\n{\"return\": {}, \"id\": ID}\n");
    let (mut qmp, _) = client(&[&flood]);
    qmp.execute("x", Value::Null, WITHIN).unwrap();
    assert_eq!(qmp.next_event(&["LAST"], WITHIN).unwrap().name, "LAST");
    let mut kept = 0;
    while qmp.next_event(&["FLOOD"], SHORT).is_ok() {
        kept += 1;
    }
    assert!((1..2000).contains(&kept), "{kept}");
}

#[test]
fn a_refusal_carries_qemus_words() {
    let (mut qmp, error) =
        one_error("{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}, \"id\": ID}\n");
    assert!(matches!(&error, QmpError::Refused { desc, .. } if desc == "no such thing"), "{error}");
    assert!(
        !matches!(qmp.execute("x", Value::Null, SHORT), Err(QmpError::Broken)),
        "the connection is still good"
    );
}

#[test]
fn what_is_no_qmp_ends_the_connection() {
    let cases = [
        "garbage\n",
        "\n",
        "[]\n",
        "null\n",
        "\u{0}\u{1}\u{2}\n",
        "{\"error\": {\"desc\": \"bad JSON\"}}\n",
        "{\"return\":\n",
    ];
    for case in cases {
        let (mut qmp, error) = one_error(case);
        assert!(matches!(error, QmpError::Protocol { .. }), "{case:?}: {error}");
        let after = qmp.execute("x", Value::Null, SHORT).unwrap_err();
        assert!(matches!(after, QmpError::Broken), "{case:?}: {after}");
    }
}

#[test]
fn silence_and_half_a_line_run_into_the_deadline_and_lose_nothing() {
    let (mut qmp, error) = one_error("{\"return\": 1, ");
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
    let late = qmp.execute("x", Value::Null, SHORT).unwrap_err();
    assert!(matches!(late, QmpError::Closed { .. }), "{late}");

    let (mut qmp, _) = client(&["{\"return\": 1,", " \"id\": ID-1}\n{\"return\": 2, \"id\": ID}\n"]);
    let first = qmp.send("x", Value::Null, WITHIN).unwrap();
    assert!(matches!(qmp.wait(&first, SHORT), Err(QmpError::TimedOut { .. })));
    assert_eq!(qmp.execute("y", Value::Null, WITHIN).unwrap(), 2);
    assert_eq!(qmp.wait(&first, WITHIN).unwrap(), 1);
}

#[test]
fn an_endless_line_is_cut_off() {
    let (_, error) = one_error(&"x".repeat(20 << 20));
    assert!(matches!(error, QmpError::Protocol { .. }), "{error}");
}

#[test]
fn an_end_in_the_middle_says_that_qemu_closed() {
    let (mut qmp, _) = client(&[]);
    let error = qmp.execute("x", Value::Null, WITHIN).unwrap_err();
    assert!(matches!(error, QmpError::Closed { .. }), "{error}");
}

#[test]
fn a_greeting_that_is_none_is_refused() {
    for greeting in [
        "HTTP/1.1 400\r\n",
        "{}\n",
        "{\"QMP\": {}}\n",
        "{\"QMP\": {\"version\": {\"qemu\": {\"major\": -1}}}}\n",
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(greeting.as_bytes()).unwrap();
        let error = Qmp::over(ours, WITHIN).unwrap_err();
        assert!(matches!(error, QmpError::Protocol { .. }), "{greeting:?}: {error}");
    }
}

/// QEMU answers whoever is connected: also what a client asked who gave up and connected again. Taking such an answer
/// for ours, or for a failure, lost a VM that was just being launched on a busy host.
#[test]
fn answers_to_a_client_before_us_are_passed_over() {
    let stale = "{\"return\": 1, \"id\": 99}\n{\"return\": 1}\n{\"error\": {}, \"id\": \"x\"}\n{\"return\": 2, \"id\": ID}\n";
    let (mut qmp, _) = client(&[stale]);
    assert_eq!(qmp.execute("x", Value::Null, WITHIN).unwrap(), 2);

    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut out = theirs.try_clone().unwrap();
        writeln!(out, "{GREETING}\n{{\"return\": {{}}, \"id\": 1}}").unwrap();
        let mut line = String::new();
        BufReader::new(theirs).read_line(&mut line).unwrap();
        let id = serde_json::from_str::<Value>(&line).unwrap()["id"].clone();
        let error =
            json!({ "class": "CommandNotFound", "desc": "Capabilities negotiation is already complete" });
        writeln!(out, "{}", json!({ "error": error, "id": id })).unwrap();
    });
    Qmp::over(ours, WITHIN).unwrap();
    thread.join().unwrap();
}

/// Every connection has ids of its own, for what was asked on another one may be answered on this.
#[test]
fn no_two_connections_share_an_id() {
    let ids = |_| {
        let (qmp, thread) = client(&[]);
        drop(qmp);
        thread.join().unwrap()[0]["id"].clone()
    };
    let (first, second) = (ids(1), ids(2));
    assert_ne!(first, second);
}

#[test]
fn a_server_that_does_not_read_runs_into_the_deadline() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut out = theirs.try_clone().unwrap();
        writeln!(out, "{GREETING}").unwrap();
        let mut line = String::new();
        BufReader::new(theirs.try_clone().unwrap()).read_line(&mut line).unwrap();
        let id = serde_json::from_str::<Value>(&line).unwrap()["id"].clone();
        writeln!(out, "{}", json!({ "return": {}, "id": id })).unwrap();
        theirs
    });
    let mut qmp = Qmp::over(ours, WITHIN).unwrap();
    let _open = thread.join().unwrap();
    let error = qmp.execute("x", json!({ "big": "y".repeat(8 << 20) }), SHORT).unwrap_err();
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
    // Half a command is out: nothing sent after it would be understood.
    assert!(matches!(qmp.execute("x", Value::Null, SHORT), Err(QmpError::Broken)));
}

#[test]
fn a_socket_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = Qmp::connect(&folder.path().join("nothing"), SHORT).unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }) && error.to_string().contains("nothing"), "{error}");
    let long = folder.path().join("x".repeat(200));
    assert!(matches!(Qmp::connect(&long, SHORT), Err(QmpError::Connect { .. })));
}

#[test]
fn a_real_qemu_answers_sends_events_and_takes_descriptors() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.start("qmp", stage.argv(&["-M", "q35"]));
        let qmp = vm.qemu.qmp();
        assert!(qmp.version() >= Version::new(6, 2));
        let ticket = qmp.send("stop", Value::Null, WITHIN).unwrap();
        assert_eq!(qmp.next_event(&["STOP"], WITHIN).unwrap().name, "STOP");
        qmp.wait(&ticket, WITHIN).unwrap();
        let refused = qmp.execute("no-such-command", Value::Null, WITHIN).unwrap_err();
        assert!(
            matches!(&refused, QmpError::Refused { class, .. } if class == "CommandNotFound"),
            "{refused}"
        );
        assert!(qmp.hmp("info version", WITHIN).unwrap().starts_with(&qmp.version().to_string()));
        let file = std::fs::File::open(stage.disk()).unwrap();
        qmp.execute_with_fds("getfd", json!({ "fdname": "x" }), &[file.as_fd()], WITHIN).unwrap();
        assert!(vm.descriptors().iter().any(|link| link.ends_with("disk.raw")));
    }
}

/// It is done by its last byte, not before; any other command, and the end of the connection, take it back.
#[test]
fn what_is_typed_ahead_is_done_when_it_is_sent() {
    const READ: Duration = Duration::from_millis(50);
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.start("typed", stage.argv(&["-M", "q35"]));
        let (id, socket) = (vm.qemu.process_id(), vm.run_dir.join("qmp.sock"));
        let qmp = vm.qemu.qmp();
        qmp.type_ahead("stop", Value::Null, WITHIN).unwrap();
        std::thread::sleep(READ);
        assert!(!qmp.has_event(&["STOP"]).unwrap());
        qmp.execute("stop", Value::Null, WITHIN).unwrap();
        assert!(qmp.has_event(&["STOP"]).unwrap());

        qmp.type_ahead("cont", Value::Null, WITHIN).unwrap();
        std::thread::sleep(READ);
        let state = qmp.execute("query-status", Value::Null, WITHIN).unwrap();
        assert_eq!(state["status"], "paused");
        qmp.type_ahead("cont", Value::Null, WITHIN).unwrap();
        qmp.type_ahead("query-status", json!({}), WITHIN).unwrap();
        assert_eq!(qmp.execute("query-status", json!({}), WITHIN).unwrap()["status"], "paused");
        assert!(!qmp.has_event(&["RESUME"]).unwrap());

        qmp.type_ahead("quit", Value::Null, WITHIN).unwrap();
        std::thread::sleep(READ);
        qmp.shutdown();
        let mut found = Qemu::attach(id, &socket, None, WITHIN).unwrap();
        assert_eq!(found.status().unwrap(), RunState::Paused);
        found.resume().unwrap();
    }
}

#[test]
fn ids_come_again_only_when_they_are_free() {
    let answers: Vec<String> = (0..10_050).map(|n| format!("{{\"return\": {n}, \"id\": ID}}\n")).collect();
    let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
    let (mut qmp, thread) = client(&answers);
    // Nobody waits for the answer to the first: it is not taken for that to a later one.
    qmp.send("x", Value::Null, WITHIN).unwrap();
    for n in 1..10_050 {
        assert_eq!(qmp.execute("x", Value::Null, WITHIN).unwrap(), n);
    }
    drop(qmp);
    let ids: Vec<u64> = thread.join().unwrap().iter().map(|seen| seen["id"].as_u64().unwrap()).collect();
    assert!(ids[0] > u64::from(u32::MAX), "no agent before us had it: {}", ids[0]);
    assert!(ids[1..].iter().all(|id| (1..10_000).contains(id)));
}
