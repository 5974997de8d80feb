//! The fence around unsafe code: one small module per kernel interface, each with a safe face.
//!
//! What the wrappers promise to the rest of the crate: no call writes to our own memory beyond the buffers it is given;
//! what happens in *another* process's memory cannot make ours unsound. Layouts come from `linux-raw-sys` and are pinned by
//! constant assertions where they are used.

pub(crate) mod clock;
pub(crate) mod madvise;
pub(crate) mod pagemap;
pub(crate) mod procmap;
pub(crate) mod ptrace;
pub(crate) mod shared;
pub(crate) mod signals;
pub(crate) mod uffd;
pub(crate) mod window;
