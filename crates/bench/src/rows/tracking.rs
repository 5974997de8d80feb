//! Row 18: what it costs a guest that its writes are tracked.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use sterna_lab::{GuestSpec, run};

use super::Run;
use crate::BenchError;
use crate::figures::{Figures, Metric, Summary};
use crate::load;
use crate::ours::{Order, OurVm};
use crate::results::{Case, Contender, Goal, Limit, Move, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::{self, StockVm, StockWay};

/// The probe takes some seconds.
const PROBE: Duration = Duration::from_secs(120);
/// RAM of the guest.
const MEMORY_MIB: u32 = 384;
/// How long a guest is watched before it is tracked, and while it is.
const WATCHED: Duration = Duration::from_secs(8);
const WATCHED_QUICK: Duration = Duration::from_secs(4);
/// The guest's writes, in MB/s.
const WRITES_MB: f64 = 100.0;
/// So slow that a round takes a second or two and no end is in sight.
const BANDWIDTH_MIB: u32 = 48;
/// The kernel's fault that marks a page as written, seen here.
const LIMIT_US: f64 = 0.7;

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    run.tell("a process whose writes are tracked");
    let probe = probe(run)?;
    let cases = ["private", "shared"].map(|kind| of_probe(&probe, kind));
    let guest = guest(run)?;
    let [private, shared] = &cases;
    let per_cent = |case: &Case| case.value(Metric::FirstWrite) * WRITES_MB * 1e6 / 4096.0 / 1e6 * 100.0;
    let huge = probe.pointer("/huge/clean_scan_ms_per_gib").and_then(Value::as_f64).unwrap_or(f64::NAN);
    let of_stock = guest.peers().first().map_or(f64::NAN, |stock| stock.median(Metric::Slowdown));
    let goals = vec![
        Goal::at_most("private: a first write, us", private.value(Metric::FirstWrite), 0.9),
        Goal::at_most("shared: a first write, us", shared.value(Metric::FirstWrite), 1.1),
        Goal::at_most(
            "private: 100 MB/s, each page written for the first time, % of a CPU",
            per_cent(private),
            2.5,
        ),
        Goal::at_most("private: scan of a clean GiB, ms", private.value(Metric::CleanScan), 2.0),
        Goal::at_most("huge pages: scan of a clean GiB, ms", huge, 0.2),
        // Both may be nothing, or less than that by noise: their ratio would say anything.
        Goal::at_most(
            "guest: slowdown, ours less stock's, % of its speed",
            guest.value(Metric::Slowdown) - of_stock,
            0.0,
        ),
    ];
    let notes = vec![
        "The guest's counter also loses what senders and the network take of the two cores: with ours and with stock QEMU \
         at the same bandwidth. Its noise here is large; the cost of a write is the exact figure."
            .to_owned(),
    ];
    let [private, shared] = cases;
    Ok(RowResult { cases: vec![private, shared, guest], goals, notes, ..RowResult::default() })
}

/// What the probe, a process that writes memory and is tracked, says as JSON.
fn probe(run: &Run<'_>) -> Result<Value, BenchError> {
    let text = run::output(&mut Command::new(&run.kit.tracking), PROBE)?;
    serde_json::from_str(&text).map_err(|e| BenchError::unexpected(format!("the probe's output ({e})"), text))
}

fn of_probe(probe: &Value, kind: &str) -> Case {
    let said =
        |what: &str| probe.pointer(&format!("/{kind}/{what}")).and_then(Value::as_f64).unwrap_or(f64::NAN);
    let figures = Figures::default()
        .with(Metric::FirstWrite, said("first_write_us"))
        .with(Metric::CleanScan, said("clean_scan_ms_per_gib"));
    let moved = Move { figures, report: probe.clone(), ..Move::default() };
    let text = "the kernel's own fault".to_owned();
    Case {
        name: kind.to_owned(),
        workload: format!("a process that writes each page of {kind} memory"),
        contenders: vec![Contender { moves: vec![moved], ..Contender::named("ours") }],
        limits: vec![Limit { metric: Metric::FirstWrite, value: LIMIT_US, text }],
        ..Case::default()
    }
}

/// A guest that writes and counts, watched alone and while it is migrated too slowly to end.
fn guest(run: &Run<'_>) -> Result<Case, BenchError> {
    // Nor does stock QEMU encrypt or compress: that is not what is asked here.
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Clear, 1)?;
    let (mut ours, mut stock) = (Contender::named("ours"), Contender::named(StockWay::Precopy.name()));
    let watched = if run.extent.quick { WATCHED_QUICK } else { WATCHED };
    for pair in 1..=run.extent.pairs {
        run.tell(&format!("a guest that writes and counts, pair {pair} of {}", run.extent.pairs));
        ours.moves.push(ours_watched(&stage, &spec(&stage, &format!("ours{pair}")), watched)?);
        stock.moves.push(stock_watched(&stage, &spec(&stage, &format!("stock{pair}")), watched)?);
    }
    stage.lab.down()?;
    Ok(Case {
        name: "guest".to_owned(),
        workload: format!(
            "{MEMORY_MIB} MiB, a guest that writes 96 MiB at {WRITES_MB} MB/s and counts, migrated at {BANDWIDTH_MIB} MiB/s for a while, in the clear, nothing compressed"
        ),
        contenders: vec![ours, stock],
        ..Case::default()
    })
}

fn spec(stage: &Stage, name: &str) -> GuestSpec {
    let programs = vec![load::memory(&["--fill=128", "--dirty=96", "--rate=100", "--spin"])];
    GuestSpec { programs, ..load::plain(stage, name, MEMORY_MIB) }
}

fn ours_watched(stage: &Stage, guest: &GuestSpec, watched: Duration) -> Result<Move, BenchError> {
    let vm = OurVm::boot(stage, guest, 0)?;
    let console = || vm.console(stage);
    let before = loops_during(watched, console);
    // What is tracked is what costs: the move must not come to its end meanwhile, as it may where only what has changed goes.
    let bandwidth = format!("{BANDWIDTH_MIB}MiB/s");
    let endless = ["--bandwidth", &bandwidth, "--timeout", "600", "--max-downtime", "1"];
    let plain = ["--delta-cache", "0", "--compression", "none"];
    vm.begin(stage, &Order::with(&[&endless[..], &plain].concat()))?;
    let during = loops_during(watched, console);
    vm.abort(stage)?;
    vm.stop(stage)?;
    Ok(slowdown(before, during))
}

fn stock_watched(stage: &Stage, guest: &GuestSpec, watched: Duration) -> Result<Move, BenchError> {
    let mut vm = StockVm::boot(stage, guest, 0)?;
    let before = loops_during(watched, || vm.console());
    let mut target = vm.waiting(stage)?;
    let bandwidth = Some(u64::from(BANDWIDTH_MIB) << 20);
    vm.begin(stage, &mut target, stock::Order { bandwidth, ..stock::Order::of(StockWay::Precopy) })?;
    let during = loops_during(watched, || vm.console());
    Ok(slowdown(before, during))
}

fn slowdown(before: f64, during: f64) -> Move {
    let figures = Figures::default().with(Metric::Slowdown, (1.0 - during / before) * 100.0);
    Move { figures, report: serde_json::json!({ "before": before, "during": during }), ..Move::default() }
}

/// The median of what the guest counted in each second of a stretch of time; NaN if it told nothing.
fn loops_during(time: Duration, console: impl Fn() -> String) -> f64 {
    let seen = console().len();
    std::thread::sleep(time);
    let text = console();
    Summary::of(loops(text.get(seen..).unwrap_or_default())).map_or(f64::NAN, |s| s.median)
}

/// The counts in the lines of the load, without the first and the last, which may be cut.
fn loops(text: &str) -> Vec<f64> {
    let lines: Vec<&str> = text.lines().collect();
    let whole = lines.get(1..lines.len().saturating_sub(1)).unwrap_or_default();
    let count = |line: &&str| line.split_once("loops=")?.1.split_whitespace().next()?.parse().ok();
    whole.iter().filter_map(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_of_the_load_are_counted() {
        let text = "ops=7 bad=0\nLOAD t=1 pages=5 mbps=1.0 loops=10 bad=0\nnoise\nLOAD t=2 loops=12 bad=0\nLOAD t=3 loo";
        assert_eq!(loops(text), [10.0, 12.0]);
    }

    #[test]
    fn a_guest_that_told_nothing_has_no_slowdown() {
        assert_eq!(slowdown(f64::NAN, 1.0).figures.get(Metric::Slowdown), None);
        assert_eq!(slowdown(100.0, 97.0).figures.get(Metric::Slowdown).map(f64::round), Some(3.0));
    }
}
