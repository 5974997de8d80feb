//! Kinds of memory, and what becomes of memory while it is moved: the guest gives pages back and takes them again.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::scene::{taken, until};
use crate::support::{BOOT, MOVE, World, count, load, migrate, pids_naming, request, wait};
use serde_json::json;
use sterna_agent::model::{CompressionMode, MigrateRequest, MigrationView, RunRequest, SetRequest};
use sterna_agent::{Agent, Mechanism};
use sterna_lab::HugePages;
use sterna_lab::guest::{GuestSpec, Program, Ram};
use sterna_lab::qmp::Qmp;
use sterna_memory::{Process, Region, populated};

/// How fast pages travel in the first round, and then: slower than the guest writes, so that rounds do not shrink until one is so short
/// that the guest, which runs little on a busy host, writes nothing in it.
const FIRST: u64 = 60_000_000;
const SLOW: u64 = 4_000_000;
/// How much of what the source held, and has sent, the guest must have given back when it is stopped.
const GIVEN_BACK: u64 = 4 << 20;
/// A file in the guest's memory, and how much of it must have been reported as free.
const FILE_MIB: u32 = 32;
const REPORTED: u64 = 8 << 20;
/// A guest's kernel reports nothing as long as less than 64 MiB (32 blocks of 2 MiB, mm/page_reporting.c) and a little are free:
/// this one has twice as much free at all times.
const REPORTING_MIB: u32 = 320;
/// How much is written and free again before a balloon takes it: with the load and its kernel all but 50 MiB of the guest.
const FREED_MIB: u32 = 48;
/// When a guest that has not done what it was asked for is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// What the balloon leaves to a guest of 192 MiB, and what it takes from it in between.
const INFLATED: u64 = 150 << 20;
const DEFLATED: u64 = 180 << 20;
const WHOLE: u64 = 192 << 20;
/// Steps in which the balloon takes more, until it finds memory that was written before.
const STEP: u64 = 4 << 20;
const INFLATED_MOST: u64 = 110 << 20;
/// How much more memory the target may hold than the source: zeros that were never sent, where huge pages have them.
const GROWTH_MAX: u64 = 64 << 20;
/// The same where nothing of the kind is in the way: what the guest takes between the hand-off and the last look.
const AFTER_HAND_OFF_MAX: u64 = 4 << 20;

/// hugetlbfs, mapped shared and private: there and back, proved equal, and at no time in more huge pages than before.
#[test]
fn huge_pages_move() {
    let _pool = HugePages::reserve(2 * HUGE_PAGES).unwrap();
    let kinds = [
        ("7.2", Ram::SharedHuge),
        ("10.0", Ram::PrivateHuge),
        ("10.0", Ram::SharedHuge),
        ("7.2", Ram::PrivateHuge),
    ];
    for (version, ram) in kinds {
        let world = World::new(version);
        let (a, b) = (world.agent("a"), world.agent("b"));
        world.boot(&a, &GuestSpec { ram, programs: vec![load(20)], ..world.parts.guest("vm") });
        world.wait_for("vm", "LOAD t=", BOOT);
        for (from, to) in [(&a, &b), (&b, &a)] {
            let held = Held::watch(&world, from, to.name());
            moves_on(&world, from, to);
            held.assert_alike(AFTER_HAND_OFF_MAX);
        }
        a.stop("vm").unwrap();
    }
}

/// A folder of hugetlbfs, shared by an object and private by `-mem-path`: the target sees in the folder what it needs.
#[test]
fn files_of_hugetlbfs_move() {
    let _pool = HugePages::reserve(2 * HUGE_PAGES).unwrap();
    let options = "-object memory-backend-file,id=m0,share=on,size=192M,mem-path=DIR -numa node,memdev=m0";
    for (version, options) in [("7.2", options), ("10.0", "-mem-path DIR")] {
        let world = World::new(version);
        let folder = Hugetlbfs::mount(world.path("huge"));
        let options = options.replace("DIR", folder.0.to_str().unwrap());
        let extra = options.split_whitespace().map(str::to_owned).collect();
        let (a, b) = (world.agent("a"), world.agent("b"));
        world.boot(&a, &GuestSpec { extra, programs: vec![load(20)], ..world.parts.guest("vm") });
        world.wait_for("vm", "LOAD t=", BOOT);
        moves_on(&world, &a, &b);
        moves_on(&world, &b, &a);
        a.stop("vm").unwrap();
    }
}

/// A file system of huge pages, as long as this lives.
struct Hugetlbfs(PathBuf);

impl Hugetlbfs {
    fn mount(folder: PathBuf) -> Self {
        std::fs::create_dir(&folder).unwrap();
        let mounted = Command::new("mount").args(["-t", "hugetlbfs", "none"]).arg(&folder).status().unwrap();
        assert!(mounted.success());
        Self(folder)
    }
}

impl Drop for Hugetlbfs {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(&self.0).status());
    }
}

/// A target whose pool is too small says so before anything is started.
#[test]
fn too_few_huge_pages_are_refused() {
    let _pool = HugePages::reserve(HUGE_PAGES).unwrap();
    let world = World::new("7.2");
    let folder = Hugetlbfs::mount(world.path("huge"));
    let (a, b) = (world.agent("a"), world.agent("b"));
    let file = vec!["-mem-path".to_owned(), folder.0.to_str().unwrap().to_owned()];
    for (ram, extra) in [(Ram::SharedHuge, vec![]), (Ram::PrivateHuge, vec![]), (Ram::Plain, file)] {
        world.run(&a, &GuestSpec { ram, extra, ..world.parts.guest("vm") });
        let view = migrate(&a, request("vm", "b"));
        assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{view:?}");
        let why = "huge pages of 2048 KiB to give and the VM needs 96";
        assert!(view.reasons.iter().any(|reason| reason.text.contains(why)), "{view:?}");
        assert!(b.vms().is_empty());
        a.stop("vm").unwrap();
    }
}

/// Two pieces of RAM, all of it locked: at the target no page is absent, and those that were never sent are zero.
#[test]
fn locked_memory_of_two_nodes() {
    let options = "-object memory-backend-ram,id=m0,size=128M -object memory-backend-ram,id=m1,size=64M \
                   -numa node,memdev=m0 -numa node,memdev=m1 -overcommit mem-lock=on";
    let extra = options.split_whitespace().map(str::to_owned).collect();
    moves(|world| GuestSpec { extra, programs: vec![load(20)], ..world.parts.guest("vm") });
}

/// Transparent huge pages are split where the guest writes, also for a try that comes to nothing. The QEMU of `b` has none.
#[test]
fn transparent_huge_pages() {
    let world = World::with_wrapped_qemu_at_b("7.2");
    world.set_wrapper(&format!(
        "exec perl -e 'syscall({PRCTL}, {THP_DISABLE}, 1, 0, 0, 0) == 0 and exec @ARGV' {} \"$@\"\n",
        world.parts.qemu("7.2").display()
    ));
    let (a, b) = (world.agent("a"), world.agent("b"));
    world.boot(&a, &GuestSpec { programs: vec![load(20)], ..world.parts.guest("vm") });
    world.wait_for("vm", "LOAD t=", BOOT);
    let before = huge_kib(&a);
    assert!(before > 0, "QEMU has no huge pages; is /sys/kernel/mm/transparent_hugepage/enabled `never`?");
    let slowly = MigrateRequest { max_bandwidth: Some(SLOW), ..request("vm", "b") };
    let id = a.migrate(slowly, None).unwrap().id;
    a_round_begins(&a, &id);
    a.cancel(&id).unwrap();
    assert_eq!(wait(&a, &id).status, "cancelled");
    println!("in huge pages: {before} KiB before a cancelled try, {} KiB after it", huge_kib(&a));
    assert!(huge_kib(&a) > 0);
    moves_on(&world, &a, &b);
    assert_eq!(huge_kib(&b), 0);
    moves_on(&world, &b, &a);
    println!("in huge pages: {} KiB after a move from where there are none", huge_kib(&a));
    assert!(huge_kib(&a) > 0);
    a.stop("vm").unwrap();
}

/// `prctl` of x86-64, and `PR_SET_THP_DISABLE` (linux/prctl.h), which a program that is executed inherits.
const PRCTL: u32 = 157;
const THP_DISABLE: u32 = 41;

/// How much of the QEMU's memory is in transparent huge pages.
fn huge_kib(agent: &Agent) -> u64 {
    let pid = agent.vm("vm").unwrap().pid;
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Waits until pages travel.
fn a_round_begins(a: &Arc<Agent>, id: &str) {
    let watch = a.watch(id).unwrap();
    until("pages travel", MOVE, || taken(&watch.borrow(), 1 << 20).then_some(()));
}

/// There and back, with the guest's own check.
fn moves(guest: impl FnOnce(&World) -> GuestSpec) {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    world.boot(&a, &guest(&world));
    world.wait_for("vm", "LOAD t=", BOOT);
    moves_on(&world, &a, &b);
    moves_on(&world, &b, &a);
    a.stop("vm").unwrap();
}

/// A move, proved equal, after which the guest goes on and has lost nothing.
fn moves_on(world: &World, from: &Arc<Agent>, to: &Agent) {
    let view = migrate(from, request("vm", to.name()));
    assert_eq!(view.status, "completed", "{view:?}\n{}", world.console("vm"));
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
}

/// A QEMU with 192 MiB.
pub(crate) const HUGE_PAGES: u64 = 100;

/// A balloon gives back pages that were sent; what the target holds of them is not zero.
#[test]
fn a_balloon_between_rounds() {
    follows_discards("7.2", Ram::Plain, Giving::ByBalloon);
}

/// The same in a file that QEMU maps: a hole that is made there shows in no page table.
#[test]
fn a_balloon_between_rounds_in_shared_memory() {
    follows_discards("7.2", Ram::SharedMemfd, Giving::ByBalloon);
}

/// The same where pages lie over those of a file.
#[test]
fn a_balloon_between_rounds_in_a_private_memfd() {
    follows_discards("7.2", Ram::PrivateMemfd, Giving::ByBalloon);
}

/// The guest's kernel tells of free memory by itself, megabytes at a time.
#[test]
fn free_pages_are_reported_between_rounds() {
    follows_discards("7.2", Ram::SharedMemfd, Giving::ByReports);
}

/// Huge pages are given back whole. What a discard leaves in the page tables looks as pages do that the kernel moves.
#[test]
fn free_huge_pages_are_reported_between_rounds() {
    let _pool = HugePages::reserve(u64::from(REPORTING_MIB) + 8).unwrap();
    follows_discards("10.0", Ram::SharedHuge, Giving::ByReports);
    follows_discards("7.2", Ram::PrivateHuge, Giving::ByReports);
}

/// How a guest gives memory back in a later round of a move.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Giving {
    ByBalloon,
    ByReports,
}

impl Giving {
    fn device(self) -> &'static str {
        match self {
            Giving::ByBalloon => "virtio-balloon-pci",
            Giving::ByReports => "virtio-balloon-pci,free-page-reporting=on",
        }
    }

    fn give(self, world: &World, a: &Arc<Agent>, this: Try) {
        match self {
            Giving::ByBalloon => by_balloon(world, a, this),
            Giving::ByReports => by_reports(world, a, this),
        }
    }
}

/// A try to move the guest.
#[derive(Clone, Copy)]
struct Try<'a> {
    id: &'a str,
    number: u32,
    times: u32,
}

/// First with the mechanism switched off: the target's proof finds it, and the guest goes on where it was. Then with it.
fn follows_discards(version: &str, ram: Ram, giving: Giving) {
    let world = World::new(version);
    let (a, b) = (world.agent_without("a", Mechanism::Discards), world.agent("b"));
    let huge = matches!(ram, Ram::SharedHuge | Ram::PrivateHuge);
    let (churn, memory_mib) = match giving {
        Giving::ByReports => ("--churn=8", REPORTING_MIB),
        // It must have something left beside its balloon.
        Giving::ByBalloon => ("--churn=24", world.parts.guest("vm").memory_mib),
    };
    let load = ["--fill=24", "--dirty=4", "--rate=5", "--check", churn].map(str::to_owned);
    let (programs, extra) =
        (vec![Program::Load(load.to_vec())], vec!["-device".into(), giving.device().into()]);
    let guest = GuestSpec { ram, programs, extra, memory_mib, ..world.parts.guest("vm") };
    let argv = world.argv_with_orders(&guest);
    a.run(RunRequest { name: "vm".into(), argv, template: None }).unwrap();
    world.wait_for("vm", "READY", BOOT);
    let view = move_under_discards(&world, &a, 1, 1, giving);
    let why = view.error_desc.clone().unwrap_or_default();
    assert!(view.status == "failed" && why.contains("is not what it was at the source"), "{view:?}");
    world.wait_for_more("vm", "LOAD", BOOT);
    drop(a);
    let a = world.agent("a");
    let held = Held::watch(&world, &a, "b");
    let view = move_under_discards(&world, &a, 2, count(2, 40), giving);
    assert_eq!(view.status, "completed", "{view:?}\n{}", world.console("vm"));
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    held.assert_alike(if huge { AFTER_HAND_OFF_MAX } else { GROWTH_MAX });
    b.stop("vm").unwrap();
}

/// Moves the guest slowly from `a`, while it gives memory back.
fn move_under_discards(
    world: &World,
    a: &Arc<Agent>,
    number: u32,
    times: u32,
    giving: Giving,
) -> MigrationView {
    match giving {
        Giving::ByReports => write_file(world, number, FILE_MIB),
        Giving::ByBalloon => write_what_is_free(world, number),
    }
    // Pages go whole: where only what has changed goes, rounds are so short that the guest writes nothing in one, and it is stopped.
    let slowly = MigrateRequest {
        max_bandwidth: Some(FIRST),
        downtime_limit: 0,
        timeout: None,
        delta_cache: Some(0),
        compression: CompressionMode::None,
        ..request("vm", "b")
    };
    let id = a.migrate(slowly, None).unwrap().id;
    a_round_passes(a, &id);
    a_round_passes(a, &id);
    a.set(&id, SetRequest { max_bandwidth: Some(SLOW), ..SetRequest::default() }).unwrap();
    giving.give(world, a, Try { id: &id, number, times });
    a.set(&id, SetRequest { max_bandwidth: Some(0), downtime_limit: Some(2000), ..SetRequest::default() })
        .unwrap();
    wait(a, &id)
}

/// Takes memory and gives it back, a round or more each time, and gives more back at last.
fn by_balloon(world: &World, a: &Arc<Agent>, this: Try) {
    let mut qmp = world.qmp("a", "vm");
    for _ in 1..this.times {
        for bytes in [INFLATED, DEFLATED] {
            balloon(&mut qmp, bytes);
            a_round_passes(a, this.id);
        }
    }
    let mut size = INFLATED;
    shrinks(a, GIVEN_BACK, || {
        balloon(&mut qmp, size);
        size = (size - STEP).max(INFLATED_MOST);
    });
}

/// Removes the file that was written before the move: its pages are free, and the kernel reports them.
fn by_reports(world: &World, a: &Arc<Agent>, this: Try) {
    let mut ordered = false;
    // Only then: a report that was due already may come before the first look at what there was.
    shrinks(a, REPORTED, || {
        if !std::mem::replace(&mut ordered, true) {
            world.order("a", "vm", &format!("rm /tmp/file{}", this.number));
        }
    });
    a_round_passes(a, this.id);
}

/// Makes sure that the balloon finds memory that was written before. It takes what is free, and in one run of five all that it
/// took was free since the boot: there was nothing to give back. After this there is less of that than it takes in the end.
fn write_what_is_free(world: &World, number: u32) {
    balloon(&mut world.qmp("a", "vm"), WHOLE);
    write_file(world, number, FREED_MIB);
    world.order("a", "vm", &format!("rm /tmp/file{number}"));
}

/// Puts something into memory, in a guest that has a folder for it.
pub(crate) fn write_file(world: &World, number: u32, mib: u32) {
    let write = format!("dd if=/dev/urandom of=/tmp/file{number} bs=1M count={mib}; echo WRITTEN''-{number}");
    world.order("a", "vm", &write);
    world.wait_for("vm", &format!("WRITTEN-{number}"), BOOT);
}

/// Waits until the guest has given back so many bytes of what was there, and was sent, a moment ago.
fn shrinks(a: &Agent, bytes: u64, mut again: impl FnMut()) {
    let vm = a.vm("vm").unwrap();
    let now = || held(vm.pid, vm.ram_bytes).unwrap();
    let mut most = now();
    until("the guest gives memory back", MOVE, || {
        again();
        std::thread::sleep(Duration::from_millis(20));
        most = most.max(now());
        (now() + bytes <= most).then_some(())
    });
}

pub(crate) fn balloon(qmp: &mut Qmp, bytes: u64) {
    let mut asked: Option<Instant> = None;
    until("the balloon has its size", MOVE, || {
        if asked.is_none_or(|asked| asked.elapsed() > ASK_AGAIN) {
            asked = Some(Instant::now());
            qmp.execute("balloon", json!({ "value": bytes })).unwrap();
        }
        let actual = qmp.execute("query-balloon", json!({})).unwrap()["actual"].as_u64().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        (actual == bytes).then_some(())
    });
}

/// Waits until the round after this one has begun: what happens now is after a scan and before one.
pub(crate) fn a_round_passes(a: &Arc<Agent>, id: &str) {
    let watch = a.watch(id).unwrap();
    let rounds = || watch.borrow().ram.dirty_sync_count;
    let before = rounds();
    until("a round passes", MOVE, || {
        assert!(watch.borrow().error_desc.is_none(), "{:?}", watch.borrow());
        (rounds() > before).then_some(())
    });
}

/// What both QEMUs hold of their guest's RAM, looked at until the source's ends: the last look is at the hand-off.
struct Held(JoinHandle<[u64; 2]>);

impl Held {
    fn watch(world: &World, a: &Agent, b: &str) -> Self {
        let vm = a.vm("vm").unwrap();
        let other = format!("{}/run/vms/", world.path(b).display());
        Self(std::thread::spawn(move || {
            let mut last = [0, 0];
            while let Some(here) = held(vm.pid, vm.ram_bytes) {
                let there = pids_naming(&other).first().and_then(|pid| held(*pid, vm.ram_bytes));
                last = [here, there.unwrap_or_default()];
                std::thread::sleep(Duration::from_millis(5));
            }
            last
        }))
    }

    /// Plain memory is in huge pages, of which zeros that are never sent take their part at the target.
    fn assert_alike(self, growth_max: u64) {
        let [source, target] = self.0.join().unwrap();
        println!(
            "held at the hand-off: {} KiB at the source, {} KiB at the target",
            source >> 10,
            target >> 10
        );
        assert!(source > 0 && target > 0);
        assert!(target <= source + growth_max, "the source held {source} bytes, the target holds {target}");
    }
}

/// Bytes of a QEMU's RAM that are there; nothing when it has ended.
fn held(pid: i32, ram_bytes: u64) -> Option<u64> {
    let process = Process::open(pid).ok()?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let regions = maps.lines().filter_map(|line| {
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(Region { base: number(from)?, bytes: number(to)? - number(from)? })
    });
    let ram = regions.filter(|region| region.bytes >= ram_bytes).min_by_key(|region| region.bytes)?;
    let mut runs = Vec::new();
    populated(&process, &ram, &mut runs).ok()?;
    Some(runs.iter().map(|run| run.bytes()).sum())
}
