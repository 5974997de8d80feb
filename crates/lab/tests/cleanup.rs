//! Whatever happens to the owner of a lab, the lab goes, and only the lab.
//!
//! The owner is a real process (`sterna-lab up`), ended in each way that processes end.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rustix::process::Signal;
use sterna_lab::process::ProcessId;
use sterna_lab::state::{self, State};
use sterna_lab::{Lab, LabSpec, Wiring, net, run};

const PROGRAM: &str = env!("CARGO_BIN_EXE_sterna-lab");
/// Far more than a removal takes on a machine full of tests.
const GONE: Duration = Duration::from_secs(60);

/// The start of a lab removes the dead labs of all: a test must not do another one's work.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct Up {
    owner: Child,
    state: State,
}

/// A lab with a process of its own, and a process that runs in it and was told to nobody.
fn up() -> (Up, ProcessId) {
    let mut command = Command::new(PROGRAM);
    let mut owner = command.args(["up", "--hosts", "2"]).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let lines: Vec<_> = lines.map(Result::unwrap).take_while(|l| !l.starts_with("Ctrl-C")).collect();
    let name = lines[0].strip_prefix("lab ").unwrap().to_owned();
    let state = state::all().unwrap().into_iter().find(|s| s.name == name).unwrap();
    let script = "setsid sleep 600 & echo $!";
    let pid = run::output(net::command_in(&state.namespaces[0], "sh").args(["-c", script]), GONE).unwrap();
    let inside = ProcessId::of(pid.trim().parse().unwrap()).unwrap();
    (Up { owner, state }, inside)
}

fn is_left(state: &State) -> bool {
    state.namespaces.iter().any(|n| state::namespace_path(n).exists())
        || state::file_of(&state.name).exists()
        || state::dir_of(&state.name).exists()
}

/// Names of the machine's own interfaces: the lab must neither add nor take one.
fn interfaces() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/class/net").unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn ends_by(signal: Signal) {
    let before = interfaces();
    let (mut up, inside) = up();
    assert!(is_left(&up.state) && inside.is_alive());
    assert_eq!(interfaces(), before);
    ProcessId::of(up.owner.id()).unwrap().signal(signal);
    up.owner.wait().unwrap();
    run::until("the lab's removal", GONE, || !is_left(&up.state)).unwrap();
    assert!(!inside.is_alive());
    assert_eq!(interfaces(), before);
}

#[test]
fn ctrl_c_removes_the_lab() {
    let _alone = alone();
    ends_by(Signal::INT);
}

#[test]
fn a_killed_owner_leaves_nothing() {
    let _alone = alone();
    ends_by(Signal::KILL);
}

/// The whole process group dies at once, reaper included, as when a container is stopped.
#[test]
fn down_removes_what_a_killed_reaper_left() {
    let _alone = alone();
    let (mut up, inside) = up();
    for process in &up.state.processes {
        process.kill().unwrap();
    }
    let owner = ProcessId::of(up.owner.id()).unwrap();
    let refused = net::down(Some(&up.state.name)).unwrap_err();
    assert!(refused.to_string().contains(&owner.pid.to_string()), "{refused}");
    owner.kill().unwrap();
    up.owner.wait().unwrap();
    // By name would fail if the start of somebody's lab swept it away just now, which is as good.
    let status = Command::new(PROGRAM).arg("down").status().unwrap();
    assert!(status.success());
    assert!(!is_left(&up.state) && !inside.is_alive());
}

#[test]
fn labs_live_side_by_side_and_go_one_by_one() {
    let _alone = alone();
    let first = Lab::up(&LabSpec::default()).unwrap();
    let second = Lab::up(&LabSpec { hosts: 3, rate: None, ..LabSpec::default() }).unwrap();
    let name = first.name().to_owned();
    drop(first);
    assert!(!state::file_of(&name).exists());
    let ping = ["-c", "1", "-w", "20", "10.76.0.3"];
    let mut command = second.command(&second.hosts()[0].namespace, "busybox");
    run::output(command.arg("ping").args(ping), GONE).unwrap();
    assert!(second.link_bytes(&second.hosts()[0]).unwrap().sent > 0);
    second.down().unwrap();
}

#[test]
fn a_cut_link_carries_nothing_until_it_is_joined() {
    let _alone = alone();
    let lab = Lab::up(&LabSpec::default()).unwrap();
    let (a, b) = (&lab.hosts()[0], &lab.hosts()[1]);
    let reaches = |limit: &str| {
        let mut ping = lab.command(&a.namespace, "busybox");
        run::output(ping.args(["ping", "-c", "1", "-w", limit, &b.address.to_string()]), GONE).is_ok()
    };
    assert!(reaches("20"));
    lab.set_link(b, net::Cable::Unplugged).unwrap();
    assert!(!reaches("1"));
    lab.set_link(b, net::Cable::Plugged).unwrap();
    assert!(reaches("20"));
    lab.down().unwrap();
}

#[test]
fn a_detached_lab_stays_until_it_is_named() {
    let _alone = alone();
    let output = run::output(Command::new(PROGRAM).args(["up", "--detach", "--hosts", "1"]), GONE).unwrap();
    let name = output.lines().find_map(|l| l.strip_prefix("lab ")).unwrap().to_owned();
    state::sweep().unwrap();
    assert!(Path::new(&state::file_of(&name)).exists());
    assert_eq!(net::down(Some(&name)).unwrap(), std::slice::from_ref(&name));
    assert!(!state::file_of(&name).exists());
    net::down(Some(&name)).unwrap_err();
}

#[test]
fn shared_wiring_has_one_shaped_cable_and_counts_migrations_alone() {
    let _alone = alone();
    let lab = Lab::up(&LabSpec { wiring: Wiring::Shared, ..LabSpec::default() }).unwrap();
    let (a, b) = (&lab.hosts()[0], &lab.hosts()[1]);
    let shows = |namespace: &str, device: &str| {
        run::line(&format!("tc -n {namespace} qdisc show dev {device}"), GONE).unwrap()
    };
    assert!(shows(&a.namespace, "guest0").contains("tbf") && !shows(&a.namespace, "mig0").contains("tbf"));
    assert!(shows(&format!("{}-sw", lab.name()), "g-a").contains("tbf"));
    let before = lab.link_bytes(a).unwrap();
    let mut ping = lab.command(&a.namespace, "busybox");
    run::output(ping.args(["ping", "-c", "1", "-w", "20", &b.address.to_string()]), GONE).unwrap();
    assert!(lab.link_bytes(a).unwrap().sent > before.sent);
    // The hosts' addresses are not the client's business.
    let mut ping = lab.command(&lab.client(), "busybox");
    run::output(ping.args(["ping", "-c", "1", "-w", "1", &b.address.to_string()]), GONE).unwrap_err();
    lab.down().unwrap();
}

/// A client that outpaces the limit would mean that the shaping is not there.
#[test]
fn the_link_is_shaped_at_both_ends() {
    let _alone = alone();
    let lab = Lab::up(&LabSpec { rate: Some("100mbit".into()), ..LabSpec::default() }).unwrap();
    let switch = format!("{}-sw", lab.name());
    let shows = |namespace: &str, device: &str| {
        let line = format!("tc -n {namespace} qdisc show dev {device}");
        run::line(&line, GONE).unwrap()
    };
    for host in lab.hosts() {
        assert!(shows(&host.namespace, "mig0").contains("tbf"), "{}", shows(&host.namespace, "mig0"));
        assert!(shows(&switch, &format!("m-{}", host.name)).contains("rate 100Mbit"));
    }
    lab.down().unwrap();
}
