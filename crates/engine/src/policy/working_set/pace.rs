//! How long the next interval of a measurement is: as short as was asked, unless that costs the guest too much.
//!
//! At the begin of each interval all memory is armed, and the guest's first write to each page is a fault in the kernel. The longer
//! the interval, the more writes go to pages that are written already and cost nothing.

use crate::units::Pages;
use std::time::Duration;

/// What a first write to an armed page costs the guest. Between 0.7 and 1.8 us were seen; the guest comes first.
pub const FIRST_WRITE: Duration = Duration::from_micros(2);
/// An interval that was stretched gets shorter by this factor at most: one quiet moment of the guest proves nothing.
const SHRINK_MAX: u32 = 2;

/// The part of one processor's time that goes into first writes to so many pages.
pub fn cost_share(pages: Pages, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { pages.0 as f64 * FIRST_WRITE.as_secs_f64() / seconds } else { 0.0 }
}

/// The lengths of the intervals of one measurement.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    asked: Duration,
    longest: Duration,
    share_max: f64,
    interval: Duration,
}

impl Pace {
    /// Intervals of `asked`, which are stretched up to `longest` where they would cost more than `share_max` of a processor.
    pub fn new(asked: Duration, longest: Duration, share_max: f64) -> Self {
        Self { asked, longest: longest.max(asked), share_max, interval: asked }
    }

    /// Length of the interval that goes on, or comes.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Takes in how many pages were written in an interval; the next one's length.
    pub fn next(&mut self, written: Pages) -> Duration {
        let seconds = written.0 as f64 * FIRST_WRITE.as_secs_f64() / self.share_max.max(f64::MIN_POSITIVE);
        let needed = Duration::try_from_secs_f64(seconds).unwrap_or(self.longest);
        let least = self.asked.max(self.interval / SHRINK_MAX);
        self.interval = needed.max(least).min(self.longest);
        self.interval
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_quiet_guest_is_measured_as_was_asked() {
        let mut pace = Pace::new(SECOND, 30 * SECOND, 0.03);
        assert_eq!(pace.next(Pages(15_000)), SECOND, "3 % of a second are 15000 first writes");
        assert!(pace.next(Pages(15_100)) > SECOND);
    }

    #[test]
    fn a_busy_guest_gets_longer_intervals_until_they_cost_what_they_may() {
        let mut pace = Pace::new(SECOND, 30 * SECOND, 0.03);
        // All of a set of 60000 pages is written within any interval.
        let second = pace.next(Pages(60_000));
        assert_eq!(second, 4 * SECOND);
        assert!(cost_share(Pages(60_000), second) <= 0.03 + 1e-9);
        assert_eq!(pace.next(Pages(60_000)), second);
        assert_eq!(
            [pace.next(Pages(0)), pace.next(Pages(0)), pace.next(Pages(0))],
            [2 * SECOND, SECOND, SECOND]
        );
    }

    proptest! {
        /// It stays within its bounds, is never longer than the cost asks for, and keeps the cost where the bounds let it.
        #[test]
        fn the_interval_never_leaves_its_bounds(
            asked in 1u64..10_000, longest in 1u64..100_000, share in 0.0f64..1.0,
            written in prop::collection::vec(0u64..1 << 40, 1..50),
        ) {
            let (asked, longest) = (Duration::from_millis(asked), Duration::from_millis(longest));
            let mut pace = Pace::new(asked, longest, share);
            for pages in written {
                let before = pace.interval();
                let next = pace.next(Pages(pages));
                prop_assert!(next >= asked && next <= longest.max(asked));
                prop_assert!(next >= longest || cost_share(Pages(pages), next) <= share * 1.001 + 1e-9);
                prop_assert!(next <= asked.max(before / 2) || cost_share(Pages(pages), next) >= share * 0.999 - 1e-9);
            }
        }
    }
}
