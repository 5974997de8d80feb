//! Taking from a guest what it can do without, for the time of its move, and giving it back wherever it runs then.
//!
//! What it had is written down before anything is taken, at both ends: whoever runs the VM in the end gives it back, also after a crash.

use crate::control::explain;
use crate::host::Host;
use crate::registry::Vm;
use std::sync::Arc;
use std::time::{Duration, Instant};
use sterna_engine::policy::{GuestMemory, shrunk};
use sterna_engine::units::Bytes;

/// How long a guest may take to give memory away; what it has given by then is what is saved.
const WITHIN: Duration = Duration::from_secs(10);
/// How long it may give nothing before it is not waited for any more.
const IDLE: Duration = Duration::from_secs(1);
/// How often it is asked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What the guest of a VM has, where it has a balloon.
pub(crate) fn size(host: &Host, vm: &Vm) -> Result<u64, String> {
    let size = host.with_qemu(vm, |qemu| qemu.balloon_size())?;
    size.ok_or_else(|| "it has no balloon: add -device virtio-balloon-pci to its command line".into())
}

/// Shrinks the guest, and waits until it has shrunk; how many bytes it gave away.
pub(crate) fn take(host: &Arc<Host>, vm: &Vm, whole: u64) -> Result<u64, String> {
    let available = host.with_qemu(vm, |qemu| qemu.balloon_available())?;
    let available = available.ok_or("its guest does not tell how much memory it could give away")?;
    let Some(target) = shrunk(GuestMemory { actual: Bytes(whole), available: Bytes(available) }) else {
        return Ok(0);
    };
    tracing::info!(
        vm = vm.name(),
        whole,
        available,
        target = target.0,
        "its guest gives memory away for a move"
    );
    let written = host.registry().update(vm, |record| record.balloon = Some(whole));
    written.map_err(|why| {
        format!("it cannot be written down that its guest is to get its memory back: {why}")
    })?;
    host.with_qemu(vm, |qemu| qemu.set_balloon(target.0))?;
    let (began, mut least, mut moved) = (Instant::now(), whole, Instant::now());
    while least > target.0 && began.elapsed() < WITHIN && moved.elapsed() < IDLE {
        std::thread::sleep(LOOK_EVERY);
        let now = size(host, vm)?;
        if now < least {
            (least, moved) = (now, Instant::now());
        }
    }
    Ok(whole - least)
}

/// Gives the guest back what was taken from it, if anything was.
pub(crate) fn give_back(host: &Arc<Host>, vm: &Vm) {
    let Some(whole) = vm.record().balloon else { return };
    let given = host.with_qemu(vm, |qemu| qemu.set_balloon(whole));
    let written = given.and_then(|()| {
        host.registry().update(vm, |record| record.balloon = None).map_err(|why| explain(&why))
    });
    if let Err(why) = written {
        tracing::warn!(
            vm = vm.name(),
            why,
            bytes = whole,
            "its guest has not got its memory back: say `balloon` to its QEMU"
        );
        vm.notify(Some(format!("its guest has not got its memory back after a move ({whole} bytes): {why}")));
    }
}
