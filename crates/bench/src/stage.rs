//! Two hosts on a shaped link with an agent in each, and the guests' network beside it.

use std::path::PathBuf;
use std::process::Command;

use sterna_lab::{Host, Lab, LabSpec, LinkBytes, Wiring};

use crate::agent::{self, HostAgent};
use crate::{BenchError, Kit};

/// A lab in which both kinds of migration run.
#[derive(Debug)]
pub struct Stage {
    // Agents end before the namespaces that they live in.
    /// The agent of host `a`.
    pub a: HostAgent,
    /// The agent of host `b`.
    pub b: HostAgent,
    /// The hosts.
    pub lab: Lab,
    /// What runs in them.
    pub kit: Kit,
}

/// What is between the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// 1 Gbit/s.
    Gigabit,
    /// 1 Gbit/s, which the guests' traffic goes over too: each host has one network card.
    SharedGigabit,
    /// As fast as the machine copies.
    Unshaped,
}

/// What protects our pages on their way; stock QEMU's have nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageStreams {
    /// TLS, as it is when nothing is said.
    Encrypted,
    /// Nothing: a comparison of like with like.
    Clear,
}

/// Which way a VM goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From host `a` to host `b`.
    There,
    /// From host `b` to host `a`.
    Back,
}

impl Way {
    /// The other one.
    #[must_use]
    pub fn turned(self) -> Way {
        match self {
            Way::There => Way::Back,
            Way::Back => Way::There,
        }
    }
}

impl Stage {
    /// Sets everything up. Needs root. Guests have a tap each.
    pub fn up(kit: &Kit, link: Link, streams: PageStreams, guests: u8) -> Result<Stage, BenchError> {
        let rate = match link {
            Link::Gigabit | Link::SharedGigabit => LabSpec::default().rate,
            Link::Unshaped => None,
        };
        let wiring = if link == Link::SharedGigabit { Wiring::Shared } else { Wiring::Apart };
        let lab = Lab::up(&LabSpec { rate, taps: guests, wiring, ..LabSpec::default() })?;
        agent::issue_keys(&lab, kit)?;
        let a = HostAgent::start(&lab, lab.host(0)?, kit, streams, guests)?;
        let b = HostAgent::start(&lab, lab.host(1)?, kit, streams, guests)?;
        Ok(Stage { a, b, lab, kit: kit.clone() })
    }

    /// The agents of the hosts that a VM leaves and comes to.
    #[must_use]
    pub fn agents(&self, way: Way) -> (&HostAgent, &HostAgent) {
        match way {
            Way::There => (&self.a, &self.b),
            Way::Back => (&self.b, &self.a),
        }
    }

    /// The host that a VM leaves.
    pub fn from(&self, way: Way) -> Result<&Host, BenchError> {
        Ok(self.lab.host(usize::from(way == Way::Back))?)
    }

    /// The host that a VM comes to.
    pub fn to(&self, way: Way) -> Result<&Host, BenchError> {
        self.from(way.turned())
    }

    /// The console of a VM that our agents run. Both hosts reach the file, as they would reach a disk image.
    #[must_use]
    pub fn console(&self, vm: &str) -> PathBuf {
        self.lab.dir().join(format!("{vm}.serial"))
    }

    /// Bytes over the migration link so far, as the source of this way sees them.
    pub fn wire_bytes(&self, way: Way) -> Result<LinkBytes, BenchError> {
        Ok(self.lab.link_bytes(self.from(way)?)?)
    }

    /// A command in the client's namespace.
    #[must_use]
    pub fn client_command(&self, program: &str) -> Command {
        self.lab.command(&self.lab.client(), program)
    }
}
