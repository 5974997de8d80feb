//! The beginning: nothing may be where a page is to come, for what is there never faults.
//!
//! | memory | what is dropped | what is registered |
//! |---|---|---|
//! | anonymous | pages, by an injected `madvise(MADV_DONTNEED)`, one attach for all | missing pages |
//! | shared file or memfd | the file's pages, by punching holes through our own descriptor | pages that the file misses |
//! | private, of a memfd or tmpfs | the process's own pages, as if anonymous | missing pages, and those that only the file has |
//! | in common with other VMs | the process's own pages, as if anonymous | missing pages, and those that only the store has |
//! | huge pages of hugetlbfs | as of others, in whole ones | missing pages |
//!
//! The file below a private mapping is left alone, for it may be a template of others: what it has faults as well (`MINOR`), and is
//! covered by a page of the process's own. A fault of the process between the drop and the registration, or the kernel
//! making a huge page of small ones, may bring something back; so it is looked again at the end.

use std::os::unix::fs::MetadataExt;

use rustix::fs::{FallocateFlags, fallocate};

use super::{HUGE_PAGE, Pager, PagerError, Part, Plan};
use crate::attach::protocol::MAX_RANGES;
use crate::backing::Kind;
use crate::page::{PageRun, Region, Span, intersection};
use crate::populated::occupied;
use crate::sys::pagemap::PageMap;

/// How often what comes back is dropped again: huge pages are made rarely, and a process that runs is not to be paged.
const ATTEMPTS: u32 = 4;

impl Pager {
    /// Drops what is present of pages that were not delivered, has faults told from now on, and proves that none of those pages is
    /// there. For a process that stands still; quick if nothing is present.
    ///
    /// # Errors
    /// The memory is as before but for what was dropped: end that process.
    pub fn begin(&self) -> Result<(), PagerError> {
        let mut scanner = PageMap::new(self.process.open_proc("pagemap")?);
        let mut left = Ok(());
        for _ in 0..ATTEMPTS {
            let clear = self.clear();
            self.drop_present(&mut scanner, &clear)?;
            let proved = self.register().and_then(|()| self.first_present(&mut scanner, &clear));
            self.check_alive()?;
            left = match proved {
                Ok(None) => return Ok(()),
                Ok(Some(addr)) => Err(PagerError::Present { pid: self.process.pid(), addr }),
                Err(error) => Err(error),
            };
            // Else our own discards would be told too, and wait for somebody to read of them.
            let undone = self.unregister();
            if matches!(left, Err(PagerError::Register { .. })) {
                break;
            }
            undone?;
        }
        left
    }

    /// Drops what is present of these pages, region by region and granule by granule, ahead of [`Pager::begin`], which then has little to
    /// drop.
    ///
    /// # Errors
    /// As there.
    pub fn drop_ahead(&self, missing: &[Vec<PageRun>]) -> Result<(), PagerError> {
        let mut scanner = PageMap::new(self.process.open_proc("pagemap")?);
        self.drop_present(&mut scanner, missing)?;
        self.check_alive()
    }

    /// What is missing of each region.
    fn clear(&self) -> Vec<Vec<PageRun>> {
        let of = |region| {
            let mut runs = Vec::new();
            self.bits.clear_runs(region, |run| runs.push(run));
            runs
        };
        (0..self.regions.len()).map(of).collect()
    }

    fn drop_present(&self, scanner: &mut PageMap, clear: &[Vec<PageRun>]) -> Result<(), PagerError> {
        let mut spans = Vec::new();
        for (plan, clear) in self.regions.iter().zip(clear) {
            // A part of a huge page cannot be dropped, nor put in place.
            if !clear.iter().all(|run| (run.first | run.pages).is_multiple_of(plan.granule())) {
                return Err(PagerError::Bits);
            }
            let there = self.occupied(scanner, plan)?;
            let mut dropped = |clear: &[PageRun], there: &[PageRun]| {
                spans.extend(hulls(clear, there).into_iter().map(|run| plan.region.span(run)));
            };
            if !plan.is_seen_by_others() {
                dropped(clear, &there);
                continue;
            }
            for part in &plan.parts {
                let clear = part.within(plan, clear);
                match part.segment.kind {
                    Kind::Shared => self.punch(plan, part, &clear)?,
                    _ => dropped(&clear, &part.within(plan, &there)),
                }
            }
        }
        for chunk in spans.chunks(MAX_RANGES) {
            let done = self.attach.dontneed(&self.process, chunk)?.ranges;
            if let Some(span) = chunk.get(done) {
                return Err(PagerError::Drop { pid: self.process.pid(), addr: span.addr, source: None });
            }
        }
        Ok(())
    }

    /// All of the runs, whether or not the file tells of data there: room that was only set aside has no data, and does not fault.
    fn punch(&self, plan: &Plan, part: &Part, clear: &[PageRun]) -> Result<(), PagerError> {
        let Some(file) = part.file.as_ref().filter(|_| part.file_has_pages()) else { return Ok(()) };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for span in clear.iter().map(|run| plan.region.span(*run)) {
            let offset = part.segment.offset + (span.addr - part.segment.start);
            fallocate(file, flags, offset, span.len).map_err(|e| PagerError::Drop {
                pid: self.process.pid(),
                addr: span.addr,
                source: Some(e.into()),
            })?;
        }
        Ok(())
    }

    fn register(&self) -> Result<(), PagerError> {
        for (plan, clear) in self.regions.iter().zip(self.clear()) {
            let Region { base, bytes } = plan.region;
            let whole = Span { addr: base, len: bytes };
            let failed = |addr| move |source| PagerError::Register { pid: self.process.pid(), addr, source };
            if plan.parts.iter().any(|part| part.segment.kind == Kind::Common) {
                // All at once: what is in common is there, and not asked for, but where it is stale.
                self.uffd.register_missing(whole).map_err(failed(base))?;
            }
            self.register_parts(plan, &clear)?;
        }
        Ok(())
    }

    fn register_parts(&self, plan: &Plan, clear: &[PageRun]) -> Result<(), PagerError> {
        let has_common = plan.parts.iter().any(|part| part.segment.kind == Kind::Common);
        for part in &plan.parts {
            let span = part.segment.span();
            let registered = match part.segment.kind {
                Kind::Common if !part.has_any(plan, clear) => continue,
                Kind::Anonymous if has_common => continue,
                Kind::Common => self.uffd.register_missing_above_file(span),
                Kind::Private if plan.huge.is_none() => self.uffd.register_missing_above_file(span),
                _ => self.uffd.register_missing(span),
            };
            let pid = self.process.pid();
            registered.map_err(|source| PagerError::Register { pid, addr: span.addr, source })?;
        }
        Ok(())
    }

    /// Releases all that can be; the first error.
    pub(super) fn unregister(&self) -> Result<(), PagerError> {
        let mut result = Ok(());
        for plan in &self.regions {
            let Region { base: addr, bytes: len } = plan.region;
            if let Err(source) = self.uffd.unregister(Span { addr, len }) {
                self.check_alive()?;
                result = result.and(Err(PagerError::Register { pid: self.process.pid(), addr, source }));
            }
        }
        result
    }

    /// The address of a page that was not delivered and would not fault.
    fn first_present(
        &self,
        scanner: &mut PageMap,
        clear: &[Vec<PageRun>],
    ) -> Result<Option<u64>, PagerError> {
        for (plan, clear) in self.regions.iter().zip(clear) {
            let mut there = Vec::new();
            intersection(clear, &self.occupied(scanner, plan)?, &mut there);
            for part in plan.parts.iter().filter(|part| part.segment.kind == Kind::Shared) {
                self.data(plan, part, &part.within(plan, clear), &mut there)?;
            }
            if let Some(run) = there.first() {
                return Ok(Some(plan.region.span(*run).addr));
            }
        }
        Ok(None)
    }

    /// What the process's page tables hold of a region.
    fn occupied(&self, scanner: &mut PageMap, plan: &Plan) -> Result<Vec<PageRun>, PagerError> {
        let mut there = Vec::new();
        let Region { base, bytes } = plan.region;
        occupied(scanner, &self.process, &plan.region, Span { addr: base, len: bytes }, &mut there)?;
        Ok(there)
    }

    /// Appends what of the runs has data in the file.
    fn data(
        &self,
        plan: &Plan,
        part: &Part,
        runs: &[PageRun],
        out: &mut Vec<PageRun>,
    ) -> Result<(), PagerError> {
        let Some(file) = part.file.as_ref().filter(|_| part.file_has_pages()) else { return Ok(()) };
        if plan.huge.is_some() {
            let mut data = Vec::new();
            let found = |start, end| data.push(plan.region.run(start, end));
            crate::huge::in_file(&self.process, &part.segment, HUGE_PAGE, found)?;
            intersection(runs, &data, out);
            return Ok(());
        }
        for span in runs.iter().map(|run| plan.region.span(*run)) {
            let found = |start, end| out.push(plan.region.run(start, end));
            part.segment.data(&self.process, file, span.addr..span.end(), found)?;
        }
        Ok(())
    }
}

impl Plan {
    /// Whether any of it is in a file that others may have mapped too.
    fn is_seen_by_others(&self) -> bool {
        self.parts.iter().any(|part| part.segment.kind == Kind::Shared)
    }
}

impl Part {
    /// Its pages in the region.
    fn pages(&self, plan: &Plan) -> PageRun {
        let Span { addr, len } = self.segment.span();
        plan.region.run(addr, addr + len)
    }

    /// Whether any of a region's runs lies in this part.
    fn has_any(&self, plan: &Plan, runs: &[PageRun]) -> bool {
        let part = self.pages(plan);
        let at = runs.partition_point(|run| run.end() <= part.first);
        runs.get(at).is_some_and(|run| run.first < part.end())
    }

    /// What of a region's runs lies in this part.
    fn within(&self, plan: &Plan, runs: &[PageRun]) -> Vec<PageRun> {
        let part = self.pages(plan);
        // There may be thousands of parts, and of runs.
        let runs = &runs[runs.partition_point(|run| run.end() <= part.first)..];
        let runs = &runs[..runs.partition_point(|run| run.first < part.end())];
        let mut within = Vec::new();
        intersection(runs, &[part], &mut within);
        within
    }

    /// Whether the file has any pages at all, counted by the kernel; if it cannot be asked, it may.
    fn file_has_pages(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.metadata().map_or(true, |m| m.blocks() > 0))
    }
}

/// For each run of `clear` in which something is there, from the first such page to the last: as few calls as can be.
fn hulls(clear: &[PageRun], there: &[PageRun]) -> Vec<PageRun> {
    let (mut hulls, mut i): (Vec<PageRun>, usize) = (Vec::new(), 0);
    for run in clear {
        while i < there.len() && there[i].end() <= run.first {
            i += 1;
        }
        let from = i;
        while i < there.len() && there[i].first < run.end() {
            i += 1;
        }
        if from < i {
            let first = there[from].first.max(run.first);
            let end = there[i - 1].end().min(run.end());
            hulls.push(PageRun { first, pages: end - first });
            // The last may reach into the next run as well.
            i -= 1;
        }
    }
    hulls
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first, pages }
    }

    #[test]
    fn only_what_is_clear_is_dropped_in_as_few_runs_as_can_be() {
        let there = [run(0, 4), run(6, 1), run(8, 10), run(30, 2), run(40, 1)];
        assert_eq!(hulls(&[run(0, 50)], &there), [run(0, 41)]);
        assert_eq!(
            hulls(&[run(2, 3), run(6, 1), run(9, 2), run(12, 20)], &there),
            [run(2, 2), run(6, 1), run(9, 2), run(12, 20)]
        );
        assert_eq!(hulls(&[run(4, 2), run(18, 12), run(41, 9)], &there), []);
        assert_eq!(hulls(&[], &there), []);
        assert_eq!(hulls(&[run(0, 50)], &[]), []);
    }
}
