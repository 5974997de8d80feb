//! A VM that was handed over and whose target does not answer: it says so, and an operator decides with `sterna recover`.

use crate::matrix::cell::{Phase, Proof};
use crate::matrix::fault::{Links, cut_while};
use crate::support::hold::Hold;
use crate::support::proxy::Proxy;
use crate::support::scene::{Scene, Watcher, other, to_the_other, until};
use crate::support::{MOVE, World};

/// One guest lives through all of it; its host is found anew each time.
#[test]
fn an_unresolved_vm_is_recovered_by_an_answer_or_by_an_operator() {
    let mut world = World::new("7.2");
    let links = Links(["a", "b"].map(|host| Proxy::to(world.address(host))));
    world.a_as_seen_from_b = Some(links.0[0].address());
    world.b_as_seen_from_a = Some(links.0[1].address());
    world.add_disk();
    let mut scene = Scene::boot(world);
    let watcher = Watcher::start(&scene.world);
    nothing_to_decide(&scene);
    the_last_message_is_lost(&scene, &links);
    the_target_lists_what_came(&scene);
    the_target_is_at_work(&scene);
    here_while_it_runs_there(&mut scene);
    here_fences_a_commit(&mut scene);
    the_target_host_is_lost(&mut scene);
    there(&mut scene);
    the_source_host_is_away(&mut scene);
    watcher.finish();
}

fn recover(scene: &Scene, host: &str, side: &str) -> (i32, String, String) {
    scene.host(host).command(&["recover", "vm", side])
}

fn state(scene: &Scene, host: &str) -> String {
    scene.host(host).vm("vm").map_or_else(|why| why, |vm| vm.state)
}

/// A migration may be using the VM's connection just when it is asked, also one that is over but for its last look.
fn becomes(scene: &Scene, host: &str, wanted: &str) {
    until(wanted, MOVE, || (state(scene, host) == wanted).then_some(()));
}

/// A VM that runs, or is not there at all.
fn nothing_to_decide(scene: &Scene) {
    let host = scene.settle();
    for side in ["--here", "--there"] {
        let (code, _, err) = recover(scene, host, side);
        assert!(code == 2 && err.contains("is not unresolved, it is running"), "{code} {err}");
    }
    assert_eq!(recover(scene, other(host), "--here").0, 2);
    assert_eq!(scene.settle(), host);
}

/// The target's last word never arrives; the source asks, and is told.
fn the_last_message_is_lost(scene: &Scene, links: &Links) {
    let from = scene.settle();
    let hold = Hold::arm(&scene.world, scene.host(other(from)), "target-message-committed");
    let asked = scene.host(from).log().matches("\"ask\"").count();
    let id = scene.host(from).migrate(&to_the_other(from)).unwrap();
    hold.reached();
    cut_while(links, || drop(hold));
    let view = scene.host(from).wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("completed", other(from)), "{view:?}");
    assert!(scene.host(from).log().matches("\"ask\"").count() > asked, "{}", scene.tell());
    assert_eq!(scene.settle(), other(from));
    scene.assert_guest_goes_on();
}

/// Who is told that the VM has moved finds it there, however long the target goes on about it.
fn the_target_lists_what_came(scene: &Scene) {
    let from = scene.settle();
    let to = other(from);
    let hold = Hold::arm(&scene.world, scene.host(to), "target-announce");
    let id = scene.host(from).migrate(&to_the_other(from)).unwrap();
    hold.reached();
    assert_eq!(scene.host(from).wait(&id).status, "completed");
    assert_eq!(scene.host(to).vm("vm").unwrap().state, "running");
    drop(hold);
    scene.assert_guest_goes_on();
}

/// A target that answers is waited for: no choice is taken.
fn the_target_is_at_work(scene: &Scene) {
    let from = scene.settle();
    let (id, hold) = Phase::Released.reach(scene, from, Proof::Digests);
    for side in ["--here", "--there"] {
        let (code, _, err) = recover(scene, from, side);
        assert!(code == 4 && err.contains("is still at work on the VM"), "{code} {err}");
    }
    drop(hold);
    assert_eq!(scene.host(from).wait(&id).status, "completed");
    assert_eq!(scene.settle(), other(from));
}

/// The operator is wrong: the VM runs there, and only its agent is dead. The image's lock says no.
fn here_while_it_runs_there(scene: &mut Scene) {
    let from = scene.settle();
    let to = other(from);
    let hold = Hold::arm(&scene.world, scene.host(to), "target-message-committed");
    scene.host(from).migrate(&to_the_other(from)).unwrap();
    hold.reached();
    scene.host_mut(to).kill();
    drop(hold);
    let (code, _, err) = recover(scene, from, "--here");
    assert!(code == 4 && err.contains("is kept stopped here") && err.contains("lock"), "{code} {err}");
    scene.host_mut(to).launch();
    assert_eq!(scene.settle(), to, "{}", scene.tell());
    scene.assert_guest_goes_on();
}

/// The target committed and did not run the VM. When its agent is back, it must not run what was taken back.
fn here_fences_a_commit(scene: &mut Scene) {
    let from = scene.settle();
    let to = other(from);
    let generation = scene.host(from).vm("vm").unwrap().generation;
    let (_, hold) = Phase::Committed.reach(scene, from, Proof::Digests);
    scene.host_mut(to).kill();
    drop(hold);
    assert_eq!(scene.qemus(to).len(), 1, "it waits there");
    let (code, out, err) = recover(scene, from, "--here");
    assert_eq!(
        (code, out.as_str()),
        (0, format!("vm: runs at {from}\n").as_str()),
        "{err}\n{}",
        scene.tell()
    );
    becomes(scene, from, "running");
    assert_eq!(scene.host(from).vm("vm").unwrap().generation, generation + 2, "the try, and the fence");
    scene.assert_guest_goes_on();
    scene.host_mut(to).launch();
    assert_eq!(scene.settle(), from, "{}", scene.tell());
    scene.move_verified(from);
}

/// Its agent and its QEMU are gone, as with its power. The state says what is so and what to do.
fn the_target_host_is_lost(scene: &mut Scene) {
    let from = scene.settle();
    let to = other(from);
    let (id, hold) = Phase::Committed.reach(scene, from, Proof::Digests);
    scene.host_mut(to).kill();
    drop(hold);
    scene.kill_qemu(to);
    until("it is said that nobody knows", MOVE, || (state(scene, from) == "unresolved").then_some(()));
    let (_, out, err) = scene.host(from).command(&["ps"]);
    assert!(out.contains("unresolved"), "{out}");
    let advice = "sterna recover vm --here";
    assert!(err.contains(&format!("handed to host {to}")) && err.contains(advice), "{err}");
    let (_, out, _) = scene.host(from).command(&["status", "vm", "-o", "json"]);
    assert!(out.contains("\"unresolved\"") && out.contains(advice), "{out}");
    assert_eq!(recover(scene, from, "--here").0, 0);
    assert_eq!(scene.host(from).wait(&id).runs_at, from);
    scene.assert_guest_goes_on();
    // It comes back with a commit and no QEMU, asks, and forgets the VM.
    scene.host_mut(to).launch();
    assert_eq!(scene.settle(), from);
    scene.move_verified(from);
}

/// It runs at the target, whose agent is dead: the source is freed.
fn there(scene: &mut Scene) {
    let from = scene.settle();
    let to = other(from);
    let hold = Hold::arm(&scene.world, scene.host(to), "target-message-committed");
    scene.host(from).migrate(&to_the_other(from)).unwrap();
    hold.reached();
    scene.host_mut(to).kill();
    drop(hold);
    let (code, out, err) = recover(scene, from, "--there");
    assert_eq!((code, out.as_str()), (0, format!("vm: runs at {to}\n").as_str()), "{err}\n{}", scene.tell());
    assert_eq!(scene.qemus(from), [] as [i32; 0]);
    scene.host_mut(to).launch();
    assert_eq!(scene.settle(), to);
    scene.assert_guest_goes_on();
}

/// Both agents died after the commit, and the source's host does not come back: the target keeps the VM stopped until
/// its operator decides.
fn the_source_host_is_away(scene: &mut Scene) {
    let from = scene.settle();
    let to = other(from);
    let (_, hold) = Phase::Committed.reach(scene, from, Proof::Digests);
    scene.host_mut(from).kill();
    scene.host_mut(to).kill();
    drop(hold);
    scene.host_mut(to).launch();
    until("the target says that it waits", MOVE, || (state(scene, to) == "unresolved").then_some(()));
    let (_, _, err) = scene.host(to).command(&["ps"]);
    assert!(err.contains(&format!("it came from host {from}")) && err.contains("--here"), "{err}");
    assert_eq!(recover(scene, to, "--here").0, 0);
    becomes(scene, to, "running");
    scene.host_mut(from).launch();
    assert_eq!(scene.settle(), to);
    scene.assert_guest_goes_on();
    scene.move_verified(to);
}
