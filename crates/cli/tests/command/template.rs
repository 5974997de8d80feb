//! `sterna template`, and clones.

use super::{ends, err, json, out, sterna};
use crate::fake::Server;

#[test]
fn a_template_is_made_shown_sent_used_and_removed() {
    let server = Server::start();
    let made = sterna(&server, &["template", "create", "golden", "--from", "web"]);
    ends(&made, 0);
    assert!(out(&made).contains("golden") && out(&made).contains("DIGEST"), "{}", out(&made));
    let list = sterna(&server, &["template", "list", "-o", "json"]);
    assert_eq!(json(&list)[0]["name"], "golden");
    let one = sterna(&server, &["template", "inspect", "golden"]);
    assert!(out(&one).contains(&"ab".repeat(32)) && out(&one).contains("none on this host"), "{}", out(&one));
    let pushed = sterna(&server, &["template", "push", "golden", "hostb"]);
    assert!(out(&pushed).contains("were sent"), "{}", out(&pushed));
    let again = sterna(&server, &["template", "push", "golden", "hostc"]);
    assert!(out(&again).contains("has template golden already"), "{}", out(&again));
    let clone = sterna(&server, &["run", "web2", "--template", "golden", "-o", "json"]);
    ends(&clone, 0);
    assert_eq!(json(&clone)["template"], "golden");
    ends(&sterna(&server, &["template", "remove", "golden"]), 0);
    ends(&sterna(&server, &["template", "inspect", "golden"]), 2);
}

/// Booted under the template's name with that in its places, and ended in any case.
#[test]
fn a_vm_is_booted_until_it_is_ready() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let console = folder.path().join("golden.log");
    std::fs::write(&console, "of an earlier boot: login:\n").unwrap();
    let file = console.display().to_string();
    let line = ["--", "qemu-system-x86_64", "-serial", "file:/tmp/{vm}.log"];
    let by = |ready: &[&str]| sterna(&server, &[&["template", "create", "golden"], ready, &line].concat());
    let late = by(&["--console", &file, "--until-line", "login:", "--within", "0.5"]);
    ends(&late, 1);
    assert!(err(&late).contains("not ready"), "{}", err(&late));
    assert!(server.fake.vms.lock().unwrap().get("golden").is_none(), "it was ended");
    ends(&by(&["--until-command", "exit 1", "--within", "0.5"]), 1);
    // What cannot become a template is not waited for.
    let unfit = ["template", "create", "unfit", "--after", "600", "--within", "1000"];
    let refused = sterna(&server, &[&unfit[..], &line].concat());
    ends(&refused, 1);
    assert!(err(&refused).contains("it may write a disk"), "{}", err(&refused));
    assert!(server.fake.vms.lock().unwrap().get("unfit").is_none());
    ends(&by(&["--until-command", "true", "--after", "0.1"]), 0);
    let made = server.fake.templates.lock().unwrap()["golden"].clone();
    assert_eq!(made.argv, &line[1..], "clones have names of their own");
    assert!(server.fake.vms.lock().unwrap().get("golden").is_none());
}

#[test]
fn what_makes_no_sense_is_usage() {
    let server = Server::start();
    for args in [
        &["template", "create", "golden"][..],
        &["template", "create", "golden", "--", "qemu-system-x86_64"],
        &["template", "create", "golden", "--from", "web", "--", "qemu-system-x86_64"],
        &["template", "create", "golden", "--until-line", "x", "--", "qemu-system-x86_64"],
        &["run", "web2", "--template", "golden", "--", "qemu-system-x86_64"],
        &["run", "web2"],
        &["run", "web2", "--template", "nothing"],
    ] {
        ends(&sterna(&server, args), 2);
    }
    let refused = sterna(&server, &["template", "create", "golden", "--from", "stuck"]);
    ends(&refused, 1);
    assert!(err(&refused).contains("it may write a disk"), "{}", err(&refused));
}
