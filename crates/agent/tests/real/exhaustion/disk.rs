//! State folders on disks that are full or cannot be written to, and clocks that were wrong.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use super::{begin_slowly, fails_at_once};
use crate::support::World;
use crate::support::scene::Scene;

/// A disk for the state of one host: so small that a test fills it.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount(world: &World, host: &str) -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k,mode=755", "tmpfs"])
            .arg(disk.0.path()));
        std::fs::create_dir_all(world.path(host)).unwrap();
        std::os::unix::fs::symlink(disk.0.path(), world.path(host).join("state")).unwrap();
        disk
    }

    fn fill(&self) {
        let mut ballast = File::create(self.0.path().join("ballast")).unwrap();
        while ballast.write_all(&[1; 512]).is_ok() {}
        // The last page is full as well.
        while ballast.write_all(&[1]).is_ok() {}
    }

    fn empty(&self) {
        std::fs::remove_file(self.0.path().join("ballast")).unwrap();
    }

    fn remount(&self, how: &str) {
        run(Command::new("mount").args(["-o", how]).arg(self.0.path()));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(self.0.path()).status());
    }
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

/// An agent that was started again while the disk was full did not start, or did not list its VMs.
#[test]
fn a_state_folder_that_cannot_be_written_to_costs_no_vm() {
    let world = World::new("7.2");
    let (at_a, at_b) = (Disk::mount(&world, "a"), Disk::mount(&world, "b"));
    let mut scene = Scene::boot(world);
    full_at_the_source(&mut scene, &at_a);
    full_at_the_target(&scene, &at_b);
    full_before_the_commit(&mut scene, &at_b);
    scene.move_verified("b");
    read_only_at_the_start(&mut scene, &at_a);
    a_clock_that_was_years_ahead(&mut scene);
    scene.move_verified("a");
}

fn full_at_the_source(scene: &mut Scene, disk: &Disk) {
    disk.fill();
    let why = fails_at_once(scene);
    assert!(why.contains("No space left") && why.contains("runs on"), "{why}");
    scene.a.kill();
    scene.a.launch();
    assert_eq!(scene.settle(), "a");
    scene.assert_guest_goes_on();
    disk.empty();
}

fn full_at_the_target(scene: &Scene, disk: &Disk) {
    disk.fill();
    let why = fails_at_once(scene);
    assert!(why.contains("No space left"), "{why}");
    assert_eq!(scene.settle(), "a");
    disk.empty();
}

/// What the commit needs was made before: a disk that fills up meanwhile does not stop it.
fn full_before_the_commit(scene: &mut Scene, disk: &Disk) {
    let id = begin_slowly(scene);
    disk.fill();
    let view = scene.a.wait(&id);
    assert_eq!(
        (view.status.as_str(), view.runs_at.as_str()),
        ("completed", "b"),
        "{view:?}\n{}",
        scene.tell()
    );
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    scene.b.kill();
    scene.b.launch();
    assert_eq!(scene.settle(), "b", "{}", scene.tell());
    scene.assert_guest_goes_on();
    disk.empty();
}

/// An agent that could write nothing down could move nothing safely: it does not start, and its VMs run.
fn read_only_at_the_start(scene: &mut Scene, disk: &Disk) {
    scene.a.kill();
    disk.remount("remount,ro");
    let why = scene.a.fails_to_launch();
    disk.remount("remount,rw");
    assert!(why.contains("Read-only file system") && why.contains("state"), "{why}");
    scene.assert_guest_goes_on();
    scene.a.launch();
    assert_eq!(scene.settle(), "a");
}

/// The target knows of a try that began years later than this one, as its source's clock was.
fn a_clock_that_was_years_ahead(scene: &mut Scene) {
    let record = scene.world.path("b").join("state/records/vm.record");
    scene.b.kill();
    let (kept, years) = (std::fs::read(&record).unwrap(), 4_000_000_000_u64);
    write_record(&record, years);
    scene.b.launch();
    let why = fails_at_once(scene);
    assert!(why.contains("stale") && why.contains(&years.to_string()) && why.contains("clock"), "{why}");
    assert_eq!(scene.settle(), "a");
    scene.b.kill();
    std::fs::write(&record, kept).unwrap();
    scene.b.launch();
}

fn write_record(path: &Path, generation: u64) {
    let text = format!("sterna 1\n1\n{}\n{generation}\ndead\nvm\na\n", "0".repeat(32));
    let mut raw = [0; 1024];
    raw[16..16 + text.len()].copy_from_slice(text.as_bytes());
    let digest = blake3::hash(&raw[16..512]);
    raw[..16].copy_from_slice(&digest.as_bytes()[..16]);
    std::fs::write(path, raw).unwrap();
}
