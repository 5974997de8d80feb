//! How the cost grows: with the size of an idle guest, with what a guest writes, with the number of guests that leave together.

use std::time::Duration;

use serde_json::Value;
use sterna_lab::GuestSpec;

use super::{Run, idle};
use crate::contest::{Contest, Terms};
use crate::figures::Metric;
use crate::ours::{self, OurVm};
use crate::results::{Case, Contender, Curve, Limit, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::{self, StockVm, StockWay};
use crate::{BenchError, crowd, load};

/// More pairs say little more, and the largest guests take half a minute for each move.
const PAIRS_MAX: u32 = 3;
/// Sizes of idle guests, in MiB.
const SIZES_MIB: &[u32] = &[256, 512, 1024, 2048, 4096];
/// What a size needs of the machine's memory: a guest of ours, one of stock QEMU's, and the target that one of them moves to.
const COPIES: u64 = 3;
/// What is left to the machine.
const REST_MIB: u64 = 2048;
/// What a guest writes, in MB/s; 0 is an idle one.
const RATES_MB: &[u32] = &[0, 25, 50, 100, 200];
/// RAM of the guest that writes, and the part that it writes.
const WRITER_MIB: u32 = 512;
const WORKING_SET_MIB: u32 = 128;
/// A move that takes longer will never end by itself.
const NO_END: Duration = Duration::from_secs(40);
/// Guests that leave together.
const CROWDS: &[u8] = &[1, 2, 4, 8];
const CROWD_MIB: u32 = 192;
/// As many of each in a quick run, which leaves out those that write.
const QUICK: usize = 2;
/// What is drawn.
const DRAWN: &[Metric] = &[Metric::TotalTime, Metric::Downtime, Metric::Cpu];

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 1)?;
    let (mut cases, mut notes) = (Vec::new(), Vec::new());
    sizes(run, &stage, &mut cases, &mut notes)?;
    if !run.extent.quick {
        rates(run, &stage, &mut cases)?;
    }
    crowds(run, &stage, &mut cases)?;
    stage.lab.down()?;
    notes.push(
        "The limit is the pages of a guest, each sent once, at the speed of the link (957 Mbit/s). A point that is missing \
         did not get through: its case says why."
            .to_owned(),
    );
    Ok(RowResult { cases, notes, ..RowResult::default() })
}

/// The cases of one axis, and what they are drawn by.
struct Axis {
    name: &'static str,
    x: &'static str,
    points: Vec<(f64, Case)>,
}

fn chosen<'a, T>(run: &Run<'_>, all: &'a [T]) -> &'a [T] {
    &all[..if run.extent.quick { QUICK.min(all.len()) } else { all.len() }]
}

fn pairs(run: &Run<'_>) -> u32 {
    run.extent.pairs.min(PAIRS_MAX)
}

fn sizes(
    run: &Run<'_>,
    stage: &Stage,
    cases: &mut Vec<Case>,
    notes: &mut Vec<String>,
) -> Result<(), BenchError> {
    let mut axis = Axis { name: "size", x: "RAM of the guest, MiB", points: Vec::new() };
    for &memory_mib in chosen(run, SIZES_MIB) {
        if let Some(why) = lacking_mib(memory_mib) {
            notes.push(why);
            continue;
        }
        run.tell(&format!("an idle guest of {memory_mib} MiB"));
        let fill = load::fill_mib(memory_mib);
        let guest = |vm: &str, _| GuestSpec {
            programs: vec![load::memory(&[&format!("--fill={fill}"), "--dirty=0", "--sleep"])],
            ..load::plain(stage, &format!("size{memory_mib}-{vm}"), memory_mib)
        };
        let workload = format!("{memory_mib} MiB, {fill} of it noise, idle");
        let contest =
            Contest { stage, workload, guest: &guest, peers: &[StockWay::Precopy], terms: Terms::default() };
        let case = contest.idle(run, pairs(run))?;
        let limits = idle::limit(&case).into_iter().collect();
        let name = format!("size {memory_mib} MiB");
        axis.points.push((f64::from(memory_mib), Case { name, limits, ..case }));
    }
    axis.into_cases(cases);
    Ok(())
}

fn rates(run: &Run<'_>, stage: &Stage, cases: &mut Vec<Case>) -> Result<(), BenchError> {
    let mut axis = Axis { name: "writes", x: "what the guest writes, MB/s", points: Vec::new() };
    for &rate in chosen(run, RATES_MB) {
        run.tell(&format!("a guest that writes {rate} MB/s"));
        let fill = format!("--fill={}", load::fill_mib(WRITER_MIB));
        let dirty = format!("--dirty={}", if rate == 0 { 0 } else { WORKING_SET_MIB });
        let guest = |vm: &str, _| {
            let options: &[&str] = match rate {
                0 => &[&fill, &dirty, "--sleep"],
                _ => &[&fill, &dirty, &format!("--rate={rate}"), "--check"],
            };
            let name = format!("rate{rate}-{vm}");
            GuestSpec { programs: vec![load::memory(options)], ..load::plain(stage, &name, WRITER_MIB) }
        };
        let workload =
            format!("{WRITER_MIB} MiB, {WORKING_SET_MIB} of them written over and over at {rate} MB/s");
        let terms = Terms { limit: Some(NO_END), ..Terms::default() };
        let contest = Contest { stage, workload, guest: &guest, peers: &[StockWay::Precopy], terms };
        let case = contest.busy(run, pairs(run))?;
        let once = axis.points.first().and_then(|(_, first)| first.limits.first().cloned());
        let limits = once.or_else(|| idle::limit(&case)).into_iter().collect();
        let name = format!("writes {rate} MB/s");
        axis.points.push((f64::from(rate), Case { name, limits, ..case }));
    }
    axis.into_cases(cases);
    Ok(())
}

fn crowds(run: &Run<'_>, stage: &Stage, cases: &mut Vec<Case>) -> Result<(), BenchError> {
    let mut axis = Axis { name: "number", x: "guests that leave together", points: Vec::new() };
    for &count in chosen(run, CROWDS) {
        run.tell(&format!("{count} guests of {CROWD_MIB} MiB leave together"));
        axis.points.push((f64::from(count), crowd(run, stage, count)?));
    }
    axis.into_cases(cases);
    Ok(())
}

fn crowd(run: &Run<'_>, stage: &Stage, count: u8) -> Result<Case, BenchError> {
    let fill = format!("--fill={}", load::fill_mib(CROWD_MIB));
    let guest = |kind: &str, number: u8| GuestSpec {
        programs: vec![load::memory(&[&fill, "--dirty=0", "--sleep"])],
        ..load::plain(stage, &format!("crowd{count}-{kind}{number}"), CROWD_MIB)
    };
    let mut ours = (0..count)
        .map(|n| OurVm::boot(stage, &guest("ours", n), n))
        .collect::<Result<Vec<_>, BenchError>>()?;
    let mut stock = (0..count)
        .map(|n| StockVm::boot(stage, &guest("stock", n), n))
        .collect::<Result<Vec<_>, BenchError>>()?;
    let mut contenders = [Contender::named("ours"), Contender::named(StockWay::Precopy.name())];
    for _ in 0..pairs(run) {
        load::warm_memory(CROWD_MIB * u32::from(count));
        contenders[0].moves.push(crowd::ours(stage, &mut ours, &ours::Order::default())?.0);
        load::warm_memory(CROWD_MIB * u32::from(count));
        contenders[1].moves.push(crowd::stock(stage, &mut stock, stock::Order::of(StockWay::Precopy))?);
    }
    let verified = Some(crowd::verify(stage, &mut ours));
    ours.into_iter().try_for_each(|vm| vm.stop(stage))?;
    let mut case = Case {
        name: format!("number {count}"),
        workload: format!(
            "{count} guests of {CROWD_MIB} MiB full of noise, idle; downtime is that of the one stopped longest"
        ),
        contenders: contenders.into(),
        verified,
        ..Case::default()
    };
    case.limits.extend(crowd_limit(&case));
    Ok(case)
}

/// The pages that stock QEMU sent of all of them, as bytes, at the speed of the link.
fn crowd_limit(case: &Case) -> Option<Limit> {
    let reports = case.peers().first()?.moves.last()?.report.as_array()?;
    let pages: f64 = reports.iter().filter_map(|r| r.pointer("/ram/normal").and_then(Value::as_f64)).sum();
    let value = pages * 4096.0 / idle::LINK_BYTES_PER_MS;
    Some(Limit {
        metric: Metric::TotalTime,
        value,
        text: "pages that are not zero / link (957 Mbit/s)".to_owned(),
    })
}

impl Axis {
    /// A case for each point, and one with the lines through them.
    fn into_cases(self, cases: &mut Vec<Case>) {
        let curves = DRAWN.iter().map(|metric| self.curve(*metric)).collect();
        let workload = format!("how cost grows with it: {}", self.x);
        let name = self.name.to_owned();
        cases.extend(self.points.into_iter().map(|(_, case)| case));
        cases.push(Case { name, workload, curves, ..Case::default() });
    }

    fn curve(&self, metric: Metric) -> Curve {
        let names = self.points.first().map_or(&[][..], |(_, case)| &case.contenders[..]);
        let line = |which: usize, contender: &Contender| {
            let point =
                |(x, case): &(f64, Case)| Some((*x, case.contenders.get(which)?.summary(metric)?.median));
            (contender.name.clone(), self.points.iter().filter_map(point).collect())
        };
        let mut lines: Vec<(String, Vec<(f64, f64)>)> =
            names.iter().enumerate().map(|(which, contender)| line(which, contender)).collect();
        let limit =
            |(x, case): &(f64, Case)| Some((*x, case.limits.iter().find(|l| l.metric == metric)?.value));
        let limits: Vec<(f64, f64)> = self.points.iter().filter_map(limit).collect();
        if !limits.is_empty() {
            lines.push(("limit".to_owned(), limits));
        }
        let title = format!("{} by {}", metric.label(), self.name);
        Curve { title, x: self.x.to_owned(), y: format!("{}, {}", metric.label(), metric.unit()), lines }
    }
}

/// Why guests of a size cannot be measured, if they cannot.
pub(super) fn lacking_mib(memory_mib: u32) -> Option<String> {
    let (free, need) = (available_mib(), u64::from(memory_mib) * COPIES + REST_MIB);
    (free < need).then(|| {
        format!("{memory_mib} MiB not run: it needs {need} MiB of this machine's memory, {free} are free")
    })
}

/// Memory that the machine can give away; none if it does not say.
fn available_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Figures;
    use crate::results::Move;

    fn case(totals: [Option<f64>; 2], limit: f64) -> Case {
        let contender = |name: &str, total: Option<f64>| {
            let moves = total
                .map(|t| Move { figures: Figures::default().with(Metric::TotalTime, t), ..Move::default() });
            Contender { moves: moves.into_iter().collect(), ..Contender::named(name) }
        };
        Case {
            contenders: vec![contender("ours", totals[0]), contender("stock", totals[1])],
            limits: vec![Limit { metric: Metric::TotalTime, value: limit, text: String::new() }],
            ..Case::default()
        }
    }

    #[test]
    fn a_line_leaves_out_the_points_that_did_not_get_through() {
        let points = vec![(25.0, case([Some(4.0), Some(6.0)], 3.0)), (200.0, case([Some(5.0), None], 3.0))];
        let axis = Axis { name: "writes", x: "MB/s", points };
        let curve = axis.curve(Metric::TotalTime);
        let expected = [
            ("ours", vec![(25.0, 4.0), (200.0, 5.0)]),
            ("stock", vec![(25.0, 6.0)]),
            ("limit", vec![(25.0, 3.0), (200.0, 3.0)]),
        ];
        assert_eq!(curve.lines, expected.map(|(name, points)| (name.to_owned(), points)));
        assert_eq!(axis.curve(Metric::Downtime).lines.len(), 2);
        let mut cases = Vec::new();
        axis.into_cases(&mut cases);
        assert_eq!((cases.len(), cases[2].curves.len(), cases[2].verified.is_none()), (3, 3, true));
    }

    #[test]
    fn the_machine_tells_what_memory_it_has() {
        assert!(available_mib() > 0);
    }
}
