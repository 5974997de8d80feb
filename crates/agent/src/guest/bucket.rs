//! How often a guest may speak. Time is an argument.

use std::time::{Duration, Instant};

/// Lines that may come at once: greetings, each with an empty line before it, and a few requests.
pub(super) const BURST: u32 = 10;
/// After that, one line in this time.
const EACH: Duration = Duration::from_secs(1);

/// An answer is a line, and an empty one before a greeting.
const ANSWER: u32 = 2;

/// A token bucket: each line takes a token, time and our own questions give some.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    tokens: u32,
    since: Instant,
}

impl Bucket {
    pub(super) fn full(now: Instant) -> Self {
        Self { tokens: BURST, since: now }
    }

    /// Takes a token if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.since);
        let come = u32::try_from(passed.as_millis() / EACH.as_millis()).unwrap_or(BURST).min(BURST);
        if come > 0 {
            self.tokens = (self.tokens + come).min(BURST);
            // What has passed of the next token's time is kept, unless there is no room for it.
            self.since = if self.tokens == BURST { now } else { self.since + EACH * come };
        }
        let has = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        has
    }

    /// Something was asked: its answer is not the guest's own idea.
    pub(super) fn grant(&mut self) {
        self.tokens = (self.tokens + ANSWER).min(BURST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_one_a_second() {
        let start = Instant::now();
        let mut bucket = Bucket::full(start);
        assert_eq!((0..1000).filter(|_| bucket.take(start)).count(), BURST as usize);
        // A minute of a thousand lines each second.
        let taken = (1..=60_000).filter(|ms| bucket.take(start + Duration::from_millis(*ms))).count();
        assert_eq!(taken, 60);
    }

    #[test]
    fn rest_fills_it_to_the_brim_and_no_further() {
        let start = Instant::now();
        let mut bucket = Bucket::full(start);
        while bucket.take(start) {}
        let later = start + Duration::from_secs(1_000_000_000);
        assert_eq!((0..1000).filter(|_| bucket.take(later)).count(), BURST as usize);
        bucket.grant();
        assert_eq!((0..1000).filter(|_| bucket.take(later)).count(), ANSWER as usize);
    }
}
