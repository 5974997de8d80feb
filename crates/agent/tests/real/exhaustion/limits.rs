//! Descriptors, mappings and memory that run out.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{begin_slowly, fails_at_once, told};
use crate::support::World;
use crate::support::scene::{AT_REST, Scene, until};

/// What the target's QEMU may take more: far less than the guest's pages.
const MEMORY_BYTES: u64 = 8 << 20;
/// Mappings that a migration may add to a QEMU: buffers and stacks of its own. One for each page or run would be thousands.
const MAPPINGS_MAX: usize = 64;

#[test]
fn limits_that_are_reached_cost_no_vm() {
    let scene = Scene::boot(World::new("7.2"));
    for host in ["a", "b"] {
        no_descriptors(&scene, host);
    }
    the_targets_qemu_has_no_memory(&scene);
    the_targets_qemu_is_killed(&scene);
    no_mapping_is_made(&scene);
}

fn no_descriptors(scene: &Scene, host: &str) {
    let pid = scene.host(host).pid();
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    // One for the question of the API, one for what it is about.
    limit_descriptors(pid, &(open + 2).to_string());
    let why = fails_at_once(scene);
    limit_descriptors(pid, "1024");
    println!("without descriptors at {host}: {why}");
    if host == "a" {
        assert!(why.contains("Too many open files") || why.contains("os error 24"), "{why}");
    }
    assert_eq!(scene.settle(), "a");
    scene.assert_guest_goes_on();
}

fn limit_descriptors(pid: i32, soft: &str) {
    let status = Command::new("prlimit").args([format!("--pid={pid}"), format!("--nofile={soft}:")]).status();
    assert!(status.unwrap().success());
}

/// A cgroup with a limit of memory.
struct Cage(PathBuf);

impl Cage {
    fn new() -> Self {
        let (v1, v2) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let (root, limit) = match v1.join("memory.limit_in_bytes").exists() {
            true => (v1, "memory.limit_in_bytes"),
            false => (v2, "memory.max"),
        };
        drop(std::fs::write(v2.join("cgroup.subtree_control"), "+memory"));
        let cage = Self(root.join(format!("sterna-test-{}", std::process::id())));
        std::fs::create_dir(&cage.0).unwrap();
        std::fs::write(cage.0.join(limit), MEMORY_BYTES.to_string()).unwrap();
        // Otherwise it is slow, and not killed.
        for no_swap in ["memory.swappiness", "memory.swap.max"] {
            drop(std::fs::write(cage.0.join(no_swap), "0"));
        }
        cage
    }

    fn take_in(&self, pid: i32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        until("the cgroup is empty", AT_REST, || std::fs::remove_dir(&self.0).is_ok().then_some(()));
    }
}

fn the_targets_qemu_has_no_memory(scene: &Scene) {
    let cage = Cage::new();
    let id = begin_slowly(scene);
    cage.take_in(scene.qemus("b")[0]);
    let why = told(scene, &scene.a.wait(&id));
    println!("without memory at b: {why}");
    assert!(why.contains("emory"), "{why}");
    assert_eq!(scene.settle(), "a");
    scene.assert_guest_goes_on();
}

/// As the kernel does it when a host has no memory left.
fn the_targets_qemu_is_killed(scene: &Scene) {
    let id = begin_slowly(scene);
    sterna_memory::Process::open(scene.qemus("b")[0]).unwrap().kill().unwrap();
    let why = told(scene, &scene.a.wait(&id));
    println!("killed at b: {why}");
    assert!(why.contains("QEMU at b was killed"), "{why}");
    assert_eq!(scene.settle(), "a");
    scene.assert_guest_goes_on();
}

/// So `vm.max_map_count` is no limit for a migration: neither QEMU gets mappings because of one.
fn no_mapping_is_made(scene: &Scene) {
    let before = scene.footprint("a").mappings.len();
    let id = begin_slowly(scene);
    let during = scene.footprint("a").mappings.len();
    assert!(during < before + MAPPINGS_MAX, "{before} mappings before, {during} while it is tracked");
    scene.a.cancel(&id).unwrap();
    scene.a.wait(&id);
    assert_eq!(scene.settle(), "a");
    scene.move_verified("a");
    let moved = scene.footprint("b").mappings.len();
    println!("{before} mappings at a, {during} while it moves, {moved} at b");
    assert!(moved < before + MAPPINGS_MAX, "{before} mappings at a, {moved} at b");
}
