//! Whether pages that were sent before are kept, to send only what has changed of them (XBZRLE's idea: Svärd et al., VEE 2011;
//! QEMU docs/devel/migration/xbzrle.rst).
//!
//! It costs memory, a copy of each page that is sent again, and a comparison. It pays where pages change little and the link is
//! slower than that work. Both are measured, and what does not pay is left, and tried again later with a few pages.

use crate::units::Bytes;
use std::time::Duration;

/// Pages whose comparison tells whether it pays.
const SAMPLE: u32 = 256;
/// Pages that are sent whole after it did not pay, before it is tried once more.
const REST: u32 = 8192;
/// How much must be gained over what it costs.
const MARGIN: f64 = 1.5;

/// The rule of one stream.
#[derive(Clone, Copy, Debug)]
pub struct Delta {
    tried: u32,
    saved: u64,
    work: Duration,
    resting: u32,
}

impl Default for Delta {
    fn default() -> Self {
        Self::new()
    }
}

impl Delta {
    /// A rule that knows nothing yet, and tries.
    pub fn new() -> Self {
        Self { tried: 0, saved: 0, work: Duration::ZERO, resting: 0 }
    }

    /// Whether the next `pages` are compared with what was sent, and kept.
    pub fn is_on(&mut self, pages: u32) -> bool {
        if self.resting == 0 {
            return true;
        }
        self.resting = self.resting.saturating_sub(pages);
        false
    }

    /// So many pages were compared, which took `work` and saved `saved` bytes on a link that takes `link_seconds_per_byte`.
    pub fn compared(&mut self, pages: u32, saved: Bytes, work: Duration, link_seconds_per_byte: f64) {
        self.tried += pages;
        self.saved += saved.0;
        self.work += work;
        if self.tried < SAMPLE {
            return;
        }
        let gain = self.saved as f64 * link_seconds_per_byte;
        if gain < self.work.as_secs_f64() * MARGIN {
            self.resting = REST;
        }
        (self.tried, self.saved, self.work) = (0, 0, Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIGABIT: f64 = 1.0 / 119e6;

    #[test]
    fn it_is_tried_left_where_it_does_not_pay_and_tried_again() {
        let mut rule = Delta::new();
        assert!(rule.is_on(64));
        rule.compared(SAMPLE, Bytes(0), Duration::from_micros(300), GIGABIT);
        assert!(!rule.is_on(REST - 1));
        assert!(!rule.is_on(1));
        assert!(rule.is_on(1), "it has rested");
    }

    #[test]
    fn it_goes_on_where_it_pays() {
        let mut rule = Delta::new();
        for _ in 0..100 {
            assert!(rule.is_on(64));
            rule.compared(64, Bytes(64 * 4000), Duration::from_micros(200), GIGABIT);
        }
        let mut fast = Delta::new();
        fast.compared(SAMPLE, Bytes(u64::from(SAMPLE) * 4000), Duration::from_millis(1), 1.0 / 50e9);
        assert!(!fast.is_on(1), "the link is faster than the comparison");
    }

    proptest! {
        /// Where it goes on after a sample, that sample arrived sooner by the figures that were measured.
        #[test]
        fn never_slower_than_the_link_without_it(saved in 0u64..1 << 20, work_us in 0u64..100_000, link in 1u64..1 << 36) {
            let mut rule = Delta::new();
            rule.compared(SAMPLE, Bytes(saved), Duration::from_micros(work_us), 1.0 / link as f64);
            if rule.is_on(1) {
                prop_assert!(work_us as f64 / 1e6 <= saved as f64 / link as f64 + 1e-12);
            }
        }
    }
}
