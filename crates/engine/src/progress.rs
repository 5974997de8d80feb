//! Progress of a migration, with QEMU's words (`query-migrate`) wherever the meaning is equal.

use crate::units::{Bytes, Pages, Rate};
use std::time::Duration;

/// QEMU's status words for a migration, and one of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The target is being asked and prepared; nothing of the VM was touched.
    Setup,
    /// Rounds are being sent while the VM runs at the source.
    Active,
    /// The VM is stopped; the residual and the device state are on their way.
    Device,
    /// The target runs the VM, and pages of it are on their way.
    PostcopyActive,
    /// The target runs the VM, pages of it are still here, and the connection is lost: the VM waits where it touches one.
    PostcopyPaused,
    /// The connection is being made again.
    PostcopyRecover,
    /// The target runs the VM.
    Completed,
    /// The migration failed and the VM runs at the source.
    Failed,
    /// A cancellation is being carried out.
    Cancelling,
    /// The migration was cancelled and the VM runs at the source.
    Cancelled,
    /// The VM was released and the target has not said whether it runs it: an operator may have to decide.
    Unresolved,
}

impl Status {
    /// The word that users and scripts see.
    pub fn word(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Device => "device",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused => "postcopy-paused",
            Self::PostcopyRecover => "postcopy-recover",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Unresolved => "unresolved",
        }
    }

    /// True when nothing more will happen by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// Figures of a migration as seen by its source.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Time from the command until now, or until the source was free.
    pub total_time: Duration,
    /// Time until the first page could be sent.
    pub setup_time: Duration,
    /// Time until a QEMU waited at the target, and page data and descriptors sent by then.
    pub target_ready: Option<(Duration, Bytes)>,
    /// Time the VM did not run, from before the stop until the target's confirmation arrived.
    pub downtime: Option<Duration>,
    /// What the downtime would be if the VM were stopped now.
    pub expected_downtime: Option<Duration>,
    /// Rounds begun (QEMU's `dirty-sync-count`).
    pub rounds: u32,
    /// RAM of the VM.
    pub ram_total: Bytes,
    /// Bytes of RAM that are known to be unsent.
    pub ram_remaining: Bytes,
    /// Page data and descriptors sent.
    pub transferred: Bytes,
    /// Pages sent as bytes (QEMU's `normal`).
    pub normal: Pages,
    /// Pages that needed no bytes because they are zero or a hole (QEMU's `duplicate`).
    pub duplicate: Pages,
    /// The part of its time that is taken from the guest, in whole percent (QEMU's `cpu-throttle-percentage`).
    pub throttle: u32,
    /// Pages written per second in the last round.
    pub dirty_pages_rate: u64,
    /// Bandwidth of the last round that was long enough to tell.
    pub bandwidth: Option<Rate>,
    /// Bytes of device state.
    pub device_state: Bytes,
    /// How the downtime was spent, in order, as (name, time).
    pub downtime_split: Vec<(&'static str, Duration)>,
}
