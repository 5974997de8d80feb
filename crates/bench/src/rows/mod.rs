//! What can be measured: each row in a file of its own.

mod clark;
mod demo;
mod downtime;
mod faults;
mod fetched;
mod growth;
mod guestperf;
mod idle;
mod muncher;
mod papers;
mod plane;
mod postcopy;
mod rate;
mod sequential;
mod served;
mod servers;
mod sharing;
mod sparse;
mod templates;
mod tracking;
mod undisturbed;
mod writing;

use std::str::FromStr;
use std::time::Instant;

use crate::facts::HostFacts;
use crate::figures::Metric;
use crate::ours::Progress;
use crate::results::{Results, RowResult};
use crate::wishes::Abilities;
use crate::{BenchError, Kit};

/// A row. Numbers are those of the project's list of benchmarks, and stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// The demo, pair after pair.
    Demo,
    /// Whether a bandwidth limit is kept.
    Rate,
    /// 1: an idle guest moves.
    Idle,
    /// 2: for how long it is stopped.
    Downtime,
    /// 3: a guest that writes moves under a client's load.
    Writing,
    /// 4: a guest that writes more than the link carries.
    Muncher,
    /// 5: a guest that writes a little of many pages.
    Sparse,
    /// 6: how long a guest waits for pages that post-copy has not brought yet.
    Faults,
    /// 7: the same for one that writes them in order.
    Sequential,
    /// For how long post-copy stops guests of several sizes.
    Postcopy,
    /// 14: clones of a template leave together.
    Templates,
    /// 15: guests that have most of their memory in common leave together.
    Sharing,
    /// 17: how fast pages move where no link limits.
    Plane,
    /// 18: what tracking costs a guest that writes.
    Tracking,
    /// How the cost grows with size, writes and the number of VMs.
    Growth,
    /// The scenarios of QEMU's own guestperf.
    Guestperf,
    /// What clients of a server see of its move.
    Servers,
    /// The table of Clark et al., NSDI 2005.
    Clark,
    /// The figures of Eswaran, and rows 14 and 15 beside them.
    Eswaran,
    /// What papers say, and where that is measured here.
    Papers,
}

impl Row {
    /// All of them, in the order in which they run.
    pub const ALL: [Row; 20] = [
        Row::Demo,
        Row::Rate,
        Row::Idle,
        Row::Downtime,
        Row::Writing,
        Row::Muncher,
        Row::Sparse,
        Row::Faults,
        Row::Sequential,
        Row::Postcopy,
        Row::Templates,
        Row::Sharing,
        Row::Plane,
        Row::Tracking,
        Row::Growth,
        Row::Guestperf,
        Row::Servers,
        Row::Clark,
        Row::Eswaran,
        Row::Papers,
    ];

    /// Those that run when none is named: the others take long, or measure nothing.
    pub const DEFAULT: [Row; 15] = [
        Row::Demo,
        Row::Rate,
        Row::Idle,
        Row::Downtime,
        Row::Writing,
        Row::Muncher,
        Row::Sparse,
        Row::Faults,
        Row::Sequential,
        Row::Postcopy,
        Row::Templates,
        Row::Sharing,
        Row::Plane,
        Row::Tracking,
        Row::Growth,
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Row::Demo => "demo",
            Row::Rate => "rate",
            Row::Idle => "idle",
            Row::Downtime => "downtime",
            Row::Writing => "writing",
            Row::Muncher => "muncher",
            Row::Sparse => "sparse",
            Row::Faults => "faults",
            Row::Sequential => "sequential",
            Row::Postcopy => "postcopy",
            Row::Templates => "templates",
            Row::Sharing => "sharing",
            Row::Plane => "plane",
            Row::Tracking => "tracking",
            Row::Growth => "growth",
            Row::Guestperf => "guestperf",
            Row::Servers => "servers",
            Row::Clark => "clark",
            Row::Eswaran => "eswaran",
            Row::Papers => "papers",
        }
    }

    /// Its number, where it has one.
    #[must_use]
    pub fn number(self) -> Option<u8> {
        match self {
            Row::Demo
            | Row::Rate
            | Row::Postcopy
            | Row::Growth
            | Row::Guestperf
            | Row::Servers
            | Row::Clark
            | Row::Eswaran
            | Row::Papers => None,
            Row::Idle => Some(1),
            Row::Downtime => Some(2),
            Row::Writing => Some(3),
            Row::Muncher => Some(4),
            Row::Sparse => Some(5),
            Row::Faults => Some(6),
            Row::Sequential => Some(7),
            Row::Templates => Some(14),
            Row::Sharing => Some(15),
            Row::Plane => Some(17),
            Row::Tracking => Some(18),
        }
    }

    /// Other words for it: the parts that it has in the list, and what they are about. All parts run.
    fn aliases(self) -> &'static [&'static str] {
        match self {
            Row::Muncher => &["4a", "hybrid", "4b", "stun"],
            Row::Sharing => &["slm"],
            Row::Templates => &["tlm"],
            _ => &[],
        }
    }

    /// What it measures.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Row::Demo => "A VM with a server under load moves between two hosts at 1 Gbit/s",
            Row::Rate => "How well a bandwidth limit is kept",
            Row::Idle => "An idle guest of 512 MiB moves at 1 Gbit/s",
            Row::Downtime => {
                "How long an idle guest of 512 MiB is stopped, with few devices and with a full q35"
            }
            Row::Writing => {
                "A guest that writes 60 MB/s moves under a client's load, both over one link of 1 Gbit/s"
            }
            Row::Muncher => {
                "MMuncher: a guest that writes 200 MB/s moves at 1 Gbit/s; part a, post-copy after a round; part b, pre-copy with stun"
            }
            Row::Sparse => {
                "A guest that writes a little of each of 100 MB of pages a second moves at 1 Gbit/s"
            }
            Row::Faults => {
                "How long a guest that writes here and there waits for pages that post-copy has not brought yet"
            }
            Row::Sequential => {
                "For how long a guest that writes its memory in order is blocked while post-copy brings it"
            }
            Row::Postcopy => "How long post-copy stops idle guests of 512 MiB to 4 GiB",
            Row::Templates => {
                "Four clones of a template leave together, and only what they have written moves"
            }
            Row::Sharing => {
                "Four guests that have most of their memory in common leave together, and each content travels once"
            }
            Row::Eswaran => "Template- and sharing-aware migration, beside the figures of their papers",
            Row::Plane => "How fast the pages of a guest of 1 GiB move where no link limits",
            Row::Tracking => "What tracking costs a guest that writes",
            Row::Growth => {
                "How the cost grows with the size of a guest, with what it writes, and with the number of guests"
            }
            Row::Guestperf => "The scenarios of QEMU's guestperf, 32 times smaller",
            Row::Servers => "What clients of Redis, of a web server and of iperf3 see of a move",
            Row::Clark => "The table of Clark et al., NSDI 2005: a web server, a game, and MMuncher",
            Row::Papers => "What papers say, and where that is measured here",
        }
    }
}

impl FromStr for Row {
    type Err = String;

    /// By name or number.
    fn from_str(text: &str) -> Result<Row, String> {
        let named = |row: &&Row| {
            row.name() == text
                || row.number().is_some_and(|n| n.to_string() == text)
                || row.aliases().contains(&text)
        };
        Row::ALL.iter().find(named).copied().ok_or_else(|| {
            let names: Vec<String> = Row::ALL
                .iter()
                .map(|r| r.number().map_or(r.name().to_owned(), |n| format!("{n} ({})", r.name())))
                .collect();
            format!("there is no row {text}; there are {}", names.join(", "))
        })
    }
}

/// How thorough a run is.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Pairs of one move of ours and one of each peer's, which alternate.
    pub pairs: u32,
    /// Only as much as shows that it works.
    pub quick: bool,
    /// How ours shows its progress.
    pub progress: Progress,
}

/// What a row works with.
pub(crate) struct Run<'a> {
    pub(crate) kit: &'a Kit,
    pub(crate) extent: Extent,
    /// What `sterna migrate` can be asked for.
    pub(crate) abilities: &'a Abilities,
    pub(crate) tell: &'a dyn Fn(&str),
}

impl Run<'_> {
    pub(crate) fn tell(&self, line: &str) {
        (self.tell)(line);
    }
}

/// Runs rows one after the other. What happens is told to `tell`, line by line; each result to `done`.
///
/// A row that fails is a result that says so: the others run all the same.
pub fn run(
    kit: &Kit,
    rows: &[Row],
    extent: Extent,
    tell: &dyn Fn(&str),
    done: &mut dyn FnMut(&Results),
) -> Results {
    let _kept = crate::load::keep_memory();
    let host = HostFacts::gather(kit, &kit.packages.qemu_72);
    let abilities = Abilities::of(kit);
    let mut results = Results { host, pairs: (!extent.quick).then_some(extent.pairs), rows: Vec::new() };
    for row in rows {
        tell(&format!(
            "row {}: {}",
            row.number().map_or(row.name().to_owned(), |n| n.to_string()),
            row.title()
        ));
        let began = Instant::now();
        let run = Run { kit, extent, abilities: &abilities, tell };
        let result = one(*row, &run)
            .unwrap_or_else(|why| RowResult { not_run: Some(why.to_string()), ..RowResult::default() });
        let result = RowResult {
            name: row.name().to_owned(),
            number: row.number(),
            title: row.title().to_owned(),
            took_s: began.elapsed().as_secs_f64(),
            ..result
        };
        results.rows.push(result);
        done(&results);
    }
    results
}

fn one(row: Row, run: &Run<'_>) -> Result<RowResult, BenchError> {
    match row {
        Row::Demo => demo::run(run),
        Row::Rate => rate::run(run),
        Row::Idle => idle::run(run),
        Row::Downtime => downtime::run(run),
        Row::Writing => writing::run(run),
        Row::Muncher => muncher::run(run),
        Row::Sparse => sparse::run(run),
        Row::Faults => faults::run(run),
        Row::Sequential => sequential::run(run),
        Row::Postcopy => postcopy::run(run),
        Row::Templates => templates::run(run),
        Row::Sharing => sharing::run(run),
        Row::Plane => plane::run(run),
        Row::Tracking => tracking::run(run),
        Row::Growth => growth::run(run),
        Row::Guestperf => guestperf::run(run),
        Row::Servers => servers::run(run),
        Row::Clark => clark::run(run),
        Row::Eswaran => eswaran(run),
        Row::Papers => Ok(papers::result()),
    }
}

/// Both modes, and what their papers say.
fn eswaran(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let less = |case: &crate::results::Case, stock: usize, what: &str| {
        let less = |metric| (1.0 - case.ratio(metric, stock)) * 100.0;
        let of = |metric| case.ours().map_or(f64::NAN, |ours| ours.median(metric));
        format!(
            "Here, {what}, {}: total time {:.0} % less than stock's, bytes {:.0} % fewer; memory at the target {:.2} times the source's",
            case.name,
            less(Metric::TotalTime),
            less(Metric::WireBytes),
            of(Metric::PssTarget) / of(Metric::PssSource)
        )
    };
    let mut result = templates::run(run)?;
    result.notes.extend(result.cases.iter().map(|case| less(case, 0, "template-aware")));
    let sharing = sharing::run(run)?;
    result.notes.extend(sharing.cases.iter().map(|case| less(case, 1, "sharing-aware")));
    result.cases.extend(sharing.cases);
    result.goals.extend(sharing.goals);
    result.notes.extend(sharing.notes);
    let undisturbed = undisturbed::run(run)?;
    result.cases.extend(undisturbed.cases);
    result.goals.extend(undisturbed.goals);
    result.notes.extend(papers::of_eswaran());
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_by_default_runs_in_the_same_order() {
        let default: Vec<Row> = Row::ALL.into_iter().filter(|r| Row::DEFAULT.contains(r)).collect();
        assert_eq!(default, Row::DEFAULT);
    }

    #[test]
    fn rows_are_known_by_name_and_number_and_others_are_said_to_be_missing() {
        assert_eq!(
            ("demo".parse(), "17".parse(), "plane".parse()),
            (Ok(Row::Demo), Ok(Row::Plane), Ok(Row::Plane))
        );
        let muncher = ["4", "4a", "hybrid", "4b", "stun", "muncher"];
        assert_eq!(muncher.map(str::parse), [(); 6].map(|()| Ok(Row::Muncher)));
        assert_eq!(("6".parse(), "7".parse()), (Ok(Row::Faults), Ok(Row::Sequential)));
        assert!("8".parse::<Row>().unwrap_err().contains("no row 8; there are demo, rate, 1 (idle)"));
    }
}
