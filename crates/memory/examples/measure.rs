//! Measures what attaching, tracking, reading and installing cost here: `cargo run --release -p sterna-memory --example
//! measure`. As root; takes about 3 GiB of memory for a few seconds. Build the helper first (`cargo build --release`).

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sterna_memory::{
    Attach, Installer, PAGE, PageRun, Process, Reader, Region, Span, Tracker, WpAsyncTracker, digest,
    is_zero, populated,
};

const BYTES: u64 = 1 << 30;
const BATCH: u64 = 1 << 20;

fn main() {
    match std::env::args().nth(1) {
        Some(kind) => serve(&kind),
        None => measure(),
    }
}

/// The measured process: maps memory, writes it when a line comes.
fn serve(kind: &str) {
    use nix::libc;
    let fd = match kind {
        "anon" => -1,
        // SAFETY: the name is a valid C string.
        _ => unsafe { libc::memfd_create(c"measure".as_ptr(), 0) },
    };
    let flags = if kind == "memfd-shared" { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let flags = flags | if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: plain numbers, and a new mapping at an address of the kernel's choice.
    let base = unsafe {
        libc::ftruncate(fd, BYTES as i64);
        libc::mmap(std::ptr::null_mut(), BYTES as usize, prot, flags, fd, 0)
    };
    println!("{}", base.addr());
    for round in std::io::stdin().lock().lines().map_while(Result::ok) {
        // SAFETY: the whole mapping, which nobody else in this process uses.
        let memory = unsafe { std::slice::from_raw_parts_mut(base.cast::<u8>(), BYTES as usize) };
        let began = Instant::now();
        memory.chunks_mut(PAGE as usize).for_each(|page| page[0] = page[0].wrapping_add(1) | 1);
        println!("{round} {}", began.elapsed().as_micros());
    }
}

struct Subject {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    process: Process,
    region: Region,
}

impl Subject {
    fn start(kind: &str) -> Subject {
        let mut command = Command::new("/proc/self/exe");
        let mut child =
            command.arg(kind).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("spawn");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        output.read_line(&mut line).expect("an address");
        let region = Region { base: line.trim().parse().expect("a number"), bytes: BYTES };
        let process = Process::open(child.id() as i32).expect("alive");
        Subject { child, output, process, region }
    }

    /// Writes a byte to every page; how long that took it.
    fn dirty(&mut self) -> Duration {
        self.child.stdin.as_mut().expect("piped").write_all(b"go\n").expect("alive");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("an answer");
        Duration::from_micros(line.trim().rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a number"))
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn measure() {
    let attach = Attach::beside_current_exe().expect("build the helper first: cargo build -p sterna-memory");
    attaching(&attach);
    zero_pages();
    for kind in ["anon", "memfd-private", "memfd-shared"] {
        println!("{kind}, {} MiB:", BYTES >> 20);
        tracking(kind, &attach);
        copying(kind, &attach);
    }
}

fn attaching(attach: &Attach) {
    let subject = Subject::start("anon");
    let mut times: Vec<Duration> = (0..200)
        .map(|_| {
            let began = Instant::now();
            drop(WpAsyncTracker::start(&subject.process, vec![], attach).expect("tracks"));
            began.elapsed()
        })
        .collect();
    times.sort_unstable();
    println!("attach, helper's start included: median {:?}, 99 % {:?}", times[100], times[198]);
}

fn zero_pages() {
    let page = vec![0u8; PAGE as usize];
    let rounds = 1_000_000;
    let began = Instant::now();
    let zero = (0..rounds).filter(|_| is_zero(std::hint::black_box(&page))).count();
    println!("is_zero, cached: {:.1} GB/s", rate(zero as u64 * PAGE, began));
}

fn tracking(kind: &str, attach: &Attach) {
    let mut subject = Subject::start(kind);
    let first = subject.dirty();
    let plain = subject.dirty();
    let mut tracker = WpAsyncTracker::start(&subject.process, vec![subject.region], attach).expect("tracks");
    let mut runs = Vec::with_capacity(1 << 16);
    let mut collect = || {
        runs.clear();
        let began = Instant::now();
        tracker.collect(0, &mut runs).expect("collects");
        (began.elapsed(), runs.iter().map(|r| r.pages).sum::<u64>())
    };
    let (clean, none) = collect();
    let tracked = subject.dirty();
    let (dirty, all) = collect();
    assert_eq!((none, all), (0, BYTES / PAGE));
    println!("  collect: clean {clean:?}, all dirty {dirty:?}");
    println!("  writing every page: first {first:?}, then {plain:?}, tracked {tracked:?}");
    let began = Instant::now();
    populated(&subject.process, &subject.region, &mut runs).expect("scans");
    println!("  populated: {:?}, {} runs", began.elapsed(), runs.len());
}

fn copying(kind: &str, attach: &Attach) {
    let mut source = Subject::start(kind);
    source.dirty();
    let target = Subject::start(kind);
    let installer = Installer::open(&target.process, vec![target.region], attach).expect("opens");
    let reader = Reader::new(&source.process).expect("alive");
    let mut buffer = vec![0u8; BATCH as usize];
    for round in ["first", "second"] {
        let (mut reading, mut installing) = (Duration::ZERO, Duration::ZERO);
        for at in (0..BYTES).step_by(BATCH as usize) {
            let began = Instant::now();
            reader.read(&[Span { addr: source.region.base + at, len: BATCH }], &mut buffer).expect("reads");
            reading += began.elapsed();
            let began = Instant::now();
            let run = PageRun { first: at / PAGE, pages: BATCH / PAGE };
            installer.install(0, &[run], &buffer).expect("installs");
            installing += began.elapsed();
        }
        let rate = |time: Duration| BYTES as f64 / 1e9 / time.as_secs_f64();
        println!("  {round} copy: read {:.2} GB/s, install {:.2} GB/s", rate(reading), rate(installing));
    }
    let began = Instant::now();
    let same = digest(&source.process, &source.region).ok() == digest(&target.process, &target.region).ok();
    println!("  digest: {:.2} GB/s, equal: {same}", rate(2 * BYTES, began));
    let began = Instant::now();
    installer.discard(0, &[PageRun { first: 0, pages: BYTES / PAGE }]).expect("discards");
    println!("  discard of everything: {:?}", began.elapsed());
}

fn rate(bytes: u64, since: Instant) -> f64 {
    bytes as f64 / 1e9 / since.elapsed().as_secs_f64()
}
