//! Reading pages, and telling what they are.

mod common;

use std::hint::black_box;

use common::harness::{self, Bench};
use common::{Kind, Subject};
use criterion::{BenchmarkId, SamplingMode, Throughput};
use sterna_memory::{PAGE, PageRun, Reader, Region, Span, digest, is_zero};
use xxhash_rust::xxh3::xxh3_64;

/// What is read at once: a full batch.
const BATCH: u64 = 1 << 20;
/// What is gone through batch by batch, so that it comes from memory and not from a cache.
const BYTES: u64 = 256 << 20;
/// What is proved equal at once.
const DIGESTED: u64 = 32 << 20;

fn main() {
    if common::served() {
        return;
    }
    let mut criterion = harness::criterion();
    for kind in [Kind::Private, Kind::Shared] {
        copy(&mut criterion, kind);
    }
    classify(&mut criterion);
    prove(&mut criterion);
    criterion.final_summary();
}

fn copy(criterion: &mut Bench, kind: Kind) {
    let mut subject = None;
    for (name, apart) in [("run", 1), ("every-second", 2)] {
        let mut group = criterion.benchmark_group("copy");
        group.throughput(Throughput::Bytes(BATCH));
        group.bench_function(BenchmarkId::new(kind.name(), name), |bencher| {
            let subject = subject.get_or_insert_with(|| Subject::written(kind, BYTES));
            let reader = Reader::new(&subject.process).expect("alive");
            let batches: Vec<Vec<Span>> =
                (0..BYTES / BATCH / apart).map(|at| batch(&subject.region, at, apart)).collect();
            let (mut buffer, mut next) = (vec![0; BATCH as usize], batches.iter().cycle());
            bencher.iter(|| reader.read(next.next().expect("endless"), &mut buffer).expect("reads"));
        });
    }
}

/// The spans of a batch: one run, or pages that do not touch.
fn batch(region: &Region, at: u64, apart: u64) -> Vec<Span> {
    let pages = BATCH / PAGE;
    let first = at * pages * apart;
    let span = |first, pages| region.span(PageRun { first, pages });
    match apart {
        1 => vec![span(first, pages)],
        _ => (0..pages).map(|page| span(first + page * apart, 1)).collect(),
    }
}

/// A batch that was just read, and so is in the cache.
fn classify(criterion: &mut Bench) {
    let mut group = criterion.benchmark_group("classify");
    group.throughput(Throughput::Bytes(BATCH));
    let (zeros, noise) = (vec![0; BATCH as usize], harness::noise(BATCH as usize));
    let zero_pages = |bytes: &[u8]| pages(bytes).filter(|page| is_zero(page)).count();
    group.bench_function("is-zero/zeros", |bencher| bencher.iter(|| zero_pages(black_box(&zeros))));
    group.bench_function("is-zero/noise", |bencher| bencher.iter(|| zero_pages(black_box(&noise))));
    let hashes = |bytes: &[u8]| pages(bytes).map(xxh3_64).fold(0, u64::wrapping_add);
    group.bench_function("hash", |bencher| bencher.iter(|| hashes(black_box(&noise))));
}

/// Read and hashed, as it is where two hosts prove that their RAM is equal.
fn prove(criterion: &mut Bench) {
    let mut group = criterion.benchmark_group("digest");
    group.throughput(Throughput::Bytes(DIGESTED)).sampling_mode(SamplingMode::Flat);
    let mut subject = None;
    group.bench_function(Kind::Private.name(), |bencher| {
        let subject = subject.get_or_insert_with(|| Subject::written(Kind::Private, DIGESTED));
        bencher.iter(|| digest(&subject.process, &subject.region).expect("alive"));
    });
}

fn pages(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunks_exact(PAGE as usize)
}
