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
/// How fast unsettled pages are taken to be read and compared: an estimate, which only decides when to settle them before the
/// stop. They are compared at the stop in any case.
const COMPARE_RATE: Rate = Rate(2_000_000_000);
/// The part of the downtime limit that may go into that, as a divisor.
const COMPARE_PART: u32 = 8;
/// How long a guest is left in peace after its disk I/O was settled: the moments for which it stands still then are a small
/// part of its time.
const SETTLE_PAUSE: Duration = Duration::from_secs(1);

/// What a scan at the end of a round has shown.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// Bytes that were written since the round began and are yet to be sent.
    pub residual: Bytes,
    /// Bytes that were sent already and that a stop would have to compare with that: see `SourceInput::Unsettled`.
    pub unsettled: Bytes,
    /// Bandwidth seen so far.
    pub bandwidth: Rate,
    /// Time since the migration began.
    pub elapsed: Duration,
    /// More rounds gain nothing: see [`super::RateLimits::is_exhausted`].
    pub exhausted: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send another round while the VM runs.
    Round,
    /// Let the guest's disk I/O come to an end, then send another round while the VM runs.
    Settle,
    /// Stop the VM and send the residual, and what is unsettled.
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
    settled: Option<Duration>,
}

impl Convergence {
    /// A rule that stops within `downtime_limit`, or after `timeout` whatever the residual is.
    pub fn new(downtime_limit: Duration, timeout: Option<Duration>) -> Self {
        Self { downtime_limit, timeout, smallest: None, rounds_after_fit: 0, stalls: 0, settled: None }
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
        let verdict = self.without_unsettled(seen);
        let compare = COMPARE_RATE.time_for(seen.unsettled);
        if verdict == Verdict::Round || compare <= self.downtime_limit / COMPARE_PART {
            return verdict;
        }
        if self.settled.is_none_or(|at| seen.elapsed.saturating_sub(at) >= SETTLE_PAUSE) {
            self.settled = Some(seen.elapsed);
            return Verdict::Settle;
        }
        let fits = seen.bandwidth.time_for(seen.residual) + compare <= self.downtime_limit;
        if fits { Verdict::Stop } else { Verdict::Round }
    }

    fn without_unsettled(&mut self, seen: Observation) -> Verdict {
        let downtime = seen.bandwidth.time_for(seen.residual);
        let shrank = self.smallest.is_none_or(|smallest| seen.residual.0 < smallest.0 - smallest.0 / 8);
        self.smallest = Some(self.smallest.map_or(seen.residual, |smallest| smallest.min(seen.residual)));
        if downtime > self.downtime_limit {
            return Verdict::Round;
        }
        if seen.exhausted {
            return Verdict::Stop;
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

    fn seen(residual: u64, unsettled: u64) -> Observation {
        let (residual, unsettled) = (Bytes(residual), Bytes(unsettled));
        Observation { residual, unsettled, bandwidth: GIGABIT, elapsed: Duration::ZERO, exhausted: false }
    }

    fn rounds(rule: &mut Convergence, residuals: impl IntoIterator<Item = u64>) -> usize {
        let mut elapsed = Duration::ZERO;
        for (round, residual) in residuals.into_iter().enumerate() {
            elapsed += Duration::from_millis(50);
            if rule.decide(Observation { elapsed, ..seen(residual, 0) }) == Verdict::Stop {
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
    fn a_residual_that_fits_is_not_shrunk_when_rounds_gain_nothing() {
        let exhausted = |residual| Observation { exhausted: true, ..seen(residual, 0) };
        let mut rule = Convergence::new(Duration::from_millis(300), None);
        assert_eq!(rule.decide(exhausted(100 << 20)), Verdict::Round, "it does not fit");
        assert_eq!(rule.decide(exhausted(30 << 20)), Verdict::Stop);
    }

    #[test]
    fn a_residual_that_does_not_fit_waits_for_the_timeout() {
        let mut rule = Convergence::new(Duration::from_millis(300), Some(Duration::from_secs(2)));
        assert_eq!(rounds(&mut rule, std::iter::repeat_n(100 << 20, 100)), 39);
    }

    #[test]
    fn disk_io_is_settled_before_a_stop_that_would_have_much_to_compare() {
        use Verdict::{Round, Settle, Stop};
        const SMALL: u64 = 14 << 12;
        let rule = || Convergence::new(Duration::from_millis(300), None);
        assert_eq!(rule().decide(seen(SMALL, 50 << 20)), Stop, "it is compared in no time");
        let mut large = rule();
        assert_eq!(large.decide(seen(SMALL, 2 << 30)), Settle);
        assert_eq!(large.decide(seen(SMALL, 1 << 30)), Round, "it does not fit, and it is left in peace");
        assert_eq!(large.decide(seen(SMALL, 200 << 20)), Stop, "it fits");
        let later = Observation { elapsed: SETTLE_PAUSE, ..seen(SMALL, 1 << 30) };
        assert_eq!(large.decide(later), Settle);
        let mut late = Convergence::new(Duration::from_millis(300), Some(Duration::ZERO));
        assert_eq!(late.decide(seen(SMALL, 2 << 30)), Stop, "its time is over");
    }

    proptest! {
        /// Without a timeout the VM is never stopped for longer than it was allowed to, at the bandwidth that was seen.
        #[test]
        fn a_stop_always_fits_the_limit(residuals in prop::collection::vec(0u64..1 << 30, 1..60), limit_ms in 1u64..1000) {
            let mut rule = Convergence::new(Duration::from_millis(limit_ms), None);
            for residual in residuals {
                if rule.decide(seen(residual, 0)) == Verdict::Stop {
                    prop_assert!(GIGABIT.time_for(Bytes(residual)) <= Duration::from_millis(limit_ms));
                    break;
                }
            }
        }

        /// What is unsettled counts for the limit too.
        #[test]
        fn a_stop_with_disk_io_fits_the_limit(sizes in prop::collection::vec((0u64..1 << 28, 0u64..1 << 28), 1..60), limit_ms in 1u64..1000) {
            let mut rule = Convergence::new(Duration::from_millis(limit_ms), None);
            for (residual, unsettled) in sizes {
                if rule.decide(seen(residual, unsettled)) == Verdict::Stop {
                    let limit = Duration::from_millis(limit_ms);
                    let needed = GIGABIT.time_for(Bytes(residual)) + COMPARE_RATE.time_for(Bytes(unsettled));
                    prop_assert!(needed <= limit + limit / COMPARE_PART);
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
