//! Demand paging: who touches a missing page waits for its content, and never reads a zero that is not one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{KINDS, PATIENCE, Random, Victim, attach, content, run, wait_until};
use sterna_memory::{
    BitsError, Fault, PAGE, PageBits, PageRun, Pager, PagerError, Region, footprint, populated,
};

const PAGES: u64 = 4096;

const TICK: Duration = Duration::from_millis(100);

/// A victim with memory, and where its bits are.
struct Place {
    victim: Victim,
    region: Region,
    dir: tempfile::TempDir,
}

impl Place {
    fn new(kind: &str) -> Place {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut victim = Victim::start();
        victim.park();
        let region = victim.map(kind, PAGES, dir.path().join("ram").to_str().unwrap());
        Place { victim, region, dir }
    }

    fn new_bits(&self) -> PageBits {
        PageBits::create(&self.dir.path().join("bits"), &[PAGES]).unwrap()
    }

    fn attach_with(&self, bits: PageBits) -> Pager {
        Pager::attach(&self.victim.process, vec![self.region], bits, &attach()).unwrap()
    }

    fn begin(&self) -> Pager {
        let pager = self.attach_with(self.new_bits());
        pager.begin().unwrap();
        pager
    }

    fn take_over(&self, fd: i32) -> Result<Pager, PagerError> {
        let bits = PageBits::open(&self.dir.path().join("bits"), &[PAGES]).unwrap();
        Pager::take_over(&self.victim.process, vec![self.region], bits, &attach(), fd)
    }
}

/// Answers faults with `answer` while `work` is done.
fn served<T>(pager: &Pager, answer: impl Fn(Fault) + Sync, work: impl FnOnce() -> T) -> T {
    struct Ended<'a>(&'a AtomicBool);
    impl Drop for Ended<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut faults = Vec::new();
            while !ended.load(Ordering::Acquire) {
                pager.next(Duration::from_millis(5), &mut faults).unwrap();
                faults.iter().for_each(|fault| answer(*fault));
            }
        });
        let _ended = Ended(&ended);
        work()
    })
}

fn install(pager: &Pager, seed: u64) -> impl Fn(Fault) {
    move |fault| drop(pager.install(fault.region, fault.page, &content(seed, fault.page)).unwrap())
}

fn bytes(first: u64, pages: u64, seed: u64) -> Vec<u8> {
    (first..first + pages).flat_map(|page| content(seed, page)).collect()
}

/// The next faults, of which there must be some.
fn faults(pager: &Pager) -> Vec<Fault> {
    let mut faults = Vec::new();
    wait_until("a fault", || {
        pager.next(TICK, &mut faults).unwrap();
        !faults.is_empty()
    });
    faults
}

#[test]
fn who_touches_a_page_gets_its_content() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        let before = footprint(&place.victim.process).unwrap();
        let pager = place.begin();
        let asked = AtomicU64::new(0);
        let answer = |fault: Fault| {
            asked.fetch_add(1, Ordering::Relaxed);
            let done = pager.install(0, fault.page, &content(1, fault.page)).unwrap();
            assert!(done.resolved.iter().all(|r| r.thread == fault.thread && r.waited < PATIENCE));
            assert_eq!((done.pages, done.resolved.len()), (1, 1), "{kind}");
        };
        served(&pager, answer, || {
            let victim = &mut place.victim;
            assert_eq!(victim.tell("verify 0 200 1"), "ok", "{kind}: read");
            assert_eq!(asked.load(Ordering::Relaxed), 200, "{kind}: a neighbour came by itself");
            assert_eq!(victim.tell("kernel 200 100 1"), "ok", "{kind}: read by the kernel");
            victim.tell("fill 300 100 2");
            victim.tell("verify 300 100 2");
        });
        assert_eq!(pager.remaining(), PAGES - 400);
        let done = pager.install(0, 0, &bytes(0, 1000, 1)).unwrap();
        assert_eq!((done.pages, done.duplicates, done.resolved.len()), (600, 400, 0), "{kind}");
        let done = pager.install(0, 1000, &bytes(1000, PAGES - 1000, 1)).unwrap();
        assert_eq!((done.pages, done.duplicates), (PAGES - 1000, 0), "{kind}");
        pager.end().unwrap();
        for check in ["verify 0 300 1", "verify 300 100 2", "verify 400 3696 1"] {
            assert_eq!(place.victim.tell(check), "ok", "{kind} {check}");
        }
        let after = footprint(&place.victim.process).unwrap();
        common::assert_same(&before, &after, kind);
    }
}

#[test]
fn zero_pages_are_zero_and_take_no_room() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        let pager = place.begin();
        place.victim.send("zero 10 1");
        let fault = faults(&pager)[0];
        assert_eq!((fault.region, fault.page), (0, 10));
        assert_eq!(pager.waiting(), [(0, 10)]);
        let done = pager.settle_zero(0, run(0, 100)).unwrap();
        assert_eq!((done.pages, done.duplicates, done.resolved.len()), (100, 0, 1), "{kind}");
        assert_eq!(place.victim.read(), "1", "{kind}: who waited");
        assert_eq!(pager.waiting(), []);
        // Nothing but zeros is taken for these any more; what is touched later is resolved without a question.
        assert_eq!(pager.install(0, 20, &content(1, 20)).unwrap().duplicates, 1);
        let none = |fault: Fault| panic!("{kind}: asked for {fault:?}");
        served(&pager, none, || assert_eq!(place.victim.tell("zero 0 100"), "100", "{kind}"));
        let done = pager.settle_zero(0, run(50, PAGES - 50)).unwrap();
        assert_eq!((done.pages, done.duplicates), (PAGES - 100, 50));
        pager.end().unwrap();
        assert_eq!(place.victim.tell(&format!("zero 0 {PAGES}")), PAGES.to_string(), "{kind}");
        place.victim.tell("fill 0 4096 3");
        assert_eq!(place.victim.tell("verify 0 4096 3"), "ok", "{kind}: writable");
    }
}

#[test]
fn the_same_pages_may_come_twice_at_once() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        let pager = place.begin();
        let (pages, duplicates) = (AtomicU64::new(0), AtomicU64::new(0));
        place.victim.send("verify 0 4096 1");
        served(&pager, install(&pager, 1), || {
            std::thread::scope(|scope| {
                for at_once in [16, 64, 37] {
                    let (pager, pages, duplicates) = (&pager, &pages, &duplicates);
                    scope.spawn(move || {
                        for first in (0..PAGES).step_by(at_once as usize) {
                            let count = at_once.min(PAGES - first);
                            let done = pager.install(0, first, &bytes(first, count, 1)).unwrap();
                            assert_eq!(done.pages + done.duplicates, count);
                            pages.fetch_add(done.pages, Ordering::Relaxed);
                            duplicates.fetch_add(done.duplicates, Ordering::Relaxed);
                        }
                    });
                }
            });
            assert_eq!(place.victim.read(), "ok", "{kind}");
        });
        let (pages, duplicates) = (pages.into_inner(), duplicates.into_inner());
        assert_eq!(pages + duplicates, 3 * PAGES);
        assert!(pages <= PAGES && pager.remaining() == 0, "{kind}: {pages}");
        assert_eq!(pager.waiting(), []);
        pager.end().unwrap();
    }
}

/// The agent's death: its descriptor closes, the process's copy stays, and the bits are in the file.
#[test]
fn faults_wait_for_a_new_pager_when_theirs_dies() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        let pager = place.begin();
        pager.install(0, 0, &bytes(0, 50, 1)).unwrap();
        pager.settle_zero(0, run(60, 40)).unwrap();
        let fd = pager.remote_fd();
        place.victim.send("verify 0 60 1");
        // Read of by the one that dies; the next is not.
        assert_eq!(faults(&pager)[0].page, 50);
        drop(pager);
        std::thread::sleep(Duration::from_millis(20));
        let pager = place.take_over(fd).unwrap();
        assert_eq!(pager.remaining(), PAGES - 90);
        served(&pager, install(&pager, 1), || {
            assert_eq!(place.victim.read(), "ok", "{kind}: zeros were read");
        });
        drop(pager);
        // Nobody has read of it yet.
        place.victim.send("verify 100 200 1");
        std::thread::sleep(Duration::from_millis(20));
        let pager = place.take_over(fd).unwrap();
        served(&pager, install(&pager, 1), || {
            assert_eq!(place.victim.read(), "ok", "{kind}: zeros were read");
            assert_eq!(place.victim.tell("zero 60 40"), "40", "{kind}");
        });
        drop(pager);
        // Nor of a discard.
        place.victim.send("churn dontneed 1 1000 1 7");
        std::thread::sleep(Duration::from_millis(20));
        let pager = place.take_over(fd).unwrap();
        served(&pager, install(&pager, 1), || assert_eq!(place.victim.read(), "0", "{kind}"));
        assert_eq!(pager.install(0, 1000, &content(1, 1000)).unwrap().duplicates, 1, "{kind}");
        pager.install(0, 0, &bytes(0, PAGES, 1)).unwrap();
        pager.end().unwrap();
        assert_eq!(place.victim.tell("verify 100 900 1"), "ok", "{kind}");
        assert_eq!(place.victim.tell("zero 1000 1"), "1", "{kind}");
    }
}

#[test]
fn only_a_pager_that_had_begun_is_taken_over() {
    let place = Place::new("anon");
    let pager = place.attach_with(place.new_bits());
    let fd = pager.remote_fd();
    assert!(matches!(place.take_over(fd), Err(PagerError::NotBegun { .. })));
    for other in [0, fd + 1, -1] {
        assert!(matches!(place.take_over(other), Err(PagerError::NotPager { .. })), "{other}");
    }
    pager.begin().unwrap();
    place.take_over(fd).unwrap();
    let bits = PageBits::create(&place.dir.path().join("other"), &[PAGES + 1]).unwrap();
    let other = Pager::take_over(&place.victim.process, vec![place.region], bits, &attach(), fd);
    assert!(matches!(other, Err(PagerError::Bits)));
}

/// Discards of single pages by several threads while the same pages come in: what was discarded stays so.
#[test]
fn a_discarded_page_never_gets_its_old_content_back() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        let pager = place.begin();
        // A hole in shared memory that is told before it is made, as QEMU makes it in shared memory without a descriptor.
        let how = if kind.ends_with("-shared") { "remove" } else { "dontneed" };
        served(&pager, install(&pager, 1), || {
            place.victim.send(&format!("churn {how} 2 0 {PAGES} 7"));
            for backwards in [false, true] {
                for step in 0..PAGES / 8 {
                    let first = if backwards { PAGES - 8 - step * 8 } else { step * 8 };
                    pager.install(0, first, &bytes(first, 8, 1)).unwrap();
                }
            }
            let not_zero = place.victim.read();
            assert_eq!(not_zero, "0", "{kind}: pages had their old content after the discard");
            assert_eq!(pager.remaining(), 0);
            let changed = place.victim.tell(&format!("churned 0 {PAGES} 7"));
            assert_eq!(changed, "0", "{kind}: pages changed after the discard");
        });
        pager.end().unwrap();
    }
}

/// As QEMU discards: it punches the file first, then tells. Between the two old content may come, and stays; anything else may not.
#[test]
fn discards_as_qemus_do_not_hang() {
    for kind in ["memfd-shared", "memfd-private", "anon", "anon-shared"] {
        let mut place = Place::new(kind);
        let pager = place.begin();
        served(&pager, install(&pager, 1), || {
            place.victim.send("drop 100 2000");
            pager.install(0, 0, &bytes(0, 2200, 1)).unwrap();
            assert_eq!(place.victim.read(), "ok");
            let zero: u64 = place.victim.tell("zero 100 2000").parse().unwrap();
            assert!(kind == "memfd-shared" || zero == 2000, "{kind}: {zero}");
            assert_eq!(place.victim.tell("verify 0 100 1"), "ok");
            assert_eq!(place.victim.tell("verify 2100 100 1"), "ok");
        });
    }
}

/// While a discard was not read of, nothing can be put in place; then the page is settled and what came for it is dropped.
#[test]
fn an_install_waits_for_a_discard_and_then_gives_way() {
    for kind in ["anon", "memfd-private", "anon-shared"] {
        let mut place = Place::new(kind);
        let pager = place.begin();
        let how = if kind.ends_with("-shared") { "remove" } else { "dontneed" };
        place.victim.send(&format!("churn {how} 1 5 1 7"));
        std::thread::sleep(Duration::from_millis(20));
        std::thread::scope(|scope| {
            let install = scope.spawn(|| pager.install(0, 0, &bytes(0, 16, 1)).unwrap());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!install.is_finished(), "{kind}: the discard was not noticed");
            served(
                &pager,
                |fault| panic!("{kind}: asked for {fault:?}"),
                || {
                    let done = install.join().unwrap();
                    assert_eq!((done.pages, done.duplicates), (15, 1), "{kind}");
                    assert_eq!(place.victim.read(), "0", "{kind}");
                },
            );
        });
    }
}

/// A thread waits for a page that another one discards: it must not wait for ever.
#[test]
fn who_waits_for_a_discarded_page_gets_zeros() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        let pager = place.begin();
        place.victim.send("churn wait 2 0 2 7");
        let none = |_: Fault| {};
        served(&pager, none, || assert_eq!(place.victim.read(), "0", "{kind}"));
        assert_eq!(pager.waiting(), [], "{kind}");
    }
}

#[test]
fn what_was_present_is_dropped_but_what_was_delivered_stays() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        place.victim.tell("fill 0 100 5");
        place.victim.tell("comb 512");
        place.victim.tell("fill 700 1 5");
        let bits = place.new_bits();
        bits.set(0, run(10, 40));
        bits.set(0, run(700, 1));
        let pager = place.attach_with(bits);
        pager.begin().unwrap();
        let asked = AtomicU64::new(0);
        let answer = |fault: Fault| {
            asked.fetch_add(1, Ordering::Relaxed);
            install(&pager, 1)(fault);
        };
        served(&pager, answer, || {
            for (first, count, seed) in
                [(0, 10, 1), (10, 40, 5), (50, 650, 1), (700, 1, 5), (701, PAGES - 701, 1)]
            {
                let told = place.victim.tell(&format!("verify {first} {count} {seed}"));
                assert_eq!(told, "ok", "{kind}: {first}");
            }
        });
        assert_eq!(asked.into_inner(), PAGES - 41, "{kind}");
        pager.end().unwrap();
    }
}

/// What was only read is the shared zero page, or a page of zeros in the file: there all the same.
#[test]
fn zeros_that_were_read_before_are_dropped_too() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        place.victim.tell("zero 2000 100");
        let pager = place.begin();
        served(&pager, install(&pager, 1), || {
            assert_eq!(place.victim.tell("verify 1990 120 1"), "ok", "{kind}");
        });
    }
}

/// Thousands of single pages between delivered ones are dropped, and each of them alone; the process is left as it was.
#[test]
fn many_single_pages_are_dropped() {
    for kind in KINDS {
        let mut place = Place::new(kind);
        place.victim.tell("fill 0 4096 5");
        let before = footprint(&place.victim.process).unwrap();
        let bits = place.new_bits();
        let set: u64 = (0..PAGES).step_by(2).map(|page| bits.set(0, run(page, 1))).sum();
        assert_eq!(set, PAGES / 2);
        let pager = place.attach_with(bits);
        pager.begin().unwrap();
        let asked = AtomicU64::new(0);
        let answer = |fault: Fault| {
            asked.fetch_add(1, Ordering::Relaxed);
            install(&pager, 5)(fault);
        };
        served(&pager, answer, || assert_eq!(place.victim.tell("verify 0 4096 5"), "ok", "{kind}"));
        assert_eq!(asked.into_inner(), PAGES / 2, "{kind}");
        pager.end().unwrap();
        common::assert_same(&before, &footprint(&place.victim.process).unwrap(), kind);
    }
}

/// Room that was set aside in a file has no data, but a page that does not fault.
#[test]
fn room_that_was_set_aside_is_given_back() {
    let mut place = Place::new("file-shared");
    let file = std::fs::File::options().write(true).open(place.dir.path().join("ram")).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, PAGES * PAGE).unwrap();
    let pager = place.begin();
    assert_eq!(place.victim.blocks(), 0);
    served(&pager, install(&pager, 1), || assert_eq!(place.victim.tell("verify 0 4096 1"), "ok"));
}

/// A private mapping of a file with content, a clone of a template: the file keeps it, and is not seen.
#[test]
fn a_file_below_private_memory_is_neither_seen_nor_changed() {
    for kind in ["memfd-private", "file-private"] {
        let mut place = Place::new(kind);
        place.victim.tell("store 0 2000 4");
        place.victim.tell("verify 0 100 4");
        let blocks = place.victim.blocks();
        let pager = place.begin();
        pager.settle_zero(0, run(1000, 2000)).unwrap();
        served(&pager, install(&pager, 1), || {
            assert_eq!(place.victim.tell("verify 0 300 1"), "ok", "{kind}: read");
            place.victim.tell("fill 300 300 2");
            assert_eq!(place.victim.tell("kernel 600 100 1"), "ok", "{kind}");
            // The file's content shows when a page above it is dropped; for the guest it is zero.
            assert_eq!(place.victim.tell("churn dontneed 2 100 50 7"), "0", "{kind}");
            assert_eq!(place.victim.tell("churned 100 50 7"), "0", "{kind}");
            assert_eq!(place.victim.tell("verify 150 150 1"), "ok", "{kind}");
        });
        pager.install(0, 0, &bytes(0, PAGES, 1)).unwrap();
        pager.end().unwrap();
        assert_eq!(place.victim.tell("verify 300 300 2"), "ok", "{kind}");
        assert_eq!(place.victim.tell("verify 600 400 1"), "ok", "{kind}");
        assert_eq!(place.victim.tell("zero 1000 1000"), "1000", "{kind}: the file is seen");
        assert_eq!(place.victim.blocks(), blocks, "{kind}: the file has other pages");
        if kind == "file-private" {
            let file = std::fs::read(place.dir.path().join("ram")).unwrap();
            assert!(file[..2000 * PAGE as usize] == bytes(0, 2000, 4), "the file has changed");
        }
        assert_eq!(place.victim.tell("zero 2000 1000"), "1000", "{kind}");
    }
}

#[test]
fn what_cannot_be_paged_is_refused() {
    let disk = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let tmpfs = rustix::fs::statfs(disk).unwrap().f_type == 0x0102_1994;
    assert!(!tmpfs, "this test needs {} on a disk", disk.display());
    let dir = tempfile::tempdir_in(disk).unwrap();
    for kind in ["file-private", "file-shared"] {
        let mut victim = Victim::start();
        let region = victim.map(kind, PAGES, dir.path().join("ram").to_str().unwrap());
        let reason = Pager::refusal(&victim.process, &[region]).unwrap().unwrap();
        assert!(reason.contains("disk"), "{reason}");
        let bits = PageBits::create(&dir.path().join("bits"), &[PAGES]).unwrap();
        let before = footprint(&victim.process).unwrap();
        let refused = Pager::attach(&victim.process, vec![region], bits, &attach());
        assert!(matches!(refused, Err(PagerError::Refused { .. })));
        common::assert_same(&before, &footprint(&victim.process).unwrap(), kind);
    }
    for kind in KINDS {
        let mut place = Place::new(kind);
        let refusal = |place: &Place| Pager::refusal(&place.victim.process, &[place.region]).unwrap();
        assert_eq!(refusal(&place), None, "{kind}");
        if kind == "anon" {
            place.victim.tell("lock");
            assert!(refusal(&place).unwrap().contains("locked"));
        }
    }
}

#[test]
fn a_pager_does_not_end_before_all_is_there() {
    let mut place = Place::new("anon");
    let pager = place.begin();
    let fd = pager.remote_fd();
    pager.install(0, 0, &bytes(0, PAGES - 1, 1)).unwrap();
    assert!(matches!(pager.end(), Err(PagerError::Missing { pages: 1, .. })));
    let pager = place.take_over(fd).unwrap();
    served(&pager, install(&pager, 1), || assert_eq!(place.victim.tell("verify 0 4096 1"), "ok"));
    pager.end().unwrap();
}

#[test]
fn the_end_of_the_process_is_told_apart() {
    let mut place = Place::new("anon");
    let pager = place.begin();
    place.victim.send("verify 0 1 1");
    assert_eq!(faults(&pager).len(), 1);
    place.victim.process.kill().unwrap();
    assert!(place.victim.process.wait_exit(PATIENCE));
    assert!(matches!(pager.next(TICK, &mut Vec::new()), Err(PagerError::Gone { .. })));
    assert!(matches!(pager.install(0, 0, &content(1, 0)), Err(PagerError::Gone { .. })));
    assert!(matches!(place.take_over(pager.remote_fd()), Err(PagerError::Gone { .. })));
}

#[test]
fn wrong_runs_and_lengths_are_errors() {
    let place = Place::new("anon");
    let pager = place.begin();
    let page = content(1, 0);
    assert!(matches!(pager.install(0, PAGES, &page), Err(PagerError::OutOfRange { .. })));
    assert!(matches!(pager.install(0, u64::MAX, &page), Err(PagerError::OutOfRange { .. })));
    assert!(matches!(pager.install(1, 0, &page), Err(PagerError::OutOfRange { .. })));
    assert!(matches!(pager.install(0, 0, &page[1..]), Err(PagerError::Length { .. })));
    assert!(matches!(pager.settle_zero(0, run(PAGES - 1, 2)), Err(PagerError::OutOfRange { .. })));
    assert!(matches!(pager.settle_zero(0, run(0, 0)), Err(PagerError::OutOfRange { .. })));
    assert_eq!(pager.remaining(), PAGES);
}

#[test]
fn huge_pages_come_back_where_they_are_allowed() {
    let mut place = Place::new("anon-thp");
    let pager = place.begin();
    pager.install(0, 0, &bytes(0, PAGES, 1)).unwrap();
    pager.end().unwrap();
    assert!(Pager::collapse(&place.victim.process, &place.region).unwrap() >= (PAGES * PAGE) / 2);
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", place.victim.process.pid())).unwrap();
    let huge = smaps.lines().filter_map(|l| l.strip_prefix("AnonHugePages:"));
    let kib: u64 =
        huge.map(|l| l.trim().trim_end_matches(" kB").parse::<u64>().unwrap()).max().unwrap_or_default();
    assert!(kib >= PAGES * PAGE / 2 / 1024, "{kib} kB in huge pages");
    assert_eq!(place.victim.tell("verify 0 4096 1"), "ok");
    let mut small = Place::new("anon-small");
    small.victim.tell("fill 0 4096 1");
    assert_eq!(Pager::collapse(&small.victim.process, &small.region).unwrap(), 0);
}

fn there(place: &Place) -> BTreeSet<u64> {
    let mut runs = Vec::new();
    populated(&place.victim.process, &place.region, &mut runs).unwrap();
    common::pages(&runs)
}

/// One byte that was written makes 2 MiB present.
#[test]
fn neighbours_in_a_huge_page_are_dropped_too() {
    let mut place = Place::new("anon-thp");
    place.victim.tell("comb 1024");
    assert!(there(&place).len() > 100, "no huge pages here: {:?}", there(&place));
    let pager = place.begin();
    assert_eq!(there(&place), BTreeSet::new());
    served(&pager, install(&pager, 1), || assert_eq!(place.victim.tell("verify 0 4096 1"), "ok"));
}

#[test]
fn bits_are_what_was_set_also_after_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bits");
    for seed in 1..40 {
        let mut random = Random(seed);
        let sizes: Vec<u64> = (0..random.below(4)).map(|_| random.below(400)).collect();
        let mut model: Vec<Vec<bool>> = sizes.iter().map(|n| vec![false; *n as usize]).collect();
        let mut bits = PageBits::create(&path, &sizes).unwrap();
        for _ in 0..60 {
            let region = random.below(sizes.len() as u64 + 1) as usize;
            let part = run(random.below(450), random.below(130));
            let mut newly = 0;
            for page in part.first..part.end() {
                if let Some(bit) = model.get_mut(region).and_then(|r| r.get_mut(page as usize)) {
                    newly += u64::from(!std::mem::replace(bit, true));
                }
            }
            assert_eq!(bits.set(region, part), newly, "{seed}: {region} {part:?}");
            if random.below(10) == 0 {
                drop(bits);
                bits = PageBits::open(&path, &sizes).unwrap();
            }
            agree(&bits, &model);
        }
    }
}

fn agree(bits: &PageBits, model: &[Vec<bool>]) {
    let mut clear = 0;
    for (region, pages) in model.iter().enumerate() {
        let mut runs: Vec<PageRun> = Vec::new();
        bits.clear_runs(region, |run| runs.push(run));
        assert!(runs.windows(2).all(|w| w[0].end() < w[1].first) && runs.iter().all(|r| r.pages > 0));
        let found = common::pages(&runs);
        for (page, set) in (0..).zip(pages) {
            assert_eq!(bits.get(region, page), *set);
            assert_eq!(found.contains(&page), !set);
        }
        clear += found.len();
        assert_eq!(found.len(), pages.iter().filter(|set| !**set).count());
        assert!(!bits.get(region, pages.len() as u64));
    }
    assert_eq!(bits.clear_count(), clear as u64);
}

#[test]
fn a_file_of_bits_that_does_not_fit_is_refused() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("bits"), dir.path().join("other"));
    std::fs::write(&other, "precious").unwrap();
    symlink(&other, &path).unwrap();
    drop(PageBits::create(&path, &[100, 64]).unwrap());
    assert_eq!(std::fs::read(&other).unwrap(), b"precious", "the link was followed");
    let metadata = std::fs::symlink_metadata(&path).unwrap();
    assert!(metadata.is_file() && metadata.mode() & 0o7777 == 0o600);
    for sizes in [vec![100], vec![64, 100], vec![100, 65], vec![101, 64], vec![100, 64, 0], vec![]] {
        assert!(matches!(PageBits::open(&path, &sizes), Err(BitsError::Layout { .. })), "{sizes:?}");
    }
    PageBits::open(&path, &[100, 64]).unwrap().set(0, run(0, 100));
    assert_eq!(PageBits::create(&path, &[100, 64]).unwrap().clear_count(), 164);
    symlink(&path, dir.path().join("link")).unwrap();
    let link = PageBits::open(&dir.path().join("link"), &[100, 64]);
    assert!(matches!(link, Err(BitsError::Open { .. })));
    assert!(matches!(PageBits::open(&other, &[1]), Err(BitsError::Layout { .. })));
}
