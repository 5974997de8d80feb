//! Row 1: an idle guest moves; nothing but its memory and the link decide.

use sterna_lab::GuestSpec;

use super::Run;
use crate::BenchError;
use crate::contest::{Contest, Terms};
use crate::figures::Metric;
use crate::load;
use crate::results::{Case, Goal, Limit, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;

/// RAM of the guest.
pub(super) const MEMORY_MIB: u32 = 512;
/// What TCP carries over a link of 1 Gbit/s, headers not counted, in bytes per millisecond.
pub(super) const LINK_BYTES_PER_MS: f64 = 957e6 / 8.0 / 1e3;

/// A guest that sleeps on filled memory.
pub(super) fn guest(stage: &Stage, name: &str) -> GuestSpec {
    let fill = format!("--fill={}", load::fill_mib(MEMORY_MIB));
    GuestSpec {
        programs: vec![load::memory(&[&fill, "--dirty=0", "--sleep"])],
        ..load::plain(stage, name, MEMORY_MIB)
    }
}

/// The same with a beacon, for a client that watches.
pub(super) fn with_beacon(stage: &Stage, mut guest: GuestSpec) -> GuestSpec {
    guest.nic = Some(load::nic(stage, 0));
    guest.programs.push(load::beacon(stage));
    guest
}

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let clear = case(run, "in the clear", PageStreams::Clear, &[])?;
    let whole =
        case(run, "in the clear, nothing compressed", PageStreams::Clear, &["--compression", "none"])?;
    let encrypted = case(run, "encrypted", PageStreams::Encrypted, &[])?;
    let goals = vec![
        Goal::at_most("total time, ours / stock pre-copy", clear.ratio(Metric::TotalTime, 0), 1.01),
        Goal::at_most("CPU seconds, ours / stock pre-copy", clear.ratio(Metric::Cpu, 0), 0.8),
        Goal::at_most(
            "nothing compressed: total time, ours / stock pre-copy",
            whole.ratio(Metric::TotalTime, 0),
            1.01,
        ),
        Goal::at_most(
            "nothing compressed: CPU seconds, ours / stock pre-copy",
            whole.ratio(Metric::Cpu, 0),
            0.8,
        ),
        Goal::at_most(
            "encrypted: total time, ours / stock pre-copy",
            encrypted.ratio(Metric::TotalTime, 0),
            1.01,
        ),
    ];
    let notes = vec![
        "Total time includes the start of the target's QEMU on both sides, and for ours the pre-check, TLS and the attach."
            .to_owned(),
        "Stock QEMU encrypts and compresses nothing; like is compared with like in the case `in the clear, nothing compressed`. When nothing is \
         said, ours encrypts, and compresses where pages arrive sooner by that."
            .to_owned(),
        "CPU seconds are those of processes. Around a stop, for milliseconds, ours has idle processors wait awake, which no process is charged for."
            .to_owned(),
        "The blackout is of one more move each, of a guest that sends a datagram every millisecond: work, to an idle one."
            .to_owned(),
    ];
    Ok(RowResult { cases: vec![clear, whole, encrypted], goals, notes, ..RowResult::default() })
}

fn case(run: &Run<'_>, name: &str, streams: PageStreams, options: &[&str]) -> Result<Case, BenchError> {
    run.tell(name);
    let stage = Stage::up(run.kit, Link::Gigabit, streams, 1)?;
    let guest = |name: &str, _| guest(&stage, name);
    let contest = Contest {
        stage: &stage,
        workload: format!(
            "{MEMORY_MIB} MiB of private RAM, {} of it noise, one vCPU that sleeps, q35 with a serial port",
            load::fill_mib(MEMORY_MIB)
        ),
        guest: &guest,
        peers: match (streams, run.extent.quick) {
            (PageStreams::Clear, false) if options.is_empty() => &[StockWay::Precopy, StockWay::Multifd],
            _ => &[StockWay::Precopy],
        },
        terms: Terms {
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Terms::default()
        },
    };
    let mut case = contest.idle(run, run.extent.pairs)?;
    let watched = |name: &str, _| with_beacon(&stage, self::guest(&stage, name));
    let contest = Contest { guest: &watched, peers: &[StockWay::Precopy], ..contest };
    if options.is_empty() {
        contest.watched(run, &mut case)?;
    }
    case.limits.extend(limit(&case));
    case.name = name.to_owned();
    stage.lab.down()?;
    Ok(case)
}

/// The pages that stock QEMU had to send as bytes, at the speed of the link. It compresses nothing, so that no compression can
/// be mistaken for a fast link; what ours saves by it may go below.
pub(super) fn limit(case: &Case) -> Option<Limit> {
    let last =
        case.peers().first()?.moves.iter().rev().find(|m| m.figures.get(Metric::TotalTime).is_some())?;
    let pages = last.report.pointer("/ram/normal")?.as_f64()?;
    let value = pages * 4096.0 / LINK_BYTES_PER_MS;
    Some(Limit {
        metric: Metric::TotalTime,
        value,
        text: "pages that are not zero / link (957 Mbit/s)".to_owned(),
    })
}

/// The same for a guest that writes: what a peer sent in its first round. What is written meanwhile need not travel, in theory.
pub(super) fn limit_once(case: &Case) -> Option<Limit> {
    let mut moves = case.peers().iter().flat_map(|c| &c.moves);
    let bytes = moves.find_map(|m| m.progress.iter().find(|p| p.rounds > 1).map(|p| p.transferred))?;
    Some(Limit {
        metric: Metric::TotalTime,
        value: bytes as f64 / LINK_BYTES_PER_MS,
        text: "stock QEMU's first round / link (957 Mbit/s)".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Point;
    use crate::results::{Contender, Move};

    #[test]
    fn the_limit_of_a_guest_that_writes_is_the_first_round_of_whoever_got_through() {
        let point = |transferred, rounds| Point { ms: 0.0, transferred, remaining: 0, rounds };
        let progress = vec![point(5, 1), point(119_625_000, 2), point(400_000_000, 3)];
        let through = Contender { moves: vec![Move { progress, ..Move::default() }], ..Contender::default() };
        let case = Case {
            contenders: vec![Contender::named("ours"), Contender::named("stock pre-copy"), through],
            ..Case::default()
        };
        assert_eq!(limit_once(&case).unwrap().value, 1000.0);
        assert!(limit_once(&Case::default()).is_none());
    }
}
