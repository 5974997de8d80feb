//! What we could leave behind in a process: descriptors, mappings and their flags. For tests that a process is as it was.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use crate::process::{Process, ProcessError};

/// Descriptors and mappings of a process at one moment. Its `Debug` lists them; [`Footprint::differences`] tells two apart.
#[derive(Clone, PartialEq, Eq)]
pub struct Footprint {
    /// Number and target of each open descriptor.
    pub descriptors: BTreeMap<i32, String>,
    /// The mappings in order of address.
    pub mappings: Vec<Mapping>,
}

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its line of `/proc/PID/maps`: addresses, permissions, offset, device, inode, name.
    pub line: String,
    /// Its `VmFlags` of `/proc/PID/smaps`.
    pub flags: String,
}

/// Why a footprint could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum FootprintError {
    /// The process could not be asked.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Its descriptors could not be listed.
    #[error("cannot list the descriptors of process {pid}; run as root")]
    Descriptors {
        /// The process's pid.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Takes the footprint of a process. One that allocates or opens files meanwhile differs by itself.
pub fn footprint(process: &Process) -> Result<Footprint, FootprintError> {
    let pid = process.pid();
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let fds = fds.map_err(|source| FootprintError::Descriptors { pid, source })?;
    let descriptors = fds
        .flatten()
        .filter_map(|fd| {
            let number = fd.file_name().to_str()?.parse().ok()?;
            let target = std::fs::read_link(fd.path()).ok()?;
            Some((number, target.display().to_string()))
        })
        .collect();
    let mappings = mappings(&process.read_proc("smaps")?);
    Ok(Footprint { descriptors, mappings })
}

impl Footprint {
    /// What is only here or only there, a line each; empty when they are equal.
    pub fn differences(&self, later: &Footprint) -> Vec<String> {
        let (before, after) = (self.lines(), later.lines());
        let gone = before.iter().filter(|l| !after.contains(l)).map(|l| format!("- {l}"));
        let new = after.iter().filter(|l| !before.contains(l)).map(|l| format!("+ {l}"));
        gone.chain(new).collect()
    }

    fn lines(&self) -> Vec<String> {
        let descriptors = self.descriptors.iter().map(|(n, target)| format!("descriptor {n}: {target}"));
        let mappings = self.mappings.iter().map(|m| format!("{} [{}]", m.line, m.flags));
        descriptors.chain(mappings).collect()
    }
}

impl fmt::Debug for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.lines()).finish()
    }
}

/// Only the headers and the flags: every other line of smaps is a figure that changes by itself. The text is kept, not parsed,
/// since a flag that a library does not know yet must count as well.
fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(mapping) = mappings.last_mut() {
                mapping.flags = flags.trim().to_owned();
            }
        } else if !first.ends_with(':') {
            mappings.push(Mapping { line: line.to_owned(), flags: String::new() });
        }
    }
    mappings
}
