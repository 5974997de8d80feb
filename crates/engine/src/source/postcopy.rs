//! Post-copy: the VM runs at the target while pages of it are still here.
//!
//! The hand-off is that of pre-copy; only the last round differs, which tells what is missing instead of sending it. After the commit the
//! source is a server of pages: its VM stays stopped, in state *Serving*, until the target says that every page has come. Whatever is lost
//! meanwhile, a connection or either agent, is found again in one way: ask the target, and connect anew.

use super::{
    ASK_PAUSE_MAX, ASK_PAUSE_MIN, Outcome, Postcopy, STALL_WAIT, Source, SourceAction, SourceParameters,
    State,
};
use crate::handoff::Step;
use crate::progress::Status;
use crate::wire::Message;
use crate::wire::message::Text;
use std::time::Duration;

/// How long connecting again may take.
const REATTACH_WAIT: Duration = Duration::from_secs(20);

/// How far a migration is with post-copy.
#[derive(Debug, Default)]
pub(super) struct Lazy {
    /// Why the target does not do it.
    refusal: Option<String>,
    /// The user has asked for it.
    requested: bool,
    /// The round that is under way was told to end.
    cut: bool,
    /// A round has told what will be missing. It is none of those that are counted.
    told: bool,
    /// The stop was a switch.
    switched: bool,
    /// The target runs the VM and needs pages.
    served: bool,
    /// It ran there and has ended there, for this reason.
    ended: Option<String>,
    /// The pause before the next try to connect.
    pause: Duration,
}

impl Lazy {
    pub(super) fn is_refused(&mut self, why: String) {
        self.refusal = Some(why);
    }

    pub(super) fn is_switched(&self) -> bool {
        self.switched
    }

    /// Why the VM has ended at the target before all of its pages had come, if it has.
    pub(super) fn ended_there(&mut self) -> Option<String> {
        self.ended.take()
    }

    /// The round that is over was not sent to its end: what is left of it tells nothing of how fast the guest writes.
    pub(super) fn is_cut(&self) -> bool {
        self.cut
    }

    /// Rounds on the streams that sent nothing.
    pub(super) fn empty_rounds(&self) -> u32 {
        u32::from(self.told)
    }

    pub(super) fn is_served(&self) -> bool {
        self.served
    }

    pub(super) fn serves(&mut self) {
        self.switched = true;
        self.served = true;
    }
}

/// When the VM is stopped for good, whatever is left: not at all where the timeout switches.
pub(super) fn timeout_of_stop(parameters: &SourceParameters) -> Option<Duration> {
    parameters.timeout.filter(|_| parameters.postcopy != Postcopy::AtTimeout)
}

impl Source {
    /// Why this migration cannot switch to post-copy, if it cannot.
    pub fn postcopy_refusal(&self) -> Option<&str> {
        self.lazy.refusal.as_deref()
    }

    /// True once the VM runs at the target, or is about to, with pages missing.
    pub fn is_postcopy(&self) -> bool {
        self.lazy.switched
    }

    /// When the timeout cuts the round that is under way.
    pub(super) fn switch_at(&self) -> Option<Duration> {
        let moves = matches!(self.state, State::Sending { .. } | State::Resting { .. });
        let waits = moves && self.accepted && !self.lazy.cut && !self.parameters.awaits;
        let at = self.parameters.timeout.map(|timeout| self.began + timeout);
        at.filter(|_| waits && self.parameters.postcopy == Postcopy::AtTimeout)
    }

    /// What is left of the round waits: it is fetched, like what was written since.
    pub(super) fn on_switch(&mut self, now: Duration) {
        if self.lazy.refusal.is_some() || !self.can_cancel() {
            return;
        }
        self.lazy.requested = true;
        match self.state {
            State::Sending { .. } => self.cut_if_requested(),
            State::Resting { .. } => self.look_again(now),
            _ => {}
        }
    }

    /// Ends the round that is under way, once it is known that the target can do it: of one that was ended nothing more is sent.
    pub(super) fn cut_if_requested(&mut self) {
        let can = self.accepted && self.lazy.refusal.is_none();
        if can && self.lazy.requested && !std::mem::replace(&mut self.lazy.cut, true) {
            self.actions.push_back(SourceAction::Abandon);
        }
    }

    /// Whether to switch after a scan; `fits` says that what is left could be sent within the downtime limit.
    pub(super) fn switch_is_due(&self, fits: bool, elapsed: Duration) -> bool {
        let due = match self.parameters.postcopy {
            Postcopy::OnDemand => false,
            Postcopy::AtOnce => true,
            Postcopy::AfterPrecopy => !fits,
            Postcopy::AtTimeout => self.parameters.timeout.is_some_and(|timeout| elapsed >= timeout),
        };
        self.lazy.refusal.is_none() && (due || self.lazy.requested)
    }

    /// Switches, once the target has dropped what it has of the pages that were written again since they were sent: that takes a while
    /// where they are many, and what is dropped before the stop costs no downtime.
    pub(super) fn prepare_switch(&mut self, now: Duration) {
        if self.parameters.postcopy == Postcopy::AtOnce {
            // Of what will be missing nothing was sent.
            return self.switch(now);
        }
        self.lazy.told = true;
        let round = self.progress.rounds + 1;
        let dropping = State::Dropping { round, barriers: 0 };
        self.enter(dropping, SourceAction::TellStale(round), now, STALL_WAIT);
    }

    pub(super) fn switch(&mut self, now: Duration) {
        self.lazy.switched = true;
        self.stop(now);
    }

    /// The target runs the VM: it has pages to fetch.
    pub(super) fn serve(&mut self, now: Duration) {
        self.note_downtime(now);
        self.lazy.serves();
        self.record(Step::Serving);
        self.state = State::Serving;
        self.deadline = None;
        self.lazy.pause = ASK_PAUSE_MIN;
        self.actions.push_back(SourceAction::Push);
    }

    /// Something of ours or theirs is gone. The target is asked before it is connected again: it may need nothing any more.
    pub(super) fn lose(&mut self, now: Duration) {
        if !matches!(self.state, State::Serving | State::Reattaching) {
            return;
        }
        let pause = self.lazy.pause.max(ASK_PAUSE_MIN);
        self.lazy.pause = (pause * 2).min(ASK_PAUSE_MAX);
        self.connected = false;
        self.state = State::Asking { pause };
        self.ask_later(now);
    }

    /// What the target needs is gone with the QEMU that had it. The target is told, for its VM cannot go on; nothing is left to do here.
    pub(super) fn on_pages_lost(&mut self, why: String) {
        let waits = matches!(self.state, State::Serving | State::Reattaching | State::Asking { .. });
        if !self.lazy.served || !waits {
            return;
        }
        if self.connected {
            self.actions.push_back(SourceAction::Send(Message::Abort(Text { text: why.clone() })));
        }
        self.record(Step::Gone);
        self.state = State::Over;
        self.ended = Status::Failed;
        self.deadline = None;
        self.actions.push_back(SourceAction::Release);
        self.actions.push_back(SourceAction::Over(Outcome::PagesLost(why)));
    }

    /// The VM ran at the target and runs nowhere any more; what is left of it here is from before.
    pub(super) fn end_there(&mut self, why: String) {
        self.lazy.ended = Some(why);
        self.end();
    }

    pub(super) fn reattach(&mut self, now: Duration) {
        self.lazy.serves();
        self.record(Step::Serving);
        self.enter(State::Reattaching, SourceAction::Reattach, now, REATTACH_WAIT);
    }

    pub(super) fn on_reattached(&mut self, now: Duration) {
        if matches!(self.state, State::Reattaching) {
            self.connected = true;
            self.serve(now);
        }
    }
}
