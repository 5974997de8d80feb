//! Migrations that are cancelled, in each phase and at any moment.

use std::time::{Duration, Instant};

use super::{fails_without_a_trace, moment, slow, wait_active};
use crate::support::scene::{Scene, other, to_the_other};
use crate::support::{World, count};

/// Moments that are tried over one whole migration. In every run, and in a long one: see [`count`].
const MOMENTS: (u32, u32) = (15, 30);

/// A descriptor stayed in QEMU: what was lent to it for the save was taken back only by the resume after a stop.
#[test]
fn a_cancelled_migration_leaves_no_trace_and_the_next_try_succeeds_at_once() {
    let scene = Scene::boot(World::new("7.2"));
    let in_setup = fails_without_a_trace(&scene, "a", |scene| {
        let id = scene.a.migrate(&slow("a")).unwrap();
        scene.a.cancel(&id).unwrap();
        scene.a.wait(&id)
    });
    assert_eq!(in_setup.status, "cancelled", "{in_setup:?}");
    let active = fails_without_a_trace(&scene, "a", |scene| {
        let id = scene.a.migrate(&slow("a")).unwrap();
        wait_active(&scene.a, &id);
        scene.a.cancel(&id).unwrap();
        scene.a.wait(&id)
    });
    assert_eq!(active.status, "cancelled", "{active:?}");
    assert!(scene.a.cancel(&active.id).unwrap_err().contains("over"), "it can be cancelled once");
    retry_at_once(&scene);
}

/// A source that had cancelled and tried again at once was told that the name is taken: the target was still ending the
/// QEMU of the first try.
fn retry_at_once(scene: &Scene) {
    for _ in 0..3 {
        let id = scene.a.migrate(&slow("a")).unwrap();
        wait_active(&scene.a, &id);
        scene.a.cancel(&id).unwrap();
        assert_eq!(scene.a.wait(&id).status, "cancelled");
    }
    scene.move_verified("a");
}

/// A sender that waited for its turn under a tiny bandwidth limit held up the cancellation for as long as the limit said.
#[test]
fn a_tiny_bandwidth_does_not_hold_up_a_cancellation() {
    let scene = Scene::boot(World::new("7.2"));
    let view = fails_without_a_trace(&scene, "a", |scene| {
        let mut request = slow("a");
        request.max_bandwidth = Some(10);
        let id = scene.a.migrate(&request).unwrap();
        crate::support::scene::until("pages wait for their turn", crate::support::BOOT, || {
            (scene.a.migration(&id).unwrap().status == "active").then_some(())
        });
        scene.a.cancel(&id).unwrap();
        scene.a.wait(&id)
    });
    assert_eq!(view.status, "cancelled", "{view:?}");
    assert_eq!(view.max_bandwidth, Some(10));
}

#[test]
fn a_migration_cancelled_at_any_moment_is_either_done_or_was_never() {
    let scene = Scene::boot(World::new("7.2"));
    let began = Instant::now();
    let view = scene.move_verified("a");
    let whole = Duration::from_secs_f64(view.total_time / 1e3).min(began.elapsed()) * 11 / 10;
    let (mut host, mut done) = ("b", 0);
    let moments = count(MOMENTS.0, MOMENTS.1);
    for at in 0..moments {
        let source = scene.host(host);
        let id = source.migrate(&to_the_other(host)).unwrap();
        std::thread::sleep(moment(at, moments, whole));
        let refused = source.cancel(&id);
        let view = source.wait(&id);
        let runs_at = scene.settle();
        assert_eq!(view.runs_at, runs_at, "{view:?} {refused:?}\n{}", scene.tell());
        match view.status.as_str() {
            "cancelled" => assert_eq!(runs_at, host, "{view:?}"),
            "completed" => assert_eq!(runs_at, other(host), "{view:?}"),
            _ => panic!("{view:?}\n{}", scene.tell()),
        }
        done += u32::from(view.status == "completed");
        host = runs_at;
    }
    println!("{done} of {moments} were done before they could be cancelled");
    scene.assert_guest_goes_on();
    scene.move_verified(host);
}
