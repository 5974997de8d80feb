//! Where in a migration a fault strikes, and what can become of the VM.

use sterna_agent::model::MigrateRequest;

use crate::support::MOVE;
use crate::support::hold::Hold;
use crate::support::scene::{Scene, other, taken, to_the_other, until};

/// Bytes per second that keep the first round going for seconds.
const SLOW: u64 = 20_000_000;
/// Bytes that show that the first round is under way.
const UNDER_WAY: u64 = 1 << 20;
/// A downtime limit in milliseconds that needs more than one round, at a rate that makes the first one last: on a busy machine the
/// guest may run for a tenth of it only, and what it has written then must still be too much.
const TIGHT: u64 = 1;
const NOT_TOO_FAST: u64 = 100_000_000;

/// A point of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The target's QEMU waits; the source is about to attach to its own.
    Setup,
    /// Pages move for the first time.
    RoundOne,
    /// A second round is about to begin.
    LaterRound,
    /// The VM is stopped and its devices are saved; they are about to be sent.
    Stop,
    /// RAM and devices are at the target, which is about to load them.
    Load,
    /// The source has handed the VM over; the target is about to write the commit down.
    Released,
    /// The commit is written down; the VM is about to run.
    Committed,
    /// The VM runs at the target, and the source is about to write that down and to end its own QEMU.
    Running,
}

impl Phase {
    pub(crate) const ALL: [Self; 8] = [
        Self::Setup,
        Self::RoundOne,
        Self::LaterRound,
        Self::Stop,
        Self::Load,
        Self::Released,
        Self::Committed,
        Self::Running,
    ];

    /// Its column in the document.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::RoundOne => "first round",
            Self::LaterRound => "later round",
            Self::Stop => "VM stopped",
            Self::Load => "devices to load",
            Self::Released => "handed over",
            Self::Committed => "committed",
            Self::Running => "runs there",
        }
    }

    /// From here on the source cannot take the VM back by itself.
    pub(crate) fn is_handed_over(self) -> bool {
        matches!(self, Self::Released | Self::Committed | Self::Running)
    }

    /// Which host is held, and where. The first round is slow instead, so that pages are on their way.
    fn point(self, from: &str) -> Option<(&str, &'static str)> {
        let to = other(from);
        match self {
            Self::Setup => Some((from, "source-track")),
            Self::RoundOne => None,
            Self::LaterRound => Some((from, "source-round-2")),
            Self::Stop => Some((from, "source-finish")),
            Self::Load => Some((to, "target-load")),
            Self::Released => Some((to, "target-record-committed")),
            Self::Committed => Some((to, "target-resume")),
            Self::Running => Some((from, "source-record-gone")),
        }
    }

    fn request(self, from: &str, proof: Proof) -> MigrateRequest {
        let request = MigrateRequest { verify: proof == Proof::Digests, ..to_the_other(from) };
        match self {
            Self::RoundOne => MigrateRequest { max_bandwidth: Some(SLOW), ..request },
            Self::LaterRound => {
                MigrateRequest { downtime_limit: TIGHT, max_bandwidth: Some(NOT_TOO_FAST), ..request }
            }
            _ => request,
        }
    }

    /// Begins a migration and brings it to this point. It goes on when the hold is dropped.
    pub(crate) fn reach(self, scene: &Scene, from: &str, proof: Proof) -> (String, Option<Hold>) {
        let source = scene.host(from);
        let hold = self.point(from).map(|(host, point)| Hold::arm(&scene.world, scene.host(host), point));
        let before = finished(scene, from);
        let id = source.migrate(&self.request(from, proof)).unwrap();
        match &hold {
            Some(hold) => hold.reached(),
            None => until("pages move", MOVE, || {
                let view = source.migration(&id).unwrap();
                assert!(view.error_desc.is_none(), "{view:?}");
                taken(&view, UNDER_WAY).then_some(())
            }),
        }
        if self == Self::Setup {
            // The source goes on beside it and may be here earlier.
            until("the target's QEMU waits", MOVE, || waits(scene, other(from)).then_some(()));
        }
        if self == Self::Load {
            // The source looks at its QEMU for a last time while the target receives.
            until("the source has sent all", MOVE, || (finished(scene, from) > before).then_some(()));
        }
        (id, hold)
    }
}

/// Whether RAM is proved equal before the VM runs at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Always, where the try can succeed.
    Digests,
    /// Where a silent target is waited for, as long as digests may take: a minute.
    None,
}

/// Whether a host has a QEMU that waits for the VM.
fn waits(scene: &Scene, host: &str) -> bool {
    let vms = scene.host(host).vms().unwrap_or_default();
    vms.iter().any(|vm| vm.state == "incoming") && scene.qemus(host).len() == 1
}

/// How often a source has sent everything, by its log.
fn finished(scene: &Scene, host: &str) -> usize {
    scene.host(host).log().matches("\"finish\"").count()
}

/// What became of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It runs at the source.
    Stays,
    /// It runs at the target.
    Moves,
    /// Its QEMU was killed where it belonged.
    Dies,
}

impl Fate {
    /// Its word in the document.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Stays => "stays",
            Self::Moves => "moves",
            Self::Dies => "dies",
        }
    }
}
