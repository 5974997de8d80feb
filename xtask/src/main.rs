//! `cargo xtask`: the project's only tool. Whatever a person or a machine does with the source goes through it.

#![forbid(unsafe_code)]

mod cargo;
mod interrupt;
mod measure;
mod micro;
mod packages;

use std::path::PathBuf;
use std::process::ExitCode;

use cargo::Extent;
use clap::{Args, Parser, Subcommand};
use micro::Micro;
use sterna_bench::Row;

/// Sets up, demonstrates, tests and measures Sterna
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Fetch the Debian packages and build the guests (the other commands do it by themselves)
    Setup,
    /// Move a running VM between two hosts, beside stock QEMU's own migration
    ///
    /// Needs root, for network namespaces. Exits with 1 if a write was lost or RAM differed.
    Demo(Demo),
    /// Check formatting and lints, then run all tests
    Test(Test),
    /// Measure rows, and compare them with their goals
    ///
    /// Needs root. Exits with 1 if a goal is missed, a write was lost or RAM differed.
    Bench(Bench),
    /// Measure the hot paths alone, one by one
    ///
    /// Needs root, to attach to processes. Exits with 1 if something is slower than at the revision that it is compared with.
    Micro(Micro),
    /// Turn files of results into one page
    Report(Report),
    /// Check formatting, lints, licences and advisories
    Lint,
}

#[derive(Args)]
struct Demo {
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    built: Built,
}

/// Which programs are measured.
#[derive(Args)]
struct Built {
    /// Measure the programs in this directory instead of building them
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
}

#[derive(Args)]
struct Test {
    /// The same tests with larger counts: hours instead of minutes
    #[arg(long)]
    long: bool,
    /// Passed on to `cargo nextest run`, or to `cargo test` where nextest is not installed
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// The rows, as `--help` lists them.
fn rows() -> String {
    let line = |row: &Row| {
        let number = row.number().map_or_else(String::new, |number| number.to_string());
        let usual = if Row::DEFAULT.contains(row) { "" } else { " (when named)" };
        format!("  {number:>2}  {:<10}  {}{usual}\n", row.name(), row.title())
    };
    let lines: String = Row::ALL.iter().map(line).collect();
    format!(
        "Rows:\n{lines}\nAll but those that have to be named take 15 minutes with --quick, and took 45 with 3 to 5 pairs. Goals, figures and how they came \
         about: docs/performance.md. Exit code 3: a row missed a goal; 1: one did not run, or was wrong. The summary says which.\n\nExample:\n  \
         cargo xtask bench 1 2 --pairs 3 --out rows.json && cargo xtask report rows.json --out rows.html"
    )
}

#[derive(Args)]
#[command(after_help = rows())]
struct Bench {
    /// Which rows, by number or name; all but those that have to be named when none is given
    #[arg(value_name = "ROW")]
    rows: Vec<Row>,
    /// Pairs of one move of ours and one of stock QEMU's, which alternate
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Only see that it works: one pair of each, fewer repetitions (row 2: three), judged by the same goals
    #[arg(long, conflicts_with = "pairs")]
    quick: bool,
    /// Write every raw sample as JSON, after each row
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// No rows, but the microbenchmarks of the hot paths, beside those of another revision: as `micro --compare`
    #[arg(long, value_name = "REV", conflicts_with_all = ["rows", "pairs", "quick", "out", "programs"])]
    compare: Option<String>,
    #[command(flatten)]
    built: Built,
}

#[derive(Args)]
struct Report {
    /// What `demo --out` and `bench --out` wrote
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The page
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why:#}");
            if why.is::<measure::Missed>() { measure::Missed::CODE.into() } else { ExitCode::FAILURE }
        }
    }
}

fn run(action: Action) -> anyhow::Result<()> {
    match action {
        Action::Setup => packages::ensure().map(|ready| println!("{ready}")),
        Action::Test(test) => {
            let extent = if test.long { Extent::Long } else { Extent::Short };
            cargo::test(&packages::ensure()?, extent, &test.arguments)
        }
        Action::Lint => cargo::lint(),
        Action::Demo(demo) => measure::demo(&demo),
        Action::Bench(Bench { compare: Some(revision), .. }) => micro::micro(&Micro::beside(revision)),
        Action::Bench(bench) => measure::bench(&bench),
        Action::Micro(micro) => micro::micro(&micro),
        Action::Report(report) => measure::report(&report.files, &report.out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }
}
