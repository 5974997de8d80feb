//! What a guest writes is measured on real QEMUs: as much as it says itself, without leaving anything, and as its move then shows.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::scene::{AT_REST, Scene, left_in_qemu, until};
use crate::support::{BOOT, World, migrate, request, wait};
use sterna_agent::model::{
    CompressionMode, MigrateRequest, WorkingSetEvent, WorkingSetRequest, WorkingSetView,
};
use sterna_agent::{Agent, Mechanism};
use sterna_lab::guest::{GuestSpec, Program};
use tokio::sync::mpsc::Receiver;

/// Pages of the guest's kernel and of the load's own bookkeeping that are written beside the load's.
const OTHER_PAGES: f64 = 250.0;
/// Noise of a loaded machine in a downtime: QEMU's own steps, and a durable record that waits for the disk.
const DOWNTIME_NOISE_MS: f64 = 100.0;

/// A load that dirties the first `dirty` MiB of its memory, page after page.
fn writes(dirty: u32, rate: u32) -> Program {
    let flags = ["--fill=64".into(), format!("--dirty={dirty}"), format!("--rate={rate}"), "--check".into()];
    Program::Load(flags.into())
}

fn measured(interval: u64, duration: u64) -> WorkingSetRequest {
    // What is compared are equal intervals.
    WorkingSetRequest { interval, duration, max_cost: 100.0, ..WorkingSetRequest::default() }
}

/// Waits for the result.
fn result(events: &mut Receiver<WorkingSetEvent>) -> WorkingSetView {
    loop {
        match events.blocking_recv().expect("a result") {
            WorkingSetEvent::Interval(_) => {}
            WorkingSetEvent::End(view) => return *view,
        }
    }
}

fn measure(agent: &Agent, request: WorkingSetRequest) -> WorkingSetView {
    let view = result(&mut agent.measure("vm", request).unwrap());
    assert_eq!(view.status, "completed", "{view:?}");
    view
}

/// Pages that the load says it has written, at its last line.
fn written(world: &World) -> f64 {
    let console = world.console("vm");
    let mut lines = console.lines().filter(|line| line.starts_with("LOAD t=") && line.contains("bad="));
    let last = lines.next_back().unwrap().split("pages=").nth(1).unwrap();
    last.split(' ').next().unwrap().parse().unwrap()
}

fn boot(world: &World, agent: &Arc<Agent>, program: Program) {
    let guest = GuestSpec { programs: vec![program], ..world.parts.guest("vm") };
    world.boot(agent, &guest);
    world.wait_for("vm", "LOAD t=", BOOT);
    world.wait_for_more("vm", "LOAD t=", BOOT);
}

fn near(seen: f64, wanted: f64, part: f64, floor: f64) -> bool {
    (seen - wanted).abs() <= wanted * part + floor
}

#[test]
fn a_known_load_is_measured_and_the_guest_moves_afterwards() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    boot(&world, &a, writes(16, 8));
    let (began, before) = (Instant::now(), written(&world));
    let view = measure(&a, measured(500, 10_000));
    world.wait_for_more("vm", "LOAD t=", BOOT);
    // What it says itself counts: on a busy machine it gets less done than it was told to.
    let rate = (written(&world) - before) / began.elapsed().as_secs_f64();
    println!("{rate} pages/s by the load; {view:#?}");
    assert!(near(view.dirty_pages_rate, rate, 0.25, OTHER_PAGES), "{rate}: {view:#?}");
    assert!(near(view.unique_pages as f64, 4096.0, 0.1, 3.0 * OTHER_PAGES), "{view:#?}");
    assert!(view.growth.is_sorted_by(|a, b| a.window < b.window && a.pages <= b.pages), "{view:#?}");
    let hot: u64 = view.regions.iter().map(|region| region.pages).sum();
    assert!(view.regions[0].share > 5.0 && hot > 2500, "{view:#?}");
    assert!(view.populated_pages > 16_384 && view.populated_pages < view.total_pages, "{view:#?}");
    let moved = migrate(&a, request("vm", "b"));
    assert_eq!(moved.status, "completed", "{moved:?}");
    assert!(moved.blocks_verified.is_some_and(|blocks| blocks > 0), "{moved:?}");
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    b.stop("vm").unwrap();
}

/// The residual is what can be predicted. The number of rounds hangs on the last ones, which differ by a few pages: on a busy machine
/// a guest that was given no time for a moment makes one of them small, and the rule then waits for another like it.
#[test]
fn a_prediction_comes_true() {
    const BANDWIDTH: u64 = 12_000_000;
    const LIMIT_MS: u64 = 600;
    let world = World::new("7.2");
    // A prediction knows nothing of what need not be sent after all.
    let (a, b) = (world.agent_without("a", Mechanism::Postponing), world.agent("b"));
    // All of the set is written anew while it is sent, three times over: rounds shrink it no more, and it fits the limit.
    boot(&world, &a, writes(4, 40));
    let bandwidths = vec![BANDWIDTH];
    let asked = WorkingSetRequest { bandwidths, downtime_limit: LIMIT_MS, ..measured(1000, 10_000) };
    let view = measure(&a, asked);
    let predicted = &view.predictions[0];
    let limits = MigrateRequest {
        max_bandwidth: Some(BANDWIDTH),
        downtime_limit: LIMIT_MS,
        compression: CompressionMode::None,
        delta_cache: Some(0),
        verify: false,
        timeout: Some(90.0),
        ..request("vm", "b")
    };
    let seen = migrate(&a, limits);
    assert_eq!(seen.status, "completed", "{seen:?}");
    // What the last scan found before the stop.
    let residual = seen.expected_downtime.unwrap() / 1e3 * seen.ram.mbps * 1e6 / 8.0 / 4096.0;
    println!("predicted {predicted:#?}\nseen: residual {residual:.0} pages, {seen:#?}\n{:#?}", view.growth);
    assert_eq!(predicted.ending, "converged");
    assert!(near(predicted.residual_pages as f64, residual, 0.2, 64.0), "{residual}: {view:#?}");
    let downtime = seen.downtime.unwrap();
    assert!(near(predicted.downtime, downtime, 0.2, DOWNTIME_NOISE_MS), "{seen:?}: {predicted:?}");
    let back = migrate(&b, request("vm", "a"));
    assert_eq!(back.status, "completed", "{back:?}");
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    a.stop("vm").unwrap();
}

#[test]
fn a_migration_comes_first_and_a_measurement_is_alone() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    boot(&world, &a, writes(8, 10));
    let mut events = a.measure("vm", measured(200, 60_000)).unwrap();
    assert!(matches!(events.blocking_recv(), Some(WorkingSetEvent::Interval(_))));
    let refused = a.measure("vm", measured(200, 60_000)).expect_err("a second one began").to_string();
    assert!(refused.contains("VM vm at host a is being measured already"), "{refused}");
    let id = a.migrate(request("vm", "b"), None).unwrap().id;
    let refused = a.measure("vm", measured(200, 60_000)).expect_err("it began beside a migration");
    assert!(matches!(refused, sterna_agent::AgentError::Conflict(_)), "{refused}");
    let view = result(&mut events);
    assert_eq!(view.status, "cut-short", "{view:?}");
    assert!(view.error_desc.unwrap().contains("a migration of it began"));
    assert!(!view.intervals.is_empty() && !view.predictions.is_empty(), "it tells what it has");
    let moved = wait(&a, &id);
    assert_eq!(moved.status, "completed", "{moved:?}");
    assert!(moved.blocks_verified.is_some_and(|blocks| blocks > 0), "{moved:?}");
    for bad in
        [measured(50, 1000), measured(1000, 100), WorkingSetRequest { max_cost: 0.0, ..measured(100, 1000) }]
    {
        let refused = b.measure("vm", bad).expect_err("it makes no sense");
        assert!(matches!(refused, sterna_agent::AgentError::Invalid(_)), "{refused}");
    }
    let mut events = b.measure("vm", measured(200, 60_000)).unwrap();
    assert!(matches!(events.blocking_recv(), Some(WorkingSetEvent::Interval(_))));
    b.stop("vm").unwrap();
    let view = result(&mut events);
    assert_eq!(view.status, "failed", "{view:?}");
    assert!(view.error_desc.unwrap().starts_with("the measurement of VM vm at b failed"));
}

/// A measurement of the guest at `a`, as a client that can hang up.
fn begin(scene: &Scene) -> UnixStream {
    let mut stream = UnixStream::connect(scene.world.path("a").join("run/agent.sock")).unwrap();
    let body = "{\"interval\": 100, \"duration\": 60000}";
    let head = "POST /v1/vms/vm/working-set HTTP/1.1\r\nhost: agent\r\naccept: application/jsonl\r\n";
    write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let (mut text, mut part) = (String::new(), [0; 4096]);
    while !text.contains("\"interval\"") {
        let read = stream.read(&mut part).unwrap();
        assert!(read > 0, "{text}");
        text += &String::from_utf8_lossy(&part[..read]);
    }
    stream
}

fn is_tracked(scene: &Scene) -> bool {
    scene.footprint("a").mappings.iter().any(|mapping| mapping.flags.split(' ').any(|flag| flag == "uw"))
}

/// Whoever ends a measurement, and however, nothing of it is left in QEMU, and the guest can be measured and moved again.
#[test]
fn nothing_is_left_in_qemu_however_a_measurement_ends() {
    let mut scene = Scene::boot(World::new("7.2"));
    // The first attach makes QEMU's C library set up what stays.
    let before = scene.footprint("a");
    let clean = |scene: &Scene| {
        let within = AT_REST.max(Duration::from_secs(1));
        until("nothing is left in QEMU", within, || {
            left_in_qemu(&before, &scene.footprint("a")).is_empty().then_some(())
        });
    };
    let stream = begin(&scene);
    assert!(is_tracked(&scene), "the test would see nothing");
    drop(stream);
    clean(&scene);

    let stream = begin(&scene);
    assert!(is_tracked(&scene));
    scene.a.kill();
    drop(stream);
    scene.a.launch();
    clean(&scene);

    let (code, text, why) = scene.a.command(&["wws", "vm", "--duration", "1s", "--interval", "250ms"]);
    assert_eq!(code, 0, "{why}");
    println!("{text}{why}");
    assert!(text.contains("Predicted migrations"), "{text}");
    clean(&scene);
    scene.move_verified("a");
    scene.b.stop("vm").unwrap();
}
