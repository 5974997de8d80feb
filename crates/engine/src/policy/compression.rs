//! When a batch is compressed: only when it is sure to arrive sooner.
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

/// What one stream has measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Compression {
    link_seconds_per_byte: Option<f64>,
    work_seconds_per_byte: Option<f64>,
}

impl Compression {
    /// The link took `bytes` in `time`, waits included.
    pub fn wrote(&mut self, bytes: Bytes, time: Duration) {
        average(&mut self.link_seconds_per_byte, bytes, time);
    }

    /// Compressing `bytes` (before) took `time`.
    pub fn compressed(&mut self, bytes: Bytes, time: Duration) {
        average(&mut self.work_seconds_per_byte, bytes, time);
    }

    /// What the link takes.
    pub fn link(&self) -> Option<Rate> {
        self.link_seconds_per_byte.map(|seconds| Rate((1.0 / seconds.max(1e-12)) as u64))
    }

    /// Whether trying a sample makes sense: not before the link is known, nor when nothing could pay on it.
    pub fn may_pay(&self) -> bool {
        let Some(link) = self.link_seconds_per_byte else { return false };
        self.work_seconds_per_byte.is_none_or(|work| link > work * MARGIN)
    }

    /// Whether a batch whose sample shrank to `ratio` of its size is to be compressed.
    pub fn pays(&self, ratio: f64) -> bool {
        let (Some(link), Some(work)) = (self.link_seconds_per_byte, self.work_seconds_per_byte) else {
            return false;
        };
        ratio <= RATIO_MAX && (1.0 - ratio) * link > work * MARGIN
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

    fn measured(link: u64, work: u64) -> Compression {
        let mut policy = Compression::default();
        let second = Duration::from_secs(1);
        policy.wrote(Bytes(link), second);
        policy.compressed(Bytes(work), second);
        policy
    }

    #[test]
    fn it_pays_on_a_slow_link_for_pages_that_shrink() {
        let gigabit = measured(120_000_000, 800_000_000);
        assert!(gigabit.may_pay() && gigabit.pays(0.5));
        assert!(!gigabit.pays(0.95), "hardly smaller");
        let fast = measured(2_500_000_000, 800_000_000);
        assert!(!fast.may_pay() && !fast.pays(0.1), "the link is faster than the processor");
        let busy = measured(120_000_000, 100_000_000);
        assert!(!busy.may_pay(), "the host has no time for it");
    }

    #[test]
    fn nothing_is_tried_before_the_link_is_known() {
        assert!(!Compression::default().may_pay());
    }

    proptest! {
        /// Whenever it says yes, the batch arrives sooner by the figures that were measured.
        #[test]
        fn never_slower_than_the_link_without_it(link in 1u64..1 << 36, work in 1u64..1 << 36, ratio in 0.0f64..1.0) {
            if measured(link, work).pays(ratio) {
                let (link, work) = (1.0 / link as f64, 1.0 / work as f64);
                prop_assert!(work + ratio * link < link);
            }
        }
    }
}
