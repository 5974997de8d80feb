//! How often a guest may speak. Time is an argument.

use std::time::{Duration, Instant};

/// Lines that may come at once: greetings, each with an empty line before it, and a few requests.
pub(super) const BURST: u32 = 10;
/// After that, one line in this time.
const EACH: Duration = Duration::from_secs(1);

/// An answer is a line, and an empty one before a greeting.
const ANSWER: u32 = 2;

/// The most answers that a guest may owe us: questions wait for a guest that boots, and are then answered all at once.
const OWED_MAX: u32 = 40;

/// A token bucket: each line takes a token, time and our own questions give some.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    tokens: u32,
    owed: u32,
    since: Instant,
}

impl Bucket {
    pub(super) fn full(now: Instant) -> Self {
        Self { tokens: BURST, owed: 0, since: now }
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
        let from = if self.owed > 0 { &mut self.owed } else { &mut self.tokens };
        let has = *from > 0;
        *from = from.saturating_sub(1);
        has
    }

    /// Something was asked: its answer is not the guest's own idea.
    pub(super) fn grant(&mut self) {
        self.owed = (self.owed + ANSWER).min(OWED_MAX);
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

    /// A guest that boots finds all our questions at once. Its answers were taken for a flood.
    #[test]
    fn late_answers_to_many_questions_are_no_flood() {
        let start = Instant::now();
        let mut bucket = Bucket::full(start);
        (0..1000).for_each(|_| bucket.grant());
        assert_eq!((0..1000).filter(|_| bucket.take(start)).count(), (BURST + OWED_MAX) as usize);
    }
}
