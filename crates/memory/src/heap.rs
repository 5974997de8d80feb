//! The heap of a process, as far as it is to be there before it is needed.
//!
//! A QEMU that loads the state of a VM writes a megabyte of its heap for the first time: 340 faults, 0.5 ms while the VM stands still. So
//! they are taken before; but not before QEMU has given back what is free of its heap, which it does once after its start.

use std::io::Read as _;

use crate::attach::protocol::Op;
use crate::attach::{Attach, AttachError};
use crate::maps;
use crate::page::Span;
use crate::process::{Process, ProcessError};

/// More than a QEMU's heap has before its VM runs; what is beyond is left as it is.
const HEAP_BYTES_MAX: u64 = 32 << 20;

/// Why the heap could not be touched.
#[derive(Debug, thiserror::Error)]
pub enum HeapError {
    /// The list of the process's mappings could not be read.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The process could not be made to touch it.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// Lets a process have all pages of its heap (`madvise(MADV_POPULATE_WRITE)`, since Linux 5.14), as if it had written them; what they hold
/// stays. Nothing for a process without a heap, and on a kernel that does not know how.
pub fn touch_heap(process: &Process, attach: &Attach) -> Result<(), HeapError> {
    let Some(heap) = heap(process)? else { return Ok(()) };
    let ranges = vec![(heap.addr, heap.len.min(HEAP_BYTES_MAX))];
    Ok(attach.perform(process, Op::Populate { ranges }).map(drop)?)
}

/// Where the kernel says that it is (`[heap]`, proc_pid_maps(5)).
fn heap(process: &Process) -> Result<Option<Span>, ProcessError> {
    let mut text = Vec::new();
    let read = process.open_proc("maps").and_then(|mut maps| {
        let failed = |source| ProcessError::Proc { pid: process.pid(), what: "maps", source };
        maps.read_to_end(&mut text).map_err(failed)
    });
    read?;
    let line = text.split(|byte| *byte == b'\n').find(|line| line.ends_with(b"[heap]"));
    let range = line.and_then(maps::range_of);
    Ok(range.map(|(start, end)| Span { addr: start, len: end - start }))
}
