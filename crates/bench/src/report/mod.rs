//! Results as one page that needs nothing else: no script, no font, no network.
//!
//! At the top is what the newest file says of each row; below are the plots of each row, from the newest file that has it, and
//! where several files have it, how it changed.

mod cases;
mod history;
mod html;
mod palette;
mod plots;

use jiff::Timestamp;

use self::html::{document, escaped, paragraph};
use crate::facts::HostFacts;
use crate::results::{Goal, Results, RowResult};
use crate::{BenchError, table};

const TITLE: &str = "Sterna beside stock QEMU";
const READING: &str = "Bars are medians, thin lines reach from the smallest to the largest sample, dashed lines are what \
    the link or QEMU alone would take for the pages as they are: what is compressed or left out can be quicker. A ratio is ours / the peer's, of the medians. Total time runs from the command until the source is free, \
    the start of the target's QEMU included. CPU seconds are those of both QEMUs (the emulated guest's own work is part of \
    it) and, for ours, of both agents.";

/// A file of results.
struct File<'a> {
    title: &'a str,
    results: &'a Results,
    /// When it was measured, if it says so.
    began: Option<Timestamp>,
}

impl<'a> File<'a> {
    fn of(title: &'a str, results: &'a Results) -> File<'a> {
        File { title, results, began: results.host.began.parse().ok() }
    }
}

/// A row, and the newest file that has it.
struct Newest<'a> {
    row: &'a RowResult,
    file: &'a File<'a>,
}

/// What a row brought, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    NotRun,
    Wrong,
    Missed(usize),
    Met,
}

/// The page for files of results, each with a title.
pub fn page(files: &[(String, Results)]) -> Result<String, BenchError> {
    let mut files: Vec<File<'_>> = files.iter().map(|(title, results)| File::of(title, results)).collect();
    // What has no date is the oldest; of equals, the last one named is the newest.
    files.sort_by_key(|f| f.began);
    let Some(newest) = files.last() else {
        return Ok(document(TITLE, &paragraph("", "There are no results.")));
    };
    let rows = rows(&files);
    let (current, earlier): (Vec<&Newest<'_>>, Vec<&Newest<'_>>) =
        rows.iter().partition(|r| std::ptr::eq(r.file, newest));
    let mut body = format!("<h1>{}</h1>\n{}", escaped(TITLE), facts(newest));
    body += &overview(&current);
    if !earlier.is_empty() {
        body += &format!("<h3>Measured earlier, and not in the newest file</h3>\n{}", overview(&earlier));
    }
    body += &paragraph("dim", READING);
    for newest in current.into_iter().chain(earlier) {
        body += &section(&files, newest)?;
    }
    body += &sources(&files);
    Ok(document(TITLE, &body))
}

/// Each row from the newest file that has it, the worst first.
fn rows<'a>(files: &'a [File<'a>]) -> Vec<Newest<'a>> {
    let mut rows: Vec<Newest<'a>> = Vec::new();
    for file in files.iter().rev() {
        for row in &file.results.rows {
            // A row may be in a file twice, if somebody put files together.
            if !rows.iter().any(|r| r.row.name == row.name && !std::ptr::eq(r.file, file)) {
                rows.push(Newest { row, file });
            }
        }
    }
    rows.sort_by_key(|r| verdict(r.row));
    rows
}

fn verdict(row: &RowResult) -> Verdict {
    let missed = row.goals.iter().filter(|g| !g.met).count();
    match (&row.not_run, row.is_right(), missed) {
        (Some(_), _, _) => Verdict::NotRun,
        (None, false, _) => Verdict::Wrong,
        (None, true, 0) => Verdict::Met,
        (None, true, missed) => Verdict::Missed(missed),
    }
}

impl Verdict {
    fn html(self) -> String {
        match self {
            Verdict::NotRun => "<span class=\"missed\">NOT RUN</span>".to_owned(),
            Verdict::Wrong => "<span class=\"missed\">WRONG</span>".to_owned(),
            Verdict::Missed(goals) => format!("<span class=\"missed\">MISSED {goals}</span>"),
            Verdict::Met => "<span class=\"met\">met</span>".to_owned(),
        }
    }
}

/// What each row brought, goal by goal.
fn overview(rows: &[&Newest<'_>]) -> String {
    let row = |newest: &&Newest<'_>| {
        let row = newest.row;
        let head = format!(
            "<tr><th colspan=\"3\">{}: {}</th><th>{}</th></tr>\n",
            escaped(&row.label()),
            escaped(&row.title),
            verdict(row).html()
        );
        let why = row.not_run.iter().map(|why| format!("<tr><td colspan=\"4\">{}</td></tr>\n", escaped(why)));
        head + &why.collect::<String>() + &row.goals.iter().map(goal).collect::<String>()
    };
    format!("<div class=\"scroll\"><table>\n{}</table></div>\n", rows.iter().map(row).collect::<String>())
}

fn goal(goal: &Goal) -> String {
    let (class, verdict) = if goal.met { ("met", "met") } else { ("missed", "MISSED") };
    let value = if goal.value.is_finite() { table::number(goal.value) } else { "not measured".to_owned() };
    format!(
        "<tr><td>{}</td><td>{value}</td><td>{}</td><td class=\"{class}\">{verdict}</td></tr>\n",
        escaped(&goal.text),
        escaped(&table::bound(goal))
    )
}

/// All of a row.
fn section(files: &[File<'_>], newest: &Newest<'_>) -> Result<String, BenchError> {
    let Newest { row, file } = newest;
    let mut text = format!(
        "<section>\n<h2>{}: {} {}</h2>\n",
        escaped(&row.label()),
        escaped(&row.title),
        verdict(row).html()
    );
    text += &paragraph("dim", &format!("{}, {}", file.title, date(file)));
    if let Some(why) = &row.not_run {
        text += &paragraph("missed", &format!("It was not measured: {why}"));
    }
    for case in &row.cases {
        text += &cases::section(case)?;
        text += &history::of_case(files, row, case)?;
    }
    for note in &row.notes {
        text += &paragraph("dim", note);
    }
    text += &format!(
        "<details><summary>All figures as text</summary><pre>{}</pre></details>\n</section>\n",
        escaped(table::row(row).trim_start())
    );
    Ok(text)
}

/// The machine, and when.
fn facts(file: &File<'_>) -> String {
    let HostFacts {
        kernel,
        cpu,
        cores,
        memory_mib,
        qemu,
        sterna,
        load_before,
        records_on,
        free_memory_kept,
        ..
    } = &file.results.host;
    let kept = if *free_memory_kept { "; free memory stayed in the machine" } else { "" };
    let pairs = file.results.pairs.map_or("a quick run".to_owned(), |pairs| format!("{pairs} pairs"));
    let text = format!(
        "{}, measured {}, {pairs}. {sterna}, {qemu}; {cores} cores of {cpu}, {memory_mib} MiB, Linux {kernel}, records on \
         {records_on}; load average before {load_before}{kept}.",
        file.title,
        date(file)
    );
    paragraph("", &text)
}

/// The files, where there are several: figures of different machines are not to be compared.
fn sources(files: &[File<'_>]) -> String {
    match files {
        [_] => String::new(),
        _ => format!("<h2>Files</h2>\n{}", files.iter().map(facts).collect::<String>()),
    }
}

fn date(file: &File<'_>) -> String {
    let date = file.began.map(|t| t.strftime("%Y-%m-%d %H:%M UTC").to_string());
    date.unwrap_or_else(|| "at a time that is not known".to_owned())
}

#[cfg(test)]
mod tests;
