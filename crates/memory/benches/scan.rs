//! Scans: which pages were written, and which are there at all.

mod common;

use std::time::Duration;

use common::harness::{self, Bench};
use common::{Kind, Subject};
use criterion::{BenchmarkId, SamplingMode, Throughput};
use sterna_memory::{PAGE, PageRun, Tracker, WpAsyncTracker, populated};

/// What is scanned at once.
const BYTES: u64 = 256 << 20;
/// Samples of scans before which all memory is written, and how long they take: the writes take ten times as long as the scan.
const SLOW_SAMPLES: usize = 10;
const SLOW: Duration = Duration::from_secs(2);

fn main() {
    if common::served() {
        return;
    }
    let mut criterion = harness::criterion();
    for kind in [Kind::Private, Kind::Shared] {
        scan(&mut criterion, kind);
    }
    clean(&mut criterion, &mut None, Kind::Huge);
    criterion.final_summary();
}

/// A process that is tracked, all of its memory written before.
struct Tracked {
    subject: Subject,
    tracker: WpAsyncTracker,
    runs: Vec<PageRun>,
}

impl Tracked {
    fn start(kind: Kind) -> Tracked {
        let subject = Subject::written(kind, BYTES);
        let tracker = WpAsyncTracker::start(&subject.process, vec![subject.region], &common::attach());
        let tracker = tracker.expect("can be tracked");
        Tracked { subject, tracker, runs: Vec::with_capacity((BYTES / PAGE) as usize) }
    }

    /// How many pages were written since the last time.
    fn collect(&mut self) -> u64 {
        self.runs.clear();
        self.tracker.collect(0, &mut self.runs).expect("collects");
        self.runs.iter().map(|run| run.pages).sum()
    }
}

fn scan(criterion: &mut Bench, kind: Kind) {
    let mut tracked = None;
    clean(criterion, &mut tracked, kind);
    written(criterion, &mut tracked, kind, ("dirty", 1));
    written(criterion, &mut tracked, kind, ("every-second", 2));
    let mut group = criterion.benchmark_group("scan");
    group.throughput(Throughput::Bytes(BYTES)).sampling_mode(SamplingMode::Flat);
    group.bench_function(BenchmarkId::new(kind.name(), "populated"), |bencher| {
        let tracked = tracked.get_or_insert_with(|| Tracked::start(kind));
        let Tracked { subject, runs, .. } = tracked;
        bencher.iter(|| populated(&subject.process, &subject.region, runs).expect("scans"));
        assert_eq!(runs.len(), 1);
    });
}

/// Nothing was written.
fn clean(criterion: &mut Bench, tracked: &mut Option<Tracked>, kind: Kind) {
    let mut group = criterion.benchmark_group("scan");
    group.throughput(Throughput::Bytes(BYTES)).sampling_mode(SamplingMode::Flat);
    group.bench_function(BenchmarkId::new(kind.name(), "clean"), |bencher| {
        let tracked = tracked.get_or_insert_with(|| Tracked::start(kind));
        tracked.collect();
        bencher.iter(|| assert_eq!(tracked.collect(), 0));
    });
}

/// Pages were written, each alone or all in one run.
fn written(criterion: &mut Bench, tracked: &mut Option<Tracked>, kind: Kind, (name, apart): (&str, u64)) {
    let mut group = criterion.benchmark_group("scan");
    group.throughput(Throughput::Bytes(BYTES)).sampling_mode(SamplingMode::Flat);
    group.sample_size(SLOW_SAMPLES).measurement_time(SLOW);
    group.bench_function(BenchmarkId::new(kind.name(), name), |bencher| {
        let tracked = tracked.get_or_insert_with(|| Tracked::start(kind));
        bencher.iter_custom(|rounds| {
            tracked.collect();
            let round = || {
                tracked.subject.write(apart);
                harness::cpu_time(|| assert_eq!(tracked.collect(), BYTES / PAGE / apart))
            };
            std::iter::repeat_with(round).take(rounds as usize).sum()
        });
    });
}
