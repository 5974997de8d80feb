//! `sterna wws`: what a VM writes, and how it would move.

use crate::args::{DOWNTIME_MS_MAX, Format, Output, seconds};
use crate::chart::{bars, columns, width};
use crate::client::Client;
use crate::exit::{Exit, Failure, complain, tell};
use crate::human::short_bytes;
use crate::interrupt::Interrupts;
use crate::{bandwidth, plot, show};
use clap::Args as ClapArgs;
use std::path::PathBuf;
use sterna_agent::model::{
    IntervalView, PredictionView, RegionView, WorkingSetEvent, WorkingSetRequest, WorkingSetView,
    default_bandwidths,
};

/// Rows of the chart of intervals.
const CHART_ROWS: usize = 8;

#[derive(ClapArgs)]
pub(crate) struct Wws {
    /// Name of the VM
    pub(crate) vm: String,
    /// Length of an interval: 1s, 250ms, 2m; from 100ms on
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "1s")]
    pub(crate) interval: u64,
    /// Length of the measurement
    #[arg(long, value_name = "TIME", value_parser = time, default_value = "60s")]
    pub(crate) duration: u64,
    /// Percent of a processor that it may cost the guest: intervals are stretched for that
    #[arg(long, value_name = "PERCENT", default_value_t = 3.0)]
    pub(crate) max_cost: f64,
    /// A link to predict a migration for; may be repeated [default: 100 and 400 Mbit/s, 1 and 10 Gbit/s]
    #[arg(long, value_name = "RATE", value_parser = link)]
    pub(crate) bandwidth: Vec<u64>,
    /// The predicted migrations' longest stop, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=DOWNTIME_MS_MAX))]
    pub(crate) max_downtime: u64,
    /// The predicted migrations' timeout
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<f64>,
    /// Draw what was measured to this file too, as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    /// Show no progress
    #[arg(long, short)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Measures, shows each interval on stderr, and the result on stdout.
pub(crate) async fn run(client: &Client, args: Wws) -> Result<Exit, Failure> {
    let format = args.output.format;
    let request = WorkingSetRequest {
        interval: args.interval,
        duration: args.duration,
        max_cost: args.max_cost,
        bandwidths: if args.bandwidth.is_empty() { default_bandwidths() } else { args.bandwidth.clone() },
        downtime_limit: args.max_downtime,
        timeout: args.timeout,
    };
    let mut interrupts = Interrupts::listen()?;
    let progress = (!args.quiet && format != Format::Jsonl).then(|| Progress::new(&args));
    let view = tokio::select! {
        view = measure(client, &args, &request, progress) => view?,
        () = interrupts.next() => {
            let text = format!("the measurement of VM {} was cancelled; the VM runs on as before", args.vm);
            return Err(Failure::new(Exit::Cancelled, text));
        }
    };
    conclude(format, &view, &request)?;
    if let Some(file) = &args.plot {
        let cannot = |why: String| Failure::new(Exit::Failed, format!("{}: {why}", file.display()));
        let text = plot::svg(&view).map_err(cannot)?;
        std::fs::write(file, text).map_err(|why| cannot(format!("the plot cannot be written: {why}")))?;
    }
    match (view.status.as_str(), &view.error_desc) {
        ("completed", _) => Ok(Exit::Done),
        // It is a result, of a shorter time than was asked for.
        ("cut-short", Some(why)) => {
            complain(why);
            Ok(Exit::Done)
        }
        (_, why) => Err(Failure::new(Exit::Failed, why.clone().unwrap_or_default())),
    }
}

async fn measure(
    client: &Client,
    args: &Wws,
    request: &WorkingSetRequest,
    mut progress: Option<Progress>,
) -> Result<WorkingSetView, Failure> {
    let mut events = client.measure(&args.vm, request).await?;
    let lost = |why: String| {
        let vm = &args.vm;
        let text = format!(
            "the measurement of VM {vm} broke off: {why}; nothing of it is left in the VM: try again"
        );
        Failure::new(Exit::Failed, text)
    };
    loop {
        let event =
            events.next().await.map_err(lost)?.ok_or_else(|| lost("the agent ended it".to_owned()))?;
        if args.output.format == Format::Jsonl {
            show::json_line(&event)?;
        }
        match event {
            WorkingSetEvent::Interval(interval) => {
                progress.iter_mut().for_each(|progress| progress.show(&interval));
            }
            WorkingSetEvent::End(view) => return Ok(*view),
        }
    }
}

/// A line for each interval on stderr.
struct Progress {
    vm: String,
    duration: u64,
    stretched: bool,
}

impl Progress {
    fn new(args: &Wws) -> Self {
        Self { vm: args.vm.clone(), duration: args.duration, stretched: false }
    }

    fn show(&mut self, interval: &IntervalView) {
        let IntervalView { at, length, pages, unique_pages, cost, stretched } = interval;
        let (at, all) = (at / 1e3, self.duration as f64 / 1e3);
        let rate = *pages as f64 * 1e3 / length.max(1.0);
        tell(&format!(
            "{}: {at:.1} of {all:.1} s, {rate:.0} pages/s, {unique_pages} pages so far, cost about {cost:.2} % of a processor",
            self.vm
        ));
        if *stretched && !self.stretched {
            self.stretched = true;
            tell(&format!(
                "{}: the guest writes so much that intervals are stretched (--max-cost allows shorter ones)",
                self.vm
            ));
        }
    }
}

fn conclude(format: Format, view: &WorkingSetView, request: &WorkingSetRequest) -> Result<(), Failure> {
    match format {
        Format::Json => show::json(view),
        // It is the last line already.
        Format::Jsonl => Ok(()),
        Format::Table | Format::Wide => tables(format, view, request),
    }
}

fn tables(format: Format, view: &WorkingSetView, request: &WorkingSetRequest) -> Result<(), Failure> {
    show::pairs(&summary(view))?;
    if view.intervals.is_empty() {
        return Ok(());
    }
    let width = width();
    let pages: Vec<f64> = view.intervals.iter().map(|interval| interval.pages as f64).collect();
    let end = span(view.duration);
    let text = columns(&pages, ("0", &end), width, CHART_ROWS);
    show::print(&format!("\nPages written in each interval\n{text}"))?;
    let growth: Vec<_> = view.growth.iter().map(|point| (span(point.window), point.pages)).collect();
    let text = bars(&growth, width);
    show::print(&format!("\nPages written at least once in a window\n{text}"))?;
    let many = if format == Format::Wide { usize::MAX } else { 5 };
    let regions = &view.regions[..view.regions.len().min(many)];
    show::print("\nHot regions\n")?;
    show::list(format, regions, &["BLOCK", "OFFSET", "LENGTH", "PAGES", "WRITES"], region)?;
    let timeout = request.timeout.map(|seconds| format!(" --timeout {seconds}")).unwrap_or_default();
    show::print(&format!("\nPredicted migrations (--max-downtime {}{timeout})\n", request.downtime_limit))?;
    let heads = ["LINK", "ROUNDS", "TOTAL TIME", "SENT", "DOWNTIME", ""];
    show::list(format, &view.predictions, &heads, prediction)
}

fn summary(view: &WorkingSetView) -> Vec<(&'static str, String)> {
    let size = |pages: u64| short_bytes(pages.saturating_mul(view.page_size));
    let of = |pages: u64| format!("{pages} pages ({})", size(pages));
    let stretched = if view.stretched { ", stretched to keep the cost low" } else { "" };
    vec![
        ("VM", format!("{} at {}", view.vm, view.host)),
        ("Measured", format!("{} in {} intervals{stretched}", span(view.duration), view.intervals.len())),
        (
            "Written",
            format!("{:.0} pages/s ({}/s)", view.dirty_pages_rate, size(view.dirty_pages_rate as u64)),
        ),
        ("Working set", format!("{} written at least once", of(view.unique_pages))),
        ("Memory", format!("{} in use, of {}", of(view.populated_pages), size(view.total_pages))),
        ("Cost", format!("about {:.2} % of a processor of the guest", view.cost)),
    ]
}

fn region(region: &RegionView) -> Vec<String> {
    vec![
        region.block.clone(),
        format!("{:#x}", region.offset),
        short_bytes(region.bytes),
        region.pages.to_string(),
        format!("{:.1} %", region.share),
    ]
}

fn prediction(seen: &PredictionView) -> Vec<String> {
    let note = match seen.ending.as_str() {
        "converged" => "",
        "timeout" => "stopped by the timeout",
        _ => "does not converge: the downtime would be this",
    };
    vec![
        rate(seen.bandwidth),
        seen.rounds.to_string(),
        if seen.ending == "never" { "-".to_owned() } else { span(seen.total_time) },
        if seen.ending == "never" { "-".to_owned() } else { short_bytes(seen.bytes) },
        span(seen.downtime),
        note.to_owned(),
    ]
}

/// A bandwidth as links are sold.
fn rate(bytes_per_second: u64) -> String {
    let mbit = bytes_per_second as f64 * 8.0 / 1e6;
    match mbit >= 1000.0 {
        true => format!("{} Gbit/s", (mbit / 10.0).round() / 100.0),
        false => format!("{} Mbit/s", (mbit * 100.0).round() / 100.0),
    }
}

/// A length of time in milliseconds, short.
fn span(ms: f64) -> String {
    match ms {
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms if ms < 100_000.0 => format!("{:.1} s", ms / 1e3),
        ms => format!("{:.0} s", ms / 1e3),
    }
}

fn link(text: &str) -> Result<u64, String> {
    match bandwidth::parse(text)? {
        0 => Err("a link has a bandwidth above 0".to_owned()),
        rate => Ok(rate),
    }
}

/// A time in milliseconds; a bare number is seconds.
fn time(text: &str) -> Result<u64, String> {
    const FORMS: &str = "write 100ms, 1s, 2.5s, 10m or 1h";
    let text = text.trim();
    let split = text.find(|char: char| !char.is_ascii_digit() && char != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim_start() {
        "ms" => 1.0,
        "" | "s" => 1e3,
        "m" | "min" => 60e3,
        "h" => 3600e3,
        other => return Err(format!("unknown unit {other:?}: {FORMS}")),
    };
    let number: f64 = number.parse().map_err(|_| format!("no time: {FORMS}"))?;
    Ok((number * factor).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_understood_as_people_write_them() {
        for (text, ms) in
            [("1s", 1000), ("100ms", 100), ("2", 2000), ("0.5 s", 500), ("2m", 120_000), ("1h", 3_600_000)]
        {
            assert_eq!(time(text), Ok(ms), "{text}");
        }
        for text in ["", "s", "1d", "-1s", "1..2s", "NaN"] {
            assert!(time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn links_are_told_as_they_are_sold() {
        assert_eq!(
            [12_500_000, 125_000_000, 312_500_000].map(rate),
            ["100 Mbit/s", "1 Gbit/s", "2.5 Gbit/s"]
        );
        assert!(link("0").is_err() && link("1Gbit/s") == Ok(125_000_000));
    }
}
