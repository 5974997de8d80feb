//! What happens to a VM that does something else than to run when it is moved, or begins to while it is: a table in
//! docs/guide.md says it, and each line of it is a test here, on real QEMUs, with RAM proved equal.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::scene::taken;
use crate::support::{BOOT, World, load, migrate, request, wait};
use serde_json::json;
use sterna_agent::Agent;
use sterna_agent::model::{MigrateRequest, MigrationView, RunRequest};
use sterna_lab::guest::{Disk, GuestSpec};

/// Bytes per second that keep the first round going until something was done to the VM.
const SLOW: u64 = 40_000_000;

struct Scene {
    world: World,
    a: Arc<Agent>,
    b: Arc<Agent>,
}

impl Scene {
    /// A guest that writes and checks its memory, with a disk, whose console takes orders.
    fn boot(world: World, options: &[&str]) -> Self {
        let (a, b) = (world.agent("a"), world.agent("b"));
        let image = world.path("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let disk = Some(Disk { path: image, format: "raw".into() });
        let guest = GuestSpec { programs: vec![load(20)], disk, ..world.parts.guest("vm") };
        let mut argv = world.argv_with_orders(&guest);
        argv.extend(options.iter().map(|&option| option.to_owned()));
        a.run(RunRequest { name: "vm".into(), argv, template: None }).unwrap();
        world.wait_for("vm", "READY", BOOT);
        world.wait_for_more("vm", "LOAD", BOOT);
        Self { world, a, b }
    }

    fn tell(&self, host: &str, command: &str) {
        self.world.qmp(host, "vm").execute(command, json!({})).unwrap();
    }

    fn assert_state(&self, agent: &Agent, state: &str) {
        let end = Instant::now() + BOOT;
        loop {
            let found = agent.vm("vm").unwrap().state;
            if found == state {
                return;
            }
            assert!(Instant::now() < end, "it is {found}, not {state}\n{}", self.world.console("vm"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The QEMU that waited at the target ends.
    fn assert_nothing_waits(&self) {
        let end = Instant::now() + BOOT;
        while !self.b.vms().is_empty() {
            assert!(Instant::now() < end, "{:?}", self.b.vms());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn assert_goes_on(&self) {
        self.world.wait_for_more("vm", "LOAD", BOOT);
        assert!(!self.world.console("vm").contains("BAD"), "{}", self.world.console("vm"));
    }

    /// Another QEMU is kept from the image by the VM's lock.
    fn assert_locked(&self) {
        let mut other = self.world.parts.guest("other");
        other.disk = Some(Disk { path: self.world.path("disk.raw"), format: "raw".into() });
        let refused =
            self.a.run(RunRequest { name: "other".into(), argv: self.world.argv(&other), template: None });
        let why = refused.expect_err("the VM does not hold the lock on its image").to_string();
        assert!(why.contains("lock"), "{why}");
    }

    /// Begins a move that stays in its first round long enough, and does something to the VM meanwhile.
    fn move_while(&self, change: impl FnOnce()) -> MigrationView {
        let id = self.a.migrate(slow(), None).unwrap().id;
        let watch = self.a.watch(&id).unwrap();
        let end = Instant::now() + BOOT;
        loop {
            let view = watch.borrow().clone();
            if view.status == "active" && taken(&view, 1 << 20) {
                break;
            }
            assert!(Instant::now() < end && view.error_desc.is_none(), "{view:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        change();
        wait(&self.a, &id)
    }
}

fn slow() -> MigrateRequest {
    MigrateRequest { max_bandwidth: Some(SLOW), ..request("vm", "b") }
}

fn assert_moved(view: &MigrationView) {
    assert_eq!(view.status, "completed", "{view:?}");
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
}

fn assert_stayed(view: &MigrationView, word: &str) {
    let why = view.error_desc.clone().unwrap_or_default();
    let reasons = view.reasons.iter().map(|reason| reason.text.clone());
    let told = reasons.chain([why]).collect::<Vec<_>>().join("\n");
    assert_eq!(view.status, "failed", "{view:?}");
    assert!(told.contains(word), "{told}");
}

/// QEMU 7.2 aborts when the devices of a VM with a disk are saved twice without `cont`: a paused VM that was moved, moved on
/// or tried again was lost. And a VM that its user had paused ran at the target.
fn a_paused_vm_stays_paused(version: &str) {
    let scene = Scene::boot(World::new(version), &[]);
    let Scene { world, a, b } = &scene;
    scene.tell("a", "stop");
    for (from, to) in [(a, b), (b, a), (a, b)] {
        assert_moved(&migrate(from, request("vm", to.name())));
        scene.assert_state(to, "paused");
        scene.assert_locked();
    }
    let silent = world.console("vm");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(world.console("vm"), silent, "it ran");
    scene.tell("b", "cont");
    scene.assert_goes_on();
    // Reset while it stands, it has never run since: QEMU calls that state `prelaunch`.
    scene.tell("b", "stop");
    scene.tell("b", "system_reset");
    scene.assert_state(b, "prelaunch");
    assert_moved(&migrate(b, request("vm", "a")));
    scene.assert_state(a, "paused");
    scene.tell("a", "cont");
    world.wait_for_more("vm", "READY", BOOT);
    a.stop("vm").unwrap();
}

#[test]
fn a_vm_that_its_user_paused_moves_and_stays_paused() {
    a_paused_vm_stays_paused("7.2");
}

#[test]
fn a_vm_that_its_user_paused_moves_and_stays_paused_on_the_newer_qemu() {
    a_paused_vm_stays_paused("10.0");
}

/// A try that fails after the save, at a target that refuses the state, leaves a paused VM with its disks, and ready for the
/// next try.
#[test]
fn a_paused_vm_that_is_refused_late_is_as_it_was_and_moves_at_the_next_try() {
    let scene = Scene::boot(World::with_wrapped_qemu_at_b("7.2"), &[]);
    let Scene { world, a, b } = &scene;
    scene.tell("a", "stop");
    for _ in 0..2 {
        // Without the configuration section expected, QEMU finds an unknown section: it refuses the device state.
        world.set_wrapper("EXTRA='-global migration.send-configuration=off'\n");
        assert_stayed(&migrate(a, request("vm", "b")), "state");
        scene.assert_state(a, "paused");
        scene.assert_locked();
    }
    world.set_wrapper("EXTRA=\n");
    assert_moved(&migrate(a, request("vm", "b")));
    scene.assert_state(b, "paused");
    scene.tell("b", "cont");
    scene.assert_goes_on();
    b.stop("vm").unwrap();
}

/// What its user says last counts, also when it is said while the VM moves.
#[test]
fn a_vm_that_is_paused_or_let_run_while_it_moves_does_so_at_the_target() {
    let scene = Scene::boot(World::new("7.2"), &[]);
    let Scene { world, b, .. } = &scene;
    assert_moved(&scene.move_while(|| scene.tell("a", "stop")));
    scene.assert_state(b, "paused");
    assert_moved(&migrate(b, request("vm", "a")));
    assert_moved(&scene.move_while(|| scene.tell("a", "cont")));
    scene.assert_state(b, "running");
    scene.assert_goes_on();
    assert!(!world.console("vm").contains("BAD"));
    b.stop("vm").unwrap();
}

/// QEMU crashes when the state of an NVMe device is saved. One that was plugged in after the pre-check was found by a look that
/// came after the save: the VM was lost.
#[test]
fn a_device_that_crashes_a_save_is_seen_before_it() {
    let world = World::new("7.2");
    let image = world.path("nvme.raw");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("if=none,id=spare,format=raw,file={}", image.display());
    let scene = Scene::boot(world, &["-device", "pcie-root-port,id=rp0", "-drive", &drive]);
    let nvme = json!({ "driver": "nvme", "id": "late", "bus": "rp0", "drive": "spare", "serial": "x" });
    let view = scene.move_while(|| drop(scene.world.qmp("a", "vm").execute("device_add", nvme).unwrap()));
    assert_stayed(&view, "came or went");
    scene.assert_state(&scene.a, "running");
    assert_stayed(&migrate(&scene.a, request("vm", "b")), "nvme");
    scene.assert_goes_on();
    scene.assert_nothing_waits();
    scene.a.stop("vm").unwrap();
}

/// A guest that is reset goes on booting wherever it is.
#[test]
fn a_guest_that_is_reset_while_it_moves_boots_at_the_target() {
    let scene = Scene::boot(World::new("7.2"), &[]);
    let Scene { world, b, .. } = &scene;
    assert_moved(&scene.move_while(|| scene.tell("a", "system_reset")));
    let boots = |world: &World| world.console("vm").matches("READY").count();
    let end = Instant::now() + BOOT;
    while boots(world) < 2 {
        assert!(Instant::now() < end, "{}", world.console("vm"));
        std::thread::sleep(Duration::from_millis(20));
    }
    scene.assert_goes_on();
    b.stop("vm").unwrap();
}

/// A guest that switches itself off is not started again, by nobody: neither where QEMU stays nor where it ends with it.
#[test]
fn a_guest_that_switches_itself_off_is_not_moved() {
    let scene = Scene::boot(World::new("7.2"), &["-no-shutdown"]);
    let Scene { world, a, .. } = &scene;
    assert_stayed(&scene.move_while(|| world.order("a", "vm", "poweroff")), "shutdown");
    scene.assert_state(a, "shutdown");
    assert_stayed(&migrate(a, request("vm", "b")), "switched off");
    scene.assert_state(a, "shutdown");
    scene.assert_nothing_waits();
    a.stop("vm").unwrap();

    let scene = Scene::boot(World::new("7.2"), &[]);
    let view = scene.move_while(|| scene.world.order("a", "vm", "poweroff"));
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", ""), "{view:?}");
    scene.assert_state(&scene.a, "stopped");
    scene.assert_nothing_waits();
}

/// A guest that panics stays where it did, for whoever looks at it; the undo of its migration must not let it run again.
#[test]
fn a_guest_that_panics_while_it_moves_stays_and_is_not_let_run() {
    let scene = Scene::boot(World::new("7.2"), &["-device", "pvpanic", "-action", "panic=pause"]);
    let Scene { world, a, .. } = &scene;
    let panic = || world.order("a", "vm", "echo c > /proc/sysrq-trigger");
    assert_stayed(&scene.move_while(panic), "guest-panicked");
    scene.assert_state(a, "guest-panicked");
    assert_stayed(&migrate(a, request("vm", "b")), "crash");
    scene.assert_state(a, "guest-panicked");
    scene.assert_nothing_waits();
    a.stop("vm").unwrap();
}

/// A guest that sleeps would wake up in the middle of its firmware: its device state does not say that it sleeps.
#[test]
fn a_guest_that_sleeps_is_refused_until_it_is_awake() {
    let scene = Scene::boot(World::new("7.2"), &[]);
    let Scene { world, a, b } = &scene;
    let sleep = || world.order("a", "vm", "echo mem > /sys/power/state");
    assert_stayed(&scene.move_while(sleep), "suspended");
    scene.assert_state(a, "suspended");
    assert_stayed(&migrate(a, request("vm", "b")), "wake it up");
    scene.tell("a", "system_wakeup");
    scene.assert_goes_on();
    assert_moved(&migrate(a, request("vm", "b")));
    scene.assert_goes_on();
    b.stop("vm").unwrap();
}

/// A disk's error stops the VM. It is moved with the request that failed, which is tried again when the VM is let run: here a
/// full file system is made larger meanwhile.
#[test]
fn a_vm_that_a_full_disk_stopped_moves_and_tries_again_there() {
    let world = World::new("7.2");
    let small = Small::mount(world.path("small"));
    let image = small.0.join("disk.raw");
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let drive = format!("if=virtio,format=raw,file={}", image.display());
    let scene = Scene::boot(world, &["-drive", &drive]);
    let Scene { world, a, b } = &scene;
    world.order("a", "vm", "dd if=/dev/zero of=/dev/vdb bs=64k count=128 && sync && echo WRITTEN it is");
    scene.assert_state(a, "io-error");
    assert_moved(&migrate(a, request("vm", "b")));
    scene.assert_state(b, "paused");
    small.enlarge();
    scene.tell("b", "cont");
    world.wait_for("vm", "WRITTEN it is\r\n", BOOT);
    scene.assert_goes_on();
    b.stop("vm").unwrap();
    // Before its folder goes.
    drop(small);
}

/// A file system that is soon full.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf) -> Self {
        std::fs::create_dir(&path).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=2m", "sterna-small", path.to_str().unwrap()]);
        Self(path)
    }

    fn enlarge(&self) {
        run("mount", &["-o", "remount,size=64m", self.0.to_str().unwrap()]);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = std::process::Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}
