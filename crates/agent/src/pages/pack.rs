//! Compressing a batch where that makes it arrive sooner: which way, the engine's rule decides by what it has measured.

use lz4_flex::block::{compress_into, get_maximum_output_size};
use std::ops::Range;
use std::time::Instant;
use sterna_engine::policy::{Compression, Method};
use sterna_engine::units::Bytes;
use sterna_engine::wire::Encoding;

/// How much of a batch is compressed to see whether the rest should be: two pages.
const SAMPLE_BYTES: usize = 8 << 10;
/// Zstandard's quickest level of the ordinary ones.
const ZSTD_LEVEL: i32 = 1;

/// The compressors of one stream.
pub(super) struct Packer {
    pub(super) rule: Compression,
    methods: &'static [Method],
    zstd: Option<zstd::bulk::Compressor<'static>>,
    packed: Vec<u8>,
    together: Vec<u8>,
}

impl Packer {
    /// For batches of so many bytes at most, in one of these ways.
    pub(super) fn new(bytes_max: usize, methods: &'static [Method]) -> Self {
        let packed = get_maximum_output_size(bytes_max).max(zstd::zstd_safe::compress_bound(bytes_max));
        let zstd =
            methods.contains(&Method::Zstd).then(|| zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()).flatten();
        Self { rule: Compression::default(), methods, zstd, packed: vec![0; packed], together: Vec::new() }
    }

    /// Compresses what lies in these parts of the buffer, if that makes it arrive sooner, as a sample of it tells.
    pub(super) fn pack(&mut self, buffer: &[u8], parts: &[Range<usize>]) -> Option<(Encoding, &[u8])> {
        let first = parts.first()?;
        let sample = &buffer[first.start..first.end.min(first.start + SAMPLE_BYTES)];
        let mut ratios = Vec::new();
        for &method in self.methods.iter().filter(|method| self.rule.may_pay(**method)).collect::<Vec<_>>() {
            if let Some(packed) = self.compress(method, sample) {
                ratios.push((method, packed as f64 / sample.len() as f64));
            }
        }
        let method = self.rule.choose(&ratios)?;
        // One block for all: what lies apart is moved together, in a copy that leaves the pages where they are.
        let mut together = std::mem::take(&mut self.together);
        let all = match parts {
            [all] => &buffer[all.clone()],
            _ => {
                together.clear();
                parts.iter().for_each(|part| together.extend_from_slice(&buffer[part.clone()]));
                &together[..]
            }
        };
        let packed = self.compress(method, all).filter(|packed| *packed < all.len());
        self.together = together;
        let encoding = if method == Method::Lz4 { Encoding::Lz4 } else { Encoding::Zstd };
        packed.map(|packed| (encoding, &self.packed[..packed]))
    }

    fn compress(&mut self, method: Method, bytes: &[u8]) -> Option<usize> {
        let began = Instant::now();
        let packed = match method {
            Method::Lz4 => compress_into(bytes, &mut self.packed).ok()?,
            Method::Zstd => self.zstd.as_mut()?.compress_to_buffer(bytes, &mut self.packed[..]).ok()?,
        };
        self.rule.compressed(method, Bytes(bytes.len() as u64), began.elapsed());
        Some(packed)
    }
}
