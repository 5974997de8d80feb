//! What comes between the first look at the memory and the first round: what the VM has in common with others goes first.

use super::{Postcopy, Source, SourceAction, State};
use crate::units::Pages;
use std::time::Duration;

impl Source {
    pub(super) fn on_tracked(&mut self, pages: Pages, now: Duration) {
        self.progress.setup_time = now.saturating_sub(self.began);
        self.progress.ram_remaining = pages.bytes();
        if !self.shares {
            return self.begin_sending(pages, now);
        }
        self.state = State::Sharing;
        // It is over when the last of those that share is ready and what they share has gone: the driver sees to deadlines.
        self.deadline = Some(self.accept_by).filter(|_| !self.accepted);
        self.actions.push_back(SourceAction::Share);
    }

    pub(super) fn begin_sending(&mut self, pages: Pages, now: Duration) {
        match self.parameters.postcopy == Postcopy::AtOnce && pages == Pages(0) {
            true if self.parameters.awaits => self.rest(pages, now),
            true => self.switch(now),
            false => self.begin_round(1, pages, now),
        }
    }
}
