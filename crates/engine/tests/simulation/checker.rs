//! What must hold, checked after every event against the processes and disks themselves, never against what the
//! engine's machines believe.

use crate::clock::MS;
use crate::host::{Life, QemuId};
use crate::world::{Plan, World};
use std::collections::HashSet;
use sterna_engine::handoff::{MigrationId, Step};
use sterna_engine::source::Outcome;

/// What is so, as nobody in the world knows it.
#[derive(Default)]
pub(crate) struct Truth {
    /// The QEMU that runs the VM, or was the last to.
    pub(crate) current: QemuId,
    /// Migrations whose release was sent.
    pub(crate) released: HashSet<MigrationId>,
    /// Migrations begun.
    pub(crate) tries: u64,
    /// A resume failed, and an operator is needed.
    pub(crate) stranded: bool,
    pub(crate) report: Report,
    violation: Option<String>,
}

/// What a schedule came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    /// Steps of each host's machines.
    pub(crate) steps: [u32; 2],
    /// Those before the first hand-off.
    pub(crate) steps_before: [u32; 2],
    /// Messages sent since then.
    pub(crate) messages: u32,
    pub(crate) completed: u32,
    /// An old try was asked about after newer ones.
    pub(crate) overtaken: u32,
    pub(crate) not_completed: u32,
    /// The VM was taken back after its release, with proof.
    pub(crate) taken_back: u32,
    /// A host took the VM with it.
    pub(crate) destroyed: u32,
    /// Nobody can tell who owns it.
    pub(crate) unresolved: u32,
}

impl std::iter::Sum for Report {
    /// How all of them ended.
    fn sum<Reports: Iterator<Item = Self>>(reports: Reports) -> Self {
        reports.fold(Self::default(), |sum, report| Self {
            completed: sum.completed + report.completed,
            overtaken: sum.overtaken + report.overtaken,
            not_completed: sum.not_completed + report.not_completed,
            taken_back: sum.taken_back + report.taken_back,
            destroyed: sum.destroyed + report.destroyed,
            unresolved: sum.unresolved + report.unresolved,
            ..sum
        })
    }
}

/// What should never be.
#[derive(Debug)]
pub(crate) struct Violation {
    pub(crate) what: String,
    pub(crate) trace: Vec<String>,
    pub(crate) plan: Option<Plan>,
}

impl Violation {
    /// A violation; its trace is made by living through the schedule again.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), trace: Vec::new(), plan: None }
    }

    /// All that is known, for the message of a failing test.
    pub(crate) fn story(&self) -> String {
        let (head, tail) = (self.trace.len().min(160), self.trace.len().saturating_sub(60).max(160));
        let [head, tail] = [&self.trace[..head], &self.trace[tail.min(self.trace.len())..]];
        format!("{}\n{:?}\n{}\n...\n{}", self.what, self.plan, head.join("\n"), tail.join("\n"))
    }
}

impl World {
    /// Remembers the first violation; [`World::check`] reports it after the event.
    fn violated(&mut self, what: String) {
        self.note(|| format!("VIOLATION: {what}"));
        self.truth.violation.get_or_insert(what);
    }

    /// The invariants of every instant.
    pub(crate) fn check(&mut self) -> Result<(), Violation> {
        if let Some(what) = self.truth.violation.take() {
            return Err(Violation::new(what));
        }
        if self.qemus.iter().filter(|qemu| qemu.life == Life::Running).count() > 1 {
            return Err(Violation::new("two QEMUs run the VM"));
        }
        if !self.recoverable() {
            return Err(Violation::new("no QEMU is left that could run the VM"));
        }
        Ok(())
    }

    /// Whether a process holds the whole VM as it is now and the records let it run, unless a host took it along.
    fn recoverable(&self) -> bool {
        let current = self.truth.current;
        let step = |host: usize| self.hosts[host].disk.read().map(|record| record.step);
        let last = &self.qemus[current];
        if last.lost_with_host || last.alive() && step(last.host) != Some(Step::Gone) {
            return true;
        }
        self.qemus.iter().any(|qemu| {
            let whole = qemu.memory == last.memory && qemu.device == last.device;
            let record = self.hosts[qemu.host].disk.read();
            let may_run = record.is_some_and(|record| {
                Some(record.id) == qemu.came_by && matches!(record.step, Step::Committed | Step::Running)
            });
            qemu.alive() && !qemu.superseded && whole && may_run
        })
    }

    /// A QEMU is told to run: the only place where the VM comes to life.
    pub(crate) fn run_qemu(&mut self, id: QemuId) {
        let current = self.truth.current;
        let host = self.qemus[id].host;
        self.note(|| format!("QEMU {id} on host {host} runs the VM"));
        if self.qemus[id].superseded {
            self.violated(format!("QEMU {id} runs the VM again, which has gone on in QEMU {current}"));
        }
        if self.qemus.iter().enumerate().any(|(other, qemu)| other != id && qemu.life == Life::Running) {
            self.violated("two QEMUs run the VM".into());
        }
        if id != current {
            let differing = (0..self.qemus[id].memory.len())
                .filter(|page| self.qemus[id].memory[*page] != self.qemus[current].memory[*page])
                .collect::<Vec<_>>();
            if !differing.is_empty() {
                self.violated(format!("RAM differs from the source's at its stop: pages {differing:?}"));
            }
            if self.qemus[id].device != self.qemus[current].device {
                self.violated("device state differs from the source's at its stop".into());
            }
            self.qemus[current].superseded = true;
            self.truth.current = id;
        }
        let now = self.queue.now();
        let qemu = &mut self.qemus[id];
        qemu.life = Life::Running;
        qemu.lived_until = now.saturating_sub(MS);
    }

    /// The source is about to run a VM that it may have handed out.
    pub(crate) fn check_take_back(&mut self, id: MigrationId) {
        if !self.truth.released.contains(&id) {
            return;
        }
        if self.qemus.iter().any(|qemu| qemu.came_by == Some(id) && qemu.alive()) {
            self.violated("the source resumes a VM it released while the target's QEMU is alive".into());
        }
        self.truth.report.taken_back += 1;
    }

    /// The source says how its migration ended.
    pub(crate) fn check_outcome(&mut self, host: usize, id: MigrationId, outcome: &Outcome) {
        let last = &self.qemus[self.truth.current];
        let runs_here = last.host == host && last.life == Life::Running;
        let lost = last.lost_with_host;
        match outcome {
            Outcome::Completed if last.came_by == Some(id) => self.truth.report.completed += 1,
            // A host's crash took later records away: it asks about an old try, and the VM has left by a newer one,
            // went on from there, or died with this host.
            Outcome::Completed if last.host != host || lost => self.truth.report.overtaken += 1,
            Outcome::Completed => {
                self.violated("the source says completed, but the target never ran it".into())
            }
            Outcome::Stranded(_) => {
                self.truth.report.not_completed += 1;
                self.truth.stranded = true;
            }
            Outcome::Refused(_) | Outcome::Failed(_) | Outcome::Cancelled if runs_here || lost => {
                self.truth.report.not_completed += 1;
            }
            _ => self.violated(format!("the source says {outcome:?}, and the VM does not run there")),
        }
    }

    /// Everything healed long ago. True when the VM runs; otherwise the reason is one of those that nobody can help.
    pub(crate) fn check_settled(&mut self) -> Result<bool, Violation> {
        let running = self.qemus.iter().filter(|qemu| qemu.life == Life::Running).count();
        let alive = self.qemus.iter().filter(|qemu| qemu.alive()).count();
        let last = &self.qemus[self.truth.current];
        if running == 1 {
            return match (alive, self.unanswerable()) {
                // A cancelled release whose target cannot prove its QEMU's death: the VM runs, the question stays.
                (1, true) => Ok(false),
                (1, false) if self.hosts.iter().all(|host| host.idle()) => Ok(true),
                (1, false) => Err(Violation::new("the VM runs, and a host is still busy with it")),
                _ => Err(Violation::new("a QEMU was left behind")),
            };
        }
        if last.lost_with_host {
            self.truth.report.destroyed += 1;
            return Ok(false);
        }
        if self.unanswerable() {
            self.truth.report.unresolved += 1;
            return Ok(false);
        }
        Err(Violation::new("nobody runs the VM, and nothing stands in the way"))
    }

    /// The one state that records cannot resolve: the target committed, and its QEMU died before it was seen running.
    /// It may have run, and written to a disk.
    fn unanswerable(&self) -> bool {
        (0..2).any(|host| {
            let asks = self.hosts[host]
                .source
                .as_ref()
                .is_some_and(|task| task.needs_attention(self.queue.instant()));
            let target = self.hosts[1 - host].disk.read();
            let committed = target.is_some_and(|record| record.step == Step::Committed);
            asks && committed && self.qemu_on(1 - host).is_none()
        })
    }
}
