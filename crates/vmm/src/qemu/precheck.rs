//! The pre-check: every reason why a VM cannot move, found before anything is touched.
//!
//! `xen-save-devices-state` ignores QEMU's migration blockers (and crashes QEMU 7.2 on an NVMe device), so that
//! asking here is not a courtesy.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Qemu;
use super::fingerprint::{all_devices, children};
use super::huge::{self, HugePages};
use super::qmp::Version;
use crate::Vmm;
use crate::types::{Code, Layout, Reason, RunState, VmmError};

/// The oldest QEMU that this was tried on is 7.2; 6.2 has every command that is used.
const VERSION_MIN: Version = Version::new(6, 2);
/// The first version that nobody has looked at.
const VERSION_END: Version = Version::new(11, 0);
/// What a target keeps free for QEMU itself and the migration: QEMU has 60 to 150 MiB besides the guest's RAM.
const RESERVE_BYTES: u64 = 256 << 20;

/// The size of huge pages that is moved.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// `UFFD_FEATURE_WP_ASYNC` of linux/userfaultfd.h.
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;

/// How long the agent that a VM has come to may take to let go of its memory.
const LET_GO_WITHIN: Duration = Duration::from_millis(500);

/// Devices by the beginning of their class, with why they do not move.
const DEVICES: &[(&str, &str)] = &[
    ("vfio", "its state is in the hardware; unplug it before the move"),
    ("vhost-user", "another process holds its state and writes the VM's memory unseen; use a virtio device"),
    ("vhost-vdpa", "its state is in the hardware; use a virtio device"),
    ("vhost-scsi", "the host's kernel writes the VM's memory unseen; use virtio-scsi"),
    ("vhost-vsock", "its connections end at this host; unplug it before the move"),
    ("nvme", "saving its state crashes QEMU; use virtio-blk"),
    ("virtio-9p", "the folder that it shares is this host's; unmount and unplug it"),
    ("ivshmem", "its memory is shared with this host; unplug it before the move"),
    ("virtio-mem", "how much of it is plugged is outside of what is moved; use pc-dimm"),
    ("virtio-pmem", "its file is outside of what is moved; use a disk"),
    ("virtio-fs", "the folder that it shares is this host's; unmount and unplug it"),
    ("usb-host", "it is a device of this host; unplug it before the move"),
    ("usb-mtp", "the folder that it shares is this host's; unplug it before the move"),
    ("virtio-gpu-gl", "its state is in this host's graphics driver; use virtio-gpu"),
    ("virtio-vga-gl", "its state is in this host's graphics driver; use virtio-vga"),
    ("tpm-", "its state is in another process of this host; unplug it before the move"),
];

/// Those of them that do not depend on how far its guest is.
pub(super) fn lasting_reasons(qemu: &mut Qemu) -> Result<Vec<Reason>, VmmError> {
    let mut reasons = Vec::new();
    version_reason(qemu.version(), &mut reasons);
    blocked_reasons(qemu, &mut reasons)?;
    device_reasons(qemu, &mut reasons)?;
    disk_reasons(qemu, &mut reasons)?;
    Ok(reasons)
}

pub(super) fn source_reasons(qemu: &mut Qemu) -> Result<Vec<Reason>, VmmError> {
    let mut reasons = lasting_reasons(qemu)?;
    run_state_reason(&qemu.status()?, &mut reasons);
    match qemu.layout() {
        Ok(layout) => {
            layout_reasons(&layout, &mut reasons);
            huge_page_reasons(&layout, &mut reasons);
        }
        Err(VmmError::Layout { detail }) => reasons.push(Reason::new(Code::Layout, detail)),
        Err(other) => return Err(other),
    }
    tracked_reason(qemu.process_id().pid, &mut reasons);
    for text in sterna_memory::preflight().err().unwrap_or_default() {
        reasons.push(Reason::new(Code::Host, format!("at the source: {text}")));
    }
    Ok(reasons)
}

/// What room a host has for another VM, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Memory that can be had without swapping, where the kernel tells ([`available_bytes`]).
    pub available: Option<u64>,
    /// What of that is promised to others.
    pub promised: u64,
}

/// Every reason why this host cannot take a VM that needs this much memory, and so much in huge pages besides. What its files and options are wrong
/// about, [`CommandLine::for_target`](super::CommandLine::for_target) tells.
pub fn target_reasons(bytes: u64, room: Room, huge: &[HugePages]) -> Vec<Reason> {
    let mut reasons = huge::reasons(huge);
    let needed = bytes.saturating_add(RESERVE_BYTES);
    match room.available {
        Some(available) if available.saturating_sub(room.promised) >= needed => {}
        Some(available) => {
            let promised = match room.promised >> 20 {
                0 => String::new(),
                mib => format!(", of which {mib} MiB are promised to VMs that are on their way there,"),
            };
            reasons.push(Reason::new(
                Code::Memory,
                format!(
                    "the target has {} MiB of memory available{promised} and the VM needs {} MiB; free some, or choose another host",
                    available >> 20,
                    needed >> 20
                ),
            ));
        }
        None => reasons
            .push(Reason::new(Code::Host, "the target's /proc/meminfo cannot be read; is /proc mounted?")),
    }
    for text in sterna_memory::preflight().err().unwrap_or_default() {
        reasons.push(Reason::new(Code::Host, format!("at the target: {text}")));
    }
    reasons
}

/// Every part that came or went since the VM was started: the target's QEMU is started from the command line.
pub fn changed_parts(launched: &BTreeSet<String>, now: &BTreeSet<String>) -> Vec<Reason> {
    let came = now.difference(launched).map(|part| {
        format!(
            "{part} was added after the VM was started, and the target's QEMU would lack it; take it away (QMP \
             device_del, object-del, eject, block-commit), or start the VM with it"
        )
    });
    let went = launched.difference(now).map(|part| {
        format!(
            "{part} was taken away after the VM was started, and the target's QEMU would have it; put it back, or \
             start the VM without it"
        )
    });
    came.chain(went).map(|text| Reason::new(Code::Layout, text)).collect()
}

/// Why a QEMU must not take a VM from a newer one, when it is older: QEMU promises that a machine type moves to newer
/// versions, and drops or misreads what an older one does not know.
pub fn older_qemu(source: &str, target: Version) -> Option<Reason> {
    let older = (target.major, target.minor) < release(source)?;
    let text = format!(
        "its QEMU {target} is older than the source's {source}, and a VM moves to the same or a newer one; install that \
         on the target, and name it in binaries or map.binaries"
    );
    older.then(|| Reason::new(Code::Version, text))
}

/// Whether the target's QEMU is of a later release than the source's.
pub fn is_upgrade(source: &str, target: Version) -> bool {
    release(source).is_some_and(|source| source < (target.major, target.minor))
}

/// Major and minor number of a version as QEMU tells it.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.').map_while(|number| number.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

/// Memory of this host that can be had without swapping, in bytes; none where the kernel does not say.
pub fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn version_reason(version: Version, reasons: &mut Vec<Reason>) {
    if version < VERSION_MIN {
        let text = format!("QEMU {version} is too old; {VERSION_MIN} is the oldest that works");
        reasons.push(Reason::new(Code::Version, text));
    } else if version >= VERSION_END {
        let text = format!("QEMU {version} is newer than this Sterna knows; update Sterna");
        reasons.push(Reason::new(Code::Version, text));
    }
}

fn run_state_reason(state: &RunState, reasons: &mut Vec<Reason>) {
    let what_to_do = match state {
        RunState::Running | RunState::Paused | RunState::Prelaunch | RunState::IoError => return,
        RunState::Inmigrate => "waiting for another migration's state",
        // Its device state does not say that it sleeps: it would wake up in the middle of the firmware's sleep.
        RunState::Suspended => "asleep; wake it up (QMP system_wakeup) before the move",
        RunState::FinishMigrate | RunState::Postmigrate => "being migrated by QEMU itself",
        RunState::Shutdown => "switched off; start it at the target instead",
        RunState::GuestPanicked | RunState::InternalError => {
            "stopped by a crash; save a dump if you need one, and reset it"
        }
        RunState::SaveVm | RunState::Other(_) => "in a state that cannot be moved",
    };
    reasons.push(Reason::new(Code::RunState, format!("the VM is {state}: {what_to_do}")));
}

fn blocked_reasons(qemu: &mut Qemu, reasons: &mut Vec<Reason>) -> Result<(), VmmError> {
    let answer = qemu.ask("query-migrate", Value::Null, "tell what blocks a migration")?;
    for text in answer["blocked-reasons"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        reasons.push(Reason::new(Code::Blocked, format!("QEMU says: {text}")));
    }
    if let Some(
        status @ ("setup" | "active" | "pre-switchover" | "device" | "postcopy-active" | "cancelling"),
    ) = answer["status"].as_str()
    {
        let text =
            format!("QEMU itself is migrating this VM ({status}); wait, or cancel that (QMP migrate_cancel)");
        reasons.push(Reason::new(Code::Blocked, text));
    }
    Ok(())
}

fn device_reasons(qemu: &mut Qemu, reasons: &mut Vec<Reason>) -> Result<(), VmmError> {
    let found = all_devices(qemu)?;
    let old = qemu.version() < Version::new(8, 0);
    for device in found {
        let listed = DEVICES.iter().find(|(class, _)| device.class.starts_with(class)).map(|(_, why)| *why);
        let qxl = (old && device.class.starts_with("qxl"))
            .then_some("QEMU before 8.0 aborts when it is saved; use VGA");
        if let Some(why) = listed.or(qxl) {
            reasons
                .push(Reason::new(Code::Device, format!("device {} ({}): {why}", device.path, device.class)));
        }
    }
    // A network back end beside the guest's memory hides behind an ordinary card.
    for (name, class) in children(qemu, "/objects")? {
        if class.starts_with("vhost-user") || class.starts_with("x-remote") {
            let text = format!("object {name} ({class}): another process writes the VM's memory unseen");
            reasons.push(Reason::new(Code::Device, text));
        }
    }
    let networks = qemu.hmp("info network", "list its networks")?;
    for net in ["vhost-user", "vhost-vdpa"] {
        if networks.contains(&format!("type={net}")) {
            let text =
                format!("a network of type {net}: another process writes the VM's memory unseen; use a tap");
            reasons.push(Reason::new(Code::Device, text));
        }
    }
    Ok(())
}

fn disk_reasons(qemu: &mut Qemu, reasons: &mut Vec<Reason>) -> Result<(), VmmError> {
    let disks = qemu.ask("query-block", Value::Null, "list its disks")?;
    for disk in disks.as_array().into_iter().flatten() {
        let name = [&disk["device"], &disk["qdev"]].iter().find_map(|v| v.as_str().filter(|s| !s.is_empty()));
        let name = name.unwrap_or("without a name");
        let cache = &disk["inserted"]["cache"];
        // What is only read cannot be lost.
        if cache["no-flush"] == true && disk["inserted"]["ro"] != true {
            let text = format!(
                "disk {name} never flushes (cache=unsafe), so the target may not see what was written; \
                 use cache=writeback or none"
            );
            reasons.push(Reason::new(Code::Disk, text));
        }
    }
    Ok(())
}

/// Whether any disk is read past the host's page cache: then the hardware writes the guest's memory, at a time of its own.
pub(super) fn reads_directly(qemu: &mut Qemu) -> Result<bool, VmmError> {
    let nodes = qemu.ask("query-named-block-nodes", json!({ "flat": true }), "list its disks")?;
    Ok(nodes.as_array().into_iter().flatten().any(|node| node["cache"]["direct"] == true))
}

fn layout_reasons(layout: &Layout, reasons: &mut Vec<Reason>) {
    for block in layout.missing() {
        let text = format!(
            "RAM block {} ({} KiB) has no address that this QEMU tells; try again when the guest has booted, use \
             QEMU 8.2 or later, or one card of a kind",
            block.name,
            block.bytes >> 10
        );
        reasons.push(Reason::new(Code::Layout, text));
    }
}

/// Huge pages of another size than was tried. They would travel whole, too: each write of the guest sends one.
fn huge_page_reasons(layout: &Layout, reasons: &mut Vec<Reason>) {
    let tried = [sterna_memory::PAGE, HUGE_PAGE_BYTES];
    for block in layout.blocks.iter().filter(|block| !tried.contains(&block.page_bytes)) {
        let text = format!(
            "RAM block {} is in huge pages of {} KiB (hugetlbfs), which were never tried; use those of {} KiB \
             (hugetlbsize=2M), or memory without huge pages",
            block.name,
            block.page_bytes >> 10,
            HUGE_PAGE_BYTES >> 10
        );
        reasons.push(Reason::new(Code::Layout, text));
    }
}

/// A VM that came here a moment ago may be being let go of: that is waited for.
fn tracked_reason(pid: i32, reasons: &mut Vec<Reason>) {
    let began = Instant::now();
    while has_foreign_userfaultfd(pid) {
        if began.elapsed() > LET_GO_WITHIN {
            let text = "the VM's memory is tracked or served by a userfaultfd already; end the other migration or \
                        snapshot first";
            reasons.push(Reason::new(Code::Tracked, text));
            return;
        }
        std::thread::sleep(LET_GO_WITHIN / 20);
    }
}

fn has_foreign_userfaultfd(pid: i32) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let is_userfaultfd = |entry: &fs::DirEntry| {
        fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains("[userfaultfd]"))
    };
    let foreign = |entry: &fs::DirEntry| {
        let number = entry.file_name();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy()));
        !info.is_ok_and(|info| is_async(&info))
    };
    descriptors.flatten().any(|entry| is_userfaultfd(&entry) && foreign(&entry))
}

/// Whether a userfaultfd only tracks, as ours do: what an agent that died left behind is no obstacle, for the next
/// one closes it. The second number of line `API:` holds the features (`userfaultfd_show_fdinfo` in the kernel).
fn is_async(fdinfo: &str) -> bool {
    let api = fdinfo.lines().find_map(|line| line.strip_prefix("API:"));
    let features = api.and_then(|api| u64::from_str_radix(api.trim().split(':').nth(1)?, 16).ok());
    features.is_some_and(|features| features & UFFD_FEATURE_WP_ASYNC != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Block;

    #[test]
    fn versions_outside_of_what_was_tried_are_refused() {
        let refused = |version| {
            let mut reasons = Vec::new();
            version_reason(version, &mut reasons);
            !reasons.is_empty()
        };
        assert!(refused(Version::new(6, 1)));
        assert!(!refused(Version::new(6, 2)));
        assert!(!refused(Version { major: 10, minor: 2, micro: 3 }));
        assert!(refused(Version::new(11, 0)));
    }

    #[test]
    fn a_vm_moves_if_it_runs_or_can_go_on_later() {
        for (word, count) in [
            ("running", 0),
            ("paused", 0),
            ("prelaunch", 0),
            ("io-error", 0),
            ("suspended", 1),
            ("guest-panicked", 1),
            ("internal-error", 1),
            ("shutdown", 1),
            ("inmigrate", 1),
            ("finish-migrate", 1),
            ("postmigrate", 1),
            ("save-vm", 1),
            ("colo", 1),
        ] {
            let mut reasons = Vec::new();
            run_state_reason(&RunState::from(word.to_owned()), &mut reasons);
            assert_eq!(reasons.len(), count, "{word}");
        }
    }

    #[test]
    fn a_tracking_descriptor_is_told_from_a_serving_one() {
        assert!(is_async("pos:\t0\npending:\t0\ntotal:\t0\nAPI:\taa:1e000:1ffff\n"));
        assert!(!is_async("pending:\t1\ntotal:\t1\nAPI:\taa:0:1ffff\n"));
        assert!(!is_async("") && !is_async("API: x"));
    }

    #[test]
    fn a_vm_moves_to_newer_qemus_only() {
        let older = |source, major, minor| older_qemu(source, Version::new(major, minor)).is_some();
        assert!(older("10.0.8", 7, 2) && older("7.3.0", 7, 2));
        assert!(!older("7.2.22", 7, 2) && !older("7.2.22", 10, 0) && !older("", 7, 2));
    }

    #[test]
    fn what_came_and_went_is_told_by_name() {
        let set = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect();
        let reasons =
            changed_parts(&set(&["device a (x)", "device b (x)"]), &set(&["device b (x)", "device c (y)"]));
        let texts: Vec<_> = reasons.iter().map(|reason| reason.text.as_str()).collect();
        assert!(
            texts[0].starts_with("device c (y) was added") && texts[1].starts_with("device a (x) was taken")
        );
        assert_eq!(reasons.len(), 2);
    }

    #[test]
    fn a_target_without_the_memory_says_so() {
        let room = Room { available: available_bytes(), promised: 0 };
        assert_eq!(target_reasons(0, room, &[]), []);
        let promised = Room { promised: u64::MAX, ..room };
        assert!(target_reasons(0, promised, &[])[0].text.contains("are promised to VMs"));
        let reasons = target_reasons(u64::MAX, room, &[]);
        assert_eq!(reasons.len(), 1);
        assert_eq!(reasons[0].code, Code::Memory);
    }

    #[test]
    fn huge_pages_of_other_sizes_are_refused() {
        let refused = |page_bytes| {
            let block = Block { name: "ram".into(), bytes: 1 << 30, page_bytes, hva: None };
            let (layout, mut reasons) = (Layout { blocks: vec![block] }, Vec::new());
            huge_page_reasons(&layout, &mut reasons);
            !reasons.is_empty()
        };
        assert!(!refused(4096) && !refused(2 << 20));
        assert!(refused(1 << 30) && refused(64 << 10));
    }

    /// Memory of the pool is not what is available besides.
    #[test]
    fn huge_pages_are_looked_for_in_the_pool() {
        let huge = HugePages { page_bytes: HUGE_PAGE_BYTES, bytes: 1 << 50 };
        let reasons = target_reasons(0, Room { available: available_bytes(), promised: 0 }, &[huge]);
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        assert!(reasons[0].text.contains("huge pages of 2048 KiB"), "{reasons:?}");
    }
}
