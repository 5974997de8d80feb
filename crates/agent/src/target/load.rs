//! The device state goes into the QEMU that waits, and the VM runs.

use super::{Arriving, process_of};
use crate::control::explain;
use crate::fit::{check_digests, is_staged, settle_late, verify, with_guesses};
use crate::pages::{Sink, Sinks};
use crate::registry::lock;
use std::time::{Duration, Instant};
use sterna_engine::target::TargetInput;
use sterna_engine::wire::message::StateEnd;
use sterna_vmm::{RunState, Vmm};

/// When a QEMU that has started has given back what of its heap it does not need: it does so once, some 70 ms after its start
/// (`call_rcu_thread` of util/rcu.c, by malloc_trim(3)), and would give back what was touched before.
pub(super) const HEAP_TRIMMED: Duration = Duration::from_millis(200);

impl Arriving<'_> {
    /// Loads the device state, then the blocks that only now have an address, and compares digests.
    pub(super) fn load(&mut self, end: &StateEnd) -> Result<u32, String> {
        let began = Instant::now();
        self.ended = std::mem::take(&mut self.receivers);
        if end.postcopy {
            // A pager writes from here on.
            self.drop_streams();
        }
        self.paused = end.paused;
        check_digests(end)?;
        let state = std::mem::take(&mut self.state);
        if state.len() as u64 != end.bytes {
            return Err(format!("{} of {} bytes of device state arrived", state.len(), end.bytes));
        }
        let sinks = self.sinks.take().ok_or("nothing is ready")?;
        let Sinks { blocks, guessed, .. } = &*sinks;
        let installer = sinks.close().ok_or("it was loaded before")?;
        installer.finish().map_err(|why| explain(&why))?;
        let closed = began.elapsed();
        let awaits = self.awaits_template(end.postcopy)?;
        if end.postcopy {
            self.begin_fetch(end, sinks.layout.clone(), &lock(&sinks.missing), awaits)?;
        } else {
            self.need_no_fetch();
        }
        let Some(qemu) = &mut self.qemu else { return Err("no QEMU waits".into()) };
        let process = process_of(qemu)?;
        let (staged, there): (Vec<_>, Vec<_>) =
            end.digests.iter().partition(|digest| is_staged(blocks, digest));
        // Before the load: a device may write RAM as it is loaded, as KVM's clock does.
        let mut verified = 0;
        if !there.is_empty() && !end.postcopy {
            let layout = qemu.layout().map_err(|why| explain(&why))?;
            let layout = with_guesses(layout, &self.offer, guessed);
            verified += verify(&process, &self.offer, &layout, &there)?;
        }
        let ready = began.elapsed();
        qemu.load(&state).map_err(|why| explain(&why))?;
        let loaded = began.elapsed();
        if !guessed.is_empty() || blocks.iter().any(|sink| matches!(sink, Sink::Staged(_))) {
            let layout = qemu.layout().map_err(|why| explain(&why))?;
            settle_late(&self.host, &process, &self.offer, &layout, blocks, guessed)?;
            if !end.postcopy {
                verified += verify(&process, &self.offer, &layout, &staged)?;
            }
        }
        let settled = began.elapsed();
        tracing::debug!(
            vm = self.offer.vm,
            ?closed,
            ?ready,
            ?loaded,
            ?settled,
            "target: the parts of the load"
        );
        Ok(verified)
    }

    /// Lets the heap be in its place when the state is loaded: once when the QEMU waits, for a VM that comes quickly, and once more when it has
    /// trimmed its heap, if the first round still goes on by then. After that a stop may be near.
    pub(super) fn touch_heap_again(&mut self) {
        if self.heap_due.is_some_and(|due| Instant::now() >= due) {
            self.heap_due = None;
            self.touch_heap();
        }
    }

    pub(super) fn touch_heap(&self) {
        let Some(process) = self.qemu.as_ref().and_then(|qemu| process_of(qemu).ok()) else { return };
        if let Err(why) = sterna_memory::touch_heap(&process, &self.host.attach()) {
            tracing::debug!(
                vm = self.offer.vm,
                why = explain(&why),
                "the load will be slower: no heap ahead"
            );
        }
    }

    pub(super) fn resume(&mut self) -> TargetInput {
        let began = Instant::now();
        let Some(qemu) = &mut self.qemu else { return TargetInput::RunFailed("no QEMU waits".into()) };
        let done = if self.paused { qemu.take_disks() } else { qemu.resume() };
        self.awake.let_go();
        match done {
            Ok(()) => TargetInput::Running(began.elapsed()),
            // An answer that is lost or late says nothing: what counts is whether it runs.
            Err(_) if matches!(qemu.status(), Ok(RunState::Running)) => TargetInput::Running(began.elapsed()),
            Err(why) => TargetInput::RunFailed(explain(&why)),
        }
    }
}
