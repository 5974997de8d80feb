//! PROCMAP_QUERY: the mapping at an address of a process, without the text of all that lie before it.
//!
//! Source: `fs/proc/task_mmu.c` and `include/uapi/linux/fs.h` (since Linux 6.11).

use std::ffi::c_void;
use std::fs::File;
use std::io;

use linux_raw_sys::general::{procmap_query, procmap_query_flags as flags};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

const _: () = assert!(size_of::<procmap_query>() == 104);

/// Bytes that the kernel lets a name have, with the zero behind it (`PATH_MAX`).
const NAME_BYTES: usize = 4096;

/// A mapping, as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) executable: bool,
    pub(crate) shared: bool,
    pub(crate) offset: u64,
    /// Major and minor number.
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
}

/// The mapping at an address, or the next one above it; none where there is none.
///
/// # Errors
/// What the kernel says: ENOTTY where it is too old.
pub(crate) fn at_or_above(maps: &File, address: u64) -> io::Result<Option<Found>> {
    let found = ask(maps, address, flags::PROCMAP_QUERY_COVERING_OR_NEXT_VMA as u64, &mut []);
    match found {
        Err(why) if why.raw_os_error() == Some(nix::libc::ENOENT) => Ok(None),
        found => found.map(Some),
    }
}

/// The mapping at an address, and its name as the list of mappings shows it.
///
/// # Errors
/// What the kernel says.
pub(crate) fn name(maps: &File, address: u64) -> io::Result<(Found, Vec<u8>)> {
    let mut name = vec![0; NAME_BYTES];
    let found = ask(maps, address, 0, &mut name)?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    name.truncate(end);
    Ok((found, name))
}

fn ask(maps: &File, address: u64, flags: u64, name: &mut [u8]) -> io::Result<Found> {
    let arg = procmap_query {
        size: size_of::<procmap_query>() as u64,
        query_flags: flags,
        query_addr: address,
        vma_start: 0,
        vma_end: 0,
        vma_flags: 0,
        vma_page_size: 0,
        vma_offset: 0,
        inode: 0,
        dev_major: 0,
        dev_minor: 0,
        vma_name_size: 0,
        build_id_size: 0,
        vma_name_addr: 0,
        build_id_addr: 0,
    };
    // SAFETY:
    // - `Ask` describes PROCMAP_QUERY exactly, and its name is borrowed for the whole call.
    let arg = unsafe { rustix::ioctl::ioctl(maps, Ask { arg, name }) }?;
    let is = |flag: u32| arg.vma_flags & u64::from(flag) != 0;
    Ok(Found {
        start: arg.vma_start,
        end: arg.vma_end,
        readable: is(flags::PROCMAP_QUERY_VMA_READABLE as u32),
        writable: is(flags::PROCMAP_QUERY_VMA_WRITABLE as u32),
        executable: is(flags::PROCMAP_QUERY_VMA_EXECUTABLE as u32),
        shared: is(flags::PROCMAP_QUERY_VMA_SHARED as u32),
        offset: arg.vma_offset,
        device: (arg.dev_major, arg.dev_minor),
        inode: arg.inode,
    })
}

struct Ask<'a> {
    arg: procmap_query,
    name: &'a mut [u8],
}

// SAFETY:
// - The opcode is PROCMAP_QUERY of linux/fs.h, whose argument is one `procmap_query` (size asserted above).
// - The pointer given is to that structure, which lives in `self` during the call. The pointer and the size of the name are those of a slice
//   borrowed mutably for as long; where it is empty both are zero, as the kernel wants it for no name. No build ID is asked for.
unsafe impl Ioctl for Ask<'_> {
    type Output = procmap_query;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<procmap_query>(b'f', 17)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        if !self.name.is_empty() {
            self.arg.vma_name_addr = self.name.as_mut_ptr() as u64;
            self.arg.vma_name_size = self.name.len() as u32;
        }
        (&raw mut self.arg).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, arg: *mut c_void) -> rustix::io::Result<Self::Output> {
        // SAFETY:
        // - The caller passes the pointer that `as_ptr` gave, to a valid `procmap_query`.
        Ok(unsafe { *arg.cast::<procmap_query>() })
    }
}
