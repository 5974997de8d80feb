//! Advice about another process's memory: process_madvise(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use linux_raw_sys::general::MADV_COLLAPSE;
use nix::libc;

use crate::page::Span;

/// Asks the kernel to put the span's pages into huge ones now. It goes on over what cannot be, and then tells an error.
pub(crate) fn collapse(pidfd: BorrowedFd<'_>, span: Span) -> io::Result<()> {
    let vector = libc::iovec { iov_base: span.addr as *mut libc::c_void, iov_len: span.len as usize };
    // SAFETY:
    // - The vector is a local that outlives the call, and its address is one of the other process: nothing of ours is touched.
    // - The content of the other process's memory stays what it is.
    let result = unsafe {
        libc::syscall(libc::SYS_process_madvise, pidfd.as_raw_fd(), &raw const vector, 1, MADV_COLLAPSE, 0)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
