//! Hold points: a test stops an agent exactly before an action, does something to the world, and lets it go on.
//!
//! Only programs that are built for tests have them (the feature `holds`). The file `run-dir/hold/POINT` asks for it: the
//! agent makes `POINT.reached` and waits until `POINT` is gone. A point is named by role and action, as `source-stop`,
//! `target-record-committed` or `source-round-2`.

use std::path::Path;
use std::time::{Duration, Instant};
use sterna_engine::source::SourceAction;
use sterna_engine::target::TargetAction;
use sterna_engine::wire::Message;

/// What an agent with hold points says when it starts: tests look for it.
pub(crate) const ANNOUNCED: &str = "this program is built for tests: it can be held";
/// Longer than any test holds an agent; a forgotten file must not keep one for ever.
const HELD_AT_MOST: Duration = Duration::from_secs(60);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(1);

/// Waits here if a test wants it.
pub(crate) fn before(run_dir: &Path, point: &str) {
    let file = run_dir.join("hold").join(point);
    if !file.exists() {
        return;
    }
    let reached = file.with_file_name(format!("{point}.reached"));
    if let Err(why) = std::fs::write(&reached, "") {
        tracing::error!(point, %why, "a test cannot be told that its hold point is reached");
    }
    let end = Instant::now() + HELD_AT_MOST;
    while file.exists() && Instant::now() < end {
        std::thread::sleep(PAUSE);
    }
}

/// The point before an action of a source.
pub(crate) fn of_source(action: &SourceAction) -> String {
    let what = match action {
        SourceAction::Record(record) => format!("record-{}", record.step.word()),
        SourceAction::Send(Message::Release(_)) => "message-release".into(),
        SourceAction::SendRound(round) => format!("round-{round}"),
        other => word(crate::source::phase(other)),
    };
    format!("source-{what}")
}

/// The point before an action of a target.
pub(crate) fn of_target(action: &TargetAction) -> String {
    let what = match action {
        TargetAction::Record(record) => format!("record-{}", record.step.word()),
        TargetAction::Send(Message::Committed(_)) => "message-committed".into(),
        TargetAction::Send(Message::Loaded(_)) => "message-loaded".into(),
        other => word(crate::target::phase(other)),
    };
    format!("target-{what}")
}

fn word(phase: &str) -> String {
    phase.replace(' ', "-")
}
