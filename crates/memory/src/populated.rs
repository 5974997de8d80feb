//! Which pages of a region can differ from zero. The others are holes and are never read: reading a hole of a memfd, also by
//! `process_vm_readv`, allocates it. Huge pages of hugetlbfs are asked for in a way of their own ([`crate::huge`]).

use std::io;
use std::ops::Range;

use crate::backing::{self, Access, BackingError, Kind, Mappings, Segment};
use crate::copy::CopyError;
use crate::huge;
use crate::page::{PAGE, PageRun, Region, Span, append_run, intersection, near, normalise};
use crate::process::{Process, ProcessError};
use crate::shared::common_of;
use crate::sys::pagemap::{FILE, PRESENT, PageMap, Query, SWAPPED, ZERO};

/// `PM_SWAP` of pagemap.rst: the page is swapped out, or its entry is no swap at all but a marker.
const ENTRY_SWAP: u64 = 1 << 62;

/// The swap type's bits of a pagemap entry, and the type that marks a page which is protected but has no content
/// (`SWP_PTE_MARKER`, the last of the 32 types, include/linux/swap.h).
const ENTRY_SWAP_TYPE: u64 = 0x1f;
const TYPE_MARKER: u64 = 0x1f;

/// Pagemap entries looked at in one read: 512 kB.
const ENTRIES_PER_READ: u64 = 1 << 16;

/// Why the populated pages could not be found.
#[derive(Debug, thiserror::Error)]
pub enum PopulatedError {
    /// The process could not be asked.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The mappings behind the region could not be read.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// Its pages could not be read.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The page tables could not be scanned.
    #[error("cannot scan the page tables of process {pid}; this needs Linux 6.7 or later")]
    Scan {
        /// The process's pid.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Finds the pages of a region that can differ from zero, as runs: ascending, disjoint, not touching.
///
/// These are the pages that are present or swapped out (the shared zero page does not count) and, where a file or memfd is
/// mapped, those that have data in it, mapped or not. What was in `out` before is replaced. A page that the process touches
/// for the first time during the call may be missing: stop the process, or track it.
pub fn populated(process: &Process, region: &Region, out: &mut Vec<PageRun>) -> Result<(), PopulatedError> {
    populated_of(process, &Mappings::of(process, std::slice::from_ref(region))?, region, out)
}

/// The same of several regions: the process's mappings are looked at once.
pub fn populated_all(process: &Process, regions: &[Region]) -> Result<Vec<Vec<PageRun>>, PopulatedError> {
    let mappings = Mappings::of(process, regions)?;
    let of = |region| {
        let mut pages = Vec::new();
        populated_of(process, &mappings, region, &mut pages).map(|()| pages)
    };
    regions.iter().map(of).collect()
}

fn populated_of(
    process: &Process,
    mappings: &Mappings,
    region: &Region,
    out: &mut Vec<PageRun>,
) -> Result<(), PopulatedError> {
    out.clear();
    let mut files = false;
    let mut scanner = PageMap::new(process.open_proc("pagemap")?);
    for segment in mappings.segments(region)? {
        if segment.kind == Kind::Common {
            files = true;
            out.push(region.run(segment.start, segment.end));
            continue;
        }
        if segment.kind != Kind::Anonymous {
            files = true;
            let file = segment.open(process, Access::Read)?;
            if let Some(page) = segment.huge_page_bytes(&file) {
                huge::populated(&mut scanner, process, region, &segment, page, out)?;
                continue;
            }
            let all = segment.start..segment.end;
            segment.data(process, &file, all, |start, end| out.push(region.run(start, end)))?;
        }
        present(&mut scanner, process, region, segment.start, segment.end, out)?;
    }
    if files {
        normalise(out);
    }
    // A dead process has no page tables left, and the scan of nothing succeeds.
    if process.is_alive() { Ok(()) } else { Err(process.gone().into()) }
}

/// What of a region that several VMs have partly in common ([`crate::common`]), and that is anonymous else, can differ from zero, and what of it
/// is the process's own: [`populated`] and [`own`] by one look.
///
/// # Errors
/// The page tables cannot be read.
pub fn populated_and_own(
    process: &Process,
    region: &Region,
    common: &[PageRun],
) -> Result<(Vec<PageRun>, Vec<PageRun>), PopulatedError> {
    let failed = |source| PopulatedError::Scan { pid: process.pid(), source };
    let mut scanner = PageMap::new(process.open_proc("pagemap")?);
    let query = Query { any: PRESENT | SWAPPED, tell: PRESENT | SWAPPED | ZERO | FILE, ..Query::default() };
    let mut found = Vec::new();
    scanner
        .scan(query, region.base, region.end(), |start, end, categories| found.push((start, end, categories)))
        .map_err(failed)?;
    let (mut populated, mut own, mut swapped_out) = (Vec::new(), Vec::new(), Vec::new());
    for (start, end, categories) in found {
        if categories & FILE != 0 {
            populated.push(region.run(start, end));
        } else if categories & PRESENT == 0 {
            swapped_out.clear();
            swapped(&scanner, region, start, end, &mut swapped_out).map_err(failed)?;
            swapped_out.iter().for_each(|run| {
                append_run(&mut own, *run);
                append_run(&mut populated, *run);
            });
        } else {
            append_run(&mut own, region.run(start, end));
            if categories & ZERO == 0 {
                append_run(&mut populated, region.run(start, end));
            }
        }
    }
    if !process.is_alive() {
        return Err(process.gone().into());
    }
    populated.extend_from_slice(common);
    normalise(&mut populated);
    Ok((populated, own))
}

/// Finds the pages of a region that the process has mapped, or swapped out: all of [`populated`] but what is only in a file.
/// What was read or written through the mapping is mapped, until it is discarded or reclaimed. To ask a file of a GiB where it
/// has data takes 25 to 40 ms, for the kernel walks over each of its pages; this takes one or two.
pub fn mapped(process: &Process, region: &Region, out: &mut Vec<PageRun>) -> Result<(), PopulatedError> {
    out.clear();
    let mut scanner = PageMap::new(process.open_proc("pagemap")?);
    present(&mut scanner, process, region, region.base, region.end(), out)?;
    if process.is_alive() { Ok(()) } else { Err(process.gone().into()) }
}

/// Finds the pages of a private mapping of a file that are the process's own: written since they were mapped, and copied by that. All others
/// are the file's. This is what a clone differs in from its template (Eswaran et al., "Template-aware live migration", SEC 2023, which
/// tracks writes from the clone's start; the page tables know it without).
///
/// # Errors
/// The page tables cannot be read.
pub fn own(process: &Process, region: &Region, out: &mut Vec<PageRun>) -> Result<(), PopulatedError> {
    own_within(process, region, &[PageRun { first: 0, pages: region.pages() }], out)
}

/// The same of these pages alone, as runs that ascend. Where much of a region was never touched that is quicker by far: what tracking has
/// marked there looks like pages that are swapped out, and is told from those one by one.
///
/// # Errors
/// As there.
pub fn own_within(
    process: &Process,
    region: &Region,
    runs: &[PageRun],
    out: &mut Vec<PageRun>,
) -> Result<(), PopulatedError> {
    out.clear();
    let mut scanner = PageMap::new(process.open_proc("pagemap")?);
    let query = Query { none: FILE, any: PRESENT | SWAPPED, tell: PRESENT | SWAPPED, ..Query::default() };
    let mut found = Vec::new();
    for (all, runs) in near(runs) {
        let span = region.span(all);
        found.clear();
        entries(&mut scanner, process, region, query, span.addr..span.end(), &mut found)?;
        intersection(&found, runs, out);
    }
    if process.is_alive() { Ok(()) } else { Err(process.gone().into()) }
}

/// Where a QEMU has the one block of so many bytes of which it does not tell that yet: video memory, of which QEMU before 8.2 says where it is
/// once the guest has mapped it. `taken` is what belongs to other blocks. Nothing where there is more than one place that it can be, or
/// something is there already. It is a guess all the same: QEMU's own word has to be asked as soon as it gives it.
///
/// # Errors
/// The list of mappings or the page tables cannot be read.
pub fn lone_block(process: &Process, bytes: u64, taken: &[Region]) -> Result<Option<u64>, PopulatedError> {
    let Some(base) = Mappings::all(process)?.lone_block(bytes, taken) else { return Ok(None) };
    let mut present = Vec::new();
    populated(process, &Region { base, bytes }, &mut present)?;
    Ok(present.is_empty().then_some(base))
}

/// Of these pages those that have data in the file behind them, mapped or not; as runs that ascend and do not touch.
pub fn with_data(
    process: &Process,
    region: &Region,
    runs: &[PageRun],
) -> Result<Vec<PageRun>, PopulatedError> {
    let mut found = Vec::new();
    if runs.is_empty() {
        return Ok(found);
    }
    let of_file = |segment: &&Segment| !matches!(segment.kind, Kind::Anonymous | Kind::Common);
    for segment in backing::segments(process, region)?.iter().filter(of_file) {
        let file = segment.open(process, Access::Read)?;
        for span in runs.iter().map(|run| region.span(*run)) {
            let within = span.addr.max(segment.start)..span.end().min(segment.end);
            if !within.is_empty() {
                segment.data(process, &file, within, |from, to| found.push(region.run(from, to)))?;
            }
        }
    }
    normalise(&mut found);
    Ok(found)
}

/// What is behind a region, as far as looking for changes goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// All of it is private memory without a file: plain `-m` RAM. One scan tells all about it; but for what it has in common with others
    /// ([`crate::shared`]).
    Anonymous,
    /// Files or memfds: a page that is not mapped may have content.
    Files,
    /// Huge pages of hugetlbfs.
    HugePages,
    /// A private mapping of a template: a page that is not the process's own is the template's. Nobody but who mapped it knows
    /// this: [`Backing::of`] says [`Backing::Files`].
    Template,
}

impl Backing {
    /// How many pages come and go together where such memory is paged on demand: huge pages are of 2 MiB there.
    pub fn granule(self) -> u64 {
        match self {
            Backing::Anonymous | Backing::Files | Backing::Template => 1,
            Backing::HugePages => crate::pager::HUGE_PAGE / PAGE,
        }
    }

    /// What is behind a region.
    ///
    /// # Errors
    ///
    /// The mappings cannot be read.
    pub fn of(process: &Process, region: &Region) -> Result<Backing, PopulatedError> {
        Ok(Self::of_segments(process, &backing::segments(process, region)?))
    }

    /// The same of several regions, and which pages of each several VMs have in common ([`crate::common`]).
    ///
    /// # Errors
    ///
    /// The mappings cannot be read.
    pub fn of_all(
        process: &Process,
        regions: &[Region],
    ) -> Result<Vec<(Backing, Vec<PageRun>)>, PopulatedError> {
        let mappings = Mappings::of(process, regions)?;
        let of = |region: &Region| {
            let segments = mappings.segments(region)?;
            Ok((Self::of_segments(process, &segments), common_of(region, &segments)))
        };
        regions.iter().map(of).collect()
    }

    fn of_segments(process: &Process, segments: &[Segment]) -> Backing {
        match segments.iter().all(|segment| matches!(segment.kind, Kind::Anonymous | Kind::Common)) {
            true => Backing::Anonymous,
            false if huge::is_huge(process, segments) => Backing::HugePages,
            false => Backing::Files,
        }
    }
}

/// Appends the pages of `start..end` that are present or swapped out; the shared zero page does not count.
pub(crate) fn present(
    scanner: &mut PageMap,
    process: &Process,
    region: &Region,
    start: u64,
    end: u64,
    out: &mut Vec<PageRun>,
) -> Result<(), PopulatedError> {
    let query = Query { none: ZERO, any: PRESENT | SWAPPED, tell: PRESENT | SWAPPED, ..Query::default() };
    entries(scanner, process, region, query, start..end, out)
}

/// Appends the pages of `within` where an access finds something, be it the shared zero page: those that cannot be missing.
pub(crate) fn occupied(
    scanner: &mut PageMap,
    process: &Process,
    region: &Region,
    within: Span,
    out: &mut Vec<PageRun>,
) -> Result<(), PopulatedError> {
    let query = Query { any: PRESENT | SWAPPED, tell: PRESENT | SWAPPED, ..Query::default() };
    entries(scanner, process, region, query, within.addr..within.end(), out)
}

fn entries(
    scanner: &mut PageMap,
    process: &Process,
    region: &Region,
    query: Query,
    within: Range<u64>,
    out: &mut Vec<PageRun>,
) -> Result<(), PopulatedError> {
    let failed = |source| PopulatedError::Scan { pid: process.pid(), source };
    let mut runs = Vec::new();
    let found = |start, end, categories| runs.push((start, end, categories & PRESENT != 0));
    scanner.scan(query, within.start, within.end, found).map_err(failed)?;
    for (start, end, is_present) in runs {
        if is_present {
            append_run(out, region.run(start, end));
        } else {
            swapped(scanner, region, start, end, out).map_err(failed)?;
        }
    }
    Ok(())
}

/// Tells pages that are swapped out from empty ones that tracking has marked, which a scan reports alike.
fn swapped(
    scanner: &PageMap,
    region: &Region,
    start: u64,
    end: u64,
    out: &mut Vec<PageRun>,
) -> io::Result<()> {
    let mut entries = Vec::new();
    let mut at = start;
    while at < end {
        let pages = ((end - at) / PAGE).min(ENTRIES_PER_READ);
        entries.resize(pages as usize, 0);
        scanner.entries(at, &mut entries)?;
        for (i, entry) in (0u64..).zip(&entries) {
            let marker = entry & ENTRY_SWAP != 0 && entry & ENTRY_SWAP_TYPE == TYPE_MARKER;
            if *entry != 0 && !marker {
                append_run(out, region.run(at + i * PAGE, at + (i + 1) * PAGE));
            }
        }
        at += pages * PAGE;
    }
    Ok(())
}
