//! The scheduling class of a thread.

use std::io;

use nix::libc;

/// The lowest priority that comes before all ordinary threads.
const LOWEST: libc::c_int = 1;

/// The calling thread.
pub(crate) const SELF: i32 = 0;

/// Whether a thread comes before all ordinary ones (`SCHED_RR`, sched(7)), which the kernel then also moves to a processor that is idle
/// at once. Threads that it starts are ordinary.
pub(crate) fn real_time(thread: i32, on: bool) -> io::Result<()> {
    let (policy, priority) = if on { (libc::SCHED_RR, LOWEST) } else { (libc::SCHED_OTHER, 0) };
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY:
    // - `param` outlives the call, which only reads it.
    match unsafe { libc::sched_setscheduler(thread, policy | libc::SCHED_RESET_ON_FORK, &raw const param) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
