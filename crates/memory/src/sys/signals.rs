//! Making the helper deaf: no signal that a dying parent, a terminal or a service manager sends may end an injection.

use nix::libc;

/// Signals left as they are: those that cannot be ignored, those that a fault of the helper itself raises (ignoring them
/// would loop), and SIGCHLD (ignoring it changes what waitpid(2) does).
const LEFT: [libc::c_int; 10] = [
    libc::SIGKILL,
    libc::SIGSTOP,
    libc::SIGCHLD,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGSYS,
];

/// The last signal number of Linux on x86-64.
const LAST: libc::c_int = 64;

/// Ignores every other signal.
pub(crate) fn ignore_all() {
    for signal in (1..=LAST).filter(|s| !LEFT.contains(s)) {
        // SAFETY:
        // - SIG_IGN is a valid disposition for any of these; no handler of ours is called. The C library refuses the two
        //   real-time signals that it keeps for itself, which nobody else sends.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
