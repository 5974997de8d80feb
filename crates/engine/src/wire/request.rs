//! Frames of the demand connection, target to source: which pages are missing once the VM runs at the target.
//!
//! ```text
//! request (16)   kind, zero, block, pages, first page
//! ```
//!
//! A source whose VM was handed off is a server of pages: it keeps nothing that matters. Each time the target connects it asks for
//! the pages that its guest waits for, lists what is missing, and says when the list is complete. Answers are [`super::batch`] frames.

use super::{Layout, WireError};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a request.
pub const REQUEST_BYTES: usize = 16;
/// Most pages of a fault: a huge page of 2 MiB. The guest waits for the last of them, so it is no way to ask for many.
pub const FAULT_PAGES_MAX: u32 = 512;

/// What the target asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The guest waits for these pages: they are answered at once, on this connection.
    Fault {
        /// Place of the block in the offer.
        block: u16,
        /// Index of the first page.
        first: u64,
        /// How many pages.
        pages: u32,
    },
    /// These pages are still missing, and are to be pushed.
    Missing {
        /// Place of the block in the offer.
        block: u16,
        /// Index of the first page.
        first: u64,
        /// How many pages.
        pages: u32,
    },
    /// The list of missing runs is complete.
    Listed,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRequest {
    kind: u8,
    zero: u8,
    block: U16,
    pages: U32,
    first: U64,
}

impl Request {
    /// Appends the request's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, (block, first, pages)) = match *self {
            Self::Fault { block, first, pages } => (1, (block, first, pages)),
            Self::Missing { block, first, pages } => (2, (block, first, pages)),
            Self::Listed => (3, (0, 0, 0)),
        };
        let (block, pages, first) = (U16::new(block), U32::new(pages), U64::new(first));
        out.extend_from_slice(RawRequest { kind, zero: 0, block, pages, first }.as_bytes());
    }

    /// Reads a request and bounds what can be bounded without the VM's layout; [`Request::check`] does the rest.
    ///
    /// # Errors
    /// [`WireError`] for an unknown kind, reserved bytes that are set, an empty run, or a fault of more than [`FAULT_PAGES_MAX`].
    pub fn decode(raw: &[u8; REQUEST_BYTES]) -> Result<Self, WireError> {
        let raw = RawRequest::ref_from_bytes(raw).map_err(|_| WireError::Short { what: "request" })?;
        if raw.zero != 0 {
            return Err(WireError::Invalid { what: "reserved byte of a request", got: raw.zero.into() });
        }
        let (block, first, pages) = (raw.block.get(), raw.first.get(), raw.pages.get());
        let request = match raw.kind {
            1 => Self::Fault { block, first, pages },
            2 => Self::Missing { block, first, pages },
            3 if (block, first, pages) == (0, 0, 0) => return Ok(Self::Listed),
            3 => return Err(WireError::Invalid { what: "end of a list with page", got: first }),
            other => return Err(WireError::Invalid { what: "request kind", got: other.into() }),
        };
        if pages == 0 {
            return Err(WireError::Invalid { what: "pages of a request", got: 0 });
        }
        if raw.kind == 1 && pages > FAULT_PAGES_MAX {
            let (got, limit) = (pages.into(), FAULT_PAGES_MAX.into());
            return Err(WireError::TooLarge { what: "pages of a fault", got, limit });
        }
        Ok(request)
    }

    /// Whether its run lies within its block, which must be so before anything is done with it.
    ///
    /// # Errors
    /// [`WireError`] when the block is unknown or the run leaves it; a block that does not travel has no page.
    pub fn check(&self, layout: &Layout) -> Result<(), WireError> {
        let (Self::Fault { block, first, pages } | Self::Missing { block, first, pages }) = *self else {
            return Ok(());
        };
        let limit = layout.pages(block)?;
        match first.checked_add(pages.into()) {
            Some(end) if end <= limit => Ok(()),
            _ => Err(WireError::Invalid { what: "request starting at page", got: first }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(request: Request) -> [u8; REQUEST_BYTES] {
        let mut out = Vec::new();
        request.encode(&mut out);
        out.try_into().unwrap()
    }

    #[test]
    fn each_request_has_its_bytes() {
        let fault = Request::Fault { block: 0x0102, first: 0x0a0b0c0d, pages: 0x0103 };
        assert_eq!(encoded(fault), [1, 0, 2, 1, 3, 1, 0, 0, 0xd, 0xc, 0xb, 0xa, 0, 0, 0, 0]);
        let missing = Request::Missing { block: 1, first: 2, pages: u32::MAX };
        assert_eq!(encoded(missing), [2, 0, 1, 0, 255, 255, 255, 255, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encoded(Request::Listed), [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_is_reserved_empty_or_too_long_is_refused() {
        let good = encoded(Request::Fault { block: 1, first: 2, pages: FAULT_PAGES_MAX });
        assert!(Request::decode(&good).is_ok());
        let with = |at: usize, byte| {
            let mut raw = good;
            raw[at] = byte;
            Request::decode(&raw)
        };
        for kind in [0, 3, 4, 255] {
            assert!(with(0, kind).is_err(), "kind {kind}");
        }
        assert!(with(1, 1).is_err(), "reserved");
        assert!(with(5, 0).is_err(), "empty");
        assert!(matches!(with(4, 1), Err(WireError::TooLarge { .. })), "a fault of 513 pages");
        let mut missing = encoded(Request::Missing { block: 0, first: 0, pages: 1 });
        missing[4] = 0;
        assert!(Request::decode(&missing).is_err(), "empty");
    }

    #[test]
    fn a_run_lies_within_its_block() {
        let layout = Layout::new([16 * 4096, 0]);
        let check = |block, first, pages| {
            let fault = Request::Fault { block, first, pages }.check(&layout);
            assert_eq!(fault, Request::Missing { block, first, pages }.check(&layout));
            fault.is_ok()
        };
        assert!(check(0, 0, 16) && check(0, 15, 1));
        assert!(!check(0, 15, 2) && !check(0, 16, 1) && !check(0, u64::MAX, 1), "it leaves its block");
        assert!(!check(1, 0, 1), "a block that does not travel");
        assert!(!check(2, 0, 1), "no such block");
        assert_eq!(Request::Listed.check(&Layout::new([])), Ok(()));
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_has_one_form(raw in any::<[u8; REQUEST_BYTES]>(), kind in 0u8..5, blocks in prop::collection::vec(0u64..1 << 40, 0..4)) {
            let tame = [kind, 0, raw[2] % 4, 0, raw[4], raw[5] % 4, 0, 0, raw[8], raw[9], raw[10], 0, 0, 0, 0, 0];
            for raw in [raw, tame] {
                if let Ok(request) = Request::decode(&raw) {
                    prop_assert_eq!(encoded(request), raw);
                    let _ = request.check(&Layout::new(blocks.iter().copied()));
                }
            }
        }

        #[test]
        fn requests_come_back(block: u16, first: u64, pages in 1u32.., fault: bool) {
            let request = match fault {
                true => Request::Fault { block, first, pages: pages % FAULT_PAGES_MAX + 1 },
                false => Request::Missing { block, first, pages },
            };
            prop_assert_eq!(Request::decode(&encoded(request)), Ok(request));
        }
    }
}
