//! Post-copy on real QEMUs: the VM runs at the target while pages of it are at the source. RAM is proved equal, page by page, and the guest checks its own.

mod faults;

use crate::memory::{HUGE_PAGES, write_file};
use crate::support::pair::{Pair, writer};
use crate::support::scene::until;
use crate::support::{BOOT, MOVE, World, idle, load, migrate, request, wait};
use sterna_agent::model::{MigrateRequest, MigrationView, RunRequest};
use sterna_lab::HugePages;
use sterna_lab::guest::{GuestSpec, Ram, Vga};

fn at_once(request: MigrateRequest) -> MigrateRequest {
    MigrateRequest { postcopy: true, timeout: None, ..request }
}

fn after_precopy(request: MigrateRequest) -> MigrateRequest {
    MigrateRequest { postcopy_after_precopy: true, downtime_limit: 1, ..request }
}

/// What a post-copy tells in the end.
fn assert_fetched(view: &MigrationView) {
    assert!(view.postcopy.as_ref().is_some_and(|known| known.faults.is_some()), "{view:?}");
}

/// There and back, by both ways.
fn moves(version: &str, change: impl FnOnce(GuestSpec) -> GuestSpec) {
    let pair = Pair::boot(World::new(version), change);
    for how in [at_once, after_precopy, at_once] {
        let view = pair.moves(how);
        assert_fetched(&view);
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

/// hugetlbfs: a fault is of 2 MiB, and a page of 4 KiB that is stale takes all of them along.
#[test]
fn huge_pages_that_are_shared() {
    let _pool = HugePages::reserve(2 * HUGE_PAGES).unwrap();
    moves("7.2", |guest| GuestSpec { programs: vec![load(60)], ram: Ram::SharedHuge, ..guest });
}

#[test]
fn huge_pages_that_are_private() {
    let _pool = HugePages::reserve(2 * HUGE_PAGES).unwrap();
    moves("10.0", |guest| GuestSpec { programs: vec![load(60)], ram: Ram::PrivateHuge, ..guest });
}

/// A guest that a link of this many bytes a second does not keep up with.
const NARROW: u64 = 20_000_000;

/// A file of a guest that takes seconds over such a link, while its kernel tells after two what is free.
const GIVEN_BACK_MIB: u32 = 256;

/// A guest that writes more than [`NARROW`] carries.
fn outruns(guest: GuestSpec) -> GuestSpec {
    GuestSpec { programs: vec![writer(48, 80, &[])], ..guest }
}

fn narrow(request: MigrateRequest) -> MigrateRequest {
    MigrateRequest { max_bandwidth: Some(NARROW), timeout: None, verify: true, ..request }
}

/// Begins a migration that never converges, and switches it in this round.
fn switches_in(round: u32) {
    let pair = Pair::boot(World::new("7.2"), outruns);
    let id = pair.a.migrate(narrow(request("vm", "b")), None).unwrap().id;
    let seen = || pair.a.migrations().into_iter().find(|view| view.id == id).unwrap();
    until("that round", MOVE, || (seen().ram.dirty_sync_count >= round).then_some(()));
    pair.a.postcopy(&id).unwrap();
    let view = wait(&pair.a, &id);
    println!("{view:?}");
    pair.assert_moved(&view);
    assert_fetched(&view);
    // Each page went once, or twice where it was written since: less than all of it again.
    assert!(view.ram.dirty_sync_count <= round + 1, "{view:?}");
    pair.end();
}

#[test]
fn a_switch_in_the_first_round() {
    switches_in(1);
}

#[test]
fn a_switch_in_the_second_round() {
    switches_in(2);
}

#[test]
fn a_switch_when_the_time_is_over() {
    let pair = Pair::boot(World::new("10.0"), outruns);
    let way = |request| MigrateRequest { timeout: Some(3.0), timeout_postcopy: true, ..narrow(request) };
    let view = pair.moves(way);
    assert_fetched(&view);
    assert!(view.downtime.is_some_and(|ms| ms < 1000.0) || view.blocks_verified.is_some(), "{view:?}");
    pair.end();
}

/// The kernel serves its own faults for nobody but root, unless it is asked for by its device.
#[test]
fn a_qemu_that_is_not_root() {
    let mut world = World::new("7.2");
    world.user = Some("nobody".into());
    drop((world.agent("a"), world.agent("b")));
    for folder in ["sockets-a", "sockets-b"] {
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(world.path(folder), everybody).unwrap();
    }
    let pair = Pair::boot(world, |guest| GuestSpec { programs: vec![load(60)], ..guest });
    assert_fetched(&pair.moves(at_once));
    assert_fetched(&pair.moves(after_precopy));
    pair.end();
}

#[test]
fn pages_in_the_clear() {
    let mut world = World::new("7.2");
    world.clear = vec!["a", "b"];
    let pair = Pair::boot(world, |guest| GuestSpec { programs: vec![load(60)], ..guest });
    assert_fetched(&pair.moves(at_once));
    pair.end();
}

/// Free pages are given back all the time, those too that have not come yet.
#[test]
fn a_guest_that_reports_its_free_pages() {
    let device = ["-device", "virtio-balloon-pci,free-page-reporting=on"].map(str::to_owned).to_vec();
    let pair = Pair::boot(World::new("7.2"), |guest| GuestSpec {
        programs: vec![load(60)],
        extra: device,
        memory_mib: 384,
        ..guest
    });
    let slowly = |request| MigrateRequest { max_bandwidth: Some(NARROW), ..at_once(request) };
    assert_fetched(&pair.moves(slowly));
    assert_fetched(&pair.moves(slowly));
    pair.end();
}

/// What a guest gives back before it has come is needed no more, but for the proof: it had been told that RAM is not proved equal.
#[test]
fn what_is_given_back_before_it_comes_is_proved_too() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let extra = ["-device", "virtio-balloon-pci,free-page-reporting=on"].map(str::to_owned).to_vec();
    let guest = GuestSpec { programs: vec![idle()], extra, memory_mib: 384, ..world.parts.guest("vm") };
    a.run(RunRequest { name: "vm".into(), argv: world.argv_with_orders(&guest), template: None }).unwrap();
    world.wait_for("vm", "LOAD t=", BOOT);
    write_file(&world, 1, GIVEN_BACK_MIB);
    let pair = Pair { world, a, b };
    let slowly = MigrateRequest { max_bandwidth: Some(NARROW * 3 / 2), ..at_once(request("vm", "b")) };
    let id = pair.a.migrate(slowly, None).unwrap().id;
    let seen = || pair.a.migrations().into_iter().find(|view| view.id == id).unwrap();
    until("it runs there", MOVE, || (seen().runs_at == "b").then_some(()));
    pair.world.order("b", "vm", "rm /tmp/file1");
    let view = wait(&pair.a, &id);
    println!("{view:?}");
    pair.assert_moved(&view);
    assert_fetched(&view);
    pair.end();
}

/// What the guest can do without goes to its balloon first, and comes back when all of it is there (Hines and Gopalan, section 3.4).
#[test]
fn a_balloon_takes_what_need_not_travel() {
    let device = ["-device", "virtio-balloon-pci"].map(str::to_owned).to_vec();
    let pair = Pair::boot(World::new("10.0"), |guest| GuestSpec {
        programs: vec![load(20)],
        extra: device,
        memory_mib: 384,
        ..guest
    });
    let view = pair.moves(|request| MigrateRequest { balloon: true, ..at_once(request) });
    assert!(view.ram.balloon_bytes > 32 << 20, "{view:?}");
    pair.end();
}

#[test]
fn an_idle_guest() {
    let pair = Pair::boot(World::new("7.2"), |guest| GuestSpec { programs: vec![idle()], ..guest });
    let view = pair.moves(at_once);
    println!("{:?} ms down: {:?}, {:?}", view.downtime, view.postcopy, view.downtime_split);
    // It has next to nothing to fetch: it is not handed over before it is complete.
    let view = migrate(&pair.b, MigrateRequest { downtime_limit: 300, ..after_precopy(request("vm", "a")) });
    assert_eq!((view.status.as_str(), view.postcopy), ("completed", None));
    // What was got ready for it is gone all the same.
    assert_fetched(&pair.moves(at_once));
    pair.end();
}
