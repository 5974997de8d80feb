//! What a restarted agent does with the VMs and records that an earlier life of it left.
//!
//! No guest noticed the agent's death: each QEMU runs in its own scope. The records say who owns what
//! ([`at_source`], [`at_target`]); what they leave open is asked of the other host. What happens when a record or a VM's
//! file is lost, damaged or another one than it should be is in [`crate::doubt`].

use crate::committed;
use crate::control::explain;
use crate::doubt;
use crate::host::Host;
use crate::journal::Found;
use crate::registry::{Vm, VmRecord};
use crate::target::{self, Processors};
use std::sync::Arc;
use std::time::Duration;
use sterna_engine::handoff::{
    Activity, Journal, Record, Role, SourceRecovery, Step, TargetRecovery, at_source, at_target,
};
use sterna_memory::Process;
use sterna_vmm::qemu::Qemu;
use sterna_vmm::{RunState, Vmm, VmmError};

/// How long a QEMU that was found may take to answer.
pub(crate) const ATTACH_WITHIN: Duration = Duration::from_secs(10);
/// How long a QEMU that is to end may take.
const QUIT_WITHIN: Duration = Duration::from_secs(10);

/// How long to wait before a record that could not be stored is tried again.
const STORE_PAUSE: Duration = Duration::from_secs(1);

/// Finds all VMs again and settles what can be settled here. Returns those whose owner must be asked for.
pub(crate) fn recover(host: &Arc<Host>) -> Vec<(Arc<Vm>, Record)> {
    let mut open = Vec::new();
    let written = host.registry().written();
    let names = host.journal().names();
    for name in names {
        if !written.iter().any(|record| record.name == name) {
            settle_without_vm(host, &name);
        }
    }
    for record in written {
        open.extend(recover_vm(host, record));
    }
    doubt::show_strays(host);
    let settled = |vm: &Arc<Vm>| vm.migration().is_none() && !vm.is_released() && !vm.record().incoming;
    host.registry().all().iter().filter(|vm| settled(vm)).for_each(|vm| crate::balloon::give_back(host, vm));
    // Last, when what waited for VMs that did not come has been ended too.
    sterna_vmm::qemu::sweep_scopes();
    open
}

/// An incoming migration whose QEMU was started and not written down yet.
fn settle_without_vm(host: &Arc<Host>, name: &str) {
    let record = match host.journal().look(name) {
        Found::Whole(record) if record.step == Step::Incoming => record,
        Found::Damaged(damage) => return doubt::tell_damage(name, &damage),
        _ => return,
    };
    if doubt::strays(host).iter().any(|stray| stray.name == name && stray.runs()) {
        // What its record says it must not do: the record is not its.
        return;
    }
    match host.end_stray(name) {
        Ok(()) => {
            host.remove_run_dir(name);
            store(host, &record, Step::Dead);
        }
        Err(why) => {
            tracing::error!(vm = name, why, "a QEMU of a migration that never ended is in the way")
        }
    }
}

fn recover_vm(host: &Arc<Host>, written: VmRecord) -> Option<(Arc<Vm>, Record)> {
    let found = host.journal().look(&written.name);
    if let Found::Damaged(damage) = &found {
        doubt::tell_damage(&written.name, damage);
    }
    match found {
        Found::Whole(record) if speaks_of(&record, &written) => match record.step.role() {
            Role::Target => {
                recover_target(host, written, &record);
                None
            }
            Role::Source => recover_source(host, written, record),
        },
        found => doubt::recover(host, written, &found),
    }
}

/// Whether this is the record of the VM's latest migration, as its own file knows it.
fn speaks_of(record: &Record, written: &VmRecord) -> bool {
    let leaving = written.leaving.as_ref().is_none_or(|leaving| leaving.id == record.id.to_string());
    let side = match record.step {
        Step::Incoming | Step::Dead => written.incoming,
        step => step.role() == Role::Target || !written.incoming,
    };
    // A higher one is a fence that its agent died of before it had counted it.
    record.generation.0 >= written.generation && leaving && side
}

fn recover_target(host: &Arc<Host>, mut written: VmRecord, record: &Record) {
    match at_target(record.step) {
        // What waits for a VM does not run: this record is older than what happened.
        TargetRecovery::Kill if doubt::runs(&written) => {
            drop(doubt::recover(host, written, &Found::Whole(record.clone())));
        }
        TargetRecovery::Kill => {
            let (vm, peer) = (&written.name, &record.peer);
            tracing::info!(
                vm,
                peer,
                "its migration to here was interrupted; the QEMU that waited for it is ended"
            );
            if kill(&written) {
                host.registry().forget(&written);
                store(host, record, Step::Dead);
            }
        }
        TargetRecovery::Continue => {
            written.incoming = false;
            let vm = if target::is_unfilled(&written) { show(host, written) } else { list(host, written) };
            committed::settle(host, &vm, record);
        }
        TargetRecovery::Fetch => {
            written.incoming = false;
            let vm = show(host, written);
            drop(go_on_fetching(host, &vm, record, Processors::Run));
        }
        TargetRecovery::Nothing if written.incoming && record.step == Step::Dead => {
            host.registry().forget(&written)
        }
        TargetRecovery::Nothing => {
            written.incoming = false;
            let vm = list(host, written);
            target::let_go(host, &vm);
        }
    }
}

/// Lists a VM whose QEMU may not answer, waiting for a page.
fn show(host: &Host, written: VmRecord) -> Arc<Vm> {
    let vm = Vm::new(written, None);
    host.registry().show(&vm);
    vm
}

/// Fetches the pages that are missing, if the VM's QEMU lives: it cannot run without them.
pub(crate) fn go_on_fetching(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    record: &Record,
    processors: Processors,
) -> Result<(), String> {
    if !vm.is_alive() {
        // The record stays: it tells the source that the VM ran here, and has ended before all of its pages had come.
        vm.notify(Some("it ran here, and ended before all of its pages had come: see its log".into()));
        return Ok(());
    }
    target::resume(host, vm, record, processors).inspect_err(|why| {
        tracing::error!(vm = vm.name(), why, "its pages cannot be fetched");
        vm.notify(Some(format!("pages of it are missing and cannot be fetched from {}: {why}", record.peer)));
    })
}

fn recover_source(host: &Arc<Host>, mut written: VmRecord, record: Record) -> Option<(Arc<Vm>, Record)> {
    written.generation = record.generation.0;
    match at_source(record.step) {
        SourceRecovery::Resume => {
            let vm = list(host, written);
            let resumed = host.with_qemu(&vm, |qemu| undo_stop(qemu, record.activity));
            match resumed {
                Ok(()) => {
                    let (vm, peer, does) = (vm.name(), &record.peer, record.activity.word());
                    tracing::info!(
                        vm,
                        peer,
                        does,
                        "its migration was interrupted; it goes on here as before"
                    );
                    store(host, &record, Step::Kept);
                }
                Err(why) => {
                    vm.notify(Some(format!("its migration to {} died and it is stopped: {why}", record.peer)))
                }
            }
            None
        }
        SourceRecovery::Ask => {
            let vm = list(host, written);
            vm.set_released(true);
            vm.set_serving(record.step == Step::Serving);
            Some((vm, record))
        }
        SourceRecovery::End => {
            if kill(&written) {
                host.registry().forget(&written);
            }
            None
        }
        SourceRecovery::Nothing => {
            list(host, written);
            None
        }
    }
}

/// Undoes the stop of a migration that an earlier life of this agent began. Where the record says that the VM ran and it is
/// paused, it was stopped by that migration; whatever else it is now, it came to by itself.
pub(crate) fn undo_stop(qemu: &mut Qemu, activity: Activity) -> Result<(), VmmError> {
    match qemu.status()? {
        RunState::Paused => go_on(qemu, activity),
        state if state.stands() => qemu.take_disks(),
        _ => Ok(()),
    }
}

/// Makes a VM do what it did before its migration stopped it.
pub(crate) fn go_on(qemu: &mut Qemu, activity: Activity) -> Result<(), VmmError> {
    match activity {
        Activity::Running => qemu.resume(),
        Activity::Paused => qemu.take_disks(),
    }
}

/// Lists a VM, with its QEMU if it lives and answers.
pub(crate) fn list(host: &Host, written: VmRecord) -> Arc<Vm> {
    let socket = written.run_dir.join("qmp.sock");
    let qemu = Qemu::attach(written.process, &socket, Some(written.log.clone()), ATTACH_WITHIN);
    let (name, notice) = (written.name.clone(), qemu.as_ref().err().map(|why| explain(why)));
    let vm = Vm::new(written, qemu.ok());
    if let Some(why) = notice.filter(|_| vm.is_alive()) {
        tracing::error!(vm = name, why, "its QEMU lives and does not answer");
        vm.notify(Some(format!("its QEMU lives and does not answer: {why}")));
    }
    if let Err(why) = host.registry().insert(&vm) {
        // It is written down already, as it was: a full disk hides no VM.
        tracing::error!(vm = name, %why, "it cannot be written down again; make room in state-dir");
        host.registry().show(&vm);
    }
    vm
}

/// True when the VM's QEMU is dead, waited for.
pub(crate) fn kill(written: &VmRecord) -> bool {
    let Ok(process) = Process::open_as(written.process.pid, written.process.start_time) else { return true };
    let killed = process.kill();
    let dead = process.wait_exit(QUIT_WITHIN);
    if !dead {
        tracing::error!(vm = written.name, ?killed, "its QEMU was killed and does not end");
    }
    dead
}

/// Stores what was settled. It is tried until it works: as long as it is not written, the other host is told to ask again.
pub(crate) fn store(host: &Arc<Host>, record: &Record, step: Step) {
    let record = Record { step, ..record.clone() };
    let Err(why) = host.journal().store(&record) else { return };
    tracing::error!(vm = record.vm, %why, "its record cannot be stored; trying again");
    let host = host.clone();
    std::thread::spawn(move || {
        while host.journal().store(&record).is_err() {
            std::thread::sleep(STORE_PAUSE);
        }
    });
}
