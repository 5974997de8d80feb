//! Post-copy on real QEMUs: the VM runs at the target while pages of it are at the source. RAM is proved equal, page by page, and the guest checks its own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

#[path = "../support/mod.rs"]
mod support;

mod faults;

use std::sync::Arc;

use sterna_agent::Agent;
use sterna_agent::model::{MigrateRequest, MigrationView};
use sterna_lab::guest::{GuestSpec, Program, Ram, Vga};
use support::{BOOT, World, idle, load, migrate, request};

/// A guest that writes to as much as `dirty` MiB at `rate` MB/s, and checks what it wrote.
fn writer(dirty: u32, rate: u32, how: &[&str]) -> Program {
    let words =
        ["--fill=64".to_owned(), format!("--dirty={dirty}"), format!("--rate={rate}"), "--check".into()];
    Program::Load(words.into_iter().chain(how.iter().map(|word| (*word).into())).collect())
}

fn at_once(request: MigrateRequest) -> MigrateRequest {
    MigrateRequest { postcopy: true, ..request }
}

fn after_precopy(request: MigrateRequest) -> MigrateRequest {
    MigrateRequest { postcopy_after_precopy: true, downtime_limit: 1, ..request }
}

/// Two agents, and a guest.
struct Pair {
    world: World,
    a: Arc<Agent>,
    b: Arc<Agent>,
}

impl Pair {
    fn boot(world: World, change: impl FnOnce(GuestSpec) -> GuestSpec) -> Self {
        let (a, b) = (world.agent("a"), world.agent("b"));
        world.boot(&a, &change(world.parts.guest("vm")));
        world.wait_for("vm", "LOAD t=", BOOT);
        Self { world, a, b }
    }

    /// A move, proved equal, after which the guest goes on and has lost nothing.
    fn moves(&self, change: impl FnOnce(MigrateRequest) -> MigrateRequest) -> MigrationView {
        let from_a = self.a.vms().iter().any(|vm| vm.name == "vm");
        let (from, to) = if from_a { (&self.a, &self.b) } else { (&self.b, &self.a) };
        let view = migrate(from, change(request("vm", to.name())));
        assert_eq!(view.status, "completed", "{view:?}\n{}", self.world.console("vm"));
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
        assert!(view.postcopy.as_ref().is_some_and(|known| known.faults.is_some()), "{view:?}");
        assert_eq!(to.vm("vm").unwrap().state, "running");
        self.world.wait_for_more("vm", "LOAD", BOOT);
        let console = self.world.console("vm");
        assert!(!console.contains("BAD"), "{console}");
        view
    }

    fn end(self) {
        drop(self.a.stop("vm"));
        drop(self.b.stop("vm"));
    }
}

/// There and back, by both ways.
fn moves(version: &str, change: impl FnOnce(GuestSpec) -> GuestSpec) {
    let pair = Pair::boot(World::new(version), change);
    for how in [at_once, after_precopy, at_once] {
        let view = pair.moves(how);
        println!("{:?} ms down: {:?}, {:?}", view.downtime, view.postcopy, view.downtime_split);
    }
    pair.end();
}

#[test]
fn plain_memory() {
    moves("7.2", |guest| GuestSpec { programs: vec![writer(32, 60, &["--write=dense"])], ..guest });
}

#[test]
fn plain_memory_of_the_newer_qemu_with_a_video_card() {
    moves("10.0", |guest| GuestSpec { programs: vec![load(60)], vcpus: 2, vga: Vga::Standard, ..guest });
}

#[test]
fn a_video_card_whose_memory_is_found_late() {
    moves("7.2", |guest| GuestSpec { programs: vec![load(60)], vga: Vga::Standard, ..guest });
}

#[test]
fn a_shared_memfd() {
    moves("7.2", |guest| GuestSpec { programs: vec![load(60)], ram: Ram::SharedMemfd, ..guest });
}

#[test]
fn a_private_memfd() {
    moves("10.0", |guest| GuestSpec { programs: vec![load(60)], ram: Ram::PrivateMemfd, ..guest });
}

#[test]
fn an_idle_guest() {
    let pair = Pair::boot(World::new("7.2"), |guest| GuestSpec { programs: vec![idle()], ..guest });
    let view = pair.moves(at_once);
    println!("{:?} ms down: {:?}, {:?}", view.downtime, view.postcopy, view.downtime_split);
    // It has next to nothing to fetch: it is not handed over before it is complete.
    let view = migrate(&pair.b, after_precopy(request("vm", "a")));
    assert_eq!((view.status.as_str(), view.postcopy), ("completed", None));
    // What was got ready for it is gone all the same.
    pair.moves(at_once);
    pair.end();
}
