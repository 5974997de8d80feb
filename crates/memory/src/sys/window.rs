//! A window into a file: a mapping of our own that nothing reads or writes. The kernel is only asked what it finds behind it.

use std::ffi::c_void;
use std::fs::File;
use std::io;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::uffd::{LOOK_FEATURES, Uffd};
use crate::page::Span;

/// How often one page is asked for again when our address space changes under the call (EAGAIN) without any progress.
const RETRIES: u32 = 1000;

/// A part of a file of hugetlbfs, mapped shared, without access and without reserving anything.
pub(crate) struct Window {
    base: *mut c_void,
    len: usize,
    uffd: Uffd,
}

impl Window {
    /// Opens a window over `len` bytes from `offset` on, both in whole huge pages. The file must be open for writing.
    pub(crate) fn open(file: &File, offset: u64, len: u64) -> io::Result<Window> {
        let uffd = Uffd::with_features(Uffd::own()?, LOOK_FEATURES)?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY:
        // - The kernel chooses the address: no mapping of ours is replaced.
        // - Without access rights and never given out, the mapping is not memory to this process.
        let base = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::empty(), flags, file, offset) }?;
        let window = Window { base, len, uffd };
        window.uffd.register_minor(window.span(0))?;
        Ok(window)
    }

    fn span(&self, from: usize) -> Span {
        Span { addr: (self.base.addr() + from) as u64, len: (self.len - from) as u64 }
    }

    /// Calls `found(start, end)` with each stretch, relative to the window, of which the file has the pages: ascending, and in
    /// huge pages of `page` bytes. Holes stay holes.
    ///
    /// `UFFDIO_CONTINUE` maps a page that the file has and fails with EFAULT where it has none; it allocates no page
    /// (`hugetlb_mfill_atomic_pte`, mm/hugetlb.c).
    pub(crate) fn existing(&self, page: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let (mut at, mut idle) = (0, 0);
        while at < self.len {
            let progress = self.uffd.map_existing(self.span(at));
            let mut mapped = progress.bytes;
            let stopped = progress.stopped.filter(|_| mapped == 0).map(|e| (e.kind(), e));
            match stopped {
                None => {}
                // Somebody else cannot have mapped it here; it is there all the same.
                Some((io::ErrorKind::AlreadyExists, _)) => mapped = page,
                Some((io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted, _)) if idle < RETRIES => {
                    idle += 1;
                    continue;
                }
                Some((_, e)) if e.raw_os_error() == Some(rustix::io::Errno::FAULT.raw_os_error()) => {
                    at += page as usize;
                    continue;
                }
                Some((_, e)) => return Err(e),
            }
            idle = 0;
            found(at as u64, at as u64 + mapped);
            at += mapped as usize;
        }
        Ok(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY:
        // - Just the mapping that `open` made, to which no reference was ever made.
        let _ = unsafe { munmap(self.base, self.len) };
    }
}
