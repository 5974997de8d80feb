//! Pages in common: found by frames, mapped copy-on-write, and then memory like any other: written, discarded, tracked, paged on demand.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Victim, attach, content, run};
use std::os::fd::AsRawFd;
use std::time::Duration;
use sterna_memory::{
    Backing, CommonRun, Installer, PAGE, PageBits, PageRun, Pager, Process, Reader, Region, SealedMemory,
    Tracker, WpAsyncTracker, common_room, common_store, footprint, frames, populated, populated_and_own,
    touch_common,
};

const PAGES: u64 = 1024;

/// A store with these pages of this seed's content, in this order.
fn store(seed: u64, pages: &[u64]) -> SealedMemory {
    let store = common_store(pages.len() as u64).unwrap();
    for (at, page) in (0..).zip(pages) {
        store.write(&content(seed, *page), at * PAGE).unwrap();
    }
    store.seal().unwrap();
    store
}

/// Has a process open it; the number there.
fn lend(victim: &mut Victim, store: &SealedMemory) -> i32 {
    let path = format!("/proc/{}/fd/{}", std::process::id(), store.file().as_raw_fd());
    victim.tell(&format!("open {path}")).parse().unwrap()
}

fn at(first: u64, pages: u64, at: u64) -> CommonRun {
    CommonRun { run: run(first, pages), at }
}

/// A process with pages 10..20 and 500 of content 7 from a store, and 15 written over.
fn mapped() -> (Victim, Region, SealedMemory, Installer) {
    let pages: Vec<u64> = (10..20).chain([500]).collect();
    let store = store(7, &pages);
    let mut victim = Victim::start();
    let region = victim.map("anon", PAGES, "");
    let fd = lend(&mut victim, &store);
    let mut installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
    let mapped = installer.map_common(fd, &[(0, vec![at(10, 10, 0), at(500, 1, 10)])]).unwrap();
    assert_eq!(mapped, 2);
    installer.install(0, &[run(15, 1), run(700, 1)], &[content(8, 15), content(8, 700)].concat()).unwrap();
    (victim, region, store, installer)
}

fn populated_pages(victim: &Victim, region: &Region) -> Vec<PageRun> {
    let mut runs = Vec::new();
    populated(&victim.process, region, &mut runs).unwrap();
    runs
}

#[test]
fn what_is_mapped_is_there_and_each_may_write_it() {
    let (mut victim, region, store, installer) = mapped();
    let verify = |victim: &mut Victim, range: &str| assert_eq!(victim.tell(&format!("verify {range}")), "ok");
    verify(&mut victim, "10 5 7");
    verify(&mut victim, "15 1 8");
    verify(&mut victim, "16 4 7");
    verify(&mut victim, "500 1 7");
    assert_eq!(populated_pages(&victim, &region), [run(10, 10), run(500, 1), run(700, 1)]);
    assert_eq!(Backing::of(&victim.process, &region).unwrap(), Backing::Anonymous);
    let (populated, own) = populated_and_own(&victim.process, &region, &[run(10, 10), run(500, 1)]).unwrap();
    assert_eq!(populated, [run(10, 10), run(500, 1), run(700, 1)]);
    assert_eq!(own, [run(15, 1), run(700, 1)]);
    // What becomes zero is zero, and not what is below.
    installer.discard(0, &[run(12, 2), run(15, 1), run(700, 1)]).unwrap();
    assert_eq!(victim.tell("zero 0 1024"), (PAGES - 8).to_string());
    installer.finish().unwrap();
    victim.tell("fill 10 1 9");
    verify(&mut victim, "10 1 9");
    let mut page = vec![0; PAGE as usize];
    std::os::unix::fs::FileExt::read_exact_at(store.file(), &mut page, 0).unwrap();
    assert_eq!(page, content(7, 10), "the store is as it was");
}

#[test]
fn two_that_map_one_store_are_seen_to_share_frames() {
    let store = store(3, &[1, 2, 3]);
    let seen = [(); 2].map(|()| {
        let mut victim = Victim::start();
        let region = victim.map("anon", PAGES, "");
        let fd = lend(&mut victim, &store);
        let mut installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
        // Side by side, and each a mapping of its own.
        installer.map_common(fd, &[(0, vec![at(1, 1, 2), at(2, 1, 0), at(3, 1, 1)])]).unwrap();
        victim.tell("fill 2 1 5");
        victim.tell("fill 100 3 5");
        (victim, region)
    });
    // A page that one of them alone has mapped is shared with nobody yet, and yet is not its own: pages 1 and 3, of which the other maps none.
    let own = |at: usize| seen[at].0.process.usage().unwrap().own;
    let before = [own(0), own(1)];
    let pages = seen
        .each_ref()
        .map(|(victim, region)| sterna_memory::common(&victim.process, &[*region]).unwrap().remove(0));
    let touch = |at: usize| {
        let (victim, region) = &seen[at];
        touch_common(&victim.process, [(*region, pages[at].as_slice())]).unwrap();
    };
    touch(0);
    assert_eq!([own(0), own(1)], before);
    (0..2).for_each(touch);
    let found = seen.each_ref().map(|(victim, region)| {
        let mut found = Vec::new();
        frames(&victim.process, region, &populated_pages(victim, region), |page, frame| {
            found.push((page, frame))
        })
        .unwrap();
        found
    });
    let pages: Vec<u64> = found[0].iter().map(|(page, _)| *page).collect();
    assert_eq!(pages, [1, 3], "what is written is alone");
    assert_eq!(found[0], found[1]);
}

#[test]
fn the_new_mappings_are_as_the_old_one_was() {
    let store = store(3, &[1, 2]);
    let mut victim = Victim::start();
    let region = victim.map("anon-thp", PAGES, "");
    let before = footprint(&victim.process).unwrap();
    let flags = |footprint: &sterna_memory::Footprint| {
        let within = |line: &str| {
            let address = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
            (region.base..region.end()).contains(&address)
        };
        let flags = footprint.mappings.iter().filter(|m| within(&m.line)).map(|m| m.flags.clone());
        flags.collect::<Vec<_>>()
    };
    let fd = lend(&mut victim, &store);
    let mut installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
    installer.map_common(fd, &[(0, vec![at(5, 2, 0)])]).unwrap();
    installer.finish().unwrap();
    let old = flags(&before);
    let new = flags(&footprint(&victim.process).unwrap());
    assert_eq!((old.len(), new.len()), (1, 3));
    assert!(new.iter().all(|flags| *flags == old[0]), "{old:?} {new:?}");
}

/// Signals that a process blocks, ignores and catches, in all its threads, and its mappings outside of a region.
fn ways(victim: &Victim, region: &Region) -> (Vec<String>, Vec<String>) {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", victim.process.pid())).unwrap();
    let status = tasks.flatten().map(|task| std::fs::read_to_string(task.path().join("status")).unwrap());
    let signals = status.flat_map(|text| {
        text.lines().filter(|line| line.starts_with("Sig")).map(str::to_owned).collect::<Vec<_>>()
    });
    let outside = |line: &&String| {
        let address = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        !(region.base..region.end()).contains(&address)
    };
    let mappings = footprint(&victim.process).unwrap().mappings.into_iter().map(|mapping| mapping.line);
    (signals.collect(), mappings.collect::<Vec<_>>().iter().filter(outside).cloned().collect())
}

/// The process makes them by itself, in one go; one that ignores what ends that has each made for it. Nothing of either stays.
#[test]
fn hundreds_of_mappings_are_made_and_leave_nothing() {
    let pages: Vec<u64> = (0..PAGES / 2).map(|at| 2 * at).collect();
    let store = store(6, &pages);
    for how in ["default", "catch", "ignore"] {
        let mut victim = Victim::start();
        if how != "default" {
            victim.tell(&format!("traps {how}"));
        }
        let region = victim.map("anon", PAGES, "");
        let fd = lend(&mut victim, &store);
        let before = ways(&victim, &region);
        let mut installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
        let runs: Vec<CommonRun> = (0..).zip(&pages).map(|(place, page)| at(*page, 1, place)).collect();
        let mapped = installer.map_common(fd, &[(0, runs)]).unwrap();
        assert_eq!(mapped, pages.len(), "{how}");
        installer.finish().unwrap();
        assert_eq!(ways(&victim, &region), before, "{how}");
        for page in [0, 2, 4, PAGES / 2, PAGES - 2] {
            assert_eq!(victim.tell(&format!("verify {page} 1 6")), "ok", "{how}");
        }
        let common = sterna_memory::common(&victim.process, &[region]).unwrap();
        assert_eq!(common[0].len(), pages.len(), "{how}");
        assert!(victim.tell("sit nanosleep").starts_with("sitting"));
        assert!(victim.tell("").starts_with("fine [] signals 0"), "{how}: it saw a signal");
    }
}

/// The kernel has no room for all: those that were made are told, and the process goes on.
#[test]
fn as_many_as_the_kernel_lets_a_process_have() {
    let most: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    let pages = 2 * most;
    let store = store(5, &[1, 2]);
    let mut victim = Victim::start();
    let region = victim.map("anon", pages, "");
    let fd = lend(&mut victim, &store);
    let mut installer = Installer::open(&victim.process, vec![region], &attach()).unwrap();
    let runs: Vec<CommonRun> = (0..most).map(|place| at(2 * place, 1, place % 2)).collect();
    let mapped = installer.map_common(fd, &[(0, runs)]).unwrap() as u64;
    assert!((most / 2 - 100..most / 2).contains(&mapped), "{mapped} of {most}");
    installer.install(0, &[run(2 * mapped, 1)], &content(8, 2 * mapped)).unwrap();
    installer.finish().unwrap();
    assert_eq!(victim.tell(&format!("verify {} 1 8", 2 * mapped)), "ok");
    let common = sterna_memory::common(&victim.process, &[region]).unwrap();
    assert_eq!(common[0].len() as u64, mapped);
}

#[test]
fn writes_to_common_pages_are_tracked() {
    let (mut victim, region, _store, installer) = mapped();
    installer.finish().unwrap();
    let mut tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach()).unwrap();
    let mut written = Vec::new();
    victim.tell("verify 10 5 7");
    tracker.collect(0, &mut written).unwrap();
    assert_eq!(written, [], "to read is not to write");
    victim.tell("fill 11 2 4");
    victim.tell("fill 500 1 4");
    victim.tell("fill 800 1 4");
    tracker.collect(0, &mut written).unwrap();
    assert_eq!(written, [run(11, 2), run(500, 1), run(800, 1)]);
    Box::new(tracker).stop().unwrap();
}

#[test]
fn pages_come_on_demand_over_common_ones() {
    let (mut victim, region, _store, installer) = mapped();
    installer.finish().unwrap();
    // The page tables forget it, as they do when memory is short.
    victim.tell("dontneed 16 3");
    let dir = tempfile::tempdir().unwrap();
    let bits = PageBits::create(&dir.path().join("bits"), &[PAGES]).unwrap();
    // 13 is stale, 200 has never come; what else there is stays.
    bits.set(0, run(0, 13));
    bits.set(0, run(14, 186));
    bits.set(0, run(201, PAGES - 201));
    let pager = Pager::attach(&victim.process, vec![region], bits, &attach()).unwrap();
    pager.begin().unwrap();
    let done = std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut faults = Vec::new();
            while pager.remaining() > 0 {
                pager.next(Duration::from_millis(20), &mut faults).unwrap();
                for fault in &faults {
                    pager.install(0, fault.page, &content(6, fault.page)).unwrap();
                }
            }
            // Faults on what is there already, until nobody asks any more.
            for _ in 0..20 {
                pager.next(Duration::from_millis(20), &mut faults).unwrap();
            }
        });
        let told = ["10 3 7", "13 1 6", "14 1 7", "15 1 8", "17 1 7", "200 1 6", "500 1 7", "700 1 8"]
            .map(|range| victim.tell(&format!("verify {range}")));
        pager.map_templates().unwrap();
        server.join().unwrap();
        told
    });
    assert!(done.iter().all(|told| told == "ok"), "{done:?}");
    pager.end().unwrap();
    assert_eq!(victim.tell("verify 16 4 7"), "ok");
    assert_eq!(victim.tell("verify 13 1 6"), "ok");
}

#[test]
fn there_is_room_for_so_many_runs_and_no_more() {
    let mut victim = Victim::start();
    victim.map("anon", PAGES, "");
    let most: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    let room = common_room(&victim.process).unwrap();
    assert!(room < most / 2 && (most > 2 * (1 << 15) || room > most / 4), "{room} of {most}");
}

/// The frames of all that is there.
fn frames_of(process: &Process, region: &Region) -> Vec<(u64, u64)> {
    let mut runs = Vec::new();
    populated(process, region, &mut runs).unwrap();
    let mut found = Vec::new();
    frames(process, region, &runs, |page, frame| found.push((page, frame))).unwrap();
    found
}

/// What is pinned must be a process's own: to read pages as other processes' memory is read breaks what a fork shares.
#[test]
fn a_gentle_reader_leaves_pages_shared() {
    let mut victim = Victim::start();
    let region = victim.map("anon-small", PAGES, "");
    victim.tell("fill 0 600 4");
    let child = Process::open(victim.tell("twin").parse().unwrap()).unwrap();
    let before = frames_of(&victim.process, &region);
    assert!(before.len() >= 600 && before == frames_of(&child, &region), "{} pages", before.len());

    let span = [region.span(run(0, 600))];
    let mut gently = vec![0; 600 * PAGE as usize];
    Reader::gentle(&child).unwrap().read(&span, &mut gently).unwrap();
    assert_eq!(frames_of(&victim.process, &region), before);
    let all: Vec<u8> = (0..600).flat_map(|page| content(4, page)).collect();
    assert_eq!(gently, all);

    let mut bytes = vec![0; 600 * PAGE as usize];
    Reader::new(&child).unwrap().read(&span, &mut bytes).unwrap();
    assert_eq!(bytes, all);
    let after = frames_of(&victim.process, &region);
    assert!(
        after.len() < before.len() / 2,
        "{} pages are shared still: the kernel has changed, and so may we",
        after.len()
    );
    child.kill().unwrap();
}
