//! Results for people: one table, and whether the goals are met.

use std::fmt::Write;

use crate::results::{Demo, Goal, Metric, Move, Rate, spread};

/// The table of the demo.
#[must_use]
pub fn demo(demo: &Demo) -> String {
    let mut text = format!("{:<30}{:>16}{:>16}{:>14}\n", "", "ours", "stock QEMU", "ours / stock");
    for metric in Metric::ALL {
        let cell = |value: f64| format!("{} {}", number(value), metric.unit());
        let (ours, stock) = (metric.of(&demo.ours), metric.of(&demo.stock));
        line(&mut text, metric.label(), &cell(ours), &cell(stock), &format!("{:.3}", demo.ratio(metric)));
    }
    let lost = |of: fn(&crate::results::Pair) -> &Move| {
        demo.pairs.iter().map(|p| of(p).client.lost_writes).sum::<u64>().to_string()
    };
    line(&mut text, "lost writes", &lost(|p| &p.ours), &lost(|p| &p.stock), "");
    let equal = match (&demo.verified.error, demo.ram_equal) {
        (None, true) => format!("equal, {} blocks", demo.verified.blocks),
        (Some(_), _) => "NOT PROVED".to_owned(),
        (None, false) => "nothing compared".to_owned(),
    };
    line(&mut text, "RAM at the target", &equal, "-", "");
    if let Some(why) = &demo.verified.error {
        let _ = writeln!(text, "\nthe comparing move failed: {why}");
    }
    if demo.broken_connections > 0 {
        let _ = writeln!(text, "{} connections of clients broke", demo.broken_connections);
    }
    text + &spreads(demo) + &split(demo) + &load(demo)
}

/// What else the machine did: emulated guests on two cores measure their neighbours as well.
fn load(demo: &Demo) -> String {
    let loads: Vec<String> = demo.pairs.iter().map(|p| format!("{:.1}", p.load_before)).collect();
    format!("load average before: {}, on {} cores\n", loads.join(", "), demo.host.cores)
}

/// How far the samples lie apart, when there are several.
fn spreads(demo: &Demo) -> String {
    if demo.pairs.len() < 2 {
        return String::new();
    }
    let mut text = format!("\nmedians of {} pairs; smallest and largest:\n", demo.pairs.len());
    let ours: Vec<&Move> = demo.pairs.iter().map(|p| &p.ours).collect();
    let stock: Vec<&Move> = demo.pairs.iter().map(|p| &p.stock).collect();
    for metric in Metric::ALL {
        let cell = |moves: &[&Move]| {
            let (low, high) = spread(metric, moves);
            format!("{}-{}", number(low), number(high))
        };
        line(&mut text, metric.label(), &cell(&ours), &cell(&stock), "");
    }
    text
}

/// Where the time of ours went, pair by pair.
fn split(demo: &Demo) -> String {
    let mut text = String::from("\nours, in ms:\n");
    for Move { setup_ms, downtime_split, .. } in demo.pairs.iter().map(|p| &p.ours) {
        let parts: Vec<_> = downtime_split.iter().map(|s| format!("{} {:.1}", s.name, s.ms)).collect();
        let _ = writeln!(text, "  until the first page {setup_ms:.0}; stopped: {}", parts.join(", "));
    }
    text
}

/// The table of the row `rate`.
#[must_use]
pub fn rate(rate: &Rate) -> String {
    let heads = ["limit", "on the link", "fastest second", "last round", "distance"];
    let mut text = heads.map(|h| format!("{h:>16}")).concat() + "\n";
    for limited in &rate.moves {
        let mbps = |value: f64| format!("{value:.1} Mbit/s");
        let figures = [limited.limit_mbps, limited.wire_mbps, limited.fastest_mbps, limited.ram_mbps];
        let distance = format!("{:+.2} %", limited.deviation() * 100.0);
        let _ = writeln!(text, "{}{distance:>16}", figures.map(|f| format!("{:>16}", mbps(f))).concat());
    }
    let _ = writeln!(text, "lost writes {}", rate.lost_writes);
    text
}

/// A line for each goal.
#[must_use]
pub fn goals(goals: &[Goal]) -> String {
    let line = |g: &Goal| {
        let verdict = if g.met { "met" } else { "MISSED" };
        format!("{verdict:<8}{}: {:.3}, goal at most {}\n", g.text, g.value, g.at_most)
    };
    goals.iter().map(line).collect()
}

fn line(text: &mut String, label: &str, ours: &str, stock: &str, ratio: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{label:<30}{ours:>16}{stock:>16}{ratio:>14}");
}

/// Three or four digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::sample;

    #[test]
    fn the_table_has_every_figure_of_both_and_their_ratio() {
        let text = demo(&sample());
        for metric in Metric::ALL {
            assert!(text.contains(metric.label()), "{text}");
        }
        assert!(text.contains("4000 ms") && text.contains("4100 ms") && text.contains("0.976"), "{text}");
        assert!(text.contains("equal, 4 blocks"), "{text}");
    }

    #[test]
    fn what_was_not_proved_is_said_loudly() {
        let mut bad = sample();
        bad.ram_equal = false;
        bad.verified.error = Some("RAM block pc.ram is not what it was".into());
        bad.broken_connections = 1;
        let text = demo(&bad);
        assert!(
            text.contains("NOT PROVED") && text.contains("pc.ram") && text.contains("1 connections"),
            "{text}"
        );
        assert!(goals(&[Goal::at_most("x", 2.0, 1.0)]).starts_with("MISSED"));
    }
}
