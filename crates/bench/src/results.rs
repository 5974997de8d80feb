//! Results as they are written to files: for each row its cases, for each case the contenders, for each of them every raw
//! sample.

use serde::{Deserialize, Serialize};

use crate::facts::HostFacts;
use crate::figures::{Figures, Metric, Point, Span, Summary};
use crate::load::{Seen, Window};

/// One timed move, or one measurement.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Move {
    /// Its figures.
    pub figures: Figures,
    /// How the downtime was spent, where that is known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub downtime_split: Vec<Span>,
    /// What the client saw, where there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<Seen>,
    /// When it was.
    pub window: Window,
    /// How it went on, where that was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub progress: Vec<Point>,
    /// The machine's load average before: others' work shows here.
    pub load_before: f64,
    /// What `sterna migrate` or `query-migrate` said at the end.
    pub report: serde_json::Value,
}

/// Somebody who does what a case asks for: we, or a peer in one of its ways.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Contender {
    /// `ours`, `stock pre-copy`, ...
    pub name: String,
    /// What it did, time after time.
    pub moves: Vec<Move>,
    /// Why it could not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Contender {
    /// One that has done nothing yet.
    #[must_use]
    pub fn named(name: &str) -> Contender {
        Contender { name: name.to_owned(), ..Contender::default() }
    }

    /// Middle and spread of one of its figures.
    #[must_use]
    pub fn summary(&self, metric: Metric) -> Option<Summary> {
        Summary::of(self.moves.iter().filter_map(|m| m.figures.get(metric)))
    }

    /// The median; NaN of what was not measured, which meets no goal.
    #[must_use]
    pub fn median(&self, metric: Metric) -> f64 {
        self.summary(metric).map_or(f64::NAN, |s| s.median)
    }
}

/// The untimed move in which RAM was compared.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Verified {
    /// Blocks of RAM whose digests were equal.
    pub blocks: u32,
    /// How long it took, digests included.
    pub total_time_ms: f64,
    /// What was wrong, if it was not equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Verified {
    /// Whether RAM was proved equal.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.error.is_none() && self.blocks > 0
    }
}

/// What physics allows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// Of which figure.
    pub metric: Metric,
    /// The best that there can be.
    pub value: f64,
    /// Why.
    pub text: String,
}

/// Lines over an axis: how a figure grows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// What it shows.
    pub title: String,
    /// The axis below, with its unit.
    pub x: String,
    /// The axis at the side, with its unit.
    pub y: String,
    /// A name and its points each.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

/// One setting of a row: a guest, a link, and who moves it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Case {
    /// Its name; empty where the row has only one.
    pub name: String,
    /// The guest and what it does.
    pub workload: String,
    /// We first.
    pub contenders: Vec<Contender>,
    /// The comparison of RAM, where something moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
    /// Physical limits.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<Limit>,
    /// Curves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub curves: Vec<Curve>,
    /// What stands beside it: what somebody else saw who did the same.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub beside: Vec<String>,
}

impl Case {
    /// Ours.
    #[must_use]
    pub fn ours(&self) -> Option<&Contender> {
        self.contenders.first()
    }

    /// The others.
    #[must_use]
    pub fn peers(&self) -> &[Contender] {
        self.contenders.get(1..).unwrap_or_default()
    }

    /// Our median; NaN of what was not measured.
    #[must_use]
    pub fn value(&self, metric: Metric) -> f64 {
        self.ours().map_or(f64::NAN, |c| c.median(metric))
    }

    /// Ours / the peer's, of the medians; NaN of what was not measured.
    #[must_use]
    pub fn ratio(&self, metric: Metric, peer: usize) -> f64 {
        self.value(metric) / self.peers().get(peer).map_or(f64::NAN, |c| c.median(metric))
    }

    /// All figures that anybody has, in order.
    #[must_use]
    pub fn metrics(&self) -> Vec<Metric> {
        let all = self.contenders.iter().flat_map(|c| &c.moves).flat_map(|m| m.figures.metrics());
        all.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
    }

    /// Acknowledged writes that were gone, and connections that broke, whoever moved the VM.
    #[must_use]
    pub fn losses(&self) -> (u64, u64) {
        let clients = self.contenders.iter().flat_map(|c| &c.moves).filter_map(|m| m.client.as_ref());
        clients.fold((0, 0), |(lost, broken), c| (lost + c.lost_writes, broken + c.reconnects))
    }
}

/// On which side of a bound a value must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Not above.
    #[default]
    AtMost,
    /// Not below.
    AtLeast,
}

/// Something that shall hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    /// What, in words.
    pub text: String,
    /// What came out. Not there (NaN) when it was not measured.
    #[serde(deserialize_with = "number_or_nothing")]
    pub value: f64,
    /// On which side of the bound it shall be.
    pub side: Side,
    /// The bound.
    pub bound: f64,
    /// Whether it is.
    pub met: bool,
}

/// JSON has no NaN: it is written as `null`.
fn number_or_nothing<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

impl Goal {
    /// That `value` is at most `bound`.
    #[must_use]
    pub fn at_most(text: &str, value: f64, bound: f64) -> Goal {
        // A figure that is missing (NaN) meets no goal.
        Goal { text: text.to_owned(), value, side: Side::AtMost, bound, met: value <= bound }
    }

    /// That `value` is at least `bound`.
    #[must_use]
    pub fn at_least(text: &str, value: f64, bound: f64) -> Goal {
        Goal { text: text.to_owned(), value, side: Side::AtLeast, bound, met: value >= bound }
    }
}

/// What a row brought.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RowResult {
    /// Its name on the command line.
    pub name: String,
    /// Its number, where it has one; numbers stay for good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u8>,
    /// What it measures.
    pub title: String,
    /// Its cases.
    pub cases: Vec<Case>,
    /// What shall hold.
    pub goals: Vec<Goal>,
    /// What a reader must know of these figures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Why it was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_run: Option<String>,
    /// How long it took.
    pub took_s: f64,
}

impl RowResult {
    /// How the row is called in a sentence.
    #[must_use]
    pub fn label(&self) -> String {
        self.number.map_or(self.name.clone(), |n| format!("{n} ({})", self.name))
    }

    /// Nothing was lost and everything that moved is equal: without this no figure counts.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.cases.iter().all(|c| c.losses() == (0, 0) && c.verified.as_ref().is_none_or(Verified::is_equal))
    }

    /// It was measured, and it is right.
    #[must_use]
    pub fn went_right(&self) -> bool {
        self.not_run.is_none() && self.is_right()
    }

    /// The same, and all goals are met.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.went_right() && self.goals.iter().all(|g| g.met)
    }
}

/// What `--out` writes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Results {
    /// The machine.
    pub host: HostFacts,
    /// How thorough the run was: pairs of moves, or none for a quick one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs: Option<u32>,
    /// The rows that ran.
    pub rows: Vec<RowResult>,
}

impl Results {
    /// Reads what `demo --out` or `bench --out` wrote, now or earlier: figures that an old file lacks are empty.
    pub fn parse(text: &str) -> Result<Results, serde_json::Error> {
        let results: Results = serde_json::from_str(text)?;
        match results.rows.is_empty() {
            true => Err(serde::de::Error::custom("it has no rows")),
            false => Ok(results),
        }
    }

    /// Whether every row is good.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.rows.iter().all(RowResult::is_good)
    }
}

/// The most that was sent in any stretch of at least a second, in megabits per second; NaN of a shorter move.
#[must_use]
pub fn fastest_mbps(progress: &[Point]) -> f64 {
    const SECOND_MS: f64 = 1000.0;
    // What is told again is from when it was told first: an agent that is at work on something else tells nothing new.
    let mut progress: Vec<&Point> = progress.iter().collect();
    progress.dedup_by_key(|point| point.transferred);
    let stretch = |(at, first): (usize, &&Point)| {
        let last = progress[at..].iter().find(|s| s.ms - first.ms >= SECOND_MS)?;
        let bytes = last.transferred - first.transferred.min(last.transferred);
        Some(bytes as f64 * 8.0 / 1e3 / (last.ms - first.ms))
    };
    progress.iter().enumerate().filter_map(stretch).fold(f64::NAN, f64::max)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn one(total_time_ms: f64, downtime_ms: f64) -> Move {
        let figures = Figures::default()
            .with(Metric::TotalTime, total_time_ms)
            .with(Metric::Downtime, downtime_ms)
            .with(Metric::WireBytes, 400.0);
        let split =
            vec![Span { name: "stop".into(), ms: 1.0 }, Span { name: "load".into(), ms: downtime_ms - 1.0 }];
        let progress = vec![
            Point { ms: 100.0, transferred: 0, remaining: 9 << 20, rounds: 1 },
            Point { ms: 900.0, transferred: 9 << 20, remaining: 0, rounds: 1 },
        ];
        let client = Some(Seen { acknowledged: 5, per_second: vec![2000, 1900, 2000], ..Seen::default() });
        Move { figures, downtime_split: split, progress, client, ..Move::default() }
    }

    /// Three pairs, the middle one an outlier.
    pub(crate) fn sample() -> RowResult {
        let ours = Contender {
            moves: vec![one(4000.0, 12.0), one(9000.0, 90.0), one(3900.0, 11.0)],
            ..Contender::named("ours")
        };
        let stock = Contender {
            moves: vec![one(4100.0, 200.0), one(4200.0, 210.0), one(4000.0, 190.0)],
            ..Contender::named("stock pre-copy")
        };
        let case = Case {
            workload: "a guest of <1024> MiB".into(),
            contenders: vec![ours, stock],
            verified: Some(Verified { blocks: 4, total_time_ms: 5000.0, error: None }),
            limits: vec![Limit { metric: Metric::TotalTime, value: 3500.0, text: "bytes / link".into() }],
            curves: vec![Curve {
                title: "how it grows".into(),
                x: "MB".into(),
                y: "ms".into(),
                lines: vec![("ours".into(), vec![(1.0, 2.0), (2.0, 4.0)])],
            }],
            ..Case::default()
        };
        let goals = vec![Goal::at_most("total time, ours / stock", case.ratio(Metric::TotalTime, 0), 1.0)];
        RowResult {
            name: "demo".into(),
            title: "the demo".into(),
            cases: vec![case],
            goals,
            ..RowResult::default()
        }
    }

    #[test]
    fn medians_decide() {
        let row = sample();
        assert_eq!(row.cases[0].value(Metric::TotalTime), 4000.0);
        assert!(row.is_right() && row.is_good(), "{:?}", row.goals);
    }

    #[test]
    fn a_lost_write_of_either_contender_counts_and_so_does_ram_that_differs() {
        let mut row = sample();
        row.cases[0].contenders[1].moves[1].client.as_mut().unwrap().lost_writes = 2;
        assert!(!row.is_right());
        let mut row = sample();
        row.cases[0].verified = Some(Verified::default());
        assert!(!row.is_right());
    }

    #[test]
    fn a_missing_figure_meets_no_goal_and_survives_a_file() {
        let goals = [Goal::at_most("x", f64::NAN, 1.0), Goal::at_least("x", f64::NAN, 1.0)];
        assert!(goals.iter().all(|g| !g.met));
        let read: Goal = serde_json::from_str(&serde_json::to_string(&goals[0]).unwrap()).unwrap();
        assert!(read.value.is_nan());
    }

    #[test]
    fn a_row_that_did_not_run_is_not_good() {
        assert!(!RowResult { not_run: Some("no root".into()), ..sample() }.is_good());
    }

    #[test]
    fn the_fastest_second_is_found_and_a_burst_within_it_is_not_taken_for_one() {
        let at = |ms, megabits: u64| Point { ms, transferred: megabits * 125_000, remaining: 0, rounds: 1 };
        let progress = [at(0.0, 0), at(500.0, 50), at(600.0, 150), at(1500.0, 200), at(2500.0, 220)];
        // The best stretch is the one from 500 to 1500 ms.
        assert!((fastest_mbps(&progress) - 150.0).abs() < 1e-9, "{}", fastest_mbps(&progress));
        assert!(fastest_mbps(&progress[..3]).is_nan());
        let again = |ms, transferred| Point { ms, transferred, remaining: 0, rounds: 1 };
        let late = [again(0.0, 0), again(100.0, 0), again(1000.0, 1_000_000), again(1100.0, 1_100_000)];
        assert!((fastest_mbps(&late) - 8.0).abs() < 1e-9, "{}", fastest_mbps(&late));
    }

    #[test]
    fn a_file_of_something_else_is_refused() {
        let text = serde_json::to_string(&Results { rows: vec![sample()], ..Results::default() }).unwrap();
        assert_eq!(Results::parse(&text).unwrap().rows[0].cases[0].contenders.len(), 2);
        for other in ["[]", "{}", "{\"rows\":7}", "not JSON"] {
            Results::parse(other).unwrap_err();
        }
    }
}
