//! Guest memory that a QEMU reads while it loads devices' state: what a post-copy sends before it is asked for.
//!
//! Each virtio device reads the indexes of its rings (`virtio_load`, hw/virtio/virtio.c), and the one that patches task priorities reads its option
//! ROM (`vapic_post_load`, hw/i386/kvmvapic.c). Each of these is a fault of its own there, one after the other, in the downtime.

use serde_json::json;
use sterna_memory::PAGE;

use super::{COMMAND_WITHIN, Qemu};

/// Where option ROMs are copied to on a PC, up to the firmware's own.
const ROMS: u64 = 0xc_0000;
const ROM_PAGES: u64 = 32;
/// Questions, each of which takes QEMU a part of a millisecond: a machine with more queues is served as far as that goes.
const QUESTIONS_MAX: usize = 64;

/// A run of pages in QEMU's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookedAt {
    /// Host address of the first.
    pub hva: u64,
    /// How many.
    pub pages: u64,
}

/// What is known of it. A QEMU that does not tell has a downtime that is a little longer, no more.
pub(super) fn looked_at(qemu: &mut Qemu) -> Vec<LookedAt> {
    let mut places = vec![(ROMS, ROM_PAGES)];
    let mut questions = 0;
    for path in devices(qemu) {
        for queue in 0.. {
            questions += 1;
            let asked = json!({ "path": path, "queue": queue });
            if questions > QUESTIONS_MAX {
                break;
            }
            let answer = qemu.qmp.execute("x-query-virtio-queue-status", asked, COMMAND_WITHIN);
            let Ok(ring) = answer else { break };
            for part in ["vring-desc", "vring-avail", "vring-used"] {
                let addr = ring[part].as_u64().filter(|addr| *addr > 0);
                places.extend(addr.map(|addr| (addr / PAGE * PAGE, 1)));
            }
        }
    }
    places.sort_unstable();
    places.dedup();
    places.truncate(QUESTIONS_MAX);
    places.into_iter().filter_map(|(addr, pages)| Some(LookedAt { hva: hva(qemu, addr)?, pages })).collect()
}

fn devices(qemu: &mut Qemu) -> Vec<String> {
    let answer = qemu.qmp.execute("x-query-virtio", json!({}), COMMAND_WITHIN).unwrap_or_default();
    let path = |device: &serde_json::Value| Some(device["path"].as_str()?.to_owned());
    answer.as_array().into_iter().flatten().filter_map(path).collect()
}

fn hva(qemu: &mut Qemu, addr: u64) -> Option<u64> {
    address(&qemu.qmp.hmp(&format!("gpa2hva {addr:#x}"), COMMAND_WITHIN).ok()?)
}

/// Of a line such as `Host virtual address for 0xc0000 (pc.ram) is 0x7f4dbfec0000`.
fn address(line: &str) -> Option<u64> {
    u64::from_str_radix(line.trim().rsplit_once(" is 0x")?.1, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_from_its_line() {
        let line = "Host virtual address for 0xc0000 (pc.ram) is 0x7f4dbfec0000\r\n";
        assert_eq!(address(line), Some(0x7f4d_bfec_0000));
        assert_eq!(address("No memory is mapped at address 0xfffff"), None);
        assert_eq!(address("Host virtual address for 0xc0000 (pc.ram) is nowhere"), None);
    }
}
