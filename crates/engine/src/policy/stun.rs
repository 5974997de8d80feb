//! Slowing a guest that writes faster than the link takes (Clark et al., NSDI 2005, section 5.2, "rapid page dirtying").
//!
//! The processors that write most get only a part of their time. How much is not guessed in fixed steps, as QEMU's auto-converge does:
//! what the guest wrote while it had one part tells what it would write with another. A step down is bounded, for guests differ,
//! and nobody goes below a floor.

use crate::units::Rate;

/// The smallest part of its time that a stunned processor keeps, in thousandths. QEMU's `max-cpu-throttle` leaves ten times as much, in which
/// a guest still writes some 70 MB/s: it serves nobody any more, and outruns a slow link all the same. Less cannot be told
/// the kernel, whose shortest quota is a millisecond and whose longest period is a second.
pub const KEEP_MIN: u32 = 1;
/// All of it.
pub const KEEP_ALL: u32 = 1000;
/// Rounds that may fail to converge before a guest is slowed that writes slower than the link: the second round sends what was written
/// during the long first one, and may suffice. One that writes faster than the link never converges.
const PATIENCE: u32 = 3;
/// The part of the bandwidth that the guest may write at, as a divisor: each round is a quarter of the one before then. A guest that is
/// slowed more is slow for a shorter time, and loses less in the end.
const WRITES_PART: u64 = 4;
/// One step takes away at most this part of what a processor has, as a divisor of it.
const STEP_PART: u32 = 4;

/// The stun rule of one migration.
#[derive(Clone, Debug)]
pub struct Stun {
    allowed: bool,
    keep: u32,
    late: u32,
}

/// What a round has shown.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// How fast the guest writes: in a moment that was short enough for it not to come back to the pages that it had written before,
    /// if there was one.
    pub written: Rate,
    /// What the link takes.
    pub bandwidth: Rate,
    /// Whether what is left could be sent within the downtime limit.
    pub fits: bool,
}

impl Stun {
    /// A rule that slows guests only where that was `allowed`.
    pub fn new(allowed: bool) -> Self {
        Self { allowed, keep: KEEP_ALL, late: 0 }
    }

    /// Allows it, or not any more, while the migration runs.
    pub fn allow(&mut self, allowed: bool) {
        self.allowed = allowed;
    }

    /// The part of its time that the guest has, in thousandths.
    pub fn keep(&self) -> u32 {
        self.keep
    }

    /// Decides on the next round: the part of its time that the guest gets, if that changes. The floor is told again for as long as the
    /// guest writes too fast with it: who carries it out may have a stronger means that was not tried yet.
    pub fn decide(&mut self, seen: Seen) -> Option<u32> {
        if !self.allowed {
            return self.set(KEEP_ALL);
        }
        if seen.fits {
            // What converges is left as it is: letting go would only make it diverge again.
            self.late = 0;
            return None;
        }
        self.late += 1;
        let bearable = Rate(seen.bandwidth.0 / WRITES_PART);
        let hopeless = seen.written >= seen.bandwidth;
        if seen.written <= bearable || self.late < PATIENCE && !hopeless {
            return None;
        }
        let wanted = u128::from(self.keep) * u128::from(bearable.0) / u128::from(seen.written.0.max(1));
        let wanted = u32::try_from(wanted).unwrap_or(KEEP_ALL);
        self.keep = wanted.max(self.keep / STEP_PART).max(KEEP_MIN);
        Some(self.keep)
    }

    /// Lets the guest have all of its time again, whatever happens next.
    pub fn end(&mut self) -> Option<u32> {
        self.allowed = false;
        self.set(KEEP_ALL)
    }

    fn set(&mut self, keep: u32) -> Option<u32> {
        let changed = self.keep != keep;
        self.keep = keep;
        changed.then_some(keep)
    }
}

/// How much of all writes the stunned processors must account for, in percent: those that write little are left alone.
const WRITERS_PART: u128 = 80;

/// Which processors write most, of how many first writes each has made: the fewest that account for most of them, by their
/// places in the list.
pub fn writers(writes: &[u64]) -> Vec<usize> {
    let all: u128 = writes.iter().map(|&count| u128::from(count)).sum();
    let mut order: Vec<usize> = (0..writes.len()).filter(|&at| writes[at] > 0).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(writes[at]));
    let mut covered = 0;
    order.retain(|&at| {
        let wanted = covered * 100 < all * WRITERS_PART;
        covered += u128::from(writes[at]);
        wanted
    });
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINK: Rate = Rate(119_000_000);

    fn seen(written: u64, fits: bool) -> Seen {
        Seen { written: Rate(written), bandwidth: LINK, fits }
    }

    #[test]
    fn a_guest_that_converges_is_left_alone() {
        let mut rule = Stun::new(true);
        for _ in 0..20 {
            assert_eq!(rule.decide(seen(25_000_000, false)), None, "the link is faster by far");
            assert_eq!(rule.decide(seen(500_000_000, true)), None, "what is left fits");
        }
        assert_eq!(rule.keep(), KEEP_ALL);
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_slowed_to_a_quarter_of_it() {
        let mut rule = Stun::new(true);
        assert_eq!(rule.decide(seen(119_000_000, false)), Some(250), "it would never converge");
        assert_eq!(rule.decide(seen(29_000_000, false)), None, "slow enough");
        assert_eq!(rule.end(), Some(KEEP_ALL));
        assert_eq!(rule.end(), None, "once");
        let mut patient = Stun::new(true);
        assert_eq!(patient.decide(seen(60_000_000, false)), None, "it may converge by itself");
        assert_eq!(patient.decide(seen(60_000_000, false)), None);
        assert_eq!(patient.decide(seen(60_000_000, false)), Some(495), "it did not");
    }

    #[test]
    fn a_step_is_bounded_and_so_is_the_part() {
        let mut rule = Stun::new(true);
        let steps: Vec<u32> = (0..7).filter_map(|_| rule.decide(seen(u64::MAX, false))).collect();
        assert_eq!(
            steps,
            [250, 62, 15, 3, KEEP_MIN, KEEP_MIN, KEEP_MIN],
            "the floor is told again while it does not suffice"
        );
        assert_eq!(rule.decide(seen(29_000_000, false)), None);
    }

    #[test]
    fn nobody_is_slowed_who_did_not_ask_and_who_takes_it_back_is_let_go() {
        let mut rule = Stun::new(false);
        (0..5).for_each(|_| assert_eq!(rule.decide(seen(u64::MAX, false)), None));
        rule.allow(true);
        assert!(rule.decide(seen(u64::MAX, false)).is_some());
        rule.allow(false);
        assert_eq!(rule.decide(seen(u64::MAX, false)), Some(KEEP_ALL));
    }

    #[test]
    fn those_who_write_most_are_the_writers() {
        assert_eq!(writers(&[5, 1000, 3]), [1]);
        assert_eq!(writers(&[100, 100, 100, 100]), [0, 1, 2, 3]);
        assert_eq!(writers(&[600, 0, 300, 100]), [0, 2]);
        assert_eq!(writers(&[0, 0]), [0usize; 0], "nobody writes");
        assert_eq!(writers(&[u64::MAX; 3]), [0, 1, 2]);
    }

    proptest! {
        /// Whatever the rounds show, the guest keeps its floor, what is told is what holds, and the end lets it go.
        #[test]
        fn a_stun_never_passes_its_floor_and_always_ends(rounds in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>(), any::<bool>()), 0..60)) {
            let mut rule = Stun::new(true);
            let mut told = KEEP_ALL;
            for (written, bandwidth, fits, allowed) in rounds {
                rule.allow(allowed);
                if let Some(keep) = rule.decide(Seen { written: Rate(written), bandwidth: Rate(bandwidth), fits }) {
                    prop_assert!(keep != told || keep == KEEP_MIN, "a change is a change");
                    told = keep;
                }
                prop_assert!((KEEP_MIN..=KEEP_ALL).contains(&told) && told == rule.keep());
            }
            if let Some(keep) = rule.end() {
                told = keep;
            }
            prop_assert_eq!(told, KEEP_ALL);
        }

        /// A guest whose writes follow its processor time is slowed until the link keeps up.
        #[test]
        fn a_guest_whose_writes_follow_its_time_converges(full in 30_000_001u64..1_000_000_000) {
            let mut rule = Stun::new(true);
            for _ in 0..8 {
                rule.decide(seen(full * u64::from(rule.keep()) / u64::from(KEEP_ALL), false));
            }
            let written = full * u64::from(rule.keep()) / u64::from(KEEP_ALL);
            prop_assert!(written <= LINK.0 / WRITES_PART || rule.keep() == KEEP_MIN);
        }
    }
}
