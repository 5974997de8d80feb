//! A file mapped shared as atomic words: what is stored is in the file at once, whatever becomes of this process.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The whole of a file as words.
#[derive(Debug)]
pub(crate) struct SharedWords {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY:
// - The mapping belongs to this value alone and lives as long; it is reached only as atomics, by shared reference.
unsafe impl Send for SharedWords {}
// SAFETY:
// - As above: atomics may be used by several threads at once.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first `words` words of the file, which must be open for reading and writing, at least that long and allocated.
    pub(crate) fn map(file: &File, words: usize) -> io::Result<SharedWords> {
        let len = words.checked_mul(size_of::<AtomicU64>()).ok_or(io::ErrorKind::InvalidInput)?;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY:
        // - The kernel chooses the address: no mapping of ours is replaced.
        let base = unsafe { mmap(std::ptr::null_mut(), len, rights, MapFlags::SHARED, file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(SharedWords { base, words })
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY:
        // - `map` made the mapping, which is page aligned and this long, and it is unmapped only when `self` is dropped.
        // - Any bit pattern is a valid word. Other holders of the file may change it at any time, which atomics allow.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY:
        // - Just the mapping that `map` made; every reference into it borrowed `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}
