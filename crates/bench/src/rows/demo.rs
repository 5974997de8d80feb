//! The demo: a VM with a server under load moves by us, then one like it by stock QEMU.

use super::Run;
use crate::BenchError;
use crate::figures::Metric;
use crate::load::{self, Seen};
use crate::ours::{Order, OurVm};
use crate::results::{Case, Contender, Goal, Move, RowResult, Verified};
use crate::stage::{Link, PageStreams, Stage, Way};
use crate::stock::{self, StockVm, StockWay};

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    run.tell("two hosts with an agent each, 1 Gbit/s between them, and a client");
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 1)?;
    let (mut ours, mut stock) = (Contender::named("ours"), Contender::named(StockWay::Precopy.name()));
    let mut verified = Verified::default();
    let pairs = run.extent.pairs;
    for number in 1..=pairs {
        if pairs > 1 {
            run.tell(&format!("pair {number} of {pairs}"));
        }
        // One untimed comparison of RAM is enough for all pairs: it is the same code.
        let comparison = (number == 1).then_some(&mut verified);
        ours.moves.push(move_ours(run, &stage, &name("vm", number), comparison)?);
        stock.moves.push(move_stock(run, &stage, &name("stock", number))?);
    }
    stage.lab.down()?;
    let workload = format!(
        "{} MiB, one vCPU, a Redis with {} MiB of noise and a client that writes 2000 keys a second",
        load::MEMORY_MIB,
        load::BALLAST_MIB
    );
    let contenders = vec![ours, stock];
    let case = Case { workload, contenders, verified: Some(verified), ..Case::default() };
    let goals = vec![
        Goal::at_most("total time, ours / stock", case.ratio(Metric::TotalTime, 0), 1.0),
        Goal::at_most("downtime, ms", case.value(Metric::Downtime), 20.0),
        Goal::at_most("downtime, ours / stock", case.ratio(Metric::Downtime, 0), 0.15),
        Goal::at_most("blackout, ms", case.value(Metric::Blackout), 60.0),
    ];
    Ok(RowResult { cases: vec![case], goals, ..RowResult::default() })
}

/// Each VM has a name of its own, and with it a console on which no other one has said that it is ready.
fn name(kind: &str, number: u32) -> String {
    if number == 1 { kind.to_owned() } else { format!("{kind}{number}") }
}

fn move_ours(
    run: &Run<'_>,
    stage: &Stage,
    name: &str,
    comparison: Option<&mut Verified>,
) -> Result<Move, BenchError> {
    run.tell(&format!("ours: a guest of {} MiB boots on host a and fills its Redis", load::MEMORY_MIB));
    let mut vm = OurVm::boot(stage, &load::server(stage, name), 0)?;
    load::fill(stage, 0)?;
    let client = load::watch(stage, 0)?;
    load::warm_memory(load::WARM_MIB);
    run.tell(&format!("ours: sterna migrate {name} b"));
    let (moved, _) = vm.migrate(stage, &Order::default(), run.extent.progress)?;
    std::thread::sleep(load::AFTER);
    if let Some(verified) = comparison {
        run.tell(&format!(
            "ours: and back, untimed: sterna migrate {name} {} --verify",
            stage.agents(Way::Back).1.host()
        ));
        *verified = vm.verify(stage);
    }
    let moved = seen(run, moved, client)?;
    vm.stop(stage)?;
    Ok(moved)
}

fn move_stock(run: &Run<'_>, stage: &Stage, name: &str) -> Result<Move, BenchError> {
    run.tell("stock: a guest like it boots on host a and fills its Redis");
    let mut vm = StockVm::boot(stage, &load::server(stage, name), 0)?;
    load::fill(stage, 0)?;
    let client = load::watch(stage, 0)?;
    load::warm_memory(load::WARM_MIB);
    run.tell("stock: QEMU's own pre-copy migration, as wide as the link, downtime limit 300 ms as ours");
    let moved = vm.migrate(stage, stock::Order::of(StockWay::Precopy))?;
    std::thread::sleep(load::AFTER);
    seen(run, moved, client)
}

/// With what the client saw of it.
fn seen(run: &Run<'_>, mut moved: Move, client: sterna_lab::client::Client) -> Result<Move, BenchError> {
    let client = Seen::of(client.finish()?, moved.window)?;
    run.tell(&format!(
        "  {} writes acknowledged and read back, {} lost; longest wait of a writer {:.0} ms",
        client.acknowledged, client.lost_writes, client.max_stall_ms
    ));
    moved.figures.set(Metric::Blackout, client.blackout_ms);
    moved.figures.set(Metric::LostWrites, client.lost_writes as f64);
    moved.client = Some(client);
    Ok(moved)
}
