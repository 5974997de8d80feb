//! Two hosts on a shaped link with an agent in each, and the guests' network beside it.

use std::path::PathBuf;
use std::process::Command;

use sterna_lab::guest::{HostSide, Serial};
use sterna_lab::{Arrival, Host, Lab, LabSpec};

use crate::agent::{self, HostAgent};
use crate::{BenchError, Kit, load};

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

/// Which way a VM goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From host `a` to host `b`.
    There,
    /// From host `b` to host `a`.
    Back,
}

impl Stage {
    /// Sets everything up. Needs root.
    pub fn up(kit: &Kit) -> Result<Stage, BenchError> {
        let lab = Lab::up(&LabSpec { taps: 1, ..LabSpec::default() })?;
        agent::issue_keys(&lab, kit)?;
        let a = HostAgent::start(&lab, lab.host(0)?, kit)?;
        let b = HostAgent::start(&lab, lab.host(1)?, kit)?;
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

    /// The host that a VM of the lab is born on.
    pub fn birthplace(&self) -> Result<&Host, BenchError> {
        Ok(self.lab.host(0)?)
    }

    /// The console of a VM that our agents run. Both hosts reach the file, as they would reach a disk image.
    #[must_use]
    pub fn console(&self, vm: &str) -> PathBuf {
        self.lab.dir().join(format!("{vm}.serial"))
    }

    /// Boots a VM under the care of host `a`'s agent, and waits until all that it runs is up.
    pub fn boot(&self, vm: &str) -> Result<(), BenchError> {
        let guest = load::guest(&self.lab, &self.kit, vm);
        let serial = Serial::File(self.console(vm));
        let tap = Some(self.birthplace()?.tap(0));
        let side = HostSide { tap, serial, qmp: None, arrival: Arrival::Boot };
        self.a.run(vm, &self.kit.packages.qemu_72, &guest.arguments(&side))?;
        load::wait_ready(&self.console(vm))
    }

    /// Bytes over the migration link so far, both ways.
    pub fn wire_bytes(&self) -> Result<u64, BenchError> {
        let bytes = self.lab.link_bytes(self.birthplace()?)?;
        Ok(bytes.sent + bytes.received)
    }

    /// A command in the client's namespace.
    #[must_use]
    pub fn client_command(&self, program: &str) -> Command {
        self.lab.command(&self.lab.client(), program)
    }
}
