//! Frames of a page stream: batches of up to 1 MiB of pages with run-length descriptors, and round ends.
//!
//! ```text
//! header (16)   kind, encoding, block, descriptor count, payload bytes, round
//! descriptors   8 bytes a run: first page, pages, what the run is
//! payload       the pages of all *bytes* runs, in order: as they are, as one compressed block, or what has changed of each
//! ```
//!
//! There is no message, header or allocation per page: a run of 256 pages costs 8 bytes.

use super::WireError;
use crate::units::PAGE_BYTES;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a batch's header.
pub const HEADER_BYTES: usize = 16;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = 8;
/// Most payload in a batch: large enough that system calls cost nothing, small enough to stay in cache.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Most runs in a batch: a full payload of single pages and as many discards between them.
pub const DESCRIPTORS_MAX: usize = 512;
/// Most blocks of RAM: a VM has one a memory device, ROM and video memory; 256 DIMMs are QEMU's own limit.
pub const BLOCKS_MAX: usize = 1024;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// Runs of one block, and their pages.
    Batch,
    /// The round is over on this stream.
    RoundEnd,
}

/// A run of pages within the frame's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Index of the first page.
    pub first: u32,
    /// How many pages.
    pub pages: u16,
    /// What they are.
    pub content: Content,
}

/// How the content of a run is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The bytes are in the payload.
    Bytes,
    /// The pages read as zero: what was sent of them before is dropped.
    Discard,
    /// The content is not here and will be fetched after the hand-off: what was sent of these pages before does not count.
    Missing,
}

impl Content {
    fn number(self) -> u8 {
        match self {
            Self::Bytes => 1,
            Self::Discard => 2,
            Self::Missing => 3,
        }
    }
}

impl Descriptor {
    /// Bytes of payload that this run brings.
    pub fn payload_bytes(self) -> usize {
        match self.content {
            Content::Bytes => usize::from(self.pages) * PAGE_BYTES as usize,
            Content::Discard | Content::Missing => 0,
        }
    }
}

/// How the payload of a batch is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The pages as they are.
    Raw,
    /// All pages as one block of the LZ4 block format, shorter than they are.
    Lz4,
    /// All pages as one frame of Zstandard, shorter than they are.
    Zstd,
    /// What has changed of each page since it was sent last: see [`super::patch`].
    Delta,
}

impl Encoding {
    fn number(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
            Self::Delta => 3,
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    kind: u8,
    encoding: u8,
    block: U16,
    descriptors: U16,
    zero: U16,
    payload: U32,
    round: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    first: U32,
    pages: U16,
    content: u8,
    zero: u8,
}

/// Header of a frame, checked against the limits but not yet against the VM's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// What the frame is.
    pub kind: FrameKind,
    /// How the payload is written.
    pub encoding: Encoding,
    /// Place of the block in the offer.
    pub block: u16,
    /// Runs that follow.
    pub descriptors: usize,
    /// Bytes of pages that follow the runs.
    pub payload_bytes: usize,
    /// The round that this belongs to, from 1.
    pub round: u32,
}

impl BatchHeader {
    /// The frame that ends a round on a stream.
    pub fn round_end(round: u32) -> Self {
        let (kind, encoding) = (FrameKind::RoundEnd, Encoding::Raw);
        Self { kind, encoding, block: 0, descriptors: 0, payload_bytes: 0, round }
    }

    /// Reads a header and bounds what it announces.
    ///
    /// # Errors
    /// [`WireError`] for an unknown kind, reserved bytes that are set, or counts above their limits.
    pub fn decode(raw: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let raw = RawHeader::ref_from_bytes(raw).map_err(|_| WireError::Short { what: "batch header" })?;
        let kind = match raw.kind {
            1 => FrameKind::Batch,
            2 => FrameKind::RoundEnd,
            other => return Err(WireError::Invalid { what: "batch frame kind", got: other.into() }),
        };
        let encoding = match raw.encoding {
            0 => Encoding::Raw,
            1 if kind == FrameKind::Batch => Encoding::Lz4,
            2 if kind == FrameKind::Batch => Encoding::Zstd,
            3 if kind == FrameKind::Batch => Encoding::Delta,
            other => return Err(WireError::Invalid { what: "encoding of a batch", got: other.into() }),
        };
        if raw.zero.get() != 0 {
            let got = raw.zero.get().into();
            return Err(WireError::Invalid { what: "reserved bytes of a batch header", got });
        }
        let descriptors = usize::from(raw.descriptors.get());
        bound("descriptors in a batch", descriptors, DESCRIPTORS_MAX)?;
        let payload_bytes = raw.payload.get() as usize;
        bound("payload bytes in a batch", payload_bytes, PAYLOAD_BYTES_MAX)?;
        let empty = descriptors == 0 && payload_bytes == 0;
        if (kind == FrameKind::RoundEnd) != empty {
            return Err(WireError::Invalid {
                what: "descriptor count of this frame kind",
                got: descriptors as u64,
            });
        }
        let (block, round) = (raw.block.get(), raw.round.get());
        Ok(Self { kind, encoding, block, descriptors, payload_bytes, round })
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let kind = match self.kind {
            FrameKind::Batch => 1,
            FrameKind::RoundEnd => 2,
        };
        let raw = RawHeader {
            kind,
            encoding: self.encoding.number(),
            block: U16::new(self.block),
            descriptors: U16::new(u16::try_from(self.descriptors).unwrap_or(u16::MAX)),
            zero: U16::new(0),
            payload: U32::new(u32::try_from(self.payload_bytes).unwrap_or(u32::MAX)),
            round: U32::new(self.round),
        };
        let mut out = [0; HEADER_BYTES];
        out.copy_from_slice(raw.as_bytes());
        out
    }
}

/// Appends a batch's header and descriptors to `out`; the payload is written after them from where it lies.
///
/// The caller keeps to [`DESCRIPTORS_MAX`] and [`PAYLOAD_BYTES_MAX`], with runs in ascending order.
pub fn encode_batch(block: u16, round: u32, runs: &[Descriptor], out: &mut Vec<u8>) {
    let payload_bytes = runs.iter().map(|run| run.payload_bytes()).sum();
    encode_head(block, round, runs, (Encoding::Raw, payload_bytes), out);
}

/// The same for pages whose payload is written in another way, in `payload_bytes`, which is less than they have.
pub fn encode_packed_batch(
    block: u16,
    round: u32,
    runs: &[Descriptor],
    packed: (Encoding, usize),
    out: &mut Vec<u8>,
) {
    encode_head(block, round, runs, packed, out);
}

fn encode_head(
    block: u16,
    round: u32,
    runs: &[Descriptor],
    (encoding, payload_bytes): (Encoding, usize),
    out: &mut Vec<u8>,
) {
    let kind = FrameKind::Batch;
    let header = BatchHeader { kind, encoding, block, descriptors: runs.len(), payload_bytes, round };
    debug_assert!(runs.len() <= DESCRIPTORS_MAX && payload_bytes <= PAYLOAD_BYTES_MAX);
    out.extend_from_slice(&header.encode());
    for run in runs {
        let (first, pages) = (U32::new(run.first), U16::new(run.pages));
        let raw = RawDescriptor { first, pages, content: run.content.number(), zero: 0 };
        out.extend_from_slice(raw.as_bytes());
    }
}

/// Sizes of the VM's blocks in pages, against which every batch is checked before a byte is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pages: Vec<u64>,
}

impl Layout {
    /// A layout of blocks of these lengths in bytes; a block whose bytes do not travel has length 0 here.
    pub fn new(block_bytes: impl IntoIterator<Item = u64>) -> Self {
        Self { pages: block_bytes.into_iter().map(|bytes| bytes.div_ceil(PAGE_BYTES)).collect() }
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.pages.len()
    }

    /// How many pages a block has.
    ///
    /// # Errors
    /// [`WireError`] when there is no such block.
    pub fn pages(&self, block: u16) -> Result<u64, WireError> {
        let pages = self.pages.get(usize::from(block)).copied();
        pages.ok_or(WireError::Invalid { what: "block number", got: block.into() })
    }

    /// Reads the descriptors of the batch that `header` announces into `out` (which is cleared).
    ///
    /// # Errors
    /// [`WireError`] when `raw` is short, a run is empty, unordered, overlaps, leaves its block, or when the runs do
    /// not add up to the payload, or compressed are not more than it.
    pub fn decode_runs(
        &self,
        header: &BatchHeader,
        raw: &[u8],
        out: &mut Vec<Descriptor>,
    ) -> Result<(), WireError> {
        out.clear();
        let pages = self.pages(header.block)?;
        if raw.len() != header.descriptors * DESCRIPTOR_BYTES {
            return Err(WireError::Short { what: "descriptor list" });
        }
        let (mut next, mut payload) = (0u64, 0usize);
        for raw in raw.chunks_exact(DESCRIPTOR_BYTES) {
            let run = decode_run(raw)?;
            let end = u64::from(run.first) + u64::from(run.pages);
            if u64::from(run.first) < next || run.pages == 0 || end > pages {
                return Err(WireError::Invalid { what: "run starting at page", got: run.first.into() });
            }
            next = end;
            payload += run.payload_bytes();
            out.push(run);
        }
        let fits = match header.encoding {
            Encoding::Raw => payload == header.payload_bytes,
            // What it decompresses to is bounded like any other payload, and known before it is touched.
            Encoding::Lz4 | Encoding::Zstd | Encoding::Delta => {
                payload <= PAYLOAD_BYTES_MAX && (1..payload).contains(&header.payload_bytes)
            }
        };
        if fits {
            return Ok(());
        }
        Err(WireError::Invalid { what: "payload length", got: header.payload_bytes as u64 })
    }
}

fn decode_run(raw: &[u8]) -> Result<Descriptor, WireError> {
    let raw = RawDescriptor::ref_from_bytes(raw).map_err(|_| WireError::Short { what: "descriptor" })?;
    let content = match (raw.content, raw.zero) {
        (1, 0) => Content::Bytes,
        (2, 0) => Content::Discard,
        (3, 0) => Content::Missing,
        (other, _) => return Err(WireError::Invalid { what: "content of a run", got: other.into() }),
    };
    Ok(Descriptor { first: raw.first.get(), pages: raw.pages.get(), content })
}

fn bound(what: &'static str, got: usize, limit: usize) -> Result<(), WireError> {
    if got > limit {
        return Err(WireError::TooLarge { what, got: got as u64, limit: limit as u64 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(first: u32, pages: u16, content: Content) -> Descriptor {
        Descriptor { first, pages, content }
    }

    fn decode(layout: &Layout, frame: &[u8]) -> Result<(BatchHeader, Vec<Descriptor>), WireError> {
        let header = BatchHeader::decode(frame[..HEADER_BYTES].try_into().unwrap())?;
        let mut runs = Vec::new();
        layout.decode_runs(&header, &frame[HEADER_BYTES..], &mut runs)?;
        Ok((header, runs))
    }

    #[test]
    fn a_batch_comes_back() {
        let runs =
            [run(3, 2, Content::Bytes), run(5, 60000, Content::Discard), run(70000, 1, Content::Bytes)];
        let mut frame = Vec::new();
        encode_batch(1, 9, &runs, &mut frame);
        let (header, back) = decode(&Layout::new([0, 1 << 30]), &frame).unwrap();
        assert_eq!((header.block, header.round, header.payload_bytes), (1, 9, 3 * 4096));
        assert_eq!(back, runs);
    }

    #[test]
    fn runs_without_bytes_have_no_payload() {
        let layout = Layout::new([1 << 30]);
        let runs = [run(0, u16::MAX, Content::Missing), run(70000, 9, Content::Discard)];
        let mut frame = Vec::new();
        encode_batch(0, 1, &runs, &mut frame);
        let (header, back) = decode(&layout, &frame).unwrap();
        assert_eq!((header.payload_bytes, back.as_slice()), (0, runs.as_slice()));
        assert_eq!((frame[HEADER_BYTES + 6], frame[HEADER_BYTES + 7]), (3, 0));
        frame[HEADER_BYTES + 7] = 1;
        assert!(decode(&layout, &frame).is_err(), "reserved");
        let mut packed = Vec::new();
        encode_packed_batch(0, 1, &runs, (Encoding::Lz4, 1), &mut packed);
        assert!(decode(&layout, &packed).is_err(), "nothing to unpack");
        let mixed = [run(0, 1, Content::Bytes), run(1, 600, Content::Missing), run(700, 2, Content::Bytes)];
        let mut frame = Vec::new();
        encode_batch(0, 1, &mixed, &mut frame);
        let (header, back) = decode(&layout, &frame).unwrap();
        assert_eq!((header.payload_bytes, back.as_slice()), (3 * PAGE_BYTES as usize, mixed.as_slice()));
    }

    #[test]
    fn runs_outside_the_block_overlapping_or_unordered_are_refused() {
        let layout = Layout::new([16 * 4096]);
        let bad: [&[Descriptor]; 7] = [
            &[run(15, 2, Content::Bytes)],
            &[run(0, 0, Content::Bytes)],
            &[run(4, 2, Content::Bytes), run(5, 1, Content::Bytes)],
            &[run(4, 1, Content::Bytes), run(2, 1, Content::Bytes)],
            &[run(u32::MAX, u16::MAX, Content::Discard)],
            &[run(15, 2, Content::Missing)],
            &[run(4, 2, Content::Missing), run(5, 1, Content::Bytes)],
        ];
        for runs in bad {
            let mut frame = Vec::new();
            encode_batch(0, 1, runs, &mut frame);
            assert!(decode(&layout, &frame).is_err(), "{runs:?}");
        }
    }

    #[test]
    fn a_payload_that_does_not_add_up_and_unknown_blocks_are_refused() {
        let mut frame = Vec::new();
        encode_batch(0, 1, &[run(0, 1, Content::Bytes)], &mut frame);
        assert!(decode(&Layout::new([4096]), &frame).is_ok());
        assert!(decode(&Layout::new([0]), &frame).is_err());
        assert!(decode(&Layout::new([]), &frame).is_err());
        frame[8] = 1;
        assert!(decode(&Layout::new([4096]), &frame).is_err());
    }

    #[test]
    fn a_packed_payload_is_smaller_than_its_pages_and_they_fit_a_batch() {
        let layout = Layout::new([1 << 30]);
        for encoding in [Encoding::Lz4, Encoding::Zstd, Encoding::Delta] {
            let decode_packed = |pages: u16, payload_bytes: usize| {
                let mut frame = Vec::new();
                let runs = [run(0, pages, Content::Bytes)];
                encode_packed_batch(0, 1, &runs, (encoding, payload_bytes), &mut frame);
                decode(&layout, &frame).map(|(header, _)| header.encoding)
            };
            assert_eq!(decode_packed(256, 1000), Ok(encoding));
            assert!(decode_packed(257, 1000).is_err(), "more than a batch holds");
            assert!(decode_packed(1, 4096).is_err(), "no smaller");
            assert!(decode_packed(1, 0).is_err(), "nothing");
            let mut end = BatchHeader::round_end(1).encode();
            end[1] = encoding.number();
            assert!(BatchHeader::decode(&end).is_err(), "a round end has no payload");
        }
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_no_panic(raw in prop::collection::vec(any::<u8>(), HEADER_BYTES..600), blocks in prop::collection::vec(0u64..1 << 40, 0..4)) {
            if let Ok((header, runs)) = decode(&Layout::new(blocks), &raw) {
                prop_assert_eq!(runs.len(), header.descriptors);
            }
        }
    }
}
