//! VMs that leave a host together.

use std::time::{Duration, Instant};

use sterna_lab::process::ProcessId;

use crate::BenchError;
use crate::facts::load_average;
use crate::figures::{Figures, Metric};
use crate::load::Window;
use crate::meter::Meter;
use crate::ours::{self, OurVm, Said};
use crate::results::{Move, Verified};
use crate::stage::{Stage, Way};
use crate::stock::{self, StockVm};

/// As often as a single move is looked at.
const LOOK: Duration = Duration::from_millis(4);
/// How long all of them may take.
const LIMIT: Duration = Duration::from_secs(180);
/// An agent writes the last word down a moment after the source is free.
const LAST_WORD: Duration = Duration::from_secs(30);

/// All by `sterna migrate --detach`, one command after the other without a wait between them.
pub(crate) fn ours(
    stage: &Stage,
    vms: &mut [OurVm],
    order: &ours::Order,
) -> Result<(Move, Vec<Said>), BenchError> {
    by(stage, vms, |vms| vms.iter().try_for_each(|vm| vm.begin(stage, order)))
}

/// All by one `sterna migrate --detach`: what they have in common travels once.
pub(crate) fn gang(
    stage: &Stage,
    vms: &mut [OurVm],
    order: &ours::Order,
) -> Result<(Move, Vec<Said>), BenchError> {
    by(stage, vms, |vms| ours::begin_together(stage, vms, order))
}

fn by(
    stage: &Stage,
    vms: &mut [OurVm],
    begin: impl FnOnce(&[OurVm]) -> Result<(), BenchError>,
) -> Result<(Move, Vec<Said>), BenchError> {
    let way = vms.first().map_or(Way::There, |vm| vm.way);
    let (from, to) = stage.agents(way);
    let sources = vms.iter().map(|vm| from.qemu(&vm.name)).collect::<Result<Vec<_>, _>>()?;
    let mut meter = Meter::default();
    sources.iter().copied().chain([from.process(), to.process()]).for_each(|p| meter.watch(p));
    let (wire, load_before, window) = (stage.wire_bytes(way)?, load_average(), Window::open());
    let began = Instant::now();
    begin(vms)?;
    wait_free(&sources, &mut meter)?;
    let total = began.elapsed();
    let window = window.close();
    let mut said = Vec::new();
    for vm in vms.iter_mut() {
        said.push(last_word(stage, vm)?);
        vm.way = way.turned();
        meter.watch_whole(to.qemu(&vm.name)?);
    }
    meter.sample();
    let wire = wire.until(stage.wire_bytes(way)?);
    let figures = Figures::default()
        .with(Metric::TotalTime, total.as_secs_f64() * 1e3)
        .with(Metric::Downtime, said.iter().filter_map(|s| s.downtime).fold(f64::NAN, f64::max))
        .with(Metric::WireBytes, (wire.sent + wire.received) as f64 / 1e6)
        .with(Metric::Cpu, meter.seconds());
    let report = serde_json::to_value(&said).unwrap_or_default();
    Ok((Move { figures, window, load_before, report, ..Move::default() }, said))
}

/// All of them with their RAM compared, untimed.
pub(crate) fn verify(stage: &Stage, vms: &mut [OurVm]) -> Verified {
    proof(ours(stage, vms, &ours::Order::with(&["--verify"])))
}

/// The same as one command.
pub(crate) fn verify_gang(stage: &Stage, vms: &mut [OurVm], order: &ours::Order) -> Verified {
    proof(gang(stage, vms, order))
}

fn proof(moved: Result<(Move, Vec<Said>), BenchError>) -> Verified {
    match moved {
        Ok((moved, said)) => {
            let unproved = said.iter().find(|s| s.blocks_verified.is_none_or(|b| b == 0));
            Verified {
                blocks: said.iter().filter_map(|s| s.blocks_verified).sum(),
                total_time_ms: moved.figures.get(Metric::TotalTime).unwrap_or_default(),
                error: unproved.map(|s| format!("nothing was compared in {}", s.id)),
            }
        }
        Err(why) => Verified { error: Some(why.to_string()), ..Verified::default() },
    }
}

/// All by QEMU's own migration, side by side: each is set off and followed by a thread of its own.
pub(crate) fn stock(stage: &Stage, vms: &mut [StockVm], order: stock::Order) -> Result<Move, BenchError> {
    let way = vms.first().map_or(Way::There, |vm| vm.way);
    let (wire, load_before, window) = (stage.wire_bytes(way)?, load_average(), Window::open());
    let began = Instant::now();
    let moves = std::thread::scope(|scope| {
        let threads: Vec<_> =
            vms.iter_mut().map(|vm| scope.spawn(move || vm.migrate(stage, order))).collect();
        let joined = threads.into_iter().map(|t| {
            t.join().unwrap_or_else(|_| Err(BenchError::unexpected("a thread that moves a VM", "panicked")))
        });
        joined.collect::<Result<Vec<Move>, BenchError>>()
    })?;
    let total = began.elapsed();
    let window = window.close();
    let wire = wire.until(stage.wire_bytes(way)?);
    let all = |metric| moves.iter().filter_map(move |m: &Move| m.figures.get(metric));
    let figures = Figures::default()
        .with(Metric::TotalTime, total.as_secs_f64() * 1e3)
        .with(Metric::Downtime, all(Metric::Downtime).fold(f64::NAN, f64::max))
        .with(Metric::WireBytes, (wire.sent + wire.received) as f64 / 1e6)
        .with(Metric::Cpu, all(Metric::Cpu).sum());
    let report = moves.iter().map(|m| m.report.clone()).collect();
    Ok(Move { figures, window, load_before, report, ..Move::default() })
}

fn wait_free(sources: &[ProcessId], meter: &mut Meter) -> Result<(), BenchError> {
    let end = Instant::now() + LIMIT;
    while sources.iter().any(|s| s.is_alive()) {
        meter.sample();
        if Instant::now() >= end {
            return Err(BenchError::Deadline {
                what: format!("{} VMs together", sources.len()),
                limit: LIMIT,
            });
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn last_word(stage: &Stage, vm: &OurVm) -> Result<Said, BenchError> {
    let end = Instant::now() + LAST_WORD;
    loop {
        let text = stage.agents(vm.way).0.status(&vm.name)?;
        let said = ours::parsed(&text)?;
        match said.status.as_str() {
            "completed" => return Ok(said),
            _ if Instant::now() >= end => {
                return Err(BenchError::unexpected(format!("the migration of {}", vm.name), text));
            }
            _ => std::thread::sleep(LOOK),
        }
    }
}
