//! What a VM is made of: parts that were plugged in later, firmware at work, processors, and a newer QEMU.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{BOOT, World, load, migrate, request};
use serde_json::{Value, json};
use sterna_agent::Agent;
use sterna_agent::model::{MigrationView, RunRequest};
use sterna_lab::guest::{Disk, GuestSpec, Machine, Vga};
use sterna_memory::{Process, Region, populated};

/// Slow enough that there is time to change the VM while its few pages travel.
const CRAWL_BYTES_PER_SECOND: u64 = 256 << 10;
/// Where RAM goes on above the hole of 32-bit devices.
const HIGH: u64 = 4 << 30;

/// A machine that runs its firmware and has a QMP socket of its user's own.
fn firmware(world: &World, options: &str) -> RunRequest {
    drop(world.config("a"));
    let socket = world.path("sockets-a/vm.qmp");
    let line = format!(
        "-nodefaults -display none -no-user-config -qmp unix:{},server=on,wait=off {options}",
        socket.display()
    );
    let mut argv = vec![world.parts.qemu(&world.version).display().to_string()];
    argv.extend(line.split_whitespace().map(str::to_owned));
    RunRequest { name: "vm".into(), argv, template: None }
}

fn completes(from: &Arc<Agent>, to: &Arc<Agent>) -> MigrationView {
    let view = migrate(from, request("vm", to.name()));
    assert_eq!(view.status, "completed", "{view:?}");
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    assert_eq!(to.vm("vm").unwrap().state, "running");
    view
}

/// The VM does not move, and runs where it was. Returns every reason.
fn refused(from: &Arc<Agent>, to: &Arc<Agent>) -> String {
    let view = migrate(from, request("vm", to.name()));
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", from.name()), "{view:?}");
    assert_eq!(from.vm("vm").unwrap().state, "running");
    crate::support::scene::until("nothing waits at the target", BOOT, || to.vms().is_empty().then_some(()));
    let texts = view.reasons.iter().map(|reason| format!("{}: {}", reason.code, reason.text));
    // What is no reason of the pre-check is told last.
    texts.chain(view.error_desc.clone()).collect::<Vec<_>>().join("\n")
}

/// Device state with a memory module loads without error where there is none, and a snapshot makes the image of the command
/// line one that must not be written any more: both were found only when the target's QEMU ran, or not at all.
#[test]
fn what_was_plugged_in_later_is_refused_by_name() {
    let world = World::new("10.0");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let image = world.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let options = format!(
        "-machine q35 -accel kvm -accel tcg -m 64,slots=2,maxmem=1G -device pcie-root-port,id=rp0 -device \
         pcie-root-port,id=rp1,chassis=1 -drive if=none,id=old,file={},format=raw -device virtio-blk-pci,drive=old,id=disk \
         -drive if=none,id=tray,media=cdrom -device ide-cd,drive=tray,id=cd",
        image.display()
    );
    a.run(firmware(&world, &options)).unwrap();
    let mut qmp = world.qmp("a", "vm");
    let mut ask = |command: &str, arguments: Value| qmp.execute(command, arguments).unwrap();
    ask("object-add", json!({ "qom-type": "memory-backend-ram", "id": "more", "size": 128 << 20 }));
    ask("device_add", json!({ "driver": "pc-dimm", "id": "dimm9", "memdev": "more" }));
    ask("device_add", json!({ "driver": "virtio-rng-pci", "id": "rng9", "bus": "rp0" }));
    ask("blockdev-add", json!({ "driver": "null-co", "node-name": "nothing" }));
    ask("device_add", json!({ "driver": "virtio-blk-pci", "id": "disk9", "bus": "rp1", "drive": "nothing" }));
    let overlay = world.path("overlay.qcow2");
    ask("blockdev-snapshot-sync", json!({ "device": "old", "snapshot-file": overlay }));
    ask("blockdev-change-medium", json!({ "id": "cd", "filename": world.parts.initramfs, "format": "raw" }));
    let told = refused(&a, &b);
    for (part, code) in [
        ("device dimm9 (pc-dimm) was added", "layout"),
        ("object more (memory-backend-ram) was added", "layout"),
        ("device rng9 (virtio-rng-pci) was added", "layout"),
        ("device disk9 (virtio-blk-pci) was added", "layout"),
        ("overlay.qcow2 was added", "layout"),
        ("drive tray without a medium was taken away", "layout"),
    ] {
        let line = told.lines().find(|line| line.contains(part));
        assert!(line.is_some_and(|line| line.starts_with(code)), "{part}:\n{told}");
    }
    a.stop("vm").unwrap();
}

#[test]
fn a_change_while_it_moves_ends_the_try_and_not_the_vm() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let image = world.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let options = format!(
        "-machine q35 -accel kvm -accel tcg -m 64,slots=2,maxmem=1G -drive if=none,id=old,file={},format=raw \
         -device virtio-blk-pci,drive=old,id=disk -device pcie-root-port,id=rp0 -device pcie-root-port,id=rp1,chassis=1 \
         -device virtio-rng-pci,id=rng1,bus=rp1",
        image.display()
    );
    a.run(firmware(&world, &options)).unwrap();
    let changes: [(&str, Value); 3] = [
        ("object-add", json!({ "qom-type": "memory-backend-ram", "id": "more", "size": 128 << 20 })),
        ("device_add", json!({ "driver": "virtio-rng-pci", "id": "rng9", "bus": "rp0" })),
        ("blockdev-snapshot-sync", json!({ "device": "old", "snapshot-file": world.path("overlay.qcow2") })),
    ];
    for (command, arguments) in changes {
        let slow = sterna_agent::model::MigrateRequest {
            max_bandwidth: Some(CRAWL_BYTES_PER_SECOND),
            downtime_limit: 1,
            ..request("vm", "b")
        };
        let id = a.migrate(slow, None).unwrap().id;
        let watch = a.watch(&id).unwrap();
        crate::support::scene::until("pages travel", BOOT, || {
            (watch.borrow().status == "active").then_some(())
        });
        world.qmp("a", "vm").execute(command, arguments).unwrap();
        a.set(
            &id,
            sterna_agent::model::SetRequest {
                max_bandwidth: Some(0),
                downtime_limit: Some(300),
                ..Default::default()
            },
        )
        .unwrap();
        let view = crate::support::wait(&a, &id);
        assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{command}: {view:?}");
        let why = view.error_desc.unwrap();
        assert!(why.contains("came or went"), "{command}: {why}");
        assert_eq!(a.vm("vm").unwrap().state, "running");
        crate::support::scene::until("nothing waits at b", BOOT, || b.vms().is_empty().then_some(()));
        // What came is told, so start anew.
        let told = refused(&a, &b);
        assert!(told.contains("was added"), "{command}: {told}");
        a.stop("vm").unwrap();
        drop(fs::remove_file(world.path("overlay.qcow2")));
        a.run(firmware(&world, &options)).unwrap();
    }
    completes(&a, &b);
    b.stop("vm").unwrap();
}

#[test]
fn memory_that_grows_by_itself_is_refused_by_name() {
    let world = World::new("10.0");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let options = "-machine q35 -accel kvm -accel tcg -m 64,slots=1,maxmem=1G \
        -object memory-backend-ram,id=grows,size=128M -device virtio-mem-pci,id=vm0,memdev=grows";
    a.run(firmware(&world, options)).unwrap();
    let told = refused(&a, &b);
    assert!(
        told.lines().any(|line| line.starts_with("device: ") && line.contains("vm0 (virtio-mem")),
        "{told}"
    );
    a.stop("vm").unwrap();
}

/// Pages of RAM block `pc.ram` below and above the hole for 32-bit devices.
fn touched(world: &World, agent: &Arc<Agent>) -> (u64, u64) {
    let mut qmp = world.qmp(agent.name(), "vm");
    let mut base = |address: u64| {
        let answer = qmp.monitor(&format!("gpa2hva {address:#x}")).unwrap();
        let hva = answer.trim().rsplit(' ').next().unwrap().trim_start_matches("0x");
        u64::from_str_radix(hva, 16).unwrap()
    };
    let (low, high) = (base(1 << 20), base(HIGH));
    let process = Process::open(agent.vm("vm").unwrap().pid).unwrap();
    let pages = |base: u64, bytes: u64| {
        let mut runs = Vec::new();
        populated(&process, &Region { base, bytes }, &mut runs).unwrap();
        runs.iter().map(|run| run.pages).sum()
    };
    (pages(low, 1 << 30), pages(high, 1 << 30))
}

fn five_gigabytes(machine: Machine) {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let guest =
        GuestSpec { machine, memory_mib: 5 << 10, programs: vec![load(20)], ..world.parts.guest("vm") };
    world.boot(&a, &guest);
    let (low, high) = touched(&world, &a);
    assert!(low > 1000 && high > 1000, "the guest uses both sides of the hole: {low} and {high} pages");
    completes(&a, &b);
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    b.stop("vm").unwrap();
}

#[test]
fn five_gigabytes_on_q35() {
    five_gigabytes(Machine::Q35);
}

#[test]
fn five_gigabytes_on_the_old_pc() {
    five_gigabytes(Machine::Pc);
}

/// Moves firmware at once when it was started, when it waits for a disk, and right after a reset.
fn moves_while_firmware_runs(world: &World, options: &str, says: &str) {
    let (a, b) = (world.agent("a"), world.agent("b"));
    let serial = world.serial("vm");
    let console = format!("-chardev file,id=c,path={},append=on -serial chardev:c", serial.display());
    a.run(firmware(world, &format!("{options} {console}"))).unwrap();
    let boots = || world.console("vm").matches(says).count();
    let boots_again = |before| crate::support::scene::until(says, BOOT, || (boots() > before).then_some(()));
    completes(&a, &b);
    boots_again(0);
    completes(&b, &a);
    let before = boots();
    world.qmp("a", "vm").execute("system_reset", json!({})).unwrap();
    completes(&a, &b);
    boots_again(before);
    let before = boots();
    world.qmp("b", "vm").execute("system_reset", json!({})).unwrap();
    boots_again(before);
    b.stop("vm").unwrap();
}

#[test]
fn uefi_firmware_moves_while_it_runs() {
    let world = World::new("10.0");
    let (code, vars) = (world.parts.packages.ovmf_code.clone(), world.path("vars.fd"));
    fs::copy(&world.parts.packages.ovmf_vars, &vars).unwrap();
    let options = format!(
        "-machine q35 -accel tcg -m 128 -drive if=pflash,format=raw,readonly=on,file={} -drive \
         if=pflash,format=raw,file={}",
        code.display(),
        vars.display()
    );
    moves_while_firmware_runs(&world, &options, "BdsDxe");
}

#[test]
fn bios_firmware_moves_while_it_runs() {
    let world = World::new("7.2");
    moves_while_firmware_runs(&world, "-machine pc,graphics=off -accel kvm -accel tcg -m 64", "SeaBIOS (");
}

fn argument(pid: i32, option: &str) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let line: Vec<_> =
        line.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
    let at = line.iter().position(|arg| arg == option).unwrap();
    line[at + 1].clone()
}

#[test]
fn a_vm_moves_to_a_newer_qemu_and_not_back() {
    let mut world = World::new("7.2");
    world.qemu_at_b = Some(world.parts.qemu("10.0"));
    let image = world.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let (a, b) = (world.agent("a"), world.agent("b"));
    let guest = GuestSpec {
        programs: vec![load(20)],
        vga: Vga::Standard,
        vcpus: 2,
        disk: Some(Disk { path: image, format: "raw".into() }),
        ..world.parts.guest("vm")
    };
    world.boot(&a, &guest);
    completes(&a, &b);
    let pid = b.vm("vm").unwrap().pid;
    assert!(argument(pid, "-machine").starts_with("pc-q35-7.2"), "q35 is another machine in each version");
    world.wait_for_more("vm", "LOAD", BOOT);
    let told = refused(&b, &a);
    assert!(told.starts_with("version: on a: ") && told.contains("older than"), "{told}");
    world.qmp("b", "vm").execute("system_reset", json!({})).unwrap();
    world.wait_for_more("vm", "READY", BOOT);
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    b.stop("vm").unwrap();
}

#[test]
fn all_features_move_between_equals_and_not_to_another_qemu() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    // Not all that the processor has can be set on every host.
    for options in [
        "-machine pc -accel tcg -cpu max -m 64",
        "-machine q35 -accel kvm -accel tcg -cpu host,arch-capabilities=off -m 64",
    ] {
        let kvm = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        let options = if kvm { options.to_owned() } else { options.replace("-cpu host", "-cpu max") };
        a.run(firmware(&world, &options)).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        completes(&a, &b);
        assert!(argument(b.vm("vm").unwrap().pid, "-machine").ends_with("-7.2"));
        completes(&b, &a);
        world.qmp("a", "vm").execute("system_reset", json!({})).unwrap();
        assert_eq!(a.vm("vm").unwrap().state, "running");
        a.stop("vm").unwrap();
    }
    drop((a, b));
    let mut world = World::new("7.2");
    world.qemu_at_b = Some(world.parts.qemu("10.0"));
    let (a, b) = (world.agent("a"), world.agent("b"));
    a.run(firmware(&world, "-machine pc -accel tcg -cpu max -m 64")).unwrap();
    let told = refused(&a, &b);
    assert!(told.contains("fingerprint: only at the source: cpu "), "{told}");
    a.stop("vm").unwrap();
}

/// The options of libvirt 10, its files and sockets named; part of it in a configuration file that only the source has.
#[test]
fn a_line_of_libvirt_starts_and_moves() {
    let world = World::new("10.0");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let (disk, config) = (world.path("disk.qcow2"), world.path("vm.cfg"));
    let size = ["create", "-q", "-f", "qcow2", disk.to_str().unwrap(), "8M"];
    assert!(std::process::Command::new("qemu-img").args(size).status().unwrap().success());
    fs::write(&config, "# of the source\n[device \"balloon0\"]\n  driver = \"virtio-balloon-pci\"\n")
        .unwrap();
    let mut line = firmware(&world, "-name guest=vm,debug-threads=on");
    let (file, monitor) = (disk.display(), world.path("sockets-a/monitor.sock"));
    let options = format!(
        r#"-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
        -machine pc-q35-10.0,usb=off,dump-guest-core=off,memory-backend=pc.ram,acpi=on -accel tcg -cpu qemu64
        -m size=65536k -object {{"qom-type":"memory-backend-ram","id":"pc.ram","size":67108864}} -overcommit mem-lock=off
        -smp 1,sockets=1,cores=1,threads=1 -uuid 8f1d1b0e-65d2-4a0e-9a3c-0f0d2a3f7c11 -no-shutdown -boot strict=on
        -chardev socket,id=charmonitor,path={},server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control
        -rtc base=utc,driftfix=slew -global ICH9-LPC.disable_s3=1 -msg timestamp=on -readconfig {}
        -device {{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x2"}}
        -device {{"driver":"qemu-xhci","p2":15,"p3":15,"id":"usb","bus":"pcie.0","addr":"0x3"}}
        -blockdev {{"driver":"file","filename":"{file}","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}}
        -blockdev {{"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"libvirt-1-storage","backing":null}}
        -device {{"driver":"virtio-blk-pci","bus":"pci.1","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}}
        -object {{"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}}
        -device {{"driver":"virtio-rng-pci","rng":"objrng0","id":"rng0","bus":"pcie.0","addr":"0x4"}}
        -audiodev {{"id":"audio1","driver":"none"}}"#,
        monitor.display(),
        config.display()
    );
    line.argv.extend(options.split_whitespace().map(str::to_owned));
    a.run(line).unwrap();
    fs::remove_file(config).unwrap();
    completes(&a, &b);
    completes(&b, &a);
    world.qmp("a", "vm").execute("system_reset", json!({})).unwrap();
    assert_eq!(a.vm("vm").unwrap().state, "running");
    a.stop("vm").unwrap();
}
