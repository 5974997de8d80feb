//! Huge pages of hugetlbfs: they come in pieces of 4 KiB, and are put in place whole.
//!
//! The kernel fills nothing less than a huge page there, and knows no page of zeros of that size. So the pieces of one wait here until
//! all of them have come; only then is it delivered. A pager that dies before has delivered nothing of it: all of it comes again.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::serve::Content;
use super::{Installed, Pager, PagerError};
use crate::backing::{Access, Kind, Segment};
use crate::page::{PAGE, PageRun, Region, Span};
use crate::process::Process;

/// Pieces in a huge page: only those of 2 MiB are paged on demand. One of 1 GiB would keep the guest waiting for seconds.
pub(super) const PIECES: u64 = super::HUGE_PAGE / PAGE;
/// Words that hold a bit for each piece.
const WORDS: usize = (PIECES / u64::BITS as u64) as usize;
/// Huge pages that may wait for pieces, 256 MiB: one for each connection, of which there are 65 at most, and those of connections
/// that were lost.
const OPEN_MAX: usize = 128;

/// What has come of the huge pages of a region that are not there yet, by their first page.
#[derive(Debug, Default)]
pub(super) struct HugePages {
    open: Mutex<BTreeMap<u64, Pieces>>,
}

#[derive(Debug, Default)]
struct Pieces {
    /// Nothing while all that has come is zero.
    bytes: Vec<u8>,
    have: [u64; WORDS],
}

/// A huge page of which all has come.
enum Whole {
    Bytes(Vec<u8>),
    Zeros,
}

impl HugePages {
    /// Why huge pages of `page` bytes behind a region cannot be paged on demand, if they cannot.
    pub(super) fn refusal(
        process: &Process,
        region: &Region,
        segment: &Segment,
        page: u64,
    ) -> Result<Option<String>, PagerError> {
        let at = segment.start;
        if page != super::HUGE_PAGE {
            return Ok(Some(format!(
                "the RAM at {at:#x} is in huge pages of {} MiB; only those of 2 MiB can be paged on demand",
                page >> 20
            )));
        }
        let whole = [region.base, region.bytes, segment.offset].iter().all(|at| at.is_multiple_of(page));
        if !whole || segment.span() != (Span { addr: region.base, len: region.bytes }) {
            return Ok(Some(format!(
                "the RAM at {at:#x} is not made of whole huge pages of one file, which paging on demand needs"
            )));
        }
        let file = segment.open(process, Access::Read)?;
        let blocks = file.metadata().map_err(|source| segment.failed(process, source))?.blocks();
        if segment.kind == Kind::Private && blocks > 0 {
            return Ok(Some(format!(
                "the RAM at {at:#x} is a private mapping of a file of huge pages that has content; \
                 it could not be told from what is missing"
            )));
        }
        Ok(None)
    }

    /// Takes pieces in; how many of them were new, and the huge page if it is whole now.
    fn add(&self, unit: u64, pieces: PageRun, content: Content<'_>) -> Result<(u64, Option<Whole>), ()> {
        let mut open = self.lock();
        if open.len() >= OPEN_MAX && !open.contains_key(&unit) {
            return Err(());
        }
        let page = open.entry(unit).or_default();
        let mut new = 0;
        for piece in pieces.first - unit..pieces.end() - unit {
            let (word, bit) = (&mut page.have[(piece / 64) as usize], 1 << (piece % 64));
            new += u64::from(*word & bit == 0);
            *word |= bit;
        }
        if let Content::Bytes(bytes) = content {
            page.bytes.resize(super::HUGE_PAGE as usize, 0);
            let at = ((pieces.first - unit) * PAGE) as usize;
            page.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        }
        if page.have != [u64::MAX; WORDS] {
            return Ok((new, None));
        }
        let bytes = open.remove(&unit).map(|page| page.bytes).unwrap_or_default();
        Ok((new, Some(if bytes.is_empty() { Whole::Zeros } else { Whole::Bytes(bytes) })))
    }

    /// What has come of a run is not needed any more.
    pub(super) fn forget(&self, run: PageRun) {
        self.lock().retain(|unit, _| unit + PIECES <= run.first || *unit >= run.end());
    }

    /// What a panic has left is as good as any: a piece counts only once its bytes are there, or is sent again.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Pieces>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pager {
    /// Takes in pieces of huge pages, and puts in place those that are whole by that.
    pub(super) fn assemble(
        &self,
        region: usize,
        huge: &HugePages,
        run: PageRun,
        content: Content<'_>,
        done: &mut Installed,
    ) -> Result<(), PagerError> {
        let mut first = run.first;
        while first < run.end() {
            let unit = first / PIECES * PIECES;
            let part = PageRun { first, pages: (unit + PIECES).min(run.end()) - first };
            let content = content.from(first - run.first, part.pages);
            first = part.end();
            if self.bits.get(region, unit) {
                huge.forget(part);
                done.duplicates += part.pages;
                continue;
            }
            let added = huge.add(unit, part, content);
            let (new, whole) = added.map_err(|()| PagerError::Scattered { pid: self.process.pid() })?;
            done.duplicates += part.pages - new;
            let all = PageRun { first: unit, pages: PIECES };
            match whole {
                None => {}
                Some(Whole::Zeros) => self.settle(region, all, done)?,
                Some(Whole::Bytes(bytes)) => self.put_whole(region, all, &bytes, done)?,
            }
        }
        Ok(())
    }

    fn put_whole(
        &self,
        region: usize,
        all: PageRun,
        bytes: &[u8],
        done: &mut Installed,
    ) -> Result<(), PagerError> {
        let span = self.regions[region].region.span(all);
        let (since, mut looks) = (Instant::now(), 0);
        while !self.try_whole(region, all, (span, bytes), done)? {
            self.pause(since, &mut looks, span.addr)?;
        }
        Ok(())
    }

    /// False while a discard is going on.
    fn try_whole(
        &self,
        region: usize,
        all: PageRun,
        (span, bytes): (Span, &[u8]),
        done: &mut Installed,
    ) -> Result<bool, PagerError> {
        let _shared = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        if self.bits.get(region, all.first) {
            done.duplicates += all.pages;
            return Ok(true);
        }
        match self.uffd.copy(span.addr, bytes).stopped {
            None => {}
            Some(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Some(e) if e.kind() == io::ErrorKind::AlreadyExists => self.wake(span)?,
            Some(e) => return Err(self.failed(span.addr, e)),
        }
        done.pages += self.bits.set(region, all);
        self.resolve(region, all, &mut done.resolved);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first, pages }
    }

    #[test]
    fn a_huge_page_is_whole_when_each_of_its_pieces_has_come() {
        let huge = HugePages::default();
        let half = vec![7; (PIECES / 2 * PAGE) as usize];
        assert!(matches!(huge.add(PIECES, run(PIECES, PIECES / 2), Content::Bytes(&half)), Ok((256, None))));
        assert!(matches!(huge.add(PIECES, run(PIECES + 9, 1), Content::Zeros), Ok((0, None))));
        let Ok((256, Some(Whole::Bytes(bytes)))) =
            huge.add(PIECES, run(PIECES + PIECES / 2, PIECES / 2), Content::Zeros)
        else {
            panic!("not whole")
        };
        assert_eq!(bytes, [half.clone(), vec![0; half.len()]].concat());
        assert!(matches!(huge.add(0, run(0, PIECES - 1), Content::Zeros), Ok((511, None))));
        assert!(matches!(huge.add(0, run(PIECES - 1, 1), Content::Zeros), Ok((1, Some(Whole::Zeros)))));
        assert!(huge.lock().is_empty());
    }

    #[test]
    fn pieces_of_endlessly_many_are_not_kept() {
        let huge = HugePages::default();
        for unit in 0..OPEN_MAX as u64 {
            assert!(huge.add(unit * PIECES, run(unit * PIECES, 1), Content::Zeros).is_ok());
        }
        assert!(huge.add(1 << 40, run(1 << 40, 1), Content::Zeros).is_err());
        assert!(huge.add(PIECES, run(PIECES + 1, 1), Content::Zeros).is_ok());
        huge.forget(run(3 * PIECES + 5, 1));
        assert!(huge.add(1 << 40, run(1 << 40, 1), Content::Zeros).is_ok());
    }
}
