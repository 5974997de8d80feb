//! Lets processes go whose daemon was killed: nobody can undo anything after SIGKILL, so a second process waits for it.
//!
//! It is told of each process before that is stopped, through a pipe. The end of the pipe means that the daemon is gone: then
//! all of them go on. SIGCONT does no harm to a process that runs. The watchdog takes no signal, and is in a process group
//! of its own, so that what ends the daemon does not end both at once; only a second SIGKILL could.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

use nix::sys::signal::SigSet;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::victims::{Usage, usage};

/// The word that starts the watchdog; for the daemon alone.
pub const WORD: &str = "watchdog";
/// Said in the place of a process: none is stopped any more.
const NONE: &str = "none";

/// A process that is held, so that its pid can never mean another.
#[derive(Debug)]
pub struct Held {
    pidfd: OwnedFd,
}

impl Held {
    /// Takes hold of a process if it is still the one that began then.
    #[must_use]
    pub fn open(pid: i32, start: u64) -> Option<Self> {
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        let same = usage(pid).is_some_and(|found| found.start == start);
        same.then_some(Self { pidfd })
    }

    /// Whether the kernel can do this at all: 5.3 and later.
    #[must_use]
    pub fn is_possible() -> bool {
        let us = Pid::from_raw(std::process::id().cast_signed());
        us.is_some_and(|us| pidfd_open(us, PidfdFlags::empty()).is_ok())
    }

    /// Stops it, or returns false when it has ended.
    pub fn stop(&self) -> bool {
        pidfd_send_signal(&self.pidfd, Signal::STOP).is_ok()
    }

    /// Lets it run; one that has ended needs nothing.
    pub fn go_on(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::CONT);
    }
}

/// The watchdog as its daemon has it.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    pipe: ChildStdin,
}

impl Watchdog {
    /// Starts one.
    ///
    /// # Errors
    /// The system's.
    pub fn start() -> io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(WORD).stdin(Stdio::piped()).process_group(0);
        let mut child = command.spawn()?;
        let pipe = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { child, pipe })
    }

    /// Tells it of a process that is about to be stopped.
    ///
    /// # Errors
    /// When the watchdog is gone: then nothing may be stopped.
    pub fn add(&mut self, victim: &Usage) -> io::Result<()> {
        self.pipe.write_all(format!("{} {}\n", victim.pid, victim.start).as_bytes())
    }

    /// No process is stopped any more.
    pub fn clear(&mut self) {
        // One that is gone is found out before the next process is stopped.
        drop(self.pipe.write_all(format!("{NONE}\n").as_bytes()));
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it lives.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

/// The watchdog itself: reads until the daemon is gone.
pub fn run() {
    // What cannot be blocked ends it, and then the daemon stops nothing more.
    let _ = SigSet::all().thread_block();
    let mut held = HashMap::new();
    for line in BufReader::new(io::stdin()).lines() {
        let Ok(line) = line else { break };
        if line == NONE {
            held.clear();
        } else if let Some((pid, start)) = numbers(&line)
            && let Some(process) = Held::open(pid, start)
        {
            held.insert(pid, process);
        }
    }
    held.values().for_each(Held::go_on);
}

fn numbers(line: &str) -> Option<(i32, u64)> {
    let (pid, start) = line.split_once(' ')?;
    Some((pid.parse().ok()?, start.parse().ok()?))
}
