//! Hosts that run out of something, on real QEMUs with agents that are real processes: whatever is missing, the VM runs,
//! the error says what to do, nothing is left behind, and when there is enough again the next move succeeds.

mod disk;
mod limits;
mod strangers;

use crate::support::scene::{AT_REST, Scene, taken, to_the_other, until};
use sterna_agent::model::{MigrateRequest, MigrationView};

/// Bytes per second that keep the first round going long enough to change something meanwhile.
const SLOW: u64 = 20_000_000;

/// Begins a slow migration from `a`, and waits until pages move.
fn begin_slowly(scene: &Scene) -> String {
    let request = MigrateRequest { max_bandwidth: Some(SLOW), ..to_the_other("a") };
    let id = scene.a.migrate(&request).unwrap();
    until("pages move", AT_REST, || {
        let view = scene.a.migration(&id).unwrap();
        assert!(view.error_desc.is_none(), "{view:?}");
        (view.status == "active" && taken(&view, 1 << 20)).then_some(())
    });
    id
}

/// A migration from `a` that must come to nothing; returns all that its user is told.
fn fails_at_once(scene: &Scene) -> String {
    let id = match scene.a.migrate(&to_the_other("a")) {
        Ok(id) => id,
        Err(why) => return why,
    };
    told(scene, &scene.a.wait(&id))
}

fn told(scene: &Scene, view: &MigrationView) -> String {
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{view:?}\n{}", scene.tell());
    let reasons = view.reasons.iter().map(|reason| format!("{}: {}", reason.code, reason.text));
    reasons.chain(view.error_desc.clone()).collect::<Vec<_>>().join("\n")
}
