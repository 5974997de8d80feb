//! Whether `max-bandwidth` is kept: moves with a limit, there and back, and what they used.

use crate::facts::HostFacts;
use crate::load::{self, Seen};
use crate::ours::{self, Moved, Order, Progress};
use crate::results::{Goal, Limited, Rate, fastest_mbps};
use crate::stage::{Stage, Way};
use crate::{BenchError, Kit};

/// How far from the limit a migration may be, as a part of it.
const DEVIATION_MAX: f64 = 0.05;
/// The limits, in MiB/s: a quarter and two thirds of what the link carries.
const LIMITS_MIB: &[u32] = &[28, 76];

/// Which limits are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All.
    Full,
    /// The fastest.
    Quick,
}

/// Runs it. What happens is told to `tell`, line by line.
pub fn run(kit: &Kit, extent: Extent, tell: &dyn Fn(&str)) -> Result<Rate, BenchError> {
    const VM: &str = "vm";
    let host = HostFacts::gather(kit, &kit.packages.qemu_72);
    let stage = Stage::up(kit)?;
    tell("a guest boots on host a and fills its Redis");
    stage.boot(VM)?;
    load::fill(&stage)?;
    let client = load::watch(&stage)?;
    let limits = match extent {
        Extent::Full => LIMITS_MIB,
        Extent::Quick => LIMITS_MIB.last_chunk::<1>().map_or(LIMITS_MIB, |last| last),
    };
    let (mut moves, mut window) = (Vec::new(), None);
    for (limit, way) in limits.iter().zip([Way::There, Way::Back].into_iter().cycle()) {
        tell(&format!("sterna migrate vm {} --bandwidth {limit}MiB/s", stage.agents(way).1.host()));
        let order = Order::with(&["--bandwidth", &format!("{limit}MiB/s")]);
        let moved = ours::migrate(&stage, VM, way, &order, Progress::Sampled)?;
        window = Some(moved.window);
        moves.push(limited(*limit, moved));
    }
    let seen = Seen::of(client.finish()?, window.unwrap_or_default())?;
    stage.lab.down()?;
    let goals = moves.iter().flat_map(goals).collect();
    Ok(Rate { moves, goals, lost_writes: seen.lost_writes, host })
}

fn limited(limit_mib: u32, moved: Moved) -> Limited {
    let sending_ms = moved.said.total_time - moved.said.setup_time;
    Limited {
        limit_mbps: f64::from(limit_mib) * f64::from(1 << 20) * 8.0 / 1e6,
        ram_mbps: moved.said.ram.mbps,
        wire_mbps: moved.wire_bytes as f64 * 8.0 / 1e3 / sending_ms,
        fastest_mbps: fastest_mbps(&moved.samples),
        report: moved.said,
    }
}

/// Judged on the link, and second by second: a limit that is kept on average only would still drown its neighbours.
fn goals(limited: &Limited) -> [Goal; 2] {
    let mean = format!("limit of {:.0} Mbit/s: distance on the link", limited.limit_mbps);
    let fastest = format!("limit of {:.0} Mbit/s: fastest second / limit", limited.limit_mbps);
    [
        Goal::at_most(&mean, limited.deviation().abs(), DEVIATION_MAX),
        Goal::at_most(&fastest, limited.fastest_mbps / limited.limit_mbps, 1.0 + DEVIATION_MAX),
    ]
}
