//! QEMU's own migration, as the measure that ours is held to.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use crate::{Host, Lab, LabError, LinkBytes, Running, run};

/// QEMU listens here at the target; each host has an address of its own.
const PORT: u16 = 4444;

/// How QEMU is to migrate.
#[derive(Debug, Clone)]
pub struct StockOptions {
    /// `downtime-limit`: what QEMU may stop the guest for.
    pub downtime_limit: Duration,
    /// `max-bandwidth` in bytes a second.
    pub bandwidth_bytes: u64,
    /// When to give up.
    pub limit: Duration,
}

impl Default for StockOptions {
    /// QEMU's own downtime limit, and a bandwidth that the link limits, not QEMU.
    fn default() -> Self {
        StockOptions {
            downtime_limit: Duration::from_millis(300),
            bandwidth_bytes: 12_500_000_000,
            limit: Duration::from_secs(300),
        }
    }
}

/// What a stock migration took.
#[derive(Debug, Clone, Serialize)]
pub struct StockFigures {
    /// From the command until the source is free: its process ended.
    pub total_time_ms: f64,
    /// QEMU's own figure of how long the guest was stopped.
    pub downtime_ms: f64,
    /// Bytes on the migration link, both ways, headers included.
    pub wire_bytes: u64,
    /// CPU seconds of both QEMUs during the migration (the emulated guest's own work is part of it).
    pub cpu_s: f64,
    /// QEMU's `query-migrate` when it was done.
    pub report: Value,
}

/// Migrates a guest to a waiting QEMU and ends the source.
pub fn migrate(
    lab: &Lab,
    (from_host, mut from): (&Host, Running),
    (to_host, to): (&Host, &mut Running),
    options: &StockOptions,
) -> Result<StockFigures, LabError> {
    let uri = format!("tcp:{}:{PORT}", to_host.address);
    to.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
    from.qmp.execute(
        "migrate-set-parameters",
        json!({
            "downtime-limit": u64::try_from(options.downtime_limit.as_millis()).unwrap_or(u64::MAX),
            "max-bandwidth": options.bandwidth_bytes,
        }),
    )?;
    let (before, cpu) = (lab.link_bytes(from_host)?, cpu_seconds(&[&from, to]));
    let start = Instant::now();
    from.qmp.execute("migrate", json!({ "uri": uri }))?;
    let report = wait_completed(&mut from, options.limit)?;
    wait_running(to, options.limit)?;
    let cpu_s = cpu_seconds(&[&from, to]) - cpu;
    drop(from);
    let total_time_ms = start.elapsed().as_secs_f64() * 1e3;
    let downtime_ms = report.get("downtime").and_then(Value::as_f64).unwrap_or(f64::NAN);
    let wire_bytes = difference(lab.link_bytes(from_host)?, before);
    Ok(StockFigures { total_time_ms, downtime_ms, wire_bytes, cpu_s, report })
}

fn wait_completed(from: &mut Running, limit: Duration) -> Result<Value, LabError> {
    let end = Instant::now() + limit;
    loop {
        let report = from.qmp.execute("query-migrate", json!({}))?;
        match report.get("status").and_then(Value::as_str) {
            Some("completed") => return Ok(report),
            Some("failed" | "cancelled") => {
                return Err(LabError::unexpected("stock migration", report.to_string()));
            }
            _ if Instant::now() >= end => {
                return Err(LabError::Deadline { what: format!("stock migration ({report})"), limit });
            }
            _ => std::thread::sleep(run::POLL),
        }
    }
}

fn wait_running(to: &mut Running, limit: Duration) -> Result<(), LabError> {
    let mut failed = None;
    run::until("the guest to run at the target", limit, || {
        match to.qmp.execute("query-status", json!({})) {
            Ok(status) => status.get("status").and_then(Value::as_str) == Some("running"),
            Err(error) => {
                failed = Some(error);
                true
            }
        }
    })?;
    failed.map_or(Ok(()), Err)
}

fn cpu_seconds(qemus: &[&Running]) -> f64 {
    qemus.iter().filter_map(|q| q.process().cpu_time()).map(|t| t.as_secs_f64()).sum()
}

fn difference(after: LinkBytes, before: LinkBytes) -> u64 {
    (after.sent - before.sent) + (after.received - before.received)
}
