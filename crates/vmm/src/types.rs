//! The nouns of [`Vmm`](crate::Vmm): run states, blocks, fingerprints, reasons, errors.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use sterna_memory::ProcessError;

use crate::qemu::{LaunchError, QmpError};

/// What a VM does, in QEMU's words (`RunState` in QEMU's `qapi/run-state.json`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum RunState {
    /// It runs.
    Running,
    /// Its user, or we, stopped it.
    Paused,
    /// It was launched with `-S` and has never run.
    Prelaunch,
    /// It waits for its state: a target before the load.
    Inmigrate,
    /// Stock QEMU is migrating it away.
    FinishMigrate,
    /// Stock QEMU has migrated it away.
    Postmigrate,
    /// Its state is being saved.
    SaveVm,
    /// A disk failed, and it was told to stop then.
    IoError,
    /// The guest sleeps.
    Suspended,
    /// The guest has switched itself off and QEMU was told to stay.
    Shutdown,
    /// The guest panicked.
    GuestPanicked,
    /// KVM or QEMU failed.
    InternalError,
    /// Any other word of QEMU's.
    Other(String),
}

/// Each state that has a name of its own, with QEMU's word for it.
const RUN_STATES: [(&str, RunState); 12] = [
    ("running", RunState::Running),
    ("paused", RunState::Paused),
    ("prelaunch", RunState::Prelaunch),
    ("inmigrate", RunState::Inmigrate),
    ("finish-migrate", RunState::FinishMigrate),
    ("postmigrate", RunState::Postmigrate),
    ("save-vm", RunState::SaveVm),
    ("io-error", RunState::IoError),
    ("suspended", RunState::Suspended),
    ("shutdown", RunState::Shutdown),
    ("guest-panicked", RunState::GuestPanicked),
    ("internal-error", RunState::InternalError),
];

impl RunState {
    /// Whether its processors run.
    pub fn runs(&self) -> bool {
        *self == RunState::Running
    }

    /// Whether the VM stands still in a way in which it can be moved and go on later, when somebody lets it run: paused by
    /// its user, reset while it was paused, or stopped by a disk's error, whose request is then tried again.
    pub fn stands(&self) -> bool {
        matches!(self, RunState::Paused | RunState::Prelaunch | RunState::IoError)
    }
}

impl From<String> for RunState {
    fn from(word: String) -> Self {
        let known = RUN_STATES.into_iter().find(|(name, _)| *name == word);
        known.map_or(RunState::Other(word), |(_, state)| state)
    }
}

impl From<RunState> for String {
    fn from(state: RunState) -> Self {
        state.to_string()
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = RUN_STATES.iter().find(|(_, state)| state == self).map(|(name, _)| *name);
        match (word, self) {
            (Some(word), _) => f.write_str(word),
            (None, RunState::Other(word)) => f.write_str(word),
            (None, _) => f.write_str("unknown"),
        }
    }
}

/// One RAM block of a VM: main memory, a ROM, flash, video memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Block {
    /// Its name, the same at both ends.
    pub name: String,
    /// How much of it is in use: the length that counts.
    pub bytes: u64,
    /// The grain of the host's memory behind it: 4096, or the size of a huge page of hugetlbfs.
    pub page_bytes: u64,
    /// Where it begins in the VMM's address space. `None`: not to be found now, see [`Layout::missing`].
    pub hva: Option<u64>,
}

impl Block {
    /// Whether each VMM makes this block's content anew from its own firmware files, so that it need not
    /// travel when the files are the same at both ends.
    pub fn is_rebuilt(&self) -> bool {
        // `/rom@...` are the tables and firmware files that QEMU serves by fw_cfg, `*.rom` the option ROMs of
        // PCI cards, which QEMU reads at launch; pc.rom is empty on machines with PCI.
        self.name.starts_with("/rom@") || self.name.ends_with(".rom")
    }
}

/// Every RAM block of a VM, in the order of their names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The blocks.
    pub blocks: Vec<Block>,
}

impl Layout {
    /// The block of this name.
    pub fn block(&self, name: &str) -> Option<&Block> {
        self.blocks.iter().find(|block| block.name == name)
    }

    /// The length of all blocks together.
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().fold(0, |sum, block| sum.saturating_add(block.bytes))
    }

    /// Blocks that hold what the guest wrote, and whose address is not known: they cannot move now.
    ///
    /// At a target before the load this is normal for video memory on QEMU before 8.2: its address shows as
    /// soon as the device state is there.
    pub fn missing(&self) -> impl Iterator<Item = &Block> {
        self.blocks.iter().filter(|block| block.hva.is_none() && !block.is_rebuilt())
    }
}

/// Everything that both ends of a move must have in common.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// RAM blocks, machine, processors, devices, memory devices, disks: one fact a line.
    pub lines: BTreeSet<String>,
    /// The firmware files behind blocks that are rebuilt instead of moved, with their digests.
    pub firmware: BTreeSet<String>,
    /// Whether some of those blocks cannot be read here, so that the files must be the same.
    pub needs_firmware: bool,
}

/// Stands for what a VM is made of, for comparison with the same VM a little later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    pub(crate) lasting: [u8; 32],
    /// As much of it as is asked within the downtime.
    pub glance: Glance,
}

/// A part of a [`Shape`] that is told quickly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Glance(pub(crate) [u8; 32]);

/// What the fingerprints of `source` and `target` do not share, for a person to read. Empty means that they agree.
pub fn difference(source: &Fingerprint, target: &Fingerprint) -> Vec<String> {
    let mut found = one_sided(&source.lines, &target.lines);
    if source.needs_firmware || target.needs_firmware {
        found.extend(one_sided(&source.firmware, &target.firmware));
    }
    found
}

fn one_sided(source: &BTreeSet<String>, target: &BTreeSet<String>) -> Vec<String> {
    let only_source = source.difference(target).map(|line| format!("only at the source: {line}"));
    let only_target = target.difference(source).map(|line| format!("only at the target: {line}"));
    only_source.chain(only_target).collect()
}

/// A reason why a VM cannot move, and what can be done about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Reason {
    /// For programs.
    pub code: Code,
    /// For people: what is in the way, and what to do.
    pub text: String,
}

impl Reason {
    /// A reason with its text.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The kinds of [`Reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// QEMU itself says that the VM cannot migrate.
    Blocked,
    /// A device keeps state where Sterna cannot reach it, or something else writes the VM's memory.
    Device,
    /// The VM neither runs nor can be moved as it is.
    RunState,
    /// A disk is opened in a way that a move could harm.
    Disk,
    /// The QEMU is too old or too new.
    Version,
    /// The RAM blocks are not understood.
    Layout,
    /// Something else tracks or serves the VM's memory already.
    Tracked,
    /// The user's command line has an option that forbids it.
    CommandLine,
    /// Too little memory at the target.
    Memory,
    /// The host's kernel or our privilege does not suffice.
    Host,
    /// A disk image or firmware file is not there.
    Image,
}

/// The number of a save that goes on; see [`Vmm::save_begin`](crate::Vmm::save_begin).
#[derive(Debug)]
#[must_use = "a save that is not finished leaves the VM paused with its disks given up"]
pub struct SaveTicket(pub(crate) u64);

/// A descriptor that the VMM's process holds for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LentFd {
    /// The set that it is in, by which it is taken back.
    pub set: i64,
    /// Its number in the VMM's process.
    pub number: i32,
}

/// Why a VMM did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The connection to QEMU, or what QEMU answered.
    #[error("QEMU was asked to {operation}")]
    Qmp {
        /// What was asked.
        operation: &'static str,
        /// Its answer, or the lack of one.
        #[source]
        source: QmpError,
    },
    /// QEMU is gone.
    #[error("QEMU has exited while it was asked to {operation}; the end of its log: {log}")]
    Exited {
        /// What was asked.
        operation: &'static str,
        /// The last lines it wrote.
        log: String,
    },
    /// Another process than ours answers at the socket.
    #[error(
        "the QMP socket belongs to process {found}, not to {expected}; this is not the VM that was meant"
    )]
    WrongProcess {
        /// Who answers.
        found: i32,
        /// Who should.
        expected: i32,
    },
    /// Even SIGKILL has not ended it.
    #[error("process {id} does not exit although it was killed; it hangs in the kernel")]
    DoesNotDie {
        /// The process.
        id: crate::ProcessId,
    },
    /// QEMU answered something that cannot be understood.
    #[error("QEMU's answer to {operation} is not understood: {detail}")]
    Answer {
        /// What was asked.
        operation: &'static str,
        /// What is wrong with the answer.
        detail: String,
    },
    /// The VM is in a state in which this must not be done.
    #[error("the VM is {state}; {operation} is refused: {detail}")]
    WrongState {
        /// What was asked.
        operation: &'static str,
        /// QEMU's word for the state.
        state: RunState,
        /// Why not, and what to do.
        detail: &'static str,
    },
    /// The calls came in an order that does not work.
    #[error("{operation} is refused: {detail}")]
    Order {
        /// What was asked.
        operation: &'static str,
        /// What to do instead.
        detail: &'static str,
    },
    /// The device state is not what a save writes.
    #[error("the device state is not usable: {detail}")]
    State {
        /// What is wrong with it.
        detail: String,
    },
    /// The target's QEMU did not take the device state.
    #[error("the target's QEMU refused the device state: {reason}")]
    LoadFailed {
        /// QEMU's reason, with the end of its log.
        reason: String,
    },
    /// A disk could not be taken.
    #[error("its image {file} is locked by another process: does the VM run elsewhere?")]
    DiskElsewhere {
        /// The image.
        file: String,
    },
    /// The RAM blocks are not understood.
    #[error("the RAM blocks of this QEMU are not understood: {detail}")]
    Layout {
        /// What is wrong.
        detail: String,
    },
    /// A file or descriptor of our own.
    #[error("{operation} failed on this host")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The VMM's process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The VMM did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A failure that a test scripted.
    #[error("scripted failure of {operation}")]
    Scripted {
        /// The call that was to fail.
        operation: &'static str,
    },
}
