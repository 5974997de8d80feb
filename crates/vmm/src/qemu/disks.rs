//! The disks of a VM that stands still: taken back without letting it run.
//!
//! A save gives up the disks (`bdrv_inactivate_all`), and a loaded target has not taken them yet (`late-block-activate`).
//! `cont` takes them, but also runs the VM, which a VM that its user has paused must not. Since 10.0 QEMU has a command for
//! just that. Before, an export does it: `block-export-add` activates the node that it exports, "since the export could be
//! available before migration handover" (`blk_exp_add` in QEMU's block/export/export.c), and the node stays active when the
//! export is gone. Its server listens at a socket whose name is removed before QEMU gets it: nobody can connect.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use super::qmp::Version;
use super::{COMMAND_WITHIN, Qemu};
use crate::types::VmmError;

/// From here on QEMU activates block nodes when it is asked to.
const HAS_SET_ACTIVE: Version = Version::new(10, 0);
/// What the export and the socket are called in QEMU.
const NAME: &str = "sterna-disks";
/// The byte whose lock means that its holder writes the image: `RAW_LOCK_PERM_BASE` and the bit of `BLK_PERM_WRITE`.
const WRITE_LOCK_BYTE: u64 = 100 + 1;
const OPERATION: &str = "take its disks back";

/// Makes all disks writable again, and takes the locks on their images. Does nothing to those that are.
pub(super) fn activate(qemu: &mut Qemu) -> Result<(), VmmError> {
    if qemu.version() >= HAS_SET_ACTIVE {
        return qemu.ask("blockdev-set-active", json!({ "active": true }), OPERATION).map(drop);
    }
    let nodes = writable_nodes(qemu)?;
    if nodes.is_empty() {
        return Ok(());
    }
    listen(qemu)?;
    let exported = nodes.iter().try_for_each(|node| export(qemu, node));
    let stopped = qemu.ask("nbd-server-stop", Value::Null, OPERATION).map(drop);
    exported.and(stopped)?;
    taken(qemu)
}

/// An export does not tell that the node could not be activated. The lock on its image does: QEMU locks a byte for each
/// right that it uses (`RAW_LOCK_PERM_BASE` in block/file-posix.c), and gives up the one to write with the disk.
fn taken(qemu: &mut Qemu) -> Result<(), VmmError> {
    let nodes = qemu.ask("query-named-block-nodes", json!({ "flat": true }), "list its disks")?;
    let files = nodes.as_array().into_iter().flatten();
    let files = files.filter(|node| node["drv"] == "file" && node["ro"] == false);
    let pid = qemu.process.pid();
    for file in files.filter_map(|node| node["file"].as_str()) {
        let Ok(known) = fs::metadata(file) else { continue };
        let opened =
            descriptors(pid).filter(|(_, seen)| (seen.dev(), seen.ino()) == (known.dev(), known.ino()));
        if known.is_file() && !opened.map(|(number, _)| number).any(|number| is_write_locked(pid, &number)) {
            return Err(VmmError::DiskElsewhere { file: file.to_owned() });
        }
    }
    Ok(())
}

/// The numbers of a process's descriptors, with what each is open on.
fn descriptors(pid: i32) -> impl Iterator<Item = (String, Metadata)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, fs::metadata(entry.path()).ok()?)))
}

/// Whether a lock on the right to write is held through this descriptor: `lock: 1: OFDLCK ADVISORY READ -1 fe:00:42 100 101`
/// in its fdinfo (proc_pid_fdinfo(5)).
fn is_write_locked(pid: i32, number: &str) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
    info.lines().filter(|line| line.starts_with("lock:")).any(|line| {
        let mut ends = line.split_whitespace().rev().map(|end| end.parse().unwrap_or(u64::MAX));
        let (last, first) = (ends.next(), ends.next());
        first.zip(last).is_some_and(|(first, last)| (first..=last).contains(&WRITE_LOCK_BYTE))
    })
}

fn writable_nodes(qemu: &mut Qemu) -> Result<BTreeSet<String>, VmmError> {
    let disks = qemu.ask("query-block", Value::Null, "list its disks")?;
    let inserted = disks.as_array().into_iter().flatten().map(|disk| &disk["inserted"]);
    let writable = inserted.filter(|inserted| inserted["ro"] == false);
    Ok(writable.filter_map(|inserted| inserted["node-name"].as_str().map(str::to_owned)).collect())
}

fn export(qemu: &mut Qemu, node: &str) -> Result<(), VmmError> {
    let export = json!({ "type": "nbd", "id": NAME, "node-name": node, "name": NAME });
    qemu.ask("block-export-add", export, OPERATION)?;
    qemu.ask("block-export-del", json!({ "id": NAME, "mode": "hard" }), OPERATION).map(drop)
}

/// Starts a server that nobody can reach.
fn listen(qemu: &mut Qemu) -> Result<(), VmmError> {
    let socket = nameless().map_err(|source| VmmError::Host { operation: "making a socket", source })?;
    qemu.qmp
        .execute_with_fds("getfd", json!({ "fdname": NAME }), &[socket.as_fd()], COMMAND_WITHIN)
        .map_err(|error| qemu.explain(OPERATION, error))?;
    let addr = json!({ "type": "fd", "data": { "str": NAME } });
    qemu.ask("nbd-server-start", json!({ "addr": addr }), OPERATION).map(drop)
}

/// A listening socket whose name was never seen outside of a folder of our own.
fn nameless() -> std::io::Result<UnixListener> {
    let folder =
        std::env::temp_dir().join(format!("{NAME}-{}-{:?}", std::process::id(), std::thread::current().id()));
    DirBuilder::new().mode(0o700).create(&folder)?;
    let socket = UnixListener::bind(folder.join("socket"));
    let removed = fs::remove_dir_all(&folder);
    let socket = socket?;
    removed.map(|()| socket)
}
