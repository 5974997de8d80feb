//! Whether `max-bandwidth` is kept: moves with a limit, there and back, and what they used.

use super::Run;
use crate::BenchError;
use crate::figures::Metric;
use crate::load::{self, Seen};
use crate::ours::{Order, OurVm, Progress};
use crate::results::{Case, Contender, Goal, Limit, Move, RowResult, fastest_mbps};
use crate::stage::{Link, PageStreams, Stage};

/// How far from the limit a migration may be, as a part of it.
const DEVIATION_MAX: f64 = 0.05;
/// The limits, in MiB/s: a quarter and two thirds of what the link carries.
const LIMITS_MIB: &[u32] = &[28, 76];

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 1)?;
    run.tell("a guest boots on host a and fills its Redis");
    let mut vm = OurVm::boot(&stage, &load::server(&stage, "vm"), 0)?;
    load::fill(&stage, 0)?;
    let client = load::watch(&stage, 0)?;
    let limits = if run.extent.quick { &LIMITS_MIB[LIMITS_MIB.len() - 1..] } else { LIMITS_MIB };
    let mut cases = Vec::new();
    for limit in limits {
        run.tell(&format!("sterna migrate vm --bandwidth {limit}MiB/s"));
        let order = Order::with(&["--bandwidth", &format!("{limit}MiB/s")]);
        let (moved, said) = vm.migrate(&stage, &order, Progress::Sampled)?;
        let sending_ms = said.total_time - said.setup_time;
        cases.push(case(*limit, moved, sending_ms));
    }
    if let Some(last) =
        cases.last_mut().and_then(|c| c.contenders.first_mut()).and_then(|c| c.moves.last_mut())
    {
        last.client = Some(Seen::of(client.finish()?, last.window)?);
    }
    stage.lab.down()?;
    let goals = cases.iter().flat_map(goals).collect();
    Ok(RowResult { cases, goals, ..RowResult::default() })
}

fn mbps(limit_mib: u32) -> f64 {
    f64::from(limit_mib) * f64::from(1 << 20) * 8.0 / 1e6
}

fn case(limit_mib: u32, mut moved: Move, sending_ms: f64) -> Case {
    let wire = moved.figures.get(Metric::WireBytes).unwrap_or(f64::NAN);
    moved.figures.set(Metric::Bandwidth, wire * 8.0 * 1e3 / sending_ms);
    moved.figures.set(Metric::FastestSecond, fastest_mbps(&moved.progress));
    let text = "the limit that was asked for".to_owned();
    Case {
        name: format!("{:.0} Mbit/s", mbps(limit_mib)),
        workload: "the demo's guest, which a client writes to".to_owned(),
        contenders: vec![Contender { moves: vec![moved], ..Contender::named("ours") }],
        limits: vec![Limit { metric: Metric::Bandwidth, value: mbps(limit_mib), text }],
        ..Case::default()
    }
}

/// Judged on the link, and second by second: a limit that is kept on average only would still drown its neighbours.
fn goals(case: &Case) -> [Goal; 2] {
    let limit = case.limits.first().map_or(f64::NAN, |l| l.value);
    let distance = (case.value(Metric::Bandwidth) / limit - 1.0).abs();
    let fastest = case.value(Metric::FastestSecond) / limit;
    [
        Goal::at_most(
            &format!("{}: distance from the limit on the link", case.name),
            distance,
            DEVIATION_MAX,
        ),
        Goal::at_most(&format!("{}: fastest second / limit", case.name), fastest, 1.0 + DEVIATION_MAX),
    ]
}
