//! Runs of pages that lie in a store: what [`Message::Common`](super::Message::Common) carries.
//!
//! 16 bytes a run, little-endian: place of the block in the offer (2 bytes), two that are zero, first page (4), pages (4), page of the store
//! that the first of them is (4).

use super::WireError;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a run.
pub const RUN_BYTES: usize = 16;
/// Most runs of a VM: they fit one message.
pub const RUNS_MAX: usize = 1 << 15;

/// Pages of a block, and where they lie in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// Place of the block in the offer.
    pub block: u16,
    /// First page.
    pub first: u32,
    /// How many; at least one.
    pub pages: u32,
    /// Page of the store that the first of them is.
    pub at: u32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    block: U16,
    zero: U16,
    first: U32,
    pages: U32,
    at: U32,
}

/// The bytes of these runs.
pub fn encode(runs: &[Run]) -> Vec<u8> {
    let raw = |run: &Run| Raw {
        block: U16::new(run.block),
        zero: U16::ZERO,
        first: U32::new(run.first),
        pages: U32::new(run.pages),
        at: U32::new(run.at),
    };
    runs.iter().flat_map(|run| raw(run).as_bytes().to_vec()).collect()
}

/// Reads runs: of blocks with so many pages, in ascending order, disjoint, and within a store of so many pages.
///
/// # Errors
/// [`WireError`], whatever of it is not so.
pub fn decode(bytes: &[u8], blocks: &[u64], store: u64) -> Result<Vec<Run>, WireError> {
    let invalid = |what, got: u64| WireError::Invalid { what, got };
    if bytes.len() > RUNS_MAX * RUN_BYTES {
        let (got, limit) = (bytes.len() as u64, (RUNS_MAX * RUN_BYTES) as u64);
        return Err(WireError::TooLarge { what: "runs in common", got, limit });
    }
    let raw = <[Raw]>::ref_from_bytes(bytes).map_err(|_| WireError::Short { what: "runs in common" })?;
    let mut runs: Vec<Run> = Vec::with_capacity(raw.len());
    for raw in raw {
        let run =
            Run { block: raw.block.get(), first: raw.first.get(), pages: raw.pages.get(), at: raw.at.get() };
        let Some(pages) = blocks.get(usize::from(run.block)) else {
            return Err(invalid("block of a run in common", run.block.into()));
        };
        if raw.zero != U16::ZERO || run.pages == 0 || u64::from(run.first) + u64::from(run.pages) > *pages {
            return Err(invalid("run in common", run.first.into()));
        }
        if u64::from(run.at) + u64::from(run.pages) > store {
            return Err(invalid("place in a store", run.at.into()));
        }
        if let Some(last) = runs.last()
            && (run.block, u64::from(run.first)) < (last.block, u64::from(last.first) + u64::from(last.pages))
        {
            return Err(invalid("order of runs in common", run.first.into()));
        }
        runs.push(run);
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(block: u16, first: u32, pages: u32, at: u32) -> Run {
        Run { block, first, pages, at }
    }

    #[test]
    fn runs_come_back() {
        let runs = [run(0, 3, 2, 7), run(0, 5, 1, 0), run(2, 0, 9, 1)];
        assert_eq!(decode(&encode(&runs), &[6, 1, 9], 10).unwrap(), runs);
        assert_eq!(decode(&[], &[], 0).unwrap(), []);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for wrong in [
            vec![run(1, 0, 1, 0)],
            vec![run(0, 5, 2, 0)],
            vec![run(0, 5, 0, 0)],
            vec![run(0, 0, 2, 9)],
            vec![run(0, 2, 2, 0), run(0, 3, 1, 0)],
            vec![run(0, u32::MAX, u32::MAX, u32::MAX)],
        ] {
            assert!(decode(&encode(&wrong), &[6], 10).is_err(), "{wrong:?}");
        }
        assert!(decode(&encode(&[run(0, 0, 1, 0)])[1..], &[6], 10).is_err());
        assert!(decode(&vec![0; (RUNS_MAX + 1) * RUN_BYTES], &[6], 10).is_err());
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..96)) {
            let _ = decode(&bytes, &[100, 7], 50);
        }
    }
}
