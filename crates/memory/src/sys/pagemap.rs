//! PAGEMAP_SCAN: which pages of a process are in a state, as runs, optionally protected again in the same step.
//!
//! Source: the kernel's Documentation/admin-guide/mm/pagemap.rst, `fs/proc/task_mmu.c` and `include/uapi/linux/fs.h`
//! (since Linux 6.7).

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_raw_sys::general::{
    PAGE_IS_FILE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING, page_region, pm_scan_arg,
};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

use crate::page::PAGE;

const _: () = assert!(size_of::<pm_scan_arg>() == 96 && size_of::<page_region>() == 24);

/// Runs fetched per call: 393 kB of buffer. A scan with more runs goes on where it stopped. Never zero: a call that
/// re-protects with an empty vector crashed kernels until a fix of 2025.
const RUNS_PER_CALL: usize = 1 << 14;

/// Page was written since it was last protected.
pub(crate) const WRITTEN: u64 = PAGE_IS_WRITTEN as u64;
/// Page is mapped.
pub(crate) const PRESENT: u64 = PAGE_IS_PRESENT as u64;
/// Page is swapped out, or its entry holds a marker (protected while unpopulated).
pub(crate) const SWAPPED: u64 = PAGE_IS_SWAPPED as u64;
/// Page belongs to the file that is mapped, and is no private copy.
pub(crate) const FILE: u64 = PAGE_IS_FILE as u64;
/// Page is the shared zero page.
pub(crate) const ZERO: u64 = PAGE_IS_PFNZERO as u64;

/// What a scan looks for: pages with all of `all`, none of `none`, and (unless it is 0) any of `any`.
#[derive(Clone, Copy, Default)]
pub(crate) struct Query {
    pub(crate) all: u64,
    pub(crate) none: u64,
    pub(crate) any: u64,
    /// Categories told with each run; runs are split where they differ.
    pub(crate) tell: u64,
    pub(crate) action: Action,
}

/// What a scan does with the pages that it finds.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing.
    #[default]
    Look,
    /// Nothing, but fails with EPERM where the memory is not tracked write-protect-async.
    LookTracked,
    /// Protects them again, atomically with the look.
    Rearm,
}

impl Action {
    fn flags(self) -> u64 {
        match self {
            Action::Look => 0,
            Action::LookTracked => PM_SCAN_CHECK_WPASYNC.into(),
            Action::Rearm => (PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING).into(),
        }
    }
}

/// A scanner over one process's page tables.
pub(crate) struct PageMap {
    file: File,
    runs: Vec<page_region>,
}

impl PageMap {
    /// Over an open `/proc/PID/pagemap`.
    pub(crate) fn new(file: File) -> PageMap {
        let empty = page_region { start: 0, end: 0, categories: 0 };
        PageMap { file, runs: vec![empty; RUNS_PER_CALL] }
    }

    /// Calls `found(start, end, categories)` for each run in `start..end` that the query matches, in ascending order.
    pub(crate) fn scan(
        &mut self,
        query: Query,
        start: u64,
        end: u64,
        mut found: impl FnMut(u64, u64, u64),
    ) -> io::Result<()> {
        let mut at = start;
        while at < end {
            let (count, walked) = self.step(query, at, end)?;
            let runs = &self.runs[..count];
            for run in runs {
                found(run.start, run.end, run.categories);
            }
            // A call with more runs than the kernel buffers at once (512) goes on inside, but tells where it went on the *last*
            // time as where it ended (`do_pagemap_scan`: `walk_end` is only set when it is still zero). Whatever it reported it
            // has walked: going on from there would report the rest twice.
            let walked = runs.last().map_or(walked, |run| walked.max(run.end));
            if walked <= at {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            at = walked;
        }
        Ok(())
    }

    fn step(&mut self, query: Query, start: u64, end: u64) -> io::Result<(usize, u64)> {
        let arg = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: query.action.flags(),
            start,
            end,
            walk_end: 0,
            vec: 0,
            vec_len: 0,
            max_pages: 0,
            category_inverted: query.none,
            category_mask: query.all | query.none,
            category_anyof_mask: query.any,
            return_mask: query.tell,
        };
        let scan = Scan { arg, runs: &mut self.runs };
        // SAFETY:
        // - `Scan` describes PAGEMAP_SCAN exactly, and its vector is borrowed for the whole call.
        let (count, walked) = unsafe { rustix::ioctl::ioctl(&self.file, scan) }?;
        Ok((count.min(RUNS_PER_CALL), walked))
    }

    /// The entries of `/proc/PID/pagemap` for the pages from `start` on (8 bytes each, see pagemap.rst).
    pub(crate) fn entries(&self, start: u64, out: &mut [u64]) -> io::Result<()> {
        let mut bytes = vec![0u8; out.len() * 8];
        self.file.read_exact_at(&mut bytes, start / PAGE * 8)?;
        for (entry, raw) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *entry = u64::from_ne_bytes(*raw);
        }
        Ok(())
    }
}

struct Scan<'a> {
    arg: pm_scan_arg,
    runs: &'a mut [page_region],
}

// SAFETY:
// - The opcode is PAGEMAP_SCAN of linux/fs.h, whose argument is one `pm_scan_arg` (size asserted above).
// - The pointer given is to that structure, which lives in `self` during the call; its vector pointer and length are those of
//   a slice borrowed mutably for as long, so the kernel writes only there.
// - On success the kernel returns how many entries of the vector it has written.
unsafe impl Ioctl for Scan<'_> {
    type Output = (usize, u64);
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<pm_scan_arg>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.arg.vec = self.runs.as_mut_ptr() as u64;
        self.arg.vec_len = self.runs.len() as u64;
        (&raw mut self.arg).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, arg: *mut c_void) -> rustix::io::Result<Self::Output> {
        // SAFETY:
        // - The caller passes the pointer that `as_ptr` gave, to a valid `pm_scan_arg`.
        let walked = unsafe { (*arg.cast::<pm_scan_arg>()).walk_end };
        Ok((out.max(0) as usize, walked))
    }
}
