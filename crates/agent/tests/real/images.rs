//! Disk images: the same file with working locks at both ends, or no move; and what a guest wrote is in them after it.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{BOOT, World, idle, migrate, request};
use sterna_agent::Agent;
use sterna_agent::model::{MigrationView, RunRequest};
use sterna_lab::guest::{Arrival, HostSide, Serial};

/// The guest writes whole blocks of this size.
const BLOCK_BYTES: usize = 4096;
/// Room for all that the guest can write while the test goes on.
const IMAGE_BYTES: u64 = 32 << 20;
/// How many blocks must be written before the next thing happens.
const WRITES: usize = 5;
/// How long the guest gets to read what was typed.
const TYPING: Duration = Duration::from_millis(500);
/// Writes block after block, each with its number, to two disks. Devices given as
/// JSON come last.
const WRITER: &str = "i=0; while [ $i -lt 8000 ]; do i=$((i+1)); for d in vda vdc; do \
    printf %4096s $i | dd of=/dev/$d bs=4096 seek=$i conv=notrunc,fsync 2>/dev/null; done; echo WROTE $i; done &";
/// Reads the disk that it may not write, anew.
const READER: &str = "echo 3 > /proc/sys/vm/drop_caches; echo SUM $(md5sum < /dev/vdb)";

pub(crate) fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
}

fn image(path: &Path) {
    File::create(path).unwrap().set_len(IMAGE_BYTES).unwrap();
}

/// Every kind of image that a VM may have, and drives with none.
fn disks(world: &World) -> Vec<String> {
    let path = |name: &str| world.path(name).display().to_string();
    for name in ["raw.img", "spare.img"] {
        image(&world.path(name));
    }
    fs::write(world.path("cd.iso"), (0..2 << 20).map(|at: u32| (at % 251) as u8).collect::<Vec<_>>())
        .unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", &path("base.qcow2"), "32M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &path("top.qcow2")]);
    let (raw, top, cd, spare) = (path("raw.img"), path("top.qcow2"), path("cd.iso"), path("spare.img"));
    let line = [
        ("-drive", format!("file={raw},format=raw,if=none,id=d0")),
        ("-device", "virtio-blk-pci,drive=d0".into()),
        (
            "-blockdev",
            format!(r#"{{"driver":"file","filename":"{top}","node-name":"f1","auto-read-only":true}}"#),
        ),
        ("-blockdev", r#"{"driver":"qcow2","node-name":"n1","file":"f1","read-only":false}"#.into()),
        ("-device", r#"{"driver":"virtio-blk-pci","drive":"n1","id":"disk1"}"#.into()),
        ("-drive", format!("file={cd},format=raw,if=none,id=d2,readonly=on")),
        ("-device", "virtio-blk-pci,drive=d2".into()),
        ("-drive", format!("file={cd},format=raw,if=none,id=cd,media=cdrom")),
        ("-device", "ide-cd,drive=cd,bus=ide.0".into()),
        ("-drive", "if=none,id=empty,media=cdrom".into()),
        ("-device", "ide-cd,drive=empty,bus=ide.1".into()),
        ("-drive", format!("file={spare},format=raw,if=none,id=spare")),
    ];
    line.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect()
}

fn say(world: &World, host: &str, line: &str) {
    let mut socket = UnixStream::connect(world.path(&format!("sockets-{host}/vm.console"))).unwrap();
    writeln!(socket, "{line}").unwrap();
    // QEMU takes a byte at a time; closing would throw the rest away.
    std::thread::sleep(TYPING);
}

/// The numbers that the guest says it has written.
fn written(world: &World) -> Vec<usize> {
    let console = world.console("vm");
    let complete = console.rfind('\n').map_or("", |end| &console[..end]);
    complete.lines().filter_map(|line| line.trim().strip_prefix("WROTE ")?.parse().ok()).collect()
}

fn wait_for_writes(world: &World) {
    let before = written(world).len();
    crate::support::scene::until("the guest writes", BOOT, || {
        (written(world).len() >= before + WRITES).then_some(())
    });
}

/// What the guest reads on the disk that it may not write.
fn sum(world: &World, host: &str) -> String {
    let sums = || -> Vec<String> {
        let console = world.console("vm");
        let complete = console.rfind('\n').map_or("", |end| &console[..end]);
        complete.lines().filter_map(|line| Some(line.trim().strip_prefix("SUM ")?.to_owned())).collect()
    };
    let before = sums().len();
    say(world, host, READER);
    crate::support::scene::until("the guest reads", BOOT, || sums().get(before).cloned())
}

/// The image holds every block that the guest has written, up to the last that it told of.
fn assert_written(image: &Path, last: usize) {
    let content = fs::read(image).unwrap();
    for number in 1..=last {
        let block = &content[number * BLOCK_BYTES..(number + 1) * BLOCK_BYTES];
        let text = String::from_utf8_lossy(block);
        assert_eq!(text.trim(), number.to_string(), "block {number} of {last} in {}", image.display());
    }
}

fn completes(from: &Arc<Agent>, to: &Arc<Agent>) -> MigrationView {
    let view = migrate(from, request("vm", to.name()));
    assert_eq!(view.status, "completed", "{view:?}");
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    view
}

#[test]
fn images_of_every_kind_move_under_use() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let guest = sterna_lab::guest::GuestSpec { programs: vec![idle()], ..world.parts.guest("vm") };
    let serial = Serial::Socket { socket: world.path("sockets-a/vm.console"), log: world.serial("vm") };
    let side = HostSide { tap: None, serial, qmp: None, arrival: Arrival::Boot };
    let mut argv = vec![world.parts.qemu("7.2").display().to_string()];
    argv.extend(guest.arguments(&side));
    argv.extend(disks(&world));
    let base = fs::read(world.path("base.qcow2")).unwrap();
    a.run(RunRequest { name: "vm".into(), argv, template: None }).unwrap();
    world.wait_for("vm", "READY", BOOT);
    let read = sum(&world, "a");
    say(&world, "a", WRITER);
    wait_for_writes(&world);
    completes(&a, &b);
    wait_for_writes(&world);
    assert_eq!(sum(&world, "b"), read);
    completes(&b, &a);
    wait_for_writes(&world);
    let last = *written(&world).last().unwrap();
    a.stop("vm").unwrap();
    let (top, flat) = (world.path("top.qcow2"), world.path("flat.img"));
    qemu_img(&["check", "-q", "-f", "qcow2", top.to_str().unwrap()]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", top.to_str().unwrap(), flat.to_str().unwrap()]);
    assert_written(&world.path("raw.img"), last);
    assert_written(&flat, last);
    assert_eq!(fs::read(world.path("base.qcow2")).unwrap(), base, "what lies below was written");
}

/// A machine that runs its firmware, with these drives.
fn firmware(world: &World, drives: &[String]) -> RunRequest {
    let options = "-nodefaults -display none -machine q35 -accel tcg -m 64";
    let mut argv = vec![world.parts.qemu(&world.version).display().to_string()];
    argv.extend(options.split(' ').map(str::to_owned));
    argv.extend(drives.iter().flat_map(|drive| ["-drive".to_owned(), drive.clone()]));
    RunRequest { name: "vm".into(), argv, template: None }
}

/// The VM does not move, and runs where it was. Returns the reasons, a line each.
fn refused(a: &Arc<Agent>, b: &Arc<Agent>) -> Vec<String> {
    let view = migrate(a, request("vm", "b"));
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{view:?}");
    assert_eq!(a.vm("vm").unwrap().state, "running");
    crate::support::scene::until("nothing waits at b", BOOT, || b.vms().is_empty().then_some(()));
    view.reasons.iter().map(|reason| format!("{}: {}", reason.code, reason.text)).collect()
}

/// Two folders that hosts `a` and `b` have under one name, with files that are the same and files that are not.
fn two_folders(world: &mut World) -> (PathBuf, PathBuf) {
    let (at_a, at_b) = (world.path("images-a"), world.path("images-b"));
    for folder in [&at_a, &at_b] {
        fs::create_dir(folder).unwrap();
    }
    world.paths_at_b = vec![(at_a.clone(), at_b.clone())];
    for name in ["copied.img", "gone.img", "shared.img", "medium.iso", "firmware.fd"] {
        image(&at_a.join(name));
    }
    for name in ["copied.img", "medium.iso", "firmware.fd"] {
        fs::copy(at_a.join(name), at_b.join(name)).unwrap();
    }
    // Another release of the same size.
    fs::write(at_a.join("medium.iso"), vec![1; IMAGE_BYTES as usize]).unwrap();
    let base = |folder: &Path| folder.join("base.qcow2").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &base(&at_a), "32M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", &base(&at_b), "33M"]);
    let top = at_a.join("top.qcow2").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &top]);
    for name in ["top.qcow2", "shared.img"] {
        fs::hard_link(at_a.join(name), at_b.join(name)).unwrap();
    }
    (at_a, at_b)
}

#[test]
fn another_file_at_the_target_is_refused_by_name() {
    let mut world = World::new("10.0");
    let (at_a, _) = two_folders(&mut world);
    let (a, b) = (world.agent("a"), world.agent("b"));
    let drive =
        |name: &str, rest: &str| format!("file={}/{name},if=none,id={}{rest}", at_a.display(), &name[..4]);
    let drives = [
        drive("copied.img", ",format=raw"),
        drive("gone.img", ",format=raw"),
        drive("medium.iso", ",format=raw,readonly=on"),
        drive("top.qcow2", ",format=qcow2"),
        drive("shared.img", ",format=raw"),
    ];
    let mut line = firmware(&world, &drives);
    for drive in ["copi", "gone", "medi", "top.", "shar"] {
        line.argv.extend(["-device".into(), format!("virtio-blk-pci,drive={drive}")]);
    }
    a.run(line).unwrap();
    let reasons = refused(&a, &b);
    let told = |word: &str, why: &str| {
        let found: Vec<_> = reasons.iter().filter(|reason| reason.contains(word)).collect();
        assert!(
            found.len() == 1 && found[0].starts_with("image: on b: ") && found[0].contains(why),
            "{reasons:?}"
        );
    };
    told("copied.img", "not the file");
    told("gone.img", "No such file");
    told("medium.iso", "not the file");
    told("base.qcow2", "not the file");
    assert_eq!(reasons.len(), 4, "{reasons:?}");
    a.stop("vm").unwrap();
}

#[test]
fn an_image_without_its_locks_is_refused_and_a_shared_one_moves() {
    let mut world = World::new("7.2");
    let (at_a, at_b) = two_folders(&mut world);
    let (a, b) = (world.agent("a"), world.agent("b"));
    let shared = at_a.join("shared.img");
    let drive = format!("file={},format=raw,if=virtio", shared.display());
    a.run(firmware(&world, &[format!("{drive},file.locking=off")])).unwrap();
    let reasons = refused(&a, &b);
    assert!(reasons.len() == 1 && reasons[0].contains("locking=off"), "{reasons:?}");
    a.stop("vm").unwrap();

    let copy = format!("file={},format=raw,if=pflash,readonly=on", at_a.join("firmware.fd").display());
    let unsafe_cd =
        format!("file={},format=raw,if=ide,media=cdrom,cache=unsafe", at_a.join("medium.iso").display());
    a.run(firmware(&world, &[format!("{drive},cache=unsafe"), unsafe_cd])).unwrap();
    fs::copy(at_a.join("medium.iso"), at_b.join("medium.iso")).unwrap();
    let reasons = refused(&a, &b);
    assert!(reasons.len() == 1 && reasons[0].contains("cache=unsafe"), "{reasons:?}");
    a.stop("vm").unwrap();

    fs::remove_file(at_a.join("firmware.fd")).unwrap();
    fs::copy(&world.parts.packages.ovmf_code, at_a.join("firmware.fd")).unwrap();
    fs::copy(&world.parts.packages.ovmf_code, at_b.join("firmware.fd")).unwrap();
    a.run(firmware(&world, &[drive, copy])).unwrap();
    // Another file of that name: QEMU still has the first one, which a target would not find.
    fs::rename(&shared, at_a.join("moved")).unwrap();
    image(&shared);
    let reasons = refused(&a, &b);
    assert!(reasons.len() == 1 && reasons[0].contains("does not have this file open"), "{reasons:?}");
    fs::rename(at_a.join("moved"), &shared).unwrap();
    completes(&a, &b);
    b.stop("vm").unwrap();
}
