//! Making the helper deaf: no signal that a dying parent, a terminal or a service manager sends may end an injection.

use nix::libc;

/// Ignored from the first instruction of the helper. SIGKILL cannot be; nothing but that ends the helper early.
const IGNORED: [libc::c_int; 9] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGXCPU,
];

/// Ignores every signal that would end this process and is not a fault of its own.
pub(crate) fn ignore_all() {
    for signal in IGNORED {
        // SAFETY:
        // - SIG_IGN is a valid disposition for each of these signals; no handler of ours is called.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
