//! Sets of pages as sorted, disjoint runs: small, because what a guest writes is clustered.

use sterna_memory::PageRun;

/// What is to be sent, block by block.
#[derive(Clone, Debug, Default)]
pub(crate) struct SendSet {
    /// Pages whose content is read and sent, one list a block.
    pub(crate) pages: Vec<Vec<PageRun>>,
    /// Pages that were sent before and have become holes, one list a block.
    pub(crate) holes: Vec<Vec<PageRun>>,
    /// Pages that were sent before and are sent again only if they differ from that, one list a block.
    pub(crate) suspects: Vec<Vec<PageRun>>,
    /// Stripes that the guest writes most, where that is known, one list a block: they go last, and by then it shows which of their
    /// pages would be sent twice.
    pub(crate) hot: Vec<Vec<u64>>,
}

impl SendSet {
    pub(crate) fn new(blocks: usize) -> Self {
        let none = || vec![Vec::new(); blocks];
        Self { pages: none(), holes: none(), suspects: none(), hot: vec![Vec::new(); blocks] }
    }

    /// Pages to be read and sent.
    pub(crate) fn page_count(&self) -> u64 {
        self.pages.iter().flatten().map(|run| run.pages).sum()
    }

    /// Forgets what is known of a block.
    pub(crate) fn clear(&mut self, block: usize) {
        for lists in [&mut self.pages, &mut self.holes, &mut self.suspects] {
            lists[block].clear();
        }
    }

    /// Adds what a later scan of `block` has found. What it says of a page replaces what was known of it.
    pub(crate) fn add(&mut self, block: usize, pages: &[PageRun], holes: &[PageRun]) {
        let written = subtract(&self.pages[block], holes);
        self.pages[block] = merge(&written, pages);
        let still = subtract(&self.holes[block], pages);
        self.holes[block] = merge(&still, holes);
    }
}

/// Sorted and disjoint, from runs in any order that may overlap.
fn normalised(mut runs: Vec<PageRun>) -> Vec<PageRun> {
    runs.sort_unstable();
    let mut out: Vec<PageRun> = Vec::with_capacity(runs.len());
    for run in runs {
        match out.last_mut() {
            Some(last) if run.first <= last.end() => last.pages = last.end().max(run.end()) - last.first,
            _ => out.push(run),
        }
    }
    out
}

/// Pages in either list.
pub(crate) fn merge(a: &[PageRun], b: &[PageRun]) -> Vec<PageRun> {
    match (a.is_empty(), b.is_empty()) {
        (true, _) => normalised(b.to_vec()),
        (_, true) => normalised(a.to_vec()),
        _ => normalised([a, b].concat()),
    }
}

/// Everything that comes and goes with these pages, which are `granule` at a time from the first page on.
pub(crate) fn rounded(runs: &[PageRun], granule: u64) -> Vec<PageRun> {
    let whole = |run: &PageRun| {
        let first = run.first / granule * granule;
        PageRun { first, pages: run.end().next_multiple_of(granule) - first }
    };
    normalised(runs.iter().map(whole).collect())
}

/// Pages in both lists, which are sorted and disjoint.
pub(crate) fn intersect(a: &[PageRun], b: &[PageRun]) -> Vec<PageRun> {
    let (mut out, mut at) = (Vec::new(), 0);
    for run in a {
        while at < b.len() && b[at].end() <= run.first {
            at += 1;
        }
        for other in b[at..].iter().take_while(|other| other.first < run.end()) {
            let first = run.first.max(other.first);
            out.push(PageRun { first, pages: run.end().min(other.end()) - first });
        }
    }
    out
}

/// Pages of `a` that are not in `b`; both are sorted and disjoint.
pub(crate) fn subtract(a: &[PageRun], b: &[PageRun]) -> Vec<PageRun> {
    let (mut out, mut at) = (Vec::new(), 0);
    for run in a {
        while at < b.len() && b[at].end() <= run.first {
            at += 1;
        }
        let mut first = run.first;
        for other in b[at..].iter().take_while(|other| other.first < run.end()) {
            if other.first > first {
                out.push(PageRun { first, pages: other.first - first });
            }
            first = first.max(other.end());
        }
        if first < run.end() {
            out.push(PageRun { first, pages: run.end() - first });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(bits: u32) -> Vec<PageRun> {
        let mut out = Vec::new();
        for page in (0..32).filter(|page| bits & (1 << page) != 0) {
            sterna_memory::append_run(&mut out, PageRun { first: page, pages: 1 });
        }
        out
    }

    fn bits(runs: &[PageRun]) -> u32 {
        runs.iter().flat_map(|run| run.first..run.end()).fold(0, |bits, page| {
            assert_eq!(bits & (1 << page), 0, "{runs:?} overlap");
            bits | 1 << page
        })
    }

    #[test]
    fn runs_behave_as_sets() {
        let mut seed = 1u32;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 17;
            seed ^= seed << 5;
            seed
        };
        for _ in 0..2000 {
            let (a, b) = (random() & random(), random() | random());
            assert_eq!(bits(&merge(&runs(a), &runs(b))), a | b);
            assert_eq!(bits(&intersect(&runs(a), &runs(b))), a & b);
            assert_eq!(bits(&subtract(&runs(a), &runs(b))), a & !b);
        }
    }

    #[test]
    fn what_comes_together_is_taken_together() {
        assert_eq!(bits(&rounded(&runs(0b0010_0001_0000), 4)), 0b1111_1111_0000);
        assert_eq!(bits(&rounded(&runs(0b1_0000_1000_0000_0001), 8)), 0xff_ffff);
        assert_eq!(bits(&rounded(&runs(0b1011), 1)), 0b1011);
        assert_eq!(rounded(&[], 512), []);
    }

    #[test]
    fn the_latest_scan_decides_what_a_page_is() {
        let mut set = SendSet::new(1);
        set.add(0, &runs(0b1111), &runs(0b110000));
        set.add(0, &runs(0b10000), &runs(0b11));
        assert_eq!(bits(&set.pages[0]), 0b11100);
        assert_eq!(bits(&set.holes[0]), 0b100011);
        assert_eq!(set.page_count(), 3);
    }
}
