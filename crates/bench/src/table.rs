//! Results for people: a table for each case, and a line for each goal and each row.

use std::fmt::Write;

use crate::figures::Metric;
use crate::results::{Case, Curve, Goal, RowResult, Side};

/// All of a row: its cases, what shall hold, and what one must know.
#[must_use]
pub fn row(row: &RowResult) -> String {
    let mut text = format!("\nrow {}: {}\n", row.label(), row.title);
    if let Some(why) = &row.not_run {
        let _ = writeln!(text, "NOT RUN  {why}");
        return text;
    }
    for case in &row.cases {
        text += &self::case(case);
    }
    text += &goals(&row.goals);
    for note in &row.notes {
        let _ = writeln!(text, "note     {note}");
    }
    text
}

/// A line for each row: what it brought.
#[must_use]
pub fn summary(rows: &[RowResult]) -> String {
    let mut text = String::new();
    for row in rows {
        let missed = row.goals.iter().filter(|g| !g.met).count();
        let verdict = match (&row.not_run, row.is_right(), missed) {
            (Some(_), _, _) => "NOT RUN".to_owned(),
            (None, false, _) => "WRONG".to_owned(),
            (None, true, 0) => format!("met, {} goals", row.goals.len()),
            (None, true, missed) => format!("MISSED {missed} of {} goals", row.goals.len()),
        };
        let _ = writeln!(text, "row {:<16} {verdict:<24} {:.0} s", row.label(), row.took_s);
    }
    text
}

fn case(case: &Case) -> String {
    let title = if case.name.is_empty() {
        case.workload.clone()
    } else {
        format!("{}: {}", case.name, case.workload)
    };
    let mut text = format!("\n  {title}\n");
    if case.contenders.is_empty() {
        return text + &curves(&case.curves);
    }
    let _ = write!(text, "  {:<30}", "");
    for contender in &case.contenders {
        let _ = write!(text, "{:>24}", contender.name);
    }
    let _ = writeln!(text, "{:>14}{:>12}", "ratio", "limit");
    for metric in case.metrics() {
        let label = format!("{}, {}", metric.label(), metric.unit());
        let _ = write!(text, "  {:<30}", label.trim_end_matches(", "));
        for contender in &case.contenders {
            let cell = contender.summary(metric).map_or("-".to_owned(), |s| match s.samples {
                1 => number(s.median),
                _ => format!("{} ({}-{})", number(s.median), number(s.low), number(s.high)),
            });
            let _ = write!(text, "{cell:>24}");
        }
        let ratio = case.ratio(metric, 0);
        let ratio = if ratio.is_finite() { format!("{ratio:.3}") } else { String::new() };
        let limit =
            case.limits.iter().find(|l| l.metric == metric).map_or(String::new(), |l| number(l.value));
        let _ = writeln!(text, "{ratio:>14}{limit:>12}");
    }
    text + &split(case) + &remarks(case) + &courses(case)
}

/// The points of lines, for a case that is nothing but these.
fn curves(curves: &[Curve]) -> String {
    let mut text = String::new();
    for curve in curves {
        for (name, points) in &curve.lines {
            let points: Vec<String> = points.iter().map(|(x, y)| format!("{x}: {}", number(*y))).collect();
            let _ = writeln!(text, "  {:<30}{name:<18}{}", curve.y, points.join("  "));
        }
    }
    text
}

/// Steps of a line that is drawn with letters.
const STEPS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// As many letters as there is room for beside a name.
const LETTERS: usize = 100;

/// The lines of a case as letters, and what stands beside them.
fn courses(case: &Case) -> String {
    let mut text = String::new();
    for curve in &case.curves {
        let points = || {
            curve.lines.iter().flat_map(|(_, points)| points).filter(|p| p.0.is_finite() && p.1.is_finite())
        };
        let (left, right) =
            points().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, r), p| (l.min(p.0), r.max(p.0)));
        let top = points().map(|p| p.1).fold(0.0, f64::max);
        if right <= left || top <= 0.0 {
            continue;
        }
        let scale =
            format!("from {} to {} ({}), highest {}", number(left), number(right), curve.x, number(top));
        let _ = writeln!(text, "  {}; {}; {scale}", curve.title, curve.y);
        // More letters than points would leave gaps.
        let letters = curve.lines.iter().map(|(_, points)| points.len()).max().unwrap_or(0).min(LETTERS);
        for (name, points) in &curve.lines {
            let _ = writeln!(text, "  {name:<24}{}", spark(points, (left, right), top, letters));
        }
    }
    for line in &case.beside {
        let _ = writeln!(text, "  beside it: {line}");
    }
    text
}

/// The means of points in equal parts of an axis; a blank where there is none.
fn spark(points: &[(f64, f64)], (left, right): (f64, f64), top: f64, letters: usize) -> String {
    let letter = |at: usize| {
        let edge = |at: usize| left + (right - left) * at as f64 / letters as f64;
        let within = |x: f64| x >= edge(at) && (x < edge(at + 1) || at + 1 == letters);
        let values = points.iter().filter(|p| within(p.0)).map(|p| p.1);
        let (sum, count) = values.fold((0.0, 0.0), |(sum, count), y| (sum + y, count + 1.0));
        match count {
            0.0 => ' ',
            _ => STEPS[((sum / count / top * 8.0) as usize).min(STEPS.len() - 1)],
        }
    };
    (0..letters).map(letter).collect::<String>().trim_end().to_owned()
}

/// Where the time of our stops went: medians of each part.
fn split(case: &Case) -> String {
    let Some(ours) = case.ours().filter(|c| c.moves.iter().any(|m| !m.downtime_split.is_empty())) else {
        return String::new();
    };
    let mut names: Vec<&str> = Vec::new();
    for span in ours.moves.iter().flat_map(|m| &m.downtime_split) {
        if !names.contains(&span.name.as_str()) {
            names.push(&span.name);
        }
    }
    let middle = |name: &str| {
        let spent = ours
            .moves
            .iter()
            .filter(|m| !m.downtime_split.is_empty())
            .map(|m| m.downtime_split.iter().filter(|s| s.name == name).map(|s| s.ms).sum());
        crate::figures::Summary::of(spent).map_or(f64::NAN, |s| s.median)
    };
    let parts: Vec<String> = names.iter().map(|name| format!("{name} {:.1}", middle(name))).collect();
    format!("  ours is stopped for, ms: {}\n", parts.join(", "))
}

fn remarks(case: &Case) -> String {
    let mut text = String::new();
    for contender in &case.contenders {
        if let Some(why) = &contender.failed {
            let _ = writeln!(text, "  {} did not get through: {why}", contender.name);
        }
    }
    if let Some(verified) = &case.verified {
        let _ = match &verified.error {
            None if verified.is_equal() => {
                writeln!(text, "  RAM at the target: equal, {} blocks", verified.blocks)
            }
            None => writeln!(text, "  RAM at the target: nothing compared"),
            Some(why) => writeln!(text, "  RAM at the target: NOT PROVED: {why}"),
        };
    }
    if case.losses() != (0, 0) {
        let (lost, broken) = case.losses();
        let _ = writeln!(text, "  {lost} writes LOST, {broken} connections broke");
    }
    let loads = case.ours().map(|c| c.moves.iter().map(|m| m.load_before).fold(0.0, f64::max));
    if let Some(load) = loads.filter(|l| *l > 0.0) {
        let _ = writeln!(text, "  load average before a move: at most {load:.1}");
    }
    text
}

/// A line for each goal.
#[must_use]
pub fn goals(goals: &[Goal]) -> String {
    let line = |g: &Goal| {
        let verdict = if g.met { "met" } else { "MISSED" };
        format!("{verdict:<9}{}: {}, goal {}\n", g.text, number(g.value), bound(g))
    };
    goals.iter().map(line).collect()
}

/// The bound of a goal in words.
#[must_use]
pub fn bound(goal: &Goal) -> String {
    match goal.side {
        Side::AtMost => format!("at most {}", goal.bound),
        Side::AtLeast => format!("at least {}", goal.bound),
    }
}

/// Three or four digits that matter.
#[must_use]
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The label of a metric with its unit.
#[must_use]
pub fn labelled(metric: Metric) -> String {
    match metric.unit() {
        "" => metric.label().to_owned(),
        unit => format!("{}, {unit}", metric.label()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::sample;

    #[test]
    fn the_table_has_every_figure_of_both_their_ratio_and_the_limit() {
        let text = row(&sample());
        for part in
            ["total time, ms", "4000 (3900-9000)", "4100 (4000-4200)", "0.976", "3500", "equal, 4 blocks"]
        {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(text.contains("stopped for, ms: stop 1.0, load 11.0"), "{text}");
    }

    #[test]
    fn a_course_is_drawn_with_letters_and_what_stands_beside_it_is_said() {
        let mut row = sample();
        row.cases[0].beside = vec!["the paper saw 165 ms".to_owned()];
        let text = super::row(&row);
        assert!(
            text.contains('▅') && text.contains('█') && text.contains("beside it: the paper saw 165 ms"),
            "{text}"
        );
        let flat = spark(&[(0.0, 0.0), (100.0, 8.0)], (0.0, 100.0), 8.0, LETTERS);
        assert_eq!(
            (flat.chars().next(), flat.chars().last(), flat.chars().count()),
            (Some('▁'), Some('█'), LETTERS)
        );
    }

    #[test]
    fn a_case_of_lines_shows_their_points() {
        let mut row = sample();
        row.cases[0].contenders.clear();
        let text = super::row(&row);
        assert!(text.contains("1: 2.00  2: 4.00") && !text.contains("ratio"), "{text}");
    }

    #[test]
    fn what_was_not_proved_is_said_loudly() {
        let mut bad = sample();
        bad.cases[0].verified.as_mut().unwrap().error = Some("RAM block pc.ram is not what it was".into());
        bad.cases[0].contenders[0].moves[0].client.as_mut().unwrap().reconnects = 1;
        let text = row(&bad);
        assert!(
            text.contains("NOT PROVED") && text.contains("pc.ram") && text.contains("1 connections"),
            "{text}"
        );
        assert!(summary(&[bad]).contains("WRONG"));
        assert!(goals(&[Goal::at_most("x", 2.0, 1.0)]).starts_with("MISSED"));
        let not = RowResult { not_run: Some("no root".into()), ..RowResult::default() };
        assert!(summary(std::slice::from_ref(&not)).contains("NOT RUN") && row(&not).contains("no root"));
    }
}
