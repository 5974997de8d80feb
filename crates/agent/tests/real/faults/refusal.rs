//! Targets whose QEMU is not what it should be.

use super::fails_without_a_trace;
use crate::support::World;
use crate::support::scene::{Scene, to_the_other};

fn fails_with(scene: &Scene, mode: &str) -> String {
    scene.world.set_wrapper(mode);
    let view = fails_without_a_trace(scene, "a", |scene| {
        let id = scene.a.migrate(&to_the_other("a")).unwrap();
        scene.a.wait(&id)
    });
    assert_eq!(view.status, "failed", "{view:?}");
    let reasons = view.reasons.iter().map(|reason| format!("{}: {}", reason.code, reason.text));
    reasons.chain(view.error_desc.clone()).collect::<Vec<_>>().join("\n")
}

fn refuses(version: &str) {
    let scene = Scene::boot(World::with_wrapped_qemu_at_b(version));
    // Without the configuration section expected, QEMU finds an unknown section: it refuses the device state.
    let why = fails_with(&scene, "EXTRA='-global migration.send-configuration=off'\n");
    assert!(why.contains("device state") || why.contains("load"), "{why}");
    let why = fails_with(&scene, "echo 'the hinges are rusty' >&2; exit 1\n");
    assert!(why.contains("the hinges are rusty"), "{why}");
    let why = fails_with(&scene, "EXTRA='-device virtio-rng-pci'\n");
    assert!(why.contains("fingerprint") && why.contains("virtio-rng"), "{why}");
    let (code, _, told) = scene.a.command(&["migrate", "vm", "b", "--quiet"]);
    assert_eq!(code, 5, "{told}");
    assert!(told.lines().any(|line| line.contains("virtio-rng")), "{told}");
    assert_eq!(scene.settle(), "a");
    scene.world.set_wrapper("EXTRA=\n");
    scene.move_verified("a");
}

#[test]
fn a_target_that_cannot_take_the_vm() {
    refuses("7.2");
}

#[test]
fn a_target_with_the_newer_qemu_that_cannot_take_the_vm() {
    refuses("10.0");
}
