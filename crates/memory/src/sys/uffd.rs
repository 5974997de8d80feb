//! The ioctls of a userfaultfd that belongs to another process's memory, or to a window of our own.
//!
//! Source: ioctl_userfaultfd(2), the kernel's Documentation/admin-guide/mm/userfaultfd.rst and `fs/userfaultfd.c`. Every
//! address is one of the *other* process; only the source of a copy is ours, and the windows that [`super::window`] makes.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFD_FEATURE_EVENT_REMOVE,
    UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM,
    UFFD_FEATURE_THREAD_ID, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFD_FEATURE_WP_UNPOPULATED, UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, uffd_msg, uffdio_api, uffdio_continue,
    uffdio_copy, uffdio_range, uffdio_register, uffdio_writeprotect, uffdio_zeropage,
};
use linux_raw_sys::ioctl;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};
use rustix::mm::UserfaultfdFlags;

use crate::page::Span;

const _: () = assert!(size_of::<uffdio_api>() == 24 && size_of::<uffdio_range>() == 16);
const _: () = assert!(size_of::<uffdio_register>() == 32 && size_of::<uffdio_zeropage>() == 32);
const _: () = assert!(size_of::<uffdio_copy>() == 40 && size_of::<uffdio_continue>() == 32);
const _: () = assert!(size_of::<uffdio_writeprotect>() == 24);
const _: () = assert!(size_of::<uffd_msg>() == MESSAGE && std::mem::offset_of!(uffd_msg, arg) == 8);

/// `USERFAULTFD_IOC_NEW`, `_IO(0xAA, 0)`: on `/dev/userfaultfd`, makes a userfaultfd for the calling process.
pub(crate) const IOC_NEW: u64 = 0xAA00;

/// The features that tracking asks for; together they also mark a leftover as ours.
pub(crate) const TRACK_FEATURES: u64 =
    (UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM) as u64;

/// The features that installing asks for. Without WP_UNPOPULATED and without any protecting, registering changes nothing for
/// the process; with WP_ASYNC even a stray protection resolves in the kernel, so nothing ever waits for us.
pub(crate) const INSTALL_FEATURES: u64 = (UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_HUGETLBFS_SHMEM) as u64;

/// The features that a look into a file of huge pages asks for.
pub(crate) const LOOK_FEATURES: u64 = UFFD_FEATURE_MINOR_HUGETLBFS as u64;

/// The features that demand paging asks for. Minor faults are for private mappings alone, where the file has a page below.
pub(crate) const PAGER_FEATURES: u64 = (UFFD_FEATURE_EVENT_REMOVE
    | UFFD_FEATURE_MISSING_SHMEM
    | UFFD_FEATURE_MINOR_SHMEM
    | UFFD_FEATURE_THREAD_ID) as u64;

/// The bit that the kernel adds to a context's features once they are negotiated (`UFFD_FEATURE_INITIALIZED`,
/// fs/userfaultfd.c); it shows in fdinfo.
const FEATURE_INITIALIZED: u64 = 1 << 31;

/// Bytes of a message (`struct uffd_msg`).
const MESSAGE: usize = 32;

/// Messages read at once: more than a virtual machine usually has processors, and 2 KiB of stack.
const MESSAGES: usize = 64;

/// What a userfaultfd tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread waits for the page at an address.
    Fault { addr: u64, thread: u32 },
    /// The process is about to discard a range, and was waiting until this was read.
    Remove(Span),
}

/// A userfaultfd: of another process, or of a window of our own into a file ([`super::window`]).
#[derive(Debug)]
pub(crate) struct Uffd(OwnedFd);

/// How far a copy, a zeroing or a mapping got, and why it stopped there.
pub(crate) struct Progress {
    pub(crate) bytes: u64,
    pub(crate) stopped: Option<io::Error>,
}

impl Uffd {
    /// A userfaultfd of our own process, to try what the kernel can do.
    pub(crate) fn own() -> io::Result<OwnedFd> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        // SAFETY:
        // - The descriptor is asked for features; the only memory of ours that is ever registered with one is that of a
        //   `Window`, which nothing in this process reads or writes, so that no thread of ours can wait for its faults.
        Ok(unsafe { rustix::mm::userfaultfd(flags) }?)
    }

    /// Takes a descriptor whose features were negotiated before.
    pub(crate) fn negotiated(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }

    /// Takes the descriptor and negotiates features. EINVAL: the kernel does not have them.
    pub(crate) fn with_features(fd: OwnedFd, features: u64) -> io::Result<Uffd> {
        let uffd = Uffd(fd);
        let mut api = uffdio_api { api: UFFD_API.into(), features, ioctls: 0 };
        uffd.call(ioctl::UFFDIO_API, &mut api)?;
        Ok(uffd)
    }

    /// Registers the span for write-protect events, which WP_ASYNC resolves in the kernel.
    pub(crate) fn register_wp(&self, span: Span) -> io::Result<()> {
        self.register(span, UFFDIO_REGISTER_MODE_WP)
    }

    /// Registers the span, shared memory of a file, for events where the file has a page that is not mapped.
    pub(crate) fn register_minor(&self, span: Span) -> io::Result<()> {
        self.register(span, UFFDIO_REGISTER_MODE_MINOR)
    }

    /// Registers the span for events where nothing is: a thread that comes there waits.
    pub(crate) fn register_missing(&self, span: Span) -> io::Result<()> {
        self.register(span, UFFDIO_REGISTER_MODE_MISSING)
    }

    /// The same for a private mapping of a file, whether or not the file has a page below.
    pub(crate) fn register_missing_above_file(&self, span: Span) -> io::Result<()> {
        self.register(span, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR)
    }

    fn register(&self, span: Span, mode: u32) -> io::Result<()> {
        let mut arg = uffdio_register { range: range(span), mode: mode.into(), ioctls: 0 };
        self.call(ioctl::UFFDIO_REGISTER, &mut arg)
    }

    /// Takes the protection from the pages of the span, and from places without a page their markers.
    pub(crate) fn unprotect(&self, span: Span) -> io::Result<()> {
        self.call(ioctl::UFFDIO_WRITEPROTECT, &mut uffdio_writeprotect { range: range(span), mode: 0 })
    }

    /// Undoes the registration of the span; its pages are writable again at once.
    pub(crate) fn unregister(&self, span: Span) -> io::Result<()> {
        self.call(ioctl::UFFDIO_UNREGISTER, &mut range(span))
    }

    /// Copies bytes (whole pages) to `addr`, where no page may be yet: EEXIST stops it there.
    pub(crate) fn copy(&self, addr: u64, bytes: &[u8]) -> Progress {
        let len = bytes.len() as u64;
        let mut arg = uffdio_copy { dst: addr, src: bytes.as_ptr() as u64, len, mode: 0, copy: 0 };
        let result = self.call(ioctl::UFFDIO_COPY, &mut arg);
        progress(result, arg.copy, len)
    }

    /// Lets all threads go on that wait in the span; who still finds nothing there waits anew.
    pub(crate) fn wake(&self, span: Span) -> io::Result<()> {
        self.call(ioctl::UFFDIO_WAKE, &mut range(span))
    }

    /// Appends what has happened, as much as one read gives; nothing if nothing has. The descriptor must not block.
    pub(crate) fn read(&self, events: &mut Vec<Event>) -> io::Result<()> {
        let mut bytes = [0u8; MESSAGE * MESSAGES];
        let got = match rustix::io::read(&self.0, &mut bytes) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            result => result?,
        };
        events.extend(bytes[..got].as_chunks::<MESSAGE>().0.iter().filter_map(event));
        Ok(())
    }

    /// Makes the pages of the span zero without storage, where no page may be yet: EEXIST stops it there.
    pub(crate) fn zero(&self, span: Span) -> Progress {
        let mut arg = uffdio_zeropage { range: range(span), mode: 0, zeropage: 0 };
        let result = self.call(ioctl::UFFDIO_ZEROPAGE, &mut arg);
        progress(result, arg.zeropage, span.len)
    }

    /// Maps the pages that the file behind the span has: EFAULT stops it where the file has none, EEXIST where one is mapped.
    pub(crate) fn map_existing(&self, span: Span) -> Progress {
        let mut arg = uffdio_continue { range: range(span), mode: 0, mapped: 0 };
        let result = self.call(ioctl::UFFDIO_CONTINUE, &mut arg);
        progress(result, arg.mapped, span.len)
    }

    fn call<T: Argument>(&self, opcode: u32, arg: &mut T) -> io::Result<()> {
        // SAFETY:
        // - `Call` passes a structure that is valid for the whole call; `Argument` is implemented only for the kernel's
        //   own structures, and each method above pairs its opcode with the structure that ioctl_userfaultfd(2) names.
        // - The one pointer inside (the source of a copy) is to a slice that its method borrows, and is only read.
        Ok(unsafe { rustix::ioctl::ioctl(&self.0, Call { opcode, arg }) }?)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The features that were negotiated for a userfaultfd of a process, as its fdinfo tells; nothing if it is none, or they were not.
pub(crate) fn features_of(pid: i32, fd: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    let api = text.lines().find_map(|line| line.strip_prefix("API:"))?;
    let features = u64::from_str_radix(api.trim().split(':').nth(1)?, 16).ok()?;
    (features & FEATURE_INITIALIZED != 0).then_some(features & !FEATURE_INITIALIZED)
}

/// A `struct uffd_msg`: the kind in the first byte, its arguments from the eighth on. Kinds that were not asked for do not come.
fn event(message: &[u8; MESSAGE]) -> Option<Event> {
    let (words, _) = message.as_chunks::<8>();
    let [first, second, third] = [1, 2, 3].map(|i| u64::from_ne_bytes(words[i]));
    match message[0].into() {
        // Flags, address, thread.
        UFFD_EVENT_PAGEFAULT => Some(Event::Fault { addr: second, thread: third as u32 }),
        UFFD_EVENT_REMOVE => Some(Event::Remove(Span { addr: first, len: second.saturating_sub(first) })),
        _ => None,
    }
}

fn range(span: Span) -> uffdio_range {
    uffdio_range { start: span.addr, len: span.len }
}

/// A failed call tells in `done` how many bytes it did (EAGAIN), or the negated error.
fn progress(result: io::Result<()>, done: i64, asked: u64) -> Progress {
    match result {
        Ok(()) => Progress { bytes: asked, stopped: None },
        Err(e) if done > 0 => Progress { bytes: (done as u64).min(asked), stopped: Some(e) },
        Err(e) => Progress { bytes: 0, stopped: Some(e) },
    }
}

/// The kernel's structures that may be passed to a userfaultfd.
trait Argument {}
impl Argument for uffdio_api {}
impl Argument for uffdio_range {}
impl Argument for uffdio_register {}
impl Argument for uffdio_copy {}
impl Argument for uffdio_zeropage {}
impl Argument for uffdio_continue {}
impl Argument for uffdio_writeprotect {}

struct Call<'a, T> {
    opcode: u32,
    arg: &'a mut T,
}

// SAFETY:
// - The opcode comes from linux-raw-sys; the size encoded in it is that of the structure (asserted above for each).
// - The pointer is to a structure borrowed mutably for the whole call.
// - The result of a userfaultfd's ioctl carries nothing besides success: the structure itself is the answer.
unsafe impl<T: Argument> Ioctl for Call<'_, T> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut *self.arg).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}
