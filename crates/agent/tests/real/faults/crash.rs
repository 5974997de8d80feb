//! Agents that die in the middle of a migration, before the VM is stopped.

use std::time::Duration;

use super::{assert_left_as_it_was, moment, slow, wait_active};
use crate::support::scene::Scene;
use crate::support::{World, count};

/// Moments of the setup at which the source's agent is killed: it starts with the pre-check and ends when pages move,
/// with the attach in between. In every run, and in a long one: see [`count`].
const MOMENTS: (u32, u32) = (10, 20);

#[test]
fn an_agent_killed_in_the_first_round() {
    let mut scene = Scene::boot(World::new("7.2"));
    let before = scene.footprint("a");
    let id = scene.a.migrate(&slow("a")).unwrap();
    wait_active(&scene.a, &id);
    scene.b.kill();
    let view = scene.a.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{view:?}");
    assert!(view.error_desc.is_some_and(|why| why.contains("runs at a")));
    scene.assert_guest_goes_on();
    scene.b.launch();
    assert_eq!(scene.settle(), "a");
    assert_left_as_it_was(&scene, "a", &before);
    scene.move_verified("a");
    // An agent that a VM had left did not start again: it waited for a lock that it held.
    scene.a.kill();
    scene.a.launch();
    assert_eq!(scene.settle(), "b");

    let before = scene.footprint("b");
    let id = scene.b.migrate(&slow("b")).unwrap();
    wait_active(&scene.b, &id);
    scene.b.kill();
    scene.assert_guest_goes_on();
    scene.b.launch();
    assert_eq!(scene.settle(), "b");
    assert_left_as_it_was(&scene, "b", &before);
    scene.move_verified("b");
}

#[test]
fn a_source_agent_killed_at_any_moment_of_the_setup() {
    let mut scene = Scene::boot(World::new("7.2"));
    let id = scene.a.migrate(&slow("a")).unwrap();
    let view = wait_active(&scene.a, &id);
    scene.a.cancel(&id).unwrap();
    scene.a.wait(&id);
    let setup = Duration::from_secs_f64(view.setup_time / 1e3) * 12 / 10;
    assert_eq!(scene.settle(), "a");
    let before = scene.footprint("a");
    let moments = count(MOMENTS.0, MOMENTS.1);
    for at in 0..moments {
        scene.a.migrate(&slow("a")).unwrap();
        std::thread::sleep(moment(at, moments, setup));
        scene.a.kill();
        scene.a.launch();
        assert_eq!(scene.settle(), "a");
        assert_left_as_it_was(&scene, "a", &before);
    }
    scene.assert_guest_goes_on();
    scene.move_verified("a");
}

/// The folder of a QEMU that had not answered yet stayed behind, since the killed agent had not written its VM down; and
/// so did the file that it was writing it to.
#[test]
fn a_target_agent_killed_at_any_moment_of_the_setup() {
    let mut scene = Scene::boot(World::new("7.2"));
    let setup = Duration::from_millis(400);
    let moments = count(MOMENTS.0, MOMENTS.1);
    for at in 0..moments {
        let id = scene.a.migrate(&slow("a")).unwrap();
        std::thread::sleep(moment(at, moments, setup));
        scene.b.kill();
        let view = scene.a.wait(&id);
        assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{view:?}");
        scene.b.launch();
        assert_eq!(scene.settle(), "a");
    }
    scene.assert_guest_goes_on();
    scene.move_verified("a");
}
