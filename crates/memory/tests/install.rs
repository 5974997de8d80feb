//! Installing and discarding: the bytes are there, nothing else has changed, and no memory is used twice.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::qemu::{Qemu, executables};
use common::{Victim, attach, content, run, wait_until};
use sterna_memory::{
    InstallError, Installer, PAGE, PageRun, Reader, Region, digest, footprint, is_zero, populated,
};

const PAGES: u64 = 4096;

const KINDS: [&str; 7] =
    ["anon", "anon-small", "anon-shared", "memfd-private", "memfd-shared", "file-private", "file-shared"];

fn mapped(kind: &str) -> (Victim, Region, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut victim = Victim::start();
    let region = victim.map(kind, PAGES, dir.path().join("ram").to_str().unwrap());
    (victim, region, dir)
}

fn open(victim: &Victim, region: Region) -> Installer {
    Installer::open(&victim.process, vec![region], &attach()).unwrap()
}

fn bytes(runs: &[PageRun], seed: u64) -> Vec<u8> {
    runs.iter().flat_map(|r| r.first..r.end()).flat_map(|p| content(seed, p)).collect()
}

fn populated_pages(victim: &Victim, region: &Region) -> Vec<PageRun> {
    let mut runs = Vec::new();
    populated(&victim.process, region, &mut runs).unwrap();
    runs
}

/// What the memory takes: the file's size where it is shared (it need not be mapped), the process's share elsewhere.
fn memory_used(victim: &mut Victim, kind: &str) -> u64 {
    if kind.ends_with("-shared") { victim.blocks() * 512 } else { victim.process.pss_bytes().unwrap() }
}

#[test]
fn pages_arrive_in_every_kind_of_memory() {
    for kind in KINDS {
        let (mut victim, region, _dir) = mapped(kind);
        let before = footprint(&victim.process).unwrap();
        let installer = open(&victim, region);
        let runs = [run(0, 1), run(5, 600), run(1000, 1), run(1002, 1), run(4095, 1)];
        installer.install(0, &runs, &bytes(&runs, 1)).unwrap();
        // Again, over present pages, absent ones, and both in turn.
        let again = [run(0, 10), run(604, 3), run(999, 6), run(2000, 500)];
        installer.install(0, &again, &bytes(&again, 2)).unwrap();
        installer.finish().unwrap();
        for (first, count, seed) in
            [(0, 10, 2), (10, 594, 1), (604, 3, 2), (999, 6, 2), (2000, 500, 2), (4095, 1, 1)]
        {
            assert_eq!(victim.tell(&format!("verify {first} {count} {seed}")), "ok", "{kind} {first}");
        }
        let after = footprint(&victim.process).unwrap();
        common::assert_same(&before, &after, kind);
        let untouched = victim.tell("zero 607 392");
        assert_eq!(untouched, "392", "{kind}");
    }
}

/// A write fault in a private mapping fills the file's page as well: memory would be used twice, and it would stay so.
#[test]
fn private_memory_of_a_memfd_is_not_doubled() {
    let (mut victim, region, _dir) = mapped("memfd-private");
    let installer = open(&victim, region);
    let all = [run(0, PAGES)];
    let before = victim.process.pss_bytes().unwrap();
    installer.install(0, &all, &bytes(&all, 1)).unwrap();
    installer.install(0, &all, &bytes(&all, 2)).unwrap();
    assert_eq!(victim.blocks(), 0);
    let grown = victim.process.pss_bytes().unwrap() - before;
    assert!(grown < PAGES * PAGE * 5 / 4, "{grown} bytes for {}", PAGES * PAGE);
    installer.discard(0, &[run(10, 3), run(1000, 1000)]).unwrap();
    assert_eq!(victim.blocks(), 0);
    drop(installer);
    assert_eq!(victim.tell("verify 13 987 2"), "ok");
    assert_eq!(victim.tell("zero 1000 1000"), "1000");
}

#[test]
fn discarded_pages_read_as_zero_and_untouched_ones_stay_untouched() {
    for kind in KINDS {
        let (mut victim, region, _dir) = mapped(kind);
        let before = footprint(&victim.process).unwrap();
        let installer = open(&victim, region);
        let runs = [run(0, 2000)];
        installer.install(0, &runs, &bytes(&runs, 1)).unwrap();
        let used = memory_used(&mut victim, kind);
        // Short runs, long ones, some partly or wholly never touched.
        let gone = [run(3, 1), run(7, 20), run(100, 900), run(1990, 100), run(3000, 600)];
        installer.discard(0, &gone).unwrap();
        if !kind.starts_with("file") && kind != "anon-shared" {
            let back = used - memory_used(&mut victim, kind);
            assert!(back > 800 * PAGE, "{kind}: only {back} bytes were given back");
        }
        let there = common::pages(&populated_pages(&victim, &region));
        if kind != "anon" && !kind.starts_with("file") {
            assert!(there.iter().all(|p| *p < 2000), "{kind}: {there:?}");
        }
        assert_eq!(victim.tell("verify 27 73 1"), "ok", "{kind}");
        assert_eq!(victim.tell("verify 1000 990 1"), "ok", "{kind}");
        for part in gone {
            let zero = victim.tell(&format!("zero {} {}", part.first, part.pages));
            assert_eq!(zero, part.pages.to_string(), "{kind} {part:?}");
        }
        installer.install(0, &[run(200, 3)], &bytes(&[run(200, 3)], 5)).unwrap();
        assert_eq!(victim.tell("verify 200 3 5"), "ok", "{kind}: written again after a discard");
        drop(installer);
        wait_until("the footprint to be as before", || footprint(&victim.process).unwrap() == before);
    }
}

/// A private mapping of a file that has content (a clone of a template): a discard must not uncover it, nor change the file.
#[test]
fn a_discard_does_not_uncover_the_file() {
    for kind in ["memfd-private", "file-private"] {
        let (mut victim, region, _dir) = mapped(kind);
        victim.tell("store 0 2000 4");
        let installer = open(&victim, region);
        let own = [run(500, 1000)];
        installer.install(0, &own, &bytes(&own, 1)).unwrap();
        // Own pages over the file's, the file's alone, and neither.
        installer.discard(0, &[run(400, 1000), run(2500, 600)]).unwrap();
        assert_eq!(victim.tell("zero 400 1000"), "1000", "{kind}");
        assert_eq!(victim.tell("zero 2500 600"), "600", "{kind}");
        assert_eq!(victim.tell("verify 0 400 4"), "ok", "{kind}");
        assert_eq!(victim.tell("verify 1400 100 1"), "ok", "{kind}");
        assert_eq!(victim.tell("verify 1500 500 4"), "ok", "{kind}");
        drop(installer);
    }
}

#[test]
fn several_threads_install_at_once() {
    for kind in KINDS {
        let (mut victim, region, _dir) = mapped(kind);
        let installer = open(&victim, region);
        for seed in 1..=2 {
            std::thread::scope(|scope| {
                for lane in 0..4 {
                    let installer = &installer;
                    scope.spawn(move || {
                        for batch in (lane..64).step_by(4) {
                            let runs = [run(batch * 64, 32), run(batch * 64 + 40, 24)];
                            installer.install(0, &runs, &bytes(&runs, seed)).unwrap();
                        }
                    });
                }
            });
        }
        drop(installer);
        for batch in 0..64 {
            assert_eq!(victim.tell(&format!("verify {} 32 2", batch * 64)), "ok", "{kind}");
            assert_eq!(victim.tell(&format!("verify {} 24 2", batch * 64 + 40)), "ok", "{kind}");
        }
    }
}

#[test]
fn wrong_runs_and_lengths_are_errors_that_change_nothing() {
    let (mut victim, region, _dir) = mapped("anon");
    let installer = open(&victim, region);
    let page = vec![1; PAGE as usize];
    for bad in [run(PAGES, 1), run(PAGES - 1, 2), run(u64::MAX, 1), run(1, u64::MAX), run(0, 0)] {
        assert!(
            matches!(installer.install(0, &[bad], &page), Err(InstallError::OutOfRange { .. })),
            "{bad:?}"
        );
        assert!(matches!(installer.discard(0, &[bad]), Err(InstallError::OutOfRange { .. })), "{bad:?}");
    }
    assert!(matches!(installer.install(1, &[run(0, 1)], &page), Err(InstallError::OutOfRange { .. })));
    assert!(matches!(installer.install(0, &[run(0, 1)], &page[1..]), Err(InstallError::Length { .. })));
    assert!(matches!(installer.install(0, &[], &page), Err(InstallError::Length { .. })));
    installer.install(0, &[], &[]).unwrap();
    assert_eq!(victim.tell(&format!("zero 0 {PAGES}")), PAGES.to_string());
}

#[test]
fn installing_into_a_dead_process_is_an_error() {
    let (victim, region, _dir) = mapped("memfd-private");
    let installer = open(&victim, region);
    victim.process.kill().unwrap();
    assert!(victim.process.wait_exit(common::PATIENCE));
    assert!(installer.install(0, &[run(0, 1)], &bytes(&[run(0, 1)], 1)).is_err());
    assert!(installer.discard(0, &[run(0, 1000)]).is_err());
    installer.finish().unwrap();
}

/// The RAM of a real QEMU copied to another one's, between all kinds of RAM: equal, and the target left as it was.
#[test]
fn a_real_qemus_ram_is_copied() {
    let kinds = [None, Some("memory-backend-memfd,share=off"), Some("memory-backend-memfd,share=on")];
    for executable in executables() {
        let mut source = Qemu::start(&executable, None);
        let from = source.ram();
        wait_until("the firmware to write", || populated_bytes(&source.process, &from) > 1 << 20);
        source.command(r#"{"execute":"stop"}"#);
        let want = digest(&source.process, &from).unwrap();
        for kind in kinds {
            let mut target = Qemu::start(&executable, kind);
            target.command(r#"{"execute":"stop"}"#);
            let to = target.ram();
            let before = target.footprint();
            let installer = Installer::open(&target.process, vec![to], &attach()).unwrap();
            let (mut there, mut runs) = (Vec::new(), Vec::new());
            populated(&target.process, &to, &mut there).unwrap();
            installer.discard(0, &there).unwrap();
            populated(&source.process, &from, &mut runs).unwrap();
            let reader = Reader::new(&source.process).unwrap();
            for part in runs {
                let mut bytes = vec![0; part.bytes() as usize];
                reader.read(&[from.span(part)], &mut bytes).unwrap();
                for (page, bytes) in
                    (part.first..).zip(bytes.chunks(PAGE as usize)).filter(|(_, b)| !is_zero(b))
                {
                    installer.install(0, &[run(page, 1)], bytes).unwrap();
                }
            }
            installer.finish().unwrap();
            assert_eq!(digest(&target.process, &to).unwrap(), want, "{} {kind:?}", executable.display());
            let after = target.footprint();
            common::assert_same(&before, &after, kind.unwrap_or("plain RAM"));
        }
    }
}

fn populated_bytes(process: &sterna_memory::Process, region: &Region) -> u64 {
    let mut runs = Vec::new();
    populated(process, region, &mut runs).unwrap();
    runs.iter().map(PageRun::bytes).sum()
}
