//! Templates that go to the target beside their clone, or after it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::support::scene::until;
use crate::support::{MOVE, load, migrate, request, wait};
use crate::templates::{RAM, Scene, own_pages};
use sterna_agent::Agent;
use sterna_agent::model::{Dedup, GangRequest, MigrateRequest, MigrationView, SendTemplate};
use sterna_memory::PAGE;

/// Bytes per second at which a template takes some seconds.
const SLOW: u64 = 30_000_000;
/// Bytes that the template has at least.
const TEMPLATE: u64 = 64 << 20;

fn beside(vm: &str) -> MigrateRequest {
    MigrateRequest {
        send_template: SendTemplate::Beside,
        max_bandwidth: Some(SLOW),
        timeout: None,
        ..request(vm, "b")
    }
}

fn after(vm: &str) -> MigrateRequest {
    MigrateRequest { send_template: SendTemplate::After, postcopy: true, ..beside(vm) }
}

impl Scene {
    /// Two clones that run.
    fn with_clones(version: &str) -> Self {
        let scene = Self::new(version, load(5));
        for vm in ["c0", "c1"] {
            scene.clone_of("web", vm);
            scene.lives(vm);
        }
        scene
    }

    fn now(&self, id: &str) -> MigrationView {
        self.a.watch(id).unwrap().borrow().clone()
    }

    fn end(self) {
        for vm in ["c0", "c1"] {
            drop((self.a.stop(vm), self.b.stop(vm)));
        }
    }

    /// It is at `b`, a clone of the template, which is there too, and goes on.
    fn arrived(&self, view: &MigrationView) {
        assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("completed", "b"), "{view:?}");
        assert!(view.blocks_verified.is_some_and(|blocks| blocks >= 1), "{view:?}");
        self.lives(&view.vm);
        assert_eq!(self.b.template("web").unwrap().digest, self.a.template("web").unwrap().digest);
        let own = own_pages(&self.b, &view.vm);
        assert!(own * PAGE < RAM / 2, "{own} pages are its own: {view:?}");
    }

    /// What is stored of the template at `a`.
    fn stored(&self) -> std::fs::File {
        let digest = self.a.template("web").unwrap().digest;
        let pages = self.world.path("a/state/templates").join(digest).join("pages");
        std::fs::File::options().read(true).write(true).open(pages).unwrap()
    }

    /// Flips a bit of what is stored of the template at `a`, whose clones have it in memory.
    fn damage(&self) {
        let pages = self.stored();
        let (mut byte, at) = ([0], TEMPLATE / 2);
        pages.read_exact_at(&mut byte, at).unwrap();
        pages.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }
}

fn stays_at_a(from: &Arc<Agent>, view: &MigrationView) {
    assert_eq!(view.runs_at, "a", "{view:?}");
    assert_eq!(from.vm(&view.vm).unwrap().state, "running");
}

/// Rounds go on while the template comes; the VM stops when it is there, and the second clone finds it.
fn a_template_goes_beside_its_clone(version: &str) {
    let scene = Scene::with_clones(version);
    let view = migrate(&scene.a, beside("c0"));
    println!("{:?} {:?}", view.downtime, view.ram);
    scene.arrived(&view);
    assert!(view.ram.template_bytes > TEMPLATE, "{view:?}");
    assert!(view.ram.dirty_sync_count > 2, "rounds while it came: {view:?}");
    let view = migrate(&scene.a, beside("c1"));
    scene.arrived(&view);
    assert_eq!(view.ram.template_bytes, 0, "{view:?}");
    scene.end();
}

#[test]
fn a_template_goes_beside_its_clone_on_7_2() {
    a_template_goes_beside_its_clone("7.2");
}

#[test]
fn a_template_goes_beside_its_clone_on_10_0() {
    a_template_goes_beside_its_clone("10.0");
}

/// Post-copy at once waits for it as well, and a switch that is asked for meanwhile.
#[test]
fn a_switch_waits_for_the_template() {
    let scene = Scene::with_clones("7.2");
    let id = scene.a.migrate(MigrateRequest { postcopy: true, ..beside("c0") }, None).unwrap().id;
    until("half of it has gone", MOVE, || {
        let view = scene.now(&id);
        assert_eq!(view.runs_at, "a", "{view:?}");
        (view.ram.template_bytes > TEMPLATE / 2).then_some(())
    });
    scene.arrived(&wait(&scene.a, &id));
    scene.end();
}

/// Two that leave together wait for one template: it goes once.
#[test]
fn clones_that_leave_together_wait_for_one_template() {
    let scene = Scene::with_clones("7.2");
    let migrations = vec![beside("c0"), beside("c1")];
    let gang = scene.a.migrate_together(GangRequest { migrations }, None).unwrap();
    let views: Vec<_> = gang.migrations.iter().map(|view| wait(&scene.a, &view.id)).collect();
    views.iter().for_each(|view| scene.arrived(view));
    let sent: Vec<u64> = views.iter().map(|view| view.ram.template_bytes).collect();
    assert!(sent.iter().any(|bytes| *bytes > TEMPLATE) && sent.contains(&0), "{sent:?}");
    scene.end();
}

/// The VM runs at the target long before its template is there, fetches what it touches, and is a clone of it in the end.
fn a_template_goes_after_its_clone(version: &str) {
    let scene = Scene::with_clones(version);
    let id = scene.a.migrate(after("c0"), None).unwrap().id;
    until("it runs there", MOVE, || (scene.now(&id).status == "postcopy-active").then_some(()));
    for _ in 0..2 {
        scene.world.wait_for_more("c0", "LOAD", MOVE);
    }
    assert!(scene.b.template("web").is_err(), "its template is not there yet, and it goes on");
    let view = wait(&scene.a, &id);
    println!("{:?} {:?} {:?}", view.downtime, view.ram, view.postcopy);
    scene.arrived(&view);
    assert!(view.ram.template_bytes > TEMPLATE && view.notices.is_empty(), "{view:?}");
    assert!(view.postcopy.as_ref().is_some_and(|seen| seen.requests > 0), "{view:?}");
    // From there it moves on as any clone does.
    let back = scene.moves(&scene.b, "a", "c0");
    assert!(back.ram.template_pages * PAGE > TEMPLATE / 2, "{back:?}");
    scene.lives("c0");
    scene.end();
}

#[test]
fn a_template_goes_after_its_clone_on_7_2() {
    a_template_goes_after_its_clone("7.2");
}

#[test]
fn a_template_goes_after_its_clone_on_10_0() {
    a_template_goes_after_its_clone("10.0");
}

/// What comes is not what its digest says. The VM that waited for it stays; the one that runs already gets every page from its source.
#[test]
fn a_template_that_comes_damaged() {
    let scene = Scene::with_clones("7.2");
    scene.damage();
    let view = migrate(&scene.a, beside("c0"));
    stays_at_a(&scene.a, &view);
    assert!(view.error_desc.as_ref().is_some_and(|why| why.contains("digest")), "{view:?}");
    assert!(scene.b.vms().is_empty() && scene.b.template("web").is_err());
    let view = migrate(&scene.a, after("c1"));
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("completed", "b"), "{view:?}");
    assert!(view.notices.iter().any(|notice| notice.contains("sterna template push")), "{view:?}");
    assert!(view.notices.iter().any(|notice| notice.contains("cannot be proved equal")), "{view:?}");
    assert!(own_pages(&scene.b, "c1") * PAGE > TEMPLATE, "all of it is its own");
    for vm in ["c0", "c1"] {
        scene.lives(vm);
    }
    scene.end();
}

/// Cancelled while its template goes: it stays, and what has gone is not sent again.
#[test]
fn one_that_is_cancelled_beside_its_template() {
    let scene = Scene::with_clones("7.2");
    let all = scene.stored().metadata().unwrap().len();
    let mut gone = 0;
    for how in [beside("c0"), after("c1")] {
        let id = scene.a.migrate(MigrateRequest { max_bandwidth: Some(SLOW / 2), ..how }, None).unwrap().id;
        let sent = || scene.now(&id).ram.template_bytes;
        until("a quarter of it has gone", MOVE, || (sent() > all / 4).then_some(()));
        let cancelled = scene.a.cancel(&id).is_ok();
        let view = wait(&scene.a, &id);
        gone += view.ram.template_bytes;
        if cancelled {
            assert_eq!(view.status, "cancelled", "{view:?}");
            stays_at_a(&scene.a, &view);
        } else {
            // The second runs there already.
            scene.arrived(&view);
        }
    }
    let view = migrate(&scene.a, beside("c0"));
    scene.arrived(&view);
    // What was in the sockets when a connection was cut may be lost. What went after the last word of it was never told.
    let sent = gone + view.ram.template_bytes;
    assert!(sent < all + (16 << 20), "{sent} bytes of {all} went: {view:?}");
    scene.end();
}

/// What several clones have in common is mapped over the template's pages where these wait for nothing.
#[test]
fn a_template_goes_beside_clones_that_share() {
    let scene = Scene::with_clones("7.2");
    let hash = |vm| MigrateRequest { dedup: Dedup::Hash, ..beside(vm) };
    let migrations = vec![hash("c0"), hash("c1")];
    let gang = scene.a.migrate_together(GangRequest { migrations }, None).unwrap();
    let views: Vec<_> = gang.migrations.iter().map(|view| wait(&scene.a, &view.id)).collect();
    views.iter().for_each(|view| scene.arrived(view));
    assert!(views.iter().map(|view| view.ram.common_pages).sum::<u64>() > 0, "{views:?}");
    scene.end();
}
