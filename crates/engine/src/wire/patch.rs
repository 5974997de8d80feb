//! What has changed of a page since it was sent last, in words of 8 bytes.
//!
//! ```text
//! patch     segments (2), then each segment
//! segment   first word (2), words (2), the words (8 each)
//! ```
//!
//! Segments are ascending and do not touch. The payload of a [`super::Encoding::Delta`] batch holds a patch for each page of its
//! *bytes* runs, one after the other. The idea is XBZRLE's (QEMU docs/devel/migration/xbzrle.rst); words instead of bytes cost little
//! where whole words are written, as programs do, and are found and applied faster.

use super::WireError;
use crate::units::PAGE_BYTES;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a page.
const PAGE: usize = PAGE_BYTES as usize;
/// Bytes of a word.
const WORD: usize = 8;
/// Words that are compared at once.
const CHUNK: usize = 64;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSegment {
    first: U16,
    words: U16,
}

/// What a patch changes: bytes of a page from `offset` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change<'a> {
    /// Where in the page.
    pub offset: usize,
    /// What is there now.
    pub bytes: &'a [u8],
}

/// What became of a page, compared with what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Nothing.
    None,
    /// A patch was appended.
    Patch,
    /// More than would be worth a patch; nothing was appended.
    Large,
}

/// Appends to `out` what makes `old` into `new` (both a page), unless that takes more than `limit` bytes.
pub fn encode(old: &[u8], new: &[u8], limit: usize, out: &mut Vec<u8>) -> Difference {
    let begin = out.len();
    out.extend_from_slice(&[0; 2]);
    let mut segments = 0u16;
    let mut at = 0;
    while let Some(first) = next_change(old, new, at) {
        let mut end = first + WORD;
        while end < PAGE && old[end..end + WORD] != new[end..end + WORD] {
            end += WORD;
        }
        if out.len() - begin + size_of::<RawSegment>() + end - first > limit {
            out.truncate(begin);
            return Difference::Large;
        }
        let raw = RawSegment {
            first: U16::new((first / WORD) as u16),
            words: U16::new(((end - first) / WORD) as u16),
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(&new[first..end]);
        segments += 1;
        at = end;
    }
    if segments == 0 {
        out.truncate(begin);
        return Difference::None;
    }
    out[begin..begin + 2].copy_from_slice(&segments.to_le_bytes());
    Difference::Patch
}

/// Where the next word differs, from `at` on.
fn next_change(old: &[u8], new: &[u8], mut at: usize) -> Option<usize> {
    while at < PAGE {
        let end = (at / CHUNK + 1) * CHUNK;
        if old[at..end] != new[at..end] {
            let words = (at..end).step_by(WORD);
            return words.into_iter().find(|&word| old[word..word + WORD] != new[word..word + WORD]);
        }
        at = end;
    }
    None
}

/// Reads the patches of `pages` pages and calls `change` with the place of a page among them and what changes in it.
///
/// # Errors
/// [`WireError`] when the payload is short or long, a segment is empty, unordered, or leaves its page. What was read before was
/// given to `change` already.
pub fn decode<'a>(
    mut payload: &'a [u8],
    pages: usize,
    mut change: impl FnMut(usize, Change<'a>),
) -> Result<(), WireError> {
    for page in 0..pages {
        let (segments, rest) =
            U16::read_from_prefix(payload).map_err(|_| WireError::Short { what: "patch" })?;
        payload = rest;
        if segments.get() == 0 {
            return Err(WireError::Invalid { what: "segments of a patch", got: 0 });
        }
        let mut next = 0;
        for _ in 0..segments.get() {
            let (raw, rest) = RawSegment::read_from_prefix(payload)
                .map_err(|_| WireError::Short { what: "segment of a patch" })?;
            let (offset, len) = (usize::from(raw.first.get()) * WORD, usize::from(raw.words.get()) * WORD);
            if offset < next || len == 0 || offset + len > PAGE {
                return Err(WireError::Invalid {
                    what: "segment of a patch at word",
                    got: raw.first.get().into(),
                });
            }
            let (bytes, rest) =
                rest.split_at_checked(len).ok_or(WireError::Short { what: "words of a patch" })?;
            change(page, Change { offset, bytes });
            payload = rest;
            // A gap of a word at least: what touches is one segment.
            next = offset + len + WORD;
        }
    }
    match payload.len() {
        0 => Ok(()),
        more => Err(WireError::Invalid { what: "bytes after the last patch", got: more as u64 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn apply(old: &[u8], patch: &[u8]) -> Result<Vec<u8>, WireError> {
        let mut page = old.to_vec();
        decode(patch, 1, |_, change| {
            page[change.offset..][..change.bytes.len()].copy_from_slice(change.bytes)
        })?;
        Ok(page)
    }

    #[test]
    fn a_counter_in_a_page_costs_some_bytes() {
        let old = vec![7; PAGE];
        let mut new = old.clone();
        (new[0], new[PAGE - 1]) = (8, 8);
        let mut out = vec![1, 2];
        assert_eq!(encode(&old, &new, PAGE, &mut out), Difference::Patch);
        assert_eq!(out.len(), 2 + 2 + 2 * (4 + 8));
        assert_eq!(apply(&old, &out[2..]), Ok(new));
    }

    #[test]
    fn nothing_and_too_much_leave_no_trace() {
        let (old, new) = (vec![0; PAGE], vec![1; PAGE]);
        let mut out = vec![9];
        assert_eq!(encode(&old, &old, PAGE, &mut out), Difference::None);
        assert_eq!(encode(&old, &new, PAGE / 2, &mut out), Difference::Large);
        assert_eq!(out, [9]);
    }

    #[test]
    fn what_leaves_its_page_is_unordered_or_does_not_add_up_is_refused() {
        let segment = |first: u16, words: u16| [first.to_le_bytes(), words.to_le_bytes()].concat();
        let patch = |segments: &[(u16, u16)]| {
            let mut out = (segments.len() as u16).to_le_bytes().to_vec();
            for &(first, words) in segments {
                out.extend(segment(first, words));
                out.extend(vec![1; usize::from(words) * WORD]);
            }
            out
        };
        let old = vec![0; PAGE];
        assert!(apply(&old, &patch(&[(0, 1), (2, 510)])).is_ok());
        for bad in
            [&[(511, 2)][..], &[(0, 0)], &[], &[(4, 1), (2, 1)], &[(4, 2), (6, 1)], &[(u16::MAX, u16::MAX)]]
        {
            assert!(apply(&old, &patch(bad)).is_err(), "{bad:?}");
        }
        let mut long = patch(&[(0, 1)]);
        long.push(0);
        assert!(apply(&old, &long).is_err());
        assert!(apply(&old, &long[..long.len() - 2]).is_err());
    }

    proptest! {
        #[test]
        fn a_patch_makes_the_new_page_of_the_old(writes in prop::collection::vec((0..PAGE, any::<u8>()), 0..300), limit in 0..PAGE) {
            let old: Vec<u8> = (0..PAGE).map(|at| at as u8).collect();
            let mut new = old.clone();
            writes.into_iter().for_each(|(at, byte)| new[at] = byte);
            let mut out = Vec::new();
            match encode(&old, &new, limit, &mut out) {
                Difference::None => prop_assert_eq!(&old, &new),
                Difference::Large => prop_assert!(old != new),
                Difference::Patch => {
                    prop_assert!(out.len() <= limit);
                    prop_assert_eq!(apply(&old, &out), Ok(new));
                }
            }
        }

        #[test]
        fn garbage_changes_nothing_outside_its_page(raw in prop::collection::vec(any::<u8>(), 0..200), pages in 0usize..4) {
            let _ = decode(&raw, pages, |page, change| {
                assert!(page < pages && change.offset + change.bytes.len() <= PAGE);
            });
        }
    }
}
