//! Device state and memory layout of real QEMUs, of every version that is supported.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::os::fd::AsFd;
use std::path::Path;

use common::{Stage, Vm, WITHIN, chain, copy_blocks, copy_ram, eventually, is_alive, versions};
use sterna_vmm::qemu::{Qemu, Qmp, Version};
use sterna_vmm::{Code, RunState, Vmm, VmmError, difference};

const VGA: [&str; 4] = ["-M", "q35", "-device", "VGA"];

fn save(vm: &mut Vm) -> Vec<u8> {
    vm.qemu.prepare_save().unwrap();
    vm.qemu.pause().unwrap();
    let ticket = vm.qemu.save_begin().unwrap();
    vm.qemu.save_finish(ticket).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn load(vm: &mut Vm, state: &[u8]) {
    vm.qemu.load(state).unwrap_or_else(|error| panic!("{}", chain(&error)));
}

/// Every block that is not rebuilt has an address, and the old way of finding it agrees with QEMU's own word.
#[test]
fn every_block_is_found_and_both_ways_agree() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.source(&VGA);
        vm.wait_for_boot(1);
        let layout = vm.qemu.layout().unwrap();
        assert_eq!(layout.missing().count(), 0, "{layout:?}");
        for name in ["pc.ram", "pc.bios", "0000:00:01.0/vga.vram"] {
            assert!(layout.block(name).is_some_and(|block| block.hva.is_some()), "{name} in {layout:?}");
        }
        assert_eq!(layout.block("pc.ram").unwrap().bytes, 64 << 20);
        let by_map = vm.qemu.addresses_by_map().unwrap();
        assert!(by_map.len() >= 3, "{by_map:?}");
        for (name, hva) in by_map {
            assert_eq!(layout.block(&name).unwrap().hva, Some(hva), "{name}");
        }
        if vm.qemu.version() >= Version::new(8, 2) {
            assert!(layout.blocks.iter().all(|block| block.hva.is_some()), "{layout:?}");
        }
    }
}

/// Before QEMU 8.2 nothing tells two cards' memory apart: then no address must be given for either.
#[test]
fn two_cards_of_a_kind_are_never_mixed_up() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.source(&["-M", "q35", "-device", "VGA", "-device", "secondary-vga"]);
        vm.wait_for_boot(1);
        assert!(vm.qemu.addresses_by_map().unwrap().keys().all(|name| !name.contains("vga.vram")));
        let reasons = vm.qemu.source_reasons().unwrap();
        let refused = reasons.iter().filter(|reason| reason.code == Code::Layout).count();
        assert_eq!(refused, if vm.qemu.version() >= Version::new(8, 2) { 0 } else { 2 }, "{reasons:?}");
    }
}

/// Flash, and memory that has a name of the user's own, are blocks like others.
#[test]
fn flash_and_named_memory_are_found() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let flash = stage.folder.path().join("flash");
        std::fs::write(&flash, vec![0xff; 1 << 20]).unwrap();
        let drive = format!("if=pflash,format=raw,file={}", flash.display());
        let memory = "memory-backend-memfd,id=mem,size=64M,share=on";
        let mut vm = stage.source(&["-M", "q35,memory-backend=mem", "-object", memory, "-drive", &drive]);
        let layout = vm.qemu.layout().unwrap();
        assert!(layout.block("mem").is_some_and(|block| block.hva.is_some()), "{layout:?}");
        let flash = layout.block("system.flash0").unwrap();
        assert!(flash.hva.is_some() && flash.bytes == 1 << 20, "{layout:?}");
    }
}

/// The whole of a move but the network: the target goes on counting where the source stopped, the disk's lock passes
/// over, and the guest can be reset, for which its firmware must have moved too.
#[test]
fn a_vm_moves_with_its_disk_and_can_be_reset_after() {
    for binary in versions() {
        for machine in ["q35", "pc"] {
            let stage = Stage::new(&binary);
            let extra = ["-M", machine, "-device", "VGA"];
            let (mut source, mut target) = (stage.source(&extra), stage.target("target", &extra));
            source.wait_for_boot(1);
            assert_eq!(source.qemu.source_reasons().unwrap(), []);
            assert_eq!(agreed(&mut source, &mut target), Vec::<String>::new());
            target.qemu.prepare_load().unwrap();

            let state = save(&mut source);
            let stopped_at = source.loops();
            copy_ram(&mut source, &mut target);
            load(&mut target, &state);
            // The card's memory shows on old QEMUs only now.
            copy_blocks(&mut source, &mut target, |name| name.ends_with("vga.vram"));
            assert_eq!(target.qemu.layout().unwrap().missing().count(), 0);
            assert_eq!(target.qemu.status().unwrap(), RunState::Paused);
            assert_eq!(target.loops(), stopped_at);

            target.qemu.resume().unwrap();
            target.qemu.announce().unwrap();
            eventually("the target counts on", || target.loops() != stopped_at);
            let refused = source.qemu.resume().unwrap_err();
            assert!(chain(&refused).contains("lock"), "{}", chain(&refused));
            source.qemu.quit(WITHIN).unwrap();
            assert_eq!(target.boots(), 1);
            target.forget_boots();
            target.qemu.qmp().execute("system_reset", serde_json::Value::Null, WITHIN).unwrap();
            target.wait_for_boot(1);
        }
    }
}

fn agreed(source: &mut Vm, target: &mut Vm) -> Vec<String> {
    difference(&source.qemu.fingerprint().unwrap(), &target.qemu.fingerprint().unwrap())
}

/// There and back: the disk and the descriptors are as they were after each move.
#[test]
fn a_vm_moves_again_and_again() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.source(&VGA);
        vm.wait_for_boot(1);
        for round in 0..3 {
            let mut target = stage.target(&format!("target{round}"), &VGA);
            assert_eq!(agreed(&mut vm, &mut target), Vec::<String>::new(), "round {round}");
            target.qemu.prepare_load().unwrap();
            let state = save(&mut vm);
            copy_ram(&mut vm, &mut target);
            load(&mut target, &state);
            target.qemu.resume().unwrap();
            vm.qemu.quit(WITHIN).unwrap();
            vm = target;
            vm.wait_for_boot(1);
        }
    }
}

/// QEMU 7.2 aborts when the devices of a VM with a disk are saved twice without `cont` in between, and the VM is
/// lost. An undo, a second try and a refusal of the deadly order must all leave it running, with no file left open.
#[test]
fn an_undone_save_leaves_the_vm_as_it_was() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.source(&VGA);
        vm.wait_for_boot(1);
        let before = vm.descriptors().len();
        for _ in 0..3 {
            let state = save(&mut vm);
            assert!(state.starts_with(b"QEVM\0\0\0\x03\x07"));
            let again = vm.qemu.save_begin().unwrap_err();
            assert!(matches!(again, VmmError::Order { .. }), "{again}");
            vm.qemu.resume().unwrap();
            let here = vm.loops();
            eventually("the source counts on", || vm.loops() != here);
            assert!(!vm.descriptors().iter().any(|link| link.contains("sterna-devices")));
            assert_eq!(vm.descriptors().len(), before, "{:?}", vm.descriptors());
        }
    }
}

/// An agent that comes back to a paused VM cannot know whether its disks were given up: it takes them back before it saves,
/// or QEMU 7.2 would abort.
#[test]
fn a_vm_that_was_found_paused_gets_its_disks_back_before_it_is_saved() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.source(&VGA);
        save(&mut vm);
        let (id, socket) = (vm.id(), vm.run_dir.join("qmp.sock"));
        // The first agent's connection ends, as it does when the agent dies.
        let mut found = reattach(&mut vm, id, &socket);
        found.prepare_save().unwrap();
        assert_eq!(found.pause().unwrap(), RunState::Paused);
        let ticket = found.save_begin().unwrap();
        assert!(!found.save_finish(ticket).unwrap().is_empty());
        assert!(found.save_begin().is_err(), "the disks are given up now");
        found.restore().unwrap();
        assert_eq!(found.status().unwrap(), RunState::Paused, "it did not run before");
        found.resume().unwrap();
    }
}

/// A VM that its user has paused is moved on, and on, without ever running: each save gives up its disks, and QEMU 7.2 aborts
/// when they are not taken back in between.
#[test]
fn a_paused_vm_moves_twice_with_its_disk_and_never_runs() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.source(&VGA);
        vm.wait_for_boot(1);
        vm.qemu.qmp().execute("stop", serde_json::Value::Null, WITHIN).unwrap();
        let stopped_at = vm.loops();
        for round in 0..2 {
            let mut target = stage.target(&format!("target{round}"), &VGA);
            target.qemu.prepare_load().unwrap();
            // A try that comes to nothing late, and the next one at once.
            drop(save(&mut vm));
            vm.qemu.restore().unwrap();
            let state = save(&mut vm);
            copy_ram(&mut vm, &mut target);
            load(&mut target, &state);
            copy_blocks(&mut vm, &mut target, |name| name.ends_with("vga.vram"));
            target.qemu.take_disks().unwrap();
            let refused = vm.qemu.take_disks().unwrap_err();
            assert!(chain(&refused).contains("lock"), "{}", chain(&refused));
            assert_eq!(target.qemu.status().unwrap(), RunState::Paused);
            assert_eq!((vm.loops(), target.loops()), (stopped_at, stopped_at), "it ran");
            vm.qemu.quit(WITHIN).unwrap();
            vm = target;
        }
        vm.qemu.resume().unwrap();
        eventually("it counts on", || vm.loops() != stopped_at);
    }
}

/// A VM that ran runs again after a drain, with what was prepared for its save; one that stood still stands.
#[test]
fn a_drain_leaves_the_vm_as_it_was() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.source(&VGA);
        vm.wait_for_boot(1);
        vm.qemu.prepare_save().unwrap();
        vm.qemu.drain().unwrap();
        assert_eq!(vm.qemu.status().unwrap(), RunState::Running);
        assert!(vm.qemu.save_begin().is_err(), "it runs");
        drop(save(&mut vm));
        vm.qemu.restore().unwrap();
        vm.qemu.qmp().execute("stop", serde_json::Value::Null, WITHIN).unwrap();
        vm.qemu.drain().unwrap();
        assert_eq!(vm.qemu.status().unwrap(), RunState::Paused);
    }
}

fn reattach(vm: &mut Vm, id: sterna_vmm::ProcessId, socket: &Path) -> Qemu {
    vm.qemu.qmp().shutdown();
    Qemu::attach(id, socket, Some(vm.log.clone()), WITHIN).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// What an agent lent and could not take back before it died is closed by the next one.
#[test]
fn descriptors_are_lent_and_never_left_behind() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.source(&VGA);
        let file = std::fs::File::open(stage.disk()).unwrap();
        let lent = vm.qemu.lend_fd(file.as_fd()).unwrap();
        let link = std::fs::read_link(format!("/proc/{}/fd/{}", vm.id().pid, lent.number)).unwrap();
        assert_eq!(link, stage.disk());
        vm.qemu.take_back_fd(lent).unwrap();
        assert!(std::fs::read_link(format!("/proc/{}/fd/{}", vm.id().pid, lent.number)).is_err());

        let lent = vm.qemu.lend_fd(file.as_fd()).unwrap();
        let (id, socket) = (vm.id(), vm.run_dir.join("qmp.sock"));
        drop(reattach(&mut vm, id, &socket));
        // The number may already be somebody else's.
        let link = std::fs::read_link(format!("/proc/{}/fd/{}", vm.id().pid, lent.number));
        assert_ne!(link.ok(), Some(stage.disk()));
    }
}

/// `cont` at a target that still waits does not fail: QEMU runs the VM as soon as its state comes, without the
/// hand-off. So it must never be sent.
#[test]
fn a_waiting_target_is_never_told_to_run() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let (mut source, mut target) = (stage.source(&VGA), stage.target("target", &VGA));
        let refused = target.qemu.resume().unwrap_err();
        assert!(matches!(refused, VmmError::WrongState { state: RunState::Inmigrate, .. }), "{refused}");
        let early = target.qemu.load(b"").unwrap_err();
        assert!(matches!(early, VmmError::Order { .. }), "{early}");
        target.qemu.prepare_load().unwrap();
        assert!(target.qemu.prepare_load().is_err());
        source.wait_for_boot(1);
        let state = save(&mut source);
        copy_ram(&mut source, &mut target);
        load(&mut target, &state);
        assert_eq!(target.qemu.status().unwrap(), RunState::Paused);
        source.qemu.resume().unwrap();
    }
}

/// A state that the target cannot take is refused with QEMU's own reason, and the source goes on.
#[test]
fn a_refused_state_tells_why_and_leaves_the_source_running() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut source = stage.source(&VGA);
        source.wait_for_boot(1);
        let state = save(&mut source);
        let other = ["-M", "pc", "-device", "VGA"];
        let cut: Vec<u8> = state.iter().copied().take(state.len() / 2).collect();
        let cases: [(&str, &[&str], &[u8], &str); 3] = [
            ("other-machine", &other, &state, "Machine type"),
            ("cut-off", &VGA, &cut, "load of migration failed"),
            ("garbage", &VGA, b"this is no state", "Not a migration stream"),
        ];
        for (name, extra, bytes, reason) in cases {
            let mut target = stage.target(name, extra);
            target.qemu.prepare_load().unwrap();
            let error = target.qemu.load(bytes).unwrap_err();
            assert!(matches!(error, VmmError::LoadFailed { .. }), "{name}: {}", chain(&error));
            assert!(chain(&error).contains(reason), "{name}: {}", chain(&error));
            target.qemu.quit(WITHIN).unwrap();
        }
        source.qemu.resume().unwrap();
        assert_eq!(source.qemu.status().unwrap(), RunState::Running);
    }
}

/// The state of a VM with a hot-added DIMM loads without error into a QEMU that lacks it. The fingerprint is all
/// that stands before it.
#[test]
fn a_target_that_differs_is_found_by_the_fingerprint() {
    let base = ["-M", "q35", "-device", "VGA", "-m", "64,slots=2,maxmem=1G"];
    let dimm = ["-object", "memory-backend-ram,id=m1,size=128M", "-device", "pc-dimm,id=dimm1,memdev=m1"];
    let cases: [(&[&str], &str); 6] = [
        (&dimm, "dimm1"),
        (&["-m", "128,slots=2,maxmem=1G"], "ram pc.ram bytes"),
        (&["-smp", "2"], "cpus 2"),
        (&["-cpu", "qemu64,+ssse3"], "cpu feature word 1"),
        (&["-device", "virtio-rng-pci,id=rng"], "/machine/peripheral/rng"),
        (&["-drive", "if=none,id=d1,driver=null-co,size=1M"], "disk \"d1\""),
    ];
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut source = stage.source(&base);
        let ours = source.qemu.fingerprint().unwrap();
        let mut same = stage.target("same", &base);
        assert_eq!(difference(&ours, &same.qemu.fingerprint().unwrap()), Vec::<String>::new());
        for (at, (extra, expected)) in cases.iter().enumerate() {
            let mut target = stage.target(&format!("other{at}"), &[&base[..], extra].concat());
            let found = difference(&ours, &target.qemu.fingerprint().unwrap()).join("\n");
            assert!(found.contains(expected), "{extra:?}: {found}");
        }
    }
}

/// What was hot-added counts as well, after it was added.
#[test]
fn a_hot_added_device_changes_the_fingerprint() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let extra = ["-M", "q35", "-device", "pcie-root-port,id=rp,chassis=1"];
        let mut vm = stage.source(&extra);
        vm.wait_for_boot(1);
        let (before, shape) = (vm.qemu.fingerprint().unwrap(), vm.qemu.shape().unwrap());
        assert_eq!(vm.qemu.shape().unwrap(), shape);
        assert!(before.lines.iter().any(|line| line.contains("machine pc-q35-")), "{before:?}");
        let device = serde_json::json!({ "driver": "virtio-rng-pci", "id": "hot", "bus": "rp" });
        vm.qemu.qmp().execute("device_add", device, WITHIN).unwrap();
        assert_ne!(vm.qemu.shape().unwrap(), shape);
        let found = difference(&vm.qemu.fingerprint().unwrap(), &before);
        assert!(found.iter().any(|line| line.contains("/machine/peripheral/hot")), "{found:?}");
    }
}

/// The machine type and the processor are told as the options take them.
#[test]
fn the_machine_type_and_the_processor_are_resolved() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.source(&["-M", "q35"]);
        let machine = vm.qemu.machine_type().unwrap();
        let version = vm.qemu.version();
        assert_eq!(machine, format!("pc-q35-{}.{}", version.major, version.minor));
        assert_eq!(vm.qemu.cpu_model().unwrap(), "qemu64");
        let mut named = stage.start("named", stage.argv(&["-M", "q35", "-cpu", "Skylake-Client-v1"]));
        assert_eq!(named.qemu.cpu_model().unwrap(), "Skylake-Client-v1");
        let exact = stage.start("exact", stage.argv(&["-M", &machine, "-cpu", "Skylake-Client-v1"]));
        assert!(is_alive(exact.id()));
    }
}

/// Every reason is told, not only the first.
#[test]
fn what_cannot_move_is_told_with_every_reason() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let (a, b) = (stage.folder.path().join("a"), stage.folder.path().join("b"));
        for file in [&a, &b] {
            std::fs::File::create(file).unwrap().set_len(1 << 20).unwrap();
        }
        let unsafe_disk = format!("if=none,id=d1,format=raw,cache=unsafe,file={}", a.display());
        let nvme_disk = format!("if=none,id=d2,format=raw,file={}", b.display());
        let mut vm = stage.source(&[
            "-M",
            "q35",
            "-drive",
            &unsafe_disk,
            "-drive",
            &nvme_disk,
            "-device",
            "nvme,drive=d2,serial=x",
            "-device",
            "ivshmem-plain,memdev=shared",
            "-object",
            "memory-backend-ram,id=shared,size=1M,share=on",
        ]);
        let reasons = vm.qemu.source_reasons().unwrap();
        let told = |code: Code, word: &str| reasons.iter().any(|r| r.code == code && r.text.contains(word));
        assert!(told(Code::Disk, "d1"), "{reasons:?}");
        assert!(told(Code::Device, "nvme"), "{reasons:?}");
        assert!(told(Code::Device, "ivshmem"), "{reasons:?}");
        assert!(told(Code::Blocked, "QEMU says"), "{reasons:?}");
    }
}

/// Memory that a disk writes directly changes unseen: whoever moves it must know.
#[test]
fn direct_disks_are_known() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let direct = |name: &str, cache: &str| {
            let node = format!("null-co,node-name=n{cache}");
            let disk = ["-blockdev", &node, "-device", "virtio-blk-pci,drive=n"];
            let mut vm = stage.start(name, stage.argv(&disk));
            assert_eq!(vm.qemu.source_reasons().unwrap(), []);
            vm.qemu.reads_directly().unwrap()
        };
        assert!(direct("direct", ",cache.direct=on"));
        assert!(!direct("cached", ""));
    }
}

/// Stopped, saved and looked at as the downtime has it; what others do at the last moment is seen.
#[test]
fn a_vm_is_stopped_and_saved_in_one_go() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let (mut vm, mut target) = (stage.source(&VGA), stage.target("target", &VGA));
        vm.wait_for_boot(1);
        let shape = vm.qemu.shape().unwrap();
        target.qemu.prepare_load().unwrap();
        vm.qemu.prepare_save().unwrap();
        // One that is not followed by a stop does nothing.
        assert_eq!(vm.qemu.ready_to_pause().unwrap(), RunState::Running);
        assert_eq!(vm.qemu.shape().unwrap(), shape);
        assert_eq!(vm.qemu.ready_to_pause().unwrap(), RunState::Running);
        let (state, ticket) = vm.qemu.pause_and_save().unwrap();
        assert_eq!(state, RunState::Running);
        let saved = vm.qemu.save_finish(ticket).unwrap();
        assert_eq!(vm.qemu.glance().unwrap(), shape.glance);
        assert_eq!(vm.qemu.status().unwrap(), RunState::Paused);
        copy_ram(&mut vm, &mut target);
        load(&mut target, &saved);
        copy_blocks(&mut vm, &mut target, |name| name.ends_with("vga.vram"));
        let stopped_at = target.loops();
        target.qemu.resume().unwrap();
        eventually("the target counts on", || target.loops() != stopped_at);
    }
}

#[test]
fn what_others_do_just_before_the_stop_is_seen() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other.sock");
        let listens = format!("unix:{},server=on,wait=off", other.display());
        let extra = [&VGA[..], &["-device", "pcie-root-port,id=rp,chassis=1", "-qmp", &listens]].concat();
        let mut vm = stage.source(&extra);
        vm.wait_for_boot(1);
        let mut other = Qmp::connect(&other, WITHIN).unwrap();
        vm.qemu.prepare_save().unwrap();

        // Its user pauses it: it was not us who stopped it.
        assert_eq!(vm.qemu.ready_to_pause().unwrap(), RunState::Running);
        other.execute("stop", serde_json::Value::Null, WITHIN).unwrap();
        let (state, ticket) = vm.qemu.pause_and_save().unwrap();
        assert_eq!(state, RunState::Paused);
        vm.qemu.save_finish(ticket).unwrap();
        vm.qemu.restore().unwrap();
        assert_eq!(vm.qemu.status().unwrap(), RunState::Paused);
        other.execute("cont", serde_json::Value::Null, WITHIN).unwrap();

        // A device comes.
        let shape = vm.qemu.shape().unwrap();
        assert_eq!(vm.qemu.ready_to_pause().unwrap(), RunState::Running);
        let device = serde_json::json!({ "driver": "virtio-rng-pci", "id": "hot", "bus": "rp" });
        other.execute("device_add", device, WITHIN).unwrap();
        vm.qemu.prepare_save().unwrap();
        let (_, ticket) = vm.qemu.pause_and_save().unwrap();
        vm.qemu.save_finish(ticket).unwrap();
        assert_ne!(vm.qemu.glance().unwrap(), shape.glance);
        vm.qemu.restore().unwrap();
        assert_eq!(vm.qemu.status().unwrap(), RunState::Running);
    }
}
