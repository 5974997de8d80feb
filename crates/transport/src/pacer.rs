//! One rate for all streams of a migration.
//!
//! Every batch takes the next place in a queue measured in bytes; a place is reached when the rate would have
//! sent everything before it. Places are given in the order of asking, so the streams share fairly, and since a
//! place does not depend on when the one before really woke up, late wake-ups cost no bandwidth.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Largest useful batch: beyond it system calls weigh nothing any more.
const BATCH_SIZE_MAX: usize = 1024 * 1024;

/// Smallest useful batch: one TLS record.
const BATCH_SIZE_MIN: usize = 16 * 1024;

/// How long one batch should keep the link busy: half of the 10 ms that others may have to wait behind it.
const GRAIN: Duration = Duration::from_millis(5);

/// How much unused time may be made up for. It covers late wake-ups, and is what an idle stream may send at once.
const BURST: Duration = Duration::from_millis(10);

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// Keeps everything that calls [`Pacer::acquire`] together below one rate, which may change at any time.
#[derive(Debug)]
pub struct Pacer {
    start: Instant,
    schedule: Mutex<Schedule>,
    changed: Condvar,
    batch_limit: AtomicUsize,
}

impl Pacer {
    /// Paces at this rate; `None` does not pace.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            start: Instant::now(),
            schedule: Mutex::new(Schedule::new(bytes_per_second)),
            changed: Condvar::new(),
            batch_limit: AtomicUsize::new(batch_limit(bytes_per_second)),
        }
    }

    /// Changes the rate at once, for those who wait already as well. `None` lets all of them go.
    pub fn set_rate(&self, bytes_per_second: Option<u64>) {
        self.lock().set_rate(bytes_per_second, self.start.elapsed());
        self.batch_limit.store(batch_limit(bytes_per_second), Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// The rate now.
    pub fn rate(&self) -> Option<u64> {
        self.lock().rate()
    }

    /// Waits until these bytes may be sent. Ask for what is sent next, at most [`Pacer::batch_limit`] at once.
    pub fn acquire(&self, bytes: usize) {
        let mut schedule = self.lock();
        let ticket = schedule.take(bytes, self.start.elapsed());
        while let Some(wait) = schedule.wait(ticket, self.start.elapsed()) {
            let waited = self.changed.wait_timeout(schedule, wait);
            schedule = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How much to send at once so that it takes less than 10 ms at the current rate.
    pub fn batch_limit(&self) -> usize {
        self.batch_limit.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn batch_limit(bytes_per_second: Option<u64>) -> usize {
    let grain = bytes_per_second.map_or(u128::MAX, |rate| bytes_in(rate, GRAIN));
    usize::try_from(grain).unwrap_or(usize::MAX).clamp(BATCH_SIZE_MIN, BATCH_SIZE_MAX)
}

/// The pacer without clock and threads; times are durations since any fixed start.
///
/// Positions are bytes since the schedule was made. The line `base + (now - since) * rate` tells which position is
/// reached.
#[derive(Clone, Debug)]
pub struct Schedule {
    rate: Option<u64>,
    base: u128,
    since: Duration,
    taken: u128,
}

/// A place in a [`Schedule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u128);

impl Schedule {
    /// A schedule in which nothing was taken yet.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { rate: bytes_per_second.map(at_least_one), base: 0, since: Duration::ZERO, taken: 0 }
    }

    /// The rate now.
    pub fn rate(&self) -> Option<u64> {
        self.rate
    }

    /// Takes the next place, for this many bytes.
    pub fn take(&mut self, bytes: usize, now: Duration) -> Ticket {
        self.forget_idle_time(now);
        let ticket = Ticket(self.taken);
        self.taken = self.taken.saturating_add(bytes as u128);
        ticket
    }

    /// How long it takes until a place is reached; `None` when it is.
    pub fn wait(&self, ticket: Ticket, now: Duration) -> Option<Duration> {
        let rate = self.rate?;
        let missing = ticket.0.checked_sub(self.reached(rate, now)).filter(|missing| *missing > 0)?;
        let nanos = missing.saturating_mul(NANOS_PER_SECOND).div_ceil(u128::from(rate));
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// Changes the rate: what was sent stays sent, what waits goes at the new rate.
    pub fn set_rate(&mut self, bytes_per_second: Option<u64>, now: Duration) {
        self.base = match self.rate {
            Some(rate) => self.reached(rate, now).min(self.taken),
            None => self.taken,
        };
        self.since = now;
        self.rate = bytes_per_second.map(at_least_one);
    }

    fn reached(&self, rate: u64, now: Duration) -> u128 {
        self.base.saturating_add(bytes_in(rate, now.saturating_sub(self.since)))
    }

    fn forget_idle_time(&mut self, now: Duration) {
        let Some(rate) = self.rate else { return };
        let most = self.taken.saturating_add(bytes_in(rate, BURST));
        if self.reached(rate, now) > most {
            (self.base, self.since) = (most, now);
        }
    }
}

/// A rate of zero would make callers wait for ever; nobody who means that paces.
fn at_least_one(rate: u64) -> u64 {
    rate.max(1)
}

fn bytes_in(rate: u64, time: Duration) -> u128 {
    u128::from(rate).saturating_mul(time.as_nanos()) / NANOS_PER_SECOND
}
