//! Row 2: for how long a guest is stopped, many times.

use sterna_lab::GuestSpec;
use sterna_lab::guest::{Disk, Vga};

use super::{Run, idle};
use crate::BenchError;
use crate::contest::{Contest, Terms};
use crate::figures::Metric;
use crate::load;
use crate::results::{Case, Goal, Limit, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;

/// Moves of each, and in a quick run.
const RUNS: u32 = 20;
const RUNS_QUICK: u32 = 3;
/// The disk is there for its device's state and its image's lock.
const DISK_BYTES: u64 = 64 << 20;

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 2)?;
    let small = |name: &str, _| idle::guest(&stage, name);
    let full = |name: &str, tap| full(&stage, name, tap);
    let small = case(run, &stage, "small", "q35 with a serial port", &small, 2.0)?;
    let full = case(run, &stage, "full", "q35 with 2 vCPUs, VGA, virtio-net and virtio-blk", &full, 10.0)?;
    let p95 = small.ours().and_then(|c| c.summary(Metric::Downtime)).map_or(f64::NAN, |s| s.p95);
    let goals = vec![
        Goal::at_most("small: downtime, ms, median", small.value(Metric::Downtime), 3.5),
        Goal::at_most("small: downtime, ms, 95 of 100", p95, 5.0),
        Goal::at_most("small: downtime, ours / stock pre-copy", small.ratio(Metric::Downtime, 0), 0.02),
        Goal::at_most("full: downtime, ms, median", full.value(Metric::Downtime), 12.0),
    ];
    let notes = vec![
        "The downtime limit is 300 ms for both. The link's tbf lets 256 kB pass at once, which hides the wire time of a \
         small device state."
            .to_owned(),
    ];
    stage.lab.down()?;
    Ok(RowResult { cases: vec![small, full], goals, notes, ..RowResult::default() })
}

fn case(
    run: &Run<'_>,
    stage: &Stage,
    name: &str,
    devices: &str,
    guest: &dyn Fn(&str, u8) -> GuestSpec,
    limit_ms: f64,
) -> Result<Case, BenchError> {
    let workload = format!("an idle guest of {} MiB, {devices}", idle::MEMORY_MIB);
    // Each contest's VMs have names of their own, and with them consoles.
    let named = |vm: &str, tap| guest(&format!("{name}-{vm}"), tap);
    let contest =
        Contest { stage, workload, guest: &named, peers: &[StockWay::Precopy], terms: Terms::default() };
    let case = contest.idle(run, if run.extent.quick { RUNS_QUICK } else { RUNS })?;
    let text = "stop, save, load and cont of QEMU alone".to_owned();
    let limit = Limit { metric: Metric::Downtime, value: limit_ms, text };
    Ok(Case { name: name.to_owned(), limits: vec![limit], ..case })
}

fn full(stage: &Stage, name: &str, tap: u8) -> GuestSpec {
    let path = stage.lab.dir().join(format!("{name}.img"));
    // If it cannot be made, QEMU says so with its path.
    let _ = std::fs::File::create(&path).and_then(|f| f.set_len(DISK_BYTES));
    GuestSpec {
        vcpus: 2,
        vga: Vga::Standard,
        nic: Some(load::nic(stage, tap)),
        disk: Some(Disk { path, format: "raw".to_owned() }),
        ..idle::guest(stage, name)
    }
}
