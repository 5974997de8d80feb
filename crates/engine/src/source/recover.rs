//! What an operator decides about a VM that was released, when the target does not say whether it runs it.
//!
//! The target is asked once more, and its word goes before the operator's. Where it has none, *there* ends the VM here,
//! and *here* fences the old try with a record of a higher generation and resumes the VM. That can still fail: then the
//! try that was fenced counts again, and the question stays open.

use super::{ASK_PAUSE_MIN, Outcome, Source, SourceAction, State};
use crate::handoff::{Choice, Step};
use std::time::Duration;

impl Source {
    /// The operator's word counts only where the target has none: it is asked once more.
    pub(super) fn on_recover(&mut self, choice: Choice, now: Duration) {
        let waits = matches!(self.state, State::Asking { .. }) && self.choice.is_none();
        if self.lazy.is_served() && (choice == Choice::Here || !waits) {
            let peer = &self.parameters.peer;
            let text = format!(
                "the VM runs at host {peer}, which still needs pages of it from here: it is kept for that, and goes on by itself once \
                 host {peer} is reached. If that host is lost for good the VM is too: --there ends what is left of it here, while \
                 the host cannot be reached"
            );
            return self.actions.push_back(SourceAction::Reply(Err(text)));
        }
        if self.choice.is_some() || !matches!(self.state, State::Released | State::Asking { .. }) {
            let text = "the VM is not unresolved: its owner is known, or is being found out".into();
            return self.actions.push_back(SourceAction::Reply(Err(text)));
        }
        self.choice = Some(choice);
        self.ask(now);
    }

    pub(super) fn is_asked_to_decide(&self) -> bool {
        self.choice.is_some() && matches!(self.state, State::Asking { .. })
    }

    /// The target has no word, or no answer.
    pub(super) fn decide(&mut self) {
        match self.choice {
            Some(Choice::Here) => {
                self.state = State::Fencing;
                self.deadline = None;
                self.parameters.offer.generation += 1;
                self.record(Step::Fenced);
            }
            Some(Choice::There) if self.lazy.is_served() => {
                let peer = &self.parameters.peer;
                self.end_there(format!("an operator has decided that host {peer} is lost, with the VM"));
            }
            Some(Choice::There) => self.end(),
            None => {}
        }
    }

    /// Back to the question: the try that was fenced counts again, for the VM does not run here.
    pub(super) fn unfence(&mut self, why: &str, now: Duration) {
        self.parameters.offer.generation -= 1;
        self.record(Step::Released);
        self.reply(Err(format!("the VM could not be taken back and is kept stopped here: {why}")));
        self.state = State::Asking { pause: ASK_PAUSE_MIN };
        self.ask_later(now);
    }

    pub(super) fn on_reclaimed(&mut self) {
        self.reply(Ok(()));
        let peer = &self.parameters.peer;
        let why = format!("an operator has decided that host {peer} does not run it");
        self.state = State::Undoing(Outcome::Failed(why));
        self.actions.push_back(SourceAction::Release);
        self.over();
    }

    /// Tells the operator, if one waits.
    pub(super) fn reply(&mut self, result: Result<(), String>) {
        if self.choice.take().is_some() {
            self.actions.push_back(SourceAction::Reply(result));
        }
    }

    /// The target proves that the VM is ours.
    pub(super) fn given_back(&mut self, why: String) {
        self.take_back(Outcome::Failed(why));
        let peer = &self.parameters.peer;
        self.contradict(
            Choice::There,
            format!("host {peer} answers that its QEMU is dead: the VM is taken back here"),
        );
    }

    /// The target's word is another than the operator's.
    pub(super) fn contradict(&mut self, choice: Choice, text: String) {
        if self.choice == Some(choice) {
            self.reply(Err(text));
        }
    }
}
