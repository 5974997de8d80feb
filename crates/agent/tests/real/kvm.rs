//! A guest under KVM moves, there and back. It runs no operating system and counts in memory that proves itself (see the top
//! of `crates/guest/bare/pattern.s`): each page that is lost, stale or misplaced is told as `BAD` on its console.

use std::path::Path;
use std::sync::Arc;

use crate::support::{BOOT, World, count, migrate, request};
use serde_json::json;
use sterna_agent::Agent;
use sterna_agent::model::{MigrateRequest, RunRequest};
use sterna_lab::LabDir;
use sterna_lab::bare::Pattern;

/// Two processors that write all the time.
const GUEST: Pattern = Pattern { vcpus: 2, mib_per_vcpu: 16 };

#[test]
fn a_q35() {
    there_and_back("7.2", "q35");
}

#[test]
fn a_microvm() {
    there_and_back("7.2", "microvm");
}

#[test]
fn a_q35_on_the_newer_qemu() {
    there_and_back("10.0", "q35");
}

#[test]
fn a_microvm_on_the_newer_qemu() {
    there_and_back("10.0", "microvm");
}

fn there_and_back(version: &str, machine: &str) {
    let world = World::new(version);
    let (a, b) = (world.agent("a"), world.agent("b"));
    a.run(RunRequest { name: "vm".into(), argv: argv(&world, machine), template: None }).unwrap();
    world.wait_for("vm", "READY", BOOT);
    let kvm = world.qmp("a", "vm").execute("query-kvm", json!({})).unwrap();
    assert_eq!(kvm["enabled"], Path::new("/dev/kvm").exists(), "{kvm}");
    for _ in 0..count(2, 100) {
        move_and_check(&world, &a, &b);
        move_and_check(&world, &b, &a);
    }
    a.stop("vm").unwrap();
}

fn move_and_check(world: &World, from: &Arc<Agent>, to: &Arc<Agent>) {
    // It writes all of its memory as fast as it can: no number of rounds would make the last one short.
    let hurried = MigrateRequest { timeout: Some(1.0), ..request("vm", to.name()) };
    let view = migrate(from, hurried);
    assert_eq!(view.status, "completed", "{view:?}\n{}", world.console("vm"));
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    // The first pass may have been over when it came: the second has seen every page here.
    world.wait_for_more("vm", "PASS", BOOT);
    world.wait_for_more("vm", "PASS", BOOT);
    let console = world.console("vm");
    assert!(!console.contains("BAD"), "{console}");
    assert_passes_go_on(&console);
}

/// Each processor's number of passes, from line to line: a VM that ran twice would tell a pass twice.
fn assert_passes_go_on(console: &str) {
    let lines = console.lines().filter_map(|line| line.strip_prefix("PASS "));
    let whole = lines.filter(|line| line.len() == 9 * usize::from(GUEST.vcpus) - 1);
    let first: Vec<u64> = whole.map(|line| u64::from_str_radix(&line[..8], 16).unwrap()).collect();
    assert!(first.is_sorted_by(|one, next| one + 1 == *next), "{console}");
}

/// QEMU takes TCG where there is no KVM.
fn argv(world: &World, machine: &str) -> Vec<String> {
    let kernel = GUEST.build(&LabDir::open().unwrap()).unwrap();
    let (serial, qmp) = (world.serial("vm"), world.path("sockets-a").join("vm.qmp"));
    let options = format!(
        "-nodefaults -no-user-config -display none -machine {machine} -accel kvm -accel tcg -smp {} -m {} -kernel {} \
         -chardev file,id=console,path={},append=on -serial chardev:console -qmp unix:{},server=on,wait=off",
        GUEST.vcpus,
        GUEST.memory_mib(),
        kernel.display(),
        serial.display(),
        qmp.display(),
    );
    let mut argv = vec![world.parts.qemu(&world.version).display().to_string()];
    argv.extend(options.split(' ').map(str::to_owned));
    argv
}
