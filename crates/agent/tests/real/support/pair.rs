//! Two agents, and a guest that goes from one to the other and back.

use std::sync::Arc;

use sterna_agent::Agent;
use sterna_agent::model::{MigrateRequest, MigrationView};
use sterna_lab::guest::{GuestSpec, Program};

use super::{BOOT, World, migrate, request};

/// A guest that writes to as much as `dirty` MiB at `rate` MB/s, 0 for as fast as it can, and checks what it wrote.
pub(crate) fn writer(dirty: u32, rate: u32, how: &[&str]) -> Program {
    let words = ["--fill=64".to_owned(), format!("--dirty={dirty}"), format!("--rate={rate}")];
    let how = how.iter().map(|word| (*word).to_owned());
    Program::Load(words.into_iter().chain(how).chain(["--check".into()]).collect())
}

pub(crate) struct Pair {
    pub(crate) world: World,
    pub(crate) a: Arc<Agent>,
    pub(crate) b: Arc<Agent>,
}

impl Pair {
    /// Boots the guest at `a`.
    pub(crate) fn boot(world: World, change: impl FnOnce(GuestSpec) -> GuestSpec) -> Self {
        let (a, b) = (world.agent("a"), world.agent("b"));
        world.boot(&a, &change(world.parts.guest("vm")));
        world.wait_for("vm", "LOAD t=", BOOT);
        Self { world, a, b }
    }

    /// A move, proved equal, after which the guest goes on and has lost nothing.
    pub(crate) fn moves(&self, change: impl FnOnce(MigrateRequest) -> MigrateRequest) -> MigrationView {
        let from_a = self.a.vms().iter().any(|vm| vm.name == "vm");
        let (from, to) = if from_a { (&self.a, "b") } else { (&self.b, "a") };
        let view = migrate(from, change(request("vm", to)));
        self.assert_moved(&view);
        view
    }

    pub(crate) fn assert_moved(&self, view: &MigrationView) {
        assert_eq!(view.status, "completed", "{view:?}\n{}", self.world.console("vm"));
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
        let there = if view.target == "a" { &self.a } else { &self.b };
        assert_eq!(there.vm("vm").unwrap().state, "running");
        self.world.wait_for_more("vm", "LOAD", BOOT);
        let console = self.world.console("vm");
        assert!(!console.contains("BAD"), "{console}");
    }

    pub(crate) fn end(self) {
        drop(self.a.stop("vm"));
        drop(self.b.stop("vm"));
    }
}
