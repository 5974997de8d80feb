//! The lab as a whole: a guest with Redis and a beacon is moved between two hosts by QEMU's own migration, over the shaped
//! link, under a client's writes. If the lab lost writes here, no result about ours could be believed.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::net::SocketAddrV4;
use std::path::Path;
use std::time::{Duration, Instant};

use sterna_lab::client::{BEACON_PORT, Client};
use sterna_lab::guest::{Disk, GuestSpec, Nic, Program, Vga};
use sterna_lab::process::ProcessId;
use sterna_lab::stock::{self, StockOptions};
use sterna_lab::{Arrival, Lab, LabDir, LabSpec, Machine, Packages, Ram, Running, image, packages, state};

/// How long the client writes on each side of the migration.
const WRITING: Duration = Duration::from_secs(5);

fn prepared() -> (Packages, std::path::PathBuf) {
    let dir = LabDir::open().unwrap();
    let packages = packages::ensure(&dir).unwrap();
    let image = image::build(&dir, &packages).unwrap();
    (packages, image)
}

fn guest(lab: &Lab, packages: &Packages, image: &Path) -> GuestSpec {
    GuestSpec {
        nic: Some(Nic::of_guest(0, lab.guest_address(0))),
        programs: vec![Program::Redis, Program::Beacon(SocketAddrV4::new(lab.client_address(), BEACON_PORT))],
        ..GuestSpec::plain("vm", 1024, &packages.kernel, image)
    }
}

fn migrates(qemu: &Path) {
    let (packages, image) = prepared();
    let program = env!("CARGO_BIN_EXE_sterna-lab");
    let lab = Lab::up(&LabSpec::default()).unwrap();
    let name = lab.name().to_owned();
    let (a, b) = (lab.host(0).unwrap(), lab.host(1).unwrap());
    let spec = guest(&lab, &packages, &image);
    let start = Instant::now();
    let source = Running::start(&lab, a, qemu, &spec, 0, Arrival::Boot).unwrap();
    source.wait_ready().unwrap();
    println!("booted in {:?}, resident {:?} KiB", start.elapsed(), source.process().resident_kib());
    let client = Client::start(&lab, Path::new(program), lab.guest_address(0)).unwrap();
    let mut target = Running::start(&lab, b, qemu, &spec, 0, Arrival::Incoming).unwrap();
    std::thread::sleep(WRITING);
    let figures = stock::migrate(&lab, (a, source), (b, &mut target), &StockOptions::default()).unwrap();
    std::thread::sleep(WRITING);
    let report = client.finish().unwrap();
    println!("{}", serde_json::to_string(&figures).unwrap());
    println!("{}", serde_json::to_string(&report).unwrap());
    let (redis, beacon) = (report.redis.unwrap(), report.beacon.unwrap());
    assert!(redis.acknowledged > 1000, "{redis:?}");
    assert_eq!((redis.lost_writes, redis.corrupt, redis.reconnects), (0, 0, 0), "{redis:?}");
    assert!(beacon.received > 1000 && beacon.backwards == 0, "{beacon:?}");
    // The link carried the guest: at least the Redis and the kernel, and no miracle.
    assert!(figures.wire_bytes > 50 << 20, "{figures:?}");
    let process = target.process();
    drop(target);
    lab.down().unwrap();
    nothing_is_left(&name, &[process]);
}

fn nothing_is_left(name: &str, processes: &[ProcessId]) {
    let namespaces =
        std::fs::read_dir("/run/netns").map(|d| d.flatten().map(|e| e.file_name()).collect::<Vec<_>>());
    let left: Vec<_> = namespaces.unwrap_or_default();
    assert!(!left.iter().any(|n| n.to_string_lossy().starts_with(&format!("{name}-"))), "{left:?}");
    assert!(!state::dir_of(name).exists());
    assert!(!state::file_of(name).exists());
    assert!(processes.iter().all(|p| !p.is_alive()));
}

#[test]
fn qemu_72_migrates_without_losing_a_write() {
    migrates(&prepared().0.qemu_72);
}

#[test]
fn qemu_10_migrates_without_losing_a_write() {
    migrates(&prepared().0.qemu_10);
}

/// Every machine type and kind of RAM boots to the end on both versions: what the matrix of migration tests stands on.
#[test]
fn every_kind_of_guest_boots() {
    let (packages, image) = prepared();
    let lab = Lab::up(&LabSpec { hosts: 1, rate: None, ..LabSpec::default() }).unwrap();
    let image_file = lab.dir().join("disk.raw");
    std::fs::File::create(&image_file).unwrap().set_len(16 << 20).unwrap();
    let kinds = [
        (Machine::Q35, Ram::PrivateMemfd, 2),
        (Machine::Pc, Ram::SharedFile, 1),
        (Machine::Pc, Ram::PrivateFile, 1),
        (Machine::Microvm, Ram::SharedMemfd, 1),
    ];
    for (index, (machine, ram, vcpus)) in kinds.into_iter().enumerate() {
        for (version, qemu) in [("7.2", &packages.qemu_72), ("10.0", &packages.qemu_10)] {
            let spec = GuestSpec {
                machine,
                ram,
                vcpus,
                memory_mib: 256,
                name: format!("vm{index}-{version}"),
                programs: vec![Program::Load(vec!["--fill=16".into(), "--dirty=8".into(), "--check".into()])],
                vga: if machine == Machine::Pc { Vga::Standard } else { Vga::Absent },
                disk: Some(Disk { path: image_file.clone(), format: "raw".into() }),
                ..guest(&lab, &packages, &image)
            };
            let start = Instant::now();
            let running = Running::start(&lab, lab.host(0).unwrap(), qemu, &spec, 0, Arrival::Boot).unwrap();
            running.wait_ready().unwrap();
            println!("{version} {machine:?} {ram:?}: {:?}", start.elapsed());
            running.wait_for("LOAD t=2 ", Duration::from_secs(60)).unwrap();
            assert!(
                running.console().contains("bad=0") && !running.console().contains("BAD"),
                "{}",
                running.console()
            );
        }
    }
}
