//! The offer, and what happens until the target has answered it.

use super::{ACCEPT_WAIT, LOCAL_WAIT, Outcome, Postcopy, STALL_WAIT, Source, SourceAction, State};
use crate::wire::Message;
use crate::wire::message::{Accepted, Reason};
use std::time::Duration;

impl Source {
    /// While the target starts a QEMU, everything is made ready for the first round, and it begins. A post-copy at once sends nothing before the
    /// target has said what must be there at its load.
    pub(super) fn offer(&mut self, now: Duration) {
        let offer = SourceAction::Send(Message::Offer(self.parameters.offer.clone()));
        self.accept_by = now + ACCEPT_WAIT;
        let waits = self.parameters.postcopy == Postcopy::AtOnce && !self.parameters.offer.common;
        if waits {
            return self.enter(State::Offered, offer, now, ACCEPT_WAIT);
        }
        self.actions.push_back(offer);
        self.open(now);
    }

    fn open(&mut self, now: Duration) {
        let open = SourceAction::OpenStreams(self.parameters.offer.streams);
        self.enter(State::Opening, open, now, LOCAL_WAIT);
    }

    /// The offer was made, and the target has not said yet that a QEMU waits.
    pub(super) fn awaits_target(&self) -> bool {
        use State::{Arming, Offered, Opening, Sending, Sharing};
        !self.accepted && matches!(self.state, Offered | Opening | Arming | Sharing | Sending { .. })
    }

    pub(super) fn on_accepted(&mut self, accepted: &Accepted, now: Duration) {
        if !accepted.postcopy {
            let text = match accepted.postcopy_refusal.as_str() {
                "" => "its agent does not know post-copy".into(),
                why => why.to_owned(),
            };
            if self.parameters.postcopy != Postcopy::OnDemand {
                let text = format!("on {}: {text}", self.parameters.peer);
                return self.fail(Outcome::Refused(vec![Reason { code: "postcopy".into(), text }]));
            }
            self.lazy.is_refused(text);
        }
        self.room = accepted.room;
        self.accepted = true;
        self.progress.target_ready = Some((now.saturating_sub(self.began), self.last_sent));
        if accepted.postcopy {
            self.actions.push_back(SourceAction::OpenDemand);
        }
        match self.state {
            State::Offered => self.open(now),
            State::Sending { .. } => {
                self.flows(now);
                self.wait(now, STALL_WAIT);
                self.cut_if_requested();
            }
            State::Sharing => self.deadline = None,
            _ => self.wait(now, LOCAL_WAIT),
        }
    }
}
