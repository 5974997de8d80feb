//! One fault at every point of a migration, with one guest that is moved to and fro.

use serde_json::json;

use crate::matrix::cell::{Fate, Phase, Proof};
use crate::matrix::fault::{Fault, Links};
use crate::matrix::table;
use crate::support::proxy::Proxy;
use crate::support::scene::{AT_REST, Scene, Watcher, other, until};
use crate::support::{MOVE, World};

/// Tries all cells of a row; what is seen must be what the table and the document say.
pub(crate) fn survives(fault: Fault) {
    let (links, mut scene) = stage(fault);
    let watcher = Watcher::start(&scene.world);
    let mut seen = Vec::new();
    for phase in table::chosen(fault) {
        let began = std::time::Instant::now();
        let fate = cell(&mut scene, &links, fault, phase);
        println!("{fault:?} {phase:?}: {fate:?} in {:?}", began.elapsed());
        assert_eq!(fate, table::expected(fault, phase), "{fault:?} in {phase:?}\n{}", scene.tell());
        seen.push((phase, fate));
    }
    let host = scene.settle();
    scene.move_verified(host);
    watcher.finish();
    table::write_or_compare(fault, &seen);
}

/// Links that break are proxies; others are as fast as the machine.
fn stage(fault: Fault) -> (Links, Scene) {
    let mut world = World::new("7.2");
    let links = Links(["a", "b"].map(|host| Proxy::to(world.address(host))));
    if fault.is_of_link() {
        world.a_as_seen_from_b = Some(links.0[0].address());
        world.b_as_seen_from_a = Some(links.0[1].address());
    }
    (links, Scene::boot(world))
}

fn cell(scene: &mut Scene, links: &Links, fault: Fault, phase: Phase) -> Fate {
    let from = scene.settle();
    let proof = if fault.outlasts_the_load(phase) { Proof::None } else { Proof::Digests };
    let (id, hold) = phase.reach(scene, from, proof);
    fault.strike(scene, links, from, || drop(hold));
    if fault.freezes() {
        // A try that outlived it need not be slow any more.
        drop(scene.host(from).set(&id, &json!({ "max-bandwidth": 0, "downtime-limit": 300 })));
    }
    if fault.leaves_the_target_waiting(phase) {
        return ends_at_once(scene, from, &id);
    }
    let fate = until("it is known what became of the VM", AT_REST + MOVE, || fate(scene, from));
    if fate == Fate::Dies {
        bury(scene, from, &id, phase);
        return fate;
    }
    let runs_at = scene.settle();
    if !fault.kills_the_sources_agent() {
        let view = scene.host(from).wait(&id);
        assert_eq!(view.runs_at, runs_at, "{view:?}\n{}", scene.tell());
        let verified = view.blocks_verified.is_some_and(|blocks| blocks > 0);
        assert!(verified || fate != Fate::Moves || fault.is_of_link(), "{view:?}");
    }
    scene.assert_guest_is_well();
    fate
}

fn fate(scene: &Scene, from: &str) -> Option<Fate> {
    if let Ok(host) = scene.at_rest() {
        return Some(if host == from { Fate::Stays } else { Fate::Moves });
    }
    is_dead(scene).then_some(Fate::Dies)
}

/// No QEMU is anywhere, and one host says that it has a VM whose QEMU has ended.
fn is_dead(scene: &Scene) -> bool {
    let vms = ["a", "b"].map(|host| scene.host(host).vms().unwrap_or_default()).concat();
    let [vm] = vms.as_slice() else { return false };
    vm.state == "stopped"
        && vm.migration.is_none()
        && scene.qemus("a").is_empty()
        && scene.qemus("b").is_empty()
}

/// The target of a try whose link fell silent waits on; the next try ends it at once, and succeeds.
fn ends_at_once(scene: &Scene, from: &str, id: &str) -> Fate {
    let view = scene.host(from).wait(id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", from), "{view:?}");
    scene.assert_guest_is_well();
    scene.move_verified(from);
    Fate::Stays
}

/// A VM that died with its QEMU: its host says so, nothing is left of it when it is forgotten, and a new one boots.
fn bury(scene: &Scene, from: &str, id: &str, phase: Phase) {
    let host = if phase == Phase::Running { other(from) } else { from };
    let view = scene.host(from).wait(id);
    if host == from {
        assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", ""), "{view:?}");
        assert!(view.error_desc.as_ref().is_some_and(|why| why.contains("has ended")), "{view:?}");
    }
    assert_eq!(scene.left_at(other(host)), [] as [std::path::PathBuf; 0], "{}", scene.tell());
    scene.host(host).stop("vm").unwrap();
    assert_eq!(scene.left_at(host), [] as [std::path::PathBuf; 0]);
    scene.boot_at_a();
}
