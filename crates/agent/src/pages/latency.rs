//! How long things took, as a histogram whose buckets grow with what they count.

use std::time::Duration;

/// Buckets an octave: a quantile is at most an eighth too large.
const STEPS: u32 = 8;
/// Buckets: up to 2^40 microseconds.
const BUCKETS: usize = 40 * STEPS as usize;

/// A histogram of times, in microseconds.
#[derive(Clone, Debug)]
pub(crate) struct Latency {
    buckets: Vec<u64>,
    count: u64,
    sum: Duration,
    max: Duration,
}

impl Default for Latency {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], count: 0, sum: Duration::ZERO, max: Duration::ZERO }
    }
}

/// The bucket of a time, in microseconds.
fn bucket(us: u64) -> usize {
    let us = us.max(1);
    let octave = us.ilog2();
    let step = match octave {
        0..3 => (us - (1 << octave)) << (3 - octave),
        _ => (us - (1 << octave)) >> (octave - 3),
    };
    ((octave * STEPS) as usize + step as usize).min(BUCKETS - 1)
}

/// The longest time of a bucket, in microseconds.
fn end(bucket: usize) -> u64 {
    let (octave, step) = (bucket as u32 / STEPS, u64::from(bucket as u32 % STEPS));
    let (base, grain) = (1u64 << octave, (1u64 << octave) as f64 / f64::from(STEPS));
    base + ((step + 1) as f64 * grain).ceil() as u64 - 1
}

impl Latency {
    pub(crate) fn add(&mut self, time: Duration) {
        self.buckets[bucket(u64::try_from(time.as_micros()).unwrap_or(u64::MAX))] += 1;
        self.count += 1;
        self.sum += time;
        self.max = self.max.max(time);
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn mean(&self) -> Duration {
        u32::try_from(self.count)
            .ok()
            .filter(|count| *count > 0)
            .map_or(Duration::ZERO, |count| self.sum / count)
    }

    pub(crate) fn max(&self) -> Duration {
        self.max
    }

    /// The time that this part of all of them did not exceed.
    pub(crate) fn quantile(&self, part: f64) -> Duration {
        let wanted = (self.count as f64 * part).ceil() as u64;
        let mut seen = 0;
        for (at, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return Duration::from_micros(end(at)).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_an_eighth_too_large_at_most() {
        let mut latency = Latency::default();
        (1..=10_000).for_each(|us| latency.add(Duration::from_micros(us)));
        for (part, exact) in [(0.5, 5000.0), (0.99, 9900.0), (0.01, 100.0)] {
            let found = latency.quantile(part).as_micros() as f64;
            assert!(found >= exact && found <= exact * 1.125, "{part}: {found}");
        }
        assert_eq!(latency.quantile(1.0), Duration::from_millis(10));
        assert_eq!((latency.count(), latency.max()), (10_000, Duration::from_millis(10)));
        assert_eq!(latency.mean().as_micros(), 5000);
        assert_eq!(Latency::default().quantile(0.99), Duration::ZERO);
    }

    #[test]
    fn every_time_has_its_bucket() {
        for us in (0..5000).chain([u64::MAX / 2, u64::MAX]) {
            let at = bucket(us);
            assert!(at + 1 == BUCKETS || end(at) >= us, "{us} in {at}, which ends at {}", end(at));
            assert!(at == 0 || end(at - 1) < us || at + 1 == BUCKETS || end(at - 1) >= end(at), "{us}");
        }
    }
}
