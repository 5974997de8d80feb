//! Parallel page streams: any number of them moves a guest that writes, and the loss of one ends the try.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use crate::support::hold::Hold;
use crate::support::proxy::Proxy;
use crate::support::scene::{Scene, taken, to_the_other, until};
use crate::support::{BOOT, MOVE, World, load, migrate, request, wait};
use sterna_agent::Agent;
use sterna_agent::model::MigrateRequest;
use sterna_lab::guest::{GuestSpec, Program};
use sterna_transport::UNANSWERED_MAX;

/// So many streams are the default, fewer where there are fewer processors (docs/guide.md).
const DEFAULT: usize = 2;
/// How fast pages travel when a stream is to be lost in the middle of a round.
const SLOW: u64 = 4_000_000;

fn boot(world: &mut World) -> (Proxy, Arc<Agent>, Arc<Agent>) {
    let proxy = Proxy::to(world.address("b"));
    world.b_as_seen_from_a = Some(proxy.address());
    let (a, b) = (world.agent("a"), world.agent("b"));
    world.boot(&a, &GuestSpec { programs: vec![load(20)], ..world.parts.guest("vm") });
    world.wait_for_more("vm", "LOAD", BOOT);
    (proxy, a, b)
}

#[test]
fn one_to_sixty_four_streams_and_the_default() {
    let mut world = World::new("7.2");
    let (proxy, a, b) = boot(&mut world);
    let cores = std::thread::available_parallelism().unwrap().get();
    for asked in [Some(1), Some(2), Some(3), Some(8), Some(64), None] {
        let before = proxy.connections();
        let view = migrate(&a, MigrateRequest { parallel_connections: asked, ..request("vm", "b") });
        assert_eq!(view.status, "completed", "{asked:?}: {view:?}");
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
        // Two more carry the messages, and what a switch to post-copy would ask for.
        let streams = asked.map_or(DEFAULT.min(cores), |asked| asked as usize);
        assert_eq!(proxy.connections() - before, streams + 2, "{asked:?}");
        let back = migrate(&b, MigrateRequest { parallel_connections: asked, ..request("vm", "a") });
        assert_eq!(back.status, "completed", "{asked:?}: {back:?}");
        world.wait_for_more("vm", "LOAD", BOOT);
        assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    }
    for wrong in [0, 65] {
        let asked = MigrateRequest { parallel_connections: Some(wrong), ..request("vm", "b") };
        let why = a.migrate(asked, None).expect_err("it began").to_string();
        assert!(why.contains("1 to 64"), "{why}");
    }
    a.stop("vm").unwrap();
}

/// Page streams that leave TLS move a VM as well, if both hosts say so; if not, nothing begins.
#[test]
fn pages_in_clear() {
    let mut world = World::new("7.2");
    world.clear = vec!["a", "b"];
    let (a, b) = (world.agent("a"), world.agent("b"));
    world.boot(&a, &GuestSpec { programs: vec![load(20)], ..world.parts.guest("vm") });
    world.wait_for_more("vm", "LOAD", BOOT);
    for (from, to) in [(&a, "b"), (&b, "a")] {
        let view = migrate(from, request("vm", to));
        assert_eq!(view.status, "completed", "{view:?}");
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
        world.wait_for_more("vm", "LOAD", BOOT);
    }
    drop(b);
    world.clear = vec!["a"];
    let b = world.agent("b");
    let view = migrate(&a, request("vm", "b"));
    let told = |what: &str| view.reasons.iter().any(|reason| reason.text.contains(what));
    assert!(view.status == "failed" && told("page-streams") && told("host b says encrypted"), "{view:?}");
    assert!(a.vm("vm").unwrap().state == "running" && b.vms().is_empty());
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    a.stop("vm").unwrap();
}

#[test]
fn one_stream_of_three_is_lost() {
    let mut world = World::new("7.2");
    let (proxy, a, b) = boot(&mut world);
    let slowly = MigrateRequest {
        parallel_connections: Some(3),
        max_bandwidth: Some(SLOW),
        timeout: None,
        ..request("vm", "b")
    };
    let id = a.migrate(slowly, None).unwrap().id;
    let watch = a.watch(&id).unwrap();
    until("pages travel", MOVE, || taken(&watch.borrow(), 0).then_some(()));
    // The last one is not for pages.
    proxy.cut_one(1);
    let view = wait(&a, &id);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{view:?}");
    // Whichever end notices first tells it.
    let why = view.error_desc.unwrap_or_default();
    assert!(why.contains("stream") || why.contains("connection"), "{why}");
    assert_eq!(a.vm("vm").unwrap().state, "running");
    until("nothing of it is left at the target", MOVE, || b.vms().is_empty().then_some(()));
    world.wait_for_more("vm", "LOAD", BOOT);
    let view = migrate(&a, request("vm", "b"));
    assert_eq!(view.status, "completed", "{view:?}");
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    b.stop("vm").unwrap();
}

/// A link does not stand idle while the target starts a QEMU: it reads ahead, up to a limit. Who changes his mind meanwhile has his VM at once.
#[test]
fn pages_go_while_the_target_starts_a_qemu() {
    let world = World::new("7.2");
    let (a, b) = (Daemon::start(&world, "a"), Daemon::start(&world, "b"));
    let much = ["--fill=256", "--dirty=8", "--rate=10", "--check"].map(str::to_owned).to_vec();
    let spec = GuestSpec { programs: vec![Program::Load(much)], memory_mib: 448, ..world.parts.guest("vm") };
    a.run("vm", world.argv(&spec)).unwrap();
    world.wait_for("vm", "LOAD t=", BOOT);
    let scene = Scene { a, b, world };
    let sent = |id: &str| scene.a.migration(id).unwrap().ram.transferred;
    let begin = || {
        let hold = Hold::arm(&scene.world, &scene.b, "target-prepare");
        let id =
            scene.a.migrate(&MigrateRequest { parallel_connections: Some(2), ..to_the_other("a") }).unwrap();
        hold.reached();
        until("pages go", MOVE, || (sent(&id) > 8 << 20).then_some(()));
        assert!(scene.qemus("b").is_empty(), "the target has a QEMU already");
        (hold, id)
    };
    let (hold, id) = begin();
    until("as much goes as is read ahead", MOVE, || (sent(&id) > 60 << 20).then_some(()));
    // Longer than a connection may have something to send that nobody reads, while the target may take two minutes.
    std::thread::sleep(UNANSWERED_MAX + Duration::from_secs(4));
    // What both ends' sockets hold comes on top of it.
    assert!(sent(&id) < 224 << 20, "{} bytes were read ahead", sent(&id));
    drop(hold);
    let view = scene.a.wait(&id);
    assert_eq!(view.status, "completed", "{view:?}");
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    assert_eq!(scene.settle(), "b");
    scene.assert_guest_goes_on();
    scene.move_verified("b");

    let (hold, id) = begin();
    let asked = Instant::now();
    scene.a.cancel(&id).unwrap();
    assert_eq!(scene.a.wait(&id).status, "cancelled");
    assert!(asked.elapsed() < Duration::from_secs(5), "it waited for the target");
    assert_eq!(scene.a.vm("vm").unwrap().state, "running");
    drop(hold);
    assert_eq!(scene.settle(), "a");
    scene.move_verified("a");
}
