//! How fast each round is sent: dynamic rate limiting, as Clark et al. have it (NSDI 2005, section 5.3).
//!
//! The first round takes longest and gains nothing from haste, for what is written meanwhile has to be sent again anyway: it
//! goes at the minimum. Each later round goes a little faster than the guest wrote during the last one, so that rounds shrink, and
//! no faster, so that the guest's own traffic keeps the rest of the link. Once that would be more than the maximum, or next to
//! nothing is left, more rounds gain nothing; what is left is sent at the maximum while the VM is stopped.
//!
//! The paper stops there in any case. Here the downtime limit has the last word ([`super::Convergence`]): a VM whose residual does
//! not fit goes on at the maximum.

use crate::units::{Bytes, Rate};

/// How much faster than the guest writes a round is sent: the paper's 50 Mbit/s.
pub const STEP: Rate = Rate(50_000_000 / 8);
/// What is left when more rounds gain nothing: the paper's 256 KiB.
pub const RESIDUAL_MIN: Bytes = Bytes(256 << 10);

/// The limits of one migration. Without a minimum all rounds go at the maximum; without a maximum that is what the link takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimits {
    /// The rate of the first round, and the lowest of all.
    pub min: Option<Rate>,
    /// The highest rate, and that of the last round.
    pub max: Option<Rate>,
    /// What is added to the rate at which the guest writes.
    pub step: Rate,
}

impl Default for RateLimits {
    fn default() -> Self {
        Self { min: None, max: None, step: STEP }
    }
}

impl RateLimits {
    /// The rate of a round; `None` is as fast as the link takes it. `written` is how fast the guest wrote during the round
    /// before, and unknown before the first.
    pub fn of_round(&self, written: Option<Rate>) -> Option<Rate> {
        let Some(min) = self.min else { return self.max };
        let wanted = written.map_or(min, |written| self.ahead_of(written).max(min));
        Some(self.max.map_or(wanted, |max| wanted.min(max)))
    }

    /// The rate of what is sent while the VM is stopped.
    pub fn of_stop(&self) -> Option<Rate> {
        self.max
    }

    /// Whether more rounds gain nothing, with `residual` left and the guest writing at this rate. `link` is what the link takes at
    /// most, as far as it is known: no round can go faster, whatever the limits say.
    pub fn is_exhausted(&self, written: Rate, residual: Bytes, link: Option<Rate>) -> bool {
        let max = match (self.max, link) {
            (Some(max), Some(link)) => Some(max.min(link)),
            (max, link) => max.or(link),
        };
        self.min.is_some() && (residual < RESIDUAL_MIN || max.is_some_and(|max| self.ahead_of(written) > max))
    }

    fn ahead_of(&self, written: Rate) -> Rate {
        Rate(written.0.saturating_add(self.step.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mbit(rate: u64) -> Rate {
        Rate(rate * 1_000_000 / 8)
    }

    #[test]
    fn the_papers_example() {
        let limits = RateLimits { min: Some(mbit(100)), max: Some(mbit(500)), step: STEP };
        assert_eq!(limits.of_round(None), Some(mbit(100)), "the first round");
        assert_eq!(limits.of_round(Some(mbit(20))), Some(mbit(100)), "never below the minimum");
        assert_eq!(limits.of_round(Some(mbit(200))), Some(mbit(250)));
        assert_eq!(limits.of_round(Some(mbit(480))), Some(mbit(500)), "never above the maximum");
        assert_eq!(limits.of_stop(), Some(mbit(500)));
        assert!(!limits.is_exhausted(mbit(450), Bytes(1 << 20), None));
        assert!(limits.is_exhausted(mbit(451), Bytes(1 << 20), None), "it would pass the maximum");
        assert!(limits.is_exhausted(mbit(10), Bytes(255 << 10), None), "next to nothing is left");
        assert!(limits.is_exhausted(mbit(300), Bytes(1 << 20), Some(mbit(340))), "the link takes no more");
    }

    #[test]
    fn without_a_minimum_every_round_goes_at_the_maximum() {
        let limits = RateLimits { max: Some(mbit(500)), ..RateLimits::default() };
        assert_eq!(limits.of_round(None), limits.max);
        assert_eq!(limits.of_round(Some(mbit(10))), limits.max);
        assert!(
            !limits.is_exhausted(mbit(900), Bytes(0), None),
            "that is the business of the convergence alone"
        );
        assert_eq!(RateLimits::default().of_round(Some(mbit(10))), None);
    }

    proptest! {
        /// Whatever the guest does, no round leaves the limits.
        #[test]
        fn a_rate_never_leaves_its_bounds(min in 1u64..1 << 40, more in 0u64..1 << 40, step in 0u64..1 << 40,
                                          written in prop::collection::vec(any::<u64>(), 1..50)) {
            let (min, max) = (Rate(min), Rate(min + more));
            let limits = RateLimits { min: Some(min), max: Some(max), step: Rate(step) };
            for written in std::iter::once(None).chain(written.into_iter().map(|rate| Some(Rate(rate)))) {
                let rate = limits.of_round(written).unwrap();
                prop_assert!(min <= rate && rate <= max);
            }
        }

        /// A guest that writes at an even rate below the maximum is caught up with: each round is shorter than the last.
        #[test]
        fn rounds_shrink_while_the_rate_may_rise(written in 1u64..100_000_000, min in 1u64..100_000_000) {
            let limits = RateLimits { min: Some(Rate(min)), max: Some(Rate(200_000_000)), step: STEP };
            let mut residual = Bytes(512 << 20);
            let mut seen = None;
            for _ in 0..500 {
                let rate = limits.of_round(seen).unwrap();
                let took = rate.time_for(residual);
                let next = Bytes((written as f64 * took.as_secs_f64()) as u64);
                if seen.is_some() {
                    prop_assert!(next < residual || next < RESIDUAL_MIN);
                }
                residual = next;
                seen = Some(Rate(written));
            }
            prop_assert!(limits.is_exhausted(Rate(written), residual, None));
        }
    }
}
