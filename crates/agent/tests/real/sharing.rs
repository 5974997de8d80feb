//! VMs that have memory in common: it travels once, and is shared at the target. RAM is proved equal, and each guest checks its own.

use std::sync::Arc;
use std::time::Duration;

use crate::memory::{a_round_passes, balloon};
use crate::support::cage::{Cage, Swap, swapped};
use crate::support::scene::{taken, until};
use crate::support::{BOOT, MOVE, World, request, wait};
use sterna_agent::Agent;
use sterna_agent::model::{
    CompressionMode, Dedup, GangRequest, MigrateRequest, MigrationView, RunRequest, SetRequest,
    TemplateRequest,
};
use sterna_lab::Ksm;
use sterna_lab::guest::{GuestSpec, Program};
use sterna_memory::{PAGE, Process};

/// A guest's memory is filled with content that follows from the seed: of 64 MiB, 8 are written.
fn twin(seed: u32, rate: u32) -> Program {
    let words = ["--fill=64", "--dirty=8", "--check=written"].map(str::to_owned);
    Program::Load(words.into_iter().chain([format!("--seed={seed}"), format!("--rate={rate}")]).collect())
}

/// Pages that two of these have in common at least: what is filled and not written.
const ALIKE: u64 = (48 << 20) / PAGE;

struct Scene {
    world: World,
    a: Arc<Agent>,
    b: Arc<Agent>,
    names: Vec<&'static str>,
}

impl Scene {
    fn boot(world: World, names: &[&'static str], change: impl Fn(&str, GuestSpec) -> GuestSpec) -> Self {
        let (a, b) = (world.agent("a"), world.agent("b"));
        for name in names {
            world.run(&a, &change(name, world.parts.mergeable_guest(name)));
        }
        for name in names {
            world.wait_for(name, "LOAD t=", BOOT);
        }
        Self { world, a, b, names: names.to_vec() }
    }

    /// Waits until the kernel has merged what they have in common.
    fn merge(&self, agent: &Agent, ksm: &Ksm) {
        ksm.wait_for_scans(1, BOOT).unwrap();
        for name in &self.names {
            let pid = agent.vm(name).unwrap().pid;
            self.world.wait_until("pages are merged", || Ksm::merged_pages(pid) > ALIKE);
        }
    }

    fn begin(
        &self,
        from: &Arc<Agent>,
        to: &str,
        how: impl Fn(MigrateRequest) -> MigrateRequest,
    ) -> Vec<String> {
        let migrations = self.names.iter().map(|name| how(request(name, to))).collect();
        let gang = from.migrate_together(GangRequest { migrations }, None).unwrap();
        assert!(gang.refused.is_empty(), "{gang:?}");
        gang.migrations.into_iter().map(|view| view.id).collect()
    }

    fn moves(
        &self,
        from: &Arc<Agent>,
        to: &str,
        how: impl Fn(MigrateRequest) -> MigrateRequest,
    ) -> Vec<MigrationView> {
        let ids = self.begin(from, to, how);
        ids.iter().map(|id| self.moved(from, id)).collect()
    }

    fn moved(&self, from: &Arc<Agent>, id: &str) -> MigrationView {
        let view = wait(from, id);
        assert_eq!(view.status, "completed", "{view:?}");
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
        self.world.wait_for_more(&view.vm, "LOAD", BOOT);
        assert!(!self.world.console(&view.vm).contains("BAD"), "{}", self.world.console(&view.vm));
        println!(
            "{} to {}: {} pages in common, {} bytes for them, {} not mapped, {} bytes else, {:?} ms down; {:?}",
            view.vm,
            view.target,
            view.ram.common_pages,
            view.ram.common_bytes,
            view.ram.common_fallback_pages,
            view.ram.transferred,
            view.downtime,
            view.notices,
        );
        view
    }

    fn pss(&self, agent: &Agent) -> u64 {
        let of = |name: &&str| Process::open(agent.vm(name).unwrap().pid).unwrap().pss_bytes().unwrap();
        self.names.iter().map(of).sum()
    }

    fn end(self) {
        for name in &self.names {
            drop(self.a.stop(name));
            drop(self.b.stop(name));
        }
    }
}

fn plain(request: MigrateRequest) -> MigrateRequest {
    MigrateRequest { timeout: Some(30.0), ..request }
}

fn common(views: &[MigrationView]) -> u64 {
    views.iter().map(|view| view.ram.common_pages).sum()
}

/// There with what the kernel has merged, and back with what they share since: there nothing merges.
fn twins_share(version: &str, how: impl Fn(MigrateRequest) -> MigrateRequest) {
    let names = ["one", "two"];
    let scene = Scene::boot(World::new(version), &names, |_, guest| GuestSpec {
        programs: vec![twin(7, 10)],
        ..guest
    });
    let ksm = Ksm::run().unwrap();
    scene.merge(&scene.a, &ksm);
    let before = scene.pss(&scene.a);
    let there = scene.moves(&scene.a, "b", &how);
    drop(ksm);
    for view in &there {
        let (source, target) = (view.memory.source.unwrap(), view.memory.target.unwrap());
        assert!(source.pss < source.rss - ALIKE * PAGE / 4, "{source:?}");
        assert!(
            target.pss > 0 && target.pss <= target.rss && target.own + target.shared == target.rss,
            "{target:?}"
        );
        assert!(view.memory.head_room.is_some_and(|left| left > 0), "{:?}", view.memory);
        assert!(view.ram.common_pages > ALIKE, "{:?}", view.ram);
        assert_eq!(view.ram.common_fallback_pages, 0, "{:?}", view.ram);
    }
    let sent: u64 = there.iter().map(|view| view.ram.common_bytes).sum();
    assert!(sent < common(&there) * PAGE * 6 / 10, "each content once: {sent} bytes");
    let after = scene.pss(&scene.b);
    println!("PSS {before} before, {after} after");
    assert!(after < before * 5 / 4, "{before} before, {after} after");

    let back = scene.moves(&scene.b, "a", &how);
    assert!(common(&back) > ALIKE * 3 / 2, "{} pages are shared still", common(&back));
    scene.end();
}

#[test]
fn merged_pages_travel_once_on_7_2() {
    twins_share("7.2", plain);
}

#[test]
fn merged_pages_travel_once_on_10_0() {
    twins_share("10.0", plain);
}

#[test]
fn merged_pages_travel_once_by_post_copy() {
    twins_share("7.2", |request| MigrateRequest { postcopy: true, timeout: None, ..request });
}

#[test]
fn merged_pages_travel_once_by_hybrid() {
    let hybrid = |request| MigrateRequest { postcopy_after_precopy: true, downtime_limit: 1, ..request };
    twins_share("10.0", hybrid);
}

/// One VM has pages in common with itself.
#[test]
fn a_vm_alone_shares_with_itself() {
    let scene = Scene::boot(World::new("7.2"), &["one"], |_, guest| GuestSpec {
        programs: vec![
            twin(7, 0),
            Program::Load(["--fill=48", "--dirty=0", "--seed=7"].map(str::to_owned).to_vec()),
        ],
        ..guest
    });
    let ksm = Ksm::run().unwrap();
    ksm.wait_for_scans(3, BOOT).unwrap();
    let views = scene.moves(&scene.a, "b", plain);
    assert!(common(&views) > 0, "{:?}", views[0].ram);
    drop(ksm);
    scene.end();
}

/// Three at once, of which no two share anything before: found by their content, because that is asked for.
#[test]
fn equal_pages_are_found_by_hash_when_asked() {
    let names = ["one", "two", "three"];
    let ksm = Ksm::none().unwrap();
    let scene =
        Scene::boot(World::new("7.2"), &names, |_, guest| GuestSpec { programs: vec![twin(7, 5)], ..guest });
    let there = scene.moves(&scene.a, "b", plain);
    assert_eq!(common(&there), 0, "never by default");
    let before = scene.pss(&scene.b);
    let back = scene.moves(&scene.b, "a", |request| MigrateRequest { dedup: Dedup::Hash, ..plain(request) });
    for view in &back {
        assert!(view.ram.common_pages > ALIKE, "{:?}", view.ram);
    }
    let after = scene.pss(&scene.a);
    assert!(after < before * 3 / 4, "{before} before, {after} after");
    // And none is shared any more, if that is asked for.
    let alone = scene.moves(&scene.a, "b", |request| MigrateRequest { dedup: Dedup::None, ..plain(request) });
    assert_eq!(common(&alone), 0);
    assert!(scene.pss(&scene.b) > after * 5 / 4);
    drop(ksm);
    scene.end();
}

/// The target maps a few runs and no more: the longest, and the rest come as bytes, which its kernel merges if it does that.
#[test]
fn what_cannot_be_mapped_comes_as_bytes() {
    let mut world = World::new("10.0");
    world.max_runs_at_b = Some(5);
    let scene =
        Scene::boot(world, &["one", "two"], |_, guest| GuestSpec { programs: vec![twin(7, 5)], ..guest });
    let hash = |request| MigrateRequest { dedup: Dedup::Hash, ..plain(request) };
    let there = scene.moves(&scene.a, "b", hash);
    for view in &there {
        assert!(view.ram.common_fallback_pages > 0 && view.ram.common_pages > 1000, "{:?}", view.ram);
        let pid = scene.b.vm(&view.vm).unwrap().pid;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let runs = maps.lines().filter(|line| line.contains("memfd:sterna-common")).count();
        assert!((1..=5).contains(&runs), "{runs} runs");
    }
    let _ksm = Ksm::run().unwrap();
    for view in &there {
        let pid = scene.b.vm(&view.vm).unwrap().pid;
        scene.world.wait_until("what could not be mapped is merged", || Ksm::merged_pages(pid) > 100);
    }
    scene.end();
}

/// A point of host `a`'s agent at which it waits.
fn hold(world: &World, point: &str) -> (std::path::PathBuf, std::path::PathBuf) {
    let folder = world.path("a").join("run/hold");
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join(point);
    std::fs::write(&file, "").unwrap();
    let reached = folder.join(format!("{point}.reached"));
    (file, reached)
}

/// Between the look at the frames and the comparison both guests write: what was shared is not any more, and none of it is lost.
#[test]
fn pages_that_part_before_they_are_compared() {
    let writer = |seed: &str| {
        let words = ["--fill=64", "--dirty=64", "--mode=random", "--rate=4", "--check=written", seed];
        Program::Load(words.map(str::to_owned).to_vec())
    };
    let scene = Scene::boot(World::new("7.2"), &["one", "two"], |_, guest| GuestSpec {
        programs: vec![writer("--seed=7")],
        ..guest
    });
    let ksm = Ksm::run().unwrap();
    let merged =
        || scene.names.iter().all(|name| Ksm::merged_pages(scene.a.vm(name).unwrap().pid) > ALIKE / 2);
    scene.world.wait_until("pages are merged", merged);
    let (file, reached) = hold(&scene.world, "source-compare");
    let ids = scene.begin(&scene.a, "b", plain);
    until("the frames are known", MOVE, || reached.exists().then_some(()));
    // 16 MB are written, of the 64 that they have in common.
    std::thread::sleep(Duration::from_secs(2));
    std::fs::remove_file(file).unwrap();
    let views: Vec<_> = ids.iter().map(|id| scene.moved(&scene.a, id)).collect();
    assert!(common(&views) > 1000, "{} pages", common(&views));
    drop(ksm);
    scene.end();
}

/// One is cancelled while all are waited for: it stays, and the other goes.
#[test]
fn one_is_cancelled_and_the_other_goes() {
    let scene = Scene::boot(World::new("7.2"), &["one", "two"], |_, guest| GuestSpec {
        programs: vec![twin(7, 5)],
        ..guest
    });
    let (file, reached) = hold(&scene.world, "source-compare");
    let ids = scene.begin(&scene.a, "b", |request| MigrateRequest { dedup: Dedup::Hash, ..plain(request) });
    until("they are looked at", MOVE, || reached.exists().then_some(()));
    scene.a.cancel(&ids[0]).unwrap();
    let view = wait(&scene.a, &ids[0]);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("cancelled", "a"), "{view:?}");
    std::fs::remove_file(file).unwrap();
    scene.moved(&scene.a, &ids[1]);
    scene.world.wait_for_more("one", "LOAD", BOOT);
    // Nothing of it is left there, and the next try is like any other.
    assert_eq!(scene.b.vms().len(), 1);
    let id = scene.a.migrate(plain(request("one", "b")), None).unwrap().id;
    scene.moved(&scene.a, &id);
    scene.end();
}

/// Pages that two clones have written alike at least.
const CLONES_ALIKE: u64 = 8000;

/// Clones of one template, whose own pages the kernel has merged: the template does not travel, and what they have written goes once.
#[test]
fn clones_share_what_they_have_written_too() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let golden = GuestSpec { programs: vec![twin(7, 10)], ..world.parts.mergeable_guest("golden") };
    let argv = world.argv(&golden);
    let clones = argv.iter().map(|argument| argument.replace("golden", "{vm}")).collect();
    a.run(RunRequest { name: "golden".into(), argv, template: None }).unwrap();
    world.wait_for("golden", "READY", BOOT);
    let request = TemplateRequest { name: "web".into(), vm: "golden".into(), end: false, argv: Some(clones) };
    a.make_template(&request).unwrap();
    a.stop("golden").unwrap();
    let names = vec!["one", "two"];
    for name in &names {
        let template = Some("web".to_owned());
        a.run(RunRequest { name: (*name).into(), argv: Vec::new(), template }).unwrap();
    }
    // Their load fills its memory after the template was made: each has all of it for itself.
    for name in &names {
        world.wait_for(name, "LOAD t=", BOOT);
    }
    let scene = Scene { world, a, b, names };
    let ksm = Ksm::run().unwrap();
    let merged =
        || scene.names.iter().all(|name| Ksm::merged_pages(scene.a.vm(name).unwrap().pid) > CLONES_ALIKE);
    scene.world.wait_until("what they have written is merged", merged);
    let there = scene.moves(&scene.a, "b", plain);
    for view in &there {
        assert!(view.ram.template_pages > 0, "{:?}", view.ram);
    }
    let back =
        scene.moves(&scene.b, "a", |request| MigrateRequest { postcopy: true, timeout: None, ..request });
    println!("{} there, {} back", common(&there), common(&back));
    assert!(
        common(&there) > CLONES_ALIKE && common(&back) > CLONES_ALIKE,
        "{} {}",
        common(&there),
        common(&back)
    );
    drop(ksm);
    scene.end();
}

/// Memory that it has in common with another is given back by its guest, while it moves on: what lies below is seen again, and is no hole.
#[test]
fn what_a_guest_gives_back_of_common_pages() {
    let churn = || {
        Program::Load(
            ["--fill=24", "--dirty=4", "--rate=5", "--seed=7", "--check", "--churn=24"]
                .map(str::to_owned)
                .to_vec(),
        )
    };
    let scene = Scene::boot(World::new("7.2"), &["one", "two"], |_, guest| GuestSpec {
        programs: vec![churn()],
        extra: vec!["-device".into(), "virtio-balloon-pci".into()],
        ..guest
    });
    for name in &scene.names {
        scene.world.wait_for(name, "CHURN 2", BOOT);
    }
    let hash = |request| MigrateRequest { dedup: Dedup::Hash, ..plain(request) };
    let there = scene.moves(&scene.a, "b", hash);
    assert!(common(&there) > 2000, "{:?}", there[0].ram);
    for name in &scene.names {
        scene.world.wait_for_more(name, "CHURN", BOOT);
    }
    let slowly = MigrateRequest {
        max_bandwidth: Some(60_000_000),
        downtime_limit: 0,
        timeout: None,
        delta_cache: Some(0),
        compression: CompressionMode::None,
        ..request("one", "a")
    };
    let id = scene.b.migrate(slowly, None).unwrap().id;
    a_round_passes(&scene.b, &id);
    scene.b.set(&id, SetRequest { max_bandwidth: Some(4_000_000), ..SetRequest::default() }).unwrap();
    let mut qmp = scene.world.qmp("b", "one");
    for mib in [150, 180, 150] {
        balloon(&mut qmp, mib << 20);
        a_round_passes(&scene.b, &id);
    }
    let fast = SetRequest { max_bandwidth: Some(0), downtime_limit: Some(2000), ..SetRequest::default() };
    scene.b.set(&id, fast).unwrap();
    scene.moved(&scene.b, &id);
    scene.end();
}

/// Bytes per second at which a round takes seconds.
const SLOW: u64 = 20_000_000;
/// Bytes of each VM that are swapped out at least.
const SWAPPED: u64 = 16 << 20;

/// Half of what two VMs have is swapped out, merged pages too, before they leave and again while they move. It moves all the same.
#[test]
fn what_is_swapped_out_is_not_lost() {
    let _swap = Swap::on(512);
    let cage = Cage::new();
    // QEMUs are charged where they are started.
    cage.take_in(std::process::id());
    let scene = Scene::boot(World::new("7.2"), &["one", "two"], |_, guest| GuestSpec {
        programs: vec![twin(7, 5)],
        ..guest
    });
    let ksm = Ksm::run().unwrap();
    scene.merge(&scene.a, &ksm);
    drop(ksm);
    let squeeze = || {
        let out = until("they are swapped out", MOVE, || {
            cage.squeeze(50);
            let of = |name: &&str| swapped(scene.a.vm(name).unwrap().pid);
            let out: Vec<u64> = scene.names.iter().map(of).collect();
            out.iter().all(|bytes| *bytes > SWAPPED).then_some(out)
        });
        println!("swapped out: {out:?}");
    };
    squeeze();
    let slowly = |request| MigrateRequest { max_bandwidth: Some(SLOW), timeout: None, ..request };
    let ids = scene.begin(&scene.a, "b", slowly);
    ids.iter().for_each(|id| {
        until("it moves", MOVE, || {
            let view = scene.a.watch(id).unwrap().borrow().clone();
            taken(&view, SWAPPED / 4).then_some(())
        });
    });
    squeeze();
    for id in &ids {
        let fast = SetRequest { max_bandwidth: Some(0), ..SetRequest::default() };
        // One that is so far that it needs none is as good.
        drop(scene.a.set(id, fast));
    }
    ids.iter().for_each(|id| drop(scene.moved(&scene.a, id)));
    scene.moves(&scene.b, "a", |request| MigrateRequest { postcopy: true, timeout: None, ..request });
    scene.end();
    drop(cage);
}
