//! `cargo xtask`: the project's only tool. Whatever a person or a machine does with the source goes through it.

#![forbid(unsafe_code)]

mod cargo;
mod packages;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Sets up, demonstrates, tests and measures Sterna
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Fetch the Debian packages and build the guests (the other commands do it by themselves)
    Setup,
    /// Move a running VM between two hosts, beside stock QEMU's own migration
    Demo(Demo),
    /// Check formatting and lints, then run all tests
    Test(Test),
    /// Run rows of BENCHMARKS.md
    Bench(Bench),
    /// Turn a file of benchmark results into a page
    Report {
        /// What `bench --out` wrote
        file: PathBuf,
    },
    /// Check formatting and lints
    Lint,
}

#[derive(Args)]
struct Demo {
    /// Write the figures as JSON
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Args)]
struct Test {
    /// Passed on to `cargo test`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

#[derive(Args)]
struct Bench {
    /// Rows by number; all when none is given
    rows: Vec<u8>,
    /// Interleaved pairs of each row
    #[arg(long, default_value_t = 5)]
    pairs: u32,
    /// Write every raw sample as JSON
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Action::Setup => packages::ensure().map(|ready| println!("{ready}")),
        Action::Test(test) => {
            cargo::lint()?;
            cargo::test(&packages::ensure()?, &test.arguments)
        }
        Action::Lint => cargo::lint(),
        Action::Demo(demo) => missing("demo", demo.out.as_ref()),
        Action::Bench(bench) => {
            missing(&format!("bench {:?} --pairs {}", bench.rows, bench.pairs), bench.out.as_ref())
        }
        Action::Report { file } => missing("report", Some(&file)),
    }
}

fn missing(what: &str, file: Option<&PathBuf>) -> anyhow::Result<()> {
    let file = file.map_or(String::new(), |f| format!(" ({})", f.display()));
    anyhow::bail!("`{what}`{file} is not there yet")
}
