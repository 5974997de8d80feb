//! Choosing the thread that lends itself, and getting hold of it.
//!
//! Any thread will do, since restarting its system call is the kernel's own business; but some are better hosts. QEMU's
//! `call_rcu` thread always sits in futex(2) and holds no lock; the main thread can sit in disk sleep; a thread that runs may
//! be in the middle of a restartable sequence.

use std::time::{Duration, Instant};

use linux_raw_sys::general::{
    __NR_epoll_pwait, __NR_epoll_pwait2, __NR_epoll_wait, __NR_futex as FUTEX, __NR_io_getevents,
    __NR_io_pgetevents, __NR_io_uring_enter, __NR_ioctl, __NR_rt_sigtimedwait, __NR_semop, __NR_semtimedop,
};

use super::inject::{Held, Seized, Try};
use crate::attach::{HELPER, protocol::Failure};
use crate::process::start_time;

/// How long one thread may take to stop before the next one is tried: many times the delay of a busy scheduler.
const SLICE: Duration = Duration::from_millis(100);

/// Pause between two rounds over all threads, when none could be had.
const ROUND_PAUSE: Duration = Duration::from_millis(2);

/// How often all threads may refuse before it is taken to be about our privilege.
const REFUSALS: u32 = 5;

/// Thread states told when none could be had; the rest is only counted.
const STATES_TOLD: usize = 16;

/// Calls that return EINTR rather than go on after a stop (signal(7), the list at its end), and ioctl, behind which anything
/// may be: second choice, although programs must be ready for it.
const NOT_RESTARTED: [u32; 10] = [
    __NR_ioctl,
    __NR_epoll_wait,
    __NR_epoll_pwait,
    __NR_epoll_pwait2,
    __NR_semop,
    __NR_semtimedop,
    __NR_io_getevents,
    __NR_io_pgetevents,
    __NR_io_uring_enter,
    __NR_rt_sigtimedwait,
];

/// How good a host a thread is; smaller is better.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Futex,
    Restarted,
    NotRestarted,
    Running,
}

/// Gets hold of one thread of the process, or leaves it as it was.
pub(super) fn hold(pid: i32, started: u64, until: Instant) -> Result<Held, Failure> {
    let mut late: Vec<Seized> = Vec::new();
    let mut refusals = 0;
    loop {
        let round = Round::look(pid)?;
        match round.attempt(&mut late, until) {
            Ok(Some(held)) if start_time(pid).is_ok_and(|t| t == started) => return Ok(held),
            // The pid has another owner now: dropping what is held restores it.
            Ok(Some(_)) => return Err(Failure::Gone),
            Ok(None) => refusals = 0,
            // A tracer that came between the look and the attempt makes the kernel refuse as well.
            Err(Failure::Refused) if refusals < REFUSALS => refusals += 1,
            Err(failure) => return Err(failure),
        }
        if Instant::now() >= until {
            return Err(round.out_of_time());
        }
        std::thread::sleep(ROUND_PAUSE);
    }
}

/// The threads as they were at one look.
struct Round {
    pid: i32,
    hosts: Vec<(Rank, i32)>,
    states: Vec<(i32, char)>,
    /// Another helper is at work on a thread: its parent may have died, it itself will be done in a moment.
    shared_with: Option<i32>,
}

impl Round {
    fn look(pid: i32) -> Result<Round, Failure> {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|_| Failure::Gone)?;
        let tids = tasks.flatten().filter_map(|t| t.file_name().to_str()?.parse::<i32>().ok());
        let mut round = Round { pid, hosts: Vec::new(), states: Vec::new(), shared_with: None };
        let mut tracer = None;
        for tid in tids {
            let Some(state) = state(pid, tid) else { continue };
            round.states.push((tid, state));
            match (tracer_of(pid, tid), rank(pid, tid, state)) {
                (Some(by), _) => tracer = Some(by),
                (None, Some(rank)) => round.hosts.push((rank, tid)),
                (None, None) => {}
            }
        }
        round.hosts.sort_unstable_by_key(|&(rank, tid)| (rank, tid == pid, tid));
        match tracer {
            Some(tracer) if is_passing(tracer) => round.shared_with = Some(tracer),
            Some(tracer) if round.hosts.is_empty() => return Err(Failure::Traced { tracer }),
            _ if round.states.iter().all(|s| matches!(s.1, 'Z' | 'X')) => return Err(Failure::Gone),
            _ => {}
        }
        Ok(round)
    }

    /// Tries the threads in order, and those seized before that have stopped since.
    fn attempt(&self, late: &mut Vec<Seized>, until: Instant) -> Result<Option<Held>, Failure> {
        let mut refused = 0;
        for &(_, tid) in &self.hosts {
            let seized = match late.iter().position(|s| s.tid() == tid) {
                Some(i) => late.swap_remove(i),
                None => match Seized::new(tid) {
                    Ok(seized) => seized,
                    Err(e) => {
                        refused += usize::from(e.kind() == std::io::ErrorKind::PermissionDenied);
                        continue;
                    }
                },
            };
            match seized.stop(until.min(Instant::now() + SLICE))? {
                Try::Held(held) => return Ok(Some(*held)),
                Try::Late(seized) => late.push(seized),
                Try::Unfit => {}
            }
        }
        // Threads that are just exiting refuse as well; only when all do is it about us.
        let all_refused = refused > 0 && refused == self.hosts.len();
        if all_refused { Err(Failure::Refused) } else { Ok(None) }
    }

    fn out_of_time(&self) -> Failure {
        match self.shared_with {
            Some(tracer) if self.hosts.is_empty() => Failure::Traced { tracer },
            _ => Failure::NoThread { detail: self.states() },
        }
    }

    fn states(&self) -> String {
        let told: Vec<String> =
            self.states.iter().take(STATES_TOLD).map(|(t, s)| format!("{t}: {s}")).collect();
        let n = self.states.len();
        format!("{n} threads of {}, thread: state {}", self.pid, told.join(", "))
    }
}

fn state(pid: i32, tid: i32) -> Option<char> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    text.rsplit_once(") ")?.1.chars().next()
}

/// The process that traces a thread, if it is not this one.
fn tracer_of(pid: i32, tid: i32) -> Option<i32> {
    let tracer =
        status_number(&format!("/proc/{pid}/task/{tid}/status"), "TracerPid:").filter(|t| *t != 0)?;
    // The kernel tells the tracing thread; people know the process.
    let tracer = status_number(&format!("/proc/{tracer}/status"), "Tgid:").unwrap_or(tracer);
    (tracer.unsigned_abs() != std::process::id()).then_some(tracer)
}

fn status_number(path: &str, key: &str) -> Option<i32> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|l| l.strip_prefix(key))?.trim().parse().ok()
}

/// Whether a tracer will be done in a moment: another helper, or one that has ended since it was seen.
fn is_passing(tracer: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{tracer}/comm")).map_or(true, |name| name.trim_end() == HELPER)
}

/// `None`: not to be touched (disk sleep, dead, idle).
fn rank(pid: i32, tid: i32, state: char) -> Option<Rank> {
    match state {
        'S' | 'T' | 't' => {}
        'R' => return Some(Rank::Running),
        _ => return None,
    }
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default();
    let call = text.split(' ').next().and_then(|n| n.parse::<u32>().ok());
    Some(match call {
        Some(FUTEX) => Rank::Futex,
        Some(nr) if NOT_RESTARTED.contains(&nr) => Rank::NotRestarted,
        Some(_) => Rank::Restarted,
        None => Rank::Running,
    })
}
