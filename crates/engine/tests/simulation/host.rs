//! What a host is made of: a disk with a record on it, and QEMU processes with memory.

use crate::clock::Micros;
use sterna_engine::handoff::{MigrationId, Record};

/// Pages of the VM.
pub(crate) const PAGES: usize = 64;
/// Pages of its blocks of RAM; they add up to [`PAGES`].
pub(crate) const BLOCK_PAGES: [usize; 2] = [48, 16];

/// Place of a QEMU in the world's list.
pub(crate) type QemuId = usize;

/// The VM's record on one host, as the kernel keeps it: what a reader sees, and what a power cut leaves.
#[derive(Default)]
pub(crate) struct Disk {
    cache: Option<Record>,
    platter: Option<Record>,
}

impl Disk {
    /// What a reader sees.
    pub(crate) fn read(&self) -> Option<&Record> {
        self.cache.as_ref()
    }

    /// A write, not yet on the platter.
    pub(crate) fn write(&mut self, record: Record) {
        self.cache = Some(record);
    }

    /// What was written is on the platter: `fsync`, or the kernel's own write-back.
    pub(crate) fn sync(&mut self) {
        self.platter = self.cache.clone();
    }

    /// The host loses power.
    pub(crate) fn power_cut(&mut self) {
        self.cache = self.platter.clone();
    }
}

/// Whether a QEMU's virtual CPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Running,
    Paused,
    Dead,
}

/// A QEMU process. It outlives the agent, not the host.
pub(crate) struct Qemu {
    pub(crate) host: usize,
    /// The migration it was started to receive; none for the one that was started by the user.
    pub(crate) came_by: Option<MigrationId>,
    pub(crate) life: Life,
    pub(crate) memory: [u64; PAGES],
    pub(crate) device: u64,
    /// Written since the last scan that cleared it. A discard leaves no trace here, as with a shared memfd.
    pub(crate) written: [bool; PAGES],
    /// Its VM went on elsewhere: running it again would take the VM back in time.
    pub(crate) superseded: bool,
    /// SIGKILL is pending: it never acts again, but what it holds is not free before it is dead.
    pub(crate) doomed: bool,
    /// It died with its host.
    pub(crate) lost_with_host: bool,
    /// How far the guest's life was simulated.
    pub(crate) lived_until: Micros,
}

impl Qemu {
    /// A process whose RAM was never touched.
    pub(crate) fn new(host: usize, came_by: Option<MigrationId>) -> Self {
        Self {
            host,
            came_by,
            life: Life::Paused,
            memory: [0; PAGES],
            device: 0,
            written: [false; PAGES],
            superseded: false,
            doomed: false,
            lost_with_host: false,
            lived_until: 0,
        }
    }

    /// True while the process exists.
    pub(crate) fn alive(&self) -> bool {
        self.life != Life::Dead
    }

    /// True while it does what it is told.
    pub(crate) fn obeys(&self) -> bool {
        self.alive() && !self.doomed
    }

    /// Takes the pages written since the last scan, and arms them again.
    pub(crate) fn scan(&mut self) -> Vec<usize> {
        let written = (0..PAGES).filter(|page| self.written[*page]).collect();
        self.written = [false; PAGES];
        written
    }
}

/// Where a page lies: its block, and its index in it.
pub(crate) fn place_of(page: usize) -> (u16, u32) {
    match page.checked_sub(BLOCK_PAGES[0]) {
        None => (0, page as u32),
        Some(rest) => (1, rest as u32),
    }
}

/// The page at a place.
pub(crate) fn page_at(block: u16, index: u32) -> usize {
    match block {
        0 => index as usize,
        _ => BLOCK_PAGES[0] + index as usize,
    }
}
