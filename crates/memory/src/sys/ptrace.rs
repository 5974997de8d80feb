//! The few requests of ptrace(2) that the helper uses, for a thread that it has seized.
//!
//! Raw rather than through a crate: real-time signals must come through (nix turns a stop by one into an error), and the
//! signal mask and the rseq area have no wrapper anywhere.

use std::io;
use std::mem::MaybeUninit;

use nix::libc::{self, c_int, c_long, c_uint, c_void, pid_t};

pub(crate) use libc::user_regs_struct as Registers;

const _: () = assert!(size_of::<Registers>() == 27 * 8);
const _: () = assert!(size_of::<RseqArea>() == 24);

/// `PTRACE_GETSIGMASK` and `PTRACE_SETSIGMASK` of linux/ptrace.h.
const GETSIGMASK: c_uint = 0x420a;
const SETSIGMASK: c_uint = 0x420b;
/// `PTRACE_GET_RSEQ_CONFIGURATION` of linux/ptrace.h (since Linux 5.13).
const GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
/// `PTRACE_O_SUSPEND_SECCOMP` of linux/ptrace.h.
const SUSPEND_SECCOMP: usize = 1 << 21;
/// The event of a stop that PTRACE_INTERRUPT or a group stop caused.
const EVENT_STOP: c_int = 128;
/// Added by PTRACE_O_TRACESYSGOOD to the signal of a system call's stop.
const SYSCALL_GOOD: c_int = 0x80;

/// `struct ptrace_rseq_configuration` of linux/ptrace.h.
#[repr(C)]
#[derive(Default)]
struct RseqArea {
    address: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

/// How a traced thread was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Inside signal delivery, by an interrupt or a group stop: the place where registers may be changed safely.
    Event,
    /// At the entry or the exit of a system call.
    Syscall,
    /// About to be given this signal.
    Signal(c_int),
    /// Gone.
    Ended,
}

/// Becomes the tracer of a thread without stopping it.
pub(crate) fn seize(tid: pid_t) -> io::Result<()> {
    number(libc::PTRACE_SEIZE, tid, 0)
}

/// Asks a running thread to stop, or a stopped one to stop again on its way to user mode.
pub(crate) fn interrupt(tid: pid_t) -> io::Result<()> {
    number(libc::PTRACE_INTERRUPT, tid, 0)
}

/// Lets a stopped thread go on, giving it a signal unless it is 0.
pub(crate) fn resume(tid: pid_t, signal: c_int) -> io::Result<()> {
    number(libc::PTRACE_CONT, tid, signal as usize)
}

/// Lets a stopped thread go on to the next entry or exit of a system call.
pub(crate) fn resume_to_syscall(tid: pid_t, signal: c_int) -> io::Result<()> {
    number(libc::PTRACE_SYSCALL, tid, signal as usize)
}

/// Ends tracing of a stopped thread, giving it a signal unless it is 0.
pub(crate) fn detach(tid: pid_t, signal: c_int) -> io::Result<()> {
    number(libc::PTRACE_DETACH, tid, signal as usize)
}

/// Whether a traced thread's seccomp filters act on it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seccomp {
    Active,
    Suspended,
}

/// Makes the stops of system calls tell themselves apart, and suspends the thread's seccomp filters as long as we trace it
/// (so that no filter can answer our call by killing the process) where we may: that needs CAP_SYS_ADMIN.
pub(crate) fn set_options(tid: pid_t) -> io::Result<Seccomp> {
    let good = libc::PTRACE_O_TRACESYSGOOD as usize;
    match number(libc::PTRACE_SETOPTIONS, tid, good | SUSPEND_SECCOMP) {
        Ok(()) => Ok(Seccomp::Suspended),
        Err(_) => number(libc::PTRACE_SETOPTIONS, tid, good).map(|()| Seccomp::Active),
    }
}

/// The registers of a stopped thread.
pub(crate) fn registers(tid: pid_t) -> io::Result<Registers> {
    let mut regs = MaybeUninit::<Registers>::uninit();
    // SAFETY:
    // - PTRACE_GETREGS writes one `user_regs_struct` to the pointer, which is valid for it.
    check(unsafe { libc::ptrace(libc::PTRACE_GETREGS, tid, 0usize, regs.as_mut_ptr()) })?;
    // SAFETY:
    // - The call succeeded, so the kernel has written the whole structure.
    Ok(unsafe { regs.assume_init() })
}

/// Sets the registers of a stopped thread.
pub(crate) fn set_registers(tid: pid_t, regs: &Registers) -> io::Result<()> {
    // SAFETY:
    // - PTRACE_SETREGS reads one `user_regs_struct` from the pointer, which is valid for it.
    check(unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, 0usize, std::ptr::from_ref(regs)) })
}

/// The signal mask of a stopped thread.
pub(crate) fn signal_mask(tid: pid_t) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY:
    // - PTRACE_GETSIGMASK writes as many bytes as its address argument says, the size of `mask`.
    check(unsafe { libc::ptrace(GETSIGMASK, tid, size_of::<u64>(), &raw mut mask) })?;
    Ok(mask)
}

/// Sets the signal mask of a stopped thread.
pub(crate) fn set_signal_mask(tid: pid_t, mask: u64) -> io::Result<()> {
    // SAFETY:
    // - PTRACE_SETSIGMASK reads as many bytes as its address argument says, the size of `mask`.
    check(unsafe { libc::ptrace(SETSIGMASK, tid, size_of::<u64>(), &raw const mask) })
}

/// The address of a stopped thread's rseq area, or 0 when it has none.
pub(crate) fn rseq_area(tid: pid_t) -> io::Result<u64> {
    let mut area = RseqArea::default();
    // SAFETY:
    // - The request writes at most as many bytes as its address argument says, the size of `area`.
    check(unsafe { libc::ptrace(GET_RSEQ_CONFIGURATION, tid, size_of::<RseqArea>(), &raw mut area) })?;
    Ok(area.address)
}

/// What a traced thread has done, if it has stopped or ended since the last look.
pub(crate) fn look(tid: pid_t) -> io::Result<Option<Stop>> {
    wait_with(tid, libc::WNOHANG)
}

/// Waits for what a traced thread does next.
pub(crate) fn wait(tid: pid_t) -> io::Result<Stop> {
    wait_with(tid, 0)?.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn wait_with(tid: pid_t, flags: c_int) -> io::Result<Option<Stop>> {
    let mut status: c_int = 0;
    loop {
        // SAFETY:
        // - `status` outlives the call, which writes one int to it.
        match unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | flags) } {
            0 => return Ok(None),
            -1 => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            _ => return Ok(Some(decode(status))),
        }
    }
}

fn decode(status: c_int) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Ended;
    }
    let signal = libc::WSTOPSIG(status);
    if status >> 16 == EVENT_STOP {
        Stop::Event
    } else if signal == libc::SIGTRAP | SYSCALL_GOOD {
        Stop::Syscall
    } else {
        Stop::Signal(signal)
    }
}

/// A request whose data is a plain number.
fn number(request: c_uint, tid: pid_t, data: usize) -> io::Result<()> {
    // SAFETY:
    // - Used only with requests that take no pointer (seize, interrupt, cont, syscall, detach, setoptions); the kernel
    //   writes nothing to our memory.
    check(unsafe { libc::ptrace(request, tid, 0usize, data as *mut c_void) })
}

fn check(result: c_long) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
