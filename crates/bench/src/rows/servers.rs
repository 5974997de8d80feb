//! What clients of real servers see of a move: Redis, a web server, and streams both ways.

use sterna_lab::guest::Program;
use sterna_lab::{GuestSpec, LabDir, image, packages};

use super::Run;
use crate::contest::Vm;
use crate::figures::Metric;
use crate::load::{self, Seen};
use crate::ours::{self, OurVm};
use crate::pulse::{App, Course, Pulse};
use crate::results::{Case, Contender, Curve, Move, RowResult, Verified};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::{StockVm, StockWay};
use crate::{BenchError, Kit};

/// RAM of the guest, and the part that is noise: what moves takes some seconds, twenty quarters of one and more.
const MEMORY_MIB: u32 = 512;
const NOISE_MIB: u32 = 288;
/// Seconds after which a guest that still works is stopped to be compared.
const VERIFY_STOPS_S: &str = "8";

/// The servers, each with its name and what is done with it.
const SERVERS: &[(App, &str, &str)] = &[
    (
        App::Redis,
        "redis",
        "redis-benchmark sets keys over 8 connections, and a client writes 2000 more a second and reads all back",
    ),
    (App::Web, "web", "wrk fetches a file of 64 KiB from nginx over 16 connections"),
    (App::ToGuest, "iperf3 to the guest", "iperf3 sends to the guest over one connection"),
    (App::FromGuest, "iperf3 from the guest", "iperf3 receives from the guest over one connection"),
];

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    run.tell("the image with servers");
    let kit = with_servers(run.kit)?;
    let stage = Stage::up(&kit, Link::Gigabit, PageStreams::Encrypted, 1)?;
    let cases = SERVERS.iter().map(|server| case(run, &stage, *server)).collect::<Result<_, _>>()?;
    stage.lab.down()?;
    let notes = vec![
        "Application figures are of quarters of a second: before is the median of the 3 s before the move, during is the \
         mean from the command until the source is free, lost is what was not done until a second after it. The guest's \
         processor is emulated, and shares two cores with both hosts and the client: a move by anyone slows it."
            .to_owned(),
    ];
    Ok(RowResult { cases, notes, ..RowResult::default() })
}

/// The same with another image. Its packages are fetched here, since no other row needs them.
fn with_servers(kit: &Kit) -> Result<Kit, BenchError> {
    let dir = LabDir::open()?;
    let servers = packages::servers(&dir)?;
    let initramfs = image::build_with_servers(&dir, &kit.packages, &servers)?;
    Ok(Kit { initramfs, ..kit.clone() })
}

fn case(run: &Run<'_>, stage: &Stage, (app, name, text): (App, &str, &str)) -> Result<Case, BenchError> {
    let mut contenders = vec![Contender::named("ours"), Contender::named(StockWay::Precopy.name())];
    let (mut verified, mut lines) = (None, Vec::new());
    for pair in 1..=run.extent.pairs {
        for contender in &mut contenders {
            run.tell(&format!("{name}: {}, pair {pair} of {}", contender.name, run.extent.pairs));
            let is_ours = contender.name == "ours";
            let vm_name = format!("{app:?}-{}{pair}", if is_ours { "ours" } else { "stock" }).to_lowercase();
            let vm = boot(stage, app, &vm_name, is_ours)?;
            let comparison = if verified.is_none() { Some(&mut verified) } else { None };
            let (moved, points) = moved(stage, app, vm, comparison)?;
            run.tell(&format!("  {}", told(&moved)));
            if pair == 1 {
                lines.push((contender.name.clone(), points));
            }
            contender.moves.push(moved);
        }
    }
    let unit = app.metric().unit();
    let curve = Curve {
        title: format!("{name}, by quarters of a second"),
        x: "since the command, s".to_owned(),
        y: format!("done, {}", if unit == "/s" { "operations/s" } else { unit }),
        lines,
    };
    let workload = format!("{MEMORY_MIB} MiB, {NOISE_MIB} of it noise, one vCPU; {text}");
    Ok(Case { name: name.to_owned(), workload, contenders, verified, curves: vec![curve], ..Case::default() })
}

fn boot(stage: &Stage, app: App, name: &str, is_ours: bool) -> Result<Vm, BenchError> {
    let server = match app {
        App::Redis => Program::Redis,
        App::Web => Program::Web,
        App::ToGuest | App::FromGuest => Program::Iperf3,
    };
    let noise = load::memory(&[&format!("--fill={NOISE_MIB}"), "--dirty=0", "--sleep"]);
    let guest = GuestSpec {
        nic: Some(load::nic(stage, 0)),
        programs: vec![server, load::beacon(stage), noise],
        ..load::plain(stage, name, MEMORY_MIB)
    };
    Ok(match is_ours {
        true => Vm::Ours(OurVm::boot(stage, &guest, 0)?),
        false => Vm::Stock(Box::new(StockVm::boot(stage, &guest, 0)?), StockWay::Precopy),
    })
}

/// A move under an application's load. Ours goes back under it too where RAM is to be compared.
fn moved(
    stage: &Stage,
    app: App,
    mut vm: Vm,
    comparison: Option<&mut Option<Verified>>,
) -> Result<(Move, Vec<(f64, f64)>), BenchError> {
    let client = if app == App::Redis { load::watch(stage, 0)? } else { load::listen(stage)? };
    let pulse = Pulse::start(stage, app, stage.lab.guest_address(0))?;
    load::warm_memory(MEMORY_MIB);
    // The pace before is taken without that.
    std::thread::sleep(load::BEFORE);
    let mut moved = vm.migrate(stage)?;
    std::thread::sleep(load::AFTER + load::AFTER);
    let until = load::unix_ms();
    if let (Vm::Ours(vm), Some(verified)) = (&mut vm, comparison) {
        let order = ours::Order::with(&["--verify", "--timeout", VERIFY_STOPS_S]);
        *verified = Some(vm.verify_with(stage, &order));
    }
    let beats: Vec<_> = pulse.finish().into_iter().filter(|b| b.unix_ms < until).collect();
    let course = Course::of(app, &beats, moved.window)?;
    course.figures.metrics().for_each(|m| moved.figures.set(m, course.figures.get(m).unwrap_or(f64::NAN)));
    let seen = Seen::of(client.finish()?, moved.window)?;
    moved.figures.set(Metric::Blackout, seen.blackout_ms);
    moved.client = Some(seen);
    vm.end(stage)?;
    Ok((moved, course.points))
}

fn told(moved: &Move) -> String {
    let figure = |m| moved.figures.get(m).unwrap_or(f64::NAN);
    let before = figure(Metric::OpsBefore).max(figure(Metric::FlowBefore));
    format!(
        "{:.0} ms, down {:.1}, blackout {:.0}; {before:.0} before, during {:.0} %, lowest {:.0} %, after {:.0} %, lost {:.2} s",
        figure(Metric::TotalTime),
        figure(Metric::Downtime),
        figure(Metric::Blackout),
        figure(Metric::AppDuring),
        figure(Metric::AppLowest),
        figure(Metric::AppAfter),
        figure(Metric::AppLost),
    )
}
