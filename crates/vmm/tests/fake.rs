//! The fake keeps the rules that QEMU has, so that what passes with it has a chance with QEMU.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use sterna_vmm::fake::{FakeVmm, When};
use sterna_vmm::{Layout, ProcessId, RunState, Vmm, VmmError};

const ID: ProcessId = ProcessId { pid: 1, start_time: 1 };

#[test]
fn a_fake_moves_as_a_vm_does() {
    let (mut source, at_source) = FakeVmm::running(ID, Layout::default());
    let disk = at_source.state().disk.clone();
    let (mut target, at_target) = FakeVmm::waiting(ID, Layout::default(), disk);
    assert!(matches!(target.resume(), Err(VmmError::WrongState { state: RunState::Inmigrate, .. })));
    source.prepare_save().unwrap();
    assert!(source.save_begin().is_err(), "it runs");
    source.pause().unwrap();
    let ticket = source.save_begin().unwrap();
    let state = source.save_finish(ticket).unwrap();
    assert!(matches!(source.save_begin(), Err(VmmError::Order { .. })), "a second save");
    target.prepare_load().unwrap();
    target.load(&state).unwrap();
    assert!(!at_target.is_running());
    target.resume().unwrap();
    assert!(at_target.is_running());
    assert!(source.resume().is_err(), "the target has the disk");
    at_target.die();
    source.resume().unwrap();
    assert!(at_source.is_running() && !at_target.is_running());
}

#[test]
fn failures_strike_once_before_or_after_the_work() {
    let (mut vm, handle) = FakeVmm::running(ID, Layout::default());
    handle.fail("pause", When::Before);
    assert!(matches!(vm.pause(), Err(VmmError::Scripted { operation: "pause" })));
    assert_eq!(vm.status().unwrap(), RunState::Running);
    handle.fail("pause", When::After);
    assert!(vm.pause().is_err());
    assert_eq!(vm.status().unwrap(), RunState::Paused);
    vm.resume().unwrap();
    assert_eq!(handle.state().calls, ["pause", "status", "pause", "status", "resume"]);
}
