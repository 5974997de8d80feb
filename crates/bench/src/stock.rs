//! One move by stock QEMU's own migration, timed like ours: from the start of the target's QEMU until the source is free.
//!
//! It is set up as QEMU's documentation advises: no bandwidth limit but the link's, and the downtime limit that ours has.
//! It is watched as gently as ours: a question every few milliseconds would take QEMU's big lock from the migration.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sterna_lab::{Arrival, GuestSpec, Running};

use crate::BenchError;
use crate::facts::load_average;
use crate::figures::{Figures, Metric, Point};
use crate::load::{self, Window};
use crate::meter::{Meter, pss_mb};
use crate::ours::PAGE_BITS;
use crate::results::Move;
use crate::stage::{Stage, Way};
use crate::waits;

/// QEMU listens here at the target; every VM of a lab has a port of its own above it.
const PORT: u16 = 4444;
/// QEMU's own default, and ours.
const DOWNTIME_LIMIT_MS: u64 = 300;
/// `max-bandwidth` in bytes per second: far above the link, so that the link limits.
const BANDWIDTH_BYTES: u64 = 12_500_000_000;
/// How often QEMU is asked how far it is, and so the error of its total time.
const ASK: Duration = Duration::from_millis(20);
/// How long a migration may take.
const LIMIT: Duration = Duration::from_secs(120);
/// QEMU says `completed` a moment before it writes down for how long the guest was stopped.
const FIGURES: Duration = Duration::from_secs(1);
/// `multifd-channels`: QEMU's default, and as many as the machine has cores to serve.
const CHANNELS: u32 = 2;
/// `xbzrle-cache-size`: all of the guests' working sets. QEMU's default of 64 MiB would hold it back.
const CACHE_BYTES: u64 = 512 << 20;

/// `cpu-throttle-initial`, `cpu-throttle-increment` and `max-cpu-throttle`, in per cent: QEMU's defaults, as its documentation has
/// them.
const THROTTLE_FIRST: u32 = 20;
const THROTTLE_STEP: u32 = 10;
const THROTTLE_MAX: u32 = 99;
/// How often its progress is noted, as that of ours is.
const NOTE_MS: f64 = 100.0;
/// Everything that a way may switch on: what the last move of a VM switched on is switched off again.
const CAPABILITIES: &[&str] =
    &["multifd", "xbzrle", "compress", "auto-converge", "postcopy-ram", "postcopy-preempt", BLOCKTIME];
/// Has the target count for how long the guest's processors wait for pages; not every QEMU can.
const BLOCKTIME: &str = "postcopy-blocktime";
/// A cancelled migration ends within milliseconds, unless the machine is very busy.
const CANCELLED: Duration = Duration::from_secs(10);

/// A way in which QEMU itself migrates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StockWay {
    /// As it does when nothing is asked for.
    Precopy,
    /// Pages on several connections.
    Multifd,
    /// Pages that are sent again travel as differences.
    Xbzrle,
    /// Pages are compressed by threads of their own (removed after QEMU 9.0).
    Compress,
    /// The guest is slowed down until it converges.
    AutoConverge,
    /// The guest runs at the target at once.
    Postcopy,
    /// The same, with faulted pages on a connection of their own.
    Preempt,
}

impl StockWay {
    /// Its name in results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            StockWay::Precopy => "stock pre-copy",
            StockWay::Multifd => "stock multifd",
            StockWay::Xbzrle => "stock XBZRLE",
            StockWay::Compress => "stock compression",
            StockWay::AutoConverge => "stock auto-converge",
            StockWay::Postcopy => "stock post-copy",
            StockWay::Preempt => "stock post-copy preempt",
        }
    }

    fn capabilities(self) -> &'static [&'static str] {
        match self {
            StockWay::Precopy => &[],
            StockWay::Multifd => &["multifd"],
            StockWay::Xbzrle => &["xbzrle"],
            StockWay::Compress => &["compress"],
            StockWay::AutoConverge => &["auto-converge"],
            StockWay::Postcopy => &["postcopy-ram", BLOCKTIME],
            StockWay::Preempt => &["postcopy-ram", "postcopy-preempt", BLOCKTIME],
        }
    }

    fn is_postcopy(self) -> bool {
        matches!(self, StockWay::Postcopy | StockWay::Preempt)
    }
}

/// What is asked of QEMU's migration.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// In which way.
    pub way: StockWay,
    /// `max-bandwidth` in bytes per second, if it is to be limited.
    pub bandwidth: Option<u64>,
    /// `downtime-limit`.
    pub downtime_limit_ms: u64,
    /// When to give up.
    pub limit: Duration,
    /// Settings of the way.
    pub tuning: Tuning,
}

/// Settings of the ways. What is none is as QEMU has it by default, or as this file says.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tuning {
    /// `multifd-channels`.
    pub channels: Option<u32>,
    /// `xbzrle-cache-size`, in bytes.
    pub cache_bytes: Option<u64>,
    /// `compress-threads` and `decompress-threads`.
    pub threads: Option<u32>,
    /// `cpu-throttle-increment`, in per cent.
    pub throttle_step: Option<u32>,
    /// Rounds after which post-copy begins.
    pub switch_after: u64,
    /// Rounds after which the guest is stopped, to run again when it is at the target.
    pub stop_after: Option<u64>,
    /// Rounds after which it is given up.
    pub rounds_max: Option<u64>,
}

impl Order {
    /// In this way, with nothing in its way.
    #[must_use]
    pub fn of(way: StockWay) -> Order {
        Order {
            way,
            bandwidth: None,
            downtime_limit_ms: DOWNTIME_LIMIT_MS,
            limit: LIMIT,
            tuning: Tuning::default(),
        }
    }
}

/// A VM that stock QEMU runs, and will move.
#[derive(Debug)]
pub struct StockVm {
    guest: GuestSpec,
    tap: u8,
    /// Its QEMU.
    pub qemu: Running,
    /// The way that it would go next.
    pub way: Way,
    /// Whether its QEMU counts for how long the guest waits for pages.
    blocktime: bool,
    /// What the guest had printed at the host that it left.
    left: String,
}

impl StockVm {
    /// Boots it on host `a`, at the tap of this number, and waits until all that it runs is up.
    pub fn boot(stage: &Stage, guest: &GuestSpec, tap: u8) -> Result<StockVm, BenchError> {
        let (guest, way) = (guest.clone(), Way::There);
        let mut qemu = start(stage, &guest, tap, way.turned(), Arrival::Boot)?;
        load::wait_ready(&guest, || qemu.console())?;
        let blocktime = knows(&mut qemu, BLOCKTIME);
        Ok(StockVm { guest, tap, qemu, way, blocktime, left: String::new() })
    }

    /// Everything that the guest printed where it is now.
    #[must_use]
    pub fn console(&self) -> String {
        self.qemu.console()
    }

    /// The same, and what it printed before at the host that it came from: all of it, of a guest that moved once.
    #[must_use]
    pub fn whole_console(&self) -> String {
        self.left.clone() + &self.console()
    }

    /// Moves it to the other host, timed. After an error it runs on where it was.
    pub fn migrate(&mut self, stage: &Stage, order: Order) -> Result<Move, BenchError> {
        let pss_source = pss_mb(self.qemu.process());
        let mut meter = Meter::default();
        meter.watch(self.qemu.process());
        let (wire, load_before) = (stage.wire_bytes(self.way)?, load_average());
        let (window, began) = (Window::open(), Instant::now());
        let mut target = start(stage, &self.guest, self.tap, self.way, Arrival::Incoming)?;
        let launch_ms = began.elapsed().as_secs_f64() * 1e3;
        meter.watch_whole(target.process());
        self.begin(stage, &mut target, order)?;
        let mut progress = Vec::new();
        let stopped = self.wait_completed(order, began, &mut progress)?;
        wait_running(&mut target)?;
        let running = began.elapsed();
        // QEMU counts from its own stop, and not from ours.
        let stopped_ms = stopped.map(|s| s.elapsed().as_secs_f64() * 1e3);
        meter.sample();
        // What follows is a question of ours, not part of the migration.
        let mut report = figures(&mut self.qemu)?;
        self.left = self.qemu.console();
        let freeing = Instant::now();
        drop(std::mem::replace(&mut self.qemu, target));
        let total_ms = (running + freeing.elapsed()).as_secs_f64() * 1e3;
        let window = window.close();
        let wire = wire.until(stage.wire_bytes(self.way)?);
        self.way = self.way.turned();
        let told = |name: &str| report.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let pages = report.pointer("/ram/normal").and_then(Value::as_f64).unwrap_or(f64::NAN);
        let sending_ms = told("total-time") - told("setup-time");
        // After some post-copies QEMU 7.2 tells for how long the machine has been up.
        let told_downtime = Some(told("downtime")).filter(|ms| *ms <= total_ms).unwrap_or(f64::NAN);
        let mut figures = Figures::default();
        for (metric, value) in [
            (Metric::TotalTime, total_ms),
            (Metric::SetupTime, launch_ms),
            (Metric::Downtime, stopped_ms.unwrap_or(told_downtime)),
            (Metric::WireBytes, (wire.sent + wire.received) as f64 / 1e6),
            (Metric::WireForth, wire.sent as f64 / 1e6),
            (Metric::Cpu, meter.seconds()),
            (Metric::PssSource, pss_source),
            (Metric::PssTarget, pss_mb(self.qemu.process())),
            (Metric::Throughput, pages * PAGE_BITS / 1e6 / sending_ms),
        ] {
            figures.set(metric, value);
        }
        if order.way.is_postcopy() {
            let target = self.waits()?;
            waits::of_stock(&report, &target, &mut figures);
            report["target"] = target;
        }
        Ok(Move { figures, window, progress, load_before, report, ..Move::default() })
    }

    /// Begins a migration to a QEMU that waits.
    pub fn begin(&mut self, stage: &Stage, target: &mut Running, order: Order) -> Result<(), BenchError> {
        let address = stage.to(self.way)?.address;
        let uri = format!("tcp:{address}:{}", PORT + u16::from(self.tap));
        let wanted = order.way.capabilities();
        let capabilities: Vec<_> = CAPABILITIES
            .iter()
            .filter(|c| **c != BLOCKTIME || self.blocktime)
            .map(|c| json!({ "capability": c, "state": wanted.contains(c) }))
            .collect();
        let mut parameters = json!({
            "downtime-limit": order.downtime_limit_ms,
            "max-bandwidth": order.bandwidth.unwrap_or(BANDWIDTH_BYTES),
        });
        let tuning = order.tuning;
        match order.way {
            StockWay::Multifd => parameters["multifd-channels"] = tuning.channels.unwrap_or(CHANNELS).into(),
            StockWay::Xbzrle => {
                parameters["xbzrle-cache-size"] = tuning.cache_bytes.unwrap_or(CACHE_BYTES).into();
            }
            StockWay::Compress => {
                let threads = tuning.threads.unwrap_or(CHANNELS);
                parameters["compress-threads"] = threads.into();
                parameters["decompress-threads"] = threads.into();
            }
            StockWay::AutoConverge => {
                parameters["cpu-throttle-initial"] = THROTTLE_FIRST.into();
                parameters["max-cpu-throttle"] = THROTTLE_MAX.into();
                parameters["cpu-throttle-increment"] = tuning.throttle_step.unwrap_or(THROTTLE_STEP).into();
            }
            StockWay::Precopy | StockWay::Postcopy | StockWay::Preempt => {}
        }
        for qemu in [&mut self.qemu, &mut *target] {
            qemu.qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
            qemu.qmp.execute("migrate-set-parameters", parameters.clone())?;
        }
        target.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        self.qemu.qmp.execute("migrate", json!({ "uri": uri }))?;
        Ok(())
    }

    /// What the target says of a post-copy that is over; it knows a moment after the source.
    fn waits(&mut self) -> Result<Value, BenchError> {
        let end = Instant::now() + FIGURES;
        loop {
            let report = self.qemu.qmp.execute("query-migrate", json!({}))?;
            if !self.blocktime || waits::are_told(&report) || Instant::now() >= end {
                return Ok(report);
            }
            std::thread::sleep(ASK);
        }
    }

    /// A QEMU at the other host that waits for this VM.
    pub fn waiting(&self, stage: &Stage) -> Result<Running, BenchError> {
        start(stage, &self.guest, self.tap, self.way, Arrival::Incoming)
    }

    /// Also does what the order wants done after some rounds; when it stopped the guest is told.
    fn wait_completed(
        &mut self,
        order: Order,
        began: Instant,
        progress: &mut Vec<Point>,
    ) -> Result<Option<Instant>, BenchError> {
        let end = Instant::now() + order.limit;
        let tuning = order.tuning;
        let mut to_switch = order.way.is_postcopy();
        let (mut stopped, mut switched) = (None, None);
        loop {
            let report = self.qemu.qmp.execute("query-migrate", json!({}))?;
            let rounds = report.pointer("/ram/dirty-sync-count").and_then(Value::as_u64).unwrap_or(0);
            let now = Instant::now();
            note(progress, began, &report, rounds);
            match word(&report) {
                "completed" => return Ok(stopped),
                "failed" | "cancelled" => {
                    return Err(BenchError::unexpected("stock migration", report.to_string()));
                }
                "active" if to_switch && rounds >= tuning.switch_after => {
                    self.qemu.qmp.execute("migrate-start-postcopy", json!({}))?;
                    (to_switch, switched) = (false, Some(now));
                }
                "active" if stopped.is_none() && tuning.stop_after.is_some_and(|s| rounds >= s) => {
                    self.qemu.qmp.execute("stop", json!({}))?;
                    stopped = Some(now);
                }
                // From the switch on there is no way back: cancelling would end the guest.
                _ if now >= switched.map_or(end, |at| at + LIMIT) => {
                    self.cancel(stopped)?;
                    let what = format!("{} ({report})", order.way.name());
                    return Err(BenchError::Deadline { what, limit: order.limit });
                }
                _ if switched.is_none() && tuning.rounds_max.is_some_and(|max| rounds > max) => {
                    self.cancel(stopped)?;
                    let what = format!("{} ({report})", order.way.name());
                    return Err(BenchError::NoEnd { what, rounds });
                }
                _ => std::thread::sleep(ASK),
            }
        }
    }

    /// Ends a migration, and waits until the guest is alone again; if it was stopped, it runs again.
    fn cancel(&mut self, stopped: Option<Instant>) -> Result<(), BenchError> {
        self.qemu.qmp.execute("migrate_cancel", json!({}))?;
        let end = Instant::now() + CANCELLED;
        loop {
            let report = self.qemu.qmp.execute("query-migrate", json!({}))?;
            match word(&report) {
                "cancelled" if stopped.is_some() => {
                    return Ok(self.qemu.qmp.execute("cont", json!({})).map(drop)?);
                }
                "cancelled" => return Ok(()),
                "cancelling" if Instant::now() < end => std::thread::sleep(ASK),
                _ => return Err(BenchError::unexpected("a cancelled migration", report.to_string())),
            }
        }
    }
}

/// Keeps a point of its progress every now and then, and each first one of a round.
fn note(progress: &mut Vec<Point>, began: Instant, report: &Value, rounds: u64) {
    let bytes = |name: &str| report.pointer(name).and_then(Value::as_u64);
    let (Some(transferred), Some(remaining)) = (bytes("/ram/transferred"), bytes("/ram/remaining")) else {
        return;
    };
    let ms = began.elapsed().as_secs_f64() * 1e3;
    if progress.last().is_none_or(|last| ms - last.ms >= NOTE_MS || last.rounds != rounds) {
        progress.push(Point { ms, transferred, remaining, rounds });
    }
}

/// Starts a QEMU for a guest that goes this way, at the end of it.
fn start(
    stage: &Stage,
    guest: &GuestSpec,
    tap: u8,
    way: Way,
    arrival: Arrival,
) -> Result<Running, BenchError> {
    let host = stage.to(way)?;
    Ok(Running::start(&stage.lab, host, &stage.kit.packages.qemu_72, guest, tap, arrival)?)
}

/// A guest that was stopped before it left comes as it was, and is let go on as soon as it is there: `cont` before that is lost.
fn wait_running(target: &mut Running) -> Result<(), BenchError> {
    let end = Instant::now() + LIMIT;
    loop {
        let report = target.qmp.execute("query-status", json!({}))?;
        match word(&report) {
            "running" => return Ok(()),
            "paused" => drop(target.qmp.execute("cont", json!({}))?),
            _ if Instant::now() >= end => {
                let what = "the guest did not start at the target";
                return Err(BenchError::unexpected(what, report.to_string()));
            }
            _ => std::thread::sleep(ASK),
        }
    }
}

fn figures(source: &mut Running) -> Result<Value, BenchError> {
    let end = Instant::now() + FIGURES;
    loop {
        let report = source.qmp.execute("query-migrate", json!({}))?;
        let told = report.get("downtime").and_then(Value::as_f64).is_some_and(|ms| ms > 0.0);
        if told || Instant::now() >= end {
            return Ok(report);
        }
        std::thread::sleep(ASK);
    }
}

/// Whether a QEMU has a capability. One that does not tell has none that could be done without.
fn knows(qemu: &mut Running, capability: &str) -> bool {
    let all = qemu.qmp.execute("query-migrate-capabilities", json!({})).unwrap_or_default();
    let name = |c: &Value| c.get("capability").and_then(Value::as_str) == Some(capability);
    all.as_array().is_some_and(|all| all.iter().any(name))
}

fn word(answer: &Value) -> &str {
    answer.get("status").and_then(Value::as_str).unwrap_or_default()
}
