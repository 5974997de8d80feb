//! One move by `sterna migrate`, timed from the command until the source is free.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sterna_lab::process::ProcessId;

use sterna_lab::guest::{HostSide, Serial};
use sterna_lab::{Arrival, GuestSpec, run};

use crate::BenchError;
use crate::agent::HostAgent;
use crate::facts::load_average;
use crate::figures::{Figures, Metric, Point, Span};
use crate::load::{self, Window};
use crate::meter::{Meter, pss_mb};
use crate::results::{Move, Verified};
use crate::stage::{Stage, Way};
use crate::waits;

/// Bits of a page of 4 KiB.
pub(crate) const PAGE_BITS: f64 = 32_768.0;

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
    /// When it is aborted; the VM then runs where it was.
    pub limit: Option<Duration>,
}

impl Order {
    /// With these options.
    #[must_use]
    pub fn with(options: &[&str]) -> Order {
        Order { options: options.iter().map(|o| (*o).to_owned()).collect(), limit: None }
    }

    /// Not longer than this.
    #[must_use]
    pub fn within(self, limit: Option<Duration>) -> Order {
        Order { limit, ..self }
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
    /// Milliseconds until a QEMU waited at the target.
    #[serde(default)]
    pub target_setup_time: f64,
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
    /// What is known of its post-copy, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<SaidOfPostcopy>,
    /// What a person should know: what was asked for and could not be done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
    /// What went wrong.
    #[serde(default)]
    pub error_desc: Option<String>,
}

/// What is said of pages that the target fetched.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct SaidOfPostcopy {
    /// Pages that the target asked for.
    pub postcopy_requests: u64,
    /// Pages that came before they were asked for.
    pub pushed_pages: u64,
    /// How often the guest waited for a page.
    pub faults: Option<u64>,
    /// How long it waited, in microseconds.
    pub postcopy_latency: Option<SaidOfLatency>,
    /// Milliseconds that each of its processors waited in all.
    pub postcopy_vcpu_blocktime: Vec<f64>,
}

/// How long waits were, in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SaidOfLatency {
    /// On average.
    pub mean: f64,
    /// Half of them at most.
    pub p50: f64,
    /// 99 of 100 at most.
    pub p99: f64,
    /// The longest.
    pub max: f64,
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
    /// Bytes sent before a QEMU waited at the target.
    pub ahead_bytes: u64,
}

/// A VM of our agents, wherever it is.
#[derive(Debug)]
pub struct OurVm {
    /// Its name.
    pub name: String,
    /// The way that it would go next.
    pub way: Way,
}

impl OurVm {
    /// Boots a VM under the care of host `a`'s agent, at the tap of this number, and waits until all that it runs is up.
    pub fn boot(stage: &Stage, guest: &GuestSpec, tap: u8) -> Result<OurVm, BenchError> {
        let serial = Serial::File(stage.console(&guest.name));
        let tap = Some(stage.from(Way::There)?.tap(tap));
        let side = HostSide { tap, serial, qmp: None, arrival: Arrival::Boot };
        stage.a.run(&guest.name, &stage.kit.packages.qemu_72, &guest.arguments(&side))?;
        load::wait_ready(guest, || load::text_of(&stage.console(&guest.name)))?;
        Ok(OurVm { name: guest.name.clone(), way: Way::There })
    }

    /// Everything that the guest printed.
    #[must_use]
    pub fn console(&self, stage: &Stage) -> String {
        load::text_of(&stage.console(&self.name))
    }

    /// Moves it to the other host, timed.
    pub fn migrate(
        &mut self,
        stage: &Stage,
        order: &Order,
        progress: Progress,
    ) -> Result<(Move, Said), BenchError> {
        let done = migrate(stage, &self.name, self.way, order, progress)?;
        self.way = self.way.turned();
        Ok(done)
    }

    /// Moves it with every byte of its RAM compared. A failure is a result here: the VM runs on where it was.
    pub fn verify(&mut self, stage: &Stage) -> Verified {
        self.verify_with(stage, &Order::with(&["--verify"]))
    }

    /// The same by an order with `--verify` in it and more: a guest that writes much needs a `--timeout` to move at all.
    pub fn verify_with(&mut self, stage: &Stage, order: &Order) -> Verified {
        match self.migrate(stage, order, Progress::Sampled) {
            Ok((moved, said)) => {
                let total_time_ms = moved.figures.get(Metric::TotalTime).unwrap_or_default();
                let blocks = said.blocks_verified.unwrap_or_default();
                // Where nothing was compared, it is said why.
                let error = (blocks == 0 && !said.notices.is_empty()).then(|| said.notices.join("; "));
                Verified { blocks, total_time_ms, error }
            }
            Err(why) => Verified { error: Some(why.to_string()), ..Verified::default() },
        }
    }

    /// Begins to move it to the other host, and does not wait.
    pub fn begin(&self, stage: &Stage, order: &Order) -> Result<(), BenchError> {
        let (from, to) = stage.agents(self.way);
        let mut command = from.command();
        command.args(["migrate", &self.name, to.host(), "--detach"]).args(&order.options);
        Ok(run::output(&mut command, FREE).map(drop)?)
    }

    /// Ends a migration that was begun; it runs on where it was.
    pub fn abort(&self, stage: &Stage) -> Result<(), BenchError> {
        abort(stage.agents(self.way).0, &self.name)
    }

    /// Ends it.
    pub fn stop(self, stage: &Stage) -> Result<(), BenchError> {
        stage.agents(self.way).0.stop(&self.name)
    }
}

/// Begins to move VMs together, and does not wait.
pub fn begin_together(stage: &Stage, vms: &[OurVm], order: &Order) -> Result<(), BenchError> {
    let way = vms.first().map_or(Way::There, |vm| vm.way);
    let (from, to) = stage.agents(way);
    let mut command = from.command();
    command
        .arg("migrate")
        .args(vms.iter().map(|vm| &vm.name))
        .args([to.host(), "--detach"])
        .args(&order.options);
    Ok(run::output(&mut command, FREE).map(drop)?)
}

/// Moves a VM.
fn migrate(
    stage: &Stage,
    vm: &str,
    way: Way,
    order: &Order,
    progress: Progress,
) -> Result<(Move, Said), BenchError> {
    let (from, to) = stage.agents(way);
    let source = from.qemu(vm)?;
    let pss_source = pss_mb(source);
    let mut meter = Meter::default();
    [source, from.process(), to.process()].into_iter().for_each(|p| meter.watch(p));
    let (wire, load_before) = (stage.wire_bytes(way)?, load_average());
    let window = Window::open();
    let mut command = from.command();
    command.args(["migrate", vm, to.host()]).args(&order.options);
    let run = Running::start(&mut command, progress)?;
    let (total, lines, _) = run
        .watch(&mut meter, source, order.limit.unwrap_or(LIMIT))
        .map_err(|why| failed((from, to), vm, order, why))?;
    let window = window.close();
    let target = to.qemu(vm)?;
    meter.watch_whole(target);
    meter.sample();
    let wire = wire.until(stage.wire_bytes(way)?);
    let (said, progress) = understood(&lines, progress)?;
    // The command ends with the migration; what the agent writes down after it, such as the split, is asked for.
    let said = if said.id.is_empty() { said } else { parsed(&from.status(&said.id)?)? };
    let mut figures = Figures::default();
    // Pages that went before there was a QEMU to take them do not count, nor does the time.
    let sending_ms = said.total_time - said.setup_time.max(said.target_setup_time);
    let taken = 1.0 - said.ram.ahead_bytes as f64 / said.ram.transferred.max(1) as f64;
    for (metric, value) in [
        (Metric::TotalTime, total.as_secs_f64() * 1e3),
        (Metric::SetupTime, said.setup_time),
        (Metric::Downtime, said.downtime.unwrap_or(f64::NAN)),
        (Metric::WireBytes, (wire.sent + wire.received) as f64 / 1e6),
        (Metric::WireForth, wire.sent as f64 / 1e6),
        (Metric::Cpu, meter.seconds()),
        (Metric::PssSource, pss_source),
        (Metric::PssTarget, pss_mb(target)),
        (Metric::Throughput, said.ram.normal as f64 * taken * PAGE_BITS / 1e6 / sending_ms),
    ] {
        figures.set(metric, value);
    }
    if let Some(postcopy) = &said.postcopy {
        waits::of_ours(postcopy, &mut figures);
    }
    let report = serde_json::to_value(&said).unwrap_or_default();
    let split = said.downtime_split.clone();
    let moved = Move { figures, downtime_split: split, client: None, window, progress, load_before, report };
    Ok((moved, said))
}

fn abort(from: &HostAgent, vm: &str) -> Result<(), BenchError> {
    Ok(run::output(from.command().args(["abort", vm]), FREE).map(drop)?)
}

/// What to say of a command that did not move its VM. What was given up goes on at the agents until they hear of it.
fn failed((from, to): (&HostAgent, &HostAgent), vm: &str, order: &Order, why: Failure) -> BenchError {
    let command = format!("sterna migrate {vm} {} {}", to.host(), order.options.join(" "));
    if let (Some(limit), true) = (order.limit, why.is_late) {
        let what = command.trim_end().to_owned();
        return match abort(from, vm).and_then(|()| from.qemu(vm)) {
            Ok(_) => BenchError::Deadline { what, limit },
            Err(other) => other,
        };
    }
    let (here, there) = ((from.host(), from.log_tail()), (to.host(), to.log_tail()));
    let said = format!("{}\nagent {}: {}\nagent {}: {}", why.said, here.0, here.1, there.0, there.1);
    BenchError::Command { command, code: why.code, said }
}

/// How a command ended that did not move its VM.
struct Failure {
    code: String,
    said: String,
    is_late: bool,
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

    /// Until the command has ended and the source is gone.
    fn watch(
        mut self,
        meter: &mut Meter,
        source: ProcessId,
        limit: Duration,
    ) -> Result<(Duration, Vec<Line>, Duration), Failure> {
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
                    return Err(Failure { code: status.to_string(), said: self.text(), is_late: false });
                }
                ended = Some(now);
            }
            if now > limit || ended.is_some_and(|at| now > at + FREE) {
                // It may end at this very moment; either way it is over.
                let _ = self.child.kill();
                let _ = self.child.wait();
                let code = format!("none: given up after {now:?}");
                return Err(Failure { code, said: self.text(), is_late: ended.is_none() });
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
fn understood(lines: &[Line], progress: Progress) -> Result<(Said, Vec<Point>), BenchError> {
    if progress == Progress::Shown {
        let text: Vec<&str> = lines.iter().map(|(_, line)| line.as_str()).collect();
        return Ok((parsed(&text.join("\n"))?, Vec::new()));
    }
    let mut samples = Vec::new();
    let mut last = Said::default();
    for (at, line) in lines {
        last = parsed(line)?;
        samples.push(Point {
            ms: at.as_secs_f64() * 1e3,
            transferred: last.ram.transferred,
            remaining: last.ram.remaining,
            rounds: last.ram.dirty_sync_count.into(),
        });
    }
    Ok((last, samples))
}

pub(crate) fn parsed(text: &str) -> Result<Said, BenchError> {
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
