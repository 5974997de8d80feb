//! `micro`: microbenchmarks of the hot paths, of the source as it is or beside another revision.
//!
//! A comparison is one run: both sides are built before anything is measured, then each group of benchmarks is measured in
//! turns, so that what else the machine does meets both. Each time, a benchmark gives a median and its confidence interval
//! (criterion's); a difference is beyond noise when no interval of one side touches any of the other. What looks like a
//! regression or a gain then is measured again and again before it is called one. On a busy machine noise is wide, and may
//! hide a difference: its width stands in the table.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Deserialize;

use crate::cargo;

/// Times that each side is measured at first.
const PASSES: usize = 2;
/// Times that what looks different is measured: equal code is slower in all of them once in 924 times.
const PASSES_MAX: usize = 6;
/// What is slower by less is told, and tolerated: compilers lay out code differently for reasons of their own.
const TOLERATED: f64 = 1.10;

#[derive(Args)]
pub(crate) struct Micro {
    /// Only benchmarks whose name this regular expression finds, such as `^scan/`
    #[arg(value_name = "FILTER")]
    filter: Option<String>,
    /// Measure this revision too, in turns with the source as it is, and show both
    #[arg(long, value_name = "REV")]
    compare: Option<String>,
    /// Exit with 0 also when something is more than 10 % slower than at REV
    #[arg(long, requires = "compare")]
    allow_regressions: bool,
}

impl Micro {
    /// All of them, beside those of a revision.
    pub(crate) fn beside(revision: String) -> Self {
        Self { filter: None, compare: Some(revision), allow_regressions: false }
    }
}

/// `cargo xtask micro`
pub(crate) fn micro(arguments: &Micro) -> anyhow::Result<()> {
    let Some(rev) = &arguments.compare else { return here(arguments.filter.as_deref()) };
    let regressions = compare(rev, arguments.filter.as_deref())?;
    match regressions {
        0 => Ok(()),
        _ if arguments.allow_regressions => Ok(()),
        count => bail!("{count} benchmarks are more than 10 % slower than at {rev}"),
    }
}

/// Criterion itself shows what it measures, and the difference to the last time.
fn here(filter: Option<&str>) -> anyhow::Result<()> {
    let target = cargo::target()?;
    for program in build(&cargo::root(), &target)? {
        let mut command = program.command(&target.join("criterion"));
        let status = command.args(filter).status().with_context(|| format!("cannot start {program}"))?;
        ensure!(status.success(), "{program} failed: {status}");
    }
    Ok(())
}

/// Shows both sides; how many regressions there are.
fn compare(rev: &str, filter: Option<&str>) -> anyhow::Result<usize> {
    let place = cargo::target()?.join("compare");
    let tree = Tree::check_out(rev, place.join("tree"))?;
    let there = Side::build(rev, &tree.path, &place.join("build"), place.join("there"), filter)?;
    let here = Side::build("here", &cargo::root(), &cargo::target()?, place.join("here"), filter)?;
    let both: BTreeSet<&str> = here.names().chain(there.names()).collect();
    ensure!(!both.is_empty(), "no benchmark has such a name");
    measure(&there, &here, &both, 0..PASSES)?;
    let mut rows = rows(&there, &here, &both)?;
    for pass in (PASSES..PASSES_MAX).step_by(PASSES) {
        let suspects: BTreeSet<&str> =
            rows.iter().filter(|row| row.verdict().is_to_be_proved()).map(|row| row.name).collect();
        if suspects.is_empty() {
            break;
        }
        println!("again, what looks different: {}", Vec::from_iter(suspects.iter().copied()).join(", "));
        measure(&there, &here, &suspects, pass..pass + PASSES)?;
        rows = self::rows(&there, &here, &both)?;
    }
    println!("\n{:34} {:>10} {:>10} {:>7} {:>6}", "", shortened(rev, 10), "here", "ratio", "noise");
    rows.iter().for_each(|row| println!("{row}"));
    Ok(rows.iter().filter(|row| row.verdict() == Verdict::Regression).count())
}

/// Measures in turns, group by group.
fn measure(
    there: &Side,
    here: &Side,
    names: &BTreeSet<&str>,
    passes: std::ops::Range<usize>,
) -> anyhow::Result<()> {
    for group in names.iter().map(|name| group(name)).collect::<BTreeSet<_>>() {
        let names: Vec<&str> = names.iter().copied().filter(|name| self::group(name) == group).collect();
        println!("measuring {group} ({} benchmarks)", names.len());
        for pass in passes.clone() {
            there.measure(&names, pass)?;
            here.measure(&names, pass)?;
        }
    }
    Ok(())
}

fn group(name: &str) -> &str {
    name.split_once('/').map_or(name, |(group, _)| group)
}

/// A revision in a directory of its own, which is removed in the end.
struct Tree {
    path: PathBuf,
}

impl Tree {
    fn check_out(rev: &str, path: PathBuf) -> anyhow::Result<Tree> {
        let commit = git(&["rev-parse", "--verify", "--end-of-options", &format!("{rev}^{{commit}}")])?;
        let tree = Tree { path };
        // What an interrupted run has left.
        tree.remove();
        git(&["worktree", "add", "--force", "--detach", &tree.path.to_string_lossy(), commit.trim()])?;
        Ok(tree)
    }

    fn remove(&self) {
        if self.path.exists() {
            let removed = git(&["worktree", "remove", "--force", &self.path.to_string_lossy()]);
            removed.err().into_iter().for_each(|why| eprintln!("{why:#}"));
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        self.remove();
    }
}

fn git(arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new("git");
    output(command.current_dir(cargo::root()).args(arguments))
}

/// What a program printed, if it succeeded.
fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let why = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed: {}\n{}", output.status, why.trim());
    String::from_utf8(output.stdout).with_context(|| format!("{command:?} did not print text"))
}

/// A side of a comparison, built.
struct Side {
    /// Each with the names of its benchmarks.
    programs: Vec<(Program, Vec<String>)>,
    /// Where criterion keeps what it measures, a directory for each pass.
    results: PathBuf,
}

impl Side {
    fn build(
        name: &str,
        root: &Path,
        target: &Path,
        results: PathBuf,
        filter: Option<&str>,
    ) -> anyhow::Result<Side> {
        println!("building {name}");
        if results.exists() {
            std::fs::remove_dir_all(&results)
                .with_context(|| format!("cannot remove {}", results.display()))?;
        }
        let named = |program: Program| program.names(filter).map(|names| (program, names));
        let programs = build(root, target)?.into_iter().map(named).collect::<anyhow::Result<_>>()?;
        Ok(Side { programs, results })
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.programs.iter().flat_map(|(_, names)| names).map(String::as_str)
    }

    /// Measures those of the benchmarks that it has.
    fn measure(&self, wanted: &[&str], pass: usize) -> anyhow::Result<()> {
        for (program, names) in &self.programs {
            let names: Vec<&str> = names.iter().map(String::as_str).filter(|n| wanted.contains(n)).collect();
            if !names.is_empty() {
                let home = self.results.join(pass.to_string());
                output(program.command(&home).arg(any_of(&names)).stdin(Stdio::null()))?;
            }
        }
        Ok(())
    }

    /// What was measured so far, by name.
    fn estimates(&self) -> anyhow::Result<BTreeMap<String, Vec<Estimate>>> {
        let mut found = BTreeMap::new();
        collect(&self.results, &mut found)?;
        Ok(found)
    }
}

/// A regular expression that finds just these names.
fn any_of(names: &[&str]) -> String {
    let mut out = String::from("^(?:");
    for character in names.join("|").chars() {
        if r"\.+*?()[]{}^$".contains(character) {
            out.push('\\');
        }
        out.push(character);
    }
    out + ")$"
}

/// An executable with benchmarks.
struct Program {
    name: String,
    path: PathBuf,
}

impl Program {
    fn command(&self, results: &Path) -> Command {
        let mut command = Command::new(&self.path);
        command.env("CRITERION_HOME", results).arg("--bench");
        command
    }

    fn names(&self, filter: Option<&str>) -> anyhow::Result<Vec<String>> {
        let text = output(self.command(Path::new("/nonexistent")).arg("--list").args(filter))?;
        Ok(text.lines().filter_map(|line| line.strip_suffix(": benchmark")).map(str::to_owned).collect())
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the benchmark `{}` ({})", self.name, self.path.display())
    }
}

/// The parts of cargo's metadata that are used.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

impl Target {
    fn is_bench(&self) -> bool {
        self.kind.iter().any(|kind| kind == "bench")
    }
}

/// What cargo tells while it builds; an executable comes with what it was made from.
#[derive(Deserialize)]
struct Message {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

/// Builds all benchmarks of a workspace, which may have none.
fn build(root: &Path, target: &Path) -> anyhow::Result<Vec<Program>> {
    let start = || {
        let mut command = cargo::cargo();
        command.current_dir(root).env("CARGO_TARGET_DIR", target);
        command
    };
    let metadata = output(start().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Metadata = serde_json::from_str(&metadata).context("cargo's metadata")?;
    let mut command = start();
    command.args(["bench", "--no-run", "--quiet", "--message-format", "json-render-diagnostics"]);
    let mut any = false;
    for package in &metadata.packages {
        for bench in package.targets.iter().filter(|target| target.is_bench()) {
            command.args(["--package", &package.name, "--bench", &bench.name]);
            any = true;
        }
    }
    if !any {
        return Ok(Vec::new());
    }
    let messages = output(command.stderr(Stdio::inherit()))?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    let program = |message: Message| {
        let target = message.target.filter(Target::is_bench)?;
        Some(Program { name: target.name, path: message.executable? })
    };
    Ok(messages.filter_map(program).collect())
}

/// The parts of criterion's `estimates.json` that are used. Times are in nanoseconds.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Estimate {
    confidence_interval: Interval,
    point_estimate: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Interval {
    lower_bound: f64,
    upper_bound: f64,
}

#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Benchmark {
    full_id: String,
}

/// Reads `new/estimates.json` of every benchmark below the directory.
fn collect(directory: &Path, found: &mut BTreeMap<String, Vec<Estimate>>) -> anyhow::Result<()> {
    let estimates = directory.join("estimates.json");
    if directory.ends_with("new") && estimates.exists() {
        let benchmark: Benchmark = read(&directory.join("benchmark.json"))?;
        let estimates: Estimates = read(&estimates)?;
        found.entry(benchmark.full_id).or_default().push(estimates.median);
        return Ok(());
    }
    // Without anything measured there is no directory.
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.with_context(|| format!("cannot read {}", directory.display()))?.path();
        if path.is_dir() {
            collect(&path, found)?;
        }
    }
    Ok(())
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not what criterion writes", path.display()))
}

/// What all passes of one side say of a benchmark.
#[derive(Clone, Copy, Debug)]
struct Figure {
    median_ns: f64,
    /// Where the passes' medians may lie.
    lower_ns: f64,
    upper_ns: f64,
}

impl Figure {
    fn of(passes: &[Estimate]) -> Option<Figure> {
        let mut medians: Vec<f64> = passes.iter().map(|pass| pass.point_estimate).collect();
        medians.sort_by(f64::total_cmp);
        let middle = medians.get(medians.len() / 2)? + medians.get(medians.len().checked_sub(1)? / 2)?;
        Some(Figure {
            median_ns: middle / 2.0,
            lower_ns: passes.iter().map(|p| p.confidence_interval.lower_bound).fold(f64::INFINITY, f64::min),
            upper_ns: passes.iter().map(|p| p.confidence_interval.upper_bound).fold(0.0, f64::max),
        })
    }
}

/// A line of the table.
struct Row<'a> {
    name: &'a str,
    there: Option<Figure>,
    here: Option<Figure>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    OnlyHere,
    OnlyThere,
    WithinNoise,
    Faster,
    Slower,
    Regression,
}

impl Verdict {
    fn is_to_be_proved(self) -> bool {
        matches!(self, Verdict::Faster | Verdict::Regression)
    }
}

fn rows<'a>(there: &Side, here: &Side, names: &BTreeSet<&'a str>) -> anyhow::Result<Vec<Row<'a>>> {
    let (there, here) = (there.estimates()?, here.estimates()?);
    let figure = |side: &BTreeMap<String, Vec<Estimate>>, name: &str| Figure::of(side.get(name)?);
    let row = |&name: &&'a str| Row { name, there: figure(&there, name), here: figure(&here, name) };
    Ok(names.iter().map(row).collect())
}

impl Row<'_> {
    fn ratio(&self) -> Option<f64> {
        Some(self.here?.median_ns / self.there?.median_ns)
    }

    /// How far apart the passes of the side that agrees least are, as a share of its median.
    fn noise(&self) -> Option<f64> {
        let noise = |figure: Figure| (figure.upper_ns - figure.lower_ns) / figure.median_ns;
        [self.there, self.here].into_iter().flatten().map(noise).max_by(f64::total_cmp)
    }

    fn verdict(&self) -> Verdict {
        let (there, here) = match (self.there, self.here) {
            (Some(there), Some(here)) => (there, here),
            (None, _) => return Verdict::OnlyHere,
            (_, None) => return Verdict::OnlyThere,
        };
        if here.upper_ns < there.lower_ns {
            return Verdict::Faster;
        }
        if here.lower_ns <= there.upper_ns {
            return Verdict::WithinNoise;
        }
        match here.median_ns > there.median_ns * TOLERATED {
            true => Verdict::Regression,
            false => Verdict::Slower,
        }
    }
}

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = |figure: Option<Figure>| figure.map_or("-".into(), |figure| human(figure.median_ns));
        let ratio = self.ratio().map_or("-".into(), |ratio| format!("{ratio:.3}"));
        let verdict = match self.verdict() {
            Verdict::OnlyHere => "is not at REV",
            Verdict::OnlyThere => "is at REV only",
            Verdict::WithinNoise => "within noise",
            Verdict::Faster => "faster",
            Verdict::Slower => "slower",
            Verdict::Regression => "REGRESSION",
        };
        let noise = self.noise().map_or("-".into(), |noise| format!("{:.0} %", noise * 100.0));
        let (there, here) = (time(self.there), time(self.here));
        write!(f, "{:34} {there:>10} {here:>10} {ratio:>7} {noise:>6}  {verdict}", self.name)
    }
}

fn human(ns: f64) -> String {
    match ns {
        ..1e3 => format!("{ns:.1} ns"),
        ..1e6 => format!("{:.2} us", ns / 1e3),
        ..1e9 => format!("{:.2} ms", ns / 1e6),
        _ => format!("{:.2} s", ns / 1e9),
    }
}

fn shortened(text: &str, characters: usize) -> &str {
    text.char_indices().nth(characters).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(passes: &[f64]) -> Option<Figure> {
        let estimate = |&ns: &f64| Estimate {
            confidence_interval: Interval { lower_bound: ns * 0.99, upper_bound: ns * 1.01 },
            point_estimate: ns,
        };
        Figure::of(&passes.iter().map(estimate).collect::<Vec<_>>())
    }

    fn verdict(there: &[f64], here: &[f64]) -> Verdict {
        Row { name: "a/b", there: figure(there), here: figure(here) }.verdict()
    }

    #[test]
    fn a_regression_is_slower_in_every_pass_and_by_more_than_is_tolerated() {
        assert_eq!(verdict(&[100.0, 102.0], &[130.0, 120.0]), Verdict::Regression);
        assert_eq!(verdict(&[100.0, 102.0], &[106.0, 108.0]), Verdict::Slower);
        assert_eq!(verdict(&[100.0, 125.0], &[130.0, 120.0]), Verdict::WithinNoise);
        assert_eq!(verdict(&[100.0, 102.0], &[50.0, 99.0]), Verdict::WithinNoise);
        assert_eq!(verdict(&[100.0, 102.0], &[50.0, 60.0]), Verdict::Faster);
    }

    #[test]
    fn what_one_side_lacks_is_no_regression() {
        assert_eq!(verdict(&[], &[10.0]), Verdict::OnlyHere);
        assert_eq!(verdict(&[10.0], &[]), Verdict::OnlyThere);
    }

    #[test]
    fn the_median_of_passes_is_between_the_two_in_the_middle() {
        assert_eq!(figure(&[4.0, 1.0, 2.0, 100.0]).map(|f| f.median_ns), Some(3.0));
        assert_eq!(figure(&[4.0, 1.0, 2.0]).map(|f| f.median_ns), Some(2.0));
    }

    #[test]
    fn names_are_found_as_they_are() {
        assert_eq!(any_of(&["scan/private/clean", "a+b/(c)"]), r"^(?:scan/private/clean|a\+b/\(c\))$");
        assert_eq!((group("scan/private/clean"), group("alone")), ("scan", "alone"));
    }

    #[test]
    fn times_are_written_in_units_of_their_size() {
        assert_eq!([0.5, 1500.0, 2.5e6, 3e9].map(human), ["0.5 ns", "1.50 us", "2.50 ms", "3.00 s"]);
    }
}
