//! Memory whose pages tell whether they are lost, stale, torn or in the wrong place.
//!
//! Each page holds, as 64-bit words: its counter, its number mixed with the seed, incompressible content that follows from
//! both of these, and its counter again as the last word. A write raises the counter and touches the first and the last
//! word (sparse) or the whole page (dense, mixed). Whoever writes in passes keeps memory in the shape of the step that QEMU's own
//! migration test looks for: counters fall at most once on the way through the pages, and by one.

/// Words in a page of 4 KiB, the page of x86.
pub const PAGE_WORDS: usize = 512;
/// Pages in a MiB.
pub const PAGES_PER_MIB: usize = 256;
const COUNTER: usize = 0;
const NUMBER: usize = 1;
const CONTENT: usize = 2;
const LAST: usize = PAGE_WORDS - 1;

/// How much of a page a write changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// Two words.
    Sparse,
    /// All of it, computed anew.
    Dense,
    /// All of it, by mixing a word into each: several times faster, as fast as memory is overwritten on an emulated processor.
    Mixed,
}

/// What is wrong with a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bad {
    /// Which page.
    pub page: usize,
    /// In what way.
    pub what: String,
}

/// The memory.
#[derive(Debug)]
pub struct Pages {
    words: Vec<u64>,
    /// What each counter must be. It would have to go wrong in the same way as the page to hide a fault.
    expected: Vec<u64>,
    /// The counter with which a page's content was made.
    content_of: Vec<u64>,
    /// What was mixed into the content since then.
    mixed: Vec<u64>,
    seed: u64,
}

impl Pages {
    /// So many pages, filled.
    #[must_use]
    pub fn filled(count: usize, seed: u64) -> Pages {
        let mut pages = Pages {
            words: vec![0; count * PAGE_WORDS],
            expected: vec![0; count],
            content_of: vec![0; count],
            mixed: vec![0; count],
            seed,
        };
        (0..count).for_each(|page| pages.fill(page));
        pages
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.expected.len()
    }

    /// Raises a page's counter.
    pub fn write(&mut self, page: usize, how: Write) {
        self.expected[page] += 1;
        match how {
            Write::Dense => self.fill(page),
            Write::Sparse => self.count_on(page),
            Write::Mixed => {
                let word = Noise::new(self.expected[page]).next();
                self.mixed[page] ^= word;
                self.page_mut(page)[CONTENT..LAST].iter_mut().for_each(|w| *w ^= word);
                self.count_on(page);
            }
        }
    }

    fn count_on(&mut self, page: usize) {
        let counter = self.expected[page];
        let words = self.page_mut(page);
        words[COUNTER] = counter;
        words[LAST] = counter;
    }

    /// Looks at the words that every write changes.
    pub fn check_edges(&self, page: usize) -> Result<(), Bad> {
        let (words, expected) = (self.page(page), self.expected[page]);
        let bad = |what: String| Err(Bad { page, what });
        if words[NUMBER] != self.mark(page) {
            return bad(format!("number {:#x} instead of {:#x}", words[NUMBER], self.mark(page)));
        }
        if words[COUNTER] != expected {
            return bad(format!("counter {} instead of {expected}", words[COUNTER]));
        }
        if words[LAST] != expected {
            return bad(format!("torn: last word {} instead of {expected}", words[LAST]));
        }
        Ok(())
    }

    /// Looks at every word.
    pub fn check_whole(&self, page: usize) -> Result<(), Bad> {
        self.check_edges(page)?;
        let (mut noise, mixed) = (self.noise(page), self.mixed[page]);
        let wrong = self.page(page)[CONTENT..LAST].iter().position(|w| *w != noise.next() ^ mixed);
        match wrong {
            Some(word) => Err(Bad { page, what: format!("content differs at word {}", word + CONTENT) }),
            None => Ok(()),
        }
    }

    /// Counters over a range of pages written in passes must fall at most once, by one.
    pub fn check_step(&self, pages: std::ops::Range<usize>) -> Result<(), Bad> {
        let mut steps = 0;
        for page in pages.start + 1..pages.end {
            let (before, here) = (self.page(page - 1)[COUNTER], self.page(page)[COUNTER]);
            steps += u32::from(here != before);
            if (here != before && here.checked_add(1) != Some(before)) || steps > 1 {
                return Err(Bad { page, what: format!("a second step: counter {here} after {before}") });
            }
        }
        Ok(())
    }

    fn fill(&mut self, page: usize) {
        let counter = self.expected[page];
        self.content_of[page] = counter;
        self.mixed[page] = 0;
        let (mark, mut noise) = (self.mark(page), self.noise(page));
        let words = self.page_mut(page);
        words[CONTENT..LAST].fill_with(|| noise.next());
        words[NUMBER] = mark;
        words[COUNTER] = counter;
        words[LAST] = counter;
    }

    fn page(&self, page: usize) -> &[u64] {
        &self.words[page * PAGE_WORDS..][..PAGE_WORDS]
    }

    fn page_mut(&mut self, page: usize) -> &mut [u64] {
        &mut self.words[page * PAGE_WORDS..][..PAGE_WORDS]
    }

    fn mark(&self, page: usize) -> u64 {
        Noise::new(self.seed ^ page as u64).next()
    }

    fn noise(&self, page: usize) -> Noise {
        Noise::new(self.mark(page) ^ self.content_of[page].rotate_left(32))
    }
}

/// Marsaglia's xorshift64: incompressible, repeatable, three shifts a word.
#[derive(Debug, Clone)]
pub struct Noise(u64);

impl Noise {
    /// From a seed; zero, which xorshift never leaves, is moved away.
    #[must_use]
    pub fn new(seed: u64) -> Noise {
        let mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Noise(if mixed == 0 { 1 } else { mixed })
    }

    /// The next word.
    #[expect(clippy::should_implement_trait, reason = "it never ends, so an Option would be noise")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_right() {
        let mut pages = Pages::filled(8, 7);
        pages.write(3, Write::Sparse);
        pages.write(4, Write::Dense);
        pages.write(5, Write::Mixed);
        pages.write(5, Write::Mixed);
        pages.write(6, Write::Mixed);
        pages.write(6, Write::Dense);
        (0..8).for_each(|p| pages.check_whole(p).unwrap());
    }

    #[test]
    fn a_lost_page_and_a_misplaced_one_show() {
        let mut pages = Pages::filled(8, 7);
        pages.page_mut(2).fill(0);
        let other: Vec<u64> = pages.page(6).to_vec();
        pages.page_mut(5).copy_from_slice(&other);
        assert_eq!(pages.check_edges(2).unwrap_err().page, 2);
        assert_eq!(pages.check_edges(5).unwrap_err().page, 5);
        pages.check_edges(6).unwrap();
    }

    #[test]
    fn a_stale_page_shows() {
        for how in [Write::Sparse, Write::Dense, Write::Mixed] {
            let mut pages = Pages::filled(4, 1);
            let old: Vec<u64> = pages.page(1).to_vec();
            pages.write(1, how);
            pages.page_mut(1).copy_from_slice(&old);
            assert!(pages.check_edges(1).unwrap_err().what.contains("counter 0 instead of 1"));
        }
    }

    #[test]
    fn a_changed_bit_shows() {
        let mut pages = Pages::filled(2, 1);
        pages.page_mut(1)[77] ^= 1;
        pages.check_edges(1).unwrap();
        assert!(pages.check_whole(1).unwrap_err().what.contains("word 77"));
    }

    #[test]
    fn mixing_changes_every_word_and_a_changed_bit_still_shows() {
        let mut pages = Pages::filled(1, 1);
        let old: Vec<u64> = pages.page(0).to_vec();
        pages.write(0, Write::Mixed);
        assert!(pages.page(0)[CONTENT..].iter().zip(&old[CONTENT..]).all(|(new, old)| new != old));
        pages.page_mut(0)[77] ^= 1;
        assert!(pages.check_whole(0).unwrap_err().what.contains("word 77"));
    }

    #[test]
    fn passes_make_one_step_and_a_stale_page_a_second() {
        let mut pages = Pages::filled(10, 1);
        (0..6).for_each(|p| pages.write(p, Write::Sparse));
        pages.check_step(0..10).unwrap();
        pages.page_mut(2)[COUNTER] = 0;
        pages.check_step(0..10).unwrap_err();
    }

    #[test]
    fn noise_of_different_pages_differs() {
        let pages = Pages::filled(2, 0);
        assert_ne!(pages.page(0)[CONTENT..], pages.page(1)[CONTENT..]);
    }
}
