//! Row 14: clones of a template leave together, and only what they have written moves.

use std::time::Duration;
use sterna_lab::guest::{HostSide, Serial};
use sterna_lab::process::ProcessId;
use sterna_lab::{Arrival, GuestSpec, run as commands};

use super::{Run, idle};
use crate::crowd;
use crate::figures::Metric;
use crate::meter::pss_mb;
use crate::ours::{self, OurVm};
use crate::results::{Case, Contender, Goal, Limit, Move, RowResult};
use crate::stage::{Link, PageStreams, Stage, Way};
use crate::stock::{self, StockVm, StockWay};
use crate::{BenchError, load};

/// VMs that leave together, and the RAM of each.
const CLONES: u8 = 4;
const MEMORY_MIB: u32 = 512;
/// The part of its RAM that a clone writes, in percent; in a quick run only the first.
const DELTAS: &[u32] = &[3, 7];
/// How fast it does, in MB/s: slow enough that nothing is sent often.
const RATE_MB: u32 = 2;
/// How long a clone has to write all of its part once, and more: the kernel and the programs around it write too.
const SETTLES: Duration = Duration::from_secs(25);
/// How much more than the share of the delta may be spent, and how much more memory may be used at the target.
const SHARE: f64 = 1.05;
const MEMORY: f64 = 1.02;
/// How long making a template may take, and starting a clone or sending a template.
const MAKE: Duration = Duration::from_secs(120);
const NAME: &str = "golden";

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, CLONES)?;
    let (mut cases, mut goals) = (Vec::new(), Vec::new());
    for &delta in &DELTAS[..if run.extent.quick { 1 } else { DELTAS.len() }] {
        run.tell(&format!("{CLONES} clones of {MEMORY_MIB} MiB that have written {delta} %"));
        let (case, told) = case(run, &stage, delta)?;
        goals.extend(told);
        cases.push(case);
    }
    stage.lab.down()?;
    let notes = vec![
        "The share of the delta is what the clones have written before the first move, as the kernel counts it (Anonymous of their mappings of \
         the template), over what stock pre-copy sent of the same guests. PSS at the source is all of the clones' before a move, at the \
         target all of them after it. The template was sent before: that is done once, and timed by nobody here."
            .to_owned(),
    ];
    Ok(RowResult { cases, goals, notes, ..RowResult::default() })
}

fn guest(stage: &Stage, name: &str, delta: u32) -> GuestSpec {
    let dirty_mib = MEMORY_MIB * delta / 100;
    let fill = format!("--fill={}", load::fill_mib(MEMORY_MIB));
    let options = [&fill, &format!("--dirty={dirty_mib}"), &format!("--rate={RATE_MB}"), "--check=written"];
    GuestSpec { programs: vec![load::memory(&options)], ..load::plain(stage, name, MEMORY_MIB) }
}

fn case(run: &Run<'_>, stage: &Stage, delta: u32) -> Result<(Case, Vec<Goal>), BenchError> {
    let template = format!("{NAME}{delta}");
    make(stage, &template, delta)?;
    let mut clones =
        (0..CLONES).map(|n| clone(stage, &template, n)).collect::<Result<Vec<_>, BenchError>>()?;
    let mut whole = (0..CLONES)
        .map(|n| StockVm::boot(stage, &guest(stage, &format!("whole{delta}-{n}"), delta), n))
        .collect::<Result<Vec<_>, BenchError>>()?;
    std::thread::sleep(SETTLES);
    let own_mb: f64 = processes(stage, &clones)?.into_iter().map(own_mb).sum();
    let mut contenders = [Contender::named("ours"), Contender::named(StockWay::Precopy.name())];
    for _ in 0..run.extent.pairs {
        load::warm_memory(MEMORY_MIB * u32::from(CLONES));
        contenders[0].moves.push(together(stage, &mut clones)?);
        load::warm_memory(MEMORY_MIB * u32::from(CLONES));
        contenders[1].moves.push(crowd::stock(stage, &mut whole, stock::Order::of(StockWay::Precopy))?);
    }
    let verified = Some(crowd::verify(stage, &mut clones));
    clones.into_iter().try_for_each(|vm| vm.stop(stage))?;
    drop(whole);
    for agent in [&stage.a, &stage.b] {
        commands::output(agent.command().args(["template", "remove", &template]), MAKE)?;
    }
    let link = own_mb * 1e6 / idle::LINK_BYTES_PER_MS;
    let limits = vec![
        Limit { metric: Metric::TotalTime, value: link, text: "delta / link (957 Mbit/s)".to_owned() },
        Limit { metric: Metric::WireBytes, value: own_mb, text: "delta".to_owned() },
    ];
    let case = Case {
        name: format!("delta {delta} %"),
        workload: format!(
            "{CLONES} guests of {MEMORY_MIB} MiB full of noise, each writing {delta} % of it at {RATE_MB} MB/s, leave together: ours clones of \
             a template that the target has, stock whole VMs; what the clones have written is {own_mb:.0} MB"
        ),
        contenders: contenders.into(),
        verified,
        limits,
        ..Case::default()
    };
    let goals = goals(&case, delta, own_mb);
    Ok((case, goals))
}

fn goals(case: &Case, delta: u32, own_mb: f64) -> Vec<Goal> {
    let ours = case.ours();
    let stock = case.peers().first().map_or(f64::NAN, |peer| peer.median(Metric::WireBytes));
    let share = own_mb / stock;
    let pss = |metric| ours.map_or(f64::NAN, |ours| ours.median(metric));
    let text = |what: &str| {
        format!("delta {delta} %: {what}, ours / stock pre-copy, over the delta's share {share:.3}")
    };
    vec![
        Goal::at_most(&text("time"), case.ratio(Metric::TotalTime, 0) / share, SHARE),
        Goal::at_most(&text("bytes"), case.ratio(Metric::WireBytes, 0) / share, SHARE),
        Goal::at_most(
            &format!("delta {delta} %: PSS at the target / at the source"),
            pss(Metric::PssTarget) / pss(Metric::PssSource),
            MEMORY,
        ),
    ]
}

/// Boots a guest under the care of host `a`'s agent, makes it a template, and sends that to `b`.
fn make(stage: &Stage, template: &str, delta: u32) -> Result<(), BenchError> {
    let console = stage.console(template);
    let side =
        HostSide { tap: None, serial: Serial::File(console.clone()), qmp: None, arrival: Arrival::Boot };
    let arguments = guest(stage, template, delta).arguments(&side);
    let mut command = stage.a.command();
    command.args(["template", "create", template, "--until-line", "LOAD t=", "--console"]).arg(console);
    command.arg("--").arg(&stage.kit.packages.qemu_72);
    command.args(arguments.iter().map(|argument| argument.replace(template, "{vm}")));
    commands::output(&mut command, MAKE)?;
    commands::output(stage.a.command().args(["template", "push", template, stage.b.host()]), MAKE)?;
    Ok(())
}

fn clone(stage: &Stage, template: &str, number: u8) -> Result<OurVm, BenchError> {
    let name = format!("{template}-{number}");
    commands::output(stage.a.command().args(["run", &name, "--template", template]), MAKE)?;
    Ok(OurVm { name, way: Way::There })
}

fn together(stage: &Stage, clones: &mut [OurVm]) -> Result<Move, BenchError> {
    let sum = |processes: Vec<ProcessId>| processes.into_iter().map(pss_mb).sum::<f64>();
    let before = sum(processes(stage, clones)?);
    let mut moved = crowd::ours(stage, clones, &ours::Order::default())?.0;
    moved.figures.set(Metric::PssSource, before);
    moved.figures.set(Metric::PssTarget, sum(processes(stage, clones)?));
    Ok(moved)
}

fn processes(stage: &Stage, clones: &[OurVm]) -> Result<Vec<ProcessId>, BenchError> {
    clones.iter().map(|vm| stage.agents(vm.way).0.qemu(&vm.name)).collect()
}

/// What a clone has written of its template, in MB.
fn own_mb(process: ProcessId) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps", process.pid)).unwrap_or_default();
    anonymous_kib(&text) as f64 * 1024.0 / 1e6
}

/// The private pages of the mappings of a template, of proc(5)'s smaps.
fn anonymous_kib(smaps: &str) -> u64 {
    let (mut inside, mut sum) = (false, 0);
    for line in smaps.lines() {
        if line.split(' ').next().is_some_and(|range| range.contains('-') && !range.contains(':')) {
            inside = line.contains("memfd:sterna-template");
        } else if let Some(value) = line.strip_prefix("Anonymous:").filter(|_| inside) {
            sum += value.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default();
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_pages_of_the_template_are_the_clones_own() {
        let smaps = "7f00-7f10 rw-p 00000000 00:01 7 /memfd:sterna-template (deleted)\nRss: 90 kB\nAnonymous:          12 kB\n\
                     7f20-7f30 rw-p 00000000 00:00 0 \nAnonymous:          99 kB\n";
        assert_eq!(anonymous_kib(smaps), 12);
    }
}
