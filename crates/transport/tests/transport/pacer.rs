//! The pacer on a clock of the test's own, and its threads without looking at a clock.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use sterna_transport::{Pacer, Schedule};

const SECOND: Duration = Duration::from_secs(1);
const KIB: usize = 1024;

/// Streams that send one batch after another, each waking up `late` after it could.
struct Streams {
    schedule: Schedule,
    batches: Vec<usize>,
    /// When each stream takes its next place, and what it has sent.
    ready: Vec<Duration>,
    sent: Vec<usize>,
    late: Duration,
}

impl Streams {
    fn new(rate: Option<u64>, batches: &[usize], late: Duration) -> Self {
        let count = batches.len();
        Self {
            schedule: Schedule::new(rate),
            batches: batches.to_vec(),
            ready: vec![Duration::ZERO; count],
            sent: vec![0; count],
            late,
        }
    }

    /// Lets them send until `end`; returns what all of them have sent.
    fn run(&mut self, end: Duration) -> usize {
        loop {
            let next = (0..self.ready.len()).min_by_key(|stream| self.ready[*stream]).unwrap();
            let now = self.ready[next];
            if now >= end {
                return self.sent.iter().sum();
            }
            let ticket = self.schedule.take(self.batches[next], now);
            let wait = self.schedule.wait(ticket, now).map_or(Duration::ZERO, |wait| wait + self.late);
            let go = now + wait;
            assert!(self.schedule.wait(ticket, go).is_none());
            if go < end {
                self.sent[next] += self.batches[next];
            }
            // Sending takes no time, but some, so that one stream cannot loop for ever.
            self.ready[next] = go + Duration::from_nanos(1);
        }
    }
}

fn within_percent(sent: usize, wanted: u64, percent: u64) -> bool {
    (sent as u64).abs_diff(wanted) * 100 <= wanted * percent
}

#[test]
fn one_second_holds_the_rate_to_one_percent() {
    for rate in [1_000_000, 12_500_000, 125_000_000, 1_250_000_000, 12_500_000_000] {
        let batch = Pacer::new(Some(rate)).batch_limit();
        for late in [0, 60, 1_000, 4_000].map(Duration::from_micros) {
            for streams in [1, 4] {
                let sent = Streams::new(Some(rate), &vec![batch; streams], late).run(SECOND);
                // The smallest batch takes longer than the grain at the lowest rate, and one is always under way.
                let grain = (streams * batch) as u64;
                let allowed = (rate / 100).max(grain);
                assert!(
                    (sent as u64).abs_diff(rate) <= allowed,
                    "{rate} B/s, {late:?} late, {streams}: {sent}"
                );
            }
        }
    }
}

#[test]
fn streams_share_fairly() {
    let mut streams = Streams::new(Some(100_000_000), &[256 * KIB; 3], Duration::from_micros(60));
    streams.run(SECOND);
    let (least, most) = (streams.sent.iter().min().unwrap(), streams.sent.iter().max().unwrap());
    assert!(most - least <= 256 * KIB, "{:?}", streams.sent);
}

#[test]
fn idle_time_is_not_made_up_for() {
    let rate = 100_000_000;
    let mut schedule = Schedule::new(Some(rate));
    let after_idling = Duration::from_secs(100);
    let mut at_once = 0;
    loop {
        let ticket = schedule.take(16 * KIB, after_idling);
        if schedule.wait(ticket, after_idling).is_some() {
            break;
        }
        at_once += 16 * KIB;
    }
    // Ten milliseconds' worth, and the batch that reaches beyond it.
    assert!(at_once as u64 <= rate / 100 + 2 * 16 * 1024, "{at_once}");
}

#[test]
fn a_new_rate_holds_from_then_on() {
    let mut streams = Streams::new(Some(100_000_000), &[256 * KIB; 2], Duration::ZERO);
    let first = streams.run(SECOND);
    streams.schedule.set_rate(Some(10_000_000), SECOND);
    let second = streams.run(2 * SECOND) - first;
    streams.schedule.set_rate(Some(200_000_000), 2 * SECOND);
    let third = streams.run(3 * SECOND) - second - first;
    assert!(within_percent(first, 100_000_000, 1), "{first}");
    // One batch of each stream may have been on its way when the rate fell.
    assert!(second.abs_diff(10_000_000) <= 3 * 256 * KIB, "{second}");
    assert!(within_percent(third, 200_000_000, 1), "{third}");
}

#[test]
fn who_waits_follows_a_new_rate() {
    let mut schedule = Schedule::new(Some(1_000));
    schedule.take(1_000_000, Duration::ZERO);
    let ticket = schedule.take(1, Duration::ZERO);
    assert_eq!(schedule.wait(ticket, Duration::ZERO), Some(1000 * SECOND));
    assert_eq!(schedule.wait(ticket, 500 * SECOND), Some(500 * SECOND));
    schedule.set_rate(Some(500_000), 500 * SECOND);
    assert_eq!(schedule.wait(ticket, 500 * SECOND), Some(SECOND));
    assert_eq!(schedule.wait(ticket, 501 * SECOND), None);
    schedule.set_rate(None, 500 * SECOND);
    assert_eq!(schedule.wait(ticket, 500 * SECOND), None);
}

#[test]
fn what_was_sent_without_a_rate_is_no_debt() {
    let mut schedule = Schedule::new(None);
    let free = schedule.take(1 << 40, Duration::ZERO);
    assert_eq!(schedule.wait(free, Duration::ZERO), None);
    schedule.set_rate(Some(1_000_000), SECOND);
    let first = schedule.take(1_000_000, SECOND);
    let second = schedule.take(1, SECOND);
    assert_eq!(schedule.wait(first, SECOND), None);
    assert_eq!(schedule.wait(second, SECOND), Some(SECOND));
}

#[test]
fn a_rate_of_zero_is_slow_and_nothing_overflows() {
    let mut schedule = Schedule::new(Some(0));
    schedule.take(usize::MAX, Duration::ZERO);
    let ticket = schedule.take(usize::MAX, Duration::MAX);
    schedule.wait(ticket, Duration::ZERO).unwrap();
    let mut schedule = Schedule::new(Some(u64::MAX));
    schedule.take(usize::MAX, Duration::MAX);
    schedule.set_rate(Some(1), Duration::MAX);
    schedule.take(usize::MAX, Duration::ZERO);
}

#[test]
fn batches_are_below_ten_milliseconds_and_within_bounds() {
    let limit = |rate| Pacer::new(rate).batch_limit();
    assert_eq!(limit(None), 1024 * KIB);
    assert_eq!(limit(Some(u64::MAX)), 1024 * KIB);
    assert_eq!(limit(Some(1)), 16 * KIB);
    assert_eq!(limit(Some(125_000_000)), 625_000);
    let pacer = Pacer::new(None);
    pacer.set_rate(Some(12_500_000));
    assert_eq!((pacer.rate(), pacer.batch_limit()), (Some(12_500_000), 62_500));
}

/// At one byte a second these would wait for days.
#[test]
fn threads_that_wait_are_let_go() {
    let pacer = Arc::new(Pacer::new(Some(1)));
    pacer.acquire(1_000_000);
    let waiting = (0..4)
        .map(|_| {
            let pacer = Arc::clone(&pacer);
            thread::spawn(move || pacer.acquire(1_000_000))
        })
        .collect::<Vec<_>>();
    pacer.set_rate(Some(2));
    assert!(waiting.iter().all(|thread| !thread.is_finished()));
    pacer.set_rate(None);
    for thread in waiting {
        thread.join().unwrap();
    }
}
