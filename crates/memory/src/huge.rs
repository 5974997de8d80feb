//! Huge pages of hugetlbfs: which of them hold something, exactly.
//!
//! The usual ways fail here: `SEEK_DATA` calls all of such a file data, and reading a hole to see allocates a huge page. What
//! works depends on the mapping:
//!
//! - *shared*: all content is in the file. A window of our own into it is asked what the file has ([`Window::existing`]).
//! - *private*: what the process has touched is its own and shows in its page tables; the file is asked for what lies under it.
//!
//! In a page table an entry that is "swapped" and not "present" is either a marker (the page was discarded while it was
//! tracked) or a page that the kernel is moving just now: huge pages are never swapped out. A page that moves has content and
//! must not be taken for a hole. `smaps` counts those that move and no markers (`smaps_hugetlb_range`, fs/proc/task_mmu.c), so
//! that an equal count between two equal looks proves that nothing moves.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use crate::backing::{Access, BackingError, Kind, Segment};
use crate::copy::Reader;
use crate::page::{PageRun, Region, Span, append_run, intersection, is_zero};
use crate::populated::PopulatedError;
use crate::process::{Process, ProcessError};
use crate::sys::pagemap::{PRESENT, PageMap, Query, SWAPPED};
use crate::sys::window::Window;

/// Looks at a mapping that changes under them, before what is unsure counts as present.
const LOOKS: u32 = 20;

/// The pause between them: moving one huge page takes about as long.
const LOOK_PAUSE: Duration = Duration::from_millis(1);

/// Bytes of a huge page that are looked at first.
const SAMPLE_BYTES: usize = 64;

/// Whether any part of a region of these segments is in huge pages of hugetlbfs.
pub(crate) fn is_huge(process: &Process, segments: &[Segment]) -> bool {
    let files = segments.iter().filter(|segment| !matches!(segment.kind, Kind::Anonymous | Kind::Common));
    let mut sizes =
        files.filter_map(|segment| segment.huge_page_bytes(&segment.open(process, Access::Read).ok()?));
    sizes.next().is_some()
}

/// Appends the pages of a segment in huge pages of `page` bytes that hold something.
///
/// Where the process keeps touching new pages all the time, pages that were just discarded may be among them: to read these
/// gives zeros and allocates them again, while to leave out one that moves would lose it.
pub(crate) fn populated(
    scanner: &mut PageMap,
    process: &Process,
    region: &Region,
    segment: &Segment,
    page: u64,
    out: &mut Vec<PageRun>,
) -> Result<(), PopulatedError> {
    let mut found = |start: u64, end: u64| {
        let (start, end) = (start.max(segment.start), end.min(segment.end));
        if start < end {
            append_run(out, region.run(start, end));
        }
    };
    in_file(process, segment, page, &mut found)?;
    if segment.kind == Kind::Private {
        own(scanner, process, segment)?.into_iter().for_each(|(start, end)| found(start, end));
    }
    Ok(())
}

/// Calls `found` with the addresses of the huge pages, in whole ones, that the file behind a segment has.
pub(crate) fn in_file(
    process: &Process,
    segment: &Segment,
    page: u64,
    mut found: impl FnMut(u64, u64),
) -> Result<(), BackingError> {
    let file = segment.open(process, Access::ReadWrite)?;
    let failed = |source| segment.failed(process, source);
    // What a private mapping has of its own is in no file, which mostly has nothing at all.
    if segment.kind == Kind::Private && file.metadata().map_err(failed)?.blocks() == 0 {
        return Ok(());
    }
    let from = segment.offset / page * page;
    let to = (segment.offset + (segment.end - segment.start)).next_multiple_of(page);
    let first = segment.start - (segment.offset - from);
    let window = Window::open(&file, from, to - from).map_err(failed)?;
    window.existing(page, |start, end| found(first + start, first + end)).map_err(failed)
}

/// The addresses of what is mapped in a private mapping, or is being moved there.
fn own(
    scanner: &mut PageMap,
    process: &Process,
    segment: &Segment,
) -> Result<Vec<(u64, u64)>, PopulatedError> {
    let mut look = Look::take(scanner, process, segment)?;
    for _ in 0..LOOKS {
        if look.unsure.is_empty() {
            break;
        }
        let counted = mapped_bytes(process, segment)?;
        let again = Look::take(scanner, process, segment)?;
        if again.present == look.present && counted == Some(again.present_bytes()) {
            return Ok(again.present);
        }
        std::thread::sleep(LOOK_PAUSE);
        look = Look::take(scanner, process, segment)?;
    }
    look.present.append(&mut look.unsure);
    look.present.sort_unstable();
    Ok(look.present)
}

/// Of pages that were sent, those whose huge page is nothing but zeros now. A private huge page that was discarded and then read, by whoever,
/// is there again, with its mark: it looks as if nobody had written it since it was sent.
///
/// Looks at a few bytes of each huge page that `sent` touches, and at all of those few that look empty. Give no holes: it would fill them.
///
/// # Errors
/// The memory cannot be read.
pub fn emptied(
    process: &Process,
    region: &Region,
    sent: &[PageRun],
    granule: u64,
) -> Result<Vec<PageRun>, PopulatedError> {
    let firsts = firsts_of(sent, granule);
    if firsts.is_empty() {
        return Ok(Vec::new());
    }
    let reader = Reader::of(process, std::slice::from_ref(region))?;
    let mut samples = vec![0; firsts.len() * SAMPLE_BYTES];
    let spans = firsts
        .iter()
        .map(|&page| Span { len: SAMPLE_BYTES as u64, ..region.span(PageRun { first: page, pages: 1 }) });
    reader.read(&spans.collect::<Vec<_>>(), &mut samples)?;
    let mut whole = Vec::new();
    let mut found = Vec::new();
    for (page, _) in
        firsts.iter().zip(samples.chunks_exact(SAMPLE_BYTES)).filter(|(_, sample)| is_zero(sample))
    {
        let first = page / granule * granule;
        let run = PageRun { first, pages: granule.min(region.pages() - first) };
        whole.resize(run.bytes() as usize, 0);
        reader.read(&[region.span(run)], &mut whole)?;
        if is_zero(&whole) {
            append_run(&mut found, run);
        }
    }
    let mut emptied = Vec::new();
    intersection(&found, sent, &mut emptied);
    Ok(emptied)
}

/// The first page of each granule that these runs touch, ascending.
fn firsts_of(runs: &[PageRun], granule: u64) -> Vec<u64> {
    let mut firsts: Vec<u64> = Vec::new();
    for run in runs {
        let mut page = run.first;
        while page < run.end() {
            if firsts.last().is_none_or(|last| last / granule != page / granule) {
                firsts.push(page);
            }
            page = (page / granule + 1) * granule;
        }
    }
    firsts
}

/// What the page tables of a mapping show at one time, as addresses.
struct Look {
    present: Vec<(u64, u64)>,
    /// Markers, and pages that are being moved.
    unsure: Vec<(u64, u64)>,
}

impl Look {
    fn take(scanner: &mut PageMap, process: &Process, segment: &Segment) -> Result<Look, PopulatedError> {
        let query = Query { any: PRESENT | SWAPPED, tell: PRESENT | SWAPPED, ..Query::default() };
        let mut look = Look { present: Vec::new(), unsure: Vec::new() };
        let (from, to) = segment.mapping();
        let scanned = scanner.scan(query, from, to, |start, end, is| {
            let list = if is & PRESENT != 0 { &mut look.present } else { &mut look.unsure };
            list.push((start, end));
        });
        scanned.map_err(|source| PopulatedError::Scan { pid: process.pid(), source })?;
        Ok(look)
    }

    fn present_bytes(&self) -> u64 {
        self.present.iter().map(|(start, end)| end - start).sum()
    }
}

/// How many bytes of a mapping of huge pages are mapped or being moved; nothing if the mapping has changed.
fn mapped_bytes(process: &Process, segment: &Segment) -> Result<Option<u64>, ProcessError> {
    Ok(hugetlb_bytes(&process.read_proc("smaps")?, segment.mapping()))
}

/// `Shared_Hugetlb` and `Private_Hugetlb` of a mapping in the text of `/proc/PID/smaps`, in bytes.
fn hugetlb_bytes(smaps: &str, (from, to): (u64, u64)) -> Option<u64> {
    let head = format!("{from:x}-{to:x} ");
    let lines = smaps.lines().skip_while(|line| !line.starts_with(&head)).skip(1);
    let lines = lines.take_while(|line| line.split(' ').next().is_some_and(|word| word.ends_with(':')));
    let kib = lines.filter_map(|line| {
        let (key, value) = line.split_once(':')?;
        let counts = matches!(key, "Shared_Hugetlb" | "Private_Hugetlb");
        counts.then(|| value.trim().strip_suffix(" kB")?.parse::<u64>().ok()).flatten()
    });
    let kib: Vec<u64> = kib.collect();
    (kib.len() == 2).then(|| kib.iter().sum::<u64>() << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE;

    #[test]
    fn a_granule_that_holds_nothing_any_more_is_told_as_far_as_it_was_sent() {
        let us = Process::open(i32::try_from(std::process::id()).unwrap()).unwrap();
        // Four granules of four pages: full, empty, empty but for its end, and empty.
        let mut memory = vec![0u8; 17 * PAGE as usize];
        let base = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let from = (base - memory.as_ptr() as u64) as usize;
        memory[from..from + 4 * PAGE as usize].fill(7);
        memory[from + 12 * PAGE as usize - 1] = 1;
        let region = Region { base, bytes: 16 * PAGE };
        let run = |first, pages| PageRun { first, pages };
        let sent = [run(0, 1), run(3, 3), run(7, 4), run(14, 1)];
        assert_eq!(firsts_of(&sent, 4), [0, 4, 8, 14]);
        assert_eq!(emptied(&us, &region, &sent, 4).unwrap(), [run(4, 2), run(7, 1), run(14, 1)]);
        assert_eq!(emptied(&us, &region, &[], 4).unwrap(), []);
        drop(memory);
    }

    const SMAPS: &str = "\
7f00-7f40 rw-p 00000000 00:0f 1   /memfd:a (deleted)
Rss:                   0 kB
Shared_Hugetlb:     2048 kB
Private_Hugetlb:    6144 kB
VmFlags: rd wr mr mw me ht
7f40-7f80 rw-p 00000000 00:0f 2   /memfd:b (deleted)
Shared_Hugetlb:        0 kB
Private_Hugetlb:    2048 kB
";

    #[test]
    fn the_count_is_that_of_the_mapping_asked_for() {
        assert_eq!(hugetlb_bytes(SMAPS, (0x7f00, 0x7f40)), Some(8 << 20));
        assert_eq!(hugetlb_bytes(SMAPS, (0x7f40, 0x7f80)), Some(2 << 20));
        assert_eq!(hugetlb_bytes(SMAPS, (0x7f00, 0x7f80)), None);
        assert_eq!(hugetlb_bytes("7f00-7f40 rw-p\nRss: 0 kB\n", (0x7f00, 0x7f40)), None);
    }
}
