//! Row 4b: MMuncher, a guest that writes more than the link carries, by pre-copy that holds it up.

use std::time::Duration;

use sterna_lab::GuestSpec;

use super::{Run, idle};
use crate::BenchError;
use crate::contest::{Contest, Terms};
use crate::figures::Metric;
use crate::load;
use crate::results::{Case, Goal, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;
use crate::wishes::Wish;

const MEMORY_MIB: u32 = 512;
const WORKING_SET_MIB: u32 = 128;
const RATE_MB: u32 = 200;
/// Who has not ended by then never will.
const NO_END: Duration = Duration::from_secs(40);
/// The same in a quick run.
const NO_END_QUICK: Duration = Duration::from_secs(8);
/// The downtime limit of all: what the goal allows.
const DOWNTIME_LIMIT_MS: u64 = 50;

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 1)?;
    let granted = run.abilities.grant(&[Wish::AutoConverge]);
    run.tell(&granted.note());
    let limit = if run.extent.quick { NO_END_QUICK } else { NO_END };
    let guest = |name: &str, _| guest(&stage, name);
    let contest = Contest {
        stage: &stage,
        workload: format!(
            "{MEMORY_MIB} MiB, {} of it noise, {WORKING_SET_MIB} MiB of that written over and over at {RATE_MB} MB/s, one vCPU; \
             downtime limit {DOWNTIME_LIMIT_MS} ms for all",
            load::fill_mib(MEMORY_MIB)
        ),
        guest: &guest,
        peers: &[StockWay::Precopy, StockWay::AutoConverge],
        terms: Terms {
            options: granted.order.options.clone(),
            downtime_limit_ms: Some(DOWNTIME_LIMIT_MS),
            limit: Some(limit),
        },
    };
    let case = contest.busy(run, run.extent.pairs)?;
    stage.lab.down()?;
    let limits = idle::limit_once(&case).into_iter().collect();
    let case = Case { name: "stun".to_owned(), limits, ..case };
    let goals = goals(&case);
    let notes = vec![
        granted.note(),
        format!(
            "Who has not got through after {} s is cancelled, and its guest runs on. Plain pre-copy does not end: more is written \
             than the link carries. Auto-converge has cpu-throttle-initial 20, cpu-throttle-increment 10 and max-cpu-throttle 99, \
             QEMU's documented defaults.",
            limit.as_secs()
        ),
        "Row 4a, which leaves the working set to post-copy, is not measured: that mode does not exist yet."
            .to_owned(),
    ];
    Ok(RowResult { cases: vec![case], goals, notes, ..RowResult::default() })
}

fn guest(stage: &Stage, name: &str) -> GuestSpec {
    load::writer(stage, name, MEMORY_MIB, (WORKING_SET_MIB, RATE_MB), &[])
}

fn goals(case: &Case) -> Vec<Goal> {
    vec![
        Goal::at_most("b: with stun, total time, ms", case.value(Metric::TotalTime), 6000.0),
        Goal::at_most("b: with stun, downtime, ms", case.value(Metric::Downtime), 50.0),
    ]
}
