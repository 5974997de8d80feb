//! What strikes, and what an operator or the world does about it afterwards.

use std::time::Duration;

use crate::matrix::cell::Phase;
use crate::support::hold::Frozen;
use crate::support::proxy::Proxy;
use crate::support::scene::{Scene, other};

/// How long the link is away: who lost it has asked in vain meanwhile.
const AWAY: Duration = Duration::from_millis(150);
/// A freeze that nobody gives up over.
const SHORT_FREEZE: Duration = Duration::from_secs(1);
/// A freeze that is longer than a source whose VM is stopped waits (5 s for pages, 10 s for the load).
const LONG_FREEZE: Duration = Duration::from_secs(12);

/// A row of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    SourceAgent,
    TargetAgent,
    BothAgents,
    SourceQemu,
    TargetQemu,
    Cut,
    Silence,
    SourceFreezes,
    TargetFreezes,
    TargetFreezesLong,
}

/// The links between the hosts, one for each direction of calling.
pub(crate) struct Links(pub(crate) [Proxy; 2]);

impl Fault {
    pub(crate) const ALL: [Self; 10] = [
        Self::SourceAgent,
        Self::TargetAgent,
        Self::BothAgents,
        Self::SourceQemu,
        Self::TargetQemu,
        Self::Cut,
        Self::Silence,
        Self::SourceFreezes,
        Self::TargetFreezes,
        Self::TargetFreezesLong,
    ];

    /// Its row in the document.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::SourceAgent => "the source's agent is killed",
            Self::TargetAgent => "the target's agent is killed",
            Self::BothAgents => "both agents are killed",
            Self::SourceQemu => "the source's QEMU is killed",
            Self::TargetQemu => "the target's QEMU is killed",
            Self::Cut => "the link is cut",
            Self::Silence => "the link falls silent",
            Self::SourceFreezes => "the source host freezes for a second",
            Self::TargetFreezes => "the target host freezes for a second",
            Self::TargetFreezesLong => "the target host freezes for longer than the source waits",
        }
    }

    pub(crate) fn is_of_link(self) -> bool {
        matches!(self, Self::Cut | Self::Silence)
    }

    pub(crate) fn kills_the_sources_agent(self) -> bool {
        matches!(self, Self::SourceAgent | Self::BothAgents)
    }

    pub(crate) fn freezes(self) -> bool {
        matches!(self, Self::SourceFreezes | Self::TargetFreezes | Self::TargetFreezesLong)
    }

    /// The source waits for the target's load in vain.
    pub(crate) fn outlasts_the_load(self, phase: Phase) -> bool {
        matches!(self, Self::Silence | Self::TargetFreezesLong) && phase == Phase::Load
    }

    /// The target does not notice that the try is over, and waits for up to a minute.
    pub(crate) fn leaves_the_target_waiting(self, phase: Phase) -> bool {
        self == Self::Silence && !phase.is_handed_over()
    }

    /// Strikes, lets whoever is held go on (`let_go`), and mends what broke: agents are started again, and no more.
    pub(crate) fn strike(self, scene: &mut Scene, links: &Links, from: &str, let_go: impl FnOnce()) {
        let to = other(from);
        match self {
            Self::SourceAgent => restart(scene, &[from], let_go),
            Self::TargetAgent => restart(scene, &[to], let_go),
            Self::BothAgents => restart(scene, &[from, to], let_go),
            Self::SourceQemu => {
                scene.kill_qemu(from);
                let_go();
            }
            Self::TargetQemu => {
                scene.kill_qemu(to);
                let_go();
            }
            Self::Cut => cut_while(links, let_go),
            Self::Silence => interrupt(links, Proxy::silence, let_go),
            Self::SourceFreezes => freeze(scene, from, SHORT_FREEZE, let_go),
            Self::TargetFreezes => freeze(scene, to, SHORT_FREEZE, let_go),
            Self::TargetFreezesLong => freeze(scene, to, LONG_FREEZE, let_go),
        }
    }
}

fn restart(scene: &mut Scene, hosts: &[&str], let_go: impl FnOnce()) {
    hosts.iter().for_each(|host| scene.host_mut(host).kill());
    let_go();
    hosts.iter().for_each(|host| scene.host_mut(host).launch());
}

/// Takes the link away for a while, in which `let_go` happens.
pub(crate) fn cut_while(links: &Links, let_go: impl FnOnce()) {
    interrupt(links, Proxy::cut, let_go);
}

fn interrupt(links: &Links, how: impl Fn(&Proxy), let_go: impl FnOnce()) {
    links.0.iter().for_each(how);
    let_go();
    std::thread::sleep(AWAY);
    links.0.iter().for_each(Proxy::mend);
}

/// All of a host that we know of: its agent and its QEMU.
fn freeze(scene: &Scene, host: &str, time: Duration, let_go: impl FnOnce()) {
    let mut pids = scene.qemus(host);
    pids.push(scene.host(host).pid());
    let frozen = Frozen::freeze(pids);
    let_go();
    std::thread::sleep(time);
    drop(frozen);
}
