//! Row 6: how long a guest waits for a page that it touches before that has come, where nothing tells which it will be.

use super::Run;
use super::fetched::{self, PREEMPT, Writer};
use crate::BenchError;
use crate::figures::Metric;
use crate::results::{Case, Goal, Limit, RowResult};
use crate::wishes::Wish;

const GUEST: Writer =
    Writer { memory_mib: 512, working_set_mib: 256, rate_mb: 20, mode: "random", steady: false };
/// What a fault costs at least.
const LIMIT_US: f64 = 65.0;

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let granted = run.abilities.grant(&[Wish::Postcopy]);
    if let Some(lack) = granted.lack() {
        return Ok(RowResult { not_run: Some(lack), ..RowResult::default() });
    }
    let mut case = fetched::case(run, &granted, &GUEST)?;
    let text = "a page that nothing is before on the link: 65 to 106 us".to_owned();
    case.limits.push(Limit { metric: Metric::BlockedPerFault, value: LIMIT_US, text });
    let goals = goals(&case);
    Ok(RowResult { cases: vec![case], goals, notes: fetched::notes(&granted), ..RowResult::default() })
}

fn goals(case: &Case) -> Vec<Goal> {
    vec![
        Goal::at_most(
            "blocked for each fault, ours / stock preempt",
            case.ratio(Metric::BlockedPerFault, PREEMPT),
            0.10,
        ),
        Goal::at_most("fault latency, us, 99 of 100", case.value(Metric::FaultP99), 1000.0),
        Goal::at_most("total time, ours / stock preempt", case.ratio(Metric::TotalTime, PREEMPT), 1.02),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::fetched::tests::{case_of, moved};
    use super::*;

    #[test]
    fn like_is_compared_with_like_and_with_the_better_peer() {
        let one = |total, blocked| {
            moved(
                &[(Metric::TotalTime, total), (Metric::BlockedPerFault, blocked), (Metric::FaultMean, 1.0)],
                9,
            )
        };
        let case = case_of(vec![one(4400.0, 420.0), one(5000.0, 16_000.0), one(4400.0, 4200.0)]);
        let goals = goals(&case);
        assert_eq!(goals.iter().map(|g| g.met).collect::<Vec<_>>(), [true, false, true]);
        assert!((goals[0].value - 0.1).abs() < 1e-9 && goals[1].value.is_nan());
    }
}
