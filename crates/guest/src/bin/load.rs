//! A memory load that watches itself.
//!
//! `load --fill=MIB --dirty=MIB --rate=MB_PER_S --mode=sequential|random|hot --write=sparse|dense|mixed --seed=N --check[=written]
//! --churn=MIB --sleep --spin --steady`
//!
//! Fills memory with incompressible content, writes to the first `--dirty` MiB of it at the given rate (0: as fast as it
//! can; `--dirty=0`: not at all), and says once a second how it goes:
//! `LOAD t=12 pages=61440 mbps=240.0 loops=3021 bad=0`. `mbps` counts whole pages written, in Mbit/s. Lost, stale, torn
//! and misplaced pages are reported as `BAD page=N what`. `--check` looks at all of memory, over and over; `--check=written` only
//! at a page that is about to be written, so that nothing else is touched than what the mode says. `--sleep` fills memory and does
//! nothing more, so that the processor halts. `--spin` computes instead of sleeping between writes, and `loops` counts that work: how fast the guest is. `--steady` rests as long after each slice of its writes as if nothing had kept it waiting, so that it never writes
//! faster than its rate, as it does without to make up for what it missed. `--churn` takes so much more memory, fills and checks it, gives it
//! back, rests, and begins anew, so that the kernel always has pages to give away that were written before; each time is told
//! as `CHURN n`. More than 32 MiB is given back to the kernel for certain; the C library may keep less.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use sterna_guest::options::Options;
use sterna_guest::pages::{Bad, Noise, PAGE_WORDS, PAGES_PER_MIB, Pages, Write};

/// The rate is kept over slices of this length: short enough that a migration's rounds see an even stream.
const SLICE: Duration = Duration::from_millis(10);
/// After a pause (a migration's) the missed writes are not made up for: that would be another load.
const CATCH_UP_MAX: Duration = Duration::from_millis(50);
/// Pages whose edges are looked at for each page written, and how many of these are looked at whole.
const CHECKED_PER_SLICE: usize = 256;
const WHOLE_EVERY: usize = 32;
/// Without a rate: writes between two looks at the clock.
const UNLIMITED_PER_SLICE: u64 = 256;
/// The first bad pages tell the story; a lost block would fill the console.
const BAD_SHOWN_MAX: u64 = 20;
/// In `hot` mode, nine of ten writes go to this part of the working set.
const HOT_PART: usize = 8;

/// Steps of the noise between two looks at the clock: some 10 us on an emulated processor.
const WORK_UNIT: u32 = 1000;

/// How long memory stays given back: free pages are reported to the host two seconds after they were freed.
const CHURN_REST: Duration = Duration::from_secs(6);

const KNOWN: &[&str] =
    &["fill", "dirty", "rate", "mode", "write", "seed", "check", "for", "churn", "sleep", "spin", "steady"];

fn main() {
    let run = Options::parse(std::env::args().skip(1), KNOWN).and_then(|o| Load::new(&o));
    match run {
        Ok(mut load) => std::process::exit(load.run()),
        Err(error) => {
            println!("LOAD cannot start: {error}");
            std::process::exit(2);
        }
    }
}

/// Which pages are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    None,
    Written,
    All,
}

#[derive(Clone, Copy)]
enum Mode {
    Sequential,
    Random,
    Hot,
}

struct Load {
    pages: Pages,
    working_set: usize,
    bytes_per_second: u64,
    mode: Mode,
    write: Write,
    check: Check,
    spin: bool,
    sleep: bool,
    /// With `--steady`: the time that a slice takes when nothing keeps it waiting, as far as is known.
    quickest: Option<Duration>,
    loops: u64,
    limit: Option<Duration>,
    noise: Noise,
    cursor: usize,
    checked: usize,
    /// Bytes times nanoseconds that may still be written: whole numbers lose nothing.
    allowance: u128,
    last_slice: Instant,
    written: u64,
    bad: u64,
}

impl Load {
    fn new(options: &Options) -> Result<Load, String> {
        let fill = mib(options.number("fill", 64)?)?;
        let seed = options.number("seed", 1)?;
        let mode = match options.word("mode", "sequential") {
            "sequential" => Mode::Sequential,
            "random" => Mode::Random,
            "hot" => Mode::Hot,
            other => return Err(format!("--mode={other}: sequential, random or hot")),
        };
        let write = match options.word("write", "sparse") {
            "sparse" => Write::Sparse,
            "dense" => Write::Dense,
            "mixed" => Write::Mixed,
            other => return Err(format!("--write={other}: sparse, dense or mixed")),
        };
        let check = match options.has("check").then(|| options.word("check", "")) {
            None => Check::None,
            Some("") => Check::All,
            Some("written") => Check::Written,
            Some(other) => return Err(format!("--check={other}: written, or nothing")),
        };
        let seconds = options.number("for", 0)?;
        let churned = mib(options.number("churn", 0)?)?;
        if churned > 0 {
            std::thread::spawn(move || churn(churned, !seed));
        }
        Ok(Load {
            working_set: mib(options.number("dirty", 16)?)?.min(fill),
            bytes_per_second: options.number("rate", 20)?.saturating_mul(1_000_000),
            pages: Pages::filled(fill, seed),
            mode,
            write,
            check,
            spin: options.has("spin"),
            sleep: options.has("sleep"),
            quickest: options.has("steady").then_some(SLICE),
            loops: 0,
            limit: (seconds > 0).then(|| Duration::from_secs(seconds)),
            noise: Noise::new(seed),
            cursor: 0,
            checked: 0,
            allowance: 0,
            last_slice: Instant::now(),
            written: 0,
            bad: 0,
        })
    }

    /// Runs for good, or for `--for` seconds; the exit code says whether a page was bad.
    fn run(&mut self) -> i32 {
        println!("LOAD filled pages={}", self.pages.count());
        if self.sleep {
            loop {
                std::thread::sleep(Duration::from_secs(3600));
            }
        }
        let start = Instant::now();
        let (mut told, mut told_written) = (start, 0);
        self.last_slice = start;
        loop {
            self.slice();
            let since = told.elapsed();
            if since >= Duration::from_secs(1) {
                self.tell(start, since, self.written - told_written);
                (told, told_written, self.loops) = (Instant::now(), self.written, 0);
            }
            if self.limit.is_some_and(|l| start.elapsed() >= l) {
                self.tell(start, since, self.written - told_written);
                return i32::from(self.bad > 0);
            }
        }
    }

    /// Writes what the rate allows since the last slice, checks a little, and sleeps the rest.
    fn slice(&mut self) {
        let now = Instant::now();
        let since = match self.quickest {
            Some(_) => SLICE,
            None => now.duration_since(self.last_slice).min(CATCH_UP_MAX),
        };
        self.last_slice = now;
        let unlimited = self.bytes_per_second == 0;
        let pages = if unlimited { UNLIMITED_PER_SLICE } else { self.pages_due(since) };
        if self.working_set > 0 {
            (0..pages).for_each(|_| self.write_next());
        }
        if self.check == Check::All {
            self.check_some();
        }
        if self.spin {
            self.work(now);
            return;
        }
        self.loops += 1;
        if !unlimited || self.working_set == 0 {
            let took = now.elapsed().min(self.quickest.unwrap_or(Duration::MAX));
            self.quickest = self.quickest.map(|_| took);
            std::thread::sleep(SLICE.saturating_sub(took));
        }
    }

    /// Computes until the slice that began at `since` is over.
    fn work(&mut self, since: Instant) {
        while since.elapsed() < SLICE {
            for _ in 0..WORK_UNIT {
                self.noise.next();
            }
            std::hint::black_box(&self.noise);
            self.loops += 1;
        }
    }

    /// Whole pages that may be written; the rest of the allowance is kept.
    fn pages_due(&mut self, since: Duration) -> u64 {
        const PAGE_BYTES: u64 = PAGE_WORDS as u64 * 8;
        let nanoseconds = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        self.allowance += u128::from(self.bytes_per_second) * u128::from(nanoseconds);
        let page = u128::from(PAGE_BYTES) * 1_000_000_000;
        let pages = self.allowance / page;
        self.allowance -= pages * page;
        u64::try_from(pages).unwrap_or(u64::MAX)
    }

    fn write_next(&mut self) {
        let random = self.noise.next() as usize;
        let page = match self.mode {
            Mode::Sequential => self.cursor,
            Mode::Random => random % self.working_set,
            Mode::Hot if !random.is_multiple_of(10) => random / 10 % (self.working_set / HOT_PART).max(1),
            Mode::Hot => random / 10 % self.working_set,
        };
        // What is about to be overwritten is looked at first: afterwards nobody could know.
        if self.check != Check::None {
            self.report(self.pages.check_edges(page));
        }
        self.cursor = (self.cursor + 1) % self.working_set;
        self.pages.write(page, self.write);
        self.written += 1;
    }

    fn check_some(&mut self) {
        for _ in 0..CHECKED_PER_SLICE.min(self.pages.count()) {
            let page = self.checked;
            self.checked = (self.checked + 1) % self.pages.count();
            let whole = page.is_multiple_of(WHOLE_EVERY);
            self.report(if whole { self.pages.check_whole(page) } else { self.pages.check_edges(page) });
            if self.checked == 0 && matches!(self.mode, Mode::Sequential) {
                self.report(self.pages.check_step(0..self.working_set));
            }
        }
    }

    fn report(&mut self, result: Result<(), Bad>) {
        let Err(bad) = result else { return };
        self.bad += 1;
        if self.bad <= BAD_SHOWN_MAX {
            println!("BAD page={} {}", bad.page, bad.what);
        }
    }

    fn tell(&self, start: Instant, since: Duration, written: u64) {
        let mbps = written as f64 * (PAGE_WORDS * 8 * 8) as f64 / 1e6 / since.as_secs_f64();
        println!(
            "LOAD t={} pages={} mbps={mbps:.1} loops={} bad={}",
            start.elapsed().as_secs(),
            self.written,
            self.loops,
            self.bad
        );
    }
}

/// Takes and gives back memory, for good.
fn churn(pages: usize, seed: u64) {
    for n in 1_u64.. {
        let held = Pages::filled(pages, seed ^ n);
        (0..pages).filter_map(|page| held.check_whole(page).err()).take(BAD_SHOWN_MAX as usize).for_each(
            |bad| {
                println!("BAD churned page={} {}", bad.page, bad.what);
            },
        );
        drop(held);
        println!("CHURN {n}");
        std::thread::sleep(CHURN_REST);
    }
}

fn mib(mib: u64) -> Result<usize, String> {
    let pages = usize::try_from(mib).ok().and_then(|m| m.checked_mul(PAGES_PER_MIB));
    pages.filter(|p| *p <= 1 << 28).ok_or(format!("{mib} MiB is more than any guest has"))
}
