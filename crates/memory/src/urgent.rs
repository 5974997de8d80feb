//! Threads that a VM which stands still waits for.

use crate::process::Process;
use crate::sys::sched;

/// Whether the calling thread comes before all ordinary ones of the host, as it should for the milliseconds in which a VM stands still and little is
/// left to be done. Where the host does not allow it, everything is as it was.
pub fn set_urgent(urgent: bool) {
    // Privilege may be missing, or time for it in the thread's control group: it is the same work then, only later.
    let _ = sched::real_time(sched::SELF, urgent);
}

/// The same for the main thread of another process, which does not go back by itself when we die.
pub fn set_main_urgent(process: &Process, urgent: bool) {
    if process.is_alive() {
        let _ = sched::real_time(process.pid(), urgent);
    }
}
