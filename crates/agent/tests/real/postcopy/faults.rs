//! What strikes a VM whose pages are on their way: it waits where it touches one that is missing, and goes on when it has come.

use std::time::Duration;

use serde_json::json;
use sterna_agent::model::MigrateRequest;
use sterna_lab::guest::Program;

use crate::support::hold::Hold;
use crate::support::proxy::Proxy;
use crate::support::scene::{Scene, Watcher, other, to_the_other, until};
use crate::support::{MOVE, World};

/// Bytes per second that leave the time to do something meanwhile.
const SLOW: u64 = 8_000_000;
/// How long a link is away.
const AWAY: Duration = Duration::from_secs(10);

/// A guest that touches much of its memory, and checks each page.
fn boot(world: World) -> Scene {
    let words = ["--fill=48", "--dirty=24", "--rate=20", "--check"];
    Scene::boot_with(world, vec![Program::Load(words.map(str::to_owned).to_vec())])
}

fn slowly(from: &str) -> MigrateRequest {
    MigrateRequest {
        postcopy: true,
        timeout: None,
        verify: false,
        max_bandwidth: Some(SLOW),
        ..to_the_other(from)
    }
}

fn becomes(scene: &Scene, host: &str, wanted: &str) {
    let state = || scene.host(host).vm("vm").map_or_else(|why| why, |vm| vm.state);
    until(&format!("{wanted} at {host}\n{}", scene.tell()), MOVE, || (state() == wanted).then_some(()));
}

/// Begins a slow post-copy from `a`, and waits until the guest runs at `b`; the migration's identity.
fn begin(scene: &Scene) -> String {
    let id = scene.a.migrate(&slowly("a")).unwrap();
    becomes(scene, "b", "postcopy-active");
    // The word of it is on its way: a source that does not get it does not know that it serves.
    until("the source serves", MOVE, || {
        (scene.a.migration(&id).unwrap().status == "postcopy-active").then_some(())
    });
    id
}

fn ends(scene: &Scene) {
    becomes(scene, "b", "running");
    assert_eq!(scene.settle(), "b", "{}", scene.tell());
    scene.assert_guest_goes_on();
}

#[test]
fn each_agent_is_killed_three_times_in_one_migration() {
    let mut scene = boot(World::new("7.2"));
    let watcher = Watcher::start(&scene.world);
    begin(&scene);
    for _ in 0..3 {
        for host in ["a", "b"] {
            scene.host_mut(host).kill();
            if host == "a" {
                becomes(&scene, "b", "postcopy-paused");
            }
            scene.host_mut(host).launch();
            becomes(&scene, "b", "postcopy-active");
        }
    }
    ends(&scene);
    watcher.finish();
    // And onward, right after.
    scene.move_verified("b");
}

/// The target's agent dies at this point of the hand-over, with no page there yet, and comes back.
fn dies_at(point: &str) {
    let mut scene = boot(World::new("7.2"));
    let watcher = Watcher::start(&scene.world);
    let hold = Hold::arm(&scene.world, &scene.b, point);
    scene.a.migrate(&slowly("a")).unwrap();
    hold.reached();
    scene.b.kill();
    drop(hold);
    scene.b.launch();
    ends(&scene);
    watcher.finish();
    scene.move_verified("b");
}

/// It closes the connections of pages, is slow to write down that it has all of them, and says so only then.
#[test]
fn the_targets_last_word_comes_late_and_counts() {
    let scene = boot(World::new("7.2"));
    let hold = Hold::arm(&scene.world, &scene.b, "target-record-running");
    let asked = MigrateRequest { verify: true, max_bandwidth: None, ..slowly("a") };
    let id = scene.a.migrate(&asked).unwrap();
    hold.reached();
    std::thread::sleep(Duration::from_secs(1));
    drop(hold);
    let view = scene.a.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("completed", "b"), "{view:?}");
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    assert!(view.postcopy.as_ref().is_some_and(|known| known.faults.is_some()), "{view:?}");
    ends(&scene);
}

#[test]
fn the_targets_agent_is_killed_before_the_vm_runs() {
    dies_at("target-resume");
}

#[test]
fn the_targets_agent_is_killed_before_it_has_written_down_that_the_vm_runs() {
    dies_at("target-record-fetching");
}

#[test]
fn both_agents_are_killed_at_once() {
    let mut scene = boot(World::new("10.0"));
    begin(&scene);
    scene.a.kill();
    scene.b.kill();
    scene.b.launch();
    becomes(&scene, "b", "postcopy-paused");
    scene.a.launch();
    ends(&scene);
}

fn with_links(version: &str) -> (Scene, [Proxy; 2]) {
    let mut world = World::new(version);
    let links = ["a", "b"].map(|host| Proxy::to(world.address(host)));
    world.a_as_seen_from_b = Some(links[0].address());
    world.b_as_seen_from_a = Some(links[1].address());
    (boot(world), links)
}

#[test]
fn the_link_is_cut_for_ten_seconds() {
    let (scene, links) = with_links("7.2");
    let id = begin(&scene);
    links.iter().for_each(Proxy::cut);
    becomes(&scene, "b", "postcopy-paused");
    until("the source says so too", MOVE, || {
        (scene.a.migration(&id).unwrap().status == "postcopy-paused").then_some(())
    });
    std::thread::sleep(AWAY);
    assert_eq!(scene.b.vm("vm").unwrap().state, "postcopy-paused");
    assert!(scene.a.vm("vm").unwrap().state == "serving", "it is kept for its pages");
    links.iter().for_each(Proxy::mend);
    becomes(&scene, "b", "postcopy-active");
    let view = scene.a.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("completed", "b"), "{view:?}");
    ends(&scene);
}

/// Nobody is told that a silent link is gone: who waits for pages finds out.
#[test]
fn the_link_falls_silent_and_an_agent_is_killed_meanwhile() {
    let (mut scene, links) = with_links("7.2");
    begin(&scene);
    links.iter().for_each(Proxy::silence);
    scene.b.kill();
    scene.b.launch();
    becomes(&scene, "b", "postcopy-paused");
    links.iter().for_each(Proxy::mend);
    ends(&scene);
}

#[test]
fn a_vm_with_missing_pages_moves_nowhere_and_is_nobody_elses() {
    let mut scene = boot(World::new("7.2"));
    let id = begin(&scene);
    let refused = scene.b.migrate(&to_the_other("b")).unwrap_err();
    assert!(refused.contains("pages of it are still at the host that it came from"), "{refused}");
    // What is left at the source is not to be resumed, ended or moved.
    for command in [&["recover", "vm", "--here"][..], &["recover", "vm", "--there"], &["stop", "vm"]] {
        let (code, out, err) = scene.a.command(command);
        assert_ne!(code, 0, "{command:?}: {out}{err}");
    }
    let cancelled = scene.a.cancel(&id).map(|view| view.status);
    assert!(cancelled.as_ref().map_or(true, |status| status != "cancelled"), "{cancelled:?}");
    let view = scene.a.wait(&id);
    assert_eq!(view.status, "completed", "{view:?}");
    ends(&scene);
    scene.a.assert_healthy();
}

/// The guest is stopped, goes on, and boots anew while pages of it are missing.
#[test]
fn the_guest_is_stopped_and_reset_meanwhile() {
    let scene = boot(World::new("7.2"));
    begin(&scene);
    let mut qmp = scene.world.qmp("b", "vm");
    qmp.execute("stop", json!({})).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    qmp.execute("cont", json!({})).unwrap();
    qmp.execute("system_reset", json!({})).unwrap();
    scene.world.wait_for_more("vm", "READY", MOVE);
    drop(qmp);
    assert_eq!(scene.settle(), "b", "{}", scene.tell());
    scene.world.wait_for_more("vm", "LOAD", MOVE);
    let console = scene.world.console("vm");
    assert!(!console.contains("BAD"), "{console}");
}

/// The guest gives memory back while its pages are on their way: what comes of it later is not its own any more.
#[test]
fn the_guest_gives_memory_back_meanwhile() {
    let scene = Scene::boot_with_balloon(World::new("7.2"));
    begin(&scene);
    let mut qmp = scene.world.qmp("b", "vm");
    qmp.execute("balloon", json!({ "value": 200 << 20 })).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    qmp.execute("balloon", json!({ "value": 384 << 20 })).unwrap();
    drop(qmp);
    ends(&scene);
    assert_eq!(other("b"), "a");
}

/// What has the missing pages dies: the VM cannot go on, and both hosts say so.
#[test]
fn the_pages_are_lost_with_the_qemu_that_has_them() {
    let scene = boot(World::new("7.2"));
    let id = begin(&scene);
    scene.kill_qemu("a");
    let view = scene.a.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "b"), "{view:?}");
    assert!(view.error_desc.as_ref().is_some_and(|why| why.contains("without all of its pages")), "{view:?}");
    let told = || scene.b.vm("vm").unwrap().notice.filter(|notice| notice.contains("lost for good"));
    until("the target says so", MOVE, told);
    assert!(scene.a.vms().unwrap().is_empty());
    scene.b.stop("vm").unwrap();
    assert!(scene.left_at("b").is_empty() && scene.left_at("a").is_empty());
}

/// Nothing is left of a VM whose QEMU dies at the target: it ran there, and what is at the source is of the past.
#[test]
fn the_vm_dies_at_the_target_with_its_qemu() {
    let scene = boot(World::new("7.2"));
    let id = begin(&scene);
    scene.kill_qemu("b");
    let view = scene.a.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", ""), "{view:?}");
    assert!(view.error_desc.as_ref().is_some_and(|why| why.contains("has ended there")), "{view:?}");
    until("the source lets go", MOVE, || scene.a.vms().unwrap().is_empty().then_some(()));
    until("it is stopped there", MOVE, || (scene.b.vm("vm").unwrap().state == "stopped").then_some(()));
    assert!(scene.qemus("a").is_empty() && scene.qemus("b").is_empty());
    scene.b.stop("vm").unwrap();
    assert!(scene.left_at("b").is_empty() && scene.left_at("a").is_empty());
}

/// The same where the target's agent learns it only when it is started again.
#[test]
fn the_vm_dies_at_the_target_while_its_agent_is_dead() {
    let mut scene = boot(World::new("7.2"));
    let id = begin(&scene);
    scene.b.kill();
    scene.kill_qemu("b");
    scene.b.launch();
    let view = scene.a.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", ""), "{view:?}");
    until("the source lets go", MOVE, || scene.a.vms().unwrap().is_empty().then_some(()));
    scene.b.stop("vm").unwrap();
    assert!(scene.left_at("b").is_empty() && scene.left_at("a").is_empty());
}

/// A service manager restarts agents: one that waits for pages ends all the same, soon, and the next goes on.
#[test]
fn an_agent_that_is_asked_to_end_does() {
    let mut scene = boot(World::new("10.0"));
    let watcher = Watcher::start(&scene.world);
    begin(&scene);
    for host in ["b", "a", "b"] {
        scene.host_mut(host).terminate();
        scene.host_mut(host).launch();
        becomes(&scene, "b", "postcopy-active");
    }
    ends(&scene);
    watcher.finish();
}

/// A target host that is lost for good has taken the VM along; what was kept for it is freed when an operator says so, and not before.
#[test]
fn what_is_kept_for_a_host_that_is_lost_is_freed_by_an_operator() {
    let mut scene = boot(World::new("7.2"));
    let id = begin(&scene);
    let recover = |scene: &Scene, side: &str| scene.a.command(&["recover", "vm", side]);
    let (code, _, told) = recover(&scene, "--there");
    assert_eq!(code, 1, "the target is there: {told}");
    scene.b.kill();
    scene.kill_qemu("b");
    let waits = || (scene.a.migration(&id).unwrap().status == "postcopy-paused").then_some(());
    until("the source waits", MOVE, waits);
    let (code, _, told) = recover(&scene, "--here");
    assert!(code == 1 && told.contains("--there"), "{told}");
    let (code, _, told) = recover(&scene, "--there");
    assert_eq!(code, 0, "{told}");
    let view = scene.a.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", ""), "{view:?}");
    assert!(scene.a.vms().unwrap().is_empty() && scene.qemus("a").is_empty());
    scene.b.launch();
    scene.b.stop("vm").unwrap();
}
