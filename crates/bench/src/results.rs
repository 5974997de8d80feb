//! What is measured, as it is written to files: medians first, every raw sample after them.

use serde::{Deserialize, Serialize};

use crate::facts::HostFacts;
use crate::load::{Seen, Window};
use crate::ours::{Said, Span};

/// The figures by which moves are compared. `_ms` are milliseconds; CPU is in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// From the command until the source is free; the start of the target's QEMU is in it.
    pub total_time_ms: f64,
    /// How long the VM was stopped, as the one who moved it says.
    pub downtime_ms: f64,
    /// The longest silence that a client noticed.
    pub blackout_ms: f64,
    /// Bytes on the link between the hosts, both ways, headers included.
    pub wire_bytes: u64,
    /// CPU time of all processes that took part, the emulated guest included.
    pub cpu_s: f64,
}

/// One of the figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// See [`Figures::total_time_ms`].
    TotalTime,
    /// See [`Figures::downtime_ms`].
    Downtime,
    /// See [`Figures::blackout_ms`].
    Blackout,
    /// See [`Figures::wire_bytes`].
    WireBytes,
    /// See [`Figures::cpu_s`].
    Cpu,
}

impl Metric {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Metric; 5] =
        [Metric::TotalTime, Metric::Downtime, Metric::Blackout, Metric::WireBytes, Metric::Cpu];

    /// What people call it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Metric::TotalTime => "total time",
            Metric::Downtime => "downtime",
            Metric::Blackout => "blackout seen by the client",
            Metric::WireBytes => "bytes on the wire",
            Metric::Cpu => "CPU seconds",
        }
    }

    /// Its value, in the unit of [`unit`](Self::unit).
    #[must_use]
    pub fn of(self, figures: &Figures) -> f64 {
        match self {
            Metric::TotalTime => figures.total_time_ms,
            Metric::Downtime => figures.downtime_ms,
            Metric::Blackout => figures.blackout_ms,
            Metric::WireBytes => figures.wire_bytes as f64 / 1e6,
            Metric::Cpu => figures.cpu_s,
        }
    }

    /// The unit of its values.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Metric::TotalTime | Metric::Downtime | Metric::Blackout => "ms",
            Metric::WireBytes => "MB",
            Metric::Cpu => "s",
        }
    }
}

/// A point of a move's progress.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Since the command.
    pub ms: f64,
    /// Bytes of RAM sent.
    pub transferred: u64,
    /// Bytes of RAM known to be unsent.
    pub remaining: u64,
}

/// One timed move.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Move {
    /// Its figures.
    #[serde(flatten)]
    pub figures: Figures,
    /// Until the first page could be sent (ours), or until the target's QEMU had started (stock).
    pub setup_ms: f64,
    /// How the downtime was spent, where that is known.
    pub downtime_split: Vec<Span>,
    /// What the client saw.
    pub client: Seen,
    /// When it was.
    pub window: Window,
    /// How it went on, where that was asked for.
    pub samples: Vec<Sample>,
    /// What `sterna migrate` or `query-migrate` said at the end.
    pub report: serde_json::Value,
}

/// Two moves of VMs like each other, one after the other.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pair {
    /// By Sterna.
    pub ours: Move,
    /// By stock QEMU.
    pub stock: Move,
    /// The machine's load average before: others' work shows here.
    pub load_before: f64,
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
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

impl Verified {
    /// Whether RAM was proved equal.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.error.is_none() && self.blocks > 0
    }
}

/// Something that shall hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    /// What, in words.
    pub text: String,
    /// What came out.
    pub value: f64,
    /// The most that it may be.
    pub at_most: f64,
    /// Whether it is.
    pub met: bool,
}

impl Goal {
    /// That `value` is at most `at_most`.
    #[must_use]
    pub fn at_most(text: &str, value: f64, at_most: f64) -> Goal {
        // A figure that is missing (NaN) meets no goal.
        Goal { text: text.to_owned(), value, at_most, met: value <= at_most }
    }
}

/// The demo, or its repetition as a benchmark.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Demo {
    /// Acknowledged writes that were gone at the end, of all clients.
    pub lost_writes: u64,
    /// Connections of clients that broke.
    pub broken_connections: u64,
    /// Whether RAM was proved equal at the target.
    pub ram_equal: bool,
    /// Medians.
    pub ours: Figures,
    /// Medians.
    pub stock: Figures,
    /// What shall hold for the medians.
    pub goals: Vec<Goal>,
    /// The comparison of RAM.
    pub verified: Verified,
    /// Every sample.
    pub pairs: Vec<Pair>,
    /// The machine.
    pub host: HostFacts,
}

impl Demo {
    /// Draws the conclusions from pairs.
    #[must_use]
    pub fn of(pairs: Vec<Pair>, verified: Verified, host: HostFacts) -> Demo {
        let clients = || pairs.iter().flat_map(|p| [&p.ours.client, &p.stock.client]);
        let lost_writes = clients().map(|c| c.lost_writes).sum();
        let broken_connections = clients().map(|c| c.reconnects).sum();
        let ours = medians(pairs.iter().map(|p| p.ours.figures));
        let stock = medians(pairs.iter().map(|p| p.stock.figures));
        let ram_equal = verified.is_equal();
        let mut demo = Demo {
            lost_writes,
            broken_connections,
            ram_equal,
            ours,
            stock,
            verified,
            host,
            ..Demo::default()
        };
        demo.pairs = pairs;
        demo.goals = demo.judged();
        demo
    }

    /// Ours / stock, of the medians.
    #[must_use]
    pub fn ratio(&self, metric: Metric) -> f64 {
        metric.of(&self.ours) / metric.of(&self.stock)
    }

    /// Nothing was lost and everything is equal: without this no figure counts.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.lost_writes == 0 && self.broken_connections == 0 && self.ram_equal
    }

    fn judged(&self) -> Vec<Goal> {
        vec![
            Goal::at_most("total time, ours / stock", self.ratio(Metric::TotalTime), 1.0),
            Goal::at_most("downtime, ms", self.ours.downtime_ms, 20.0),
            Goal::at_most("downtime, ours / stock", self.ratio(Metric::Downtime), 0.15),
            Goal::at_most("blackout, ms", self.ours.blackout_ms, 60.0),
        ]
    }
}

/// One move with a limited bandwidth.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Limited {
    /// The limit, in megabits per second.
    pub limit_mbps: f64,
    /// What crossed the link in all the time in which pages were sent, both ways, headers included.
    pub wire_mbps: f64,
    /// The fastest whole second, by the migration's own count of what it sent.
    pub fastest_mbps: f64,
    /// What the migration says at the end: of its last round, which may be too short to tell.
    pub ram_mbps: f64,
    /// All of the migration.
    pub report: Said,
}

impl Limited {
    /// How far the used bandwidth is from the limit, as a part of it; negative below.
    #[must_use]
    pub fn deviation(&self) -> f64 {
        self.wire_mbps / self.limit_mbps - 1.0
    }
}

/// The most that was sent in any stretch of at least a second, in megabits per second; NaN of a shorter move.
#[must_use]
pub fn fastest_mbps(samples: &[Sample]) -> f64 {
    const SECOND_MS: f64 = 1000.0;
    let stretch = |(at, first): (usize, &Sample)| {
        let last = samples[at..].iter().find(|s| s.ms - first.ms >= SECOND_MS)?;
        Some(
            (last.transferred - first.transferred.min(last.transferred)) as f64 * 8.0
                / 1e3
                / (last.ms - first.ms),
        )
    };
    samples.iter().enumerate().filter_map(stretch).fold(f64::NAN, f64::max)
}

/// How well `max-bandwidth` is kept.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rate {
    /// Moves with different limits.
    pub moves: Vec<Limited>,
    /// What shall hold.
    pub goals: Vec<Goal>,
    /// What the client lost meanwhile.
    pub lost_writes: u64,
    /// The machine.
    pub host: HostFacts,
}

/// What `cargo xtask bench --out` writes: the rows that ran.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Results {
    /// The row `demo`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub demo: Option<Demo>,
    /// The row `rate`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rate: Option<Rate>,
}

impl Results {
    /// Reads what `demo --out` or `bench --out` wrote, now or earlier: figures that an old file lacks are empty.
    pub fn parse(text: &str) -> Result<Results, serde_json::Error> {
        let value: serde_json::Value = serde_json::from_str(text)?;
        if value.get("pairs").is_some() {
            return Ok(Results { demo: Some(serde_json::from_value(value)?), rate: None });
        }
        if !["demo", "rate"].iter().any(|row| value.get(row).is_some()) {
            return Err(serde::de::Error::custom("it has none of our rows"));
        }
        serde_json::from_value(value)
    }

    /// Whether nothing was lost and all goals are met.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let met = |goals: &[Goal]| goals.iter().all(|g| g.met);
        self.demo.as_ref().is_none_or(|d| d.is_right() && met(&d.goals))
            && self.rate.as_ref().is_none_or(|r| r.lost_writes == 0 && met(&r.goals))
    }
}

/// The median of each figure by itself.
fn medians(figures: impl Iterator<Item = Figures>) -> Figures {
    let all: Vec<Figures> = figures.collect();
    let of = |value: fn(&Figures) -> f64| median(all.iter().map(value).collect());
    Figures {
        total_time_ms: of(|f| f.total_time_ms),
        downtime_ms: of(|f| f.downtime_ms),
        blackout_ms: of(|f| f.blackout_ms),
        wire_bytes: of(|f| f.wire_bytes as f64) as u64,
        cpu_s: of(|f| f.cpu_s),
    }
}

/// The middle one, or the mean of the two in the middle; NaN of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// The smallest and the largest.
#[must_use]
pub fn spread(metric: Metric, moves: &[&Move]) -> (f64, f64) {
    let values = moves.iter().map(|m| metric.of(&m.figures));
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn one(total_time_ms: f64, downtime_ms: f64) -> Move {
        let figures = Figures {
            total_time_ms,
            downtime_ms,
            blackout_ms: downtime_ms + 5.0,
            wire_bytes: 400_000_000,
            cpu_s: 3.0,
        };
        let split =
            vec![Span { name: "stop".into(), ms: 1.0 }, Span { name: "load".into(), ms: downtime_ms - 1.0 }];
        let samples = vec![
            Sample { ms: 100.0, transferred: 0, remaining: 9 << 20 },
            Sample { ms: 900.0, transferred: 9 << 20, remaining: 0 },
        ];
        let client = Seen { acknowledged: 5, per_second: vec![2000, 1900, 2000], ..Seen::default() };
        Move { figures, downtime_split: split, samples, client, ..Move::default() }
    }

    /// Three pairs, the middle one an outlier.
    pub(crate) fn sample() -> Demo {
        let pair = |ours, stock| Pair { ours, stock, load_before: 0.0 };
        let pairs = vec![
            pair(one(4000.0, 12.0), one(4100.0, 200.0)),
            pair(one(9000.0, 90.0), one(4200.0, 210.0)),
            pair(one(3900.0, 11.0), one(4000.0, 190.0)),
        ];
        Demo::of(pairs, Verified { blocks: 4, total_time_ms: 5000.0, error: None }, HostFacts::default())
    }

    #[test]
    fn medians_withstand_an_outlier() {
        let demo = sample();
        assert_eq!((demo.ours.total_time_ms, demo.stock.total_time_ms), (4000.0, 4100.0));
        assert!(demo.is_right() && demo.goals.iter().all(|g| g.met), "{:?}", demo.goals);
    }

    #[test]
    fn each_goal_can_be_missed() {
        let mut pairs = sample().pairs;
        pairs.iter_mut().for_each(|p| p.ours = one(5000.0, 70.0));
        let demo = Demo::of(pairs, Verified::default(), HostFacts::default());
        assert!(demo.goals.iter().all(|g| !g.met), "{:?}", demo.goals);
        assert!(!demo.ram_equal);
    }

    #[test]
    fn a_lost_write_of_either_client_counts() {
        let mut pairs = sample().pairs;
        pairs[1].stock.client.lost_writes = 2;
        let demo = Demo::of(pairs, sample().verified, HostFacts::default());
        assert_eq!(demo.lost_writes, 2);
        assert!(!demo.is_right());
    }

    #[test]
    fn a_missing_figure_meets_no_goal() {
        assert!(!Goal::at_most("x", f64::NAN, 1.0).met);
        assert!(median(Vec::new()).is_nan());
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn the_fastest_second_is_found_and_a_burst_within_it_is_not_taken_for_one() {
        let at = |ms, megabits: u64| Sample { ms, transferred: megabits * 125_000, remaining: 0 };
        let samples = [at(0.0, 0), at(500.0, 50), at(600.0, 150), at(1500.0, 200), at(2500.0, 220)];
        // The best stretch is the one from 500 to 1500 ms.
        assert!((fastest_mbps(&samples) - 150.0).abs() < 1e-9, "{}", fastest_mbps(&samples));
        assert!(fastest_mbps(&samples[..3]).is_nan());
    }

    #[test]
    fn both_kinds_of_files_are_read() {
        let demo = serde_json::to_string(&sample()).unwrap();
        assert_eq!(Results::parse(&demo).unwrap().demo.unwrap().pairs.len(), 3);
        let both = Results { demo: Some(sample()), rate: Some(Rate::default()) };
        let read = Results::parse(&serde_json::to_string(&both).unwrap()).unwrap();
        assert!(read.demo.is_some() && read.rate.is_some());
        for other in ["[]", "{}", "{\"demo\":7}", "not JSON"] {
            Results::parse(other).unwrap_err();
        }
    }
}
