//! How many pages are written in a window of any length, from the windows that were measured.

use crate::units::Pages;
use std::time::Duration;

/// Pages written against the length of the window: straight lines between what was measured. It never falls.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Seconds and pages, ascending, from nothing on.
    points: Vec<(f64, f64)>,
    /// There are no more pages than these.
    most: f64,
}

impl Curve {
    /// A curve through these points, of a VM that has so many pages.
    pub fn new(points: impl IntoIterator<Item = (Duration, f64)>, total: Pages) -> Self {
        let most = total.0 as f64;
        let mut points: Vec<(f64, f64)> = points
            .into_iter()
            .map(|(window, pages)| (window.as_secs_f64(), pages.clamp(0.0, most)))
            .collect();
        points.push((0.0, 0.0));
        points.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        points.dedup_by_key(|(seconds, _)| *seconds);
        for at in 1..points.len() {
            points[at].1 = points[at].1.max(points[at - 1].1);
        }
        Self { points, most }
    }

    /// Pages written in a window of this length. Beyond the longest that was measured the set is taken to grow on as it did last,
    /// until all pages are written: what was not seen is not promised.
    pub fn pages_in(&self, window: Duration) -> f64 {
        let seconds = window.as_secs_f64();
        let after = self.points.partition_point(|(at, _)| *at <= seconds).min(self.points.len() - 1);
        if after == 0 {
            return 0.0;
        }
        let ((t0, p0), (t1, p1)) = (self.points[after - 1], self.points[after]);
        (p0 + (p1 - p0) * (seconds - t0) / (t1 - t0)).min(self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn it_goes_through_its_points_and_on() {
        let curve = Curve::new([(ms(2000), 300.0), (ms(1000), 200.0)], Pages(1000));
        for (window, pages) in
            [(0, 0.0), (500, 100.0), (1000, 200.0), (1500, 250.0), (3000, 400.0), (90_000, 1000.0)]
        {
            assert_eq!(curve.pages_in(ms(window)), pages, "{window} ms");
        }
        assert_eq!(Curve::new([], Pages(10)).pages_in(ms(5)), 0.0);
    }

    proptest! {
        #[test]
        fn it_never_falls_and_never_exceeds_the_vm(
            points in prop::collection::vec((1u64..100_000, 0.0f64..2e6), 0..20),
            windows in prop::collection::vec(0u64..1_000_000, 2..20),
        ) {
            let curve = Curve::new(points.into_iter().map(|(window, pages)| (ms(window), pages)), Pages(1_000_000));
            let mut windows = windows;
            windows.sort_unstable();
            let pages: Vec<f64> = windows.iter().map(|window| curve.pages_in(ms(*window))).collect();
            prop_assert!(pages.is_sorted(), "{pages:?}");
            prop_assert!(pages.iter().all(|pages| (0.0..=1e6).contains(pages)));
        }
    }
}
