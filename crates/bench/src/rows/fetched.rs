//! Guests that run at the target while their memory comes after them: what the rows of post-copy have in common.

use super::{Run, idle};
use crate::contest::{Contest, Terms};
use crate::figures::Metric;
use crate::results::{Case, Limit};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;
use crate::wishes::Granted;
use crate::{BenchError, load, waits};

/// Against whom, in this order.
pub(super) const PEERS: &[StockWay] = &[StockWay::Postcopy, StockWay::Preempt];
/// The place of the better one among them: faulted pages have a connection of their own.
pub(super) const PREEMPT: usize = 1;

/// What stock QEMU's downtime of a post-copy is.
pub(super) const DOWNTIME_NOTE: &str = "Stock QEMU counts the downtime of a post-copy at the source, until it has sent the devices' state: what the \
     target needs to load it is not in it. Ours counts until the guest runs.";

/// A guest that writes to a part of its memory.
pub(super) struct Writer {
    pub(super) memory_mib: u32,
    pub(super) working_set_mib: u32,
    pub(super) rate_mb: u32,
    /// `random` or `sequential`.
    pub(super) mode: &'static str,
    /// Whether it never writes faster than that; else it makes up for the time in which it waited for a page.
    pub(super) steady: bool,
}

/// Moves it by pure post-copy, in all ways. The guest checks only what it writes, right before: to look at the rest would fetch that.
pub(super) fn case(run: &Run<'_>, granted: &Granted, writer: &Writer) -> Result<Case, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 1)?;
    run.tell(&granted.note());
    let Writer { memory_mib, working_set_mib, rate_mb, mode, steady } = *writer;
    let mode_option = format!("--mode={mode}");
    let (pace, at) = if steady { (Some("--steady"), "at") } else { (None, "at an average of") };
    let guest = |name: &str, _| {
        let load = (working_set_mib, rate_mb);
        let options: Vec<&str> = [&mode_option, "--check=written"].into_iter().chain(pace).collect();
        load::writer(&stage, name, memory_mib, load, &options)
    };
    let contest = Contest {
        stage: &stage,
        workload: format!(
            "{memory_mib} MiB, {} of it noise, {working_set_mib} MiB of that written {at} {rate_mb} MB/s, {mode}, one vCPU; post-copy at once",
            load::fill_mib(memory_mib)
        ),
        guest: &guest,
        peers: PEERS,
        terms: Terms { options: granted.order.options.clone(), is_counted: true, ..Terms::default() },
    };
    let case = contest.busy(run, run.extent.pairs)?;
    stage.lab.down()?;
    Ok(Case { limits: limits(&case), ..case })
}

/// What a reader must know of such rows.
pub(super) fn notes(granted: &Granted) -> Vec<String> {
    let lost = "Work lost is by the guest's own count of what it wrote, as time of its pace before; its clock stands while it is stopped, \
                so that the downtime is not in it.";
    [&granted.note(), waits::NOTE, lost, DOWNTIME_NOTE].map(str::to_owned).into()
}

/// Bytes of the pages that a guest has: the fewest that stock post-copy sent in any of its moves, as bytes and not as zeros. It sends each
/// page once, but for those of the 20 ms until it is told to switch, which may be written again.
pub(super) fn bytes_once(case: &Case) -> Option<f64> {
    let moves = case.peers().iter().flat_map(|c| &c.moves);
    let pages = moves.filter_map(|m| m.report.pointer("/ram/normal")?.as_f64()).filter(|pages| *pages > 0.0);
    pages.reduce(f64::min).map(|pages| pages * 4096.0)
}

/// Each of these pages once.
pub(super) fn limits(case: &Case) -> Vec<Limit> {
    let Some(bytes) = bytes_once(case) else { return Vec::new() };
    let limit = |metric, value, text: &str| Limit { metric, value, text: text.to_owned() };
    vec![
        limit(Metric::TotalTime, bytes / idle::LINK_BYTES_PER_MS, "pages of the guest / link (957 Mbit/s)"),
        limit(Metric::WireBytes, bytes / 1e6, "pages of the guest, each once"),
    ]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::figures::Figures;
    use crate::results::{Contender, Move};
    use serde_json::json;

    /// A move with these figures, in which so many pages were sent as bytes.
    pub(crate) fn moved(figures: &[(Metric, f64)], pages: u64) -> Move {
        let figures =
            figures.iter().fold(Figures::default(), |all, (metric, value)| all.with(*metric, *value));
        Move { figures, report: json!({ "ram": { "normal": pages } }), ..Move::default() }
    }

    /// Ours first.
    pub(crate) fn case_of(moves: Vec<Move>) -> Case {
        let contender = |one: Move| Contender { moves: vec![one], ..Contender::default() };
        Case { contenders: moves.into_iter().map(contender).collect(), ..Case::default() }
    }

    #[test]
    fn the_guests_pages_are_the_fewest_that_a_peer_sent() {
        // What ours sent is not asked, and a peer that tells nothing does not count.
        let case = case_of(vec![moved(&[], 5), moved(&[], 1100), moved(&[], 1000), moved(&[], 0)]);
        assert_eq!(bytes_once(&case), Some(4_096_000.0));
        assert_eq!(
            limits(&case).iter().map(|l| l.metric).collect::<Vec<_>>(),
            [Metric::TotalTime, Metric::WireBytes]
        );
        assert!(limits(&Case::default()).is_empty());
    }
}
