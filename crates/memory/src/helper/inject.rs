//! Making a stopped thread execute system calls, and putting it back as if nothing had happened.
//!
//! The order of stops is what makes it exact (ptrace(2); the kernel's `kernel/signal.c` and `arch/x86/kernel/signal.c`):
//!
//! 1. PTRACE_INTERRUPT stops the thread *inside signal delivery*. If it slept in a system call, its registers now hold that
//!    call's number and an internal "restart me" result, which the kernel would turn into a restart, or into EINTR, right
//!    after this point.
//! 2. With the call's number set to -1 nothing is restarted; the thread leaves to a `syscall` instruction that is already in
//!    its address space (text and stack are never written) and stops at the entry and at the exit of our call.
//! 3. At that exit it is too late for a restart by what ptrace(2) promises: the old registers, restored here, could show the
//!    internal result to the program (that a detach happens to pass through signal delivery again is the kernel's own matter).
//!    So the thread is told to stop once more and goes on to its next stop inside signal delivery, without a single
//!    instruction of user mode; *there* all registers are restored, and the kernel restarts the old call as it would have.
//!
//! Signals stay pending meanwhile: the thread's mask blocks all of them, and is restored last.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::libc;

use crate::attach::protocol::Failure;
use crate::sys::ptrace::{self, Registers, Seccomp, Stop};

/// The code segment of 64-bit user mode (`__USER_CS`); a 32-bit program would take our registers for others.
const USER_CS_64: u64 = 0x33;

/// The bytes of the instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Where `struct rseq` (linux/rseq.h) holds the pointer to the sequence that is under way.
const RSEQ_CS_OFFSET: u64 = 8;

/// Every signal; the kernel leaves SIGKILL and SIGSTOP out. Signals that faults raise are among them: a `syscall` instruction
/// raises none, and one that somebody sends must wait like any other.
const ALL_SIGNALS: u64 = u64::MAX;

/// The bit of what an `int3` raises.
const TRAP: u64 = 1 << (libc::SIGTRAP - 1);

/// Looks for a stop without sleeping between them, before sleeping: a sleeping thread stops within microseconds.
const QUICK_LOOKS: u32 = 50;

/// The sleep between later looks.
const LOOK_PAUSE: Duration = Duration::from_micros(50);

/// Largest vdso that is searched; it has two pages today.
const VDSO_MAX: u64 = 1 << 16;

/// A thread that we trace and have told to stop. Dropped, it runs on: here if it has stopped, else when this process ends.
pub(super) struct Seized {
    tid: i32,
    ours: bool,
}

/// What became of an attempt to stop a thread.
pub(super) enum Try {
    /// It is ready for calls.
    Held(Box<Held>),
    /// It has not stopped yet.
    Late(Seized),
    /// It is gone, or not in a state in which its registers may be changed.
    Unfit,
}

impl Seized {
    pub(super) fn new(tid: i32) -> io::Result<Seized> {
        ptrace::seize(tid)?;
        let seized = Seized { tid, ours: true };
        ptrace::interrupt(tid)?;
        Ok(seized)
    }

    pub(super) fn tid(&self) -> i32 {
        self.tid
    }

    /// Waits until it stops, at most so long.
    pub(super) fn stop(mut self, until: Instant) -> Result<Try, Failure> {
        let mut looks = 0;
        loop {
            match ptrace::look(self.tid) {
                Ok(Some(Stop::Event)) => return self.prepare(),
                Ok(Some(Stop::Signal(signal))) => {
                    // A signal was faster. It is delivered as if we were not here; then the thread stops for us.
                    let _ = ptrace::interrupt(self.tid);
                    let _ = ptrace::resume(self.tid, signal);
                }
                Ok(Some(Stop::Syscall)) => {
                    let _ = ptrace::resume(self.tid, 0);
                }
                Ok(Some(Stop::Ended)) | Err(_) => {
                    self.ours = false;
                    return Ok(Try::Unfit);
                }
                Ok(None) if Instant::now() >= until => return Ok(Try::Late(self)),
                Ok(None) => pause(&mut looks),
            }
        }
    }

    /// The thread stands inside signal delivery. Nothing of it has been changed yet.
    fn prepare(mut self) -> Result<Try, Failure> {
        let tid = self.tid;
        let saved = ptrace::registers(tid).map_err(other)?;
        if saved.cs != USER_CS_64 || in_restartable_sequence(tid, &saved) {
            return Ok(Try::Unfit);
        }
        let gadget = find_syscall(tid, &saved)?;
        let mask = ptrace::signal_mask(tid).map_err(other)?;
        let seccomp = ptrace::set_options(tid).map_err(other)?;
        if seccomp_may_answer(tid, seccomp) {
            return Err(Failure::Refused);
        }
        // From here on, what was changed is put back by `Held`.
        self.ours = false;
        let held = Held { tid, saved, mask, gadget, place: Place::Delivery };
        ptrace::set_signal_mask(tid, ALL_SIGNALS).map_err(other)?;
        Ok(Try::Held(Box::new(held)))
    }
}

impl Drop for Seized {
    fn drop(&mut self) {
        if self.ours {
            // Takes up a stop that has come meanwhile. A thread that still runs cannot be detached: our end does it, and
            // nothing of the thread has been changed.
            let signal = match ptrace::look(self.tid) {
                Ok(Some(Stop::Signal(signal))) => signal,
                _ => 0,
            };
            let _ = ptrace::detach(self.tid, signal);
        }
    }
}

/// Where a held thread stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Inside signal delivery: may be restored here.
    Delivery,
    /// At the exit of one of our calls.
    Exit,
    /// Nowhere: it has ended, or was let go.
    Gone,
}

/// A thread that stands still and executes calls for us. Dropping it restores it.
pub(super) struct Held {
    tid: i32,
    saved: Registers,
    mask: u64,
    gadget: u64,
    place: Place,
}

impl Held {
    /// Executes one system call in the thread; what it returned, errors as negative numbers.
    pub(super) fn call(&mut self, number: u32, args: [u64; 3]) -> Result<i64, Failure> {
        let [first, second, third] = args;
        self.call_long(number, [first, second, third, 0, 0, 0])
    }

    /// The same for a call with more arguments.
    pub(super) fn call_long(&mut self, number: u32, args: [u64; 6]) -> Result<i64, Failure> {
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        let (orig_rax, rax) = (u64::MAX, number.into());
        let regs = Registers { rip: self.gadget, orig_rax, rax, rdi, rsi, rdx, r10, r8, r9, ..self.saved };
        ptrace::set_registers(self.tid, &regs).map_err(other)?;
        self.run_to_syscall_stop()?;
        self.run_to_syscall_stop()?;
        Ok(ptrace::registers(self.tid).map_err(other)?.rax as i64)
    }

    /// Has the thread run machine code that ends with the instruction before `code.end`, an `int3`; the registers that it ends with. Nothing
    /// happens where the process ignores what that raises, for the kernel would change what it does with that signal, or has been sent one.
    ///
    /// A thread that somebody traces is stopped before it gets a signal that it raises itself, and who traces it can take that away. The signal
    /// must not be blocked meanwhile: the kernel would unblock it, and forget the program's handler (`force_sig_info_to_task`, kernel/signal.c).
    pub(super) fn run(
        &mut self,
        code: Range<u64>,
        set: impl FnOnce(&mut Registers),
    ) -> Result<Option<Registers>, Failure> {
        if has_traps(self.tid) {
            return Ok(None);
        }
        let mut regs = Registers { rip: code.start, orig_rax: u64::MAX, ..self.saved };
        set(&mut regs);
        ptrace::set_registers(self.tid, &regs).map_err(other)?;
        ptrace::set_signal_mask(self.tid, ALL_SIGNALS & !TRAP).map_err(other)?;
        let mut signal = 0;
        let regs = loop {
            ptrace::resume(self.tid, signal).map_err(|e| self.lost(&e))?;
            match ptrace::wait(self.tid).map_err(|e| self.lost(&e))? {
                Stop::Event | Stop::Syscall => signal = 0,
                Stop::Signal(stop) if stops_process(stop) => signal = stop,
                Stop::Signal(raised) => {
                    self.place = Place::Delivery;
                    let regs = ptrace::registers(self.tid).map_err(other)?;
                    if raised == libc::SIGTRAP && regs.rip == code.end {
                        break regs;
                    }
                    // Cannot be: all others are blocked, and nobody sends this one.
                    self.leave(raised)?;
                    return Err(Failure::Other { detail: format!("signal {raised} came in between") });
                }
                Stop::Ended => return Err(self.lost(&"the thread ended")),
            }
        };
        ptrace::set_signal_mask(self.tid, ALL_SIGNALS).map_err(other)?;
        Ok(Some(regs))
    }

    /// Puts the thread back and lets it go.
    pub(super) fn restore(mut self) -> Result<(), Failure> {
        self.put_back()
    }

    /// On to the entry or the exit of our call. Waits as long as it takes: a call that has begun is not abandoned.
    fn run_to_syscall_stop(&mut self) -> Result<(), Failure> {
        let mut signal = 0;
        loop {
            ptrace::resume_to_syscall(self.tid, signal).map_err(|e| self.lost(&e))?;
            match ptrace::wait(self.tid).map_err(|e| self.lost(&e))? {
                Stop::Syscall => {
                    self.place = Place::Exit;
                    return Ok(());
                }
                // The process is being stopped or continued by somebody; our thread goes on, and joins them at the detach.
                Stop::Event => signal = 0,
                Stop::Signal(stop) if stops_process(stop) => signal = stop,
                // Cannot be, since it is blocked; if it is, the program gets it with its own registers, and our call is off.
                Stop::Signal(signal) => {
                    self.leave(signal)?;
                    return Err(Failure::Other { detail: format!("signal {signal} came in between") });
                }
                Stop::Ended => return Err(self.lost(&"the thread ended")),
            }
        }
    }

    fn put_back(&mut self) -> Result<(), Failure> {
        match self.place {
            Place::Gone => Ok(()),
            Place::Delivery => self.leave(0),
            Place::Exit => {
                let signal = self.run_to_delivery()?;
                self.leave(signal)
            }
        }
    }

    /// From the exit of a call into signal delivery; the signal that the thread was about to get there, or 0.
    fn run_to_delivery(&mut self) -> Result<i32, Failure> {
        let mut signal = 0;
        loop {
            ptrace::interrupt(self.tid).map_err(|e| self.lost(&e))?;
            ptrace::resume(self.tid, signal).map_err(|e| self.lost(&e))?;
            match ptrace::wait(self.tid).map_err(|e| self.lost(&e))? {
                Stop::Event => return Ok(0),
                Stop::Signal(stop) if stops_process(stop) => signal = stop,
                Stop::Signal(signal) => return Ok(signal),
                Stop::Syscall => signal = 0,
                Stop::Ended => return Err(self.lost(&"the thread ended")),
            }
        }
    }

    /// Inside signal delivery: everything back, and go (with a signal, if it stands before the delivery of one).
    fn leave(&mut self, signal: i32) -> Result<(), Failure> {
        self.place = Place::Gone;
        ptrace::set_registers(self.tid, &self.saved).map_err(other)?;
        ptrace::set_signal_mask(self.tid, self.mask).map_err(other)?;
        ptrace::detach(self.tid, signal).map_err(other)
    }

    /// The thread does not answer any more: killed, with its process.
    fn lost(&mut self, _why: &dyn std::fmt::Display) -> Failure {
        self.place = Place::Gone;
        Failure::Gone
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Failing here means that the process has been killed meanwhile: there is nothing left to restore.
        let _ = self.put_back();
    }
}

fn pause(looks: &mut u32) {
    *looks += 1;
    if *looks < QUICK_LOOKS { std::thread::yield_now() } else { std::thread::sleep(LOOK_PAUSE) }
}

fn other(e: io::Error) -> Failure {
    if e.raw_os_error() == Some(libc::ESRCH) {
        Failure::Gone
    } else {
        Failure::Other { detail: e.to_string() }
    }
}

/// Whether the process ignores SIGTRAP, or has one that waits for it, or nobody can tell.
fn has_traps(tid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    ["SigIgn:", "SigPnd:", "ShdPnd:"].iter().any(|name| {
        let mask = status.lines().find_map(|line| line.strip_prefix(name));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_none_or(|mask| mask & TRAP != 0)
    })
}

fn stops_process(signal: i32) -> bool {
    matches!(signal, libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU)
}

/// Whether the thread may be inside a restartable sequence (rseq(2)): jumping elsewhere would make the kernel forget it, and
/// coming back would run its rest on another CPU's data. A thread in a system call never is.
fn in_restartable_sequence(tid: i32, regs: &Registers) -> bool {
    if regs.orig_rax as i64 >= 0 {
        return false;
    }
    let Ok(area) = ptrace::rseq_area(tid) else { return false };
    let mut pointer = [0u8; 8];
    let read = memory(tid).and_then(|m| m.read_exact_at(&mut pointer, area.saturating_add(RSEQ_CS_OFFSET)));
    area != 0 && (read.is_err() || pointer != [0; 8])
}

/// The address of a `syscall` instruction in the thread's text: the one that it waits in, or one of the vdso's.
fn find_syscall(tid: i32, regs: &Registers) -> Result<u64, Failure> {
    let memory = memory(tid).map_err(other)?;
    let before = regs.rip.wrapping_sub(SYSCALL.len() as u64);
    let mut bytes = [0u8; 2];
    if regs.orig_rax as i64 >= 0 && memory.read_exact_at(&mut bytes, before).is_ok() && bytes == SYSCALL {
        return Ok(before);
    }
    let (start, end) = vdso(tid)?;
    let mut text = vec![0u8; (end - start).min(VDSO_MAX) as usize];
    memory.read_exact_at(&mut text, start).map_err(other)?;
    let at = text.windows(SYSCALL.len()).position(|w| w == SYSCALL);
    at.map(|i| start + i as u64)
        .ok_or_else(|| Failure::Other { detail: "its vdso has no syscall instruction".into() })
}

fn vdso(tid: i32) -> Result<(u64, u64), Failure> {
    let maps = std::fs::read_to_string(format!("/proc/{tid}/maps")).map_err(other)?;
    let line = maps.lines().find(|l| l.ends_with("[vdso]"));
    let range = line.and_then(|l| l.split(' ').next()).and_then(|r| r.split_once('-'));
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let range = range.and_then(|(a, b)| Some((hex(a)?, hex(b)?))).filter(|(a, b)| a < b);
    range.ok_or_else(|| Failure::Other { detail: "it has no vdso".into() })
}

fn memory(tid: i32) -> io::Result<File> {
    File::open(format!("/proc/{tid}/mem"))
}

/// Whether a seccomp filter of the thread is active although we trace it. With CAP_SYS_ADMIN it is suspended for the time
/// of our calls; without, it could answer them by killing the process, so they are not tried.
fn seccomp_may_answer(tid: i32, seccomp: Seccomp) -> bool {
    let filtered =
        |text: String| text.lines().any(|l| l.strip_prefix("Seccomp:").is_some_and(|v| v.trim() != "0"));
    seccomp == Seccomp::Active
        && std::fs::read_to_string(format!("/proc/{tid}/status")).map_or(true, filtered)
}
