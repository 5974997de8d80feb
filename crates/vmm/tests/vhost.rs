//! Networks whose back end is the host's kernel (vhost-net): what becomes of them on a host that has none.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs::File;
use std::process::Command;

use common::{Stage, WITHIN, chain, versions};
use sterna_vmm::Vmm;

/// The kernel's back end, where the machine has it.
const VHOST_NET: &str = "/dev/vhost-net";
/// QEMU's reason where there is none. It aborts on an assertion right after, rather than serving the card itself.
const NO_BACK_END: &str = "open vhost char device failed";

/// A host without vhost-net cannot be the target of such a VM: its QEMU does not start, and whoever asked is told why. A
/// host that has it starts QEMU, and nothing is said against a move: the kernel's thread writes by QEMU's own page tables,
/// in which the tracking is, and ends with the stop.
#[test]
fn a_network_of_the_kernel_needs_a_host_that_has_it() {
    // A node alone is no back end: opening it loads the module.
    let has_it = File::options().read(true).write(true).open(VHOST_NET).is_ok();
    for binary in versions() {
        for options in ["vhost=on", "vhost=on,vhostforce=on"] {
            let stage = Stage::new(&binary);
            let tap = Tap::make();
            let netdev = format!("tap,id=n,ifname={},script=no,downscript=no,{options}", tap.0);
            let argv = stage.argv(&["-M", "q35", "-netdev", &netdev, "-device", "virtio-net-pci,netdev=n"]);
            match stage.launch("vm", argv, None).start(WITHIN) {
                Err(error) => {
                    assert!(!has_it, "{}", chain(&error));
                    assert!(chain(&error).contains(NO_BACK_END), "{}", chain(&error));
                }
                Ok(mut started) => {
                    let reasons = started.qemu.source_reasons();
                    started.qemu.process().kill().unwrap();
                    started.exit.wait(WITHIN);
                    assert!(has_it, "QEMU started without {VHOST_NET}");
                    assert_eq!(reasons.unwrap(), []);
                }
            }
        }
    }
}

/// A tap that is never up: no packet passes.
struct Tap(String);

impl Tap {
    fn make() -> Self {
        let tap = Self(format!("svhost{}", std::process::id()));
        tap.ip("add");
        tap
    }

    fn ip(&self, verb: &str) {
        let line = ["tuntap", verb, "dev", &self.0, "mode", "tap"];
        let output = Command::new("ip").args(line).output().unwrap();
        assert!(output.status.success() || std::thread::panicking(), "{output:?}");
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.ip("del");
    }
}
