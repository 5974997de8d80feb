//! Guest memory from outside: attach to a running QEMU, track what it writes, copy its RAM in and out.
//!
//! Sterna moves the memory of an *unmodified* QEMU, so everything here works on a process that is not ours and does not
//! know of us:
//!
//! - [`Process`] names a process so that a reused pid is never taken for it.
//! - [`Attach`] makes one of its threads execute a system call (in a helper binary, `sterna-attach`).
//! - [`Tracker`] tells which pages were written; [`WpAsyncTracker`] does it with a userfaultfd that never blocks a fault.
//! - [`Peeker`] tells a sender which pages were written already again; [`Throttle`] slows threads that write too fast.
//! - [`populated`] tells which pages can differ from zero, so that holes are never read; [`Reader`] reads the others.
//! - [`Installer`] writes and discards pages at the target without doubling its memory.
//! - [`SealedMemory`] is what clones map copy-on-write; [`own`] tells what a clone has written.
//! - [`Pager`] delivers pages to a process that runs already, when it touches them; [`PageBits`] remembers which.
//! - [`digest`] and [`footprint`] prove things: equal RAM, and a process left as it was found.
//!
//! This is the only crate of the project that holds unsafe code, and it is fenced into `sys`: one small module per kernel
//! interface, each with a safe face.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "sterna-memory injects x86-64 Linux system calls; other machines need their own register code"
);

mod attach;
mod backing;
mod bits;
mod copy;
mod digest;
mod discard;
mod footprint;
mod heap;
mod helper;
mod huge;
mod huge_target;
mod install;
mod maps;
mod page;
mod pager;
mod populated;
mod preflight;
mod process;
mod sealed;
mod shared;
mod smaps;
mod sys;
mod throttle;
mod track;

pub use attach::{Attach, AttachError};
pub use backing::BackingError;
pub use bits::{BitsError, PageBits};
pub use copy::{CopyError, Reader};
pub use digest::{DigestError, digest};
pub use footprint::{Footprint, FootprintError, Mapping, footprint};
pub use heap::{HeapError, touch_heap};
pub use helper::helper_main;
pub use huge::emptied;
pub use install::{InstallError, Installer};
pub use page::{PAGE, PageRun, Region, Span, append_run, is_zero};
pub use pager::{Fault, Installed, Pager, PagerError, Resolved};
pub use populated::{
    Backing, PopulatedError, lone_block, mapped, own, own_within, populated, populated_all,
    populated_and_own, with_data,
};
pub use preflight::preflight;
pub use process::{Process, ProcessError, Resident, Usage};
pub use sealed::SealedMemory;
pub use shared::{
    CommonRun, SharedError, common, common_room, common_store, frames, map_common, may_merge, merged,
    touch_common,
};
pub use throttle::{Throttle, first_writes};
pub use track::{Peeker, TrackError, Tracker, WpAsyncTracker};
