//! One move by stock QEMU's own migration, timed like ours: from the start of the target's QEMU until the source is free.
//!
//! It is set up as QEMU's documentation advises: no bandwidth limit but the link's, and the downtime limit that ours has.
//! It is watched as gently as ours: a question every few milliseconds would take QEMU's big lock from the migration.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sterna_lab::{Arrival, Running};

use crate::load::{self, Window};
use crate::meter::Meter;
use crate::stage::Stage;
use crate::{BenchError, Kit};

/// QEMU listens here at the target.
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

/// A move as seen from outside.
#[derive(Debug, Clone)]
pub struct Moved {
    /// From the start of the target's QEMU until the source's was gone.
    pub total_time_ms: f64,
    /// The part of it in which the target's QEMU started.
    pub launch_ms: f64,
    /// QEMU's own figure.
    pub downtime_ms: f64,
    /// Bytes on the link, both ways, headers included.
    pub wire_bytes: u64,
    /// CPU seconds of both QEMUs. The emulated guest's own work is part of it.
    pub cpu_s: f64,
    /// When it was.
    pub window: Window,
    /// `query-migrate` at the end.
    pub report: Value,
}

/// A VM that stock QEMU runs, and will move.
#[derive(Debug)]
pub struct StockVm {
    name: String,
    qemu: Running,
}

impl StockVm {
    /// Boots one like ours on the same host.
    pub fn boot(stage: &Stage, name: &str) -> Result<StockVm, BenchError> {
        let qemu = start(stage, name, 0, Arrival::Boot)?;
        qemu.wait_ready()?;
        Ok(StockVm { name: name.to_owned(), qemu })
    }

    /// Moves it to host `b`.
    pub fn migrate(mut self, stage: &Stage) -> Result<(Moved, StockVm), BenchError> {
        let mut meter = Meter::default();
        meter.watch(self.qemu.process());
        let wire = stage.wire_bytes()?;
        let (window, began) = (Window::open(), Instant::now());
        let mut target = start(stage, &self.name, 1, Arrival::Incoming)?;
        let launch_ms = began.elapsed().as_secs_f64() * 1e3;
        meter.watch_whole(target.process());
        begin(stage, &mut self.qemu, &mut target)?;
        wait_completed(&mut self.qemu)?;
        wait_running(&mut target)?;
        let running = began.elapsed();
        meter.sample();
        // What follows is a question of ours, not part of the migration.
        let report = figures(&mut self.qemu)?;
        let freeing = Instant::now();
        drop(self.qemu);
        let moved = Moved {
            total_time_ms: (running + freeing.elapsed()).as_secs_f64() * 1e3,
            launch_ms,
            downtime_ms: report.get("downtime").and_then(Value::as_f64).unwrap_or(f64::NAN),
            wire_bytes: stage.wire_bytes()? - wire,
            cpu_s: meter.seconds(),
            window: window.close(),
            report,
        };
        Ok((moved, StockVm { name: self.name, qemu: target }))
    }
}

fn start(stage: &Stage, name: &str, host: usize, arrival: Arrival) -> Result<Running, BenchError> {
    let kit: &Kit = &stage.kit;
    let guest = load::guest(&stage.lab, kit, name);
    Ok(Running::start(&stage.lab, stage.lab.host(host)?, &kit.packages.qemu_72, &guest, 0, arrival)?)
}

fn begin(stage: &Stage, source: &mut Running, target: &mut Running) -> Result<(), BenchError> {
    let uri = format!("tcp:{}:{PORT}", stage.lab.host(1)?.address);
    target.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
    let parameters = json!({ "downtime-limit": DOWNTIME_LIMIT_MS, "max-bandwidth": BANDWIDTH_BYTES });
    source.qmp.execute("migrate-set-parameters", parameters)?;
    source.qmp.execute("migrate", json!({ "uri": uri }))?;
    Ok(())
}

fn wait_completed(source: &mut Running) -> Result<(), BenchError> {
    let end = Instant::now() + LIMIT;
    loop {
        let report = source.qmp.execute("query-migrate", json!({}))?;
        match word(&report) {
            "completed" => return Ok(()),
            "failed" | "cancelled" => {
                return Err(BenchError::unexpected("stock migration", report.to_string()));
            }
            _ if Instant::now() >= end => {
                return Err(BenchError::Deadline {
                    what: format!("stock migration ({report})"),
                    limit: LIMIT,
                });
            }
            _ => std::thread::sleep(ASK),
        }
    }
}

fn wait_running(target: &mut Running) -> Result<(), BenchError> {
    let end = Instant::now() + LIMIT;
    while word(&target.qmp.execute("query-status", json!({}))?) != "running" {
        if Instant::now() >= end {
            return Err(BenchError::Deadline {
                what: "the guest's start at the target".to_owned(),
                limit: LIMIT,
            });
        }
        std::thread::sleep(ASK);
    }
    Ok(())
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

fn word(answer: &Value) -> &str {
    answer.get("status").and_then(Value::as_str).unwrap_or_default()
}
