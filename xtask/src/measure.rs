//! `demo`, `bench` and `report`: what `sterna-bench` measures, from the build to the exit code.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use sterna_bench::ours::Progress;
use sterna_bench::results::RowResult;
use sterna_bench::{Extent, Kit, Results, Row, report, rows, table};

use crate::cargo;
use crate::{Bench, Built, interrupt, packages};

/// `cargo xtask demo`
pub(crate) fn demo(arguments: &crate::Demo) -> anyhow::Result<()> {
    must_be_writable(arguments.out.as_deref())?;
    let kit = kit(&arguments.built)?;
    let extent = Extent { pairs: 1, quick: false, progress: Progress::Shown };
    let results = measured(&kit, &[Row::Demo], extent, arguments.out.as_deref())?;
    ensure!(results.rows.iter().all(RowResult::went_right), "the demo went wrong, see above");
    Ok(())
}

/// `cargo xtask bench`
pub(crate) fn bench(bench: &Bench) -> anyhow::Result<()> {
    must_be_writable(bench.out.as_deref())?;
    let kit = kit(&bench.built)?;
    let rows = if bench.rows.is_empty() { &Row::DEFAULT[..] } else { &bench.rows };
    let pairs = if bench.quick { 1 } else { bench.pairs };
    let extent = Extent { pairs, quick: bench.quick, progress: Progress::Sampled };
    let results = measured(&kit, rows, extent, bench.out.as_deref())?;
    println!("\n{}", table::summary(&results.rows));
    ensure!(
        results.rows.iter().all(RowResult::went_right),
        "not all rows ran, or what one measured went wrong: see above"
    );
    ensure!(results.is_good(), Missed);
    Ok(())
}

/// Everything ran and was right, and a goal is missed.
#[derive(Debug, thiserror::Error)]
#[error("every row ran and was right, and a goal is missed (exit code {code})", code = Missed::CODE)]
pub(crate) struct Missed;

impl Missed {
    /// The exit code that tells this from a row that did not run (1) and from a wrong argument (2).
    pub(crate) const CODE: u8 = 3;
}

fn measured(kit: &Kit, rows: &[Row], extent: Extent, out: Option<&Path>) -> anyhow::Result<Results> {
    let mut written = Ok(());
    // After each row: a full run takes an hour, and may be interrupted.
    let mut done = |results: &Results| {
        results.rows.last().iter().for_each(|row| println!("{}", table::row(row)));
        written = write(out, results);
    };
    let results = rows::run(kit, rows, extent, &told(Instant::now()), &mut done);
    written?;
    Ok(results)
}

/// `cargo xtask report`
pub(crate) fn report(files: &[PathBuf], out: &Path) -> anyhow::Result<()> {
    let read = |file: &PathBuf| -> anyhow::Result<(String, Results)> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let results = Results::parse(&text).with_context(|| {
            format!("{} is nothing that `demo --out` or `bench --out` wrote", file.display())
        })?;
        Ok((file.file_stem().unwrap_or_default().to_string_lossy().into_owned(), results))
    };
    let files = files.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
    std::fs::write(out, report::page(&files)?).with_context(|| format!("cannot write {}", out.display()))?;
    println!("{}", out.display());
    Ok(())
}

/// Builds everything, and only then starts to care for interrupts: until then there is nothing to clean up.
fn kit(built: &Built) -> anyhow::Result<Kit> {
    let ready = packages::ensure()?;
    ensure!(is_root()?, "hosts are made of network namespaces, which only root can make: run it as root");
    let programs = match &built.programs {
        Some(directory) => {
            let lacks = |name: &&&str| !directory.join(name).is_file();
            if let Some(name) = ["sterna", "sterna-attach"].iter().find(lacks) {
                bail!("there is no {name} in {}", directory.display());
            }
            directory.clone()
        }
        None => cargo::build()?,
    };
    interrupt::clean_up_when_interrupted()?;
    Ok(ready.kit(&programs))
}

/// Asked before the build, which takes minutes.
fn is_root() -> anyhow::Result<bool> {
    let own = std::fs::metadata("/proc/self").context("/proc is not mounted")?;
    Ok(own.uid() == 0)
}

/// Prints lines with the time since the beginning.
fn told(began: Instant) -> impl Fn(&str) {
    move |line| println!("{:6.1} s  {line}", began.elapsed().as_secs_f64())
}

/// Asked before the build and the rows, whose samples would be lost.
fn must_be_writable(out: Option<&Path>) -> anyhow::Result<()> {
    let Some(out) = out else { return Ok(()) };
    let is_new = !out.exists();
    let opened = std::fs::OpenOptions::new().create(true).append(true).open(out);
    opened.with_context(|| format!("cannot write {}", out.display()))?;
    if is_new { std::fs::remove_file(out).context("what was tried cannot be removed") } else { Ok(()) }
}

fn write(out: Option<&Path>, value: &impl serde::Serialize) -> anyhow::Result<()> {
    let Some(out) = out else { return Ok(()) };
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(out, text).with_context(|| format!("cannot write {}", out.display()))
}
