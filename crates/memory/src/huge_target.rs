//! Huge pages of hugetlbfs at the target: pages come and go in pieces of 4 KiB, memory comes and goes in huge pages alone.
//!
//! Writing the first piece takes a huge page; discarding the last one that is not zero gives it back, so that the target
//! never holds more than the source. Pieces of one huge page may come from several threads: what it holds is noted in a bit a
//! piece, and given back only while nobody installs.
//!
//! | memory | a piece is discarded | a huge page is given back |
//! |---|---|---|
//! | shared | by zeros | by punching it out of the file |
//! | private, nothing in the file | by zeros | by an injected `madvise(MADV_DONTNEED)`, one attach for many |
//! | private, the file has the page | by zeros | never: that would uncover the file's bytes |
//!
//! Punching a file's hole drops private pages over it too, but those of every process that maps the file: QEMU does that, we do
//! not. `MADV_DONTNEED` of a part of a huge page does nothing and says that it worked.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{FallocateFlags, fallocate};

use crate::backing::{Kind, Segment};
use crate::copy::CopyError;
use crate::huge;
use crate::install::{InstallError, Installer, Part, Plan};
use crate::page::{PAGE, PageRun, Region, Span};
use crate::process::Process;
use crate::sys::pagemap::PageMap;

/// Huge pages that wait to be given back by one attach, which takes a millisecond: 128 MiB in pages of 2 MiB.
const WAITING_MAX: usize = 64;

/// What the huge pages of a part of a region hold.
pub(crate) struct HugePages {
    /// Size of one in bytes.
    page: u64,
    /// Address of the first one, which may begin before the part.
    base: u64,
    /// A bit for each piece of 4 KiB that may differ from zero.
    held: Vec<AtomicU64>,
    /// Addresses of those that the file has under a private mapping.
    under: Vec<(u64, u64)>,
    /// Shared by those who install and discard, taken alone by who gives back.
    gate: RwLock<()>,
    /// Addresses of private huge pages that hold nothing any more.
    waiting: Mutex<Vec<u64>>,
}

impl HugePages {
    pub(crate) fn open(
        process: &Process,
        region: &Region,
        segment: &Segment,
        page: u64,
    ) -> Result<HugePages, InstallError> {
        let base = segment.start - segment.offset % page;
        let pieces = (segment.end - base).next_multiple_of(page) / PAGE;
        let held = (0..pieces.div_ceil(u64::BITS.into())).map(|_| AtomicU64::new(0)).collect();
        let mut under = Vec::new();
        if segment.kind == Kind::Private {
            huge::in_file(process, segment, page, |start, end| under.push((start, end)))?;
        }
        let (gate, waiting) = (RwLock::default(), Mutex::default());
        let pages = HugePages { page, base, held, under, gate, waiting };
        let mut there = Vec::new();
        let pagemap = process.open_proc("pagemap")?;
        huge::populated(&mut PageMap::new(pagemap), process, region, segment, page, &mut there)
            .map_err(InstallError::from)?;
        there.iter().for_each(|run| pages.note(region.span(*run)));
        Ok(pages)
    }

    fn pieces(&self, span: Span) -> std::ops::Range<u64> {
        (span.addr - self.base) / PAGE..(span.end() - self.base) / PAGE
    }

    fn bit(&self, piece: u64) -> (&AtomicU64, u64) {
        let bits = u64::from(u64::BITS);
        (&self.held[(piece / bits) as usize], 1 << (piece % bits))
    }

    fn note(&self, span: Span) {
        for piece in self.pieces(span) {
            let (word, bit) = self.bit(piece);
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Forgets what the span holds; the runs that it held.
    fn forget(&self, span: Span) -> Vec<Span> {
        let mut held: Vec<Span> = Vec::new();
        for piece in self.pieces(span) {
            let (word, bit) = self.bit(piece);
            if word.fetch_and(!bit, Ordering::Relaxed) & bit == 0 {
                continue;
            }
            let addr = self.base + piece * PAGE;
            match held.last_mut() {
                Some(last) if last.end() == addr => last.len += PAGE,
                _ => held.push(Span { addr, len: PAGE }),
            }
        }
        held
    }

    fn is_empty(&self, addr: u64) -> bool {
        self.pieces(Span { addr, len: self.page }).all(|piece| {
            let (word, bit) = self.bit(piece);
            word.load(Ordering::Relaxed) & bit == 0
        })
    }

    /// The addresses of the huge pages that a span touches.
    fn touched(&self, span: Span) -> impl Iterator<Item = u64> + use<> {
        let (page, base) = (self.page, self.base);
        ((span.addr - base) / page..(span.end() - base).div_ceil(page)).map(move |at| base + at * page)
    }

    fn covers_file(&self, addr: u64) -> bool {
        self.under.iter().any(|&(start, end)| start < addr + self.page && addr < end)
    }

    /// A lock guards no data of its own, so that a panic elsewhere has spoilt nothing.
    fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Installer {
    /// Says that a region reads as zero everywhere: whoever looked knows it, and huge pages need not be kept for what they held.
    pub fn is_zero_now(&self, region: usize) {
        for part in self.regions.get(region).into_iter().flat_map(|plan| &plan.parts) {
            let Some(huge) = &part.huge else { continue };
            huge.held.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        }
    }

    pub(crate) fn place_huge(&self, huge: &HugePages, addr: u64, bytes: &[u8]) -> Result<(), InstallError> {
        let span = Span { addr, len: bytes.len() as u64 };
        let _entered = huge.enter();
        huge.note(span);
        match self.write(&[span], bytes) {
            // The memory is mapped, as looking at it has shown: what can be missing is a huge page.
            Err(InstallError::Copy(CopyError::Fault { pid, addr, source })) => {
                Err(InstallError::HugePage { pid, addr, source })
            }
            result => result,
        }
    }

    pub(crate) fn discard_huge(
        &self,
        plan: &Plan,
        part: &Part,
        huge: &HugePages,
        span: Span,
    ) -> Result<(), InstallError> {
        let entered = huge.enter();
        let held = huge.forget(span);
        for span in &held {
            let done = self.overwrite(*span);
            if done.is_err() {
                huge.note(*span);
            }
            done?;
        }
        drop(entered);
        let mut emptied: Vec<u64> = held.iter().flat_map(|span| huge.touched(*span)).collect();
        emptied.dedup();
        emptied.retain(|addr| is_whole(plan, part, huge, *addr) && huge.is_empty(*addr));
        match part.segment.kind {
            Kind::Shared => emptied.into_iter().for_each(|addr| punch(part, huge, addr)),
            _ => self.let_wait(huge, emptied)?,
        }
        Ok(())
    }

    /// Private huge pages are given back many at a time.
    fn let_wait(&self, huge: &HugePages, mut emptied: Vec<u64>) -> Result<(), InstallError> {
        emptied.retain(|addr| !huge.covers_file(*addr));
        let many = {
            let mut waiting = huge.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.extend(emptied);
            waiting.len() >= WAITING_MAX
        };
        if many { self.give_waiting_back(huge) } else { Ok(()) }
    }

    /// Gives back what waits for it.
    pub(crate) fn give_huge_back(&self) -> Result<(), InstallError> {
        let parts = self.regions.iter().flat_map(|plan| &plan.parts);
        parts.filter_map(|part| part.huge.as_ref()).try_for_each(|huge| self.give_waiting_back(huge))
    }

    fn give_waiting_back(&self, huge: &HugePages) -> Result<(), InstallError> {
        let waiting = std::mem::take(&mut *huge.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        if waiting.is_empty() || !self.process.is_alive() {
            return Ok(());
        }
        let _alone = huge.close();
        // Written again meanwhile, or given back twice: only what is empty now goes.
        let mut empty: Vec<u64> = waiting.into_iter().filter(|addr| huge.is_empty(*addr)).collect();
        empty.sort_unstable();
        empty.dedup();
        let spans: Vec<Span> = empty.into_iter().map(|addr| Span { addr, len: huge.page }).collect();
        // What the kernel does not take back stays as zeros.
        self.dontneed(&spans).map(drop)
    }
}

/// Whether a huge page lies in the part, and the part in the region: what is beside it is not ours to give back.
fn is_whole(plan: &Plan, part: &Part, huge: &HugePages, addr: u64) -> bool {
    let run = PageRun { first: addr.saturating_sub(plan.region.base) / PAGE, pages: huge.page / PAGE };
    addr >= part.segment.start && addr + huge.page <= part.segment.end && plan.region.holds(run)
}

/// Takes an empty huge page out of a shared file. Where it cannot be, it stays as zeros.
fn punch(part: &Part, huge: &HugePages, addr: u64) {
    let _alone = huge.close();
    if let (true, Some(file)) = (huge.is_empty(addr), &part.file) {
        let offset = part.segment.offset + (addr - part.segment.start);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = fallocate(file, flags, offset, huge.page) {
            tracing::debug!(%error, "an empty huge page stays");
        }
    }
}
