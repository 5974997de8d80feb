//! Row 5: a guest that writes a little of many pages; what changed of them is all that need travel.

use std::time::Duration;

use sterna_lab::GuestSpec;

use super::{Run, idle};
use crate::BenchError;
use crate::contest::{Contest, Terms};
use crate::figures::Metric;
use crate::load;
use crate::results::{Goal, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;
use crate::wishes::Wish;

const MEMORY_MIB: u32 = 512;
const WORKING_SET_MIB: u32 = 128;
const RATE_MB: u32 = 100;
/// Pages as they were sent, for ours and for XBZRLE: all of the guest, so that no working set is too large for it.
const CACHE_MIB: u32 = 512;
/// Stock pre-copy was seen to take 12 s.
const NO_END: Duration = Duration::from_secs(60);
const NO_END_QUICK: Duration = Duration::from_secs(20);

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 1)?;
    let granted = run.abilities.grant(&[Wish::DeltaCache(CACHE_MIB)]);
    run.tell(&granted.note());
    let limit = if run.extent.quick { NO_END_QUICK } else { NO_END };
    let guest = |name: &str, _| guest(&stage, name);
    let contest = Contest {
        stage: &stage,
        workload: format!(
            "{MEMORY_MIB} MiB, {} of it noise; two words of each page of {WORKING_SET_MIB} MiB are written over and over, \
             {RATE_MB} MB of pages a second; one vCPU",
            load::fill_mib(MEMORY_MIB)
        ),
        guest: &guest,
        peers: &[StockWay::Precopy, StockWay::Xbzrle],
        terms: Terms { options: granted.order.options.clone(), limit: Some(limit), ..Terms::default() },
    };
    let mut case = contest.busy(run, run.extent.pairs)?;
    stage.lab.down()?;
    case.limits.extend(idle::limit_once(&case));
    let goals = vec![
        Goal::at_most("total time, ours / stock pre-copy", case.ratio(Metric::TotalTime, 0), 0.40),
        Goal::at_most("total time, ours / stock XBZRLE", case.ratio(Metric::TotalTime, 1), 0.80),
    ];
    let notes = vec![
        granted.note(),
        format!(
            "xbzrle-cache-size is {CACHE_MIB} MiB, as large as the guest: QEMU's default of 64 MiB would not hold the working set. \
             The downtime limit is 300 ms for all; who has not got through after {} s is cancelled.",
            limit.as_secs()
        ),
    ];
    Ok(RowResult { cases: vec![case], goals, notes, ..RowResult::default() })
}

fn guest(stage: &Stage, name: &str) -> GuestSpec {
    load::writer(stage, name, MEMORY_MIB, (WORKING_SET_MIB, RATE_MB), &["--write=sparse"])
}
