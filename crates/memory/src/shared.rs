//! Pages that several VMs, or one VM in several places, have in common: found at a source by their frames, mapped copy-on-write at a target.
//!
//! Where KSM, fork(2) or a file that is mapped privately has left two pages on one frame, the page tables say so, and nothing has to be
//! hashed for it (after Eswaran et al., "Sharing-aware live migration", CCGRID 2024, which changes QEMU and the kernel for it). At the target
//! the content lies once, in a sealed memfd, and each of these pages is a private mapping of its place there: the first write makes a
//! page of the process's own, as it does with KSM.
//!
//! A frame number is a hint: a frame is freed and used again between two looks. So compare bytes.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;

use crate::attach::protocol::{MAX_RANGES, Op};
use crate::attach::{Attach, AttachError};
use crate::backing::{BackingError, Kind, Mappings, Segment};
use crate::copy;
use crate::page::{PAGE, PageRun, Region, Span, append_run, near};
use crate::populated::PopulatedError;
use crate::process::{Process, ProcessError};
use crate::sealed::SealedMemory;
use crate::smaps;
use crate::sys::pagemap::PageMap;

/// The name of a memfd that holds such pages, by which its mappings are known again.
pub(crate) const NAME: &str = "sterna-common";

/// `PM_PRESENT`, `PM_FILE`, `PM_MMAP_EXCLUSIVE` and the frame number's bits of an entry of pagemap.rst.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_EXCLUSIVE: u64 = 1 << 56;
const ENTRY_FRAME: u64 = (1 << 55) - 1;

/// `KPF_KSM` and `KPF_ZERO_PAGE` of pagemap.rst (`/proc/kpageflags`).
const FRAME_KSM: u64 = 1 << 21;
const FRAME_ZERO: u64 = 1 << 24;

/// Pagemap entries looked at in one read: 512 kB.
const ENTRIES_PER_READ: u64 = 1 << 16;

/// Mappings that a process is left for its own needs: a thread takes two, a library five.
const ROOM_KEPT: u64 = 4096;

/// Flags of a mapping (two letters of `VmFlags`, proc(5)) that an madvise(2) has set, and with which advice: a new mapping is to have them too.
const ADVICE: [(&str, i32); 5] = [("dc", 10), ("mg", 12), ("hg", 14), ("nh", 15), ("dd", 16)];

/// Why pages could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The process could not be asked.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// No system call could be run in the process.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The mappings behind a region could not be read.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The page tables could not be read.
    #[error(transparent)]
    Populated(#[from] PopulatedError),
    /// A page could not be looked at.
    #[error(transparent)]
    Copy(#[from] crate::CopyError),
}

/// Pages that are a part of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommonRun {
    /// The pages.
    pub run: PageRun,
    /// Page of the store that the first of them is.
    pub at: u64,
}

/// A store of so many pages, empty.
///
/// # Errors
/// What the kernel says.
pub fn common_store(pages: u64) -> io::Result<SealedMemory> {
    SealedMemory::new(NAME, pages.saturating_mul(PAGE))
}

/// Which pages of each region map a store. They have content whether they are present or not.
///
/// # Errors
/// The mappings cannot be read.
pub fn common(process: &Process, regions: &[Region]) -> Result<Vec<Vec<PageRun>>, BackingError> {
    let mappings = Mappings::of(process, regions)?;
    regions.iter().map(|region| Ok(common_of(region, &mappings.segments(region)?))).collect()
}

/// Which pages of a region of these segments map a store.
pub(crate) fn common_of(region: &Region, segments: &[Segment]) -> Vec<PageRun> {
    let mut runs = Vec::new();
    for segment in segments.iter().filter(|segment| segment.kind == Kind::Common) {
        append_run(&mut runs, region.run(segment.start, segment.end));
    }
    runs
}

/// How many runs can be mapped in a process, which each take two mappings where nothing joins them: what `vm.max_map_count` leaves. None
/// where its memory is locked.
///
/// # Errors
/// The mappings cannot be read.
pub fn common_room(process: &Process) -> Result<u64, BackingError> {
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
    let most: u64 = most.and_then(|most| most.trim().parse().ok()).unwrap_or(0);
    // Where all memory is locked a new mapping is filled at once, with copies.
    let status = process.read_proc("status")?;
    let locks =
        status.lines().any(|line| line.strip_prefix("VmLck:").is_some_and(|rest| rest.trim() != "0 kB"));
    if locks {
        return Ok(0);
    }
    let taken = Mappings::all(process)?.count() as u64;
    Ok((most.saturating_sub(taken + ROOM_KEPT) / 2).min(MAX_RANGES as u64))
}

/// Calls `found(page, frame)` with those of these pages that somebody else may map too, or the process in another place.
///
/// # Errors
/// The page tables cannot be read. Without CAP_SYS_ADMIN all frames read as 0: no page is found then.
pub fn frames(
    process: &Process,
    region: &Region,
    runs: &[PageRun],
    mut found: impl FnMut(u64, u64),
) -> Result<(), PopulatedError> {
    each_entry(process, region, runs, |page, entry| {
        let frame = entry & ENTRY_FRAME;
        if entry & ENTRY_PRESENT != 0 && entry & ENTRY_EXCLUSIVE == 0 && frame != 0 {
            found(page, frame);
        }
    })
}

/// Appends those of these pages that the kernel has merged with others (KSM): to the tracking of writes that looks like a write, and is none.
///
/// # Errors
/// The page tables cannot be read.
pub fn merged(
    process: &Process,
    region: &Region,
    runs: &[PageRun],
    out: &mut Vec<PageRun>,
) -> Result<(), PopulatedError> {
    let failed = |source| PopulatedError::Scan { pid: process.pid(), source };
    let flags = File::open("/proc/kpageflags").map_err(failed)?;
    each_entry(process, region, runs, |page, entry| {
        let mut flag = [0; 8];
        if entry & ENTRY_PRESENT != 0
            && flags.read_exact_at(&mut flag, (entry & ENTRY_FRAME) * 8).is_ok()
            && u64::from_ne_bytes(flag) & (FRAME_KSM | FRAME_ZERO) != 0
        {
            append_run(out, PageRun { first: page, pages: 1 });
        }
    })
}

/// Whether the kernel looks for pages of a process to merge.
pub fn may_merge(process: &Process) -> bool {
    let text = process.read_proc("ksm_stat").unwrap_or_default();
    let items = text.lines().find_map(|line| line.strip_prefix("ksm_rmap_items "));
    items.and_then(|items| items.trim().parse::<u64>().ok()).is_some_and(|items| items > 0)
}

/// Bytes of these pages, which map files, that no other process has mapped, and that the process has not written: they are the file's.
pub(crate) fn lone_bytes(
    process: &Process,
    region: &Region,
    runs: &[PageRun],
) -> Result<u64, PopulatedError> {
    let mut pages = 0;
    let lone = ENTRY_PRESENT | ENTRY_FILE | ENTRY_EXCLUSIVE;
    each_entry(process, region, runs, |_, entry| pages += u64::from(entry & lone == lone))?;
    Ok(pages * PAGE)
}

/// Calls `seen` with each page and its entry in the process's pagemap.
fn each_entry(
    process: &Process,
    region: &Region,
    runs: &[PageRun],
    mut seen: impl FnMut(u64, u64),
) -> Result<(), PopulatedError> {
    let scanner = PageMap::new(process.open_proc("pagemap")?);
    let mut entries = Vec::new();
    for (all, mut runs) in near(runs) {
        for first in (all.first..all.end()).step_by(ENTRIES_PER_READ as usize) {
            let part = PageRun { first, pages: (all.end() - first).min(ENTRIES_PER_READ) };
            entries.resize(part.pages as usize, 0);
            let read = scanner.entries(region.span(part).addr, &mut entries);
            read.map_err(|source| PopulatedError::Scan { pid: process.pid(), source })?;
            while let Some((run, rest)) = runs.split_first() {
                let pages = run.first.max(first)..run.end().min(part.end());
                pages.for_each(|page| seen(page, entries[(page - first) as usize]));
                if run.end() > part.end() {
                    break;
                }
                runs = rest;
            }
        }
    }
    if process.is_alive() { Ok(()) } else { Err(process.gone().into()) }
}

/// Has the kernel map in a process what it has in common with others ([`common`]), by a look at each page that is not mapped: only those that are
/// have frames.
///
/// # Errors
/// The process has ended, or its layout has changed.
pub fn touch_common<'a>(
    process: &Process,
    pages: impl IntoIterator<Item = (Region, &'a [PageRun])>,
) -> Result<(), SharedError> {
    let mut spans = Vec::new();
    for (region, runs) in pages {
        // A fault maps what lies around it, but nothing of another mapping, and where a page is there none happens.
        each_entry(process, &region, runs, |page, entry| {
            if entry & ENTRY_PRESENT == 0 {
                spans.push(Span { addr: region.base + page * PAGE, len: 1 });
            }
        })?;
    }
    Ok(copy::touch(process, &spans)?)
}

/// Maps pages of a store over pages of a process whose guest does not run yet: `fd` is the number that the store has in the process. Whatever was
/// there is dropped. How many of the runs were mapped, region by region in order: the kernel may have no room for more. The store may still
/// be empty; none of its pages is looked at ([`touch_common`] does that).
///
/// # Errors
/// Nothing could be mapped at all.
pub fn map_common(
    process: &Process,
    attach: &Attach,
    fd: RawFd,
    regions: &[(Region, Vec<CommonRun>)],
) -> Result<usize, SharedError> {
    let mut done = 0;
    for (region, runs) in regions.iter().filter(|(_, runs)| !runs.is_empty()) {
        let details = smaps::first(process, region)?;
        let has = |flag: &str| details.as_ref().is_some_and(|details| details.has(flag));
        let advice: Vec<i32> =
            ADVICE.iter().filter(|(flag, _)| has(flag)).map(|(_, advice)| *advice).collect();
        for chunk in runs.chunks(MAX_RANGES) {
            let ranges: Vec<(u64, u64, u64)> = chunk
                .iter()
                .map(|common| {
                    let span = region.span(common.run);
                    (span.addr, span.len, common.at * PAGE)
                })
                .collect();
            let op = Op::MapPrivate { fd, ranges, reserve: !has("nr"), advice: advice.clone() };
            let mapped = attach.perform(process, op)?.ranges.min(chunk.len());
            done += mapped;
            if mapped < chunk.len() {
                return Ok(done);
            }
        }
    }
    Ok(done)
}
