//! Cargo's own commands, in the order and with the options that the project wants.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::packages::Ready;

/// Packages whose programs the demo and the benchmarks run.
const PROGRAMS: &[&str] = &["sterna", "sterna-memory", "sterna-lab"];
/// Where tests hold an agent: what tests run has it, all of it alike, so that nothing is compiled twice.
const HOLDS: &str = "sterna-agent/holds";
/// Tests that run at once. Most start an emulated machine or two, which want a core each; more only miss their deadlines.
const TESTS_AT_ONCE: &str = "2";

/// Random schedules of the simulation in a long run, unless the environment asks for another number: some ten minutes.
const SIMULATIONS_LONG: &str = "1000000";

/// How much the tests try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// As often as a push can wait for.
    Short,
    /// The same tests with larger counts.
    Long,
}

impl Extent {
    /// Tells a program of it, as the tests look for it.
    fn tell(self, command: &mut Command) -> &mut Command {
        if self == Self::Short {
            return command;
        }
        if std::env::var_os("STERNA_SIMULATIONS").is_none() {
            command.env("STERNA_SIMULATIONS", SIMULATIONS_LONG);
        }
        command.env("STERNA_LONG", "1")
    }
}

/// Formatting and lints of the whole workspace, and what its dependencies bring with them.
pub(crate) fn lint() -> anyhow::Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    deny()
}

/// Lints, then all tests.
pub(crate) fn test(ready: &Ready, extent: Extent, arguments: &[String]) -> anyhow::Result<()> {
    let began = Instant::now();
    lint()?;
    // Whoever runs the tests builds the programs for them: built here, alone, they would be built once more, for what others need
    // turns other features of their dependencies on.
    if has("nextest") {
        let mut command = cargo();
        command.args(["nextest", "run", "--workspace", "--features", HOLDS, "--test-threads", TESTS_AT_ONCE]);
        run(ready.tell(extent.tell(command.args(arguments))))?;
        // nextest does not know tests in documentation.
        run(cargo().args(["test", "--workspace", "--features", HOLDS, "--doc", "--quiet"]))?;
    } else {
        let mut command = cargo();
        command.args(["test", "--workspace", "--features", HOLDS]).args(arguments);
        if !arguments.iter().any(|a| a == "--") {
            command.args(["--", "--test-threads", TESTS_AT_ONCE]);
        }
        run(ready.tell(extent.tell(&mut command)))?;
    }
    println!("formatting, lints and all tests passed in {} s", began.elapsed().as_secs());
    Ok(())
}

/// Compiles the programs as they are measured, and returns the directory in which they lie.
pub(crate) fn build() -> anyhow::Result<PathBuf> {
    let packages = PROGRAMS.iter().flat_map(|p| ["--package", p]);
    run(cargo().args(["build", "--release"]).args(packages))?;
    let directory = target()?.join("release");
    directory.canonicalize().with_context(|| format!("cargo did not build into {}", directory.display()))
}

/// Where cargo builds.
pub(crate) fn target() -> anyhow::Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.canonicalize().with_context(|| format!("cargo did not build into {}", target.display()))
}

/// Licences, sources and known advisories of the dependencies, as `deny.toml` has them. Nothing is fetched, so that a
/// build without a network and one with say the same.
fn deny() -> anyhow::Result<()> {
    if !has("deny") {
        eprintln!("cargo-deny is not installed, licences are not checked: cargo install cargo-deny --locked");
        return Ok(());
    }
    run(cargo().args([
        "deny",
        "--offline",
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]))?;
    let advisories =
        cargo().args(["deny", "--offline", "check", "advisories"]).stderr(Stdio::null()).status()?;
    if !advisories.success() {
        eprintln!(
            "advisories: there are some, or no copy of their database is here: cargo deny check advisories"
        );
    }
    Ok(())
}

/// Whether cargo has this subcommand.
fn has(subcommand: &str) -> bool {
    let mut command = cargo();
    command.args([subcommand, "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|s| s.success())
}

/// Cargo itself, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.current_dir(root());
    command
}

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}
