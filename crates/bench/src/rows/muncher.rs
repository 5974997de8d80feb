//! Row 4: MMuncher, a guest that writes more than the link carries: by pre-copy and then post-copy (a), and by pre-copy that holds it
//! up (b).

use std::time::Duration;

use serde_json::Value;
use sterna_lab::GuestSpec;

use super::{Run, fetched, idle};
use crate::contest::{Contest, Terms};
use crate::figures::{Metric, Summary};
use crate::results::{Case, Goal, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;
use crate::wishes::{Granted, Wish};
use crate::{BenchError, load, waits};

const MEMORY_MIB: u32 = 512;
const WORKING_SET_MIB: u32 = 128;
const RATE_MB: u32 = 200;
/// Who has not ended by then never will.
const NO_END: Duration = Duration::from_secs(40);
/// The same in a quick run.
const NO_END_QUICK: Duration = Duration::from_secs(8);
/// The downtime limit of all: what the goal of pre-copy allows.
const DOWNTIME_LIMIT_MS: u64 = 50;

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 1)?;
    let lazy = run.abilities.grant(&[Wish::PostcopyAfterPrecopy]);
    let stunned = run.abilities.grant(&[Wish::AutoConverge]);
    let (a, note) = match lazy.lack() {
        None => (hybrid(run, &stage, &lazy)?, lazy.note()),
        // Without it, it would be a pre-copy that never ends.
        Some(lack) => (Case::default(), format!("not run: {lack}")),
    };
    let limit = if run.extent.quick { NO_END_QUICK } else { NO_END };
    let b = stun(run, &stage, &stunned, limit)?;
    stage.lab.down()?;
    let goals = goals(&a, &b);
    let notes = vec![
        format!("a: {note}"),
        "a: RAM is the pages that the guest has: the fewest that stock post-copy sent as bytes in any of its moves, of 4096 bytes. It \
         sends each once, but for those that went before it was told to switch, at most 20 ms long. On the wire is all that the link \
         carried, both ways, headers and requests included; ours compresses what can be compressed, which noise cannot."
            .to_owned(),
        format!("a: {}", waits::NOTE),
        format!("a: {}", fetched::DOWNTIME_NOTE),
        format!("b: {}", stunned.note()),
        format!(
            "b: Who has not got through after {} s is cancelled, and its guest runs on. Plain pre-copy does not end: more is written \
             than the link carries. Auto-converge has cpu-throttle-initial 20, cpu-throttle-increment 10 and max-cpu-throttle 99, \
             QEMU's documented defaults.",
            limit.as_secs()
        ),
    ];
    let cases = [a, b].into_iter().filter(|c| !c.contenders.is_empty()).collect();
    Ok(RowResult { cases, goals, notes, ..RowResult::default() })
}

/// a: everything goes once, and what was written meanwhile is fetched.
fn hybrid(run: &Run<'_>, stage: &Stage, granted: &Granted) -> Result<Case, BenchError> {
    run.tell(&granted.note());
    let guest = |name: &str, _| guest(stage, &format!("hybrid-{name}"));
    // From the switch on nobody can be cancelled: there is no limit.
    let terms = Terms {
        options: granted.order.options.clone(),
        downtime_limit_ms: Some(DOWNTIME_LIMIT_MS),
        is_counted: true,
        ..Terms::default()
    };
    let contest = Contest { stage, workload: workload(), guest: &guest, peers: fetched::PEERS, terms };
    let case = contest.busy(run, run.extent.pairs)?;
    let (limits, beside) = (fetched::limits(&case), pages(&case).into_iter().collect());
    Ok(Case { name: "hybrid".to_owned(), limits, beside, ..case })
}

/// b: it is held up until what it writes can be sent.
fn stun(run: &Run<'_>, stage: &Stage, granted: &Granted, limit: Duration) -> Result<Case, BenchError> {
    run.tell(&granted.note());
    let guest = |name: &str, _| guest(stage, &format!("stun-{name}"));
    let terms = Terms {
        options: granted.order.options.clone(),
        downtime_limit_ms: Some(DOWNTIME_LIMIT_MS),
        limit: Some(limit),
        ..Terms::default()
    };
    let peers = &[StockWay::Precopy, StockWay::AutoConverge];
    let contest = Contest { stage, workload: workload(), guest: &guest, peers, terms };
    let case = contest.busy(run, run.extent.pairs)?;
    let limits = idle::limit_once(&case).into_iter().collect();
    Ok(Case { name: "stun".to_owned(), limits, ..case })
}

fn workload() -> String {
    format!(
        "{MEMORY_MIB} MiB, {} of it noise, {WORKING_SET_MIB} MiB of that written over and over at {RATE_MB} MB/s, one vCPU; \
         downtime limit {DOWNTIME_LIMIT_MS} ms for all",
        load::fill_mib(MEMORY_MIB)
    )
}

fn guest(stage: &Stage, name: &str) -> GuestSpec {
    load::writer(stage, name, MEMORY_MIB, (WORKING_SET_MIB, RATE_MB), &[])
}

/// How many pages ours sent: whether each went once, whatever compression made of them.
fn pages(case: &Case) -> Option<String> {
    let sent = |m: &crate::results::Move| m.report.pointer("/ram/normal").and_then(Value::as_f64);
    let ours = Summary::of(case.ours()?.moves.iter().filter_map(sent))?.median;
    let has = fetched::bytes_once(case)? / 4096.0;
    Some(format!("ours sent {ours:.0} pages as bytes, and the guest has {has:.0}: {:.3} of them", ours / has))
}

/// What ours put on the wire for each byte that the guest has.
fn bytes_for_each(case: &Case) -> f64 {
    fetched::bytes_once(case).map_or(f64::NAN, |bytes| case.value(Metric::WireBytes) * 1e6 / bytes)
}

fn goals(a: &Case, b: &Case) -> Vec<Goal> {
    vec![
        Goal::at_most("a: hybrid, total time, ms", a.value(Metric::TotalTime), 4600.0),
        Goal::at_most("a: hybrid, bytes on the wire / RAM", bytes_for_each(a), 1.03),
        Goal::at_most("a: hybrid, downtime, ms", a.value(Metric::Downtime), 10.0),
        Goal::at_most("b: with stun, total time, ms", b.value(Metric::TotalTime), 6000.0),
        Goal::at_most("b: with stun, downtime, ms", b.value(Metric::Downtime), 50.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::fetched::tests::{case_of, moved};
    use super::*;

    #[test]
    fn bytes_are_counted_against_the_pages_that_the_guest_has() {
        let figures =
            [(Metric::TotalTime, 4400.0), (Metric::Downtime, 4.0), (Metric::WireBytes, 409.6 * 1.02)];
        let case = case_of(vec![moved(&figures, 101_000), moved(&[], 100_500), moved(&[], 100_000)]);
        assert!((bytes_for_each(&case) - 1.02).abs() < 1e-9);
        assert!(pages(&case).unwrap().ends_with("1.010 of them"));
        let met: Vec<bool> = goals(&case, &Case::default()).iter().map(|g| g.met).collect();
        assert_eq!(met, [true, true, true, false, false]);
    }
}
