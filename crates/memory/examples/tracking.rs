//! What tracking costs a process that writes, as one JSON object: `cargo run --release -p sterna-memory --example tracking`,
//! as root. Build the helper first (`cargo build --release -p sterna-memory`). Takes 1 GiB of memory for some seconds.
//!
//! Times are the processor's, of the thread that writes or scans, and medians. `null` stands for memory that the machine
//! does not give: huge pages may be switched off, or used up.

#[path = "../benches/common/mod.rs"]
mod common;

use std::time::Duration;

use common::harness::cpu_time;
use common::{Kind, Subject};
use serde_json::{Value, json};
use sterna_memory::{PAGE, PageRun, Tracker, WpAsyncTracker};

/// What is written and scanned.
const BYTES: u64 = 1 << 30;
/// How often. An odd number, so that one of them is the median.
const REPETITIONS: usize = 9;

fn main() {
    if common::served() {
        return;
    }
    let (private, shared) = (all(Kind::Private), all(Kind::Shared));
    println!("{}", json!({ "private": private, "shared": shared, "huge": huge() }));
}

/// Memory in small pages: each first write, and scans.
fn all(kind: Kind) -> Value {
    let mut subject = warm(kind);
    let untracked = median(|| subject.write(1));
    let mut scanner = Scanner::start(&subject);
    let clean = median(|| scanner.collect(0));
    let (mut first, mut dirty) = (Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        first.push(subject.write(1));
        dirty.push(scanner.collect(BYTES / PAGE));
    }
    json!({
        "untracked_write_us": us_per_page(untracked),
        "first_write_us": us_per_page(middle(first)),
        "clean_scan_ms_per_gib": ms_per_gib(clean),
        "dirty_scan_ms_per_gib": ms_per_gib(middle(dirty)),
    })
}

/// Memory in huge pages, of which a scan looks at one entry for 512 pages.
fn huge() -> Value {
    let subject = warm(Kind::Huge);
    if subject.huge_bytes() < BYTES {
        return Value::Null;
    }
    let mut scanner = Scanner::start(&subject);
    json!({ "clean_scan_ms_per_gib": ms_per_gib(median(|| scanner.collect(0))) })
}

/// A process whose memory was written twice, the second time without a page that is new to the machine.
fn warm(kind: Kind) -> Subject {
    let mut subject = Subject::written(kind, BYTES);
    subject.write(1);
    subject
}

struct Scanner {
    tracker: WpAsyncTracker,
    runs: Vec<PageRun>,
}

impl Scanner {
    fn start(subject: &Subject) -> Scanner {
        let tracker = WpAsyncTracker::start(&subject.process, vec![subject.region], &common::attach());
        let mut scanner = Scanner { tracker: tracker.expect("can be tracked"), runs: Vec::with_capacity(16) };
        scanner.collect(0);
        scanner
    }

    /// Collects so many pages.
    fn collect(&mut self, pages: u64) -> Duration {
        self.runs.clear();
        let took = cpu_time(|| self.tracker.collect(0, &mut self.runs).expect("collects"));
        assert_eq!(self.runs.iter().map(|run| run.pages).sum::<u64>(), pages, "other pages were written");
        took
    }
}

fn median(sample: impl FnMut() -> Duration) -> Duration {
    middle(std::iter::repeat_with(sample).take(REPETITIONS).collect())
}

fn middle(mut samples: Vec<Duration>) -> Duration {
    samples.sort_unstable();
    samples[samples.len() / 2]
}

fn us_per_page(time: Duration) -> f64 {
    rounded(time.as_secs_f64() * 1e6 / (BYTES / PAGE) as f64)
}

fn ms_per_gib(time: Duration) -> f64 {
    rounded(time.as_secs_f64() * 1e3 / (BYTES as f64 / (1u64 << 30) as f64))
}

fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}
