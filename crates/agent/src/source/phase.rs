//! What an action is called in the log.

use sterna_engine::source::SourceAction;

/// A word or two for each action.
pub(crate) fn phase(action: &SourceAction) -> &'static str {
    match action {
        SourceAction::Record(_) => "record",
        SourceAction::Send(_) => "message",
        SourceAction::OpenStreams(_) => "open streams",
        SourceAction::OpenDemand => "open demand",
        SourceAction::Pace(_) => "pace",
        SourceAction::Stun(_) => "stun",
        SourceAction::Track => "track",
        SourceAction::Share => "share",
        SourceAction::SendRound(_) => "round",
        SourceAction::Scan => "scan",
        SourceAction::Settle => "settle",
        SourceAction::TellStale(_) => "tell stale",
        SourceAction::Stop => "stop",
        SourceAction::Finish(_) => "finish",
        SourceAction::FinishPostcopy(_) => "finish postcopy",
        SourceAction::Abandon => "abandon",
        SourceAction::Push => "push",
        SourceAction::Reattach => "reattach",
        SourceAction::Resume => "resume",
        SourceAction::Release => "release",
        SourceAction::Ask => "ask",
        SourceAction::End => "end",
        SourceAction::Reply(_) => "reply",
        SourceAction::Over(_) => "over",
    }
}
