//! What is measured, and its units.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A figure by which contenders are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// From the command until the source is free; the start of the target's QEMU is in it. Milliseconds.
    TotalTime,
    /// The part of it before the first page: until the target's QEMU has started and can take pages. Milliseconds.
    SetupTime,
    /// How long the VM was stopped, as the one who moved it says. Milliseconds.
    Downtime,
    /// The longest silence of the guest's beacon that a client noticed. Milliseconds.
    Blackout,
    /// Bytes on the link between the hosts, both ways, headers included. Megabytes (10^6).
    WireBytes,
    /// From the source to the target alone. Megabytes.
    WireForth,
    /// CPU time of all processes that took part, the emulated guest included. Seconds.
    Cpu,
    /// Proportional set size of the source's QEMU before the move. Megabytes.
    PssSource,
    /// Likewise of the target's after it. Megabytes.
    PssTarget,
    /// Pages that travelled as bytes, over the time in which pages were sent. Gbit/s.
    Throughput,
    /// How much slower a counter in the guest ran than before. Per cent.
    Slowdown,
    /// Acknowledged writes that were gone at the end.
    LostWrites,
    /// Bandwidth, against a limit. Mbit/s.
    Bandwidth,
    /// The fastest stretch of a second, against a limit. Mbit/s.
    FastestSecond,
    /// What tracking adds to the first write to a page. Microseconds.
    FirstWrite,
    /// A scan of memory that nobody wrote. Milliseconds for each GiB.
    CleanScan,
    /// What a server in the guest did each second before the move.
    OpsBefore,
    /// What a stream to or from the guest carried before the move. Mbit/s.
    FlowBefore,
    /// What the same did while it moved, as a part of before. Per cent.
    AppDuring,
    /// What it did while memory was sent for the first time, as a part of before. Per cent.
    AppRoundOne,
    /// Its lowest quarter of a second around the move. Per cent of before.
    AppLowest,
    /// What it did after the move. Per cent of before.
    AppAfter,
    /// All that was not done because of the move, as time in which it would have been done before. Seconds.
    AppLost,
    /// The longest time between two updates that a player of a game saw. Milliseconds.
    UpdateGap,
    /// How long the guest's processors waited in all for pages that were not there yet, one added to the other. Milliseconds.
    BlockedTime,
    /// Pages that the target asked for because somebody waited for them.
    PageRequests,
    /// The blocked time over the number of waits, or of requests where waits are not counted. Microseconds.
    BlockedPerFault,
    /// The mean of waits that were timed one by one. Microseconds.
    FaultMean,
    /// 99 of 100 of these were not longer. Microseconds.
    FaultP99,
}

impl Metric {
    /// What people call it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Metric::TotalTime => "total time",
            Metric::SetupTime => "setup",
            Metric::Downtime => "downtime",
            Metric::Blackout => "blackout seen by the client",
            Metric::WireBytes => "bytes on the wire",
            Metric::WireForth => "bytes to the target",
            Metric::Cpu => "CPU seconds",
            Metric::PssSource => "PSS at the source",
            Metric::PssTarget => "PSS at the target",
            Metric::Throughput => "throughput of pages",
            Metric::Slowdown => "guest slowdown",
            Metric::LostWrites => "lost writes",
            Metric::Bandwidth => "bandwidth used",
            Metric::FastestSecond => "fastest second",
            Metric::FirstWrite => "first write to a page",
            Metric::CleanScan => "scan of clean memory",
            Metric::OpsBefore => "application before",
            Metric::FlowBefore => "stream before",
            Metric::AppDuring => "application during the move",
            Metric::AppRoundOne => "application in round one",
            Metric::AppLowest => "its lowest 250 ms",
            Metric::AppAfter => "application after",
            Metric::AppLost => "work lost to the move",
            Metric::UpdateGap => "longest wait of a player",
            Metric::BlockedTime => "guest blocked for pages",
            Metric::PageRequests => "pages asked for",
            Metric::BlockedPerFault => "blocked for each fault",
            Metric::FaultMean => "fault latency, mean",
            Metric::FaultP99 => "fault latency, 99 of 100",
        }
    }

    /// The unit of its values.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Metric::TotalTime
            | Metric::SetupTime
            | Metric::Downtime
            | Metric::Blackout
            | Metric::UpdateGap
            | Metric::BlockedTime => "ms",
            Metric::WireBytes | Metric::WireForth | Metric::PssSource | Metric::PssTarget => "MB",
            Metric::Cpu | Metric::AppLost => "s",
            Metric::Throughput => "Gbit/s",
            Metric::Slowdown => "%",
            Metric::LostWrites | Metric::PageRequests => "",
            Metric::Bandwidth | Metric::FastestSecond | Metric::FlowBefore => "Mbit/s",
            Metric::FirstWrite | Metric::BlockedPerFault | Metric::FaultMean | Metric::FaultP99 => "us",
            Metric::CleanScan => "ms/GiB",
            Metric::OpsBefore => "/s",
            Metric::AppDuring | Metric::AppRoundOne | Metric::AppLowest | Metric::AppAfter => "%",
        }
    }
}

/// The figures of one move or one measurement, in the units of [`Metric::unit`]. What was not measured is not there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Figures(BTreeMap<Metric, f64>);

impl Figures {
    /// Notes a value. One that is not a number was not measured.
    pub fn set(&mut self, metric: Metric, value: f64) {
        if value.is_finite() {
            self.0.insert(metric, value);
        }
    }

    /// With this value.
    #[must_use]
    pub fn with(mut self, metric: Metric, value: f64) -> Figures {
        self.set(metric, value);
        self
    }

    /// A value, if it was measured.
    #[must_use]
    pub fn get(&self, metric: Metric) -> Option<f64> {
        self.0.get(&metric).copied()
    }

    /// What was measured.
    pub fn metrics(&self) -> impl Iterator<Item = Metric> + '_ {
        self.0.keys().copied()
    }
}

/// A named stretch of time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What was done.
    pub name: String,
    /// For how long.
    pub ms: f64,
}

/// A point of a move's progress.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Since the command.
    pub ms: f64,
    /// Bytes of RAM sent.
    pub transferred: u64,
    /// Bytes of RAM known to be unsent.
    pub remaining: u64,
    /// Which round is being sent; 0 before the first, and where it was not noted.
    #[serde(default)]
    pub rounds: u64,
}

/// From when to when memory was sent for the first time, in milliseconds since the command. None if that was not seen.
#[must_use]
pub fn round_one(progress: &[Point]) -> Option<(f64, f64)> {
    let begun = |p: &&Point| p.transferred > 0 && p.rounds > 0;
    let first = progress.iter().find(begun)?;
    let after = progress.iter().find(|p| p.rounds > first.rounds).or(progress.last())?;
    (after.ms > first.ms).then_some((first.ms, after.ms))
}

/// The middle and the spread of samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub low: f64,
    /// The largest.
    pub high: f64,
    /// 95 of 100 are not above it (nearest rank).
    pub p95: f64,
    /// How many there are.
    pub samples: usize,
}

impl Summary {
    /// Of samples; none of no samples.
    #[must_use]
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Option<Summary> {
        let mut values: Vec<f64> = samples.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = (*values.first()?, *values.last()?);
        let (middle, count) = (values.len() / 2, values.len());
        let median = match count % 2 {
            1 => values[middle],
            _ => f64::midpoint(values[middle - 1], values[middle]),
        };
        let rank = (count * 95).div_ceil(100).max(1);
        Some(Summary { median, low, high, p95: values[rank - 1], samples: count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_withstand_an_outlier_and_ranks_are_the_nearest() {
        let summary = Summary::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((summary.median, summary.low, summary.high, summary.p95), (2.5, 1.0, 4.0, 4.0));
        assert_eq!(Summary::of([1.0, 900.0, 2.0]).unwrap().median, 2.0);
        assert_eq!(Summary::of((1..=20).map(f64::from)).unwrap().p95, 19.0);
        assert_eq!(Summary::of([]), None);
    }

    #[test]
    fn the_first_round_ends_where_the_second_begins_or_with_the_move() {
        let at = |ms: f64, transferred, rounds| Point { ms, transferred, remaining: 0, rounds };
        let progress = [
            at(10.0, 0, 0),
            at(20.0, 0, 1),
            at(30.0, 5, 1),
            at(40.0, 9, 1),
            at(50.0, 12, 2),
            at(60.0, 13, 3),
        ];
        assert_eq!(round_one(&progress), Some((30.0, 50.0)));
        assert_eq!(round_one(&progress[..4]), Some((30.0, 40.0)));
        assert_eq!((round_one(&progress[..3]), round_one(&[])), (None, None));
    }

    #[test]
    fn a_figure_that_is_no_number_was_not_measured() {
        let figures = Figures::default().with(Metric::Downtime, f64::NAN).with(Metric::Cpu, 1.0);
        assert_eq!(figures.metrics().collect::<Vec<_>>(), [Metric::Cpu]);
        assert_eq!(serde_json::to_string(&figures).unwrap(), r#"{"cpu":1.0}"#);
    }
}
