//! Pages, runs of pages and regions: the units in which memory is named here.

/// Size of a page in bytes, the grain of tracking, copying and discarding.
///
/// x86-64 has no other base page; memory in huge pages is still tracked and copied in this grain.
pub const PAGE: u64 = 4096;

/// Pages compared by [`is_zero`] between two looks at the result: long enough for wide vector code, short enough that a
/// page which differs at its start is given up at once.
const ZERO_STRIDE: usize = 256;

/// A run of neighbouring pages, as page indexes within one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRun {
    /// Index of the first page.
    pub first: u64,
    /// How many pages, never zero in what this crate returns.
    pub pages: u64,
}

impl PageRun {
    /// Index of the first page after the run (saturating, so that a hostile run cannot wrap around).
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }

    /// Length in bytes (saturating).
    pub fn bytes(&self) -> u64 {
        self.pages.saturating_mul(PAGE)
    }
}

/// A RAM block in another process's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// Address of its first byte in that process (host virtual address), a multiple of [`PAGE`].
    pub base: u64,
    /// Length in bytes, a multiple of [`PAGE`].
    pub bytes: u64,
}

impl Region {
    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE
    }

    /// Address of the first byte after it (saturating).
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.bytes)
    }

    /// Whether base and length are whole pages and the region neither is empty nor wraps around.
    pub fn is_valid(&self) -> bool {
        self.base.is_multiple_of(PAGE)
            && self.bytes.is_multiple_of(PAGE)
            && self.bytes > 0
            && self.base.checked_add(self.bytes).is_some()
    }

    /// Whether the run lies within it and is not empty.
    pub fn holds(&self, run: PageRun) -> bool {
        run.pages > 0 && run.first.checked_add(run.pages).is_some_and(|end| end <= self.pages())
    }

    /// Where the run lies in the process's address space. The run must be one that [`Region::holds`].
    pub fn span(&self, run: PageRun) -> Span {
        Span { addr: self.base.saturating_add(run.first.saturating_mul(PAGE)), len: run.bytes() }
    }

    /// The run of this region's pages that cover the addresses `start..end`, both within the region.
    pub(crate) fn run(&self, start: u64, end: u64) -> PageRun {
        PageRun { first: (start - self.base) / PAGE, pages: (end - start) / PAGE }
    }
}

/// A stretch of another process's address space, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// Address of the first byte.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Span {
    /// Address of the first byte after it (saturating).
    pub fn end(&self) -> u64 {
        self.addr.saturating_add(self.len)
    }
}

/// Appends a run to an ascending list, joined with the last one when they touch.
pub fn append_run(runs: &mut Vec<PageRun>, run: PageRun) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first => last.pages += run.pages,
        _ if run.pages == 0 => {}
        _ => runs.push(run),
    }
}

/// Sorts runs and joins those that overlap or touch.
pub(crate) fn normalise(runs: &mut Vec<PageRun>) {
    runs.sort_unstable();
    let mut kept = 0;
    for i in 0..runs.len() {
        let run = runs[i];
        if kept > 0 && run.first <= runs[kept - 1].end() {
            let last = &mut runs[kept - 1];
            last.pages = last.pages.max(run.end() - last.first);
        } else {
            runs[kept] = run;
            kept += 1;
        }
    }
    runs.truncate(kept);
}

/// What of `a` is not in `b`. Both ascending and disjoint.
pub(crate) fn difference(a: &[PageRun], b: &[PageRun], out: &mut Vec<PageRun>) {
    let mut skip = 0;
    for run in a {
        let mut at = run.first;
        while skip < b.len() && b[skip].end() <= at {
            skip += 1;
        }
        let mut i = skip;
        while i < b.len() && b[i].first < run.end() {
            if b[i].first > at {
                out.push(PageRun { first: at, pages: b[i].first - at });
            }
            at = at.max(b[i].end());
            i += 1;
        }
        if at < run.end() {
            out.push(PageRun { first: at, pages: run.end() - at });
        }
    }
}

/// What is in both. Both ascending and disjoint.
pub(crate) fn intersection(a: &[PageRun], b: &[PageRun], out: &mut Vec<PageRun>) {
    let (mut i, mut j) = (0, 0);
    while i < a.len() && j < b.len() {
        let first = a[i].first.max(b[j].first);
        let end = a[i].end().min(b[j].end());
        if first < end {
            append_run(out, PageRun { first, pages: end - first });
        }
        if a[i].end() < b[j].end() { i += 1 } else { j += 1 }
    }
}

/// How many pages between two runs cost less to look at with them than the runs cost to look at alone: a system call walks over these in a
/// microsecond.
const NEAR: u64 = 64;

/// Runs that are near each other, together. They ascend.
pub(crate) fn near(runs: &[PageRun]) -> impl Iterator<Item = (PageRun, &[PageRun])> {
    let near = |one: &PageRun, next: &PageRun| next.first.saturating_sub(one.end()) <= NEAR;
    runs.chunk_by(near).filter_map(|group| {
        let (first, end) = (group.first()?.first, group.last()?.end());
        Some((PageRun { first, pages: end.saturating_sub(first) }, group))
    })
}

/// Whether all bytes are zero. Any length is allowed; pages are what it is made for.
///
/// Written so that the compiler turns the inner loop into vector code; leaves at the first stride that is not zero.
pub fn is_zero(page: &[u8]) -> bool {
    let mut strides = page.chunks_exact(ZERO_STRIDE);
    strides.by_ref().all(stride_is_zero) && strides.remainder().iter().all(|&b| b == 0)
}

fn stride_is_zero(stride: &[u8]) -> bool {
    let (words, _) = stride.as_chunks::<8>();
    words.iter().fold(0u64, |acc, word| acc | u64::from_ne_bytes(*word)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first, pages }
    }

    #[test]
    fn a_single_set_byte_anywhere_is_found() {
        let mut page = vec![0u8; PAGE as usize];
        assert!(is_zero(&page));
        for i in 0..page.len() {
            page[i] = 1;
            assert!(!is_zero(&page), "byte {i}");
            page[i] = 0;
        }
        assert!(is_zero(&[]) && is_zero(&[0; 7]) && !is_zero(&[0, 0, 3]));
    }

    #[test]
    fn runs_that_are_near_are_looked_at_together() {
        let runs = [run(5, 1), run(10, 2), run(12 + NEAR, 1), run(14 + 2 * NEAR, 3)];
        let found: Vec<_> = near(&runs).collect();
        assert_eq!(found, [(run(5, 8 + NEAR), &runs[..3]), (run(14 + 2 * NEAR, 3), &runs[3..])]);
        assert_eq!(near(&[]).count(), 0);
    }

    #[test]
    fn runs_that_touch_are_joined() {
        let mut runs = Vec::new();
        for r in [run(0, 2), run(2, 1), run(5, 1), run(5, 0), run(9, 0)] {
            append_run(&mut runs, r);
        }
        assert_eq!(runs, [run(0, 3), run(5, 1)]);
    }

    #[test]
    fn normalise_sorts_and_joins() {
        let mut runs = vec![run(8, 2), run(0, 4), run(2, 1), run(4, 1), run(9, 4)];
        normalise(&mut runs);
        assert_eq!(runs, [run(0, 5), run(8, 5)]);
    }

    #[test]
    fn set_operations_agree_with_page_by_page_sets() {
        let sets: Vec<Vec<PageRun>> = vec![
            vec![],
            vec![run(0, 10)],
            vec![run(0, 1), run(3, 2), run(7, 1)],
            vec![run(1, 3), run(5, 1), run(8, 4)],
            vec![run(2, 1), run(4, 1), run(6, 1), run(11, 2)],
        ];
        let has = |s: &[PageRun], p: u64| s.iter().any(|r| r.first <= p && p < r.end());
        for a in &sets {
            for b in &sets {
                let (mut minus, mut both) = (Vec::new(), Vec::new());
                difference(a, b, &mut minus);
                intersection(a, b, &mut both);
                for p in 0..16 {
                    assert_eq!(has(&minus, p), has(a, p) && !has(b, p), "{a:?} - {b:?} at {p}");
                    assert_eq!(has(&both, p), has(a, p) && has(b, p), "{a:?} and {b:?} at {p}");
                }
            }
        }
    }

    #[test]
    fn a_region_holds_only_what_is_inside() {
        let region = Region { base: 0x10000, bytes: 4 * PAGE };
        assert!(region.is_valid() && region.holds(run(0, 4)) && region.holds(run(3, 1)));
        assert!(!region.holds(run(3, 2)) && !region.holds(run(4, 1)) && !region.holds(run(0, 0)));
        assert!(!region.holds(run(u64::MAX, 2)) && !region.holds(run(1, u64::MAX)));
        assert!(!Region { base: 1, bytes: PAGE }.is_valid() && !Region { base: 0, bytes: 0 }.is_valid());
    }
}
