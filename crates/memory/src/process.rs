//! Naming a process so that it is never confused with another one that got its pid.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::maps::{self, Whose};
use crate::page::{PAGE, PageRun, Region};
use crate::populated::PopulatedError;
use crate::sys;

/// A process: its pid, a descriptor of it, and when it started.
///
/// The descriptor makes signals and waiting safe against pid reuse; the start time makes the name durable: it can be
/// written down and given to [`Process::open_as`] by a later run of the agent.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    start_time: u64,
    pidfd: OwnedFd,
}

/// Why a process could not be named or asked.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is no such process (any more).
    #[error("process {pid} does not exist or has ended")]
    Gone {
        /// The pid that was asked for.
        pid: i32,
    },
    /// The pid belongs to a process that started at another time.
    #[error("process {pid} is another one than expected: it started at tick {found}, not {expected}")]
    Reused {
        /// The pid that was asked for.
        pid: i32,
        /// The start time that was expected.
        expected: u64,
        /// The start time that the process has.
        found: u64,
    },
    /// A file of the process in `/proc` could not be read.
    #[error("cannot read /proc/{pid}/{what}; is /proc mounted, and do we run as root?")]
    Proc {
        /// The pid that was asked for.
        pid: i32,
        /// Which file below `/proc/PID`.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A signal could not be sent.
    #[error("cannot send a signal to process {pid}")]
    Signal {
        /// The process's pid.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What of a process is in memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// All of it.
    pub all: u64,
    /// What belongs to no file, memfd or shared memory.
    pub private: u64,
}

/// What memory a process uses, in bytes, as proc(5) has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// What is mapped and in memory.
    pub rss: u64,
    /// The same, but each page divided by how many map it.
    pub pss: u64,
    /// What of it others map too.
    pub shared: u64,
    /// What of it nobody else maps.
    pub own: u64,
    /// What belongs to no file, memfd or shared memory, shared or not.
    pub anonymous: u64,
    /// What is swapped out, and in none of the others.
    pub swapped: u64,
}

impl Process {
    /// Opens the process that has this pid now.
    pub fn open(pid: i32) -> Result<Process, ProcessError> {
        // Asking rustix for a negative pid would panic.
        let name = (pid > 0).then_some(pid).and_then(Pid::from_raw).ok_or(ProcessError::Gone { pid })?;
        let pidfd = pidfd_open(name, PidfdFlags::empty()).map_err(|_| ProcessError::Gone { pid })?;
        let start_time = start_time(pid)?;
        let process = Process { pid, start_time, pidfd };
        // Alive now: so the pid was not handed on between the two reads, and both belong to one process.
        if process.is_alive() { Ok(process) } else { Err(ProcessError::Gone { pid }) }
    }

    /// Opens the process that has this pid and started at that time: the one that was opened before, or an error.
    pub fn open_as(pid: i32, start_time: u64) -> Result<Process, ProcessError> {
        let process = Process::open(pid)?;
        if process.start_time != start_time {
            return Err(ProcessError::Reused { pid, expected: start_time, found: process.start_time });
        }
        Ok(process)
    }

    /// The pid.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// When it started, in clock ticks after boot (field 22 of `/proc/PID/stat`, see proc(5)).
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Whether it still runs. A zombie counts as dead: its memory is gone.
    pub fn is_alive(&self) -> bool {
        !self.wait_exit(Duration::ZERO)
    }

    /// Sends SIGKILL. Succeeds if the process is dead already.
    pub fn kill(&self) -> Result<(), ProcessError> {
        self.signal(Signal::KILL)
    }

    /// Sends SIGTERM. Succeeds if the process is dead already.
    pub fn terminate(&self) -> Result<(), ProcessError> {
        self.signal(Signal::TERM)
    }

    /// Waits for its end, at most so long; true if it ended. Does not reap it, and works for any process, not only a child.
    pub fn wait_exit(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) if left.is_zero() => return false,
                Ok(0) | Err(_) if until > Instant::now() => {}
                Ok(n) => return n > 0,
                Err(_) => return false,
            }
        }
    }

    /// What memory it uses (`smaps_rollup`, and `pagemap` where it maps what others may map too).
    pub fn usage(&self) -> Result<Usage, ProcessError> {
        let text = self.read_proc("smaps_rollup")?;
        let of = |names: &[&str]| {
            let line = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            let kib = |name: &&str| line(name)?.split_whitespace().next()?.parse::<u64>().ok();
            names.iter().map(kib).sum::<Option<u64>>().map(|kib| kib * 1024)
        };
        let usage = || {
            Some(Usage {
                rss: of(&["Rss"])?,
                pss: of(&["Pss"])?,
                shared: of(&["Shared_Clean", "Shared_Dirty"])?,
                own: of(&["Private_Clean", "Private_Dirty"])?,
                anonymous: of(&["Anonymous"])?,
                swapped: of(&["Swap"])?,
            })
        };
        let mut usage = usage().ok_or_else(|| self.malformed("smaps_rollup"))?;
        // A page that nobody else has mapped just now is private to the kernel.
        let lone = self.lone_bytes()?;
        usage.own = usage.own.saturating_sub(lone);
        usage.shared += lone;
        Ok(usage)
    }

    /// What of memfds of ours it alone has mapped, and has not written: templates and stores, which are there for others too.
    fn lone_bytes(&self) -> Result<u64, ProcessError> {
        let ours = maps::all(self)?.into_iter().filter(|map| map.file != Whose::Other);
        let ranges: Vec<(u64, u64)> = ours.map(|map| map.address).collect();
        let (Some((base, _)), Some((_, end))) = (ranges.first(), ranges.last()) else { return Ok(0) };
        let region = Region { base: *base, bytes: end - base };
        let runs: Vec<PageRun> = ranges.iter().map(|(from, to)| region.run(*from, *to)).collect();
        crate::shared::lone_bytes(self, &region, &runs).map_err(|why| match why {
            PopulatedError::Process(why) => why,
            other => ProcessError::Proc { pid: self.pid, what: "pagemap", source: io::Error::other(other) },
        })
    }

    /// What of it is in memory, in bytes (`/proc/PID/statm`, see proc(5)): quick to be had, however large the process is.
    ///
    /// # Errors
    /// It has ended.
    pub fn resident(&self) -> Result<Resident, ProcessError> {
        let text = self.read_proc("statm")?;
        let mut pages = text.split(' ').map_while(|field| field.trim().parse::<u64>().ok()).skip(1);
        let (Some(all), Some(shared)) = (pages.next(), pages.next()) else {
            return Err(self.malformed("statm"));
        };
        Ok(Resident { all: all * PAGE, private: all.saturating_sub(shared) * PAGE })
    }

    /// Its share of memory in bytes (`Pss` of `smaps_rollup`: shared pages divided by who shares them).
    pub fn pss_bytes(&self) -> Result<u64, ProcessError> {
        Ok(self.usage()?.pss)
    }

    /// The CPU time all its threads have used, to the nanosecond, its kernel work included.
    pub fn cpu_time(&self) -> Result<Duration, ProcessError> {
        let time = sys::clock::process_cpu_time(self.pid);
        time.map_err(|source| ProcessError::Proc { pid: self.pid, what: "stat", source })
    }

    /// The descriptor of the process (see `pidfd_open(2)`), ready for reading when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// A second handle of the same process.
    pub fn try_clone(&self) -> Result<Process, ProcessError> {
        let pidfd = self.pidfd.try_clone();
        let pidfd = pidfd.map_err(|source| ProcessError::Proc { pid: self.pid, what: "stat", source })?;
        Ok(Process { pid: self.pid, start_time: self.start_time, pidfd })
    }

    pub(crate) fn gone(&self) -> ProcessError {
        ProcessError::Gone { pid: self.pid }
    }

    /// Reads a text file of the process, and knows that it was this process's.
    pub(crate) fn read_proc(&self, what: &'static str) -> Result<String, ProcessError> {
        let text = std::fs::read_to_string(format!("/proc/{}/{what}", self.pid));
        self.is_alive().then_some(()).ok_or_else(|| self.gone())?;
        text.map_err(|source| ProcessError::Proc { pid: self.pid, what, source })
    }

    /// Opens a file of the process, and knows that it is this process's.
    pub(crate) fn open_proc(&self, what: &'static str) -> Result<File, ProcessError> {
        let file = File::open(format!("/proc/{}/{what}", self.pid));
        self.is_alive().then_some(()).ok_or_else(|| self.gone())?;
        file.map_err(|source| ProcessError::Proc { pid: self.pid, what, source })
    }

    fn malformed(&self, what: &'static str) -> ProcessError {
        ProcessError::Proc { pid: self.pid, what, source: io::ErrorKind::InvalidData.into() }
    }

    fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(ProcessError::Signal { pid: self.pid, source: e.into() }),
        }
    }
}

/// Field 22 of `/proc/PID/stat`; the second field may hold any character, so count from its closing parenthesis.
pub(crate) fn start_time(pid: i32) -> Result<u64, ProcessError> {
    let text = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(ProcessError::Gone { pid }),
        Err(source) => return Err(ProcessError::Proc { pid, what: "stat", source }),
    };
    let rest = text.rsplit_once(") ").map(|(_, rest)| rest);
    let field = rest.and_then(|r| r.split(' ').nth(19)).and_then(|f| f.parse().ok());
    field.ok_or(ProcessError::Proc { pid, what: "stat", source: io::ErrorKind::InvalidData.into() })
}
