//! Disks of clones: each clone writes a qcow2 image of its own, which lies over what the template's VM has left.
//!
//! The template's VM is never run again, so what it has left stays as it was when the memory was read. Whoever changes it
//! nevertheless would let clones find another disk than the one that they remember: so its length and time are compared.

use super::start::PLACEHOLDER;
use crate::control::explain;
use crate::host::Host;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use sterna_vmm::qemu::{CommandLine, new_file};

/// What makes an image over another; it comes with QEMU.
const QEMU_IMG: &str = "qemu-img";

/// A disk of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredDisk {
    /// The image of a clone, with `{vm}` where its name belongs.
    pub(crate) path: String,
    /// The image that the template's VM has left.
    pub(crate) base: String,
    /// How long that is, and when it was last written, in nanoseconds since 1970.
    pub(crate) bytes: u64,
    pub(crate) modified: i64,
}

/// Images that each clone has for itself: those that are called after it, and are qcow2.
pub(super) fn own(line: &CommandLine) -> Vec<String> {
    line.qcow2_images().into_iter().filter(|path| path.contains(PLACEHOLDER)).collect()
}

/// What a VM that has ended has left of its own images.
pub(super) fn left(paths: Vec<String>, vm: &str) -> Result<Vec<StoredDisk>, String> {
    let of = |path: String| {
        let base = path.replace(PLACEHOLDER, vm);
        let (bytes, modified) = state_of(Path::new(&base))?;
        Ok(StoredDisk { path, base, bytes, modified })
    };
    paths.into_iter().map(of).collect()
}

fn state_of(path: &Path) -> Result<(u64, i64), String> {
    let found = path.metadata().map_err(|why| format!("image {}: {why}", path.display()))?;
    Ok((found.len(), found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec())))
}

/// Images that were made for a clone: removed with this, unless it runs.
#[derive(Debug, Default)]
pub(crate) struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    /// Makes an image for each disk of a clone.
    ///
    /// # Errors
    /// Why there is none; those that were made are removed.
    pub(super) fn of(host: &Host, disks: &[StoredDisk], vm: &str, from_peer: bool) -> Result<Self, String> {
        let here = |asked: &str| match from_peer {
            true => new_file(&host.config().map, &host.policy(), asked),
            false => Ok(asked.to_owned()),
        };
        let mut made = Self::default();
        for disk in disks {
            let path = PathBuf::from(here(&disk.path.replace(PLACEHOLDER, vm))?);
            let base = here(&disk.base)?;
            if state_of(Path::new(&base))? != (disk.bytes, disk.modified) {
                return Err(format!(
                    "image {base} has been written since the template was made, and its clones remember it as it was: make the \
                     template anew"
                ));
            }
            if path.symlink_metadata().is_ok() {
                return Err(format!(
                    "image {} is there already, and would not be what the clone remembers: remove it, or give the clone another name",
                    path.display()
                ));
            }
            made.add(path, &base)?;
            made.give_to_qemu(host)?;
        }
        Ok(made)
    }

    fn add(&mut self, path: PathBuf, base: &str) -> Result<(), String> {
        let mut command = Command::new(QEMU_IMG);
        command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base]).arg(&path);
        let output = command.output().map_err(|why| format!("{QEMU_IMG} cannot be started: {why}"))?;
        self.paths.push(path);
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("{QEMU_IMG}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        }
    }

    fn give_to_qemu(&self, host: &Host) -> Result<(), String> {
        let (Some(user), Some(path)) = (host.user(), self.paths.last()) else { return Ok(()) };
        std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).map_err(|why| explain(&why))
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.paths.iter().map(|path| path.to_string_lossy().into_owned()).collect()
    }

    /// They are the clone's from now on.
    pub(super) fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        self.paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
    }
}
