//! What was sent of pages that are sent again and again, so that only what has changed of them travels.
//!
//! One for each sender: a page's stream is a function of its place, so nobody else sends it. It is a table in which a page has one place,
//! and a page that is sent again and again keeps it: with more such pages than places a part of them always gains, where the usual
//! replacement of the oldest would throw out each just before it is needed.

use memmap2::MmapMut;
use sterna_engine::policy::Delta;
use sterna_engine::wire::patch::{self, Difference};
use sterna_memory::PAGE;

/// Bytes of a page.
const PAGE_BYTES: usize = PAGE as usize;
/// A patch of more than this is not worth the receiver's work.
const PATCH_MAX: usize = PAGE_BYTES / 2;
/// Rounds after which a page that was not sent again loses its place to another one.
const ROUNDS_KEPT: u32 = 2;

/// Pages that were sent, as they were.
pub(super) struct Kept {
    /// Whose page is in a place, and the round in which it was sent last.
    owners: Vec<Option<(u16, u32, u32)>>,
    /// A mapping of its own: the kernel gives it out as it is used, and gets it back as a whole.
    pages: Option<MmapMut>,
    pub(super) rule: Delta,
    /// Pages that were found here, since whoever counts them has set it back.
    pub(super) found: u32,
}

/// What is to be sent of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Nothing: the target has it as it is.
    Same,
    /// What was appended to the patches.
    Patch,
    /// All of it.
    Whole,
}

impl Kept {
    /// Keeps so many bytes of pages at most; memory is taken as pages come.
    pub(super) fn new(bytes: u64) -> Self {
        let pages =
            MmapMut::map_anon((bytes / PAGE) as usize * PAGE_BYTES).ok().filter(|pages| !pages.is_empty());
        let places = pages.as_ref().map_or(0, |pages| pages.len() / PAGE_BYTES);
        Self { owners: vec![None; places], pages, rule: Delta::new(), found: 0 }
    }

    /// Whether the next `pages` are looked up here.
    pub(super) fn is_on(&mut self, pages: u32) -> bool {
        !self.owners.is_empty() && self.rule.is_on(pages)
    }

    /// Compares a page with what the target has of it, and keeps it as it is now. `at` is a number that is the page's own among those of
    /// this stream, dense where they are.
    pub(super) fn send(
        &mut self,
        (block, page, at): (u16, u32, u64),
        round: u32,
        content: &[u8],
        patches: &mut Vec<u8>,
    ) -> Sent {
        let Some(pages) = &mut self.pages else { return Sent::Whole };
        let place = (at % self.owners.len() as u64) as usize;
        let kept = &mut pages[place * PAGE_BYTES..][..PAGE_BYTES];
        let sent = match self.owners[place] {
            Some((owner, number, _)) if (owner, number) == (block, page) => {
                self.found += 1;
                match patch::encode(kept, content, PATCH_MAX, patches) {
                    Difference::None => Sent::Same,
                    Difference::Patch => Sent::Patch,
                    Difference::Large => Sent::Whole,
                }
            }
            Some((_, _, last)) if round.saturating_sub(last) <= ROUNDS_KEPT => return Sent::Whole,
            _ => Sent::Whole,
        };
        self.owners[place] = Some((block, page, round));
        if sent != Sent::Same {
            kept.copy_from_slice(content);
        }
        sent
    }

    /// The target does not have the page any more as it was sent, or has another one that this was not told of.
    pub(super) fn forget(&mut self, (block, page, at): (u16, u32, u64)) {
        if self.owners.is_empty() {
            return;
        }
        let place = (at % self.owners.len() as u64) as usize;
        self.owners[place].take_if(|(owner, number, _)| (*owner, *number) == (block, page));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(word: u64) -> Vec<u8> {
        let mut page = vec![3; PAGE_BYTES];
        page[..8].copy_from_slice(&word.to_le_bytes());
        page
    }

    #[test]
    fn a_page_travels_whole_once_and_in_parts_after() {
        let (mut kept, mut out) = (Kept::new(4 * PAGE), Vec::new());
        let first = (0, 7, 7);
        assert_eq!(kept.send(first, 2, &page(1), &mut out), Sent::Whole);
        assert_eq!(kept.send(first, 3, &page(1), &mut out), Sent::Same);
        assert_eq!(kept.send(first, 4, &page(2), &mut out), Sent::Patch);
        let mut target = page(1);
        patch::decode(&out, 1, |_, change| {
            target[change.offset..][..change.bytes.len()].copy_from_slice(change.bytes)
        })
        .unwrap();
        assert_eq!(target, page(2));
        assert_eq!(kept.send(first, 5, &vec![9; PAGE_BYTES], &mut out), Sent::Whole, "too much has changed");
        kept.forget(first);
        assert_eq!(kept.send(first, 6, &page(2), &mut out), Sent::Whole, "the target has dropped it");
    }

    #[test]
    fn a_page_in_use_keeps_its_place() {
        let (mut kept, mut out) = (Kept::new(PAGE), Vec::new());
        let (first, other) = ((0, 1, 1), (0, 2, 2));
        assert_eq!(kept.send(first, 2, &page(1), &mut out), Sent::Whole);
        assert_eq!(kept.send(other, 2, &page(1), &mut out), Sent::Whole);
        assert_eq!(kept.send(first, 3, &page(2), &mut out), Sent::Patch);
        assert_eq!(kept.send(other, 6, &page(2), &mut out), Sent::Whole, "the first was not seen for long");
        assert_eq!(kept.send(other, 7, &page(3), &mut out), Sent::Patch);
        kept.forget(first);
        assert_eq!(kept.send(other, 8, &page(3), &mut out), Sent::Same, "another one's place is not touched");
    }
}
