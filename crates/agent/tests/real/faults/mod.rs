//! Faults before, at and after the hand-off, on real QEMUs with agents that are real processes. After each of them one
//! host runs the VM, the guest has lost nothing, nothing is left behind, and the next try succeeds.

mod cancel;
mod crash;
mod files;
mod handoff;
mod link;
mod refusal;

use std::time::Duration;

use crate::support::daemon::Daemon;
use crate::support::scene::{AT_REST, Scene, left_in_qemu, taken, to_the_other, until};
use sterna_agent::model::{MigrateRequest, MigrationView};

/// Bytes per second that keep the first round going long enough to break it.
const SLOW: u64 = 20_000_000;

/// A migration that stays in its first round for seconds.
fn slow(from: &str) -> MigrateRequest {
    MigrateRequest { max_bandwidth: Some(SLOW), ..to_the_other(from) }
}

/// Waits until pages move.
fn wait_active(source: &Daemon, id: &str) -> MigrationView {
    until("pages move", AT_REST, || {
        let view = source.migration(id).unwrap();
        assert!(view.error_desc.is_none(), "{view:?}");
        (view.status == "active" && taken(&view, 1 << 20)).then_some(view)
    })
}

/// Waits until the VM is being stopped for its hand-off, or it is all over.
fn wait_stopping(source: &Daemon, id: &str) {
    until("the VM is stopped", AT_REST, || {
        let view = source.migration(id).unwrap();
        (view.runs_at.is_empty() || view.status != "active" && view.status != "setup").then_some(())
    });
}

/// The moment number `at` of `count` that are spread over `whole`.
fn moment(at: u32, count: u32, whole: Duration) -> Duration {
    whole * at / count
}

/// Runs a try that must come to nothing, and checks that it left the source's QEMU as it was.
fn fails_without_a_trace(
    scene: &Scene,
    host: &str,
    mut attempt: impl FnMut(&Scene) -> MigrationView,
) -> MigrationView {
    let before = scene.footprint(host);
    let view = attempt(scene);
    assert_ne!(view.status, "completed", "{view:?}");
    assert_eq!(view.runs_at, host, "{view:?}");
    assert_eq!(scene.settle(), host, "{}", scene.tell());
    assert_left_as_it_was(scene, host, &before);
    scene.assert_guest_goes_on();
    view
}

/// QEMU closes what was lent to it in its own time.
fn assert_left_as_it_was(scene: &Scene, host: &str, before: &sterna_memory::Footprint) {
    let mut left = Vec::new();
    for _ in 0..100 {
        left = left_in_qemu(before, &scene.footprint(host));
        if left.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("left in QEMU: {left:#?}\n{}", scene.tell());
}
