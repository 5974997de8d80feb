//! Virtual time and chance: an event queue with integer time, and a seeded generator. The same seed gives the same
//! schedule to the microsecond, on every machine.

use crate::world::World;
use std::collections::BTreeMap;
use std::time::Duration;

/// Virtual time since the schedule began, in microseconds.
pub(crate) type Micros = u64;

/// A millisecond in virtual time.
pub(crate) const MS: Micros = 1_000;
/// A second in virtual time.
pub(crate) const SECOND: Micros = 1_000_000;

/// What happens at an instant.
pub(crate) type Event = Box<dyn FnOnce(&mut World)>;

/// Everything that is going to happen, in order; events of one instant happen in the order they were put in.
#[derive(Default)]
pub(crate) struct Queue {
    now: Micros,
    next: u64,
    events: BTreeMap<(Micros, u64), Event>,
}

impl Queue {
    /// The present.
    pub(crate) fn now(&self) -> Micros {
        self.now
    }

    /// The present, as the engine wants it.
    pub(crate) fn instant(&self) -> Duration {
        Duration::from_micros(self.now)
    }

    /// Makes `event` happen `delay` from now.
    pub(crate) fn after(&mut self, delay: Micros, event: Event) {
        self.events.insert((self.now + delay, self.next), event);
        self.next += 1;
    }

    /// The next event that is due until `end`; time moves on to it, or to `end` when there is none.
    pub(crate) fn pop(&mut self, end: Micros) -> Option<Event> {
        let due = self.events.first_key_value().map(|((at, _), _)| *at).filter(|at| *at <= end);
        self.now = due.unwrap_or(end);
        due.and_then(|_| self.events.pop_first()).map(|(_, event)| event)
    }
}

/// A seeded generator (SplitMix64, Steele et al. 2014).
#[derive(Clone, Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    /// The generator of this seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub(crate) fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not zero.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.any() % limit
    }

    /// A number from `low` to `high`, both possible.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True this many times in a thousand.
    pub(crate) fn permille(&mut self, of: u64) -> bool {
        self.below(1000) < of
    }

    /// A time between `low` and `high` with every order of magnitude as likely as another.
    pub(crate) fn spread(&mut self, low: Micros, high: Micros) -> Micros {
        let (low_bits, high_bits) = (low.max(1).ilog2(), high.max(1).ilog2());
        let scale = 1 << self.between(low_bits.into(), high_bits.into());
        self.between(scale, scale * 2 - 1).clamp(low, high)
    }
}
