//! How the medians of a row changed from file to file.

use jiff::Timestamp;

use super::File;
use super::html::{Key, figure, grid};
use super::palette;
use super::plots::{self, Group};
use crate::BenchError;
use crate::figures::Metric;
use crate::results::{Case, Results, RowResult};
use crate::table;

/// What is worth following.
const MAIN: [Metric; 4] = [Metric::TotalTime, Metric::Downtime, Metric::Cpu, Metric::Throughput];
const SECONDS_A_DAY: i64 = 24 * 60 * 60;

/// A case at a time, in days.
type Dated<'a> = (f64, &'a Case);

/// The history of a case of a row, where at least two files tell of it.
pub(super) fn of_case(files: &[File<'_>], row: &RowResult, case: &Case) -> Result<String, BenchError> {
    // Days are counted from the midnight before the first file, so that whole ones are dates.
    let Some(first) = files.iter().find_map(|f| f.began) else { return Ok(String::new()) };
    let midnight = first.as_second().div_euclid(SECONDS_A_DAY) * SECONDS_A_DAY;
    let days = |began: Timestamp| (began.as_second() - midnight) as f64 / SECONDS_A_DAY as f64;
    let dated = files.iter().filter_map(|f| Some((days(f.began?), same(f.results, row, case)?)));
    let cases: Vec<Dated<'_>> = dated.collect();
    let date = |days: &f64| label(midnight, *days);
    let mut figures = Vec::new();
    for metric in MAIN {
        figures.extend(medians(&cases, metric, &date)?);
    }
    figures.extend(ratios(&cases, &date)?);
    Ok(grid("wide", "From file to file", &figures))
}

/// The case of the same name, in the row of the same name.
fn same<'a>(results: &'a Results, row: &RowResult, case: &Case) -> Option<&'a Case> {
    let mut cases = results.rows.iter().filter(|r| r.name == row.name).flat_map(|r| &r.cases);
    cases.find(|c| c.name == case.name)
}

/// Our median and the first peer's.
fn medians(
    cases: &[Dated<'_>],
    metric: Metric,
    date: &dyn Fn(&f64) -> String,
) -> Result<Option<String>, BenchError> {
    let line = |place: usize| -> Vec<(f64, f64)> {
        let contender =
            |(at, case): &Dated<'_>| Some((*at, case.contenders.get(place)?.summary(metric)?.median));
        cases.iter().filter_map(contender).collect()
    };
    let lines = [line(0), line(1)];
    if lines[0].len() < 2 {
        return Ok(None);
    }
    let (mut groups, mut legend) = (Vec::new(), Vec::new());
    for (place, line) in lines.into_iter().enumerate().filter(|(_, line)| !line.is_empty()) {
        let name = cases.iter().rev().find_map(|(_, case)| case.contenders.get(place));
        let colour = palette::contender(place);
        legend.push(Key::full(name.map_or("", |c| &c.name), colour));
        groups.push(Group { colour, lines: vec![line] });
    }
    let plot = plots::lines(&groups, "", date, None)?;
    Ok(Some(figure(&format!("{}, median", table::labelled(metric)), &plot, &legend)))
}

/// Ours / the first peer's, of all metrics.
fn ratios(cases: &[Dated<'_>], date: &dyn Fn(&f64) -> String) -> Result<Option<String>, BenchError> {
    let (mut groups, mut legend) = (Vec::new(), Vec::new());
    for (place, metric) in MAIN.into_iter().enumerate() {
        let ratios = cases.iter().map(|(at, case)| (*at, case.ratio(metric, 0)));
        let line: Vec<(f64, f64)> = ratios.filter(|(_, ratio)| ratio.is_finite()).collect();
        if line.len() > 1 {
            let colour = palette::part(if place < 3 { place } else { place + 1 });
            legend.push(Key::full(metric.label(), colour));
            groups.push(Group { colour, lines: vec![line] });
        }
    }
    if groups.is_empty() {
        return Ok(None);
    }
    legend.push(Key::dashed("as the peer"));
    let peer = cases.iter().rev().find_map(|(_, case)| case.peers().first()).map_or("the peer", |c| &c.name);
    let plot = plots::lines(&groups, "", date, Some(1.0))?;
    Ok(Some(figure(&format!("ours / {peer}, of the medians"), &plot, &legend)))
}

/// A date, with the time of day where it is not midnight. UTC.
fn label(midnight: i64, days: f64) -> String {
    let second = midnight + (days * SECONDS_A_DAY as f64).round() as i64;
    let Ok(time) = Timestamp::from_second(second) else { return String::new() };
    let is_midnight = second.rem_euclid(SECONDS_A_DAY) == 0;
    time.strftime(if is_midnight { "%Y-%m-%d" } else { "%m-%d %H:%M" }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_days_are_dates_and_parts_have_a_time() {
        let midnight = 1_795_219_200;
        assert_eq!(label(midnight, 0.0), "2026-11-21");
        assert_eq!(label(midnight, 1.5), "11-22 12:00");
    }
}
