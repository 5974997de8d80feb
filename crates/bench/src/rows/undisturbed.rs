//! What clients of a VM notice while it leaves with others that have most of their memory in common: Eswaran's slides say that neither iperf
//! nor Redis is disturbed.

use sterna_lab::GuestSpec;
use sterna_lab::guest::Program;

use super::Run;
use super::served::with_servers;
use super::sharing::merge;
use crate::figures::Metric;
use crate::load::{self, Window};
use crate::ours::{self, OurVm};
use crate::pulse::{App, Course, Pulse};
use crate::results::{Case, Contender, Goal, Move, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::{self, StockVm, StockWay};
use crate::{BenchError, crowd};

/// VMs that leave together: the first serves, and its clients are watched.
const VMS: u8 = 3;
const MEMORY_MIB: u32 = 512;
/// What is the same in all of them; with the servers and the client's data it is most of what a guest has.
const ALIKE_MIB: u32 = 256;
/// A move disturbs clients no more than stock's does.
const AS_STOCK: f64 = 1.0;

/// The servers, each with its name and what is done with it.
const SERVERS: &[(App, &str, &str)] = &[
    (App::Redis, "redis", "redis-benchmark sets keys over 8 connections"),
    (App::FromGuest, "iperf3", "iperf3 receives from the guest over one connection"),
];

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    run.tell("the image with servers");
    let kit = with_servers(run.kit)?;
    let stage = Stage::up(&kit, Link::Gigabit, PageStreams::Encrypted, VMS)?;
    let cases =
        SERVERS.iter().map(|server| case(run, &stage, *server)).collect::<Result<Vec<_>, BenchError>>()?;
    stage.lab.down()?;
    let goals = cases
        .iter()
        .map(|case| {
            let what = format!("{}: what clients get done during the move, ours / stock", case.name);
            Goal::at_least(&what, case.ratio(Metric::AppDuring, 0), AS_STOCK)
        })
        .collect();
    Ok(RowResult { cases, goals, ..RowResult::default() })
}

fn case(run: &Run<'_>, stage: &Stage, (app, name, text): (App, &str, &str)) -> Result<Case, BenchError> {
    let mut contenders = [Contender::named("ours"), Contender::named(StockWay::Precopy.name())];
    for pair in 1..=run.extent.pairs {
        run.tell(&format!("{name} beside a move of {VMS}, pair {pair} of {}", run.extent.pairs));
        contenders[0].moves.push(ours(stage, app, &format!("{name}-ours{pair}"))?);
        contenders[1].moves.push(stock(stage, app, &format!("{name}-stock{pair}"))?);
    }
    Ok(Case {
        name: format!("{name} beside it"),
        workload: format!(
            "{VMS} guests of {MEMORY_MIB} MiB, {ALIKE_MIB} of it the same in all of them, leave together by pre-copy; the first is used: {text}"
        ),
        contenders: contenders.into(),
        ..Case::default()
    })
}

/// The guests, and which of the lab's places each has.
fn guests(stage: &Stage, app: App, name: &str) -> impl Iterator<Item = (GuestSpec, u8)> {
    (0..VMS).map(move |n| {
        let alike = load::memory(&[&format!("--fill={ALIKE_MIB}"), "--seed=7", "--dirty=0", "--sleep"]);
        let server = if app == App::Redis { Program::Redis } else { Program::Iperf3 };
        let programs = if n == 0 { vec![server, alike] } else { vec![alike] };
        let nic = Some(load::nic(stage, n));
        (GuestSpec { nic, programs, ..load::plain(stage, &format!("{name}-{n}"), MEMORY_MIB) }, n)
    })
}

fn ours(stage: &Stage, app: App, name: &str) -> Result<Move, BenchError> {
    let boot = |(guest, n): (GuestSpec, u8)| OurVm::boot(stage, &guest, n);
    let mut vms = guests(stage, app, name).map(boot).collect::<Result<Vec<_>, _>>()?;
    merge(stage, &vms, ALIKE_MIB)?;
    let moved = used(stage, app, || Ok(crowd::gang(stage, &mut vms, &ours::Order::default())?.0))?;
    vms.into_iter().try_for_each(|vm| vm.stop(stage))?;
    Ok(moved)
}

fn stock(stage: &Stage, app: App, name: &str) -> Result<Move, BenchError> {
    let boot = |(guest, n): (GuestSpec, u8)| StockVm::boot(stage, &guest, n);
    let mut vms = guests(stage, app, name).map(boot).collect::<Result<Vec<_>, _>>()?;
    used(stage, app, || crowd::stock(stage, &mut vms, stock::Order::of(StockWay::Precopy)))
}

/// A move during which the first guest is used.
fn used(
    stage: &Stage,
    app: App,
    moves: impl FnOnce() -> Result<Move, BenchError>,
) -> Result<Move, BenchError> {
    let pulse = Pulse::start(stage, app, stage.lab.guest_address(0))?;
    load::warm_memory(MEMORY_MIB * u32::from(VMS));
    std::thread::sleep(load::BEFORE);
    let began = Window::open();
    let mut moved = moves()?;
    let window = began.close();
    std::thread::sleep(load::AFTER + load::AFTER);
    let course = Course::of(app, &pulse.finish(), window)?;
    let figures = &course.figures;
    figures.metrics().for_each(|m| moved.figures.set(m, figures.get(m).unwrap_or(f64::NAN)));
    Ok(moved)
}
