//! Post-copy on the command line: how it is asked for, what is told of it, and what is refused.

use super::*;

#[test]
fn ways_of_postcopy_become_the_request() {
    let server = Server::start();
    for flags in [
        &["--postcopy", "--bandwidth", "64", "--verify"][..],
        &["--postcopy-after-precopy", "--max-downtime", "50"],
        &["--timeout", "5", "--timeout-postcopy"],
        &[],
    ] {
        ends(&sterna(&server, &[&["migrate", "web", "hostb", "-q"], flags].concat()), 0);
    }
    let requests = server.fake.requests.lock().unwrap();
    let ways =
        requests.iter().map(|asked| (asked.postcopy, asked.postcopy_after_precopy, asked.timeout_postcopy));
    let once = [(true, false, false), (false, true, false), (false, false, true), (false, false, false)];
    assert_eq!(ways.collect::<Vec<_>>(), once);
    let misread =
        sterna(&server, &["migrate", "web", "hostb", "--postcopy", "--timeout", "5", "--timeout-postcopy"]);
    ends(&misread, 2);
    assert!(err(&misread).contains("--postcopy means at once: leave it out"), "{}", err(&misread));
}

#[test]
fn a_postcopy_says_what_the_vm_does_and_how_it_went() {
    let server = Server::start();
    let output = sterna(&server, &["migrate", "web", "hostb", "--postcopy"]);
    ends(&output, 0);
    let table = out(&output);
    for text in [
        "Postcopy requests:  120 pages",
        "Pushed:             3000 pages before they were asked for",
        "Faults:             100, waited p50 0.40, p99 2.50, max 8.20 ms",
        "Processors waited:  0 12.5, 1 40.0 ms",
    ] {
        assert!(table.contains(text), "{text}: {table}");
    }
    let status = out(&sterna(&server, &["status", "web"]));
    assert!(status.contains("Faults:             100, waited") && !status.contains("Post-copy:"), "{status}");
    let plain = out(&sterna(&server, &["migrate", "web", "hostb", "-q"]));
    assert!(!plain.contains("Postcopy") && !plain.contains("Faults"), "{plain}");
}

#[test]
fn a_migration_is_switched_by_its_vms_name() {
    let server = Server::start();
    let none = sterna(&server, &["postcopy", "idle"]);
    ends(&none, 2);
    assert!(err(&none).contains("is not being moved"), "{}", err(&none));
    let child = begin(&server, &["migrate", "stuck", "hostb", "-q"]);
    active(&server);
    let switched = sterna(&server, &["postcopy", "stuck"]);
    ends(&switched, 0);
    assert_eq!((out(&switched), err(&switched)), (String::new(), String::new()), "silence is success");
    let output = child.wait_with_output().unwrap();
    ends(&output, 0);
    assert!(out(&output).contains("Postcopy requests:"), "{}", out(&output));
    ends(&sterna(&server, &["postcopy", "stuck"]), 2);

    ends(&sterna(&server, &["migrate", "late", "hostb", "--detach"]), 0);
    let refused = sterna(&server, &["migrate-postcopy", "late"]);
    ends(&refused, 1);
    assert_eq!(err(&refused), "sterna: host hostb cannot: its RAM is in huge pages\n");
    let status = out(&sterna(&server, &["status", "late"]));
    assert!(status.contains("hostb cannot: its RAM is in huge pages"), "{status}");
    ends(&sterna(&server, &["abort", "late"]), 1);
}

/// Reads lines until one has this in it.
fn read_until(lines: &mut impl std::io::BufRead, text: &str) -> String {
    let mut line = String::new();
    while !line.contains(text) {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "it ended without {text}");
    }
    line
}

#[test]
fn a_postcopy_is_not_cancelled() {
    let server = Server::start();
    let mut child = begin(&server, &["migrate", "slowly", "hostb", "--postcopy"]);
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap());
    let active = read_until(&mut lines, "postcopy-active");
    let figures = "it runs at hostb, 64.0 MiB missing, 120 pages asked for, 3000 pushed\n";
    assert_eq!(active, format!("slowly: postcopy-active, 75.0 %, {figures}"));
    let status = out(&sterna(&server, &["status", "slowly"]));
    assert!(status.contains("Post-copy:") && status.contains("it runs at hostb"), "{status}");
    interrupt(&child);
    read_until(&mut lines, "sterna: too late to cancel: VM slowly runs at hostb");
    assert!(server.fake.cancels.lock().unwrap().is_empty(), "nothing was asked of the agent");
    let refused = sterna(&server, &["abort", "slowly"]);
    ends(&refused, 1);
    assert_eq!(err(&refused), "sterna: the VM runs at host hostb\n");
    let output = child.wait_with_output().unwrap();
    ends(&output, 0);
    assert!(out(&output).contains("from hosta to hostb"), "{}", out(&output));
}
