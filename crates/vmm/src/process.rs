//! The name of a process that can be written down and read back after a restart.

use std::fmt;

use serde::{Deserialize, Serialize};
use sterna_memory::{Process, ProcessError};

/// Names one process of this boot of the host for good: pids are used again, and a journal that outlives an agent
/// must not lead it to somebody else's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process.
    pub pid: i32,
    /// When it started, in clock ticks since the boot: field 22 of `/proc/PID/stat`, see proc(5).
    pub start_time: u64,
}

impl ProcessId {
    /// The name of a process.
    pub fn of(process: &Process) -> Self {
        Self { pid: process.pid(), start_time: process.start_time() }
    }

    /// Takes hold of the process, unless it is gone or its pid now belongs to another.
    pub fn open(self) -> Result<Process, ProcessError> {
        Process::open_as(self.pid, self.start_time)
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (started at tick {})", self.pid, self.start_time)
    }
}
