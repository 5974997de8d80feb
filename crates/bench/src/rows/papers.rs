//! What the papers behind this project measured, and which row measures it here.
//!
//! Only figures that can be read in the papers, or in their authors' slides, are listed. Theirs are of other machines: what can
//! be compared is the ratio to the peer of the same machine, and that a row is of the same shape.

use super::Row;
use crate::results::RowResult;

/// A paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Paper {
    Clark,
    Fernando,
    TrafficSensitive,
    TemplateAware,
    SharingAware,
}

impl Paper {
    fn text(self) -> &'static str {
        match self {
            Paper::Clark => "Clark et al., Live Migration of Virtual Machines, NSDI 2005",
            Paper::Fernando => {
                "Fernando et al., Quick Eviction of Virtual Machines Through Proactive Snapshots, 2016"
            }
            Paper::TrafficSensitive => {
                "Deshpande and Keahey, Traffic-Sensitive Live Migration of Virtual Machines, slides"
            }
            Paper::TemplateAware => "Eswaran, template-aware migration (TLM, SEC 2023), slides of the thesis",
            Paper::SharingAware => {
                "Eswaran, sharing-aware migration (SLM, CCGRID 2024), slides of the thesis"
            }
        }
    }
}

/// Where ours is measured.
#[derive(Debug, Clone, Copy)]
enum Here {
    /// By this row.
    Row(Row),
    /// By the row of this number in the project's list, which is not there yet.
    NotYet(u8),
    /// Nowhere.
    Nowhere,
}

impl Here {
    fn text(self) -> String {
        match self {
            Here::Row(row) => format!(
                "row {}",
                row.number().map_or(row.name().to_owned(), |n| format!("{n} ({})", row.name()))
            ),
            Here::NotYet(number) => format!("row {number}: not yet measured, its mode does not exist yet"),
            Here::Nowhere => "no row yet".to_owned(),
        }
    }
}

/// A figure of a paper.
#[derive(Debug, Clone, Copy)]
struct Figure {
    paper: Paper,
    /// Where it stands.
    place: &'static str,
    what: &'static str,
    value: &'static str,
    here: Here,
}

const fn figure(
    paper: Paper,
    place: &'static str,
    what: &'static str,
    value: &'static str,
    here: Here,
) -> Figure {
    Figure { paper, place, what, value, here }
}

const FIGURES: &[Figure] = &[
    figure(
        Paper::Clark,
        "section 6, Apache 1.3: a file of 512 KB to 100 clients",
        "downtime",
        "165 ms",
        Here::Row(Row::Clark),
    ),
    figure(Paper::Clark, "section 6, SPECweb99", "downtime", "210 ms", Here::Nowhere),
    figure(Paper::Clark, "section 6, Quake 3 server", "downtime", "60 ms", Here::Row(Row::Clark)),
    figure(
        Paper::Clark,
        "section 6, MMuncher: writes faster than the link carries",
        "downtime",
        "3.5 s",
        Here::Row(Row::Clark),
    ),
    figure(
        Paper::Fernando,
        "figure 2, idle, by size of the VM",
        "time to evict",
        "6 to 246 ms",
        Here::NotYet(12),
    ),
    figure(
        Paper::Fernando,
        "section III, idle, 8 GB",
        "downtime, of pre-copy too",
        "about 5 ms",
        Here::Row(Row::Downtime),
    ),
    figure(
        Paper::Fernando,
        "figure 3, a guest that writes",
        "time to evict, pre-copy's growth / theirs",
        "8 to 18",
        Here::NotYet(13),
    ),
    figure(
        Paper::TrafficSensitive,
        "two VMs of 5 GB, netperf from one to the other",
        "total time: pre-copy, post-copy, theirs",
        "79.1, 92.1, 48.2 s",
        Here::NotYet(8),
    ),
    figure(
        Paper::TrafficSensitive,
        "the same",
        "data transferred: pre-copy, post-copy, theirs",
        "10280, 10277, 10278 MB",
        Here::NotYet(8),
    ),
    figure(
        Paper::TrafficSensitive,
        "the same",
        "netperf: pre-copy, post-copy, theirs",
        "690.47, 660.05, 894.65 Mbit/s",
        Here::NotYet(8),
    ),
    figure(
        Paper::TrafficSensitive,
        "16 VMs of 8 hosts, 12 of them Redis under YCSB",
        "total time: pre-copy, post-copy, theirs",
        "74.5, 139, 57.75 s",
        Here::NotYet(10),
    ),
    figure(
        Paper::TrafficSensitive,
        "the same",
        "average time: pre-copy, post-copy, theirs",
        "50.56, 60.48, 37.79 s",
        Here::NotYet(10),
    ),
    figure(
        Paper::TrafficSensitive,
        "the same",
        "data transferred: pre-copy, post-copy, theirs",
        "50.90, 30.18, 34.07 GB",
        Here::NotYet(10),
    ),
    figure(
        Paper::TrafficSensitive,
        "the same",
        "operations a second: at rest, pre-copy, post-copy, theirs",
        "4802, 3875, 4161, 4126",
        Here::NotYet(10),
    ),
    figure(
        Paper::TemplateAware,
        "evaluation",
        "total time, less than pre-copy",
        "96 %",
        Here::Row(Row::Templates),
    ),
    figure(
        Paper::TemplateAware,
        "evaluation",
        "pages, fewer than pre-copy",
        "93 %",
        Here::Row(Row::Templates),
    ),
    figure(
        Paper::SharingAware,
        "evaluation",
        "total time, less than without",
        "59 %",
        Here::Row(Row::Sharing),
    ),
    figure(Paper::SharingAware, "evaluation", "pages, fewer than without", "62 %", Here::Row(Row::Sharing)),
];

/// What is listed of no paper: it says so.
const MISSING: &str = "Not listed, since none of their figures could be read: Hines and Gopalan, VEE 2009 (post-copy: measured here by row 6, \
     faults, row 7, sequential, row 4, part a, and row postcopy); Jo et al., VEE 2013 (shared storage: row 11, not yet measured); Eswaran, intra-host TLM (row 16, not yet measured).";
/// Where a paper does not agree with itself.
const OPEN: &str = "Traffic-sensitive migration is said to take 42 % and 49 % less time; its own table gives 39 % and 48 %. The table is listed.";

/// All of it as a result that measured nothing.
pub(super) fn result() -> RowResult {
    let line = |f: &Figure| {
        format!("{}; {}: {}: {}. Here: {}", f.paper.text(), f.place, f.what, f.value, f.here.text())
    };
    let notes = FIGURES.iter().map(line).chain([OPEN.to_owned(), MISSING.to_owned()]).collect();
    RowResult { notes, ..RowResult::default() }
}

/// What the papers of Eswaran say, a line each.
pub(super) fn of_eswaran() -> Vec<String> {
    let ours = |figure: &&Figure| matches!(figure.paper, Paper::TemplateAware | Paper::SharingAware);
    let line = |f: &Figure| format!("{}, {}: {}: {}", f.paper.text(), f.place, f.what, f.value);
    FIGURES.iter().filter(ours).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_that_exists_is_not_said_to_be_missing() {
        for figure in FIGURES {
            if let Here::NotYet(number) = figure.here {
                assert!(Row::ALL.iter().all(|r| r.number() != Some(number)), "{figure:?}");
            }
        }
    }

    #[test]
    fn where_post_copy_is_measured_is_said_though_its_paper_has_no_figures() {
        for row in [Row::Faults, Row::Sequential, Row::Muncher] {
            assert!(MISSING.contains(&format!("row {}", row.number().unwrap())), "{row:?}");
        }
        assert!(MISSING.contains(Row::Postcopy.name()) && MISSING.contains("Hines and Gopalan"));
    }

    #[test]
    fn every_figure_has_a_line() {
        let notes = result().notes;
        assert_eq!(notes.len(), FIGURES.len() + 2);
        assert!(
            notes.iter().any(|n| n.contains("Quake 3") && n.contains("60 ms") && n.contains("row clark"))
        );
    }
}
