//! Units of the engine: pages, bytes and rates never mix by accident.

use std::time::Duration;

/// Bytes in a page: the grain of tracking and of the wire (x86-64 base page).
pub const PAGE_BYTES: u64 = 4096;

/// A count of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pages(pub u64);

impl Pages {
    /// The bytes these pages hold.
    pub fn bytes(self) -> Bytes {
        Bytes(self.0.saturating_mul(PAGE_BYTES))
    }
}

/// A count of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// Bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(pub u64);

impl Rate {
    /// The rate at which `bytes` went by in `time`; none when the time is too short to tell.
    pub fn measured(bytes: Bytes, time: Duration) -> Option<Self> {
        let micros = time.as_micros();
        (micros > 0)
            .then(|| Self(u64::try_from(u128::from(bytes.0) * 1_000_000 / micros).unwrap_or(u64::MAX)))
    }

    /// How long `bytes` take at this rate.
    pub fn time_for(self, bytes: Bytes) -> Duration {
        match self.0 {
            _ if bytes == Bytes(0) => Duration::ZERO,
            0 => Duration::MAX,
            rate => Duration::try_from_secs_f64(bytes.0 as f64 / rate as f64).unwrap_or(Duration::MAX),
        }
    }

    /// In megabits per second, QEMU's `mbps`.
    pub fn mbps(self) -> f64 {
        self.0 as f64 * 8.0 / 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_bytes_over_time_and_back() {
        let rate = Rate::measured(Bytes(125_000_000), Duration::from_secs(1)).unwrap();
        assert_eq!(rate.mbps(), 1000.0);
        assert_eq!(rate.time_for(Bytes(12_500_000)), Duration::from_millis(100));
        assert_eq!(Rate::measured(Bytes(1), Duration::ZERO), None);
        assert_eq!(Rate(0).time_for(Bytes(1)), Duration::MAX);
        assert_eq!(Rate(0).time_for(Bytes(0)), Duration::ZERO);
        assert_eq!(Rate(1).time_for(Bytes(u64::MAX)), Duration::MAX);
    }
}
