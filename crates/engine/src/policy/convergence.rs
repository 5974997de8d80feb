//! When pre-copy stops the VM.
//!
//! Clark et al. (NSDI 2005, section 4) and QEMU stop as soon as the residual fits the downtime limit. That makes the
//! limit the downtime: an idle VM allowed 300 ms stops for 300 ms. Here the limit only *permits* the stop; rounds go on
//! as long as they still shrink what the stop would have to send.

use crate::units::{Bytes, Rate};
use std::time::Duration;

/// A residual that is sent faster than this cannot be shrunk any further: stopping the VM costs more.
const NEGLIGIBLE: Duration = Duration::from_micros(500);
/// Rounds that are spent on a residual that already fits. More would keep write-protecting a guest for nothing.
const ROUNDS_AFTER_FIT_MAX: u32 = 12;
/// Rounds in a row that may fail to shrink the residual before the stop: a burst of writes fools one, seldom three.
const STALLS_MAX: u32 = 3;

/// What a scan at the end of a round has shown.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// Bytes that were written since the round began and are yet to be sent.
    pub residual: Bytes,
    /// Bandwidth seen so far.
    pub bandwidth: Rate,
    /// Time since the migration began.
    pub elapsed: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send another round while the VM runs.
    Round,
    /// Stop the VM and send the residual.
    Stop,
}

/// The convergence rule of one migration, and what it remembers of earlier rounds.
#[derive(Clone, Debug)]
pub struct Convergence {
    downtime_limit: Duration,
    timeout: Option<Duration>,
    smallest: Option<Bytes>,
    rounds_after_fit: u32,
    stalls: u32,
}

impl Convergence {
    /// A rule that stops within `downtime_limit`, or after `timeout` whatever the residual is.
    pub fn new(downtime_limit: Duration, timeout: Option<Duration>) -> Self {
        Self { downtime_limit, timeout, smallest: None, rounds_after_fit: 0, stalls: 0 }
    }

    /// Changes the downtime limit of a migration that runs.
    pub fn set_downtime_limit(&mut self, limit: Duration) {
        self.downtime_limit = limit;
    }

    /// The downtime limit in force.
    pub fn downtime_limit(&self) -> Duration {
        self.downtime_limit
    }

    /// Decides on the scan that `seen` describes.
    pub fn decide(&mut self, seen: Observation) -> Verdict {
        if self.timeout.is_some_and(|timeout| seen.elapsed >= timeout) {
            return Verdict::Stop;
        }
        let downtime = seen.bandwidth.time_for(seen.residual);
        let shrank = self.smallest.is_none_or(|smallest| seen.residual.0 < smallest.0 - smallest.0 / 8);
        self.smallest = Some(self.smallest.map_or(seen.residual, |smallest| smallest.min(seen.residual)));
        if downtime > self.downtime_limit {
            return Verdict::Round;
        }
        self.rounds_after_fit += 1;
        self.stalls = if shrank { 0 } else { self.stalls + 1 };
        let floor = self.smallest.map_or(0, |smallest| smallest.0 + smallest.0 / 4);
        let settled = self.stalls >= STALLS_MAX && seen.residual.0 <= floor;
        if downtime <= NEGLIGIBLE || settled || self.rounds_after_fit >= ROUNDS_AFTER_FIT_MAX {
            return Verdict::Stop;
        }
        Verdict::Round
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIGABIT: Rate = Rate(119_000_000);

    fn rounds(rule: &mut Convergence, residuals: impl IntoIterator<Item = u64>) -> usize {
        let mut elapsed = Duration::ZERO;
        for (round, residual) in residuals.into_iter().enumerate() {
            elapsed += Duration::from_millis(50);
            let seen = Observation { residual: Bytes(residual), bandwidth: GIGABIT, elapsed };
            if rule.decide(seen) == Verdict::Stop {
                return round;
            }
        }
        usize::MAX
    }

    #[test]
    fn an_idle_vm_stops_at_once() {
        let mut rule = Convergence::new(Duration::from_millis(300), None);
        assert_eq!(rounds(&mut rule, [14 << 12]), 0);
    }

    #[test]
    fn a_residual_that_fits_is_shrunk_further_before_the_stop() {
        let mut rule = Convergence::new(Duration::from_millis(300), None);
        assert_eq!(rounds(&mut rule, [30 << 20, 8 << 20, 2 << 20, 500 << 10, 40 << 10]), 4);
    }

    #[test]
    fn a_residual_that_stays_is_accepted_after_a_few_rounds() {
        let mut rule = Convergence::new(Duration::from_millis(300), None);
        assert_eq!(rounds(&mut rule, std::iter::repeat_n(4 << 20, 50)), 3);
    }

    #[test]
    fn a_residual_that_does_not_fit_waits_for_the_timeout() {
        let mut rule = Convergence::new(Duration::from_millis(300), Some(Duration::from_secs(2)));
        assert_eq!(rounds(&mut rule, std::iter::repeat_n(100 << 20, 100)), 39);
    }

    proptest! {
        /// Without a timeout the VM is never stopped for longer than it was allowed to, at the bandwidth that was seen.
        #[test]
        fn a_stop_always_fits_the_limit(residuals in prop::collection::vec(0u64..1 << 30, 1..60), limit_ms in 1u64..1000) {
            let mut rule = Convergence::new(Duration::from_millis(limit_ms), None);
            for residual in residuals {
                let seen = Observation { residual: Bytes(residual), bandwidth: GIGABIT, elapsed: Duration::ZERO };
                if rule.decide(seen) == Verdict::Stop {
                    prop_assert!(GIGABIT.time_for(Bytes(residual)) <= Duration::from_millis(limit_ms));
                    break;
                }
            }
        }

        /// Whatever fits for long enough ends.
        #[test]
        fn what_fits_always_ends(residuals in prop::collection::vec(0u64..10 << 20, 64)) {
            let mut rule = Convergence::new(Duration::from_millis(300), None);
            prop_assert!(rounds(&mut rule, residuals) < ROUNDS_AFTER_FIT_MAX as usize);
        }
    }
}
