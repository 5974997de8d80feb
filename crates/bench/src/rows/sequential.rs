//! Row 7: a guest that writes its memory in order, faster than the link carries it, while it is fetched. It keeps its rate: one that made up for
//! each wait would be blocked for as long as the link takes, whoever pages it.

use super::Run;
use super::fetched::{self, PEERS, Writer};
use super::idle::LINK_BYTES_PER_MS;
use crate::BenchError;
use crate::figures::Metric;
use crate::results::{Case, Goal, Limit, RowResult};
use crate::wishes::Wish;

const GUEST: Writer =
    Writer { memory_mib: 512, working_set_mib: 128, rate_mb: 200, mode: "sequential", steady: true };

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let granted = run.abilities.grant(&[Wish::Postcopy]);
    if let Some(lack) = granted.lack() {
        return Ok(RowResult { not_run: Some(lack), ..RowResult::default() });
    }
    let mut case = fetched::case(run, &granted, &GUEST)?;
    case.limits.push(Limit {
        metric: Metric::BlockedTime,
        value: least_blocked_ms(&GUEST),
        text: "the written part / link, less the time in which it is written".to_owned(),
    });
    let goals = vec![Goal::at_most("guest blocked, ours / the better stock post-copy's", share(&case), 0.65)];
    Ok(RowResult { cases: vec![case], goals, notes: fetched::notes(&granted), ..RowResult::default() })
}

/// What is written once around cannot come faster than the link carries it.
fn least_blocked_ms(guest: &Writer) -> f64 {
    let bytes = f64::from(guest.working_set_mib) * f64::from(1 << 20);
    bytes / LINK_BYTES_PER_MS - bytes / (f64::from(guest.rate_mb) * 1e3)
}

/// For how long ours is blocked, as a part of what the best of the peers needs.
fn share(case: &Case) -> f64 {
    let peers = (0..PEERS.len()).map(|peer| case.ratio(Metric::BlockedTime, peer));
    peers.fold(f64::NAN, f64::max)
}

#[cfg(test)]
mod tests {
    use super::super::fetched::tests::{case_of, moved};
    use super::*;

    #[test]
    fn the_better_peer_counts_and_one_that_tells_nothing_does_not() {
        let blocked = |ms| moved(&[(Metric::BlockedTime, ms)], 9);
        assert_eq!(share(&case_of(vec![blocked(500.0), blocked(1000.0), blocked(800.0)])), 0.625);
        assert_eq!(share(&case_of(vec![blocked(500.0), moved(&[], 9), blocked(1000.0)])), 0.5);
        assert!(share(&case_of(vec![blocked(500.0)])).is_nan());
    }

    #[test]
    fn the_link_lags_behind_the_writer() {
        assert_eq!(least_blocked_ms(&GUEST).round(), 451.0);
    }
}
