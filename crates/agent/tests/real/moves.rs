//! Real QEMUs move between two agents; in every move RAM is proved equal, and the guest checks its own memory.

use std::sync::Arc;

use crate::support::{BOOT, World, idle, load, migrate, request, wait};
use serde_json::json;
use sterna_agent::Agent;
use sterna_agent::model::MigrationView;
use sterna_lab::guest::{Disk, GuestSpec, Machine, Ram, Vga};

/// Boots the guest at `a` and moves it once, with RAM proved equal, and checks that it goes on.
fn moves_once(version: &str, change: impl FnOnce(GuestSpec) -> GuestSpec) {
    let world = World::new(version);
    let (a, b) = (world.agent("a"), world.agent("b"));
    let guest = change(GuestSpec { programs: vec![load(20)], ..world.parts.guest("vm") });
    world.boot(&a, &guest);
    world.wait_for_more("vm", "LOAD", BOOT);
    move_and_check(&world, &a, &b);
    b.stop("vm").unwrap();
}

fn move_and_check(world: &World, from: &Arc<Agent>, to: &Arc<Agent>) -> MigrationView {
    let view = migrate(from, request("vm", to.name()));
    assert_eq!(view.status, "completed", "{view:?}\n{}", world.console("vm"));
    assert_eq!(view.runs_at, to.name());
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    assert!(from.vm("vm").is_err(), "the source still lists it");
    assert_eq!(to.vm("vm").unwrap().state, "running");
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    view
}

#[test]
fn an_idle_guest() {
    moves_once("7.2", |guest| GuestSpec { programs: vec![idle()], ..guest });
}

#[test]
fn a_guest_that_writes_100_mb_per_second() {
    moves_once("7.2", |guest| GuestSpec { programs: vec![load(100)], ..guest });
}

#[test]
fn ram_in_a_private_memfd() {
    moves_once("7.2", |guest| GuestSpec { ram: Ram::PrivateMemfd, ..guest });
}

#[test]
fn ram_in_a_shared_memfd() {
    moves_once("7.2", |guest| GuestSpec { ram: Ram::SharedMemfd, ..guest });
}

#[test]
fn ram_in_a_private_file() {
    moves_once("7.2", |guest| GuestSpec { ram: Ram::PrivateFile, ..guest });
}

#[test]
fn ram_in_a_shared_file() {
    moves_once("7.2", |guest| GuestSpec { ram: Ram::SharedFile, ..guest });
}

#[test]
fn the_old_pc() {
    moves_once("7.2", |guest| GuestSpec { machine: Machine::Pc, ..guest });
}

#[test]
fn a_microvm() {
    moves_once("7.2", |guest| GuestSpec { machine: Machine::Microvm, ..guest });
}

#[test]
fn two_processors_and_a_video_card() {
    moves_once("7.2", |guest| GuestSpec { vcpus: 2, vga: Vga::Standard, ..guest });
}

#[test]
fn two_processors_and_a_video_card_on_the_newer_qemu() {
    moves_once("10.0", |guest| GuestSpec { vcpus: 2, vga: Vga::Standard, ..guest });
}

/// A waiting QEMU leaves its firmware block empty: a VM moved without it runs, and never boots again.
#[test]
fn a_moved_guest_can_be_reset_there_and_back_three_times() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let guest = GuestSpec { programs: vec![load(20)], vga: Vga::Standard, ..world.parts.guest("vm") };
    world.boot(&a, &guest);
    world.wait_for_more("vm", "LOAD", BOOT);
    for _ in 0..3 {
        move_and_check(&world, &a, &b);
        move_and_check(&world, &b, &a);
    }
    move_and_check(&world, &a, &b);
    world.qmp("b", "vm").execute("system_reset", json!({})).unwrap();
    world.wait_for_more("vm", "READY", BOOT);
    b.stop("vm").unwrap();
}

/// While KVM loads its clock it writes the guest's RAM: a comparison after the load found a difference that was none.
#[test]
fn firmware_under_kvm() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    // QEMU takes TCG where there is no KVM.
    let options = "-nodefaults -display none -machine q35 -accel kvm -accel tcg -m 64";
    let mut argv = vec![world.parts.qemu("7.2").display().to_string()];
    argv.extend(options.split(' ').map(str::to_owned));
    a.run(sterna_agent::model::RunRequest { name: "vm".into(), argv, template: None }).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1));
    for (from, to) in [(&a, &b), (&b, &a)] {
        let view = migrate(from, request("vm", to.name()));
        assert_eq!(view.status, "completed", "{view:?}");
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    }
    a.stop("vm").unwrap();
}

/// A VM that was started under the name of one that had left was taken for the rest of it when the agent came back, and
/// ended.
#[test]
fn a_name_that_left_can_be_used_again_and_outlives_the_agent() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let guest = GuestSpec { programs: vec![idle()], ..world.parts.guest("vm") };
    world.boot(&a, &guest);
    move_and_check(&world, &a, &b);
    b.stop("vm").unwrap();
    let again = world.run(&a, &guest);
    drop(a);
    let a = world.agent("a");
    let found = a.vm("vm").unwrap();
    assert_eq!((found.pid, found.state.as_str()), (again.pid, "running"));
    move_and_check(&world, &a, &b);
    b.stop("vm").unwrap();
}

/// A second agent on the folders of a living one ended the QEMUs that waited for it, and only then found the socket taken.
#[test]
fn a_second_agent_on_the_same_folders_is_refused_before_it_reads_them() {
    let world = World::new("7.2");
    let a = world.agent("a");
    let elsewhere = world.config("a").replace(&world.address("a"), "127.0.0.1:0");
    let path = world.path("second.toml");
    std::fs::write(&path, elsewhere).unwrap();
    let refused = Agent::start(sterna_agent::Config::load(&path).unwrap()).err().expect("it started");
    let why = refused.to_string();
    assert!(why.contains("another agent") && why.contains(&std::process::id().to_string()), "{why}");
    drop(a);
    world.agent("a");
}

/// The QEMU that waits opens the console's file: without append it emptied what the source was still writing.
#[test]
fn a_console_that_would_be_emptied_is_refused_and_kept() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let console = world.path("kept");
    for serial in [format!("file:{}", console.display()), "chardev:c".into()] {
        let options = "-nodefaults -display none -machine q35 -accel tcg -m 64";
        let mut argv = vec![world.parts.qemu("7.2").display().to_string()];
        argv.extend(options.split(' ').map(str::to_owned));
        if serial == "chardev:c" {
            argv.extend(["-chardev".into(), format!("file,id=c,path={}", console.display())]);
        }
        argv.extend(["-serial".into(), serial]);
        a.run(sterna_agent::model::RunRequest { name: "vm".into(), argv, template: None }).unwrap();
        std::fs::write(&console, "what the guest said").unwrap();
        let view = migrate(&a, request("vm", b.name()));
        assert_eq!(view.status, "failed", "{view:?}");
        assert!(view.reasons.iter().any(|reason| reason.text.contains("append=on")), "{view:?}");
        assert_eq!(std::fs::read_to_string(&console).unwrap(), "what the guest said");
        assert_eq!(a.vm("vm").unwrap().state, "running");
        a.stop("vm").unwrap();
    }
}

/// The image's lock is the second fence: both QEMUs have it open, and only the one that owns the VM may write.
#[test]
fn the_lock_of_a_disk_passes_over() {
    let world = World::new("7.2");
    let image = world.path("disk.raw");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let (a, b) = (world.agent("a"), world.agent("b"));
    let disk = Some(Disk { path: image.clone(), format: "raw".into() });
    let guest = GuestSpec { programs: vec![load(20)], disk, ..world.parts.guest("vm") };
    world.boot(&a, &guest);
    move_and_check(&world, &a, &b);
    let mut other = world.parts.guest("other");
    other.disk = guest.disk;
    let refused = a.run(sterna_agent::model::RunRequest {
        name: "other".into(),
        argv: world.argv(&other),
        template: None,
    });
    let why = refused.expect_err("the target's QEMU does not hold the lock").to_string();
    assert!(why.contains("lock"), "{why}");
    move_and_check(&world, &b, &a);
    a.stop("vm").unwrap();
}

#[test]
fn two_guests_pass_each_other() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let guest = |name: &str| GuestSpec { programs: vec![load(20)], ..world.parts.guest(name) };
    world.boot(&a, &guest("one"));
    world.boot(&b, &guest("two"));
    let one = a.migrate(request("one", "b"), None).unwrap().id;
    let two = b.migrate(request("two", "a"), None).unwrap().id;
    for (agent, id) in [(&a, one), (&b, two)] {
        let view = crate::support::wait(agent, &id);
        assert_eq!(view.status, "completed", "{view:?}");
    }
    for name in ["one", "two"] {
        world.wait_for_more(name, "LOAD", BOOT);
        assert!(!world.console(name).contains("BAD"), "{}", world.console(name));
    }
    b.stop("one").unwrap();
    a.stop("two").unwrap();
}

#[test]
fn qemu_as_an_ordinary_user() {
    let mut world = World::new("7.2");
    world.user = Some("nobody".into());
    let (a, b) = (world.agent("a"), world.agent("b"));
    for folder in ["sockets-a", "sockets-b"] {
        let path = world.path(folder);
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    }
    let guest = GuestSpec { programs: vec![load(20)], ram: Ram::SharedMemfd, ..world.parts.guest("vm") };
    world.boot(&a, &guest);
    let owner = |agent: &Agent| {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", agent.vm("vm").unwrap().pid)).unwrap();
        status
            .lines()
            .find(|line| line.starts_with("Uid:"))
            .unwrap()
            .split_whitespace()
            .nth(1)
            .unwrap()
            .to_owned()
    };
    assert_eq!(owner(&a), "65534");
    move_and_check(&world, &a, &b);
    assert_eq!(owner(&b), "65534");
    b.stop("vm").unwrap();
}

/// Two VMs that the target could hold one by one: the second is refused as long as the first is on its way, and goes when that is over. None of
/// them has touched its memory: what counts is what was promised.
#[test]
fn memory_is_promised_once() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let available = sterna_vmm::qemu::available_bytes().unwrap();
    for name in ["one", "two"] {
        let options =
            format!("-nodefaults -display none -machine q35 -accel tcg -m {}", (available >> 20) * 6 / 10);
        let mut argv = vec![world.parts.qemu("7.2").display().to_string()];
        argv.extend(options.split(' ').map(str::to_owned));
        a.run(sterna_agent::model::RunRequest { name: name.into(), argv, template: None }).unwrap();
    }
    let folder = world.path("a").join("run/hold");
    std::fs::create_dir_all(&folder).unwrap();
    let (held, reached) = (folder.join("source-scan"), folder.join("source-scan.reached"));
    std::fs::write(&held, "").unwrap();
    let first = a.migrate(request("one", "b"), None).unwrap().id;
    world.wait_until("the first is accepted", || reached.exists());
    let refused = migrate(&a, request("two", "b"));
    assert_eq!(refused.status, "failed", "{refused:?}");
    assert!(
        refused.reasons.iter().any(|reason| reason.code == "memory" && reason.text.contains("promised")),
        "{refused:?}"
    );
    std::fs::remove_file(&held).unwrap();
    let view = wait(&a, &first);
    assert_eq!(view.status, "completed", "{view:?}");
    assert_eq!(migrate(&a, request("two", "b")).status, "completed");
    for name in ["one", "two"] {
        b.stop(name).unwrap();
    }
}
