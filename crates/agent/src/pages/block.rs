//! A block of RAM at the source, and what the target has of it.

use std::sync::atomic::{AtomicU64, Ordering};
use sterna_memory::{Backing, PAGE, PageRun, Region};
use xxhash_rust::xxh3::xxh3_64;

/// Which pages of a block the target may hold as anything but zero: a bit each.
#[derive(Debug)]
pub(crate) struct SentPages(Vec<AtomicU64>);

impl SentPages {
    pub(crate) fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    pub(super) fn set(&self, page: u64, sent: bool) {
        let (word, bit) = (&self.0[(page / 64) as usize], 1 << (page % 64));
        match sent {
            true => word.fetch_or(bit, Ordering::Relaxed),
            false => word.fetch_and(!bit, Ordering::Relaxed),
        };
    }

    /// The target has content in these pages that we have not sent.
    pub(super) fn set_runs(&self, runs: &[PageRun]) {
        runs.iter().flat_map(|run| run.first..run.end()).for_each(|page| self.set(page, true));
    }

    pub(super) fn has(&self, page: u64) -> bool {
        self.0[(page / 64) as usize].load(Ordering::Relaxed) & (1 << (page % 64)) != 0
    }

    /// All of them as runs.
    pub(crate) fn runs(&self) -> Vec<PageRun> {
        let mut out = Vec::new();
        for (at, word) in self.0.iter().enumerate() {
            let mut left = word.load(Ordering::Relaxed);
            let mut page = at as u64 * 64;
            while left != 0 {
                let skip = left.trailing_zeros();
                left = left.checked_shr(skip).unwrap_or(0);
                page += u64::from(skip);
                let pages = left.trailing_ones();
                sterna_memory::append_run(&mut out, PageRun { first: page, pages: pages.into() });
                left = left.checked_shr(pages).unwrap_or(0);
                page += u64::from(pages);
            }
        }
        out
    }
}

/// What the pages of a block were when they were last sent: a hash each, 8 bytes for 4096. Two contents of a page have the
/// same once in 2^64 tries; who could make them so is the guest, to itself.
#[derive(Debug)]
pub(crate) struct SentHashes(Vec<AtomicU64>);

impl SentHashes {
    pub(crate) fn new(pages: u64) -> Self {
        Self((0..pages).map(|_| AtomicU64::new(0)).collect())
    }

    /// Notes what the page is now; true when it was that before.
    pub(super) fn note(&self, page: u64, content: &[u8]) -> bool {
        let hash = xxh3_64(content);
        self.0[page as usize].swap(hash, Ordering::Relaxed) == hash
    }
}

/// A block of RAM that travels.
#[derive(Debug)]
pub(crate) struct SourceBlock {
    /// Its place in the offer.
    pub(crate) index: u16,
    /// Where it is in the QEMU.
    pub(crate) region: Region,
    /// What it is made of.
    pub(crate) backing: Backing,
    /// Which of its pages it has in common with others ([`sterna_memory::common`]).
    pub(crate) common: Vec<PageRun>,
    /// Whether the target proves it equal when asked: not what it makes anew from its own firmware files.
    pub(crate) provable: bool,
    /// What the target holds of it.
    pub(crate) sent: SentPages,
    /// What that was, where it must be known.
    pub(crate) hashes: Option<SentHashes>,
}

impl SourceBlock {
    /// The same block, of which the target holds nothing.
    pub(crate) fn another(&self) -> Self {
        let pages = self.region.bytes.div_ceil(PAGE);
        let hashes = self.hashes.as_ref().map(|_| SentHashes::new(pages));
        let Self { index, region, backing, provable, .. } = *self;
        let common = self.common.clone();
        Self { index, region, backing, common, provable, sent: SentPages::new(pages), hashes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sent_pages_come_back_as_runs() {
        let sent = SentPages::new(200);
        for page in [0, 1, 2, 63, 64, 65, 128, 199] {
            sent.set(page, true);
        }
        sent.set(1, false);
        let runs: Vec<_> = sent.runs().iter().map(|run| (run.first, run.pages)).collect();
        assert_eq!(runs, [(0, 1), (2, 1), (63, 3), (128, 1), (199, 1)]);
        let full = SentPages::new(128);
        (0..128).for_each(|page| full.set(page, true));
        assert_eq!(full.runs(), [PageRun { first: 0, pages: 128 }]);
    }
}
