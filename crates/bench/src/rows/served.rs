//! VMs that move while clients use them: what rows with servers have in common.

use sterna_lab::client::Client;
use sterna_lab::{GuestSpec, LabDir, image, packages};

use super::Run;
use crate::contest::{Terms, Vm};
use crate::figures::{Metric, round_one};
use crate::load::{self, Seen};
use crate::pulse::{App, Course, Pulse};
use crate::results::{Case, Contender, Curve, Move, Verified};
use crate::stage::Stage;
use crate::stock::StockWay;
use crate::{BenchError, Kit};

/// Seconds after which a guest that still works is stopped to be compared.
const VERIFY_STOPS_S: &str = "8";

/// A point of a course: seconds since the move began, and what was done then.
type Point = (f64, f64);

/// A server, and what is done with it.
pub(super) struct Service<'a> {
    pub(super) stage: &'a Stage,
    /// The case's name.
    pub(super) name: &'a str,
    pub(super) workload: String,
    /// The guest under a name.
    pub(super) guest: &'a dyn Fn(&str) -> GuestSpec,
    /// What uses it; none where the listener does that itself.
    pub(super) app: Option<App>,
    /// Who watches it.
    pub(super) listen: fn(&Stage, u8) -> Result<Client, BenchError>,
    /// In which figure the longest silence is that the listener noticed.
    pub(super) silence: Metric,
    pub(super) terms: Terms,
    /// Against whom.
    pub(super) peers: &'a [StockWay],
}

/// The same with another image. Its packages are fetched here, since few rows need them.
pub(super) fn with_servers(kit: &Kit) -> Result<Kit, BenchError> {
    let dir = LabDir::open()?;
    let servers = packages::servers(&dir)?;
    let initramfs = image::build_with_servers(&dir, &kit.packages, &servers)?;
    Ok(Kit { initramfs, ..kit.clone() })
}

impl Service<'_> {
    /// Pairs of a move of ours and one of each peer's, each of a VM that was booted for it. The first of ours goes back with its
    /// RAM compared.
    pub(super) fn case(&self, run: &Run<'_>) -> Result<Case, BenchError> {
        let ways = || std::iter::once(None).chain(self.peers.iter().copied().map(Some));
        let mut contenders: Vec<Contender> =
            ways().map(|way| Contender::named(way.map_or("ours", StockWay::name))).collect();
        let (mut verified, mut lines, mut beside) = (None, Vec::new(), Vec::new());
        for pair in 1..=run.extent.pairs {
            for (way, contender) in ways().zip(&mut contenders).filter(|(_, c)| c.failed.is_none()) {
                run.tell(&format!("{}: {}, pair {pair} of {}", self.name, contender.name, run.extent.pairs));
                let word = if way.is_none() { "ours" } else { "stock" };
                let vm_name = format!("{}-{word}{pair}", self.name.replace(' ', "-"));
                let mut vm = Vm::boot(self.stage, way, &(self.guest)(&vm_name), 0)?;
                let moved = self.moved(&mut vm, &mut verified);
                let console = vm.console(self.stage);
                match (moved, load::kernel_died(&console)) {
                    // A move that killed the guest has no figures; a peer that did it once may do better the next time.
                    (_, Some(words)) if way.is_some() => {
                        run.tell(&format!("  the guest's kernel died: {words}"));
                        beside.push(format!(
                            "{}, pair {pair}: the guest's kernel died: {words}",
                            contender.name
                        ));
                    }
                    (_, Some(_)) => return Err(BenchError::unexpected("the guest's kernel died", console)),
                    (Ok((moved, points)), None) => {
                        run.tell(&format!("  {}", told(&moved)));
                        if pair == 1 {
                            lines.push((contender.name.clone(), points));
                        }
                        contender.moves.push(moved);
                    }
                    (Err(why), None) if why.is_no_end() && (way.is_some() || self.terms.limit.is_some()) => {
                        run.tell("  did not get through");
                        contender.failed = Some(why.to_string());
                    }
                    (Err(why), None) => return Err(why),
                }
                self.check(&vm)?;
                vm.end(self.stage)?;
            }
        }
        let curves = self.app.map(|app| curve(self.name, app, lines)).into_iter().collect();
        let (name, workload) = (self.name.to_owned(), self.workload.clone());
        Ok(Case { name, workload, contenders, verified, curves, beside, ..Case::default() })
    }

    /// A move under load. Ours goes back under it too where RAM is still to be compared.
    fn moved(&self, vm: &mut Vm, verified: &mut Option<Verified>) -> Result<(Move, Vec<Point>), BenchError> {
        let stage = self.stage;
        let client = (self.listen)(stage, 0)?;
        let pulse = self.app.map(|app| Pulse::start(stage, app, stage.lab.guest_address(0))).transpose()?;
        load::warm_memory((self.guest)("").memory_mib);
        // The pace before is taken without that.
        std::thread::sleep(load::BEFORE);
        let mut moved = vm.migrate(stage, &self.terms)?;
        std::thread::sleep(load::AFTER + load::AFTER);
        let until = load::unix_ms();
        if let (Vm::Ours(vm), None) = (&mut *vm, &*verified) {
            let order = self.terms.verify(Some(VERIFY_STOPS_S));
            *verified = Some(vm.verify_with(stage, &order));
        }
        let mut points = Vec::new();
        if let (Some(app), Some(pulse)) = (self.app, pulse) {
            let beats: Vec<_> = pulse.finish().into_iter().filter(|b| b.unix_ms < until).collect();
            let course = Course::of(app, &beats, moved.window)?.in_round_one(round_one(&moved.progress));
            let figures = &course.figures;
            figures.metrics().for_each(|m| moved.figures.set(m, figures.get(m).unwrap_or(f64::NAN)));
            points = course.points;
        }
        let seen = Seen::of(client.finish()?, moved.window)?;
        moved.figures.set(self.silence, seen.blackout_ms);
        moved.client = Some(seen);
        Ok((moved, points))
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

fn curve(name: &str, app: App, lines: Vec<(String, Vec<Point>)>) -> Curve {
    let unit = app.metric().unit();
    Curve {
        title: format!("{name}, by quarters of a second"),
        x: "since the command, s".to_owned(),
        y: format!("done, {}", if unit == "/s" { "operations/s" } else { unit }),
        lines,
    }
}

/// What a person wants to know of a move, in a line: what was not measured is left out.
fn told(moved: &Move) -> String {
    let parts = [
        (Metric::TotalTime, "total"),
        (Metric::Downtime, "down"),
        (Metric::Blackout, "blackout"),
        (Metric::UpdateGap, "longest wait"),
        (Metric::OpsBefore, "before"),
        (Metric::FlowBefore, "before"),
        (Metric::AppRoundOne, "round one"),
        (Metric::AppDuring, "during"),
        (Metric::AppLowest, "lowest"),
        (Metric::AppAfter, "after"),
        (Metric::AppLost, "lost"),
    ];
    let part = |(metric, word): (Metric, &str)| {
        moved.figures.get(metric).map(|v| format!("{word} {} {}", crate::table::number(v), metric.unit()))
    };
    parts.into_iter().filter_map(part).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Figures;

    #[test]
    fn a_line_of_a_move_has_what_was_measured() {
        let figures = Figures::default().with(Metric::Downtime, 12.0).with(Metric::AppRoundOne, 91.25);
        let moved = Move { figures, ..Move::default() };
        assert_eq!(told(&moved), "down 12.0 ms, round one 91.2 %");
    }
}
