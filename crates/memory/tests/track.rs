//! Tracking: exact against what was really written, and gone without a trace afterwards.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;

use common::qemu::{Qemu, executables};
use common::{KINDS, PATIENCE, Victim, attach, pages, run, wait_until};
use sterna_memory::{
    PAGE, PageRun, Region, TrackError, Tracker, WpAsyncTracker, digest, footprint, is_zero, mapped,
    populated, with_data,
};

const PAGES: u64 = 4096;

/// A victim with mapped memory of a kind, and the directory that holds its file, if any.
fn made(kind: &str, count: u64) -> (Victim, Region, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut victim = Victim::start();
    let region = victim.map(kind, count, dir.path().join("ram").to_str().unwrap());
    (victim, region, dir)
}

/// The content of all pages that can differ from zero; the others count as zero.
fn snapshot(victim: &Victim, region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.bytes as usize];
    let mut runs = Vec::new();
    populated(&victim.process, region, &mut runs).unwrap();
    for part in runs {
        let from = (part.first * PAGE) as usize;
        bytes[from..from + part.bytes() as usize].copy_from_slice(&victim.bytes(region, part));
    }
    bytes
}

fn changed(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let page = PAGE as usize;
    let differ = before.chunks(page).zip(after.chunks(page)).map(|(a, b)| a != b);
    differ.enumerate().filter(|(_, d)| *d).map(|(i, _)| i as u64).collect()
}

fn collect(tracker: &mut WpAsyncTracker) -> BTreeSet<u64> {
    let mut runs = Vec::new();
    tracker.collect(0, &mut runs).unwrap();
    pages(&runs)
}

fn peek(tracker: &mut WpAsyncTracker) -> BTreeSet<u64> {
    let mut runs = Vec::new();
    tracker.peek(0, &mut runs).unwrap();
    pages(&runs)
}

/// More runs than the kernel buffers at once, and more than one call returns: each is reported once, in order.
#[test]
fn fragmented_memory_is_reported_once_and_in_order() {
    const APART: u64 = 3;
    for count in [700, 20_000] {
        let (mut victim, region, _dir) = made("anon-small", count * APART);
        let ascending = |runs: &[PageRun]| runs.windows(2).all(|w| w[0].end() < w[1].first);
        let want: BTreeSet<u64> = (0..count).map(|n| n * APART).collect();
        let mut tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
        victim.tell(&format!("comb {APART}"));
        let (mut there, mut written, mut holes) = (Vec::new(), Vec::new(), Vec::new());
        populated(&victim.process, &region, &mut there).unwrap();
        assert!(ascending(&there) && pages(&there) == want, "populated: {} runs of {count}", there.len());
        tracker.collect_sorted(0, &mut written, &mut holes).unwrap();
        assert!(ascending(&written) && pages(&written) == want, "written: {} runs", written.len());
        assert_eq!(holes, []);
    }
}

/// What is reported is just what a comparison of all bytes shows, round after round, and a peek says the same before.
#[test]
fn tracking_is_exact_for_every_kind_of_memory() {
    for kind in KINDS {
        let (mut victim, region, _dir) = made(kind, PAGES);
        // Some pages are populated before, some are touched for the first time while tracked.
        victim.tell("fill 100 2000 1");
        let before = footprint(&victim.process).unwrap();
        let mut tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
        assert_eq!(collect(&mut tracker), BTreeSet::new(), "{kind}: nothing was written since the start");
        for (round, writes) in [0, 1, 50, 1000, 20_000, 3].into_iter().enumerate() {
            let old = snapshot(&victim, &region);
            victim.tell(&format!("scatter {} {writes}", round + 1));
            let want = changed(&old, &snapshot(&victim, &region));
            assert_eq!(peek(&mut tracker), want, "{kind}: peek {round}");
            assert_eq!(collect(&mut tracker), want, "{kind}: round {round}");
            assert_eq!(peek(&mut tracker), BTreeSet::new(), "{kind}: collected is armed");
        }
        Box::new(tracker).stop().unwrap();
        let after = footprint(&victim.process).unwrap();
        common::assert_same(&before, &after, kind);
    }
}

#[test]
fn several_regions_are_told_apart() {
    let (mut victim, region, _dir) = made("anon", PAGES);
    let half = |first| Region { base: region.base + first * PAGE, bytes: 1000 * PAGE };
    let mut tracker = WpAsyncTracker::start(&victim.process, vec![half(0), half(2000)], &attach()).unwrap();
    victim.tell("fill 999 1002 1");
    let (mut low, mut high) = (Vec::new(), Vec::new());
    tracker.collect(0, &mut low).unwrap();
    tracker.collect(1, &mut high).unwrap();
    assert_eq!((low, high), (vec![run(999, 1)], vec![run(0, 1)]));
    assert!(matches!(tracker.collect(2, &mut Vec::new()), Err(TrackError::NoRegion { index: 2 })));
}

/// Discards: anonymous memory is reported as written, though it is a hole by now; that of a memfd, shared or private, is not
/// reported. `populated` tells all, so a reader that compares loses none.
#[test]
fn discards_show_in_what_is_populated() {
    for kind in ["anon", "memfd-private", "memfd-shared"] {
        let (mut victim, region, _dir) = made(kind, PAGES);
        victim.tell("fill 0 1000 1");
        let mut tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
        victim.tell("drop 100 50");
        let reported = collect(&mut tracker);
        let mut runs = Vec::new();
        populated(&victim.process, &region, &mut runs).unwrap();
        let hole: BTreeSet<u64> = (100..150).collect();
        assert!(pages(&runs).is_disjoint(&hole), "{kind}: {runs:?}");
        assert_eq!(kind == "anon", hole.is_subset(&reported), "{kind}");
        // Written again after the discard: both tell it.
        victim.tell("fill 120 1 2");
        populated(&victim.process, &region, &mut runs).unwrap();
        assert!(pages(&runs).contains(&120) && collect(&mut tracker).contains(&120), "{kind}");
    }
}

/// Tracking marks empty pages, which the kernel reports as if they were swapped out. They are holes all the same, and reading
/// what is populated must not allocate any.
#[test]
fn holes_stay_holes_while_tracked_and_read() {
    for kind in KINDS {
        let (mut victim, region, _dir) = made(kind, PAGES);
        victim.tell("fill 10 5 1");
        let tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
        let (blocks, rss) = (victim.blocks(), victim.process.usage().unwrap().rss);
        let mut runs = Vec::new();
        populated(&victim.process, &region, &mut runs).unwrap();
        let whole = snapshot(&victim, &region);
        digest(&victim.process, &region).unwrap();
        assert_eq!(victim.blocks(), blocks, "{kind}");
        // THP populates what lies around; nothing else may be there.
        let want =
            if kind.starts_with("file") || kind == "anon" || kind == "anon-thp" { None } else { Some(5) };
        let count = pages(&runs).len();
        assert!(
            want.is_none_or(|n| n == count) && pages(&runs).is_superset(&(10..15).collect()),
            "{kind}: {runs:?}"
        );
        let set = whole.chunks(PAGE as usize).filter(|p| !is_zero(p)).count();
        assert_eq!(set, 5, "{kind}");
        let grown = victim.process.usage().unwrap().rss.saturating_sub(rss);
        assert!(grown < 64 * PAGE, "{kind}: reading made the process grow by {grown}");
        drop(tracker);
    }
}

/// Pages that are in a shared file but not mapped are found.
#[test]
fn what_is_only_in_the_file_is_populated() {
    for kind in ["memfd-shared", "memfd-private", "file-shared", "file-private"] {
        let (mut victim, region, _dir) = made(kind, PAGES);
        victim.tell("store 700 3 9");
        let mut runs = Vec::new();
        populated(&victim.process, &region, &mut runs).unwrap();
        assert_eq!(runs, [run(700, 3)], "{kind}");
        assert_eq!(victim.bytes(&region, run(701, 1)), common::content(9, 701), "{kind}");
        // A region that begins inside the mapping has the right offset.
        let inner = Region { base: region.base + 690 * PAGE, bytes: 100 * PAGE };
        populated(&victim.process, &inner, &mut runs).unwrap();
        assert_eq!(runs, [run(10, 3)], "{kind}");
    }
}

#[test]
fn the_digest_depends_on_content_alone() {
    let (mut one, region, _dir) = made("anon-thp", PAGES);
    one.tell("fill 5 600 1");
    one.tell("fill 3000 1 7");
    let first = digest(&one.process, &region).unwrap();
    for kind in KINDS {
        let (mut two, region, _dir) = made(kind, PAGES);
        two.tell("fill 0 1000 2");
        two.tell("fill 5 600 1");
        two.tell("fill 3000 1 7");
        assert_ne!(digest(&two.process, &region).unwrap(), first, "{kind}");
        two.tell("drop 0 5");
        two.tell("drop 605 395");
        assert_eq!(digest(&two.process, &region).unwrap(), first, "{kind}");
        two.tell("fill 3000 1 8");
        assert_ne!(digest(&two.process, &region).unwrap(), first, "{kind}: one page differs");
    }
}

#[test]
fn a_tracker_of_a_dead_process_says_so() {
    let (victim, region, _dir) = made("anon", 64);
    let mut tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
    victim.process.kill().unwrap();
    assert!(victim.process.wait_exit(PATIENCE));
    let mut runs = Vec::new();
    assert!(matches!(tracker.collect(0, &mut runs), Err(TrackError::Process(_))));
    assert!(populated(&victim.process, &region, &mut runs).is_err());
    Box::new(tracker).stop().unwrap();
}

#[test]
fn memory_tracked_by_another_is_busy_and_free_again_after() {
    let (victim, region, _dir) = made("anon", 64);
    let tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
    let second = WpAsyncTracker::start(&victim.process, vec![region], &attach());
    assert!(matches!(second.err(), Some(TrackError::Busy { .. })));
    drop(tracker);
    WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
}

/// A userfaultfd of ours that a crash left open in the process would block every later try: it is closed. One with other
/// features is somebody else's, and stays.
#[test]
fn a_leftover_of_ours_is_closed_and_nobody_elses() {
    const WP_ASYNC_UNPOPULATED_SHMEM: u64 = 1 << 15 | 1 << 13 | 1 << 12;
    const SOMEBODY_ELSES: u64 = 1 << 12;
    let (mut victim, region, _dir) = made("anon", 64);
    let before = footprint(&victim.process).unwrap();
    victim.tell(&format!("leftover {WP_ASYNC_UNPOPULATED_SHMEM}"));
    assert!(footprint(&victim.process).unwrap() != before);
    let tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
    Box::new(tracker).stop().unwrap();
    common::assert_same(&before, &footprint(&victim.process).unwrap(), "");
    victim.tell(&format!("leftover {SOMEBODY_ELSES}"));
    let with_other = footprint(&victim.process).unwrap();
    let tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach());
    assert!(matches!(tracker.err(), Some(TrackError::Busy { .. })));
    common::assert_same(&with_other, &footprint(&victim.process).unwrap(), "");
}

#[test]
fn nonsense_regions_are_errors() {
    let (victim, region, _dir) = made("anon", 64);
    for bad in [
        Region { base: region.base + 1, bytes: PAGE },
        Region { base: region.base, bytes: 0 },
        Region { base: !(PAGE - 1), bytes: 2 * PAGE },
        Region { base: 0x1000, bytes: PAGE },
    ] {
        assert!(WpAsyncTracker::start(&victim.process, vec![bad], &attach()).is_err(), "{bad:?}");
        assert!(populated(&victim.process, &bad, &mut Vec::new()).is_err(), "{bad:?}");
    }
}

/// The death of whoever tracks ends the tracking.
#[test]
fn a_killed_tracker_leaves_the_process_as_it_was() {
    let (mut victim, region, _dir) = made("memfd-shared", 256);
    victim.tell("fill 0 256 1");
    let before = footprint(&victim.process).unwrap();
    for _ in 0..20 {
        let mut tracker = Victim::command("tracker")
            .env("STERNA_TEST_PID", victim.process.pid().to_string())
            .env("STERNA_TEST_BASE", region.base.to_string())
            .env("STERNA_TEST_BYTES", region.bytes.to_string())
            .env("STERNA_TEST_HOLD", "1")
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(tracker.stdout.as_mut().unwrap()),
            &mut line,
        )
        .unwrap();
        assert_eq!(line, "tracking\n");
        assert!(footprint(&victim.process).unwrap() != before, "it does track");
        tracker.kill().unwrap();
        tracker.wait().unwrap();
        wait_until("the footprint to be as before", || footprint(&victim.process).unwrap() == before);
    }
    assert_eq!(victim.tell("verify 0 256 1"), "ok");
}

/// Real QEMUs, each kind of RAM: tracked, exact where the guest stands still, and left as they were.
#[test]
fn real_qemus_are_tracked_and_left_as_they_were() {
    let kinds = [None, Some("memory-backend-memfd,share=off"), Some("memory-backend-memfd,share=on")];
    for executable in executables() {
        for kind in kinds {
            let mut qemu = Qemu::start(&executable, kind);
            let ram = qemu.ram();
            std::thread::sleep(std::time::Duration::from_millis(300)); // the firmware boots
            qemu.command(r#"{"execute":"stop"}"#);
            let before = qemu.footprint();
            let content = digest(&qemu.process, &ram).unwrap();
            let mut tracker = WpAsyncTracker::start(&qemu.process, vec![ram], &attach()).unwrap();
            let mut runs: Vec<PageRun> = Vec::new();
            tracker.collect(0, &mut runs).unwrap();
            let what = format!("{} {kind:?}", executable.display());
            assert_eq!(runs, [], "{what}: the guest is stopped");
            assert_eq!(digest(&qemu.process, &ram).unwrap(), content, "{what}");
            Box::new(tracker).stop().unwrap();
            common::assert_same(&before, &qemu.footprint(), &what);
            // Once more with a guest that runs; QEMU itself may map memory then, so that only our traces are looked for.
            let mut tracker = WpAsyncTracker::start(&qemu.process, vec![ram], &attach()).unwrap();
            qemu.command(r#"{"execute":"system_reset"}"#);
            qemu.command(r#"{"execute":"cont"}"#);
            wait_until("the firmware to write", || {
                tracker.peek(0, &mut runs).unwrap();
                !runs.is_empty()
            });
            qemu.command(r#"{"execute":"stop"}"#);
            let (mut seen, mut collected) = (Vec::new(), Vec::new());
            tracker.peek(0, &mut seen).unwrap();
            tracker.collect(0, &mut collected).unwrap();
            assert_eq!(seen, collected, "{what}");
            assert!(
                footprint(&qemu.process).unwrap().mappings.iter().any(|m| m.flags.contains("uw")),
                "{what}"
            );
            Box::new(tracker).stop().unwrap();
            let after = qemu.footprint();
            assert_eq!(before.descriptors, after.descriptors, "{what}");
            assert!(!after.mappings.iter().any(|m| m.flags.contains("uw")), "{what}: {after:#?}");
        }
    }
}

/// What was read or written through the mapping and is no hole yet is mapped; of the rest the file tells.
#[test]
fn what_was_read_and_is_not_mapped_any_more_may_be_a_hole() {
    for kind in ["memfd-shared", "file-shared", "memfd-private"] {
        let (mut victim, region, _dir) = made(kind, PAGES);
        victim.tell("store 0 1000 1");
        let mut tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
        let mut there = Vec::new();
        mapped(&victim.process, &region, &mut there).unwrap();
        assert!(pages(&there).is_empty(), "{kind}: {there:?}");
        snapshot(&victim, &region);
        mapped(&victim.process, &region, &mut there).unwrap();
        assert!(pages(&there).is_superset(&(0..1000).collect()), "{kind}: {there:?}");
        let (mut written, mut absent) = (Vec::new(), Vec::new());
        tracker.collect_sorted(0, &mut written, &mut absent).unwrap();
        assert!(written.is_empty() && absent.is_empty(), "{kind}: reading counts as a write");
        victim.tell("drop 100 50");
        mapped(&victim.process, &region, &mut there).unwrap();
        assert!(pages(&there).is_disjoint(&(100..150).collect()), "{kind}: {there:?}");
        let found = with_data(&victim.process, &region, &[run(90, 20), run(140, 200), run(990, 30)]).unwrap();
        assert_eq!(found, [run(90, 10), run(150, 190), run(990, 10)], "{kind}");
    }
}
