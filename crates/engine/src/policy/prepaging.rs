//! Adaptive pre-paging: in which order the source pushes what the target still misses (Hines and Gopalan, VEE 2009, "Post-copy based
//! live virtual machine migration using adaptive pre-paging and dynamic self-ballooning", section on adaptive pre-paging).
//!
//! A fault says where the guest is, and what lies around it is likely to be touched next. So each fault is a *pivot*, and pushing bubbles
//! outwards from several of them at once: there are as many as a guest has streams of work, and the oldest makes room. Faults that walk
//! forward are a stream, and only what is ahead of it is pushed. When no pivot has anything near, a sweep goes over all that is left.

use super::prepaging_set::PageSet;
use std::ops::Range;

/// Most pivots at once: as many places as a guest works at together. More would push no page earlier than the sweep does.
const PIVOTS_MAX: usize = 8;
/// Most pages that a pivot pushes in a turn: so little that a new pivot gets its turn within a millisecond on a link of 1 Gbit/s.
const CHUNK_PAGES: u64 = 16;
/// How far a fault may lie beyond an edge and still move that pivot.
const AHEAD_PAGES: u64 = 64;
/// How far an edge skips over what was sent already. What is further away has nothing to do with the fault.
const SKIP_PAGES: u64 = 512;
/// One turn in so many goes to other pivots while the guest walks along a stream: it may be about to overtake what is pushed ahead of it.
const STREAM_TURNS: u64 = 8;
/// One turn in so many goes backward: programs walk forward more often.
const TURNS: u32 = 4;

/// Pages of one block that are to be pushed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Place of the block in the offer.
    pub block: u16,
    /// Index of the first page.
    pub first: u64,
    /// How many pages.
    pub pages: u64,
}

/// Where a fault was, and how far pushing has come around it. All blocks lie behind each other in one space of places.
#[derive(Clone, Debug)]
struct Pivot {
    /// The block's places.
    block: Range<u64>,
    /// The latest fault.
    fault: u64,
    /// From its backward to its forward edge: what was pushed, or was there.
    low: u64,
    high: u64,
    /// Whether there is anything to push beyond the edge.
    backward: bool,
    forward: bool,
    /// Whether its faults walk forward.
    stream: bool,
    turns: u32,
    /// When it was faulted on last.
    used: u64,
}

/// The pages that the target still misses, in the order in which they are pushed.
#[derive(Clone, Debug)]
pub struct Prepaging {
    wanted: PageSet,
    /// All that were ever wanted.
    told: PageSet,
    /// The places of each block: it begins a word.
    blocks: Vec<Range<u64>>,
    pivots: Vec<Pivot>,
    /// Whose turn it is.
    turn: usize,
    faults: u64,
    takes: u64,
    /// Where the sweep is.
    sweep: u64,
}

impl Prepaging {
    /// Nothing is wanted yet of blocks that have so many pages.
    pub fn new(block_pages: impl IntoIterator<Item = u64>) -> Self {
        let mut end = 0u64;
        let blocks = block_pages.into_iter().map(|pages| {
            let start = end.next_multiple_of(u64::from(u64::BITS));
            end = start + pages;
            start..end
        });
        let blocks = blocks.collect();
        let (wanted, told) = (PageSet::new(end), PageSet::new(end));
        Self { wanted, told, blocks, pivots: Vec::new(), turn: 0, faults: 0, takes: 0, sweep: 0 }
    }

    /// How many pages are still to be pushed.
    pub fn remaining(&self) -> u64 {
        self.wanted.len()
    }

    /// Whether this page was to be pushed, and has been taken or sent. One that nobody wanted pushed has not.
    pub fn is_taken(&self, block: u16, page: u64) -> bool {
        let place = self.places(block, page, 1).start;
        self.told.next(place) == Some(place) && self.wanted.next(place) != Some(place)
    }

    /// Whether the latest fault was one of a guest that walks along a stream.
    pub fn is_streaming(&self) -> bool {
        self.latest_stream().is_some()
    }

    /// Wants these pages pushed. Those that no block has are left out.
    pub fn want(&mut self, block: u16, first: u64, pages: u64) {
        let places = self.places(block, first, pages);
        self.wanted.insert(places.start, places.end);
        self.told.insert(places.start, places.end);
    }

    /// These pages were sent in another way, or are wanted no more.
    pub fn sent(&mut self, block: u16, first: u64, pages: u64) {
        let places = self.places(block, first, pages);
        self.wanted.remove(places.start, places.end);
    }

    /// The guest waits for this page: what is around it comes first from now on.
    pub fn fault(&mut self, block: u16, page: u64) {
        let places = self.places(block, page, 1);
        if places.is_empty() {
            return;
        }
        self.faults += 1;
        let (place, used) = (places.start, self.faults);
        if let Some(pivot) = self.pivots.iter_mut().find(|pivot| pivot.is_near(place)) {
            pivot.move_to(place, &self.wanted);
            pivot.used = used;
            return;
        }
        let oldest = (0..self.pivots.len()).min_by_key(|&at| self.pivots[at].used);
        if let Some(oldest) = oldest.filter(|_| self.pivots.len() == PIVOTS_MAX) {
            self.retire(oldest);
        }
        let block = self.blocks[usize::from(block)].clone();
        let pivot = Pivot {
            block,
            fault: place,
            low: place,
            high: place + 1,
            backward: true,
            forward: true,
            stream: false,
            turns: 0,
            used,
        };
        // The guest waits there now: it is the next.
        self.turn = self.turn.min(self.pivots.len());
        self.pivots.insert(self.turn, pivot);
    }

    /// Takes the pages that are to be pushed next, `most` of them at most. None when nothing is wanted.
    pub fn take(&mut self, most: u64) -> Option<Chunk> {
        if most == 0 || self.wanted.len() == 0 {
            return None;
        }
        self.takes += 1;
        if let Some(stream) = self.latest_stream().filter(|_| !self.takes.is_multiple_of(STREAM_TURNS)) {
            self.turn = stream;
        }
        while !self.pivots.is_empty() {
            self.turn %= self.pivots.len();
            let pivot = &mut self.pivots[self.turn];
            if let Some(places) = pivot.take(&self.wanted, most.min(CHUNK_PAGES)) {
                self.turn += 1;
                return Some(self.chunk(places));
            }
            self.retire(self.turn);
        }
        let first = self.wanted.next(self.sweep).or_else(|| self.wanted.next(0))?;
        let limit = self.blocks[self.block_of(first)].end.min(first.saturating_add(most));
        let end = self.wanted.run_end(first, limit);
        self.sweep = end;
        Some(self.chunk(first..end))
    }

    /// The stream along which the guest walks just now: the last fault was of it.
    fn latest_stream(&self) -> Option<usize> {
        let latest = (0..self.pivots.len()).max_by_key(|&at| self.pivots[at].used);
        latest.filter(|&at| self.pivots[at].stream && self.pivots[at].used == self.faults)
    }

    fn retire(&mut self, at: usize) {
        self.pivots.remove(at);
        if at < self.turn {
            self.turn -= 1;
        }
    }

    fn chunk(&mut self, places: Range<u64>) -> Chunk {
        self.wanted.remove(places.start, places.end);
        let block = self.block_of(places.start);
        let (first, pages) = (places.start - self.blocks[block].start, places.end - places.start);
        Chunk { block: block as u16, first, pages }
    }

    /// The block that has this place, which is a page's.
    fn block_of(&self, place: u64) -> usize {
        self.blocks.partition_point(|block| block.end <= place)
    }

    /// The places of a run, as far as its block goes.
    fn places(&self, block: u16, first: u64, pages: u64) -> Range<u64> {
        let Some(block) = self.blocks.get(usize::from(block)) else { return 0..0 };
        let within = |page: u64| block.start + page.min(block.end - block.start);
        within(first)..within(first.saturating_add(pages))
    }
}

impl Pivot {
    /// Whether a fault here belongs to it: in what it pushed, which may be on its way, or a little beyond its forward edge.
    fn is_near(&self, place: u64) -> bool {
        let beyond = if self.forward { AHEAD_PAGES } else { 0 };
        (self.low..self.block.end.min(self.high + beyond)).contains(&place)
    }

    fn move_to(&mut self, place: u64, wanted: &PageSet) {
        self.stream |= self.fault < place && self.forward;
        self.fault = place;
        if wanted.next(place + 1).is_some_and(|next| next < self.high) {
            // What was pushed here was lost, or given back since: it begins anew.
            (self.low, self.high) = (place, place + 1);
            (self.backward, self.forward) = (true, true);
        }
        self.high = self.high.max(place + 1);
    }

    /// The next places around it; none when nothing wanted is near any more.
    fn take(&mut self, wanted: &PageSet, most: u64) -> Option<Range<u64>> {
        self.turns = self.turns.wrapping_add(1);
        if self.stream {
            return self.take_forward(wanted, most);
        }
        if self.turns.is_multiple_of(TURNS) {
            return self.take_backward(wanted, most).or_else(|| self.take_forward(wanted, most));
        }
        self.take_forward(wanted, most).or_else(|| self.take_backward(wanted, most))
    }

    fn take_forward(&mut self, wanted: &PageSet, most: u64) -> Option<Range<u64>> {
        let limit = self.block.end.min(self.high + SKIP_PAGES);
        let first = wanted.next(self.high).filter(|&first| self.forward && first < limit);
        self.forward = first.is_some();
        let first = first?;
        self.high = wanted.run_end(first, self.block.end.min(first + most));
        Some(first..self.high)
    }

    fn take_backward(&mut self, wanted: &PageSet, most: u64) -> Option<Range<u64>> {
        let limit = self.block.start.max(self.low.saturating_sub(SKIP_PAGES));
        let last = wanted.previous(self.low).filter(|&last| self.backward && last >= limit);
        self.backward = last.is_some();
        let last = last?;
        self.low = wanted.run_start(last, self.block.start.max((last + 1).saturating_sub(most)));
        Some(self.low..last + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Everything of these blocks is wanted.
    fn full(blocks: &[u64]) -> Prepaging {
        let mut pages = Prepaging::new(blocks.iter().copied());
        (0..blocks.len()).for_each(|at| pages.want(at as u16, 0, blocks[at]));
        pages
    }

    fn chunk(block: u16, first: u64, pages: u64) -> Option<Chunk> {
        Some(Chunk { block, first, pages })
    }

    #[test]
    fn without_faults_it_sweeps_and_remembers_where_it_was() {
        let mut pages = full(&[100, 0, 64]);
        assert_eq!(pages.take(80), chunk(0, 0, 80));
        pages.want(0, 10, 5);
        assert_eq!(pages.take(80), chunk(0, 80, 20), "a chunk is of one block");
        assert_eq!(pages.take(80), chunk(2, 0, 64));
        assert_eq!(pages.remaining(), 5);
        assert_eq!(pages.take(0), None);
        assert_eq!(pages.take(u64::MAX), chunk(0, 10, 5));
        assert_eq!(pages.take(80), None);
    }

    #[test]
    fn pushing_bubbles_outwards_from_a_fault() {
        let mut pages = full(&[1000]);
        pages.sent(0, 500, 1);
        pages.fault(0, 500);
        let order = (0..5).map(|_| pages.take(256).unwrap().first).collect::<Vec<_>>();
        assert_eq!(order, [501, 517, 533, 484, 549], "three turns forward, one backward");
    }

    #[test]
    fn pivots_take_turns_and_the_newest_begins() {
        let mut pages = full(&[10_000]);
        [1000, 3000, 5000].iter().for_each(|&page| pages.fault(0, page));
        let order = (0..6).map(|_| pages.take(256).unwrap().first).collect::<Vec<_>>();
        assert_eq!(order, [5001, 3001, 1001, 5017, 3017, 1017]);
        pages.fault(0, 7000);
        assert_eq!(pages.take(256), chunk(0, 7001, 16));
    }

    #[test]
    fn the_oldest_pivot_makes_room() {
        let mut pages = full(&[100_000]);
        (1..=PIVOTS_MAX as u64).for_each(|at| pages.fault(0, at * 5000));
        pages.fault(0, 5000);
        pages.fault(0, 90_000);
        let taken = (0..PIVOTS_MAX).map(|_| pages.take(256).unwrap().first).collect::<BTreeSet<_>>();
        assert!(taken.contains(&5001) && taken.contains(&90_001));
        assert!(!taken.contains(&10_001), "the one that was not used for longest");
    }

    #[test]
    fn a_stream_moves_its_pivot_and_goes_forward_only() {
        let mut pages = full(&[10_000]);
        pages.fault(0, 500);
        pages.fault(0, 520);
        let order = (0..8).map(|_| pages.take(256).unwrap().first).collect::<Vec<_>>();
        assert_eq!(order, [521, 537, 553, 569, 585, 601, 617, 633]);
        assert_eq!(pages.pivots.len(), 1);
    }

    #[test]
    fn the_stream_that_the_guest_walks_along_goes_first() {
        let mut pages = full(&[100_000]);
        [70_000, 80_000, 500, 520].iter().for_each(|&page| pages.fault(0, page));
        let order = (0..64).map(|_| pages.take(256).unwrap().first).collect::<Vec<_>>();
        assert_eq!(order.iter().filter(|first| **first < 10_000).count(), 56);
        pages.fault(0, 90_000);
        let order = (0..8).map(|_| pages.take(256).unwrap().first).collect::<Vec<_>>();
        assert!(order.iter().filter(|first| **first < 10_000).count() <= 3, "it has gone elsewhere");
    }

    #[test]
    fn what_was_taken_or_sent_is_not_wanted() {
        let mut pages = full(&[100]);
        assert!(!pages.is_taken(0, 0) && !pages.is_taken(0, 100) && !pages.is_taken(1, 0));
        pages.take(10);
        pages.sent(0, 50, 1);
        assert!(pages.is_taken(0, 9) && !pages.is_taken(0, 10), "what was sent is taken");
        assert!(pages.is_taken(0, 50), "what was sent in another way too");
        assert!(!Prepaging::new([100]).is_taken(0, 50), "what nobody wanted is not");
    }

    #[test]
    fn an_edge_skips_what_was_sent_but_not_far() {
        let mut pages = full(&[10_000]);
        pages.fault(0, 0);
        pages.sent(0, 1, 100);
        assert_eq!(pages.take(256), chunk(0, 101, 16));
        pages.sent(0, 117, SKIP_PAGES);
        assert_eq!(pages.take(256), chunk(0, 0, 1), "the sweep, that pivot has ended");
        assert!(pages.pivots.is_empty());
    }

    #[test]
    fn what_no_block_has_is_left_out() {
        let mut pages = Prepaging::new([10, 64]);
        pages.want(0, 5, u64::MAX);
        pages.want(0, u64::MAX, 9);
        pages.want(7, 0, 9);
        pages.fault(0, 10);
        pages.fault(9, 0);
        assert_eq!((pages.remaining(), pages.pivots.len()), (5, 0));
        assert_eq!(pages.take(99), chunk(0, 5, 5));
        assert_eq!(Prepaging::new([]).take(1), None);
    }

    /// How many pages of `touched` were pushed before the guest came to them. It takes a page's time of the link for two pages, and stands
    /// still for eight when it faults.
    fn pushed_in_time(touched: &[u64], told: bool) -> usize {
        const BLOCK: u64 = 200_000;
        let (mut pages, mut link, mut there) = (full(&[BLOCK]), 0, vec![false; BLOCK as usize]);
        let mut in_time = 0;
        for (at, &page) in touched.iter().enumerate() {
            link += (at % 2) as u64;
            if there[page as usize] {
                in_time += 1;
            } else {
                there[page as usize] = true;
                pages.sent(0, page, 1);
                if told {
                    pages.fault(0, page);
                }
                link += 8;
            }
            while link > 0 {
                let Some(chunk) = pages.take(link.min(64)) else { break };
                link -= chunk.pages;
                (chunk.first..chunk.first + chunk.pages).for_each(|page| there[page as usize] = true);
            }
        }
        in_time
    }

    #[test]
    fn a_sequential_writer_finds_its_pages_there() {
        let writer = (100_000..110_000).collect::<Vec<_>>();
        let (adaptive, sweep) = (pushed_in_time(&writer, true), pushed_in_time(&writer, false));
        assert!(adaptive > 8000, "{adaptive} of 10000");
        assert!(sweep < 1000, "{sweep} of 10000");
    }

    #[test]
    fn four_writers_at_once_find_their_pages_there() {
        let writer = (0..10_000).map(|at| 50_000 + at % 4 * 30_000 + at / 4).collect::<Vec<_>>();
        let (adaptive, sweep) = (pushed_in_time(&writer, true), pushed_in_time(&writer, false));
        assert!(adaptive > 7000, "{adaptive} of 10000");
        assert!(sweep < 4000, "{sweep} of 10000");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Want(u16, u64, u64),
        Sent(u16, u64, u64),
        Fault(u16, u64),
        Take(u64),
    }

    fn any_steps() -> impl Strategy<Value = Vec<Step>> {
        let run = || (0u16..4, 0u64..3000, 1u64..900);
        let step = prop_oneof![
            run().prop_map(|(block, first, pages)| Step::Want(block, first, pages)),
            run().prop_map(|(block, first, pages)| Step::Sent(block, first, pages / 20 + 1)),
            (0u16..4, 0u64..3000).prop_map(|(block, page)| Step::Fault(block, page)),
            (1u64..300).prop_map(Step::Take),
            (1u64..300).prop_map(Step::Take),
        ];
        prop::collection::vec(step, 0..120)
    }

    proptest! {
        /// Every page that is wanted is taken once, unless it was sent; nothing else is ever taken.
        #[test]
        fn every_wanted_page_is_taken_once(steps in any_steps(), sizes in prop::collection::vec(0u64..3000, 1..4)) {
            let (mut pages, mut model) = (Prepaging::new(sizes.iter().copied()), BTreeSet::new());
            let within = |block: u16, first: u64, pages: u64| {
                let size = sizes.get(usize::from(block)).copied().unwrap_or(0);
                (first.min(size)..(first + pages).min(size)).map(move |page| (block, page))
            };
            let take = |pages: &mut Prepaging, model: &mut BTreeSet<(u16, u64)>, most| {
                let taken = pages.take(most);
                prop_assert_eq!(taken.is_none(), model.is_empty());
                if let Some(Chunk { block, first, pages }) = taken {
                    prop_assert!((1..=most).contains(&pages));
                    for page in first..first + pages {
                        prop_assert!(model.remove(&(block, page)), "page {} of block {}", page, block);
                    }
                }
                prop_assert_eq!(pages.remaining(), model.len() as u64);
                Ok(())
            };
            for step in steps {
                match step {
                    Step::Want(block, first, count) => {
                        pages.want(block, first, count);
                        model.extend(within(block, first, count));
                    }
                    Step::Sent(block, first, count) => {
                        pages.sent(block, first, count);
                        within(block, first, count).for_each(|page| { model.remove(&page); });
                    }
                    Step::Fault(block, page) => pages.fault(block, page),
                    Step::Take(most) => take(&mut pages, &mut model, most)?,
                }
                prop_assert!(pages.pivots.len() <= PIVOTS_MAX);
            }
            while !model.is_empty() {
                take(&mut pages, &mut model, 50)?;
            }
            prop_assert_eq!(pages.take(1), None);
        }

        /// Whatever was faulted on, pushed and wanted again before: what follows a fault is pushed before every pivot had its turn twice.
        #[test]
        fn what_follows_a_fault_comes_soon(steps in any_steps(), page in 0u64..2999) {
            let mut pages = full(&[3000, 3000, 3000, 3000]);
            for step in steps {
                match step {
                    Step::Want(block, first, count) => pages.want(block, first, count),
                    Step::Sent(block, first, count) => pages.sent(block, first, count),
                    Step::Fault(block, page) => pages.fault(block, page),
                    Step::Take(most) => drop(pages.take(most)),
                }
            }
            pages.want(0, page + 1, 1);
            pages.fault(0, page);
            let follows = |chunk: Chunk| chunk.block == 0 && (chunk.first..chunk.first + chunk.pages).contains(&(page + 1));
            prop_assert!((0..2 * PIVOTS_MAX).any(|_| pages.take(256).is_some_and(follows)));
        }

        /// A whole drain looks at no more than a few words for each word and each chunk.
        #[test]
        fn a_drain_costs_what_it_takes(faults in prop::collection::vec((0u16..3, 0u64..50_000), 0..300), gap in 1u64..200) {
            let mut pages = Prepaging::new([50_000, 50_000, 50_000]);
            for block in 0..3 {
                (0..50_000 / gap).for_each(|at| pages.want(block, at * gap, gap.div_ceil(2)));
            }
            pages.wanted.visits.set(0);
            let (words, mut takes, mut faults) = (3 * 50_000 / 64, 0, faults.into_iter());
            loop {
                if let Some((block, page)) = faults.next() {
                    pages.fault(block, page);
                }
                takes += 1;
                if pages.take(256).is_none() {
                    break;
                }
            }
            let visits = pages.wanted.visits.get();
            // Ways up and down four levels, a removal, and the edges that find nothing, once each.
            prop_assert!(visits <= 4 * words + 40 * takes + 16 * 300, "{} visits, {} takes", visits, takes);
        }
    }
}
