//! What users ask for that cannot be: names, programs, and a QEMU that does not answer.

use sterna_memory::Process;

use crate::support::daemon::Daemon;
use crate::support::scene::{Scene, taken, to_the_other, until};
use crate::support::{BOOT, World, pids_naming};

fn nothing_runs(world: &World, host: &str) {
    let folder = world.path(host);
    assert_eq!(pids_naming(&format!("{}/run/vms/", folder.display())), [] as [i32; 0]);
    for name in ["run/vms", "state/vms"] {
        let left: Vec<_> = std::fs::read_dir(folder.join(name)).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// The folder of a QEMU that did not start stayed behind.
#[test]
fn a_program_that_is_no_qemu() {
    let world = World::new("7.2");
    let mut a = Daemon::start(&world, "a");
    for program in ["/bin/true", "/bin/cat", "/no/such/program"] {
        let why = a.run("vm", vec![program.into()]).unwrap_err();
        assert!(why.contains("QEMU") || why.contains("cannot"), "{program}: {why}");
        nothing_runs(&world, "a");
    }
    for name in ["", "..", "../x", "a/b", "a\nb", "-x"] {
        let why = a.run(name, world.argv(&crate::support::scene::guest(&world))).unwrap_err();
        assert!(why.contains("name"), "{name:?}: {why}");
    }
    assert!(a.run("vm", Vec::new()).is_err());
    nothing_runs(&world, "a");
    let (code, _, told) = a.command(&["migrate", "nobody", "b"]);
    assert_eq!(code, 2, "{told}");
    assert!(told.contains("nobody"), "{told}");
    assert!(a.vm("nobody").unwrap_err().contains("nobody"));
    assert!(a.stop("nobody").unwrap_err().contains("nobody"));
    a.assert_healthy();
}

/// A VM that could not be written down went on running, and no later life of the agent knew it.
#[test]
fn a_vm_that_cannot_be_written_down_does_not_run() {
    let world = World::new("7.2");
    let mut a = Daemon::start(&world, "a");
    let vms = world.path("a/state/vms");
    std::fs::remove_dir(&vms).unwrap();
    let why = a.run("vm", world.argv(&crate::support::scene::guest(&world))).unwrap_err();
    assert!(why.contains("written down"), "{why}");
    nothing_runs(&world, "a");
    std::fs::create_dir(vms).unwrap();
    a.run("vm", world.argv(&crate::support::scene::guest(&world))).unwrap();
    a.stop("vm").unwrap();
    a.assert_healthy();
}

#[test]
fn a_qemu_that_does_not_answer() {
    let scene = Scene::boot(World::new("7.2"));
    assert!(scene.a.migrate(&crate::support::request("vm", "nowhere")).unwrap_err().contains("nowhere"));
    assert!(scene.a.migrate(&crate::support::request("vm", "a")).unwrap_err().contains("already"));
    let pid = scene.a.vm("vm").unwrap().pid;
    signal(pid, "STOP");
    let id = scene.a.migrate(&to_the_other("a")).unwrap();
    let view = scene.a.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{view:?}");
    assert!(view.error_desc.as_ref().is_some_and(|why| why.contains("did not answer")), "{view:?}");
    signal(pid, "CONT");
    assert_eq!(scene.settle(), "a");
    scene.assert_guest_goes_on();
    scene.move_verified("a");
    a_qemu_that_died(&scene);
}

/// A migration whose VM died under it said that the VM runs at the source.
fn a_qemu_that_died(scene: &Scene) {
    let mut request = to_the_other("b");
    request.max_bandwidth = Some(20_000_000);
    let id = scene.b.migrate(&request).unwrap();
    until("pages move", BOOT, || taken(&scene.b.migration(&id).unwrap(), 1 << 20).then_some(()));
    Process::open(scene.b.vm("vm").unwrap().pid).unwrap().kill().unwrap();
    let view = scene.b.wait(&id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", ""), "{view:?}");
    let why = view.error_desc.unwrap();
    assert!(why.contains("has ended") && !why.contains("runs at b"), "{why}");
    assert_eq!(scene.b.vm("vm").unwrap().state, "stopped");
    scene.b.stop("vm").unwrap();
    until("nothing is left at a", BOOT, || scene.qemus("a").is_empty().then_some(()));
}

fn signal(pid: i32, name: &str) {
    let status = std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(status.unwrap().success());
}
