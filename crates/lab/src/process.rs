//! Processes by number and start time, so that a number that was given to somebody else is never signalled.

use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::{LabError, run};

/// How long a killed process may take to go: the kernel frees gigabytes of guest memory first.
pub(crate) const GONE: Duration = Duration::from_secs(20);

/// One process, for good: `pid` and the time it started at, in clock ticks since boot (proc(5), `stat` field 22).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started.
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has this number now.
    #[must_use]
    pub fn of(pid: u32) -> Option<ProcessId> {
        let stat = Stat::read(pid)?;
        Some(ProcessId { pid, start_time: stat.start_time })
    }

    /// Whether it still runs. A zombie does not: it holds nothing but its number.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Stat::read(self.pid)
            .is_some_and(|s| s.start_time == self.start_time && s.state != 'Z' && s.state != 'X')
    }

    /// Sends SIGKILL and waits until it is gone. It may be gone before.
    pub fn kill(self) -> Result<(), LabError> {
        self.signal(Signal::KILL);
        run::until(&format!("the end of process {}", self.pid), GONE, || !self.is_alive())
    }

    /// Sends a signal if it still runs. The descriptor pins the process: between the check and the signal its number
    /// cannot pass to another one.
    pub fn signal(self, signal: Signal) {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return };
        let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return };
        if self.is_alive() {
            // It may end by itself at this moment.
            let _ = pidfd_send_signal(handle, signal);
        }
    }

    /// CPU time that it has used so far, user and system.
    #[must_use]
    pub fn cpu_time(self) -> Option<Duration> {
        let ticks = Stat::read(self.pid).filter(|s| s.start_time == self.start_time)?.cpu_ticks;
        let per_second = rustix::param::clock_ticks_per_second();
        Some(Duration::from_millis(ticks * 1000 / per_second))
    }

    /// Memory resident now, in KiB.
    #[must_use]
    pub fn resident_kib(self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse().ok()
    }
}

impl ProcessId {
    /// Memory that it holds, with what it shares counted by its part (`Pss` of proc(5)), in KiB. Walks all its page tables.
    #[must_use]
    pub fn pss_kib(self) -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix("Pss:"))?;
        line.split_whitespace().next()?.parse().ok().filter(|_| self.is_alive())
    }
}

struct Stat {
    state: char,
    cpu_ticks: u64,
    start_time: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Stat> {
        Stat::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The name in parentheses may itself hold blanks and parentheses: fields are counted from the last one.
    fn parse(text: &str) -> Option<Stat> {
        let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Stat {
            state: fields.first()?.chars().next()?,
            cpu_ticks: number(14)? + number(15)?,
            start_time: number(22)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let mut text = String::from("7 (a) b (c) S");
        for field in 4..=25 {
            text += &format!(" {field}");
        }
        let stat = Stat::parse(&text).unwrap();
        assert_eq!((stat.state, stat.cpu_ticks, stat.start_time), ('S', 29, 22));
    }

    #[test]
    fn a_killed_process_is_gone_and_its_number_proves_nothing() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(id.is_alive());
        assert!(!ProcessId { start_time: id.start_time + 1, ..id }.is_alive());
        id.kill().unwrap();
        assert!(!id.is_alive());
        child.wait().unwrap();
    }

    #[test]
    fn the_own_process_has_used_memory() {
        let own = ProcessId::of(std::process::id()).unwrap();
        assert!(own.resident_kib().unwrap() > 100);
        assert!(own.cpu_time().is_some());
    }
}
