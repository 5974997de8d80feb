//! What memory the VM takes here and there, and what is told of it.

use super::{Event, Outgoing};
use crate::room;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use sterna_engine::source::{Outcome, SourceInput};
use sterna_engine::wire::Message;

/// How long a target may take to count what its QEMU uses: the kernel walks over all pages, 10 to 20 ms a GiB of small ones.
const ACCOUNT_WITHIN: Duration = Duration::from_secs(1);

impl Outgoing {
    /// What its QEMU uses here, once; beside everything else, for the kernel walks over all pages.
    pub(super) fn account_here(&mut self) {
        let Ok(process) = self.process.try_clone() else { return };
        if std::mem::replace(&mut self.accounted, true) {
            return;
        }
        let view = self.view.another();
        std::thread::spawn(move || {
            if let Some(used) = room::view_of(&process) {
                view.memory(|report| report.source = Some(used));
            }
        });
    }

    /// A VM that shares pages is let in where there is no room for all of it: whoever moves it is told.
    pub(super) fn has_room(&mut self, head_room: i64) {
        self.view.memory(|report| report.head_room = Some(head_room));
        if head_room < 0 {
            self.view.notice(&format!(
                "host {} could not hold VM {} if all that it shares with others were written: {} MiB of memory would be lacking",
                self.peer,
                self.vm.name(),
                head_room.unsigned_abs().div_ceil(1 << 20)
            ));
        }
    }

    /// A target that has the VM says last what memory it takes there.
    pub(super) fn wait_for_account(&mut self, outcome: &Outcome, events: &mpsc::Receiver<Event>) {
        let until = Instant::now() + ACCOUNT_WITHIN;
        while std::mem::take(&mut self.accounts) && *outcome == Outcome::Completed {
            let event = events.recv_timeout(until.saturating_duration_since(Instant::now()));
            match event {
                Ok(Event::Input(input @ SourceInput::Message(Message::Memory(_)))) => self.note(&input),
                Ok(Event::Lost(..)) | Err(_) => {}
                Ok(_) => self.accounts = true,
            }
        }
    }
}
