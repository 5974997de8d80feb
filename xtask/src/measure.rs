//! `demo`, `bench` and `report`: what `sterna-bench` measures, from the build to the exit code.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use sterna_bench::ours::Progress;
use sterna_bench::{Demo, Kit, Results, demo, rate, report, table};

use crate::cargo::{self, Profile};
use crate::{Bench, Built, Row, interrupt, packages};

/// `cargo xtask demo`
pub(crate) fn demo(arguments: &crate::Demo) -> anyhow::Result<()> {
    let kit = kit(&arguments.built)?;
    let options = demo::Options { pairs: 1, progress: Progress::Shown };
    let demo = demo::run(&kit, options, &told(Instant::now()))?;
    println!("\n{}", table::demo(&demo));
    write(arguments.out.as_deref(), &demo)?;
    right(&demo)
}

/// `cargo xtask bench`
pub(crate) fn bench(bench: &Bench) -> anyhow::Result<()> {
    let kit = kit(&bench.built)?;
    let (tell, mut results) = (told(Instant::now()), Results::default());
    let asked = |row| bench.rows.is_empty() || bench.rows.contains(&row);
    if asked(Row::Demo) {
        let pairs = if bench.quick { 1 } else { bench.pairs };
        let demo = demo::run(&kit, demo::Options { pairs, progress: Progress::Sampled }, &tell)?;
        println!("\n{}\n{}", table::demo(&demo), table::goals(&demo.goals));
        results.demo = Some(demo);
    }
    if asked(Row::Rate) {
        let extent = if bench.quick { rate::Extent::Quick } else { rate::Extent::Full };
        let rate = rate::run(&kit, extent, &tell)?;
        println!("\n{}\n{}", table::rate(&rate), table::goals(&rate.goals));
        results.rate = Some(rate);
    }
    write(bench.out.as_deref(), &results)?;
    if let Some(demo) = &results.demo {
        right(demo)?;
    }
    if !results.is_good() {
        bail!("goals are missed");
    }
    Ok(())
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
        Some(directory) => directory.clone(),
        None => cargo::build(Profile::Release)?,
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

fn write(out: Option<&Path>, value: &impl serde::Serialize) -> anyhow::Result<()> {
    let Some(out) = out else { return Ok(()) };
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(out, text).with_context(|| format!("cannot write {}", out.display()))
}

/// A fast wrong migration fails.
fn right(demo: &Demo) -> anyhow::Result<()> {
    match demo.is_right() {
        true => Ok(()),
        false => bail!(
            "{} writes were lost, {} connections broke, RAM {}",
            demo.lost_writes,
            demo.broken_connections,
            if demo.ram_equal { "is equal" } else { "was not proved equal" }
        ),
    }
}
