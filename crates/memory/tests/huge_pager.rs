//! Huge pages of hugetlbfs paged on demand: they come in pieces, and who touches one waits until all of it is there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Victim, attach, content, run, wait_until};
use sterna_lab::HugePages;
use sterna_memory::{Fault, PAGE, PageBits, Pager, PagerError, Region, footprint};

/// Pages of 4 KiB in a huge one.
const HUGE: u64 = 512;
/// Huge pages mapped by the victim.
const COUNT: u64 = 12;

const KINDS: [&str; 2] = ["huge-shared", "huge-private"];

/// The pool goes last: what the victim still holds cannot be given back.
struct Place {
    victim: Victim,
    region: Region,
    dir: tempfile::TempDir,
    _pool: HugePages,
}

impl Place {
    fn new(kind: &str) -> Place {
        let pool = HugePages::reserve(COUNT + 4).unwrap();
        let mut victim = Victim::start();
        victim.park();
        let region = victim.map(kind, COUNT * HUGE, "");
        Place { victim, region, dir: tempfile::tempdir_in("/dev/shm").unwrap(), _pool: pool }
    }

    fn bits(&self) -> std::path::PathBuf {
        self.dir.path().join("bits")
    }

    fn attach(&self, delivered: &[sterna_memory::PageRun]) -> Pager {
        let bits = PageBits::create(&self.bits(), &[COUNT * HUGE]).unwrap();
        for run in delivered {
            bits.set(0, *run);
        }
        Pager::attach(&self.victim.process, vec![self.region], bits, &attach()).unwrap()
    }

    fn take_over(&self, fd: i32) -> Pager {
        let bits = PageBits::open(&self.bits(), &[COUNT * HUGE]).unwrap();
        Pager::take_over(&self.victim.process, vec![self.region], bits, &attach(), fd).unwrap()
    }

    /// Huge pages that the victim has, which nobody else in the test has.
    fn held(&self) -> u64 {
        let of = |word: &str| {
            let info = std::fs::read_to_string("/proc/meminfo").unwrap();
            let line = info.lines().find_map(|line| line.strip_prefix(word)).unwrap().to_owned();
            line.trim_start_matches(':').trim().parse::<u64>().unwrap()
        };
        of("HugePages_Total") - of("HugePages_Free")
    }
}

fn bytes(first: u64, pages: u64, seed: u64) -> Vec<u8> {
    (first..first + pages).flat_map(|page| content(seed, page)).collect()
}

/// Hears of faults while `work` is done; all that there were.
fn served<T>(pager: &Pager, answer: impl Fn(Fault) + Sync, work: impl FnOnce() -> T) -> (T, Vec<Fault>) {
    let (ended, heard) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let done = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut faults = Vec::new();
            while !ended.load(Ordering::Acquire) {
                pager.next(Duration::from_millis(5), &mut faults).unwrap();
                faults.iter().for_each(|fault| answer(*fault));
                heard.lock().unwrap().append(&mut faults);
            }
        });
        struct Ends<'a>(&'a AtomicBool);
        impl Drop for Ends<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        let _ends = Ends(&ended);
        work()
    });
    (done, heard.into_inner().unwrap())
}

fn first_fault(pager: &Pager) -> Fault {
    let mut faults = Vec::new();
    wait_until("a fault", || {
        pager.next(Duration::from_millis(100), &mut faults).unwrap();
        !faults.is_empty()
    });
    faults[0]
}

#[test]
fn who_touches_one_waits_until_all_of_it_has_come() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        // What is there must not be taken for what is to come, and what was delivered before stays.
        place.victim.tell(&format!("fill 0 {} 9", 3 * HUGE));
        place.victim.tell(&format!("fill {} {HUGE} 1", 4 * HUGE));
        let before = footprint(&place.victim.process).unwrap();
        let pager = place.attach(&[run(4 * HUGE, HUGE)]);
        assert_eq!(pager.granule(0), HUGE);
        pager.drop_ahead(&[vec![run(0, 4 * HUGE), run(5 * HUGE, (COUNT - 5) * HUGE)]]).unwrap();
        pager.begin().unwrap();
        assert_eq!((pager.remaining(), place.held()), ((COUNT - 1) * HUGE, 1), "{kind}");
        assert_eq!(place.victim.tell(&format!("verify {} {HUGE} 1", 4 * HUGE)), "ok", "{kind}");

        place.victim.send(&format!("verify {} 1 1", HUGE + 77));
        let fault = first_fault(&pager);
        assert_eq!((fault.region, fault.page), (0, HUGE), "{kind}: the first page of it");
        assert_eq!(pager.waiting(), [(0, HUGE)]);
        let done = pager.install(0, HUGE, &bytes(HUGE, 300, 1)).unwrap();
        assert_eq!((done.pages, done.duplicates, done.resolved.len()), (0, 0, 0), "{kind}: too early");
        let done = pager.install(0, HUGE + 200, &bytes(HUGE + 200, 312, 1)).unwrap();
        assert_eq!((done.pages, done.duplicates, done.resolved.len()), (HUGE, 100, 1), "{kind}");
        assert_eq!(place.victim.read(), "ok", "{kind}");

        let all = || (5..COUNT).flat_map(|unit| (0..HUGE).step_by(64).map(move |at| unit * HUGE + at));
        let push = |skip: usize| {
            for first in all().skip(skip).step_by(2) {
                pager.install(0, first, &bytes(first, 64, 1)).unwrap();
            }
        };
        let answer = |fault: Fault| {
            drop(pager.install(0, fault.page, &bytes(fault.page, HUGE, 1)).unwrap());
        };
        place.victim.send(&format!("verify 0 {} 1", COUNT * HUGE));
        served(&pager, answer, || {
            std::thread::scope(|scope| {
                scope.spawn(|| push(0));
                push(1);
            });
            assert_eq!(place.victim.read(), "ok", "{kind}");
        });
        assert_eq!(pager.remaining(), 0, "{kind}");
        pager.end().unwrap();
        assert_eq!(place.victim.tell(&format!("verify 0 {} 1", COUNT * HUGE)), "ok", "{kind}");
        common::assert_same(&before, &footprint(&place.victim.process).unwrap(), kind);
    }
}

/// Zeros come in small runs too, and take no huge page where nobody waits.
#[test]
fn zeros_take_no_room() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        let pager = place.attach(&[]);
        pager.begin().unwrap();
        place.victim.send(&format!("zero {} 1", 2 * HUGE + 5));
        assert_eq!(first_fault(&pager).page, 2 * HUGE, "{kind}");
        for first in (0..4 * HUGE).step_by(16) {
            pager.settle_zero(0, run(first, 16)).unwrap();
        }
        assert_eq!(place.victim.read(), "1", "{kind}");
        assert_eq!((pager.remaining(), place.held()), ((COUNT - 4) * HUGE, 1), "{kind}");
        let none = |fault: Fault| panic!("{kind}: asked for {fault:?}");
        let zero = format!("zero 0 {}", 4 * HUGE);
        let (answer, _) = served(&pager, none, || place.victim.tell(&zero));
        assert_eq!(answer, (4 * HUGE).to_string(), "{kind}");
        pager.settle_zero(0, run(4 * HUGE, HUGE / 2)).unwrap();
        pager.install(0, 4 * HUGE + HUGE / 2, &bytes(4 * HUGE + HUGE / 2, HUGE / 2, 1)).unwrap();
        assert_eq!(place.victim.tell(&format!("zero {} 256", 4 * HUGE)), "256", "{kind}");
        assert_eq!(place.victim.tell(&format!("verify {} 256 1", 4 * HUGE + 256)), "ok", "{kind}");
        pager.settle_zero(0, run(5 * HUGE, (COUNT - 5) * HUGE)).unwrap();
        pager.end().unwrap();
        assert_eq!(place.victim.tell(&format!("zero {} {HUGE}", 7 * HUGE)), HUGE.to_string(), "{kind}");
    }
}

/// Of a huge page that had come in part nothing counts when the pager dies, or when the process discards it.
#[test]
fn a_part_of_one_is_nothing() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        let pager = place.attach(&[]);
        pager.begin().unwrap();
        pager.install(0, 0, &bytes(0, HUGE - 1, 1)).unwrap();
        let fd = pager.remote_fd();
        place.victim.send("verify 0 1 1");
        assert_eq!(first_fault(&pager).page, 0);
        drop(pager);
        let pager = place.take_over(fd);
        assert_eq!(pager.remaining(), COUNT * HUGE, "{kind}");
        assert_eq!(first_fault(&pager).page, 0, "{kind}: told again");
        assert_eq!(pager.install(0, HUGE - 1, &bytes(HUGE - 1, 1, 1)).unwrap().pages, 0, "{kind}");
        assert_eq!(pager.install(0, 0, &bytes(0, HUGE - 1, 1)).unwrap().pages, HUGE, "{kind}");
        assert_eq!(place.victim.read(), "ok", "{kind}");

        pager.install(0, 3 * HUGE, &bytes(3 * HUGE, 100, 1)).unwrap();
        let drop_it = format!("dontneed {} {HUGE}", 3 * HUGE);
        served(&pager, |_| {}, || place.victim.tell(&drop_it));
        let done = pager.install(0, 3 * HUGE + 100, &bytes(3 * HUGE + 100, 412, 1)).unwrap();
        assert_eq!((done.pages, done.duplicates), (0, 412), "{kind}: what was discarded stays so");
        let zero = format!("zero {} {HUGE}", 3 * HUGE);
        let (answer, faults) = served(&pager, |_| {}, || place.victim.tell(&zero));
        assert_eq!((answer, faults), (HUGE.to_string(), vec![]), "{kind}");
    }
}

#[test]
fn what_cannot_be_whole_is_refused() {
    let place = Place::new("huge-shared");
    let pager = place.attach(&[run(HUGE, HUGE - 1)]);
    assert!(matches!(pager.begin(), Err(PagerError::Bits)));
    let half = Region { base: place.region.base + HUGE / 2 * PAGE, bytes: HUGE * PAGE };
    let told = Pager::refusal(&place.victim.process, &[half]).unwrap().unwrap();
    assert!(told.contains("whole huge pages"), "{told}");
    assert!(Path::new(&place.bits()).exists());
    drop((pager, place));
    let mut place = Place::new("huge-private");
    place.victim.tell("store 5 1 1");
    let told = Pager::refusal(&place.victim.process, &[place.region]).unwrap().unwrap();
    assert!(told.contains("has content"), "{told}");
}
