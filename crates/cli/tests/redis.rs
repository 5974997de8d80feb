//! A Redis server in a VM, and a client that writes all the time and reads back what was acknowledged, while the VM's memory comes after it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::path::{Path, PathBuf};
use sterna_bench::Kit;
use sterna_bench::load::{self, Seen};
use sterna_bench::ours::{Order, OurVm, Progress};
use sterna_bench::stage::{Link, PageStreams, Stage};
use sterna_lab::Packages;

/// Of the programs that this build has made, with what `cargo xtask test` has fetched.
fn kit() -> Kit {
    let path = |name: &str| {
        PathBuf::from(
            std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: `cargo xtask test` does it")),
        )
    };
    let programs = Path::new(env!("CARGO_BIN_EXE_sterna")).parent().unwrap();
    let none = PathBuf::new;
    Kit {
        sterna: programs.join("sterna"),
        lab: programs.join("sterna-lab"),
        tracking: none(),
        packages: Packages {
            qemu_72: path("STERNA_QEMU_72"),
            qemu_10: path("STERNA_QEMU_10"),
            kernel: path("STERNA_KERNEL"),
            modules: none(),
            ovmf_code: none(),
            ovmf_vars: none(),
            busybox: none(),
            redis_server: none(),
        },
        initramfs: path("STERNA_INITRAMFS"),
    }
}

#[test]
fn no_write_is_lost_while_the_memory_comes_after_the_vm() {
    let stage = Stage::up(&kit(), Link::Gigabit, PageStreams::Encrypted, 1).unwrap();
    let mut vm = OurVm::boot(&stage, &load::server(&stage, "redis"), 0).unwrap();
    load::fill(&stage, 0).unwrap();
    // Without the limit the pages that a server writes are few enough to go while it is stopped.
    let hybrid = ["--postcopy-after-precopy", "--max-downtime=1"];
    for way in [&["--postcopy"][..], &hybrid] {
        let client = load::watch(&stage, 0).unwrap();
        let (moved, said) =
            vm.migrate(&stage, &Order::with(&[way, &["--verify"]].concat()), Progress::Sampled).unwrap();
        std::thread::sleep(load::AFTER);
        let seen = Seen::of(client.finish().unwrap(), moved.window).unwrap();
        println!("{way:?}: {seen:?}, {:?} ms down, {:?}", said.downtime, said.postcopy);
        assert!(seen.acknowledged > 1000, "{way:?}: {seen:?}");
        assert_eq!(seen.lost_writes, 0, "{way:?}: {seen:?}");
        assert!(said.blocks_verified.is_some_and(|blocks| blocks > 0), "{way:?}: {said:?}");
        assert!(said.postcopy.is_some_and(|known| known.faults.is_some()), "{way:?}");
    }
    vm.stop(&stage).unwrap();
    stage.lab.down().unwrap();
}
