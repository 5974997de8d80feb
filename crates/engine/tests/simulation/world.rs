//! The world: two hosts, the network between them, the VM, and what goes wrong.

use crate::checker::{Report, Truth, Violation};
use crate::clock::{Chance, MS, Micros, Queue, SECOND};
use crate::host::{Disk, Life, PAGES, Qemu, QemuId};
use crate::network::Connection;
use crate::source::SourceTask;
use crate::target::TargetTask;
use sterna_engine::handoff::MigrationId;

/// The host that runs the VM first.
pub(crate) const FIRST: usize = 0;
/// Events after which a schedule counts as running away.
const EVENTS_MAX: usize = 400_000;
/// How long things may go wrong.
const CHAOS: Micros = 100 * SECOND;
/// How long everything is given to settle once nothing goes wrong any more: far above every deadline of the engine.
const SETTLING: Micros = 900 * SECOND;
/// Longest that a host stands still: above every deadline of the engine but the longest.
const FREEZE_MAX: Micros = 90 * SECOND;
/// Messages of a thousand that arrive twice while things go wrong.
const REPEATED_PERMILLE: u64 = 10;
/// How long a migration may take that nothing disturbs.
const UNDISTURBED: Micros = 60 * SECOND;

/// A hand-off that is broken on purpose, in the driver or the network: the checker must see each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// The record of the commit is not on the disk when the VM runs.
    CommitNotDurable,
    /// A restarted target trusts a record that it can read but that may not be on the disk.
    RecoveryTrustsPageCache,
    /// The source asks a while, then resumes.
    SourceResumesAlone,
    /// The target runs the VM when it is loaded.
    RunsOnLoaded,
    /// The target says that its QEMU is dead when it has sent the signal.
    DeadWithoutWaiting,
    /// The release is sent before it is written down.
    ReleaseBeforeRecord,
    /// What was written between the last round's scan and the stop is forgotten.
    LastScanSkipped,
    /// Pages that became holes between rounds are not discarded at the target.
    DiscardsForgotten,
    /// Batches overtake each other and the ends of rounds.
    StreamsReordered,
    /// A target that has stored the commit but not run its QEMU answers that it owns the VM.
    CommitAnsweredAsOwnership,
    /// A target that has not decided yet gives in when it is asked again.
    GivesInWhenAskedAgain,
}

/// What fails at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    /// Every connection.
    Connections,
    /// The agent alone: QEMU and the page cache live on.
    Agent,
    /// The whole host.
    Host,
    /// The agent, and a while later the whole host: maybe before what the agent wrote is on the disk.
    AgentThenHost,
    /// Nothing: the whole host stands still for longer than every deadline, and then goes on as if nothing had been.
    Freeze,
}

/// What the network does to one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Its connection is cut before it arrives.
    Lost,
    /// It arrives when every deadline has passed, and holds up what comes behind it.
    Late,
    /// It arrives twice.
    Twice,
    /// It arrives again when every deadline has passed, also where its connection is closed by then.
    Again,
}

/// What happens to the n-th message that is sent once the VM is stopped for its hand-off.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MessageFate {
    pub(crate) nth: u32,
    pub(crate) fate: Fate,
}

/// A crash at the n-th step (input taken in, or action begun or done) of a host's machines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CrashPoint {
    pub(crate) host: usize,
    pub(crate) nth: u32,
    pub(crate) crash: Crash,
}

/// A schedule: all of it follows from this.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) crash: Option<CrashPoint>,
    pub(crate) fate: Option<MessageFate>,
    /// Whether random things go wrong, besides that crash.
    pub(crate) random: bool,
    pub(crate) mutation: Option<Mutation>,
}

/// A host: what its disk holds, and the agent's tasks while it lives.
pub(crate) struct Host {
    pub(crate) disk: Disk,
    /// Whether the agent runs.
    pub(crate) up: bool,
    /// Which life of the agent this is: what an earlier one began reaches no later one.
    pub(crate) life: u64,
    pub(crate) source: Option<SourceTask>,
    pub(crate) target: Option<TargetTask>,
    /// The try about which this host was asked last.
    pub(crate) asked: Option<MigrationId>,
    /// Whether a restarted agent is still putting things in order.
    pub(crate) recovering: bool,
}

/// All there is.
pub(crate) struct World {
    pub(crate) queue: Queue,
    pub(crate) chance: Chance,
    pub(crate) mutation: Option<Mutation>,
    /// While true, things go wrong at random.
    pub(crate) chaos: bool,
    pub(crate) partitioned: bool,
    pub(crate) hosts: [Host; 2],
    pub(crate) connections: Vec<Connection>,
    pub(crate) qemus: Vec<Qemu>,
    pub(crate) truth: Truth,
    pub(crate) serial: u64,
    /// The VM was stopped for a hand-off: from now on messages are counted.
    stopped: bool,
    /// Until when each host stands still.
    pub(crate) frozen: [Micros; 2],
    crash: Option<CrashPoint>,
    fate: Option<MessageFate>,
    failures_permille: u64,
    trace: Option<Vec<String>>,
}

/// Lives through a schedule.
pub(crate) fn simulate(plan: Plan) -> Result<Report, Violation> {
    let result = World::new(plan, false).run(plan);
    result.map_err(|violation| {
        let mut again = World::new(plan, true);
        let _ = again.run(plan);
        Violation { trace: again.trace.unwrap_or_default(), plan: Some(plan), ..violation }
    })
}

impl World {
    fn new(plan: Plan, traced: bool) -> Self {
        let host = || Host {
            disk: Disk::default(),
            up: true,
            life: 0,
            source: None,
            target: None,
            asked: None,
            recovering: false,
        };
        let mut chance = Chance::new(plan.seed);
        let mut first = Qemu::new(FIRST, None);
        first.life = Life::Running;
        for page in 0..PAGES {
            first.memory[page] = if chance.permille(700) { chance.any() } else { 0 };
        }
        let failures_permille = [0, 10, 50, 150][chance.below(4) as usize];
        Self {
            queue: Queue::default(),
            chance,
            mutation: plan.mutation,
            chaos: plan.random,
            partitioned: false,
            hosts: [host(), host()],
            connections: Vec::new(),
            qemus: vec![first],
            truth: Truth::default(),
            serial: 0,
            stopped: false,
            frozen: [0; 2],
            crash: plan.crash,
            fate: plan.fate,
            failures_permille,
            trace: traced.then(Vec::new),
        }
    }

    fn run(&mut self, plan: Plan) -> Result<Report, Violation> {
        if plan.random {
            self.draw_faults();
        }
        self.start_migration(FIRST);
        self.supervise();
        self.pass(CHAOS)?;
        self.calm();
        self.pass(SETTLING)?;
        if self.truth.stranded {
            // A resume failed, and an operator restarts the agent: that is what the state asks for.
            (0..2).for_each(|host| self.restart_agent(host));
            self.pass(SETTLING)?;
        }
        let ended_well = self.check_settled()?;
        if ended_well {
            self.check_next_try()?;
        }
        Ok(self.truth.report)
    }

    /// Whoever runs the VM tries anew while things go wrong: three tries a schedule.
    fn supervise(&mut self) {
        self.queue.after(
            5 * SECOND,
            Box::new(|world| {
                let runs = world.truth.current;
                let host = world.qemus[runs].host;
                let acts = world.hosts[host].up && world.frozen[host] <= world.queue.now();
                let idle = acts && world.hosts[host].idle();
                if world.chaos && world.qemus[runs].life == Life::Running && idle && world.truth.tries < 3 {
                    world.start_migration(host);
                }
                if world.chaos {
                    world.supervise();
                }
            }),
        );
    }

    fn check_next_try(&mut self) -> Result<(), Violation> {
        let from = self.qemus[self.truth.current].host;
        let before = self.truth.report.completed;
        self.start_migration(from);
        self.pass(UNDISTURBED)?;
        let to = self.qemus[self.truth.current].host;
        if self.truth.report.completed != before + 1 || to == from {
            return Err(Violation::new("the next try did not succeed"));
        }
        self.check_settled().map(|_| ())
    }

    /// Lets time pass, and checks after every event.
    pub(crate) fn pass(&mut self, time: Micros) -> Result<(), Violation> {
        let end = self.queue.now() + time;
        let mut events = 0;
        while let Some(event) = self.queue.pop(end) {
            event(self);
            self.check()?;
            events += 1;
            if events > EVENTS_MAX {
                return Err(Violation::new("the schedule never ends"));
            }
        }
        Ok(())
    }

    /// Nothing goes wrong any more: the network is whole and every agent comes up.
    fn calm(&mut self) {
        self.chaos = false;
        self.partitioned = false;
        self.crash = None;
        self.fate = None;
        self.failures_permille = 0;
    }

    /// True when a step that may fail does.
    pub(crate) fn fails(&mut self) -> bool {
        self.chaos && self.chance.permille(self.failures_permille)
    }

    /// Makes `event` happen on a host, unless its agent dies before.
    pub(crate) fn later(&mut self, host: usize, delay: Micros, event: impl FnOnce(&mut World) + 'static) {
        let life = self.hosts[host].life;
        self.on_host(host, delay, move |world| {
            if world.hosts[host].life == life && world.hosts[host].up {
                event(world);
            }
        });
    }

    /// Makes `event` happen on a host, whatever becomes of its agent, and not before the host goes on.
    pub(crate) fn on_host(&mut self, host: usize, delay: Micros, event: impl FnOnce(&mut World) + 'static) {
        self.queue.after(delay, Box::new(move |world| world.unless_frozen(host, event)));
    }

    /// Does it now, or when the host goes on.
    pub(crate) fn unless_frozen(&mut self, host: usize, event: impl FnOnce(&mut World) + 'static) {
        match self.frozen[host].saturating_sub(self.queue.now()) {
            0 => event(self),
            wait => self.on_host(host, wait, event),
        }
    }

    /// One that stands still already stays so for as long as it was going to: another end would bring what has waited for the
    /// first one out of order, which no connection does.
    fn freeze(&mut self, host: usize) {
        if self.frozen[host] > self.queue.now() {
            return;
        }
        let time = self.chance.spread(SECOND, FREEZE_MAX);
        self.note(|| format!("host {host} stands still for {} ms", time / MS));
        self.frozen[host] = self.queue.now() + time;
    }

    /// A VM is about to be stopped for its hand-off.
    pub(crate) fn handoff_begins(&mut self) {
        if !self.stopped {
            self.stopped = true;
            self.truth.report.steps_before = self.truth.report.steps;
        }
    }

    /// What the network does to the message that is being sent.
    pub(crate) fn draw_fate(&mut self) -> Option<Fate> {
        if self.stopped {
            self.truth.report.messages += 1;
        }
        if let Some(fate) = self.fate.filter(|fate| fate.nth == self.truth.report.messages) {
            self.fate = None;
            return Some(fate.fate);
        }
        match self.chaos && self.chance.permille(REPEATED_PERMILLE) {
            true => Some(if self.chance.permille(500) { Fate::Twice } else { Fate::Again }),
            false => None,
        }
    }

    /// How long a step on a host takes.
    pub(crate) fn pause(&mut self) -> Micros {
        match self.chaos && self.chance.permille(10) {
            true => self.chance.spread(MS, 10 * SECOND),
            false => self.chance.between(100, 4 * MS),
        }
    }

    /// A step of a host's machines is about to happen or has happened; true when the host dies of it.
    pub(crate) fn point(&mut self, host: usize) -> bool {
        if self.crash.is_some() {
            self.truth.report.steps[host] += 1;
        }
        let nth = self.truth.report.steps[host];
        match self.crash {
            Some(at) if at.host == host && at.nth == nth => {
                self.crash = None;
                match at.crash {
                    Crash::Connections => self.cut_all(),
                    Crash::Freeze => self.freeze(host),
                    _ => self.die(host, at.crash),
                }
                !matches!(at.crash, Crash::Connections | Crash::Freeze)
            }
            _ => false,
        }
    }

    /// Writes a line of the trace that a violation shows.
    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let (seconds, micros) = (self.queue.now() / SECOND, self.queue.now() % SECOND);
            trace.push(format!("{seconds:>4}.{micros:06} {}", line()));
        }
    }

    /// The QEMU of the VM that lives on a host.
    pub(crate) fn qemu_on(&self, host: usize) -> Option<QemuId> {
        self.qemus.iter().position(|qemu| qemu.host == host && qemu.alive())
    }

    /// Simulates the guest's life until now: it writes, and gives memory back.
    pub(crate) fn live(&mut self, id: QemuId) {
        let now = self.queue.now();
        let most = ((now - self.qemus[id].lived_until) / MS).min(24);
        self.qemus[id].lived_until = now;
        if self.qemus[id].life != Life::Running {
            return;
        }
        for _ in 0..self.chance.below(most + 1) {
            let hot = self.chance.permille(600);
            let page = self.chance.below(if hot { 6 } else { PAGES as u64 }) as usize;
            let discard = self.chance.permille(150);
            let value = if discard { 0 } else { self.chance.any() };
            self.qemus[id].memory[page] = value;
            self.qemus[id].written[page] |= !discard;
        }
        self.qemus[id].device = self.chance.any();
    }

    fn draw_faults(&mut self) {
        for _ in 0..self.chance.below(5) {
            let at = self.chance.spread(MS, 60 * SECOND);
            self.queue.after(at, Box::new(|world| world.go_wrong()));
        }
        if self.chance.permille(400) {
            let crash = match self.chance.below(6) {
                0 | 1 => Crash::Agent,
                2 => Crash::Host,
                3 => Crash::Connections,
                4 => Crash::Freeze,
                _ => Crash::AgentThenHost,
            };
            let (host, nth) = (self.chance.below(2) as usize, self.chance.between(1, 160) as u32);
            self.crash = Some(CrashPoint { host, nth, crash });
        }
    }

    fn go_wrong(&mut self) {
        if !self.chaos {
            return;
        }
        let host = self.chance.below(2) as usize;
        match self.chance.below(11) {
            10 => self.freeze(host),
            0..=2 => self.die(host, Crash::Agent),
            3 => self.die(host, Crash::Host),
            4 | 5 => {
                self.note(|| "the network cuts every connection".into());
                self.cut_all();
            }
            6 => {
                self.note(|| "the network is partitioned".into());
                self.cut_all();
                self.partitioned = true;
                let time = self.chance.spread(100 * MS, 60 * SECOND);
                self.queue.after(time, Box::new(|world| world.partitioned = false));
            }
            7 => self.unless_frozen(host, move |world| world.cancel_source(host)),
            8 => self.unless_frozen(host, move |world| world.cancel_target(host)),
            _ => self.waiting_qemu_dies(host),
        }
    }

    /// A QEMU that has never run the VM dies by itself.
    fn waiting_qemu_dies(&mut self, host: usize) {
        let waits = self.qemu_on(host).filter(|id| *id != self.truth.current);
        if let Some(id) = waits.filter(|id| !self.qemus[*id].superseded) {
            self.note(|| format!("QEMU {id} dies by itself"));
            self.qemus[id].life = Life::Dead;
        }
    }
}

impl Host {
    /// True when nothing is under way for the VM.
    pub(crate) fn idle(&self) -> bool {
        self.source.is_none() && self.target.is_none() && !self.recovering
    }
}
