//! VMs like each other that move by turns: one of ours, one of each peer's.
//!
//! They are booted once and go there and back, so that a pair is two moves under the same weather; while one moves the others' processes
//! stand still (SIGSTOP), for an idle guest too takes a processor now and then. A guest that works all the
//! time would take processors from the others' moves: such VMs are booted for each move, and end with it.

use std::time::Duration;

use rustix::process::Signal;
use sterna_lab::GuestSpec;
use sterna_lab::process::ProcessId;

use crate::BenchError;
use crate::figures::Metric;
use crate::load::{self, Seen};
use crate::ours::{self, OurVm, Progress};
use crate::results::{Case, Contender, Move};
use crate::rows::Run;
use crate::stage::Stage;
use crate::stock::{self, StockVm, StockWay};

/// How long a guest is left alone before a move: what the last one left behind is done by then.
const REST: Duration = Duration::from_millis(300);

/// Seconds after which a guest that writes more than the link carries is stopped, to be compared.
const VERIFY_STOPS_S: &str = "5";

/// The number of the guests that a client watches: no pair has it.
const WATCHED: u32 = 0xffff;

/// A VM of one of the contenders.
#[derive(Debug)]
pub(crate) enum Vm {
    Ours(OurVm),
    Stock(Box<StockVm>, StockWay),
}

impl Vm {
    pub(crate) fn boot(
        stage: &Stage,
        way: Option<StockWay>,
        guest: &GuestSpec,
        tap: u8,
    ) -> Result<Vm, BenchError> {
        Ok(match way {
            None => Vm::Ours(OurVm::boot(stage, guest, tap)?),
            Some(way) => Vm::Stock(Box::new(StockVm::boot(stage, guest, tap)?), way),
        })
    }

    /// Gives up after the time of the terms; the VM then runs where it was.
    pub(crate) fn migrate(&mut self, stage: &Stage, terms: &Terms) -> Result<Move, BenchError> {
        match self {
            Vm::Ours(vm) => Ok(vm.migrate(stage, &terms.ours(&[]), Progress::Sampled)?.0),
            Vm::Stock(vm, way) => vm.migrate(stage, terms.stock(*way)),
        }
    }

    /// Its QEMU, where it is now.
    fn qemu(&self, stage: &Stage) -> Result<ProcessId, BenchError> {
        match self {
            Vm::Ours(vm) => stage.agents(vm.way).0.qemu(&vm.name),
            Vm::Stock(vm, _) => Ok(vm.qemu.process()),
        }
    }

    pub(crate) fn console(&self, stage: &Stage) -> String {
        match self {
            Vm::Ours(vm) => vm.console(stage),
            Vm::Stock(vm, _) => vm.console(),
        }
    }

    /// All of it, of a guest that moved once at most.
    fn whole_console(&self, stage: &Stage) -> String {
        match self {
            Vm::Ours(vm) => vm.console(stage),
            Vm::Stock(vm, _) => vm.whole_console(),
        }
    }

    pub(crate) fn end(self, stage: &Stage) -> Result<(), BenchError> {
        match self {
            Vm::Ours(vm) => vm.stop(stage),
            Vm::Stock(vm, _) => {
                drop(vm);
                Ok(())
            }
        }
    }
}

/// Processes that stand still as long as this lives.
struct Still(Vec<ProcessId>);

impl Still {
    fn hold(processes: Vec<ProcessId>) -> Self {
        processes.iter().for_each(|process| process.signal(Signal::STOP));
        Self(processes)
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.0.iter().for_each(|process| process.signal(Signal::CONT));
    }
}

/// On which terms VMs move: the same for all, and what only ours is asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Terms {
    /// Options of ours.
    pub(crate) options: Vec<String>,
    /// The downtime limit, where it is not the default of all.
    pub(crate) downtime_limit_ms: Option<u64>,
    /// When a move is given up.
    pub(crate) limit: Option<Duration>,
    /// Whether the guest is asked what it lost: one that is busy, and tells how much it writes.
    pub(crate) is_counted: bool,
}

impl Terms {
    /// For ours, and more of them.
    pub(crate) fn ours(&self, more: &[&str]) -> ours::Order {
        let mut options = self.options.clone();
        if let Some(ms) = self.downtime_limit_ms {
            options.extend(["--max-downtime".to_owned(), ms.to_string()]);
        }
        options.extend(more.iter().map(|o| (*o).to_owned()));
        ours::Order { options, limit: self.limit }
    }

    /// For ours, untimed, to have RAM compared. A guest that may write too much to move is stopped after so many seconds.
    pub(crate) fn verify(&self, stops_s: Option<&str>) -> ours::Order {
        let is_stopped = self.options.iter().any(|o| o == "--timeout");
        let stop = stops_s.filter(|_| !is_stopped).map(|s| ["--timeout", s]);
        let more: Vec<&str> = std::iter::once("--verify").chain(stop.into_iter().flatten()).collect();
        self.ours(&more).within(None)
    }

    /// For stock QEMU, in one of its ways.
    pub(crate) fn stock(&self, way: StockWay) -> stock::Order {
        let order = stock::Order::of(way);
        stock::Order {
            limit: self.limit.unwrap_or(order.limit),
            downtime_limit_ms: self.downtime_limit_ms.unwrap_or(order.downtime_limit_ms),
            ..order
        }
    }
}

/// A case of idle guests.
pub(crate) struct Contest<'a> {
    pub(crate) stage: &'a Stage,
    /// What is told of it.
    pub(crate) workload: String,
    /// The guest under a name, at the tap of a number: each contender's has its own.
    pub(crate) guest: &'a dyn Fn(&str, u8) -> GuestSpec,
    /// Against whom.
    pub(crate) peers: &'a [StockWay],
    /// On which terms. Where they have a limit, not to get through is a result, and who could not do it once is not asked again.
    pub(crate) terms: Terms,
}

impl Contest<'_> {
    /// Boots all VMs, moves them by turns, and proves RAM equal at the end.
    pub(crate) fn idle(&self, run: &Run<'_>, pairs: u32) -> Result<Case, BenchError> {
        let mut vms = vec![(Contender::named("ours"), self.boot(None, 0, 0)?)];
        for (tap, way) in (1..).zip(self.peers) {
            vms.push((Contender::named(way.name()), self.boot(Some(*way), 0, tap)?));
        }
        for pair in 1..=pairs {
            for at in 0..vms.len() {
                let others = vms.iter().enumerate().filter(|(other, _)| *other != at);
                let still = others
                    .map(|(_, (_, vm))| vm.qemu(self.stage))
                    .collect::<Result<_, _>>()
                    .map(Still::hold)?;
                if let Some((contender, vm)) = vms.get_mut(at) {
                    self.turn(contender, vm)?;
                }
                drop(still);
            }
            run.tell(&told(pair, pairs, vms.iter().map(|(c, _)| c)));
        }
        let mut verified = None;
        let mut contenders = Vec::new();
        for (contender, mut vm) in vms {
            if let Vm::Ours(vm) = &mut vm {
                run.tell("ours once more, untimed, with --verify");
                verified = Some(vm.verify_with(self.stage, &self.terms.verify(None)));
            }
            self.check(&vm)?;
            vm.end(self.stage)?;
            contenders.push(contender);
        }
        Ok(Case { workload: self.workload.clone(), contenders, verified, ..Case::default() })
    }

    /// Boots a VM for each move. The first of ours goes back with its RAM compared.
    pub(crate) fn busy(&self, run: &Run<'_>, pairs: u32) -> Result<Case, BenchError> {
        let verify = match self.terms.limit {
            Some(_) => self.terms.verify(Some(VERIFY_STOPS_S)),
            None => self.terms.verify(None),
        };
        let ways: Vec<Option<StockWay>> =
            std::iter::once(None).chain(self.peers.iter().copied().map(Some)).collect();
        let mut contenders: Vec<Contender> =
            ways.iter().map(|way| Contender::named(way.map_or("ours", StockWay::name))).collect();
        let mut verified = None;
        for pair in 1..=pairs {
            for (way, contender) in ways.iter().zip(&mut contenders).filter(|(_, c)| c.failed.is_none()) {
                let mut vm = self.boot(*way, pair, 0)?;
                std::thread::sleep(load::BEFORE);
                let before = vm.whole_console(self.stage);
                self.turn(contender, &mut vm)?;
                if self.terms.is_counted && contender.failed.is_none() {
                    self.count(contender, &vm, &before);
                }
                if let (Vm::Ours(vm), None) = (&mut vm, &verified) {
                    verified = Some(vm.verify_with(self.stage, &verify));
                }
                self.check(&vm)?;
                vm.end(self.stage)?;
            }
            run.tell(&told(pair, pairs, contenders.iter()));
        }
        Ok(Case { workload: self.workload.clone(), contenders, verified, ..Case::default() })
    }

    /// What a client sees of one move of each: its guest has a beacon, which would be work to an idle one.
    pub(crate) fn watched(&self, run: &Run<'_>, case: &mut Case) -> Result<(), BenchError> {
        let ways = std::iter::once(None).chain(self.peers.iter().copied().map(Some));
        for (way, contender) in ways.zip(&mut case.contenders) {
            let name = way.map_or("ours", StockWay::name);
            run.tell(&format!("{name}, watched by a client"));
            let mut vm = self.boot(way, WATCHED, 0)?;
            let client = load::listen(self.stage)?;
            load::warm_memory(self.memory_mib());
            let mut moved = vm.migrate(self.stage, &self.terms)?;
            std::thread::sleep(load::AFTER);
            let seen = Seen::of(client.finish()?, moved.window)?;
            moved.figures = crate::figures::Figures::default().with(Metric::Blackout, seen.blackout_ms);
            moved.client = Some(seen);
            // Its other figures are those of a guest that works.
            (moved.downtime_split, moved.progress) = (Vec::new(), Vec::new());
            contender.moves.push(moved);
            vm.end(self.stage)?;
        }
        Ok(())
    }

    fn turn(&self, contender: &mut Contender, vm: &mut Vm) -> Result<(), BenchError> {
        std::thread::sleep(REST);
        load::warm_memory(self.memory_mib());
        match (vm.migrate(self.stage, &self.terms), &vm) {
            (Ok(moved), _) => contender.moves.push(moved),
            // Not to get through is a result: a peer's always, ours where the case allows for it.
            (Err(why), vm)
                if why.is_no_end() && (self.terms.limit.is_some() || matches!(vm, Vm::Stock(..))) =>
            {
                contender.failed = Some(why.to_string());
            }
            (Err(why), _) => return Err(why),
        }
        Ok(())
    }

    /// What its last move cost the guest, by the guest's own word.
    fn count(&self, contender: &mut Contender, vm: &Vm, before: &str) {
        std::thread::sleep(load::AFTER);
        let lost = load::work_lost_s(before, &vm.whole_console(self.stage));
        if let Some(last) = contender.moves.last_mut() {
            last.figures.set(Metric::AppLost, lost);
        }
    }

    fn boot(&self, way: Option<StockWay>, number: u32, tap: u8) -> Result<Vm, BenchError> {
        let name = format!("{}{number}", way.map_or("ours", StockWay::name).replace(' ', "-"));
        let guest = (self.guest)(&name, tap);
        Vm::boot(self.stage, way, &guest, tap)
    }

    fn memory_mib(&self) -> u32 {
        (self.guest)("", 0).memory_mib
    }

    /// The guest's own word on its memory.
    fn check(&self, vm: &Vm) -> Result<(), BenchError> {
        let console = vm.console(self.stage);
        match load::bad_pages(&console) {
            0 => Ok(()),
            bad => Err(BenchError::unexpected(format!("the guest found {bad} bad pages"), console)),
        }
    }
}

fn told<'a>(pair: u32, pairs: u32, contenders: impl Iterator<Item = &'a Contender>) -> String {
    let one = |c: &Contender| {
        if c.failed.is_some() {
            return format!("{} did not get through", c.name);
        }
        let last = c.moves.last();
        let figure = |m: Metric| last.and_then(|l| l.figures.get(m)).unwrap_or(f64::NAN);
        format!("{} {:.0} ms, down {:.1}", c.name, figure(Metric::TotalTime), figure(Metric::Downtime))
    };
    format!("pair {pair} of {pairs}: {}", contenders.map(one).collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_are_the_same_for_all_and_a_guest_is_told_only_once_when_to_stop() {
        let terms = Terms {
            options: vec!["--auto-converge".to_owned()],
            downtime_limit_ms: Some(50),
            limit: Some(Duration::from_secs(9)),
            ..Terms::default()
        };
        let ours = terms.ours(&[]);
        assert_eq!(ours.options, ["--auto-converge", "--max-downtime", "50"]);
        let stock = terms.stock(StockWay::AutoConverge);
        assert_eq!(
            (ours.limit, stock.limit, stock.downtime_limit_ms),
            (terms.limit, Duration::from_secs(9), 50)
        );
        let verify = terms.verify(Some("5"));
        assert_eq!(verify.options[3..], ["--verify", "--timeout", "5"].map(str::to_owned));
        assert_eq!(verify.limit, None);
        let timed = Terms { options: vec!["--timeout".to_owned(), "9".to_owned()], ..Terms::default() };
        assert_eq!(timed.verify(Some("5")).options, ["--timeout", "9", "--verify"]);
    }
}
