//! VMs that have memory in common: it travels once, and is shared at the target. RAM is proved equal, and each guest checks its own.

use std::sync::Arc;

use crate::support::{BOOT, World, request, wait};
use sterna_agent::Agent;
use sterna_agent::model::{GangRequest, MigrateRequest, MigrationView};
use sterna_lab::Ksm;
use sterna_lab::guest::{GuestSpec, Program};
use sterna_memory::{PAGE, Process};

/// A guest's memory is filled with content that follows from the seed: of 64 MiB, 8 are written.
fn twin(seed: u32, rate: u32) -> Program {
    let words = ["--fill=64", "--dirty=8", "--check=written"].map(str::to_owned);
    Program::Load(words.into_iter().chain([format!("--seed={seed}"), format!("--rate={rate}")]).collect())
}

/// Pages that two of these have in common at least: what is filled and not written.
const ALIKE: u64 = (48 << 20) / PAGE;

struct Scene {
    world: World,
    a: Arc<Agent>,
    b: Arc<Agent>,
    names: Vec<&'static str>,
}

impl Scene {
    fn boot(world: World, names: &[&'static str], change: impl Fn(&str, GuestSpec) -> GuestSpec) -> Self {
        let (a, b) = (world.agent("a"), world.agent("b"));
        for name in names {
            world.run(&a, &change(name, world.parts.guest(name)));
        }
        for name in names {
            world.wait_for(name, "LOAD t=", BOOT);
        }
        Self { world, a, b, names: names.to_vec() }
    }

    /// Waits until the kernel has merged what they have in common.
    fn merge(&self, agent: &Agent, ksm: &Ksm) {
        ksm.wait_for_scans(1, BOOT).unwrap();
        for name in &self.names {
            let pid = agent.vm(name).unwrap().pid;
            self.world.wait_until("pages are merged", || Ksm::merged_pages(pid) > ALIKE);
        }
    }

    fn begin(
        &self,
        from: &Arc<Agent>,
        to: &str,
        how: impl Fn(MigrateRequest) -> MigrateRequest,
    ) -> Vec<String> {
        let migrations = self.names.iter().map(|name| how(request(name, to))).collect();
        let gang = from.migrate_together(GangRequest { migrations }, None).unwrap();
        assert!(gang.refused.is_empty(), "{gang:?}");
        gang.migrations.into_iter().map(|view| view.id).collect()
    }

    fn moves(
        &self,
        from: &Arc<Agent>,
        to: &str,
        how: impl Fn(MigrateRequest) -> MigrateRequest,
    ) -> Vec<MigrationView> {
        let ids = self.begin(from, to, how);
        ids.iter().map(|id| self.moved(from, id)).collect()
    }

    fn moved(&self, from: &Arc<Agent>, id: &str) -> MigrationView {
        let view = wait(from, id);
        assert_eq!(view.status, "completed", "{view:?}");
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
        self.world.wait_for_more(&view.vm, "LOAD", BOOT);
        assert!(!self.world.console(&view.vm).contains("BAD"), "{}", self.world.console(&view.vm));
        println!(
            "{} to {}: {} pages in common, {} bytes for them, {} not mapped, {} bytes else, {:?} ms down; {:?}",
            view.vm,
            view.target,
            view.ram.common_pages,
            view.ram.common_bytes,
            view.ram.common_fallback_pages,
            view.ram.transferred,
            view.downtime,
            view.notices,
        );
        view
    }

    fn pss(&self, agent: &Agent) -> u64 {
        let of = |name: &&str| Process::open(agent.vm(name).unwrap().pid).unwrap().pss_bytes().unwrap();
        self.names.iter().map(of).sum()
    }

    fn end(self) {
        for name in &self.names {
            drop(self.a.stop(name));
            drop(self.b.stop(name));
        }
    }
}

fn plain(request: MigrateRequest) -> MigrateRequest {
    MigrateRequest { timeout: Some(30.0), ..request }
}

fn common(views: &[MigrationView]) -> u64 {
    views.iter().map(|view| view.ram.common_pages).sum()
}

/// There with what the kernel has merged, and back with what they share since: there nothing merges.
fn twins_share(version: &str, how: impl Fn(MigrateRequest) -> MigrateRequest) {
    let names = ["one", "two"];
    let scene = Scene::boot(World::new(version), &names, |_, guest| GuestSpec {
        programs: vec![twin(7, 10)],
        ..guest
    });
    let ksm = Ksm::run().unwrap();
    scene.merge(&scene.a, &ksm);
    let before = scene.pss(&scene.a);
    let there = scene.moves(&scene.a, "b", &how);
    drop(ksm);
    for view in &there {
        assert!(view.ram.common_pages > ALIKE, "{:?}", view.ram);
        assert_eq!(view.ram.common_fallback_pages, 0, "{:?}", view.ram);
    }
    let sent: u64 = there.iter().map(|view| view.ram.common_bytes).sum();
    assert!(sent < common(&there) * PAGE * 6 / 10, "each content once: {sent} bytes");
    let after = scene.pss(&scene.b);
    println!("PSS {before} before, {after} after");
    assert!(after < before * 5 / 4, "{before} before, {after} after");

    let back = scene.moves(&scene.b, "a", &how);
    assert!(common(&back) > ALIKE * 3 / 2, "{} pages are shared still", common(&back));
    scene.end();
}

#[test]
fn merged_pages_travel_once_on_7_2() {
    twins_share("7.2", plain);
}

#[test]
fn merged_pages_travel_once_on_10_0() {
    twins_share("10.0", plain);
}

#[test]
fn merged_pages_travel_once_by_post_copy() {
    twins_share("7.2", |request| MigrateRequest { postcopy: true, timeout: None, ..request });
}

#[test]
fn merged_pages_travel_once_by_hybrid() {
    let hybrid = |request| MigrateRequest { postcopy_after_precopy: true, downtime_limit: 1, ..request };
    twins_share("10.0", hybrid);
}

/// One VM has pages in common with itself.
#[test]
fn a_vm_alone_shares_with_itself() {
    let scene = Scene::boot(World::new("7.2"), &["one"], |_, guest| GuestSpec {
        programs: vec![
            twin(7, 0),
            Program::Load(["--fill=48", "--dirty=0", "--seed=7"].map(str::to_owned).to_vec()),
        ],
        ..guest
    });
    let ksm = Ksm::run().unwrap();
    ksm.wait_for_scans(3, BOOT).unwrap();
    let views = scene.moves(&scene.a, "b", plain);
    assert!(common(&views) > 0, "{:?}", views[0].ram);
    drop(ksm);
    scene.end();
}
