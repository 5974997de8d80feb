//! The CPU-time clock of another process.

use std::io;
use std::time::Duration;

use nix::libc;

/// CPU time used by all threads of the process (`clock_getcpuclockid(3)`).
pub(crate) fn process_cpu_time(pid: i32) -> io::Result<Duration> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY:
    // - `clock` outlives the call, which writes one clock id to it.
    match unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) } {
        0 => {}
        errno => return Err(io::Error::from_raw_os_error(errno)),
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY:
    // - `time` outlives the call, which writes one timespec to it.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.clamp(0, 999_999_999) as u32))
}
