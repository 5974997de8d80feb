//! The scenarios of QEMU's own `tests/migration/guestperf` (`comparison.py`), by their names, with ours beside them.
//!
//! guestperf moves a guest whose memory is overwritten with noise as fast as its processor can, 1 GiB of it, and looks which
//! of QEMU's means against that ends the migration. This is the same 32 times smaller: memory, downtime limit and patience;
//! the bandwidths are guestperf's. Ours is one VM that goes there and back, from scenario to scenario. Stock QEMU gets a new one
//! for each: after a migration that was given up, and others after it by other means, its guests were seen to miss writes.
//!
//! Ours has one means so far: `--timeout`, which stops the guest. It gets as long as the scenario's rounds over memory would
//! take, and guestperf's default of 5 rounds where the scenario names none.

mod scenario;

use std::time::Duration;

use rustix::process::Signal;
use sterna_lab::GuestSpec;
use sterna_lab::process::ProcessId;

use self::scenario::{Means, SCENARIOS, Scenario};
use super::Run;
use crate::BenchError;
use crate::load;
use crate::ours::{self, OurVm, Progress};
use crate::results::{Case, Contender, Move, RowResult, Verified};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::{self, StockVm, StockWay, Tuning};

/// RAM of the guest: what is overwritten, and what its kernel wants.
const MEMORY_MIB: u32 = 192;
/// What is overwritten: guestperf's 1 GiB / 32.
const WRITTEN_MIB: u32 = 32;
/// guestperf's 500 ms / 32.
const DOWNTIME_MS: u64 = 16;
/// guestperf's 300 s / 32.
const PATIENCE: Duration = Duration::from_millis(9375);
/// guestperf's.
const ROUNDS_MAX: u64 = 30;
const ROUNDS: u64 = 5;
/// What the link carries, in MiB/s.
const LINK_MIB: u64 = 114;
/// A guest writes at its full pace within one of its slices of 10 ms.
const RESUMED: Duration = Duration::from_millis(200);
/// In a quick run.
const QUICK: &[&str] = &["pause-iters-1", "post-copy-iters-1", "compr-multifd-channels-4"];
/// What QEMU 7.2 lacks.
const NO_DIRTY_LIMIT: &str = "not run: the capability dirty-limit is of QEMU 8.1, and needs KVM's dirty ring";

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, 1)?;
    let mut ours = OurVm::boot(&stage, &guest(&stage, "ours"), 0)?;
    let mut held = hold(&stage, &ours)?;
    let mut cases = Vec::new();
    for scenario in SCENARIOS.iter().filter(|s| !run.extent.quick || QUICK.contains(&s.name)) {
        let mut case =
            Case { name: scenario.name.to_owned(), workload: scenario.workload(), ..Case::default() };
        let (own, peer) = (Contender::named("ours"), Contender::named(scenario.means.name()));
        case.contenders = match scenario.order() {
            None => vec![skipped(own), skipped(peer)],
            Some(order) => {
                resume(held);
                let own = by_ours(&stage, &mut ours, scenario, own)?;
                held = hold(&stage, &ours)?;
                vec![own, by_stock(&stage, order, peer)?]
            }
        };
        run.tell(&format!(
            "{}: {}",
            scenario.name,
            case.contenders.iter().map(told).collect::<Vec<_>>().join("; ")
        ));
        cases.push(case);
    }
    run.tell("ours once more, untimed, with --verify");
    resume(held);
    let verified = ours.verify_with(&stage, &ours::Order::with(&["--verify", "--timeout", "1"]));
    is_sound(&ours.console(&stage))?;
    tell_verified(&mut cases, verified);
    ours.stop(&stage)?;
    stage.lab.down()?;
    let notes = vec![
        format!(
            "guestperf / 32: {WRITTEN_MIB} MiB overwritten, downtime limit {DOWNTIME_MS} ms, at most {ROUNDS_MAX} rounds and \
             {:.1} s; the bandwidths are not divided. Ours is plain pre-copy with --timeout: what the scenario's rounds take.",
            PATIENCE.as_secs_f64()
        ),
        "Not to get through is an outcome here, as in guestperf. RAM was compared once, after all scenarios."
            .to_owned(),
    ];
    Ok(RowResult { cases, notes, ..RowResult::default() })
}

/// QEMU's `stress.c` takes turns over memory and mixes noise into each byte of it.
fn guest(stage: &Stage, name: &str) -> GuestSpec {
    let written = [format!("--fill={WRITTEN_MIB}"), format!("--dirty={WRITTEN_MIB}")];
    let programs =
        vec![load::memory(&[&written[0], &written[1], "--rate=0", "--mode=sequential", "--write=mixed"])];
    GuestSpec { programs, ..load::plain(stage, name, MEMORY_MIB) }
}

fn by_ours(
    stage: &Stage,
    vm: &mut OurVm,
    scenario: &Scenario,
    contender: Contender,
) -> Result<Contender, BenchError> {
    let order = ours::Order::with(&[]).within(Some(PATIENCE * 2));
    let order = ours::Order { options: scenario.options(), ..order };
    load::warm_memory(MEMORY_MIB);
    with(contender, vm.migrate(stage, &order, Progress::Sampled).map(|(moved, _)| moved))
}

/// A guest that works all the time would take a processor from the other's move. Ours has an agent that speaks to its QEMU, so
/// that the process is held, of which the agent learns nothing. It must not be asked for its VMs meanwhile.
fn hold(stage: &Stage, vm: &OurVm) -> Result<ProcessId, BenchError> {
    let qemu = stage.agents(vm.way).0.qemu(&vm.name)?;
    qemu.signal(Signal::STOP);
    Ok(qemu)
}

/// Lets it go on, and gives it time to write at its pace.
fn resume(qemu: ProcessId) {
    qemu.signal(Signal::CONT);
    std::thread::sleep(RESUMED);
}

fn by_stock(stage: &Stage, order: stock::Order, contender: Contender) -> Result<Contender, BenchError> {
    let mut vm = StockVm::boot(stage, &guest(stage, "stock"), 0)?;
    std::thread::sleep(RESUMED);
    load::warm_memory(MEMORY_MIB);
    let contender = with(contender, vm.migrate(stage, order))?;
    is_sound(&vm.console())?;
    Ok(contender)
}

fn with(mut contender: Contender, moved: Result<Move, BenchError>) -> Result<Contender, BenchError> {
    match moved {
        Ok(moved) => contender.moves.push(moved),
        Err(why) if why.is_no_end() => contender.failed = Some(why.to_string()),
        Err(why) => return Err(why),
    }
    Ok(contender)
}

fn skipped(contender: Contender) -> Contender {
    Contender { failed: Some(NO_DIRTY_LIMIT.to_owned()), ..contender }
}

fn told(contender: &Contender) -> String {
    use crate::figures::Metric::{Downtime, TotalTime};
    match (&contender.failed, contender.moves.first()) {
        (None, Some(moved)) => {
            let figure = |m| moved.figures.get(m).unwrap_or(f64::NAN);
            format!("{} {:.0} ms, down {:.1}", contender.name, figure(TotalTime), figure(Downtime))
        }
        _ => format!("{} did not get through", contender.name),
    }
}

/// The comparison of RAM belongs to all of them; it is told with the last one that ran.
fn tell_verified(cases: &mut [Case], verified: Verified) {
    if let Some(last) = cases.iter_mut().rev().find(|c| c.contenders.iter().any(|c| !c.moves.is_empty())) {
        last.verified = Some(verified);
    }
}

/// The guest's own word on its memory.
fn is_sound(console: &str) -> Result<(), BenchError> {
    match load::bad_pages(console) {
        0 => Ok(()),
        _ => Err(BenchError::unexpected("a guest found bad pages", console)),
    }
}

impl Scenario {
    fn workload(&self) -> String {
        let at = self.bandwidth_mib.map_or(String::new(), |mib| format!(", at most {mib} MiB/s"));
        format!("{WRITTEN_MIB} MiB overwritten all the time by one vCPU{at}")
    }

    /// What QEMU is asked for; none if it cannot do it.
    fn order(&self) -> Option<stock::Order> {
        let (way, tuning) = match self.means {
            Means::Pause { rounds } => {
                (StockWay::Precopy, Tuning { stop_after: Some(rounds), ..Tuning::default() })
            }
            Means::Postcopy { rounds } => {
                (StockWay::Postcopy, Tuning { switch_after: rounds, ..Tuning::default() })
            }
            Means::AutoConverge { step } => {
                (StockWay::AutoConverge, Tuning { throttle_step: Some(step), ..Tuning::default() })
            }
            Means::Threads { threads } => {
                (StockWay::Compress, Tuning { threads: Some(threads), ..Tuning::default() })
            }
            Means::Xbzrle { cache_percent } => {
                // QEMU takes only powers of two.
                let bytes = (u64::from(WRITTEN_MIB) << 20) * cache_percent / 100;
                let cache_bytes = Some(1 << bytes.ilog2());
                (StockWay::Xbzrle, Tuning { cache_bytes, ..Tuning::default() })
            }
            Means::Multifd { channels } => {
                (StockWay::Multifd, Tuning { channels: Some(channels), ..Tuning::default() })
            }
            Means::DirtyLimit => return None,
        };
        Some(stock::Order {
            bandwidth: self.bandwidth_mib.map(|mib| mib << 20),
            downtime_limit_ms: DOWNTIME_MS,
            limit: PATIENCE,
            tuning: Tuning { rounds_max: Some(ROUNDS_MAX), ..tuning },
            ..stock::Order::of(way)
        })
    }

    /// What ours is asked for.
    fn options(&self) -> Vec<String> {
        let rounds = match self.means {
            Means::Pause { rounds } | Means::Postcopy { rounds } => rounds,
            _ => ROUNDS,
        };
        let mib_per_s = self.bandwidth_mib.map_or(LINK_MIB, |mib| mib.min(LINK_MIB));
        let needed = Duration::from_millis(rounds.max(1) * u64::from(WRITTEN_MIB) * 1000 / mib_per_s);
        let timeout = needed.min(PATIENCE).as_secs_f64();
        let mut options = vec!["--max-downtime".to_owned(), DOWNTIME_MS.to_string()];
        options.extend(["--timeout".to_owned(), format!("{timeout:.3}")]);
        if let Some(mib) = self.bandwidth_mib {
            options.extend(["--bandwidth".to_owned(), format!("{mib}MiB/s")]);
        }
        if let Means::Multifd { channels } = self.means {
            options.extend(["--parallel-connections".to_owned(), channels.to_string()]);
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> &'static Scenario {
        SCENARIOS.iter().find(|s| s.name == name).unwrap()
    }

    #[test]
    fn a_quick_run_is_of_scenarios_that_are_there_and_can_run() {
        assert_eq!(QUICK.len(), 3);
        assert!(QUICK.iter().all(|name| named(name).order().is_some()));
    }

    #[test]
    fn both_are_asked_for_the_same() {
        let slow = named("auto-converge-bw-300mbs");
        assert_eq!(slow.order().unwrap().bandwidth, Some(37 << 20));
        assert!(
            slow.options().join(" ").contains("--timeout 4.324 --bandwidth 37MiB/s"),
            "{:?}",
            slow.options()
        );
        let channels = named("compr-multifd-channels-8");
        assert_eq!(channels.order().unwrap().tuning.channels, Some(8));
        assert!(channels.options().ends_with(&["--parallel-connections".to_owned(), "8".to_owned()]));
        assert_eq!(named("compr-xbzrle-cache-20").order().unwrap().tuning.cache_bytes, Some(4 << 20));
        assert_eq!(named("pause-iters-20").order().unwrap().tuning.stop_after, Some(20));
    }

    #[test]
    fn patience_ends_where_rounds_would_take_longer() {
        assert!(named("post-copy-bw-100mbs").options().join(" ").contains("--timeout 9.375"));
    }

    #[test]
    fn what_qemu_lacks_is_said() {
        let lacking = SCENARIOS.iter().filter(|s| s.order().is_none()).count();
        assert_eq!((lacking, told(&skipped(Contender::named("x")))), (6, "x did not get through".to_owned()));
    }
}
