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

/// How many bytes of a sample are counted.
const COUNTED_BYTES: usize = 2 << 10;

/// Two bytes of noise are equal once in 256 times. Where that comes at most so much oftener, a code for single bytes saves less than a tenth.
const EVEN: f64 = 1.5;

/// Whether all bytes come about equally often.
fn is_even(sample: &[u8]) -> bool {
    let sample = sample.get(..COUNTED_BYTES).unwrap_or(sample);
    let mut counts = [0u64; 256];
    sample.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    let pairs = |count: u64| (count * count.saturating_sub(1)) as f64;
    counts.iter().map(|count| pairs(*count)).sum::<f64>() * 256.0 <= EVEN * pairs(sample.len() as u64)
}

/// How many batches in a row that begin with noise are believed to be noise, after one that did not shrink: LZ4 on a
/// sample of each took a fifth of a sender's time.
const BELIEVED: u32 = 7;

/// The compressors of one stream.
pub(super) struct Packer {
    pub(super) rule: Compression,
    /// How many more batches may be believed.
    believed: u32,
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
        Self {
            rule: Compression::default(),
            believed: 0,
            methods,
            zstd,
            packed: vec![0; packed],
            together: Vec::new(),
        }
    }

    /// Compresses what lies in these parts of the buffer, if that makes it arrive sooner, as a sample of it tells.
    pub(super) fn pack(&mut self, buffer: &[u8], parts: &[Range<usize>]) -> Option<(Encoding, &[u8])> {
        let first = parts.first()?;
        if !self.methods.iter().any(|method| self.rule.may_pay(*method)) {
            return None;
        }
        let sample = &buffer[first.start..first.end.min(first.start + SAMPLE_BYTES)];
        let even = is_even(sample);
        if even && self.believed > 0 {
            self.believed -= 1;
            return None;
        }
        let mut ratios = Vec::new();
        for &method in self.methods.iter().filter(|method| self.rule.may_pay(**method)).collect::<Vec<_>>() {
            // What has no strings that come again, and no bytes that come oftener, shrinks in no way: Zstandard takes ten times as long to find that.
            if even && method == Method::Zstd && ratios.iter().any(|(_, ratio)| *ratio >= 1.0) {
                continue;
            }
            if let Some(packed) = self.compress(method, sample) {
                ratios.push((method, packed as f64 / sample.len() as f64));
            }
        }
        let shrinks = ratios.iter().any(|(_, ratio)| *ratio < 1.0);
        self.believed = if even && !ratios.is_empty() && !shrinks { BELIEVED } else { 0 };
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a xorshift generator.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_u32;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 24) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn noise_is_even_and_what_can_be_coded_is_not() {
        assert!(is_even(&noise(SAMPLE_BYTES)));
        let base64: Vec<u8> = noise(SAMPLE_BYTES).iter().map(|byte| b'0' + byte % 64).collect();
        assert!(!is_even(&base64), "six bits of eight");
        assert!(!is_even(&[0; SAMPLE_BYTES]) && is_even(&[7]));
    }

    /// Only so many batches in a row are not looked at, and none that does not begin with noise.
    #[test]
    fn noise_is_believed_for_a_while() {
        let mut packer = Packer::new(1 << 20, &Method::ALL);
        packer.rule.wrote(Bytes(1000), std::time::Duration::from_secs(1));
        // What comes again after as much as a sample has shrinks to half, although all of its bytes come equally often.
        let half = noise(SAMPLE_BYTES / 2);
        let twice = [&half[..], &half].concat();
        let whole = 0..SAMPLE_BYTES;
        let mut packs = |bytes: &[u8]| packer.pack(bytes, std::slice::from_ref(&whole)).is_some();
        assert!(packs(&twice) && !packs(&noise(SAMPLE_BYTES)));
        let looked: Vec<bool> = (0..=BELIEVED).map(|_| packs(&twice)).collect();
        assert_eq!(looked, [vec![false; BELIEVED as usize], vec![true]].concat());
        assert!(!packs(&noise(SAMPLE_BYTES)) && packs(&[b'a'; SAMPLE_BYTES]));
    }

    /// Of noise only the quick way looks at a sample; of text in which no string comes again both do.
    #[test]
    fn noise_is_left_alone_and_dense_text_is_not() {
        let packer = || {
            let mut packer = Packer::new(1 << 20, &Method::ALL);
            packer.rule.wrote(Bytes(1_000_000), std::time::Duration::from_secs(1));
            packer
        };
        let whole = 0..SAMPLE_BYTES;
        assert_eq!(packer().pack(&noise(SAMPLE_BYTES), std::slice::from_ref(&whole)), None);
        let base64: Vec<u8> = noise(SAMPLE_BYTES).iter().map(|byte| b'0' + byte % 64).collect();
        let mut packer = packer();
        let (encoding, packed) = packer.pack(&base64, std::slice::from_ref(&whole)).unwrap();
        assert_eq!(encoding, Encoding::Zstd);
        assert!(packed.len() < SAMPLE_BYTES * 8 / 10);
    }
}
