//! The demo: a VM with a server under load moves by us, then one like it by stock QEMU.

use crate::facts::{HostFacts, load_average};
use crate::load::{self, Seen};
use crate::ours::{self, Order, Progress};
use crate::results::{Demo, Figures, Move, Pair, Verified};
use crate::stage::{Stage, Way};
use crate::stock::{self, StockVm};
use crate::{BenchError, Kit};

/// How the demo runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How often. One of ours and one of stock's alternate, so that a machine that gets slower slows both.
    pub pairs: u32,
    /// How ours shows its progress.
    pub progress: Progress,
}

/// Runs it. What happens is told to `tell`, line by line.
pub fn run(kit: &Kit, options: Options, tell: &dyn Fn(&str)) -> Result<Demo, BenchError> {
    let host = HostFacts::gather(kit, &kit.packages.qemu_72);
    tell("two hosts with an agent each, 1 Gbit/s between them, and a client");
    let stage = Stage::up(kit)?;
    let (mut pairs, mut verified) = (Vec::new(), Verified::default());
    for number in 1..=options.pairs {
        if options.pairs > 1 {
            tell(&format!("pair {number} of {}", options.pairs));
        }
        let load_before = load_average();
        // One untimed comparison of RAM is enough for all pairs: it is the same code.
        let comparison = (number == 1).then_some(&mut verified);
        let ours = move_ours(&stage, &name("vm", number), options.progress, comparison, tell)?;
        let stock = move_stock(&stage, &name("stock", number), tell)?;
        pairs.push(Pair { ours, stock, load_before });
    }
    stage.lab.down()?;
    Ok(Demo::of(pairs, verified, host))
}

/// Each VM has a name of its own, and with it a console on which no other one has said that it is ready.
fn name(kind: &str, number: u32) -> String {
    if number == 1 { kind.to_owned() } else { format!("{kind}{number}") }
}

fn move_ours(
    stage: &Stage,
    vm: &str,
    progress: Progress,
    comparison: Option<&mut Verified>,
    tell: &dyn Fn(&str),
) -> Result<Move, BenchError> {
    tell(&format!("ours: a guest of {} MiB boots on host a and fills its Redis", load::MEMORY_MIB));
    stage.boot(vm)?;
    load::fill(stage)?;
    let client = load::watch(stage)?;
    load::warm_memory();
    tell(&format!("ours: sterna migrate {vm} b"));
    let moved = ours::migrate(stage, vm, Way::There, &Order::default(), progress)?;
    std::thread::sleep(load::AFTER);
    let at = match comparison {
        None => &stage.b,
        Some(verified) => {
            tell(&format!("ours: and back, untimed: sterna migrate {vm} a --verify"));
            *verified = compare(stage, vm, Way::Back);
            match verified.is_equal() {
                true => &stage.a,
                false => &stage.b,
            }
        }
    };
    let client = Seen::of(client.finish()?, moved.window)?;
    tell(&told(&client));
    at.stop(vm)?;
    Ok(of_ours(moved, client))
}

/// Moves the VM with every byte of its RAM compared. A failure is a result here: the VM runs on where it was.
fn compare(stage: &Stage, vm: &str, way: Way) -> Verified {
    match ours::migrate(stage, vm, way, &Order::with(&["--verify"]), Progress::Sampled) {
        Ok(moved) => {
            let blocks = moved.said.blocks_verified.unwrap_or_default();
            Verified { blocks, total_time_ms: moved.total_time_ms, error: None }
        }
        Err(why) => Verified { error: Some(why.to_string()), ..Verified::default() },
    }
}

fn of_ours(moved: ours::Moved, client: Seen) -> Move {
    Move {
        figures: Figures {
            total_time_ms: moved.total_time_ms,
            downtime_ms: moved.said.downtime.unwrap_or(f64::NAN),
            blackout_ms: client.blackout_ms,
            wire_bytes: moved.wire_bytes,
            cpu_s: moved.cpu_s,
        },
        setup_ms: moved.said.setup_time,
        downtime_split: moved.said.downtime_split.clone(),
        client,
        window: moved.window,
        samples: moved.samples,
        report: serde_json::to_value(moved.said).unwrap_or_default(),
    }
}

fn move_stock(stage: &Stage, name: &str, tell: &dyn Fn(&str)) -> Result<Move, BenchError> {
    tell("stock: a guest like it boots on host a and fills its Redis");
    let vm = StockVm::boot(stage, name)?;
    load::fill(stage)?;
    let client = load::watch(stage)?;
    load::warm_memory();
    tell("stock: QEMU's own pre-copy migration, as wide as the link, downtime limit 300 ms as ours");
    let (moved, vm) = vm.migrate(stage)?;
    std::thread::sleep(load::AFTER);
    let client = Seen::of(client.finish()?, moved.window)?;
    tell(&told(&client));
    drop(vm);
    Ok(of_stock(moved, client))
}

fn of_stock(moved: stock::Moved, client: Seen) -> Move {
    Move {
        figures: Figures {
            total_time_ms: moved.total_time_ms,
            downtime_ms: moved.downtime_ms,
            blackout_ms: client.blackout_ms,
            wire_bytes: moved.wire_bytes,
            cpu_s: moved.cpu_s,
        },
        setup_ms: moved.launch_ms,
        downtime_split: Vec::new(),
        client,
        window: moved.window,
        samples: Vec::new(),
        report: moved.report,
    }
}

fn told(client: &Seen) -> String {
    format!(
        "  {} writes acknowledged and read back, {} lost; longest wait of a writer {:.0} ms",
        client.acknowledged, client.lost_writes, client.max_stall_ms
    )
}
