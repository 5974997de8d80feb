//! One measurement of a VM at a time, and none beside a migration: the kernel lets a process's memory be tracked once.

use crate::AgentError;
use crate::registry::{Vm, lock};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How long a migration waits for a measurement that is to end: it looks every few milliseconds, and a scan of a large VM takes some
/// hundred.
const GIVE_WAY_WITHIN: Duration = Duration::from_secs(10);

/// Where a VM keeps who measures it.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    Taken,
    /// A migration waits for the end.
    MustEnd,
}

impl Slot {
    /// Ends a measurement of the VM, if there is one, and waits until nothing of it is left. The caller has reserved the VM, so that
    /// no other one begins.
    pub(crate) fn give_way(&self, vm: &str) -> Result<(), String> {
        let mut state = lock(&self.state);
        if *state == State::Free {
            return Ok(());
        }
        *state = State::MustEnd;
        let waited = self.freed.wait_timeout_while(state, GIVE_WAY_WITHIN, |state| *state != State::Free);
        let (_state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        match timeout.timed_out() {
            false => Ok(()),
            true => Err(format!("the measurement of VM {vm} (sterna wws) does not end; try again")),
        }
    }
}

/// A VM that is being measured, until this is dropped.
pub(crate) struct Place(Arc<Vm>);

impl Place {
    /// Takes the VM, unless it is measured or moved.
    pub(crate) fn take(vm: &Arc<Vm>, host: &str) -> Result<Self, AgentError> {
        let name = vm.name();
        // Held meanwhile: a migration reserves the VM first and looks here then.
        let mut state = lock(&vm.measurement().state);
        if *state != State::Free {
            return Err(AgentError::Conflict(format!(
                "VM {name} at host {host} is being measured already: wait until that has ended, or end it (Ctrl-C at its \
                 sterna wws)"
            )));
        }
        if let Some(job) = vm.migration() {
            return Err(AgentError::Conflict(format!(
                "VM {name} at host {host} is in migration {job}: measure it when that is over (sterna status {name})"
            )));
        }
        *state = State::Taken;
        Ok(Self(vm.clone()))
    }

    /// Whether a migration waits for the end.
    pub(crate) fn must_end(&self) -> bool {
        *lock(&self.0.measurement().state) == State::MustEnd
    }

    /// Name of the VM.
    pub(crate) fn vm(&self) -> String {
        self.0.name()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let slot = self.0.measurement();
        *lock(&slot.state) = State::Free;
        slot.freed.notify_all();
    }
}
