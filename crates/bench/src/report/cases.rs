//! A row's cases: who was how fast, how our stops were spent, and how moves went on.

use super::html::{Key, escaped, figure, grid, paragraph};
use super::palette;
use super::plots::{self, Bar, Group};
use crate::BenchError;
use crate::figures::{Metric, Summary};
use crate::results::{Case, Contender, Limit, Move};
use crate::table;

/// A distribution of fewer says nothing.
const DISTRIBUTION_MOVES_MIN: usize = 8;

/// All of a case.
pub(super) fn section(case: &Case) -> Result<String, BenchError> {
    let heading =
        if case.name.is_empty() { String::new() } else { format!("<h3>{}</h3>\n", escaped(&case.name)) };
    Ok([
        heading,
        paragraph("", &case.workload),
        remarks(case),
        grid("", "Medians, and from the smallest to the largest", &bars(case)?),
        grid("wide", "How our downtime is spent", &split(case)?),
        grid("wide", "How downtime is distributed", &distributions(case)?),
        grid("wide", "How the moves go on", &timelines(case)?),
        grid("wide", if case.contenders.is_empty() { "How it grows" } else { "How it went" }, &curves(case)?),
        case.beside.iter().map(|line| paragraph("dim", line)).collect(),
    ]
    .concat())
}

/// What was proved, what was lost, and who did not get through.
fn remarks(case: &Case) -> String {
    let mut text = String::new();
    for contender in &case.contenders {
        if let Some(why) = &contender.failed {
            text += &paragraph("missed", &format!("{} did not get through: {why}", contender.name));
        }
    }
    if let Some(verified) = &case.verified {
        text += &match &verified.error {
            None if verified.is_equal() => paragraph(
                "met",
                &format!("RAM at the target was equal: {} blocks compared.", verified.blocks),
            ),
            None => {
                paragraph("missed", "RAM at the target was NOT PROVED to be equal: nothing was compared.")
            }
            Some(why) => paragraph("missed", &format!("RAM at the target was NOT PROVED to be equal: {why}")),
        };
    }
    let mut clients = case.contenders.iter().flat_map(|c| &c.moves).filter_map(|m| m.client.as_ref());
    // Some clients only listen.
    let served = clients.any(|c| c.acknowledged > 0);
    match case.losses() {
        (0, 0) if served => {
            text + &paragraph("met", "No acknowledged write was lost, and no connection broke.")
        }
        (0, 0) => text,
        (lost, broken) => {
            text + &paragraph("missed", &format!("{lost} writes LOST, {broken} connections broke."))
        }
    }
}

/// A plot for each metric.
fn bars(case: &Case) -> Result<Vec<String>, BenchError> {
    case.metrics().into_iter().map(|metric| bars_of(case, metric)).collect()
}

fn bars_of(case: &Case, metric: Metric) -> Result<String, BenchError> {
    let bar = |(place, contender): (usize, &'_ Contender)| {
        contender.summary(metric).map(|summary| (place, contender.name.clone(), summary))
    };
    let found: Vec<_> = case.contenders.iter().enumerate().filter_map(bar).collect();
    let bars: Vec<Bar<'_>> = found
        .iter()
        .map(|(place, name, summary)| Bar { name, colour: palette::contender(*place), summary: *summary })
        .collect();
    let limits: Vec<&Limit> =
        case.limits.iter().filter(|l| l.metric == metric && l.value.is_finite()).collect();
    let limit = |l: &&Limit| Key::dashed(format!("limit {}: {}", table::number(l.value), l.text));
    let values: Vec<f64> = limits.iter().map(|l| l.value).collect();
    let mut legend: Vec<Key> = limits.iter().map(limit).collect();
    let ratio = case.ratio(metric, 0);
    if let Some(peer) = case.peers().first().filter(|_| ratio.is_finite()) {
        legend.push(Key::text(format!("ours / {}: {ratio:.3}", peer.name)));
    }
    Ok(figure(&table::labelled(metric), &plots::bars(&bars, &values)?, &legend))
}

/// A stacked bar for each of our moves, and the medians of the parts.
fn split(case: &Case) -> Result<Vec<String>, BenchError> {
    let moves = case.ours().map_or(&[][..], |c| &c.moves);
    let moves: Vec<&Move> = moves.iter().filter(|m| !m.downtime_split.is_empty()).collect();
    let mut names: Vec<&str> = Vec::new();
    for span in moves.iter().flat_map(|m| &m.downtime_split) {
        if !names.contains(&span.name.as_str()) {
            names.push(&span.name);
        }
    }
    if moves.is_empty() {
        return Ok(Vec::new());
    }
    let spent = |m: &Move, name: &str| -> f64 {
        m.downtime_split.iter().filter(|s| s.name == name && s.ms.is_finite()).map(|s| s.ms).sum()
    };
    let parts = |m: &&Move| {
        names
            .iter()
            .enumerate()
            .map(|(place, name)| (palette::part(place), spent(m, name)))
            .collect::<Vec<_>>()
    };
    let key = |(place, name): (usize, &&str)| {
        let middle = Summary::of(moves.iter().map(|m| spent(m, name))).map_or(f64::NAN, |s| s.median);
        Key::full(format!("{name} {}", plots::value(middle)), palette::part(place))
    };
    let stacks: Vec<_> = moves.iter().map(parts).collect();
    let legend: Vec<Key> = names.iter().enumerate().map(key).collect();
    Ok(vec![figure("parts of our downtime; medians, ms, below", &plots::stacked(&stacks)?, &legend)])
}

/// A plot for each contender that moved often enough.
fn distributions(case: &Case) -> Result<Vec<String>, BenchError> {
    let mut figures = Vec::new();
    for (place, contender) in case.contenders.iter().enumerate() {
        let values: Vec<f64> =
            contender.moves.iter().filter_map(|m| m.figures.get(Metric::Downtime)).collect();
        let Some(summary) = Summary::of(values.iter().copied()) else { continue };
        if values.len() < DISTRIBUTION_MOVES_MIN {
            continue;
        }
        let title = format!(
            "{}: share of {} moves whose downtime is not longer; median {}, 95 of 100 within {} ms",
            contender.name,
            values.len(),
            table::number(summary.median),
            table::number(summary.p95)
        );
        let plot = plots::distribution(&values, summary, palette::contender(place), "downtime, ms")?;
        figures.push(figure(&title, &plot, &[]));
    }
    Ok(figures)
}

/// What was still to be sent, and what clients got done meanwhile.
fn timelines(case: &Case) -> Result<Vec<String>, BenchError> {
    let remaining = |m: &Move| -> Vec<(f64, f64)> {
        // Before the first scan nothing is known to be unsent.
        let known = m.progress.iter().skip_while(|p| p.remaining == 0 && p.transferred == 0);
        known.map(|p| (p.ms / 1e3, p.remaining as f64 / 1e6)).collect()
    };
    let writes = |m: &Move| -> Vec<(f64, f64)> {
        // The last second is not a whole one: the client ended in it.
        let whole =
            m.client.as_ref().and_then(|c| c.per_second.split_last()).map_or(&[][..], |(_, whole)| whole);
        whole.iter().enumerate().map(|(second, writes)| (second as f64, *writes as f64)).collect()
    };
    let both = [
        timeline(case, "MB of RAM known to be unsent", "s since the command", remaining)?,
        timeline(case, "writes acknowledged per second", "s since the client began", writes)?,
    ];
    Ok(both.into_iter().flatten().collect())
}

/// A line for each move of which something is known.
fn timeline(
    case: &Case,
    title: &str,
    x: &str,
    points: impl Fn(&Move) -> Vec<(f64, f64)>,
) -> Result<Option<String>, BenchError> {
    let (mut groups, mut legend) = (Vec::new(), Vec::new());
    for (place, contender) in case.contenders.iter().enumerate() {
        let lines: Vec<_> = contender.moves.iter().map(&points).filter(|line| line.len() > 1).collect();
        if !lines.is_empty() {
            let colour = palette::contender(place);
            legend.push(Key::full(&contender.name, colour));
            groups.push(Group { colour, lines });
        }
    }
    if groups.is_empty() {
        return Ok(None);
    }
    Ok(Some(figure(title, &plots::lines(&groups, x, &|v| plots::value(*v), None)?, &legend)))
}

/// How figures grow.
fn curves(case: &Case) -> Result<Vec<String>, BenchError> {
    let mut figures = Vec::new();
    for curve in case.curves.iter().filter(|c| c.lines.iter().any(|l| !l.1.is_empty())) {
        let lines = curve.lines.iter().enumerate();
        let groups: Vec<Group> = lines
            .map(|(place, (_, points))| Group { colour: palette::part(place), lines: vec![points.clone()] })
            .collect();
        let names = curve.lines.iter().enumerate();
        let legend: Vec<Key> =
            names.map(|(place, (name, _))| Key::full(name, palette::part(place))).collect();
        let plot = plots::lines(&groups, &curve.x, &|v| plots::value(*v), None)?;
        figures.push(figure(&format!("{} · {}", curve.title, curve.y), &plot, &legend));
    }
    Ok(figures)
}
