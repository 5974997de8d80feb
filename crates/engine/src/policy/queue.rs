//! How much of what is pushed may lie in a socket, when something else is waited for on the same link.
//!
//! Too little, and the link idles; too much, and it queues on the way, where a page that a guest waits for queues behind it. What a link has
//! under way when nothing queues is its rate times its shortest round trip, and neither is known: the rate is what went, and half as much more is allowed
//! than that needed, so that it grows until the link is full. As BBR does for a whole connection (Cardwell et al., ACM Queue 14-5, 2016).

use crate::units::{Bytes, Rate};
use std::time::Duration;

/// What is allowed beside that: enough to begin with.
const LEAST: Bytes = Bytes(8 << 10);
/// How much more than what was under way, as numerator and denominator.
const GROWS: (u64, u64) = (3, 2);
/// A link that carries more takes several streams to fill; on a slower one each brings only a queue of its own.
const WIDE: Rate = Rate(200_000_000);
/// How often it is reckoned anew.
const EVERY: Duration = Duration::from_millis(20);

/// The queue of one stream.
#[derive(Clone, Debug)]
pub struct PushQueue {
    since: Duration,
    went: u64,
    shortest: Duration,
    wide: bool,
}

impl PushQueue {
    /// Nothing has gone at `now`.
    pub fn new(now: Duration) -> Self {
        Self { since: now, went: 0, shortest: Duration::MAX, wide: false }
    }

    /// What a stream begins with.
    pub fn first() -> Bytes {
        LEAST
    }

    /// Whether the link was seen to carry so much that other streams are to join in.
    pub fn is_wide(&self) -> bool {
        self.wide
    }

    /// Takes in what was written by `now`. Tells what the socket may hold from now on, every now and then; `round_trip` is asked for then.
    pub fn wrote(
        &mut self,
        bytes: Bytes,
        now: Duration,
        round_trip: impl FnOnce() -> Option<Duration>,
    ) -> Option<Bytes> {
        self.went += bytes.0;
        let elapsed = now.saturating_sub(self.since);
        if elapsed < EVERY {
            return None;
        }
        self.shortest = self.shortest.min(round_trip()?);
        let under_way = u128::from(self.went) * self.shortest.as_nanos() / elapsed.as_nanos().max(1);
        self.wide |= Rate::measured(Bytes(self.went), elapsed).is_some_and(|rate| rate >= WIDE);
        (self.since, self.went) = (now, 0);
        let more = u64::try_from(under_way).unwrap_or(u64::MAX / GROWS.0) / GROWS.1 * GROWS.0;
        Some(Bytes(LEAST.0.saturating_add(more)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a stream has in its socket in the end, and what of the link it fills, from 0 to 1.
    fn settles(link: f64, round_trip: f64) -> (f64, f64) {
        let (mut queue, mut holds, mut rate) =
            (PushQueue::new(Duration::ZERO), PushQueue::first().0 as f64, 0.0);
        for step in 1..=400u32 {
            // What is in the socket goes once in a round trip, which is longer where it queues.
            rate = (holds / round_trip).min(link);
            let seen = round_trip.max(holds / link);
            let went = Bytes((rate * EVERY.as_secs_f64()) as u64);
            let told = queue.wrote(went, EVERY * step, || Some(Duration::from_secs_f64(seen)));
            holds = told.map_or(holds, |bytes| bytes.0 as f64);
        }
        (holds, rate / link)
    }

    #[test]
    fn it_is_reckoned_now_and_then() {
        let mut queue = PushQueue::new(Duration::ZERO);
        let ms = Duration::from_millis;
        assert_eq!(queue.wrote(Bytes(1 << 20), ms(19), || panic!("too early")), None);
        assert_eq!(queue.wrote(Bytes(0), ms(20), || None), None);
        let told = queue.wrote(Bytes(0), ms(25), || Some(ms(1)));
        assert_eq!(told, Some(Bytes(LEAST.0 + (1 << 20) / 25 / 2 * 3)));
        assert!(!queue.is_wide());
        queue.wrote(Bytes(4_000_000), ms(45), || Some(ms(1)));
        queue.wrote(Bytes(0), ms(65), || Some(ms(1)));
        assert!(queue.is_wide(), "and it stays so");
    }

    proptest! {
        /// It fills a link of any length, and what queues then takes little longer than the link itself.
        #[test]
        fn a_link_is_filled_and_not_more(mbit in 10.0f64..25_000.0, micros in 30.0f64..80_000.0) {
            let (link, round_trip) = (mbit * 125_000.0, micros / 1e6);
            let (holds, filled) = settles(link, round_trip);
            prop_assert!(filled > 0.95, "{filled} of it, with {holds} bytes");
            prop_assert!(holds <= LEAST.0 as f64 * 3.0 + link * round_trip * 1.6, "{holds} bytes");
        }
    }
}
