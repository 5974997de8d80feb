//! What clients of real servers see of a move: Redis, a web server, and streams both ways.

use sterna_lab::GuestSpec;
use sterna_lab::guest::Program;

use super::Run;
use super::served::{Service, with_servers};
use crate::BenchError;
use crate::contest::Terms;
use crate::figures::Metric;
use crate::load;
use crate::pulse::App;
use crate::results::{Case, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;

/// RAM of the guest, and the part that is noise: what moves takes some seconds, twenty quarters of one and more.
const MEMORY_MIB: u32 = 512;
const NOISE_MIB: u32 = 288;

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

fn case(run: &Run<'_>, stage: &Stage, (app, name, text): (App, &str, &str)) -> Result<Case, BenchError> {
    let service = Service {
        stage,
        name,
        workload: format!("{MEMORY_MIB} MiB, {NOISE_MIB} of it noise, one vCPU; {text}"),
        guest: &|vm| guest(stage, app, vm),
        app: Some(app),
        listen: if app == App::Redis { load::watch } else { |stage, _| load::listen(stage) },
        silence: Metric::Blackout,
        terms: Terms::default(),
        peers: &[StockWay::Precopy],
    };
    service.case(run)
}

fn guest(stage: &Stage, app: App, name: &str) -> GuestSpec {
    let server = match app {
        App::Redis => Program::Redis,
        App::Web | App::WebCrowd => Program::Web,
        App::ToGuest | App::FromGuest | App::Steady(_) => Program::Iperf3,
    };
    let noise = load::memory(&[&format!("--fill={NOISE_MIB}"), "--dirty=0", "--sleep"]);
    GuestSpec {
        nic: Some(load::nic(stage, 0)),
        programs: vec![server, load::beacon(stage), noise],
        ..load::plain(stage, name, MEMORY_MIB)
    }
}
