//! Huge pages of hugetlbfs: holes are told exactly and stay holes, pieces of 4 KiB come and go, memory in whole huge pages.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Victim, attach, content, pages, run};
use sterna_lab::HugePages;
use sterna_memory::{
    Installer, PAGE, PageRun, Reader, Region, Tracker, WpAsyncTracker, digest, emptied, footprint, populated,
};

/// Pages of 4 KiB in a huge one.
const HUGE: u64 = 512;
/// Huge pages mapped by the victim.
const COUNT: u64 = 16;

const KINDS: [&str; 2] = ["huge-shared", "huge-private"];

/// The pool goes last: what the victim still holds cannot be given back.
fn mapped(kind: &str) -> (HugePages, Victim, Region) {
    let pool = HugePages::reserve(COUNT + 4).unwrap();
    let mut victim = Victim::start();
    let region = victim.map(kind, COUNT * HUGE, "");
    (pool, victim, region)
}

/// Huge pages that the victim's memory takes: the file's if it is shared, else the process's own and the file's.
fn held(victim: &mut Victim, kind: &str) -> u64 {
    let file = victim.blocks() * 512 / (HUGE * PAGE);
    if kind.ends_with("-shared") { file } else { file + own(victim) }
}

fn own(victim: &Victim) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", victim.process.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("HugetlbPages:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024 / (HUGE * PAGE)
}

fn there(victim: &Victim, region: &Region) -> Vec<PageRun> {
    let mut runs = Vec::new();
    populated(&victim.process, region, &mut runs).unwrap();
    runs
}

fn bytes(runs: &[PageRun], seed: u64) -> Vec<u8> {
    runs.iter().flat_map(|r| r.first..r.end()).flat_map(|p| content(seed, p)).collect()
}

/// The kernel's usual answers take every hole of such a file for data: reading them, as a digest would, fills them.
#[test]
fn holes_are_told_exactly_and_stay() {
    for kind in KINDS {
        let (_pool, mut victim, region) = mapped(kind);
        victim.tell(&format!("fill {} 3 1", HUGE + 7));
        victim.tell(&format!("fill {} 1 1", 5 * HUGE - 1));
        victim.tell(&format!("fill {} 1 1", 5 * HUGE));
        let want = [run(HUGE, HUGE), run(4 * HUGE, 2 * HUGE)];
        let before = footprint(&victim.process).unwrap();
        for _ in 0..3 {
            assert_eq!(there(&victim, &region), want, "{kind}");
        }
        digest(&victim.process, &region).unwrap();
        assert_eq!(held(&mut victim, kind), 3, "{kind}: looking filled holes");
        // A region that begins and ends inside of huge pages.
        let inner = Region { base: region.base + (HUGE + 5) * PAGE, bytes: (4 * HUGE - 2) * PAGE };
        assert_eq!(there(&victim, &inner), [run(0, HUGE - 5), run(3 * HUGE - 5, HUGE + 3)], "{kind}");
        common::assert_same(&before, &footprint(&victim.process).unwrap(), kind);
    }
}

/// A discard of a tracked page leaves a marker, which looks as a page does that the kernel moves.
#[test]
fn discards_are_told_while_tracked() {
    for kind in KINDS {
        let (_pool, mut victim, region) = mapped(kind);
        victim.tell(&format!("fill 0 {} 1", 8 * HUGE));
        let before = footprint(&victim.process).unwrap();
        let mut tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
        let mut written = Vec::new();
        tracker.collect(0, &mut written).unwrap();
        assert_eq!(written, [], "{kind}");
        victim.tell(&format!("drop {} {}", 2 * HUGE, 3 * HUGE));
        let want = [run(0, 2 * HUGE), run(5 * HUGE, 3 * HUGE)];
        assert_eq!(there(&victim, &region), want, "{kind}: with markers");
        tracker.collect(0, &mut written).unwrap();
        assert_eq!((&written[..], there(&victim, &region)), (&[][..], want.to_vec()), "{kind}");
        // Taken again, and one that was never there.
        victim.tell(&format!("fill {} 1 2", 3 * HUGE + 9));
        victim.tell(&format!("fill {} 1 2", 12 * HUGE + 9));
        tracker.collect(0, &mut written).unwrap();
        assert_eq!(written, [run(3 * HUGE, HUGE), run(12 * HUGE, HUGE)], "{kind}: whole huge pages");
        assert_eq!(held(&mut victim, kind), 7, "{kind}");
        assert_eq!(pages(&there(&victim, &region)).len() as u64, 7 * HUGE, "{kind}");
        Box::new(tracker).stop().unwrap();
        common::assert_same(&before, &footprint(&victim.process).unwrap(), kind);
    }
}

/// A discarded page that is read is there again, and no scan tells that it is not what it was: it is found by what it holds.
#[test]
fn what_was_discarded_and_read_is_found_by_what_it_holds() {
    let (_pool, mut victim, region) = mapped("huge-private");
    victim.tell(&format!("fill 0 {} 1", 8 * HUGE));
    let mut tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
    victim.tell(&format!("drop {} {}", 2 * HUGE, HUGE));
    let reader = Reader::of(&victim.process, &[region]).unwrap();
    let mut page = vec![1; PAGE as usize];
    reader.read(&[region.span(run(2 * HUGE + 300, 1))], &mut page).unwrap();
    assert!(page.iter().all(|byte| *byte == 0));
    let mut written = Vec::new();
    tracker.collect(0, &mut written).unwrap();
    let sent = [run(0, 2 * HUGE + 100), run(2 * HUGE + 200, 6 * HUGE - 200)];
    assert_eq!(
        (&written[..], there(&victim, &region)),
        (&[][..], vec![run(0, 8 * HUGE)]),
        "as the kernel tells it"
    );
    let found = emptied(&victim.process, &region, &sent, HUGE).unwrap();
    assert_eq!(found, [run(2 * HUGE, 100), run(2 * HUGE + 200, HUGE - 200)]);
    assert_eq!(held(&mut victim, "huge-private"), 8, "looking filled nothing");
    Box::new(tracker).stop().unwrap();
}

#[test]
fn what_is_only_in_the_file_is_found() {
    for kind in KINDS {
        let (_pool, mut victim, region) = mapped(kind);
        victim.tell(&format!("store {} 1 9", 6 * HUGE + 3));
        victim.tell("fill 0 1 1");
        assert_eq!(there(&victim, &region), [run(0, HUGE), run(6 * HUGE, HUGE)], "{kind}");
        assert_eq!(victim.bytes(&region, run(6 * HUGE + 3, 1)), content(9, 6 * HUGE + 3), "{kind}");
        assert_eq!(victim.tell("zero 1 511"), "511", "{kind}");
    }
}

/// Halves of huge pages are discarded one by one, as they come from two streams: the bytes are zero, the memory is given back
/// with the second, and a page that is written in between stays.
#[test]
fn pieces_come_and_go() {
    for kind in KINDS {
        let (_pool, mut victim, region) = mapped(kind);
        let before = footprint(&victim.process).unwrap();
        let installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
        let all = [run(0, 4 * HUGE), run(9 * HUGE + 1, 1)];
        installer.install(0, &all, &bytes(&all, 1)).unwrap();
        assert_eq!(held(&mut victim, kind), 5, "{kind}");
        installer.discard(0, &[run(0, HUGE / 2), run(HUGE, HUGE), run(3 * HUGE + 1, 1)]).unwrap();
        installer.install(0, &[run(5, 1)], &bytes(&[run(5, 1)], 2)).unwrap();
        installer.discard(0, &[run(HUGE / 2, HUGE / 2), run(2 * HUGE, HUGE / 2)]).unwrap();
        installer.discard(0, &[run(2 * HUGE + HUGE / 2, HUGE / 2), run(7 * HUGE + 3, 2)]).unwrap();
        installer.finish().unwrap();
        assert_eq!(held(&mut victim, kind), 3, "{kind}: huge pages 0, 3 and 9 hold something");
        assert_eq!(victim.tell("verify 5 1 2"), "ok", "{kind}");
        assert_eq!(victim.tell(&format!("verify {} {} 1", 3 * HUGE + 2, HUGE - 2)), "ok", "{kind}");
        assert_eq!(victim.tell(&format!("verify {} 1 1", 9 * HUGE + 1)), "ok", "{kind}");
        common::assert_same(&before, &footprint(&victim.process).unwrap(), kind);
        assert_eq!(victim.tell(&format!("zero 0 {}", 3 * HUGE + 2)), (3 * HUGE).to_string(), "{kind}");
    }
}

/// What was there before the installer came is not known to be zero, until somebody says so.
#[test]
fn what_was_there_is_kept() {
    for kind in KINDS {
        let (_pool, mut victim, region) = mapped(kind);
        victim.tell(&format!("fill {} 2 4", 2 * HUGE + 7));
        let installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
        installer.discard(0, &[run(2 * HUGE + 7, 1)]).unwrap();
        installer.finish().unwrap();
        assert_eq!(victim.tell(&format!("verify {} 1 4", 2 * HUGE + 8)), "ok", "{kind}");
        let installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
        installer.discard(0, &[run(2 * HUGE + 8, 1)]).unwrap();
        installer.is_zero_now(0);
        assert_eq!(held(&mut victim, kind), 1, "{kind}");
        installer.install(0, &[run(2 * HUGE, 1)], &bytes(&[run(2 * HUGE, 1)], 5)).unwrap();
        installer.discard(0, &[run(2 * HUGE, 1)]).unwrap();
        installer.finish().unwrap();
        assert_eq!(held(&mut victim, kind), 0, "{kind}");
    }
}

/// A private mapping of a file that has content: a discard must not uncover it, nor change the file.
#[test]
fn a_discard_does_not_uncover_the_file() {
    let (_pool, mut victim, region) = mapped("huge-private");
    victim.tell(&format!("store 0 {} 4", 2 * HUGE));
    let installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
    installer.install(0, &[run(9, 1)], &bytes(&[run(9, 1)], 1)).unwrap();
    installer.discard(0, &[run(0, HUGE), run(HUGE, 3)]).unwrap();
    installer.finish().unwrap();
    assert_eq!(victim.tell(&format!("zero 0 {}", HUGE + 3)), (HUGE + 3).to_string());
    assert_eq!(victim.tell(&format!("verify {} {} 4", HUGE + 3, HUGE - 3)), "ok");
    assert_eq!(victim.blocks(), 2 * HUGE * PAGE / 512, "the file is as it was");
}

/// Four threads write and discard pieces of the same huge pages: none is given back under a piece that was just written.
#[test]
fn several_threads_share_huge_pages() {
    for kind in KINDS {
        let (_pool, mut victim, region) = mapped(kind);
        let installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
        std::thread::scope(|scope| {
            for lane in 0..4 {
                let installer = &installer;
                scope.spawn(move || {
                    for round in 0..50 {
                        for huge in 0..4 {
                            let mine = [run(huge * HUGE + lane * 100, 20)];
                            installer.install(0, &mine, &bytes(&mine, round)).unwrap();
                            if round < 49 || lane > 1 {
                                installer.discard(0, &mine).unwrap();
                            }
                        }
                    }
                });
            }
        });
        installer.finish().unwrap();
        for huge in 0..4 {
            for lane in 0..2 {
                assert_eq!(
                    victim.tell(&format!("verify {} 20 49", huge * HUGE + lane * 100)),
                    "ok",
                    "{kind}"
                );
            }
            assert_eq!(victim.tell(&format!("zero {} 312", huge * HUGE + 200)), "312", "{kind}");
        }
        assert_eq!(held(&mut victim, kind), 4, "{kind}");
    }
}
