//! The writable working set of a VM (Clark et al., NSDI 2005, section 4): how many pages it writes in a window of time,
//! which ones, and what a pre-copy would make of it.
//!
//! Whoever measures says which pages were written in each interval. From that come the growth of the set of written pages with
//! the window, the hot regions, the cost to the guest ([`Pace`]) and what pre-copies over given links would do ([`predict`]).

mod curve;
mod pace;
mod prediction;

pub use curve::Curve;
pub use pace::{FIRST_WRITE, Pace, cost_share};
pub use prediction::{Ending, Path, Prediction, predict};

use crate::units::Pages;
use std::time::Duration;

/// Most intervals of one measurement: an hour of seconds. Each page remembers its last one in 16 bits.
pub const INTERVALS_MAX: u16 = 3600;
/// Pages whose writes are counted together: 1 MiB, finer than any region that is worth telling.
const CHUNK_PAGES: u64 = 256;

/// Neighbouring pages of one block that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which block, in the order in which they were given.
    pub block: usize,
    /// Index of the first page in it.
    pub first: u64,
    /// How many pages.
    pub pages: u64,
}

/// How many pages were written when an interval was not over yet.
#[derive(Clone, Copy, Debug)]
pub struct Glimpse {
    /// Which of the glimpses of an interval: those of the same number belong together.
    pub slot: usize,
    /// Time since the interval began.
    pub after: Duration,
    /// Pages written so far.
    pub pages: Pages,
}

/// How many different pages are written in a window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GrowthPoint {
    /// Length of the window, averaged over all windows.
    pub window: Duration,
    /// Pages written at least once in it, averaged over all windows.
    pub pages: f64,
    /// How many windows there were.
    pub windows: u32,
}

/// A part of a block that is written more than others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HotRegion {
    /// Which block.
    pub block: usize,
    /// Index of its first page in the block.
    pub first: u64,
    /// Its length in pages.
    pub pages: u64,
    /// Pages of it that were written at least once.
    pub written: Pages,
    /// Its part of all writes, between 0 and 1. A page counts once in each interval in which it was written.
    pub share: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    time: Duration,
    pages: u64,
    count: u32,
}

impl Mean {
    fn add(&mut self, time: Duration, pages: u64) {
        self.time += time;
        self.pages += pages;
        self.count += 1;
    }

    fn point(&self) -> Option<GrowthPoint> {
        let window = self.time.checked_div(self.count)?;
        Some(GrowthPoint { window, pages: self.pages as f64 / f64::from(self.count), windows: self.count })
    }
}

/// Windows of 2^n intervals, one after the other.
#[derive(Clone, Copy, Debug)]
struct Level {
    /// First interval of the window that goes on.
    begins: u16,
    time: Duration,
    pages: u64,
    done: Mean,
}

#[derive(Clone, Debug)]
struct Block {
    /// For each page the interval in which it was last written, from 1; 0 for never.
    last: Vec<u16>,
    /// For each chunk how often its pages were written.
    writes: Vec<u64>,
}

/// What was written in one measurement. It takes two bytes for each page of the VM.
#[derive(Clone, Debug)]
pub struct WorkingSet {
    blocks: Vec<Block>,
    levels: Vec<Level>,
    glimpses: Vec<Mean>,
    intervals: u16,
    elapsed: Duration,
    writes: u64,
    unique: u64,
}

impl WorkingSet {
    /// A measurement of a VM whose blocks have so many pages.
    pub fn new(blocks: impl IntoIterator<Item = Pages>) -> Self {
        let block = |pages: Pages| Block {
            last: vec![0; pages.0 as usize],
            writes: vec![0; pages.0.div_ceil(CHUNK_PAGES) as usize],
        };
        let level = Level { begins: 1, time: Duration::ZERO, pages: 0, done: Mean::default() };
        let levels = vec![level; INTERVALS_MAX.ilog2() as usize + 1];
        Self {
            blocks: blocks.into_iter().map(block).collect(),
            levels,
            glimpses: Vec::new(),
            intervals: 0,
            elapsed: Duration::ZERO,
            writes: 0,
            unique: 0,
        }
    }

    /// Takes in an interval; how many pages were written in it. No page may be in two runs. What is beyond the end of a block
    /// and intervals beyond the last are left out.
    pub fn add(
        &mut self,
        length: Duration,
        runs: impl IntoIterator<Item = Run>,
        glimpses: &[Glimpse],
    ) -> Pages {
        if self.is_full() {
            return Pages(0);
        }
        self.intervals += 1;
        self.elapsed += length;
        // How many pages are new in the windows of the first n levels, and not in those of the others.
        let mut new = vec![0u64; self.levels.len() + 1];
        let mut pages = 0;
        for run in runs {
            let Some(block) = self.blocks.get_mut(run.block) else { continue };
            for page in run.first..run.first.saturating_add(run.pages).min(block.last.len() as u64) {
                let last = &mut block.last[page as usize];
                new[self.levels.partition_point(|level| level.begins > *last)] += 1;
                self.unique += u64::from(*last == 0);
                *last = self.intervals;
                block.writes[(page / CHUNK_PAGES) as usize] += 1;
                pages += 1;
            }
        }
        self.writes += pages;
        self.count(length, &new);
        for glimpse in glimpses {
            let slots = self.glimpses.len().max(glimpse.slot + 1);
            self.glimpses.resize(slots, Mean::default());
            self.glimpses[glimpse.slot].add(glimpse.after, glimpse.pages.0);
        }
        Pages(pages)
    }

    fn count(&mut self, length: Duration, new: &[u64]) {
        let mut more: u64 = new.iter().sum();
        for (n, level) in self.levels.iter_mut().enumerate() {
            more -= new[n];
            level.time += length;
            level.pages += more;
            if self.intervals.is_multiple_of(1 << n) {
                level.done.add(level.time, level.pages);
                (level.time, level.pages, level.begins) = (Duration::ZERO, 0, self.intervals + 1);
            }
        }
    }

    /// Whether it takes no further interval.
    pub fn is_full(&self) -> bool {
        self.intervals >= INTERVALS_MAX
    }

    /// Intervals so far.
    pub fn intervals(&self) -> u16 {
        self.intervals
    }

    /// Length of all intervals together.
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// Pages written in each interval, added up over all.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Pages of the VM.
    pub fn total(&self) -> Pages {
        Pages(self.blocks.iter().map(|block| block.last.len() as u64).sum())
    }

    /// Pages that were written at least once.
    pub fn unique(&self) -> Pages {
        Pages(self.unique)
    }

    /// How the set of written pages grows with the window: glimpses, then 1, 2, 4, ... intervals, then the whole measurement.
    /// Ascending; never fewer pages in a longer window.
    pub fn growth(&self) -> Vec<GrowthPoint> {
        let whole = Mean { time: self.elapsed, pages: self.unique, count: u32::from(self.intervals > 0) };
        let means = self.glimpses.iter().chain(self.levels.iter().map(|level| &level.done)).chain([&whole]);
        let mut points: Vec<GrowthPoint> = means.filter_map(Mean::point).collect();
        points.sort_by(|a, b| a.window.cmp(&b.window).then(b.windows.cmp(&a.windows)));
        points.dedup_by_key(|point| point.window);
        let mut most: f64 = 0.0;
        for point in &mut points {
            most = most.max(point.pages);
            point.pages = most;
        }
        points
    }

    /// The same as a curve, for windows of any length.
    pub fn curve(&self) -> Curve {
        Curve::new(self.growth().iter().map(|point| (point.window, point.pages)), self.total())
    }

    /// The parts that are written most, at most `count` of them, the hottest first. A part is neighbouring stretches of 1 MiB
    /// that are each written at least half as often as such a stretch is on average, if it is written at all.
    pub fn hot_regions(&self, count: usize) -> Vec<HotRegion> {
        let written =
            self.blocks.iter().flat_map(|block| &block.writes).filter(|writes| **writes > 0).count();
        if written == 0 {
            return Vec::new();
        }
        let hot = (self.writes / written as u64 / 2).max(1);
        let mut regions: Vec<HotRegion> = Vec::new();
        for (at, block) in self.blocks.iter().enumerate() {
            let mut chunk = 0;
            while chunk < block.writes.len() {
                let long = block.writes[chunk..].iter().take_while(|writes| **writes >= hot).count();
                if long > 0 {
                    regions.push(self.region(at, chunk, long));
                }
                chunk += long.max(1);
            }
        }
        regions.sort_by(|a, b| b.share.total_cmp(&a.share));
        regions.truncate(count);
        regions
    }

    /// The region of these chunks, from its first page that was written to its last.
    fn region(&self, at: usize, chunk: usize, chunks: usize) -> HotRegion {
        let block = &self.blocks[at];
        let from = chunk * CHUNK_PAGES as usize;
        let to = (from + chunks * CHUNK_PAGES as usize).min(block.last.len());
        let written = |last: &u16| *last > 0;
        let pages = &block.last[from..to];
        let first = from + pages.iter().position(written).unwrap_or(0);
        let end = from + pages.iter().rposition(written).map_or(0, |last| last + 1);
        let writes: u64 = block.writes[chunk..chunk + chunks].iter().sum();
        HotRegion {
            block: at,
            first: first as u64,
            pages: end.saturating_sub(first) as u64,
            written: Pages(pages.iter().filter(|last| written(last)).count() as u64),
            share: writes as f64 / self.writes.max(1) as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SECOND: Duration = Duration::from_secs(1);

    fn run(block: usize, first: u64, pages: u64) -> Run {
        Run { block, first, pages }
    }

    #[test]
    fn a_set_that_is_written_again_and_again_does_not_grow() {
        let mut set = WorkingSet::new([Pages(1000)]);
        for _ in 0..8 {
            assert_eq!(set.add(SECOND, [run(0, 100, 50)], &[]), Pages(50));
        }
        let growth = set.growth();
        assert_eq!(growth.iter().map(|p| p.window.as_secs()).collect::<Vec<_>>(), [1, 2, 4, 8]);
        assert_eq!(growth.iter().map(|p| p.windows).collect::<Vec<_>>(), [8, 4, 2, 1]);
        assert!(growth.iter().all(|p| p.pages == 50.0), "{growth:?}");
        assert_eq!((set.writes(), set.unique(), set.intervals()), (400, Pages(50), 8));
    }

    #[test]
    fn a_set_that_moves_on_grows_with_the_window() {
        let mut set = WorkingSet::new([Pages(1000)]);
        for n in 0..6 {
            set.add(SECOND, [run(0, n * 10, 10)], &[]);
        }
        let growth: Vec<_> = set.growth().iter().map(|p| (p.window.as_secs(), p.pages)).collect();
        assert_eq!(growth, [(1, 10.0), (2, 20.0), (4, 40.0), (6, 60.0)]);
    }

    #[test]
    fn glimpses_tell_of_windows_shorter_than_the_interval() {
        let mut set = WorkingSet::new([Pages(100)]);
        let glimpse = |ms, pages| Glimpse { slot: 0, after: Duration::from_millis(ms), pages: Pages(pages) };
        set.add(SECOND, [run(0, 0, 20)], &[glimpse(90, 10)]);
        set.add(SECOND, [run(0, 0, 20)], &[glimpse(110, 14)]);
        let first = set.growth()[0];
        assert_eq!(first, GrowthPoint { window: Duration::from_millis(100), pages: 12.0, windows: 2 });
        assert!((set.curve().pages_in(Duration::from_millis(50)) - 6.0).abs() < 1e-9);
    }

    #[test]
    fn hot_regions_are_told_with_their_bounds_and_share() {
        let mut set = WorkingSet::new([Pages(64 * 256), Pages(300)]);
        for _ in 0..10 {
            set.add(SECOND, [run(0, 2 * 256 + 8, 1000), run(0, 40 * 256, 4), run(1, 0, 300)], &[]);
        }
        let regions = set.hot_regions(10);
        let told: Vec<_> = regions.iter().map(|r| (r.block, r.first, r.pages, r.written.0)).collect();
        assert_eq!(told[0], (0, 520, 1000, 1000));
        assert_eq!(told[1], (1, 0, 256, 256), "the rest of it is lukewarm");
        assert_eq!(told.len(), 2, "four pages are not hot: {regions:?}");
        assert!((regions[0].share - 1000.0 / 1304.0).abs() < 1e-9);
        assert_eq!(set.hot_regions(1).len(), 1);
        assert_eq!(WorkingSet::new([Pages(9)]).hot_regions(3), []);
    }

    #[test]
    fn what_is_beyond_a_block_or_the_last_interval_is_left_out() {
        let mut set = WorkingSet::new([Pages(10)]);
        assert_eq!(set.add(SECOND, [run(0, 8, u64::MAX), run(7, 0, 5)], &[]), Pages(2));
        for _ in 1..INTERVALS_MAX {
            set.add(SECOND, [run(0, 0, 1)], &[]);
        }
        assert!(set.is_full());
        assert_eq!(set.add(SECOND, [run(0, 0, 1)], &[]), Pages(0));
        assert_eq!(set.intervals(), INTERVALS_MAX);
    }

    fn intervals() -> impl Strategy<Value = Vec<BTreeSet<u64>>> {
        prop::collection::vec(prop::collection::btree_set(0u64..600, 0..40), 1..40)
    }

    proptest! {
        /// The growth is what sets of pages say, window by window, and never falls.
        #[test]
        fn growth_agrees_with_sets_and_is_monotonic(intervals in intervals()) {
            let mut set = WorkingSet::new([Pages(300), Pages(300)]);
            for pages in &intervals {
                let runs = pages.iter().map(|page| run((page / 300) as usize, page % 300, 1));
                prop_assert_eq!(set.add(SECOND, runs, &[]), Pages(pages.len() as u64));
            }
            let unions = |size: usize| -> Vec<usize> {
                intervals.chunks_exact(size).map(|w| w.iter().flatten().collect::<BTreeSet<_>>().len()).collect()
            };
            let mut most = 0.0f64;
            for point in set.growth() {
                let unions = unions(point.window.as_secs() as usize);
                let mean = unions.iter().sum::<usize>() as f64 / unions.len() as f64;
                most = most.max(mean);
                prop_assert!((point.pages - most).abs() < 1e-9, "{point:?}, {mean}");
            }
            prop_assert_eq!(set.unique().0 as usize, intervals.iter().flatten().collect::<BTreeSet<_>>().len());
            let shares: f64 = set.hot_regions(usize::MAX).iter().map(|r| r.share).sum();
            prop_assert!(shares <= 1.0 + 1e-9);
        }
    }
}
