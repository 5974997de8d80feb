//! When a batch is compressed, and how: only when it is sure to arrive sooner.
//!
//! Compression pays on a link that is slower than the processor, for pages that shrink. Both are measured as the
//! migration goes: what the link takes, what a byte costs to compress, and how far a sample of each batch shrinks. A fast
//! link, a busy host or incompressible pages turn it off by themselves, batch by batch.

use crate::units::{Bytes, Rate};
use std::time::Duration;

/// Weight of the newest measurement: a change shows within some ten batches, an outlier does not.
const NEWEST: f64 = 0.2;
/// How much must be gained over what it costs: the processor's time belongs to the guest first.
const MARGIN: f64 = 1.5;
/// A sample that does not shrink below this is not worth the receiver's work either.
const RATIO_MAX: f64 = 0.9;

/// A way to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Quick: pays on links of some gigabits.
    Lz4,
    /// Zstandard at its first level: shrinks more, for links well below a gigabit.
    Zstd,
}

impl Method {
    /// All of them, the quickest first.
    pub const ALL: [Self; 2] = [Self::Lz4, Self::Zstd];
}

/// What one stream has measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Compression {
    link_seconds_per_byte: Option<f64>,
    work_seconds_per_byte: [Option<f64>; Method::ALL.len()],
}

impl Compression {
    /// The link took `bytes` in `time`, waits included.
    pub fn wrote(&mut self, bytes: Bytes, time: Duration) {
        average(&mut self.link_seconds_per_byte, bytes, time);
    }

    /// Compressing `bytes` (before) took `time`.
    pub fn compressed(&mut self, method: Method, bytes: Bytes, time: Duration) {
        average(&mut self.work_seconds_per_byte[method as usize], bytes, time);
    }

    /// What the link takes.
    pub fn link(&self) -> Option<Rate> {
        self.link_seconds_per_byte.map(|seconds| Rate((1.0 / seconds.max(1e-12)) as u64))
    }

    /// Whether trying a sample makes sense: not before the link is known, nor when nothing could pay on it.
    pub fn may_pay(&self, method: Method) -> bool {
        let Some(link) = self.link_seconds_per_byte else { return false };
        self.work_seconds_per_byte[method as usize].is_none_or(|work| link > work * MARGIN)
    }

    /// How a batch is to be compressed whose sample shrank to these parts of its size: in the way in which it arrives soonest, or not
    /// at all.
    pub fn choose(&self, samples: &[(Method, f64)]) -> Option<Method> {
        let link = self.link_seconds_per_byte?;
        let cost = |&(method, ratio): &(Method, f64)| {
            let work = self.work_seconds_per_byte[method as usize]?;
            let pays = ratio <= RATIO_MAX && (1.0 - ratio) * link > work * MARGIN;
            pays.then_some((method, work * MARGIN + ratio * link))
        };
        samples.iter().filter_map(cost).min_by(|a, b| a.1.total_cmp(&b.1)).map(|(method, _)| method)
    }
}

fn average(value: &mut Option<f64>, bytes: Bytes, time: Duration) {
    if bytes.0 > 0 {
        let seen = time.as_secs_f64() / bytes.0 as f64;
        *value = Some(value.map_or(seen, |before| before + (seen - before) * NEWEST));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn measured(link: u64, lz4: u64, zstd: u64) -> Compression {
        let mut policy = Compression::default();
        policy.wrote(Bytes(link), SECOND);
        policy.compressed(Method::Lz4, Bytes(lz4), SECOND);
        policy.compressed(Method::Zstd, Bytes(zstd), SECOND);
        policy
    }

    #[test]
    fn it_pays_on_a_slow_link_for_pages_that_shrink() {
        use Method::{Lz4, Zstd};
        let gigabit = measured(120_000_000, 800_000_000, 300_000_000);
        assert!(gigabit.may_pay(Lz4));
        assert_eq!(gigabit.choose(&[(Lz4, 0.5), (Zstd, 0.4)]), Some(Lz4), "it is done sooner");
        assert_eq!(gigabit.choose(&[(Lz4, 0.95), (Zstd, 0.93)]), None, "hardly smaller");
        let slow = measured(12_000_000, 800_000_000, 300_000_000);
        assert_eq!(slow.choose(&[(Lz4, 0.5), (Zstd, 0.4)]), Some(Zstd), "the link is what counts");
        assert_eq!(slow.choose(&[(Lz4, 0.5)]), Some(Lz4), "what was not tried is not chosen");
        let fast = measured(2_500_000_000, 800_000_000, 300_000_000);
        assert!(!fast.may_pay(Lz4) && fast.choose(&[(Lz4, 0.1)]).is_none(), "faster than the processor");
        let busy = measured(120_000_000, 100_000_000, 50_000_000);
        assert!(!busy.may_pay(Lz4), "the host has no time for it");
    }

    #[test]
    fn nothing_is_tried_before_the_link_is_known() {
        assert!(!Compression::default().may_pay(Method::Lz4));
        assert_eq!(Compression::default().choose(&[(Method::Lz4, 0.1)]), None);
    }

    proptest! {
        /// Whenever it says yes, the batch arrives sooner by the figures that were measured.
        #[test]
        fn never_slower_than_the_link_without_it(link in 1u64..1 << 36, lz4 in 1u64..1 << 36, zstd in 1u64..1 << 36,
                                                 ratios in (0.0f64..1.0, 0.0f64..1.0)) {
            let samples = [(Method::Lz4, ratios.0), (Method::Zstd, ratios.1)];
            if let Some(method) = measured(link, lz4, zstd).choose(&samples) {
                let (work, ratio) = if method == Method::Lz4 { (lz4, ratios.0) } else { (zstd, ratios.1) };
                let (link, work) = (1.0 / link as f64, 1.0 / work as f64);
                prop_assert!(work + ratio * link < link);
            }
        }
    }
}
