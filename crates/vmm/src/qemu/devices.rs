//! Device state alone, out of one QEMU and into another, with nothing but what every QEMU build has.
//!
//! Xen's command `xen-save-devices-state` writes all device state and no RAM. With `live: true` on a stopped VM it
//! also gives up the disks (`qmp_xen_save_devices_state` in QEMU's `migration/savevm.c`). The file lacks the
//! configuration section, which `qemu_loadvm_state` asks for in an incoming stream, so [`complete`] adds it.
//!
//! [`Disks`] is about the second save: QEMU 7.2 aborts when it is to give up disks that it has given up. A VM that ran gets
//! them back by `cont`, one that stood by [`super::disks`].
//!
//! The target loads with capability `late-block-activate`: it is then paused, and the disks stay the source's until
//! `cont`. That makes `cont` the one instant at which the VM changes hands.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use serde_json::{Value, json};

use super::qmp::{QmpError, Ticket, Version};
use super::{COMMAND_WITHIN, DRAIN_WITHIN, Qemu, disks, layout};
use crate::Vmm;
use crate::types::{LentFd, RunState, SaveTicket, VmmError};

/// The most device state that is taken: real VMs have 33 KiB to some MiB (large virtio-gpu and tpm states).
const STATE_BYTES_MAX: u64 = 256 << 20;
/// How long a target may take to load: 5 ms on an idle host, more when its pages come from swap.
const LOAD_WITHIN: Duration = Duration::from_secs(30);
/// The pipe into the target holds a usual state whole, so that it is written in one go.
const PIPE_BYTES: usize = 1 << 20;
/// The name of the pipe's end in the target.
const PIPE_NAME: &str = "sterna-incoming";
/// QEMU's `QEMU_VM_FILE_MAGIC` and `QEMU_VM_FILE_VERSION` (migration/savevm.h), big-endian as they are written.
const HEADER: [u8; 8] = *b"QEVM\0\0\0\x03";
/// QEMU's `QEMU_VM_EOF`: the last byte of a whole state.
const SECTION_EOF: u8 = 0;
/// QEMU's `QEMU_VM_VMDESCRIPTION`.
const SECTION_DESCRIPTION: u8 = 6;
/// QEMU's `QEMU_VM_CONFIGURATION`.
const SECTION_CONFIGURATION: u8 = 7;
/// From here on `migrate-incoming` can be told not to exit when the load fails, so that the reason can be asked for.
const HAS_EXIT_ON_ERROR: Version = Version::new(9, 1);

/// What a [`Qemu`] remembers of saves and loads.
#[derive(Debug, Default)]
pub(super) struct Devices {
    disks: Disks,
    held: Held,
    /// It ran when this was asked last, and `stop` was typed ahead.
    ready: bool,
    prepared: Option<Prepared>,
    saving: Option<Ticket>,
    /// A VM was stopped and saved in one go, and it was not asked yet whether it became paused by that.
    unsure: bool,
    saves: u64,
    /// Our end of the pipe into a waiting target.
    incoming: Option<OwnedFd>,
}

/// Whether the VM may write its disks. A save gives them up, and QEMU 7.2 aborts when a save is to give up what it has given
/// up already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Disks {
    /// Not known: an earlier agent may have saved it.
    #[default]
    Unknown,
    Ours,
    GivenUp,
}

/// Whether we are the ones who keep the VM from running.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Held {
    #[default]
    Not,
    /// It ran, and we stopped it.
    Stopped,
    /// It stood already when we came to stop it.
    Standing,
    /// We have loaded it.
    Loaded,
}

/// Where a save goes to.
#[derive(Debug)]
struct Prepared {
    file: File,
    /// The same file as QEMU has it: an open file has one position, whoever holds it.
    writer: File,
    lent: LentFd,
    machine: String,
}

pub(super) fn prepare_save(qemu: &mut Qemu) -> Result<(), VmmError> {
    if let Some(prepared) = &qemu.devices.prepared {
        // An earlier try's, of a VM that has not run since: QEMU still holds it, with that try's state in it.
        return prepared.rewind().map_err(|source| VmmError::Host { operation: "emptying a memfd", source });
    }
    let machine = qemu.machine_type()?;
    let memfd = memfd_create("sterna-devices", MemfdFlags::CLOEXEC).map_err(host("making a memfd"))?;
    let file = File::from(memfd);
    // QEMU takes a descriptor of a set only when its access mode is exactly the one that it asks for.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let writer = open(path, flags, Mode::empty()).map_err(host("opening a memfd to write"))?;
    let lent = qemu.lend_fd(writer.as_fd())?;
    qemu.devices.prepared = Some(Prepared { file, writer: writer.into(), lent, machine });
    Ok(())
}

impl Prepared {
    fn rewind(&self) -> std::io::Result<()> {
        self.writer.set_len(0)?;
        (&self.writer).rewind()
    }
}

pub(super) fn pause(qemu: &mut Qemu) -> Result<RunState, VmmError> {
    let operation = "stop the VM";
    qemu.devices.unsure = false;
    // Asked, stopped and asked again in one go: each answer that is waited for while the guest runs waits for the guest.
    let mut tickets = Vec::new();
    for command in ["query-status", "stop", "query-status"] {
        let sent = qemu.qmp.send(command, Value::Null, DRAIN_WITHIN);
        tickets.push(sent.map_err(|e| qemu.explain(operation, e))?);
    }
    let mut states = Vec::new();
    for ticket in tickets {
        let answer = qemu.qmp.wait(&ticket, DRAIN_WITHIN).map_err(|e| qemu.explain(operation, e))?;
        states.extend(answer["status"].as_str().map(|word| RunState::from(word.to_owned())));
    }
    match states.as_slice() {
        [before @ RunState::Running, RunState::Paused] => {
            qemu.devices.held = Held::Stopped;
            qemu.devices.disks = Disks::Ours;
            Ok(before.clone())
        }
        [before, _] if before.stands() => {
            qemu.devices.held = Held::Standing;
            if qemu.devices.disks != Disks::Ours {
                take_disks(qemu)?;
            }
            Ok(before.clone())
        }
        // The disk can fail, or the guest can panic, while it is being stopped.
        [RunState::Running, state] => {
            let detail = "it did not become paused";
            Err(VmmError::WrongState { operation: "pause", state: state.clone(), detail })
        }
        states => {
            let state = states.first().cloned().unwrap_or_else(|| RunState::Other("silent".into()));
            let detail = "it neither runs nor can go on later";
            Err(VmmError::WrongState { operation: "pause", state, detail })
        }
    }
}

/// In this time QEMU has read what was typed ahead, and its main thread rests on a processor of its own.
const READS_WITHIN: Duration = Duration::from_micros(300);

/// What QEMU tells when a VM that ran does not run any more.
const STANDS: [&str; 4] = ["STOP", "SHUTDOWN", "GUEST_PANICKED", "SUSPEND"];

pub(super) fn ready_to_pause(qemu: &mut Qemu) -> Result<RunState, VmmError> {
    let operation = "get ready to stop the VM";
    // What stopped it before is told by its state.
    while qemu.qmp.has_event(&STANDS).map_err(|e| qemu.explain(operation, e))? {}
    let state = qemu.status()?;
    if state == RunState::Running {
        let typed = qemu.qmp.type_ahead("stop", Value::Null, COMMAND_WITHIN);
        typed.map_err(|e| qemu.explain(operation, e))?;
        std::thread::sleep(READS_WITHIN);
    }
    qemu.devices.ready = state == RunState::Running;
    Ok(state)
}

pub(super) fn pause_and_save(qemu: &mut Qemu) -> Result<(RunState, SaveTicket), VmmError> {
    let operation = "stop the VM";
    let ready = std::mem::take(&mut qemu.devices.ready) && qemu.devices.prepared.is_some();
    if !ready || qemu.qmp.has_event(&STANDS).map_err(|e| qemu.explain(operation, e))? {
        let state = pause(qemu)?;
        return Ok((state, save_begin(qemu)?));
    }
    // All in one go: QEMU reads the second command while it does the first. A glance tells later whether the VM is paused: it can
    // stop for reasons of its own until we stop it; a save harms none that stands.
    let stop = qemu.qmp.send("stop", Value::Null, DRAIN_WITHIN).map_err(|e| qemu.explain(operation, e))?;
    (qemu.devices.held, qemu.devices.disks) = (Held::Stopped, Disks::Ours);
    // Also where the save cannot be begun: what is undone then may have stopped by itself.
    qemu.devices.unsure = true;
    let save = save_begin(qemu)?;
    qemu.qmp.wait(&stop, DRAIN_WITHIN).map_err(|e| qemu.explain(operation, e))?;
    Ok((RunState::Running, save))
}

/// Whether a VM that was stopped and saved in one go is paused, as it is if nothing else stopped it: what it does now is known.
pub(super) fn check_stopped(qemu: &mut Qemu, state: RunState) -> Result<(), VmmError> {
    match state {
        _ if !std::mem::take(&mut qemu.devices.unsure) => Ok(()),
        RunState::Paused => Ok(()),
        // The disk can fail, or the guest can panic, while it is being stopped.
        state => {
            qemu.devices.held = Held::Standing;
            Err(VmmError::WrongState { operation: "pause", state, detail: "it did not become paused" })
        }
    }
}

pub(super) fn drain(qemu: &mut Qemu) -> Result<(), VmmError> {
    match pause(qemu)? {
        RunState::Running => {
            let done = qemu.qmp.execute("cont", Value::Null, DRAIN_WITHIN);
            done.map_err(|e| qemu.explain("run the VM", e))?;
            qemu.devices.held = Held::Not;
            Ok(())
        }
        // It stood, and has no I/O in flight.
        _ => Ok(()),
    }
}

pub(super) fn restore(qemu: &mut Qemu) -> Result<(), VmmError> {
    if qemu.devices.unsure {
        // It may have stopped by itself, and is left as it is then.
        let state = qemu.status()?;
        if let Err(why) = check_stopped(qemu, state) {
            tracing::warn!(%why, "the VM stopped by itself while it was to be stopped");
        }
    }
    match (qemu.devices.held, qemu.devices.disks) {
        (Held::Stopped, _) => resume(qemu),
        (_, Disks::GivenUp) => take_disks(qemu),
        _ => Ok(()),
    }
}

pub(super) fn take_disks(qemu: &mut Qemu) -> Result<(), VmmError> {
    disks::activate(qemu)?;
    (qemu.devices.disks, qemu.devices.unsure) = (Disks::Ours, false);
    layout::forget_ahead(qemu, |_, _| true);
    Ok(())
}

pub(super) fn save_begin(qemu: &mut Qemu) -> Result<SaveTicket, VmmError> {
    let operation = "save";
    if qemu.devices.held == Held::Not {
        return Err(VmmError::WrongState { operation, state: qemu.status()?, detail: "pause it first" });
    }
    if qemu.devices.disks != Disks::Ours {
        let detail = "its disks are given up already, or not known to be its own, and QEMU 7.2 aborts at a second \
                      save; restore and pause it first";
        return Err(VmmError::Order { operation, detail });
    }
    let Some(prepared) = &qemu.devices.prepared else {
        return Err(VmmError::Order { operation, detail: "prepare the save first" });
    };
    let filename = format!("/dev/fdset/{}", prepared.lent.set);
    let args = json!({ "filename": filename, "live": true });
    // Taken before the command is sent: an answer that never comes must not allow a second try.
    qemu.devices.disks = Disks::GivenUp;
    let sent = qemu.qmp.send("xen-save-devices-state", args, COMMAND_WITHIN);
    qemu.devices.saving = Some(sent.map_err(|e| qemu.explain("save its devices", e))?);
    qemu.devices.saves += 1;
    Ok(SaveTicket(qemu.devices.saves))
}

pub(super) fn save_finish(qemu: &mut Qemu, ticket: SaveTicket) -> Result<Vec<u8>, VmmError> {
    let operation = "finish a save";
    let out_of_order = VmmError::Order { operation, detail: "this save is not the one that goes on" };
    if ticket.0 != qemu.devices.saves {
        return Err(out_of_order);
    }
    let Some(waited) = qemu.devices.saving.take() else { return Err(out_of_order) };
    qemu.qmp.wait(&waited, DRAIN_WITHIN).map_err(|e| qemu.explain("save its devices", e))?;
    let Some(prepared) = &qemu.devices.prepared else { return Err(out_of_order) };
    complete(&read_whole(&prepared.file)?, &prepared.machine)
}

pub(super) fn resume(qemu: &mut Qemu) -> Result<(), VmmError> {
    // Of a VM that we have paused or loaded ourselves we know it; every question is a part of its downtime.
    let state = match qemu.devices.held {
        Held::Stopped | Held::Loaded => RunState::Paused,
        Held::Not | Held::Standing => qemu.status()?,
    };
    match state {
        RunState::Running => {}
        state @ (RunState::Inmigrate | RunState::FinishMigrate | RunState::SaveVm) => {
            let detail = "it would run by itself later; load its state first";
            return Err(VmmError::WrongState { operation: "resume", state, detail });
        }
        // QEMU answers when the processors have been let go, or with the reason why not.
        _ => {
            let done = qemu.qmp.execute("cont", Value::Null, DRAIN_WITHIN);
            done.map_err(|e| qemu.explain("run the VM", e)).map(drop)?;
        }
    }
    (qemu.devices.held, qemu.devices.unsure) = (Held::Not, false);
    qemu.devices.disks = Disks::Ours;
    layout::forget_ahead(qemu, |_, _| true);
    drop_prepared(qemu);
    Ok(())
}

/// Closes QEMU's end of the file. Only now: QEMU before 9 closes the descriptors of a set only while the VM runs
/// (`monitor_fdset_cleanup`), so this also ends what an earlier try while it was stopped could not.
fn drop_prepared(qemu: &mut Qemu) {
    let Some(prepared) = qemu.devices.prepared.take() else { return };
    if let Err(error) = qemu.take_back_fd(prepared.lent) {
        tracing::warn!(%error, "QEMU keeps an empty file of ours open until it exits");
    }
}

fn read_whole(file: &File) -> Result<Vec<u8>, VmmError> {
    let failed = |source| VmmError::Host { operation: "reading the saved device state", source };
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes > STATE_BYTES_MAX {
        return Err(VmmError::State { detail: format!("{bytes} bytes are more than {STATE_BYTES_MAX}") });
    }
    let mut state = vec![0; usize::try_from(bytes).unwrap_or_default()];
    file.read_exact_at(&mut state, 0).map_err(failed)?;
    Ok(state)
}

/// Makes an incoming migration stream of what `xen-save-devices-state` writes.
///
/// QEMU's format (`migration/savevm.c`): header; the configuration section, which names the machine type; the
/// sections of the devices; end; a description in JSON, whose content nothing reads.
fn complete(state: &[u8], machine: &str) -> Result<Vec<u8>, VmmError> {
    let wrong = |detail: &str| VmmError::State { detail: detail.to_owned() };
    let sections =
        state.strip_prefix(&HEADER).ok_or_else(|| wrong("it does not begin as QEMU's version 3 does"))?;
    if sections.last() != Some(&SECTION_EOF) {
        return Err(wrong("it is cut off"));
    }
    let name_bytes =
        u32::try_from(machine.len()).map_err(|_| wrong("the machine type's name is too long"))?;
    let description = b"{}";
    let mut stream = Vec::with_capacity(state.len() + machine.len() + 16);
    stream.extend(HEADER);
    stream.push(SECTION_CONFIGURATION);
    stream.extend(name_bytes.to_be_bytes());
    stream.extend(machine.as_bytes());
    stream.extend(sections);
    stream.push(SECTION_DESCRIPTION);
    stream.extend((description.len() as u32).to_be_bytes());
    stream.extend(description);
    Ok(stream)
}

pub(super) fn prepare_load(qemu: &mut Qemu) -> Result<(), VmmError> {
    let state = qemu.status()?;
    if state != RunState::Inmigrate || qemu.devices.incoming.is_some() {
        let detail = "only a QEMU that waits for its state can be loaded, and once only";
        return Err(VmmError::WrongState { operation: "prepare_load", state, detail });
    }
    let on = |name: &str| json!({ "capability": name, "state": true });
    let capabilities = json!({ "capabilities": [on("late-block-activate"), on("events")] });
    qemu.ask("migrate-set-capabilities", capabilities, "wait with the disks")?;
    // QEMU announces a loaded VM although it is paused; switches must follow only when it runs.
    qemu.ask("migrate-set-parameters", json!({ "announce-rounds": 0 }), "wait with its announcement")?;
    qemu.devices.incoming = Some(open_pipe(qemu)?);
    let mut args = json!({ "uri": format!("fd:{PIPE_NAME}") });
    if qemu.version() >= HAS_EXIT_ON_ERROR {
        args["exit-on-error"] = json!(false);
    }
    qemu.ask("migrate-incoming", args, "wait for its device state").map(drop)
}

fn open_pipe(qemu: &mut Qemu) -> Result<OwnedFd, VmmError> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(host("making a pipe"))?;
    // Smaller will do, only slower: not root's limit is 1 MiB in all.
    let _ = fcntl_setpipe_size(&writer, PIPE_BYTES);
    rustix::io::ioctl_fionbio(&writer, true).map_err(host("setting up a pipe"))?;
    qemu.qmp
        .execute_with_fds("getfd", json!({ "fdname": PIPE_NAME }), &[reader.as_fd()], COMMAND_WITHIN)
        .map_err(|error| qemu.explain("take a pipe", error))?;
    Ok(writer)
}

pub(super) fn load(qemu: &mut Qemu, state: &[u8]) -> Result<(), VmmError> {
    let Some(pipe) = qemu.devices.incoming.take() else {
        return Err(VmmError::Order { operation: "load", detail: "prepare the load first" });
    };
    let end = Instant::now() + LOAD_WITHIN;
    qemu.qmp.forget_events();
    // A reader that is gone is QEMU refusing the state: its own reason is better than ours.
    let written = write_by(pipe, state, end);
    // QEMU reads these while it loads.
    let asked = layout::ask_ahead(qemu);
    if written.is_err() || asked.is_err() || !wait_loaded(qemu, end)? {
        return Err(load_failed(qemu));
    }
    layout::forget_ahead(qemu, |qmp, ticket| qmp.has_answered(ticket));
    let operation = "load";
    // It would have told before it told that it is loaded.
    if qemu.qmp.has_event(&["RESUME"]).map_err(|e| qemu.explain(operation, e))? {
        let detail = "a loaded target must be paused";
        return Err(VmmError::WrongState { operation, state: qemu.status()?, detail });
    }
    (qemu.devices.held, qemu.devices.disks) = (Held::Loaded, Disks::GivenUp);
    if qemu.late {
        return Ok(()); // more is asked before it runs
    }
    // Typed while the other end hears of it.
    let typed = qemu.qmp.type_ahead("cont", Value::Null, COMMAND_WITHIN);
    typed.map_err(|e| qemu.explain(operation, e))
}

fn write_by(pipe: OwnedFd, state: &[u8], end: Instant) -> std::io::Result<()> {
    let mut pipe = File::from(pipe);
    let mut rest = state;
    while !rest.is_empty() {
        match pipe.write(rest) {
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => wait_writable(&pipe, end)?,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn wait_writable(pipe: &File, end: Instant) -> std::io::Result<()> {
    let left = end.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    match poll(&mut [PollFd::new(pipe, PollFlags::OUT)], Some(&left)) {
        Ok(0) => Err(std::io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Waits for QEMU's word on the load: true when it is done, false when it failed.
fn wait_loaded(qemu: &mut Qemu, end: Instant) -> Result<bool, VmmError> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match qemu.qmp.next_event(&["MIGRATION"], left) {
            Ok(event) if event.data["status"] == "completed" => return Ok(true),
            Ok(event) if event.data["status"] == "failed" => return Ok(false),
            Ok(_) => {}
            Err(QmpError::Closed { .. }) => return Ok(false),
            Err(error) => return Err(qemu.explain("load its device state", error)),
        }
    }
}

/// Since 9.1 QEMU stays and tells the reason; before, it exits and the reason is in its log.
fn load_failed(qemu: &mut Qemu) -> VmmError {
    let told = qemu.qmp.execute("query-migrate", Value::Null, COMMAND_WITHIN).ok();
    let told =
        told.as_ref().and_then(|answer| answer["error-desc"].as_str()).unwrap_or("it gave no reason by QMP");
    // The end of the log is written before the process exits, but maybe not yet when the connection closes.
    if qemu.version() < HAS_EXIT_ON_ERROR {
        qemu.process.wait_exit(COMMAND_WITHIN);
    }
    VmmError::LoadFailed { reason: format!("{told}; the end of its log: {}", qemu.log_end()) }
}

fn host(operation: &'static str) -> impl Fn(Errno) -> VmmError {
    move |errno| VmmError::Host { operation, source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_gets_the_configuration_section_that_qemu_asks_for() {
        let stream = complete(b"QEVM\0\0\0\x03\x04abc\0", "pc-q35-7.2").unwrap();
        assert_eq!(stream, b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2\x04abc\0\x06\0\0\0\x02{}");
    }

    #[test]
    fn what_is_no_whole_state_is_refused() {
        for state in [&b""[..], b"QEVM", b"QEVM\0\0\0\x03", b"QEVM\0\0\0\x03\x04abc", b"QEVM\0\0\0\x02\x04\0"]
        {
            let error = complete(state, "pc").unwrap_err();
            assert!(matches!(error, VmmError::State { .. }), "{state:?}: {error}");
        }
    }
}
