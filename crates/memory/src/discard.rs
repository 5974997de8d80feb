//! Discarding pages at the target: they read as zero again, and where it pays, their memory is given back.
//!
//! A page that was never touched stays untouched. What is done depends on what is behind the page:
//!
//! | memory | done |
//! |---|---|
//! | shared file or memfd | a hole is punched into the file, through our own descriptor |
//! | anonymous | long runs are given back by an injected `madvise(MADV_DONTNEED)`, one attach for all; short ones become zeros |
//! | private, nothing in the file | the same: nothing lies under the page |
//! | in common with other VMs | zeros, for the same reason |
//! | private, the file has data there | zeros, for giving the page back would uncover the file's bytes |
//! | huge pages of hugetlbfs | zeros, and whole ones that hold nothing any more are given back ([`crate::huge_target`]) |

use rustix::fs::{FallocateFlags, fallocate};

use crate::attach::AttachError;
use crate::attach::protocol::MAX_RANGES;
use crate::backing::Kind;
use crate::install::{InstallError, Installer, Part, Plan, Way};
use crate::page::{PAGE, PageRun, Span, difference, intersection, normalise};

/// Runs shorter than this are overwritten with zeros instead of given back: the call costs about what writing 64 KiB does.
const LONG_RUN_PAGES: u64 = 16;

/// Pages in long runs below which no attach is made: it takes about a millisecond, in which twice as many pages as these
/// are zeroed, and holding 2 MiB more is no loss.
const ATTACH_PAGES: u64 = 512;

/// What is written over pages, at most so much per call.
static ZEROS: [u8; 1 << 18] = [0; 1 << 18];

impl Installer {
    /// Discards pages: afterwards they read as zero.
    pub fn discard(&self, region: usize, runs: &[PageRun]) -> Result<(), InstallError> {
        let plan = self.checked(region, runs)?;
        let mut runs = runs.to_vec();
        normalise(&mut runs);
        let mut uncovered = Vec::new();
        for span in runs.iter().map(|&run| plan.region.span(run)) {
            for (part, piece) in plan.pieces(span) {
                let run = plan.region.run(piece.addr, piece.end());
                match part.segment.kind {
                    _ if let Some(huge) = &part.huge => self.discard_huge(plan, part, huge, piece)?,
                    Kind::Anonymous => uncovered.push(run),
                    Kind::Common => self.overwrite(piece)?,
                    Kind::Shared => self.punch(plan, part, piece)?,
                    Kind::Private => self.discard_private(plan, part, run, &mut uncovered)?,
                }
            }
        }
        self.give_back(plan, &uncovered)
    }

    /// Drops a process's own copies of pages of a file that it maps privately: they are the file's again.
    pub fn uncover(&self, region: usize, runs: &[PageRun]) -> Result<(), InstallError> {
        let plan = self.checked(region, runs)?;
        let spans: Vec<Span> = runs.iter().map(|&run| plan.region.span(run)).collect();
        for chunk in spans.chunks(MAX_RANGES) {
            if let Some(kept) = self.dontneed(chunk)?.first() {
                let source = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
                return Err(InstallError::Fill { pid: self.process.pid(), addr: kept.addr, source });
            }
        }
        Ok(())
    }

    fn punch(&self, plan: &Plan, part: &Part, piece: Span) -> Result<(), InstallError> {
        let offset = part.segment.offset + (piece.addr - part.segment.start);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = part.file.as_ref().map(|file| fallocate(file, flags, offset, piece.len));
        // A file system without holes, or a sealed or read-only file: the bytes are what counts.
        if matches!(punched, Some(Ok(()))) { Ok(()) } else { self.zero_shared(plan, part, piece) }
    }

    /// Zeros over what of a shared file has data, mapped here or not.
    fn zero_shared(&self, plan: &Plan, part: &Part, piece: Span) -> Result<(), InstallError> {
        let run = plan.region.run(piece.addr, piece.end());
        for data in self.data(plan, part, run)? {
            self.overwrite(plan.region.span(data))?;
        }
        Ok(())
    }

    /// Zeros where the file has data; the rest is left to the caller.
    fn discard_private(
        &self,
        plan: &Plan,
        part: &Part,
        run: PageRun,
        uncovered: &mut Vec<PageRun>,
    ) -> Result<(), InstallError> {
        let data = self.data(plan, part, run)?;
        difference(&[run], &data, uncovered);
        for span in data.into_iter().map(|data| plan.region.span(data)) {
            let mut at = span.addr;
            while part.way == Way::Fill && at < span.end() {
                at += self.zero_absent(Span { addr: at, len: span.end() - at })?;
                if at < span.end() {
                    self.overwrite(Span { addr: at, len: PAGE })?;
                    at += PAGE;
                }
            }
            self.overwrite(Span { addr: at, len: span.end() - at })?;
        }
        Ok(())
    }

    /// What of a run has data in the file behind it.
    fn data(&self, plan: &Plan, part: &Part, run: PageRun) -> Result<Vec<PageRun>, InstallError> {
        let (mut data, mut within) = (Vec::new(), Vec::new());
        if let Some(file) = &part.file {
            let found = |start, end| data.push(plan.region.run(start, end));
            part.segment.data(&self.process, file, part.segment.start..part.segment.end, found)?;
        }
        intersection(&data, &[run], &mut within);
        Ok(within)
    }

    /// Pages with nothing under them: long runs are given back if they are many, all else becomes zeros.
    fn give_back(&self, plan: &Plan, runs: &[PageRun]) -> Result<(), InstallError> {
        let (long, mut rest): (Vec<PageRun>, Vec<PageRun>) =
            runs.iter().partition(|run| run.pages >= LONG_RUN_PAGES);
        if long.iter().map(|run| run.pages).sum::<u64>() < ATTACH_PAGES {
            rest.extend(long);
        } else {
            let spans: Vec<Span> = long.iter().map(|&run| plan.region.span(run)).collect();
            for chunk in spans.chunks(MAX_RANGES) {
                let kept = self.dontneed(chunk)?;
                rest.extend(kept.iter().map(|s| plan.region.run(s.addr, s.end())));
            }
        }
        for span in rest.into_iter().map(|run| plan.region.span(run)) {
            self.zero_present(plan, span)?;
        }
        Ok(())
    }

    /// Gives spans back; those that were not, because the kernel refuses (locked memory) or no thread could be had.
    pub(crate) fn dontneed<'a>(&self, spans: &'a [Span]) -> Result<&'a [Span], InstallError> {
        match self.attach.dontneed(&self.process, spans) {
            Ok(done) => Ok(&spans[done.ranges.min(spans.len())..]),
            Err(e @ AttachError::Gone { .. }) => Err(e.into()),
            Err(error) => {
                tracing::debug!(%error, "memory is not given back, zeros are written instead");
                Ok(spans)
            }
        }
    }

    fn zero_present(&self, plan: &Plan, span: Span) -> Result<(), InstallError> {
        for run in self.present(plan, span)? {
            self.overwrite(plan.region.span(run))?;
        }
        Ok(())
    }

    pub(crate) fn overwrite(&self, span: Span) -> Result<(), InstallError> {
        let mut at = span.addr;
        while at < span.end() {
            let len = (span.end() - at).min(ZEROS.len() as u64);
            self.write(&[Span { addr: at, len }], &ZEROS[..len as usize])?;
            at += len;
        }
        Ok(())
    }
}
