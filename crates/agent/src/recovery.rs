//! What a restarted agent does with the VMs and records that an earlier life of it left.
//!
//! No guest noticed the agent's death: each QEMU runs in its own scope. The records say who owns what
//! ([`at_source`], [`at_target`]); what they leave open is asked of the other host.

use crate::control::explain;
use crate::host::Host;
use crate::registry::{Vm, VmRecord};
use std::sync::Arc;
use std::time::Duration;
use sterna_engine::handoff::{
    Activity, Journal, Record, Role, SourceRecovery, Step, TargetRecovery, at_source, at_target,
};
use sterna_memory::Process;
use sterna_vmm::qemu::Qemu;
use sterna_vmm::{RunState, Vmm, VmmError};

/// How long a QEMU that was found may take to answer.
const ATTACH_WITHIN: Duration = Duration::from_secs(10);
/// How long a QEMU that is to end may take.
const QUIT_WITHIN: Duration = Duration::from_secs(10);

/// How long to wait before a record that could not be stored is tried again.
const STORE_PAUSE: Duration = Duration::from_secs(1);

/// Finds all VMs again and settles what can be settled here. Returns those whose owner must be asked for.
pub(crate) fn recover(host: &Arc<Host>) -> Vec<(Arc<Vm>, Record)> {
    sterna_vmm::qemu::sweep_scopes();
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
    open
}

/// An incoming migration whose QEMU was started and not written down yet.
fn settle_without_vm(host: &Arc<Host>, name: &str) {
    let found = host.journal().load(name);
    let Ok(Some(record)) = found else { return };
    if record.step == Step::Incoming {
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
}

fn recover_vm(host: &Arc<Host>, written: VmRecord) -> Option<(Arc<Vm>, Record)> {
    let name = written.name.clone();
    let found = host.journal().load(&name);
    let record =
        found.inspect_err(|why| tracing::error!(vm = name, %why, "its record cannot be read")).ok().flatten();
    let relevant = record.filter(|record| record.generation.0 == written.generation || written.incoming);
    let Some(record) = relevant else {
        list(host, written);
        return None;
    };
    match record.step.role() {
        Role::Target => recover_target(host, written, &record),
        Role::Source => return recover_source(host, written, record),
    }
    None
}

fn recover_target(host: &Arc<Host>, mut written: VmRecord, record: &Record) {
    match at_target(record.step) {
        TargetRecovery::Kill => {
            if kill(&written) {
                host.registry().forget(&written);
                store(host, record, Step::Dead);
            }
        }
        TargetRecovery::Continue => {
            written.incoming = false;
            let vm = list(host, written);
            // What was read may never have reached the disk: it does before the VM runs because of it.
            let resumed = host
                .journal()
                .store(record)
                .map_err(|why| why.to_string())
                .and_then(|()| host.with_qemu(&vm, |qemu| go_on(qemu, record.activity)));
            match resumed {
                Ok(()) => store(host, record, Step::Running),
                Err(why) => {
                    tracing::error!(vm = vm.name(), why, "the VM is ours and could not be resumed");
                    vm.notify(Some(format!("it came from {} and could not be resumed: {why}", record.peer)));
                }
            }
        }
        TargetRecovery::Nothing if written.incoming && record.step == Step::Dead => {
            host.registry().forget(&written)
        }
        TargetRecovery::Nothing => {
            written.incoming = false;
            list(host, written);
        }
    }
}

fn recover_source(host: &Arc<Host>, written: VmRecord, record: Record) -> Option<(Arc<Vm>, Record)> {
    match at_source(record.step) {
        SourceRecovery::Resume => {
            let vm = list(host, written);
            let resumed = host.with_qemu(&vm, |qemu| match qemu.status()? {
                // The record says that it ran, so it was stopped by the migration that died with us. Whatever else it is now,
                // it came to by itself.
                RunState::Paused => go_on(qemu, record.activity),
                state if state.stands() => qemu.take_disks(),
                _ => Ok(()),
            });
            match resumed {
                Ok(()) => store(host, &record, Step::Kept),
                Err(why) => {
                    vm.notify(Some(format!("its migration to {} died and it is stopped: {why}", record.peer)))
                }
            }
            None
        }
        SourceRecovery::Ask => {
            let vm = list(host, written);
            vm.set_released(true);
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

/// Makes a VM do what it did before its migration stopped it.
fn go_on(qemu: &mut Qemu, activity: Activity) -> Result<(), VmmError> {
    match activity {
        Activity::Running => qemu.resume(),
        Activity::Paused => qemu.take_disks(),
    }
}

/// Lists a VM, with its QEMU if it lives and answers.
fn list(host: &Host, written: VmRecord) -> Arc<Vm> {
    let socket = written.run_dir.join("qmp.sock");
    let qemu = Qemu::attach(written.process, &socket, Some(written.log.clone()), ATTACH_WITHIN);
    let (name, notice) = (written.name.clone(), qemu.as_ref().err().map(|why| explain(why)));
    let vm = Vm::new(written, qemu.ok());
    if let Some(why) = notice.filter(|_| vm.is_alive()) {
        tracing::error!(vm = name, why, "its QEMU lives and does not answer");
        vm.notify(Some(format!("its QEMU lives and does not answer: {why}")));
    }
    if let Err(why) = host.registry().insert(&vm) {
        tracing::error!(vm = name, %why, "it cannot be written down");
    }
    vm
}

/// True when the VM's QEMU is dead, waited for.
fn kill(written: &VmRecord) -> bool {
    let Ok(process) = Process::open_as(written.process.pid, written.process.start_time) else { return true };
    let killed = process.kill();
    let dead = process.wait_exit(QUIT_WITHIN);
    if !dead {
        tracing::error!(vm = written.name, ?killed, "its QEMU was killed and does not end");
    }
    dead
}

/// Stores what was settled. It is tried until it works: as long as it is not written, the other host is told to ask again.
fn store(host: &Arc<Host>, record: &Record, step: Step) {
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
