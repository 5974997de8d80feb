//! A process that cannot be mistaken for another: its pid together with its start time.
//!
//! Pids are used again. A journal that outlives an agent must not lead it to somebody else's process.

use std::fmt;
use std::fs;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Names one process of this boot of the host for good; plain data, for journals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process.
    pub pid: i32,
    /// When it started, in clock ticks since the boot: field 22 of `/proc/PID/stat`, see proc(5).
    pub start_time: u64,
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (started at tick {})", self.pid, self.start_time)
    }
}

/// Why a process could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is no such process, or it is a zombie.
    #[error("process {pid} does not run")]
    Gone {
        /// The pid that was asked for.
        pid: i32,
    },
    /// The pid belongs to another process by now.
    #[error("process {pid} is another one than it was (the pid was used again)")]
    Reused {
        /// The pid that was asked for.
        pid: i32,
    },
    /// The kernel refused.
    #[error("process {pid} cannot be opened or signalled")]
    System {
        /// The pid that was asked for.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// A process held by a descriptor.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: OwnedFd,
}

impl Process {
    /// Opens the process that has this pid now.
    pub fn open(pid: i32) -> Result<Self, ProcessError> {
        let valid = Pid::from_raw(pid).filter(|_| pid > 0).ok_or(ProcessError::Gone { pid })?;
        // The descriptor first: the start time that is read while it is held is that of the same process.
        let pidfd = pidfd_open(valid, PidfdFlags::empty()).map_err(|e| system(pid, e))?;
        let start_time = start_time(pid).ok_or(ProcessError::Gone { pid })?;
        Ok(Self { id: ProcessId { pid, start_time }, pidfd })
    }

    /// Opens the process that `id` names, or fails when the pid now belongs to another.
    pub fn open_as(id: ProcessId) -> Result<Self, ProcessError> {
        let found = Self::open(id.pid)?;
        if found.id == id { Ok(found) } else { Err(ProcessError::Reused { pid: id.pid }) }
    }

    /// What names it.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Whether it runs; a zombie does not.
    pub fn is_alive(&self) -> bool {
        !self.wait_exit(Duration::ZERO)
    }

    /// Kills it, whatever it does.
    pub fn kill(&self) -> Result<(), ProcessError> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(system(self.id.pid, e)),
        }
    }

    /// Waits until it has exited; false when it has not within the time.
    pub fn wait_exit(&self, within: Duration) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let end = std::time::Instant::now() + within;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
            match poll(&mut fds, Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                ready => return ready.is_ok_and(|n| n > 0),
            }
        }
    }
}

fn system(pid: i32, errno: rustix::io::Errno) -> ProcessError {
    match errno {
        rustix::io::Errno::SRCH => ProcessError::Gone { pid },
        other => ProcessError::System { pid, source: other.into() },
    }
}

/// Field 22 of `/proc/PID/stat`, unless the process is gone or a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, in parentheses, may itself hold spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (!matches!(state, "Z" | "X")).then(|| fields.nth(18)?.parse().ok()).flatten()
}
