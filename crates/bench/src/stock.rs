//! One move by stock QEMU's own migration, timed like ours: from the start of the target's QEMU until the source is free.

use std::time::Instant;

use sterna_lab::stock::{self, StockOptions};
use sterna_lab::{Arrival, Running};

use crate::load::{self, Window};
use crate::stage::Stage;
use crate::{BenchError, Kit};

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
    pub report: serde_json::Value,
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

    /// Moves it to host `b`, with the downtime limit that ours has and no other limit than the link.
    pub fn migrate(self, stage: &Stage) -> Result<(Moved, StockVm), BenchError> {
        let source = self.qemu.process();
        let cpu = || source.cpu_time().unwrap_or_default().as_secs_f64();
        let (window, began, cpu_before) = (Window::open(), Instant::now(), cpu());
        let mut target = start(stage, &self.name, 1, Arrival::Incoming)?;
        let launch_ms = began.elapsed().as_secs_f64() * 1e3;
        let launch_cpu = cpu() - cpu_before + target.process().cpu_time().unwrap_or_default().as_secs_f64();
        let (a, b) = (stage.lab.host(0)?, stage.lab.host(1)?);
        let figures = stock::migrate(&stage.lab, (a, self.qemu), (b, &mut target), &StockOptions::default())?;
        let moved = Moved {
            total_time_ms: launch_ms + figures.total_time_ms,
            launch_ms,
            downtime_ms: figures.downtime_ms,
            wire_bytes: figures.wire_bytes,
            cpu_s: launch_cpu + figures.cpu_s,
            window: window.close(),
            report: figures.report,
        };
        Ok((moved, StockVm { name: self.name, qemu: target }))
    }
}

fn start(stage: &Stage, name: &str, host: usize, arrival: Arrival) -> Result<Running, BenchError> {
    let kit: &Kit = &stage.kit;
    let guest = load::guest(&stage.lab, kit, name);
    Ok(Running::start(&stage.lab, stage.lab.host(host)?, &kit.packages.qemu_72, &guest, 0, arrival)?)
}
