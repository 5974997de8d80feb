//! Devices that are used all the time while the guest moves, and devices that are refused.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::support::scene::left_in_qemu;
use crate::support::{World, count, migrate, request};
use serde_json::json;
use sterna_agent::Agent;
use sterna_agent::model::RunRequest;
use sterna_lab::guest::{GuestSpec, Program};
use sterna_lab::{LabDir, image, packages};
use sterna_memory::{Process, footprint};

/// What the guest says of its devices (`use.sh`), each more than once after a move.
const USED: [&str; 8] = ["vda", "sda", "sdb", "net", "e1000e", "rng", "port", "gpu"];

/// RAM, and what the balloon leaves of it, by turns: enough that it gives pages back and takes some again.
const RAM_MIB: u32 = 384;
const BALLOONS_MIB: [u64; 2] = [376, 380];

/// A kernel with all drivers boots much slower than the usual one: alone in 20 seconds.
const FULL_BOOT: Duration = Duration::from_secs(400);

#[test]
fn everything_at_once() {
    everything("7.2");
}

#[test]
fn everything_at_once_on_the_newer_qemu() {
    everything("10.0");
}

fn everything(version: &str) {
    let world = World::new(version);
    let (a, b) = (world.agent("a"), world.agent("b"));
    world.run(&a, &guest(&world));
    world.wait_for("vm", "READY", FULL_BOOT);
    assert_all_is_used(&world, "a");
    for _ in 0..count(1, 20) {
        move_and_check(&world, &a, &b);
        move_and_check(&world, &b, &a);
    }
    a.stop("vm").unwrap();
}

fn move_and_check(world: &World, from: &Arc<Agent>, to: &Arc<Agent>) {
    let view = migrate(from, request("vm", to.name()));
    assert_eq!(view.status, "completed", "{view:?}\n{}", world.console("vm"));
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    assert_all_is_used(world, to.name());
    assert_screen_is_white(world, to.name());
    assert_every_number_came(&world.path("port"));
}

fn assert_all_is_used(world: &World, host: &str) {
    let used = |name: &str| world.console("vm").matches(&format!("USE {name} ")).count();
    let before = USED.map(used);
    let mut qmp = world.qmp(host, "vm");
    for mib in BALLOONS_MIB {
        let (tablet, mut place) = (used("tablet"), 0);
        // QEMU gives the pointer to the tablet once the guest asks it for events.
        world.wait_until_within("the tablet is seen", FULL_BOOT, || {
            place = (place + 100) % 10_000;
            let event = json!({ "type": "abs", "data": { "axis": "x", "value": place } });
            qmp.execute("input-send-event", json!({ "events": [event] })).unwrap();
            used("tablet") > tablet
        });
        qmp.execute("balloon", json!({ "value": mib << 20 })).unwrap();
        world.wait_until_within("the balloon has its size", FULL_BOOT, || {
            let actual = qmp.execute("query-balloon", json!({})).unwrap()["actual"].as_u64();
            actual == Some(mib << 20)
        });
    }
    for (name, before) in USED.iter().zip(before) {
        world.wait_until_within(&format!("{name} is used"), FULL_BOOT, || used(name) >= before + 2);
    }
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
}

/// The picture is the card's own copy, which travels in the device state.
fn assert_screen_is_white(world: &World, host: &str) {
    /// As much of the picture as the guest makes white at least: twelve lines of 1280 points.
    const WHITE: usize = 12 * 1280 * 3;
    let picture = world.path("screen.ppm");
    let mut qmp = world.qmp(host, "vm");
    qmp.execute("screendump", json!({ "filename": picture })).unwrap();
    let bytes = std::fs::read(&picture).unwrap();
    // The head of the file says how large the picture is (ppm(5)).
    let head = b"P6\n1280 800\n255\n";
    assert!(bytes.starts_with(head), "{:?}", String::from_utf8_lossy(&bytes[..20]));
    let white = bytes[head.len()..].iter().take_while(|byte| **byte == 0xff).count();
    assert!(white >= WHITE, "{white} bytes are white");
}

/// What the guest wrote to its serial port came to the host once and in order, by whichever QEMU.
fn assert_every_number_came(path: &Path) {
    let text = std::fs::read_to_string(path).unwrap();
    let whole = &text[..text.rfind('\n').unwrap()];
    let numbers: Vec<u64> = whole.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert!(numbers.first() == Some(&1) && numbers.is_sorted_by(|one, next| one + 1 == *next), "{text}");
}

fn guest(world: &World) -> GuestSpec {
    let dir = LabDir::open().unwrap();
    let kernel = packages::every_driver(&dir).unwrap();
    let initramfs = image::build_with_every_driver(&dir, &world.parts.packages, &kernel).unwrap();
    let mut extra = String::new();
    for disk in ["vda", "sda", "sdb"] {
        let path = world.path(disk);
        std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
        extra += &format!("-drive file={},format=raw,if=none,id={disk} ", path.display());
    }
    extra += "-device virtio-blk-pci,drive=vda -device ide-hd,drive=sda,bus=ide.0 ";
    extra += "-device virtio-scsi-pci,id=scsi -device scsi-hd,drive=sdb,bus=scsi.0 ";
    extra += "-netdev user,id=n0 -device virtio-net-pci,netdev=n0 ";
    extra += "-netdev user,id=n1,net=10.0.3.0/24 -device e1000e,netdev=n1 ";
    extra += &format!("-chardev file,id=port,path={},append=on ", world.path("port").display());
    extra += "-device virtio-serial-pci -device virtserialport,chardev=port,name=port ";
    extra += "-object rng-builtin,id=rng -device virtio-rng-pci,rng=rng ";
    extra += "-device virtio-balloon-pci -device virtio-gpu-pci -device qemu-xhci -device usb-tablet";
    let load = ["--fill=32", "--dirty=8", "--rate=10", "--check"].map(str::to_owned).to_vec();
    GuestSpec {
        extra: extra.split(' ').map(str::to_owned).collect(),
        programs: vec![Program::UseDevices, Program::Load(load)],
        ..GuestSpec::plain("vm", RAM_MIB, &kernel.image, &initramfs)
    }
}

/// Each is named with what to do, in one answer, and the VM is as it was.
#[test]
fn devices_that_do_not_move_are_refused() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let backends = ["net.sock", "fs.sock"].map(|name| Backend::start(&world.path(name)));
    std::fs::File::create(world.path("disk")).unwrap().set_len(1 << 20).unwrap();
    let folder = world.folder.path().display();
    let options = format!(
        "-nodefaults -display none -machine q35,memory-backend=ram -accel tcg \
         -m 64 -object memory-backend-memfd,id=ram,size=64M,share=on \
         -fsdev local,id=f,path={folder},security_model=none -device virtio-9p-pci,fsdev=f,mount_tag=t \
         -drive file={folder}/disk,format=raw,if=none,id=d -device nvme,drive=d,serial=x \
         -object memory-backend-memfd,id=shared,size=1M,share=on -device ivshmem-plain,memdev=shared \
         -chardev socket,id=c0,path={folder}/net.sock -netdev vhost-user,id=n,chardev=c0 \
         -device virtio-net-pci,netdev=n \
         -chardev socket,id=c1,path={folder}/fs.sock -device vhost-user-fs-pci,chardev=c1,tag=fs"
    );
    let mut argv = vec![world.parts.qemu("7.2").display().to_string()];
    argv.extend(options.split_whitespace().map(str::to_owned));
    let vm = a.run(RunRequest { name: "vm".into(), argv, template: None }).unwrap();
    let process = Process::open(vm.pid).unwrap();
    let before = footprint(&process).unwrap();
    let view = migrate(&a, request("vm", "b"));
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{view:?}");
    for (device, remedy) in [
        ("virtio-9p", "unmount and unplug it"),
        ("nvme", "use virtio-blk"),
        ("ivshmem", "unplug it before the move"),
        ("network of type vhost-user", "use a tap"),
        ("vhost-user-fs", "use a virtio device"),
    ] {
        let told =
            view.reasons.iter().any(|reason| reason.text.contains(device) && reason.text.contains(remedy));
        assert!(told, "{device}: {:#?}", view.reasons);
    }
    assert_eq!(a.vm("vm").unwrap().state, "running");
    assert!(b.vms().is_empty());
    assert_eq!(left_in_qemu(&before, &footprint(&process).unwrap()), [""; 0]);
    a.stop("vm").unwrap();
    drop(backends);
}

/// Just enough of a vhost-user back end that QEMU starts: it has one feature, and says yes.
struct Backend(std::path::PathBuf);

impl Backend {
    fn start(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                std::thread::spawn(move || drop(serve(stream)));
            }
        });
        Self(path.to_owned())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// Answers what must be answered (docs/interop/vhost-user.rst of QEMU): request, flags, size, payload.
fn serve(mut stream: UnixStream) -> std::io::Result<()> {
    const ASKS: [u32; 4] = [1, 11, 15, 17];
    const VERSION_1: u64 = 1 << 32;
    const PROTOCOL_FEATURES: u64 = 1 << 30;
    loop {
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let (request, size) = (word(0), word(8));
        stream.read_exact(&mut vec![0; size as usize])?;
        if ASKS.contains(&request) {
            let mut answer = [request, 5, 8].map(u32::to_le_bytes).concat();
            let value: u64 = match request {
                1 => VERSION_1 | PROTOCOL_FEATURES,
                15 => 0,
                _ => 1,
            };
            answer.extend(value.to_le_bytes());
            stream.write_all(&answer)?;
        }
    }
}
