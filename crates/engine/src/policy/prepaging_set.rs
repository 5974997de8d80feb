//! A set of pages in which the next member in either direction is found in a few words, however far away it is.
//!
//! A bitmap, above it a bitmap of its words that are not empty, and so on up to one word. A page that is put in or taken out touches
//! the levels above only when its word was, or becomes, empty.

/// Bits of a word.
const WORD: u64 = 64;

/// A set of numbers below a size.
#[derive(Clone, Debug)]
pub(super) struct PageSet {
    /// The members first, the single word last.
    levels: Vec<Vec<u64>>,
    len: u64,
    /// How many words were looked at.
    #[cfg(test)]
    pub(super) visits: std::cell::Cell<u64>,
}

impl PageSet {
    /// An empty set of numbers below `size`.
    pub(super) fn new(size: u64) -> Self {
        let mut levels = Vec::new();
        let mut bits = size;
        loop {
            bits = bits.div_ceil(WORD).max(1);
            levels.push(vec![0; bits as usize]);
            if bits == 1 {
                break;
            }
        }
        #[cfg(test)]
        let visits = std::cell::Cell::new(0);
        Self {
            levels,
            len: 0,
            #[cfg(test)]
            visits,
        }
    }

    /// How many members it has.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    fn word(&self, level: usize, at: u64) -> u64 {
        #[cfg(test)]
        self.visits.set(self.visits.get() + 1);
        self.levels[level].get(at as usize).copied().unwrap_or(0)
    }

    /// Puts the numbers from `first` up to `end` in.
    pub(super) fn insert(&mut self, first: u64, end: u64) {
        let (mut first, mut end) = (first, end);
        for level in 0..self.levels.len() {
            if first >= end {
                return;
            }
            for at in first / WORD..=(end - 1) / WORD {
                let old = self.word(level, at);
                let new = old | mask(at, first, end);
                self.levels[level][at as usize] = new;
                if level == 0 {
                    self.len += u64::from(new.count_ones() - old.count_ones());
                }
            }
            (first, end) = (first / WORD, (end - 1) / WORD + 1);
        }
    }

    /// Takes the numbers from `first` up to `end` out.
    pub(super) fn remove(&mut self, first: u64, end: u64) {
        let (mut first, mut end) = (first, end);
        for level in 0..self.levels.len() {
            if first >= end {
                return;
            }
            let (low, high) = (first / WORD, (end - 1) / WORD);
            for at in low..=high {
                let old = self.word(level, at);
                let new = old & !mask(at, first, end);
                self.levels[level][at as usize] = new;
                if level == 0 {
                    self.len -= u64::from(old.count_ones() - new.count_ones());
                }
            }
            // All between the outer two words are empty now.
            first = low + u64::from(self.word(level, low) != 0);
            end = high + u64::from(self.word(level, high) == 0);
        }
    }

    /// The first member from `from` on.
    pub(super) fn next(&self, from: u64) -> Option<u64> {
        let mut at = from;
        for level in 0..self.levels.len() {
            let rest = self.word(level, at / WORD) >> (at % WORD);
            if rest != 0 {
                at += u64::from(rest.trailing_zeros());
                for lower in (0..level).rev() {
                    at = at * WORD + u64::from(self.word(lower, at).trailing_zeros());
                }
                return Some(at);
            }
            at = at / WORD + 1;
        }
        None
    }

    /// The last member below `end`.
    pub(super) fn previous(&self, end: u64) -> Option<u64> {
        let mut end = end.min(self.levels[0].len() as u64 * WORD);
        for level in 0..self.levels.len() {
            let mut at = end.checked_sub(1)?;
            let rest = self.word(level, at / WORD) << (WORD - 1 - at % WORD);
            if rest != 0 {
                at -= u64::from(rest.leading_zeros());
                for lower in (0..level).rev() {
                    at = at * WORD + WORD - 1 - u64::from(self.word(lower, at).leading_zeros());
                }
                return Some(at);
            }
            end = at / WORD;
        }
        None
    }

    /// Where the members from `first` on end, which is one; not after `limit`.
    pub(super) fn run_end(&self, first: u64, limit: u64) -> u64 {
        let mut at = first;
        while at < limit {
            let run = u64::from((self.word(0, at / WORD) >> (at % WORD)).trailing_ones());
            at += run;
            if run == 0 || !at.is_multiple_of(WORD) {
                break;
            }
        }
        at.min(limit)
    }

    /// Where the members up to `last`, which is one, begin; not before `limit`.
    pub(super) fn run_start(&self, last: u64, limit: u64) -> u64 {
        let mut at = last + 1;
        while at > limit {
            let below = at - 1;
            let word = self.word(0, below / WORD) << (WORD - 1 - below % WORD);
            let run = u64::from(word.leading_ones());
            at -= run;
            if run == 0 || !at.is_multiple_of(WORD) {
                break;
            }
        }
        at.max(limit)
    }
}

/// The bits of word `at` that are numbers from `first` up to `end`, some of which are in it.
fn mask(at: u64, first: u64, end: u64) -> u64 {
    let low = first.saturating_sub(at * WORD).min(WORD - 1);
    let high = (at * WORD + WORD).saturating_sub(end).min(WORD - 1);
    (u64::MAX << low) & (u64::MAX >> high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_far_member_is_found_in_a_few_words() {
        let mut set = PageSet::new(1 << 28);
        set.insert((1 << 28) - 1, 1 << 28);
        set.visits.set(0);
        assert_eq!(set.next(0), Some((1 << 28) - 1));
        assert_eq!(set.previous((1 << 28) - 1), None);
        assert!(set.visits.get() <= 15, "{} words", set.visits.get());
        assert_eq!(PageSet::new(0).next(0), None);
        assert_eq!(PageSet::new(0).previous(9), None);
    }

    proptest! {
        /// It does what a tree of numbers does.
        #[test]
        fn it_is_a_set(steps in prop::collection::vec((any::<bool>(), 0u64..9000, 1u64..700), 0..40), size in 1u64..9000, asked in prop::collection::vec(0u64..9000, 20)) {
            let (mut set, mut model) = (PageSet::new(size), BTreeSet::new());
            for (put, first, pages) in steps {
                let (first, end) = (first.min(size), (first + pages).min(size));
                if put {
                    set.insert(first, end);
                    model.extend(first..end);
                } else {
                    set.remove(first, end);
                    model.retain(|at| !(first..end).contains(at));
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            for at in asked {
                let next = model.range(at..).next().copied();
                let previous = model.range(..at).next_back().copied();
                prop_assert_eq!(set.next(at), next);
                prop_assert_eq!(set.previous(at), previous);
                if let Some(first) = next {
                    let end = (first..first + 100).find(|at| !model.contains(at)).unwrap_or(first + 100);
                    prop_assert_eq!(set.run_end(first, first + 100), end);
                }
                if let Some(last) = previous {
                    let limit = last.saturating_sub(100);
                    let start = (limit..last).rev().find(|at| !model.contains(at)).map_or(limit, |at| at + 1);
                    prop_assert_eq!(set.run_start(last, limit), start);
                }
            }
        }
    }
}
