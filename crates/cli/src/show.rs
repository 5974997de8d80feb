//! Results on stdout: tables for people, JSON for programs.

use crate::args::Format;
use crate::exit::{Exit, Failure};
use crate::human::plain;
use comfy_table::{Table, TableStyle};
use serde::Serialize;
use std::io::{self, ErrorKind, Write};

/// Writes to stdout. A reader that closed the pipe (`| head`) has read enough.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(why) if why.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Failed, format!("the result could not be written: {why}")))
        }
        _ => Ok(()),
    }
}

/// One JSON document, for eyes as well.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    print(&(serde_json::to_string_pretty(value).map_err(no_json)? + "\n"))
}

/// One JSON document on a line of its own.
pub(crate) fn json_line(value: &impl Serialize) -> Result<(), Failure> {
    print(&(serde_json::to_string(value).map_err(no_json)? + "\n"))
}

fn no_json(why: serde_json::Error) -> Failure {
    Failure::new(Exit::Failed, format!("the result is no JSON: {why}"))
}

/// A list in the asked shape. `columns` gives the heads and `row` the cells of the table.
pub(crate) fn list<T: Serialize>(
    format: Format,
    items: &[T],
    columns: &[&str],
    row: impl Fn(&T) -> Vec<String>,
) -> Result<(), Failure> {
    match format {
        Format::Json => json(&items),
        Format::Jsonl => items.iter().try_for_each(json_line),
        Format::Table | Format::Wide => {
            let mut table = blank_table();
            table.set_header(columns);
            for item in items {
                table.add_row(row(item).iter().map(|cell| one_line(cell)));
            }
            print(&trimmed(&table))
        }
    }
}

/// Labels and values, as `virsh domjobinfo` has them.
pub(crate) fn pairs(pairs: &[(&str, String)]) -> Result<(), Failure> {
    let mut table = blank_table();
    for (label, value) in pairs {
        table.add_row([format!("{label}:"), one_line(value)]);
    }
    print(&trimmed(&table))
}

fn one_line(cell: &str) -> String {
    plain(&cell.replace(['\n', '\t'], " "))
}

fn blank_table() -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new());
    table
}

/// Without the spaces that the table puts around the outer columns.
fn trimmed(table: &Table) -> String {
    table.lines().map(|line| line.strip_prefix(' ').unwrap_or(&line).trim_end().to_owned() + "\n").collect()
}
