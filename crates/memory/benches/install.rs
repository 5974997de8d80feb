//! Writing pages at the target, each way there is, and discarding them.

mod common;

use std::time::{Duration, Instant};

use common::harness::{self, Bench};
use common::{Kind, Subject};
use criterion::{BenchmarkId, SamplingMode, Throughput};
use sterna_memory::{Installer, PAGE, PageRun};

/// What is installed at once: a full batch.
const BATCH: u64 = 1 << 20;
/// What is filled batch by batch.
const BYTES: u64 = 64 << 20;

const KINDS: [Kind; 3] = [Kind::Private, Kind::Shared, Kind::PrivateFile];

fn main() {
    if common::served() {
        return;
    }
    let mut criterion = harness::criterion();
    for kind in KINDS {
        let mut target = None;
        install(&mut criterion, kind, &mut target);
        discard(&mut criterion, kind, &mut target);
    }
    criterion.final_summary();
}

struct Target {
    installer: Installer,
    bytes: Vec<u8>,
    /// The place of the next batch.
    next: u64,
    /// The process; it must outlive what is in it.
    _subject: Subject,
}

impl Target {
    fn start(kind: Kind) -> Target {
        let subject = Subject::start(kind, BYTES);
        let installer = Installer::open(&subject.process, vec![subject.region], &common::attach());
        let installer = installer.expect("can be installed into");
        let mut target =
            Target { installer, bytes: harness::noise(BATCH as usize), next: 0, _subject: subject };
        target.fill();
        target
    }

    fn install(&self, runs: &[PageRun]) {
        self.installer.install(0, runs, &self.bytes).expect("installs");
    }

    /// Installs the next batch; true when it was the last that there is room for.
    fn install_next(&mut self) -> bool {
        self.install(&[PageRun { first: self.next, pages: BATCH / PAGE }]);
        self.next = (self.next + BATCH / PAGE) % (BYTES / PAGE);
        self.next == 0
    }

    fn fill(&mut self) {
        self.next = 0;
        while !self.install_next() {}
    }

    fn empty(&mut self) {
        self.installer.discard(0, &[PageRun { first: 0, pages: BYTES / PAGE }]).expect("discards");
        self.next = 0;
    }
}

fn install(criterion: &mut Bench, kind: Kind, target: &mut Option<Target>) {
    let mut group = criterion.benchmark_group("install");
    group.throughput(Throughput::Bytes(BATCH)).sampling_mode(SamplingMode::Flat);
    group.bench_function(BenchmarkId::new(kind.name(), "absent"), |bencher| {
        let target = target.get_or_insert_with(|| Target::start(kind));
        target.empty();
        bencher.iter_custom(|batches| {
            let mut sum = Duration::ZERO;
            for _ in 0..batches {
                let mut full = false;
                sum += harness::cpu_time(|| full = target.install_next());
                if full {
                    target.empty();
                }
            }
            sum
        });
    });
    group.bench_function(BenchmarkId::new(kind.name(), "present"), |bencher| {
        let target = target.get_or_insert_with(|| Target::start(kind));
        target.fill();
        bencher.iter(|| target.install_next());
    });
}

/// By the clock on the wall: where memory is given back, a helper and the process itself do it.
fn discard(criterion: &mut Bench, kind: Kind, target: &mut Option<Target>) {
    let scattered: Vec<_> = (0..BATCH / PAGE).map(|page| PageRun { first: page * 2, pages: 1 }).collect();
    let mut group = criterion.benchmark_group("discard");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Bytes(BYTES));
    group.bench_function(BenchmarkId::new(kind.name(), "all"), |bencher| {
        let target = target.get_or_insert_with(|| Target::start(kind));
        bencher.iter_custom(|rounds| {
            let round = || {
                target.fill();
                wall(|| target.empty())
            };
            std::iter::repeat_with(round).take(rounds as usize).sum()
        });
    });
    group.throughput(Throughput::Bytes(BATCH));
    group.bench_function(BenchmarkId::new(kind.name(), "every-second"), |bencher| {
        let target = target.get_or_insert_with(|| Target::start(kind));
        bencher.iter_custom(|rounds| {
            let round = || {
                target.install(&scattered);
                wall(|| target.installer.discard(0, &scattered).expect("discards"))
            };
            std::iter::repeat_with(round).take(rounds as usize).sum()
        });
    });
}

fn wall(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}
