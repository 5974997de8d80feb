//! What tracking costs the process: its first write to a page, and being attached to.

mod common;

use std::time::{Duration, Instant};

use common::harness::{self, Bench};
use common::{Kind, Subject};
use criterion::{BenchmarkId, SamplingMode};
use sterna_memory::{PAGE, Tracker, WpAsyncTracker};

/// What is written at once.
const BYTES: u64 = 64 << 20;

fn main() {
    if common::served() {
        return;
    }
    let mut criterion = harness::criterion();
    for kind in [Kind::Private, Kind::Shared] {
        writes(&mut criterion, kind);
    }
    attach(&mut criterion);
    criterion.final_summary();
}

/// The time of one write to one page, as the process itself counts it.
fn writes(criterion: &mut Bench, kind: Kind) {
    let mut group = criterion.benchmark_group("fault");
    group.sampling_mode(SamplingMode::Flat);
    let mut subject = None;
    group.bench_function(BenchmarkId::new(kind.name(), "untracked"), |bencher| {
        let subject = subject.get_or_insert_with(|| Subject::written(kind, BYTES));
        bencher.iter_custom(|writes| {
            let rounds = writes.div_ceil(BYTES / PAGE);
            let sum: Duration = (0..rounds).map(|_| subject.write(1)).sum();
            share(sum, rounds, writes)
        });
    });
    let mut tracker = None;
    group.bench_function(BenchmarkId::new(kind.name(), "first-write"), |bencher| {
        let subject = subject.get_or_insert_with(|| Subject::written(kind, BYTES));
        let tracker = tracker.get_or_insert_with(|| {
            WpAsyncTracker::start(&subject.process, vec![subject.region], &common::attach()).expect("tracks")
        });
        bencher.iter_custom(|writes| {
            let rounds = writes.div_ceil(BYTES / PAGE);
            let round = |_| {
                tracker.collect(0, &mut Vec::new()).expect("arms");
                subject.write(1)
            };
            share((0..rounds).map(round).sum(), rounds, writes)
        });
    });
}

/// Of the time that writes to all pages took, the share of so many.
fn share(sum: Duration, rounds: u64, writes: u64) -> Duration {
    sum.mul_f64(writes as f64 / (rounds * (BYTES / PAGE)) as f64)
}

/// By the clock on the wall: a helper does it, and the process waits for it.
fn attach(criterion: &mut Bench) {
    let (helper, mut subject) = (common::attach(), None);
    let mut group = criterion.benchmark_group("attach");
    group.bench_function("start-and-stop", |bencher| {
        let subject = subject.get_or_insert_with(|| Subject::written(Kind::Private, BYTES));
        bencher.iter_custom(|times| {
            let began = Instant::now();
            for _ in 0..times {
                drop(WpAsyncTracker::start(&subject.process, vec![], &helper).expect("tracks"));
            }
            began.elapsed()
        });
    });
}
