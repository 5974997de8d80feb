//! Networks that fail between two agents that live.

use std::time::Duration;

use super::{fails_without_a_trace, moment, slow, wait_active, wait_stopping};
use crate::support::proxy::Proxy;
use crate::support::scene::{Scene, Watcher, to_the_other};
use crate::support::{World, count};

/// Moments of the hand-off at which the link is cut. In every run, and in a long one: see [`count`].
const MOMENTS: (u32, u32) = (8, 16);
/// What they are spread over.
const HANDOFF: Duration = Duration::from_millis(160);
/// How long the link is away: the source has asked in vain meanwhile.
const AWAY: Duration = Duration::from_millis(150);

fn proxied() -> (Proxy, Scene) {
    let mut world = World::new("7.2");
    let proxy = Proxy::to(world.address("b"));
    world.b_as_seen_from_a = Some(proxy.address());
    (proxy, Scene::boot(world))
}

#[test]
fn a_link_that_breaks_in_the_first_round() {
    let (proxy, scene) = proxied();
    let view = fails_without_a_trace(&scene, "a", |scene| {
        let id = scene.a.migrate(&slow("a")).unwrap();
        wait_active(&scene.a, &id);
        proxy.cut();
        scene.a.wait(&id)
    });
    assert_eq!(view.status, "failed", "{view:?}");
    let id = scene.a.migrate(&to_the_other("a")).unwrap();
    let view = scene.a.wait(&id);
    assert!(view.error_desc.as_ref().is_some_and(|why| why.contains("cannot be reached")), "{view:?}");
    proxy.mend();
    scene.move_verified("a");
}

/// A target that had not noticed yet that the link was gone refused the next try for a minute: the name was taken.
#[test]
fn a_link_that_falls_silent_does_not_hold_up_the_next_try() {
    let (proxy, scene) = proxied();
    let id = scene.a.migrate(&slow("a")).unwrap();
    wait_active(&scene.a, &id);
    proxy.silence();
    scene.a.cancel(&id).unwrap();
    let view = scene.a.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("cancelled", "a"), "{view:?}");
    proxy.mend();
    scene.move_verified("a");
}

#[test]
fn a_link_cut_at_any_moment_of_the_handoff() {
    let (proxy, scene) = proxied();
    let watcher = Watcher::start(&scene.world);
    let mut moved = 0;
    let moments = count(MOMENTS.0, MOMENTS.1);
    for at in 0..moments {
        let mut request = to_the_other("a");
        request.verify = at % 2 == 0;
        let whole = if request.verify { HANDOFF } else { HANDOFF / 4 };
        let id = scene.a.migrate(&request).unwrap();
        wait_stopping(&scene.a, &id);
        std::thread::sleep(moment(at, moments, whole));
        proxy.cut();
        std::thread::sleep(AWAY);
        proxy.mend();
        let view = scene.a.wait(&id);
        let host = scene.settle();
        assert_eq!(view.runs_at, host, "{view:?}\n{}", scene.tell());
        if host == "b" {
            moved += 1;
            let id = scene.b.migrate(&to_the_other("b")).unwrap();
            assert_eq!(scene.b.wait(&id).status, "completed", "{}", scene.tell());
            assert_eq!(scene.settle(), "a");
        }
        scene.assert_guest_is_well();
    }
    println!("{moved} of {moments} moved in spite of it");
    scene.assert_guest_goes_on();
    scene.move_verified("a");
    watcher.finish();
}
