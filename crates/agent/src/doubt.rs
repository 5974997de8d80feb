//! VMs of which the files on disk do not tell whose they are: a record or a VM's file is damaged, gone, or another one
//! than it should be (a bad disk, a restored backup, a hand that slipped).
//!
//! What is not known is not guessed. A QEMU that runs is ours: one that was handed out is stopped, one that waits never
//! ran. A stopped one that may have been handed out is kept stopped, and the other host is asked. Where nobody can be
//! asked, the QEMU is neither resumed nor ended, and people are told what was found and what to do.

use crate::control::explain;
use crate::host::{Host, pids, ram_of};
use crate::journal::{Damage, Found};
use crate::recovery::{ATTACH_WITHIN, list, store};
use crate::registry::{Vm, VmRecord, is_usable};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use sterna_engine::handoff::{Activity, Generation, Record, Role, Step};
use sterna_memory::Process;
use sterna_vmm::qemu::Qemu;
use sterna_vmm::{ProcessId, RunState, Vmm};

/// Says that a record cannot be read, and which file it is.
pub(crate) fn tell_damage(vm: &str, damage: &Damage) {
    let survivor = damage.survivor.as_ref().map(|record| record.step.word());
    tracing::error!(
        vm,
        why = damage.why,
        survivor,
        "the VM's migration record is damaged, and is not relied upon"
    );
}

/// Finds out whose a VM is whose record does not tell. Returns it if the other host must be asked.
pub(crate) fn recover(host: &Arc<Host>, written: VmRecord, found: &Found) -> Option<(Arc<Vm>, Record)> {
    if written.incoming {
        arrived(host, written, found);
        return None;
    }
    let runs = runs(&written);
    let Some(leaving) = written.leaving.clone().filter(|_| !runs) else {
        list(host, written);
        return None;
    };
    let (generation, vm) = (Generation(written.generation), list(host, written));
    let (name, peer) = (vm.name(), leaving.to);
    let what = format!("it was being moved to host {peer}, and {}", why(found));
    let Some(id) = leaving.id.parse().ok().filter(|_| vm.is_alive()) else {
        vm.notify(Some(format!("{what}: it may run there (`sterna ps` at {peer})")));
        return None;
    };
    tracing::warn!(vm = name, peer, what, "the VM is kept stopped until host {peer} says whose it is");
    vm.set_released(true);
    vm.notify(Some(format!("{what}: it is kept stopped until {peer} says whether it runs it")));
    // What it did before it was stopped is lost with the record; hardly any VM is moved paused.
    let activity = Activity::Running;
    Some((vm, Record { id, generation, vm: name, peer, step: Step::Released, activity }))
}

/// A VM that was on its way here.
fn arrived(host: &Arc<Host>, mut written: VmRecord, found: &Found) {
    let (generation, runs) = (Generation(written.generation), runs(&written));
    written.incoming = !runs;
    let vm = list(host, written);
    let name = vm.name();
    if !runs {
        let (what, end) = (
            why(found),
            if vm.is_alive() { "its QEMU waits, and is neither run nor ended" } else { "its QEMU has ended" },
        );
        return doubt(
            &vm,
            format!(
                "it was on its way here, and {what}: nobody can tell whether it was handed over. {end}. Look for it on its source (`sterna ps` there). If it runs there, end this one: `sterna stop {name}`. If \
             it is `released` there, end this one and take it back there, as the guide says under \"Unresolved\""
            ),
        );
    }
    tracing::warn!(vm = name, why = why(found), "the VM runs: it was handed over, and is ours");
    let survivor = match found {
        Found::Whole(record) | Found::Damaged(Damage { survivor: Some(record), .. }) => Some(record),
        _ => None,
    };
    let of_this_try =
        |record: &&Record| record.generation == generation && record.step.role() == Role::Target;
    if let Some(record) = survivor.filter(of_this_try) {
        store(host, record, Step::Running);
    }
}

fn why(found: &Found) -> String {
    match found {
        Found::Nothing => "its migration record is gone".into(),
        Found::Whole(record) => format!("its migration record is of another try ({})", record.id),
        Found::Damaged(damage) => format!("its migration record is damaged ({})", damage.why),
    }
}

fn doubt(vm: &Vm, notice: String) {
    tracing::error!(vm = vm.name(), notice, "nobody can tell whose the VM is");
    vm.doubt(notice);
}

/// Whether this VM's QEMU says that it runs.
pub(crate) fn runs(written: &VmRecord) -> bool {
    is_running(written.process, &written.run_dir.join("qmp.sock"))
}

fn is_running(process: ProcessId, socket: &Path) -> bool {
    let status = Qemu::attach(process, socket, None, ATTACH_WITHIN).and_then(|mut qemu| qemu.status());
    matches!(status, Ok(RunState::Running))
}

/// A QEMU with a socket that only this agent gives, and no VM's file.
pub(crate) struct Stray {
    pub(crate) name: String,
    process: ProcessId,
    argv: Vec<String>,
    run_dir: PathBuf,
}

impl Stray {
    pub(crate) fn runs(&self) -> bool {
        is_running(self.process, &self.run_dir.join("qmp.sock"))
    }

    fn record(&self, host: &Host, generation: u64) -> VmRecord {
        VmRecord {
            name: self.name.clone(),
            argv: self.argv.clone(),
            process: self.process,
            run_dir: self.run_dir.clone(),
            log: host.log(&self.name),
            ram_bytes: ram_of(&self.argv),
            generation,
            since: jiff::Timestamp::now(),
            incoming: false,
            leaving: None,
            parts: None,
            balloon: None,
            fetch: None,
            template: None,
        }
    }
}

/// All QEMUs of this host's run-dir that are not those of listed VMs.
pub(crate) fn strays(host: &Host) -> Vec<Stray> {
    let folder = host.config().run_dir.join("vms");
    let found = pids().filter_map(|pid| stray(pid, &folder));
    let listed = |stray: &Stray| {
        host.registry().find(&stray.name).is_some_and(|vm| vm.record().process == stray.process)
    };
    found.filter(|stray| !listed(stray)).collect()
}

fn stray(pid: i32, folder: &Path) -> Option<Stray> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let argv: Vec<String> =
        String::from_utf8_lossy(&line).split_terminator('\0').map(str::to_owned).collect();
    let prefix = format!("{}/", folder.display());
    // As a value of an option of QEMU's: others may name the socket to talk to it.
    let mut after = argv.windows(2).filter(|pair| pair[0] == "-chardev" || pair[0] == "-qmp");
    let name =
        after.find_map(|pair| Some(pair[1].split_once(&prefix)?.1.split_once("/qmp.sock")?.0.to_owned()))?;
    let process = ProcessId::of(&Process::open(pid).ok()?);
    is_usable(&name).then(|| Stray { run_dir: folder.join(&name), name, process, argv })
}

/// Lists the QEMUs whose VMs' files are gone, so that people see them and nobody takes their names.
pub(crate) fn show_strays(host: &Arc<Host>) {
    for stray in strays(host) {
        if host.registry().find(&stray.name).is_some_and(|vm| vm.is_alive()) {
            let pid = stray.process.pid;
            tracing::error!(
                vm = stray.name,
                pid,
                "a second QEMU of this VM is there; it is left alone: find out what started it"
            );
            continue;
        }
        show(host, &stray);
    }
}

fn show(host: &Arc<Host>, stray: &Stray) {
    let found = host.journal().look(&stray.name);
    let (generation, handed) = match &found {
        Found::Whole(record) if record.step == Step::Released => {
            let peer = &record.peer;
            (record.generation.0, format!(" It was handed to host {peer}: if it runs there, end this one."))
        }
        Found::Whole(record) => (record.generation.0, String::new()),
        Found::Damaged(damage) => (0, format!(" Its migration record is damaged, too ({}).", damage.why)),
        Found::Nothing => (0, String::new()),
    };
    let socket = stray.run_dir.join("qmp.sock");
    let qemu = Qemu::attach(stray.process, &socket, Some(host.log(&stray.name)), ATTACH_WITHIN);
    let unheard = qemu.as_ref().err().map(|why| format!(" It does not answer: {}.", explain(why)));
    let vm = Vm::new(stray.record(host, generation), qemu.ok());
    vm.set_released(matches!(&found, Found::Whole(record) if record.step == Step::Released));
    host.registry().show(&vm);
    let (name, pid) = (&stray.name, stray.process.pid);
    doubt(
        &vm,
        format!(
            "its file in state-dir is gone or cannot be read; its QEMU (process {pid}) is left as it is and cannot be moved.{handed}{} \
         `sterna stop {name}` ends it; a copy of the file, put back while the agent does not run, makes it a VM like any other",
            unheard.unwrap_or_default()
        ),
    );
}
