//! Descriptors, mappings and memory that run out.

use std::process::Command;

use super::{begin_slowly, fails_at_once, told};
use crate::support::World;
use crate::support::cage::Cage;
use crate::support::scene::Scene;

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

fn the_targets_qemu_has_no_memory(scene: &Scene) {
    let cage = Cage::new().without_swap();
    cage.limit(MEMORY_BYTES);
    let id = begin_slowly(scene);
    cage.take_in(scene.qemus("b")[0].unsigned_abs());
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
