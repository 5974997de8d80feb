//! For how long post-copy stops a guest, whatever its size: nothing of its memory travels before it runs at the target.

use sterna_lab::GuestSpec;

use super::{Run, fetched, growth, idle};
use crate::contest::{Contest, Terms};
use crate::figures::Metric;
use crate::results::{Case, Goal, Limit, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;
use crate::wishes::{Granted, Wish};
use crate::{BenchError, load};

/// Sizes of idle guests, in MiB, one after the other. In a quick run only the first.
const SIZES_MIB: &[u32] = &[512, 2048, 4096];
/// Up to this size stock QEMU's post-copy is moved beside ours, and a client watches: longer moves of it say nothing more.
const PEER_MIB_MAX: u32 = 512;
const DOWNTIME_MS: f64 = 10.0;
/// As in row 2, of the same devices.
const LIMIT_MS: f64 = 2.0;

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let granted = run.abilities.grant(&[Wish::Postcopy]);
    if let Some(lack) = granted.lack() {
        return Ok(RowResult { not_run: Some(lack), ..RowResult::default() });
    }
    run.tell(&granted.note());
    let mut notes = vec![granted.note(), fetched::DOWNTIME_NOTE.to_owned()];
    let (mut cases, mut goals) = (Vec::new(), Vec::new());
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 2)?;
    for &memory_mib in &SIZES_MIB[..if run.extent.quick { 1 } else { SIZES_MIB.len() }] {
        let case = match growth::lacking_mib(memory_mib) {
            None => size(run, &stage, &granted, memory_mib)?,
            Some(why) => {
                notes.push(why);
                Case::default()
            }
        };
        goals.push(goal(memory_mib, &case));
        cases.extend(Some(case).filter(|c| !c.contenders.is_empty()));
    }
    stage.lab.down()?;
    Ok(RowResult { cases, goals, notes, ..RowResult::default() })
}

fn size(run: &Run<'_>, stage: &Stage, granted: &Granted, memory_mib: u32) -> Result<Case, BenchError> {
    run.tell(&format!("an idle guest of {memory_mib} MiB"));
    let guest = |vm: &str, _| guest(stage, vm, memory_mib);
    let has_peer = memory_mib <= PEER_MIB_MAX;
    let contest = Contest {
        stage,
        workload: format!(
            "an idle guest of {memory_mib} MiB, {} of it noise, q35 with a serial port; post-copy at once",
            load::fill_mib(memory_mib)
        ),
        guest: &guest,
        peers: if has_peer { &[StockWay::Postcopy] } else { &[] },
        terms: Terms { options: granted.order.options.clone(), ..Terms::default() },
    };
    let mut case = contest.idle(run, run.extent.pairs)?;
    if has_peer {
        let watched = |vm: &str, tap| idle::with_beacon(stage, guest(vm, tap));
        Contest { guest: &watched, ..contest }.watched(run, &mut case)?;
    }
    let text = "stop, save, load and cont of QEMU alone".to_owned();
    case.limits = fetched::limits(&case);
    case.limits.push(Limit { metric: Metric::Downtime, value: LIMIT_MS, text });
    Ok(Case { name: format!("{memory_mib} MiB"), ..case })
}

/// A guest that sleeps on filled memory. Those of each size have names of their own, and with them consoles.
fn guest(stage: &Stage, vm: &str, memory_mib: u32) -> GuestSpec {
    let fill = format!("--fill={}", load::fill_mib(memory_mib));
    GuestSpec {
        programs: vec![load::memory(&[&fill, "--dirty=0", "--sleep"])],
        ..load::plain(stage, &format!("post{memory_mib}-{vm}"), memory_mib)
    }
}

fn goal(memory_mib: u32, case: &Case) -> Goal {
    Goal::at_most(
        &format!("{memory_mib} MiB: downtime, ms, median"),
        case.value(Metric::Downtime),
        DOWNTIME_MS,
    )
}

#[cfg(test)]
mod tests {
    use super::super::fetched::tests::{case_of, moved};
    use super::*;

    #[test]
    fn a_size_that_did_not_run_meets_no_goal() {
        assert!(goal(512, &case_of(vec![moved(&[(Metric::Downtime, 9.0)], 9)])).met);
        let missed = goal(4096, &Case::default());
        assert!(!missed.met && missed.text.starts_with("4096 MiB"));
    }
}
