//! One move by `sterna migrate`, timed from the command until the source is free.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sterna_lab::process::ProcessId;

use crate::BenchError;
use crate::load::Window;
use crate::meter::Meter;
use crate::results::Sample;
use crate::stage::{Stage, Way};

/// How often processes are looked at: fine beside seconds, and cheap on a machine that is busy with two QEMUs.
const LOOK: Duration = Duration::from_millis(4);
/// How long a move may take before it is given up.
const LIMIT: Duration = Duration::from_secs(120);
/// How long the source may still be there when the command has ended.
const FREE: Duration = Duration::from_secs(10);

/// How a move's progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// By the command itself, on our standard error.
    Shown,
    /// As samples in the result, and nowhere else.
    Sampled,
}

/// What is asked of `sterna migrate`.
#[derive(Debug, Clone, Default)]
pub struct Order {
    /// Further options, such as `--verify`.
    pub options: Vec<String>,
}

impl Order {
    /// With these options.
    #[must_use]
    pub fn with(options: &[&str]) -> Order {
        Order { options: options.iter().map(|o| (*o).to_owned()).collect() }
    }
}

/// What `sterna migrate -o json` says at the end, as far as it matters here.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Said {
    /// The migration's name.
    #[serde(default)]
    pub id: String,
    /// QEMU's status word.
    pub status: String,
    /// Milliseconds since the request.
    pub total_time: f64,
    /// Milliseconds until the first page was sent.
    #[serde(default)]
    pub setup_time: f64,
    /// Milliseconds the VM was stopped.
    #[serde(default)]
    pub downtime: Option<f64>,
    /// Figures of the RAM.
    pub ram: SaidOfRam,
    /// Bytes of device state.
    #[serde(default)]
    pub device_state: u64,
    /// Bytes that were written to sockets.
    #[serde(default)]
    pub wire_bytes: u64,
    /// Blocks of RAM that were proved equal.
    #[serde(default)]
    pub blocks_verified: Option<u32>,
    /// How the downtime was spent.
    #[serde(default)]
    pub downtime_split: Vec<Span>,
    /// What went wrong.
    #[serde(default)]
    pub error_desc: Option<String>,
}

/// QEMU's `ram` object.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct SaidOfRam {
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes known to be unsent.
    pub remaining: u64,
    /// Pages that needed no bytes.
    pub duplicate: u64,
    /// Pages sent as bytes.
    pub normal: u64,
    /// Rounds.
    pub dirty_sync_count: u32,
    /// Megabits per second.
    pub mbps: f64,
}

/// A named stretch of time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What was done.
    pub name: String,
    /// For how long.
    pub ms: f64,
}

/// A move as seen from outside, and what the command said of it.
#[derive(Debug, Clone)]
pub struct Moved {
    /// From the command until the source's QEMU was gone.
    pub total_time_ms: f64,
    /// From the command until it had ended.
    pub command_ms: f64,
    /// Bytes on the link, both ways, headers included.
    pub wire_bytes: u64,
    /// CPU seconds of both QEMUs, both agents and the command. The emulated guest's own work is part of it.
    pub cpu_s: f64,
    /// When it was.
    pub window: Window,
    /// What the command said.
    pub said: Said,
    /// Its progress, if it was asked for.
    pub samples: Vec<Sample>,
}

/// Moves a VM.
pub fn migrate(
    stage: &Stage,
    vm: &str,
    way: Way,
    order: &Order,
    progress: Progress,
) -> Result<Moved, BenchError> {
    let (from, to) = stage.agents(way);
    let source = from.qemu(vm)?;
    let mut meter = Meter::default();
    [source, from.process(), to.process()].into_iter().for_each(|p| meter.watch(p));
    let wire = stage.wire_bytes()?;
    let window = Window::open();
    let mut command = from.command();
    command.args(["migrate", vm, to.host()]).args(&order.options);
    let run = Running::start(&mut command, progress)?;
    let (total, lines, command_time) = run.watch(&mut meter, source).map_err(|(code, said)| {
        let command = format!("sterna migrate {vm} {} {}", to.host(), order.options.join(" "));
        let logs = format!(
            "{said}\nagent {}: {}\nagent {}: {}",
            from.host(),
            from.log_tail(),
            to.host(),
            to.log_tail()
        );
        BenchError::Command { command, code, said: logs }
    })?;
    meter.watch_whole(to.qemu(vm)?);
    meter.sample();
    let (said, samples) = understood(&lines, progress)?;
    // The command ends with the migration; what the agent writes down after it, such as the split, is asked for.
    let said = parsed(&from.status(&said.id)?)?;
    Ok(Moved {
        total_time_ms: total.as_secs_f64() * 1e3,
        command_ms: command_time.as_secs_f64() * 1e3,
        wire_bytes: stage.wire_bytes()? - wire,
        cpu_s: meter.seconds(),
        window: window.close(),
        said,
        samples,
    })
}

/// A line of the command's standard output, and when it came.
type Line = (Duration, String);

struct Running {
    child: Child,
    began: Instant,
    reader: JoinHandle<Vec<Line>>,
}

impl Running {
    fn start(command: &mut Command, progress: Progress) -> Result<Running, BenchError> {
        match progress {
            Progress::Shown => command.args(["-o", "json"]),
            Progress::Sampled => command.args(["-o", "jsonl"]),
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let began = Instant::now();
        let mut child = command.spawn().map_err(BenchError::start(command.get_program()))?;
        let output = child.stdout.take();
        let reader = std::thread::spawn(move || output.map_or(Vec::new(), |o| lines(o, began)));
        Ok(Running { child, began, reader })
    }

    /// Until the command has ended and the source is gone. The error is the exit code and what was said.
    fn watch(
        mut self,
        meter: &mut Meter,
        source: ProcessId,
    ) -> Result<(Duration, Vec<Line>, Duration), (String, String)> {
        let own = ProcessId::of(self.child.id());
        own.into_iter().for_each(|p| meter.watch_whole(p));
        let (mut free, mut ended) = (None, None);
        while free.is_none() || ended.is_none() {
            meter.sample();
            let now = self.began.elapsed();
            if free.is_none() && !source.is_alive() {
                free = Some(now);
            }
            if ended.is_none()
                && let Ok(Some(status)) = self.child.try_wait()
            {
                if !status.success() {
                    return Err((status.to_string(), self.text()));
                }
                ended = Some(now);
            }
            if now > LIMIT || ended.is_some_and(|at| now > at + FREE) {
                // It may end at this very moment; either way it is over.
                let _ = self.child.kill();
                let _ = self.child.wait();
                return Err((format!("none: given up after {now:?}"), self.text()));
            }
            std::thread::sleep(LOOK);
        }
        let (free, ended) = (free.unwrap_or_default(), ended.unwrap_or_default());
        Ok((free, self.reader.join().unwrap_or_default(), ended))
    }

    fn text(self) -> String {
        let lines = self.reader.join().unwrap_or_default();
        lines.into_iter().map(|(_, line)| line).collect::<Vec<_>>().join("\n")
    }
}

fn lines(output: ChildStdout, began: Instant) -> Vec<Line> {
    let lines = BufReader::new(output).lines().map_while(Result::ok);
    lines.map(|line| (began.elapsed(), line)).collect()
}

/// The last word, and the way to it.
fn understood(lines: &[Line], progress: Progress) -> Result<(Said, Vec<Sample>), BenchError> {
    if progress == Progress::Shown {
        let text: Vec<&str> = lines.iter().map(|(_, line)| line.as_str()).collect();
        return Ok((parsed(&text.join("\n"))?, Vec::new()));
    }
    let mut samples = Vec::new();
    let mut last = Said::default();
    for (at, line) in lines {
        last = parsed(line)?;
        samples.push(Sample {
            ms: at.as_secs_f64() * 1e3,
            transferred: last.ram.transferred,
            remaining: last.ram.remaining,
        });
    }
    Ok((last, samples))
}

fn parsed(text: &str) -> Result<Said, BenchError> {
    serde_json::from_str(text)
        .map_err(|e| BenchError::unexpected(format!("the output of `sterna` ({e})"), text))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINAL: &str = r#"{"status":"completed","total-time":4000.5,"downtime":12.5,"ram":{"transferred":9,"mbps":900.0},
        "downtime-split":[{"name":"stop","ms":0.5}],"unknown":1}"#;

    fn at(ms: u64, text: &str) -> Line {
        (Duration::from_millis(ms), text.to_owned())
    }

    #[test]
    fn the_result_is_one_document_over_many_lines() {
        let lines: Vec<Line> = FINAL.lines().map(|l| at(1, l)).collect();
        let (said, samples) = understood(&lines, Progress::Shown).unwrap();
        assert_eq!((said.status.as_str(), said.downtime, said.ram.transferred), ("completed", Some(12.5), 9));
        assert!(samples.is_empty());
    }

    #[test]
    fn samples_end_with_the_result() {
        let first = r#"{"status":"active","total-time":1.0,"ram":{"transferred":5,"remaining":4}}"#;
        let last = FINAL.replace('\n', "");
        let (said, samples) = understood(&[at(10, first), at(20, &last)], Progress::Sampled).unwrap();
        assert_eq!(said.status, "completed");
        assert_eq!((samples[0].ms, samples[0].transferred, samples[0].remaining), (10.0, 5, 4));
    }

    #[test]
    fn other_output_is_an_error() {
        understood(&[at(1, "moved!")], Progress::Shown).unwrap_err();
        understood(&[at(1, "{}")], Progress::Sampled).unwrap_err();
    }
}
