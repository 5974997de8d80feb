//! A VM that runs with pages missing, page by page: its processors, the kernel's userfaultfd, the pager at the target, and the page
//! server at the source with the engine's own [`Prepaging`] and [`Request`]s, while connections are cut and agents die at any moment.
//!
//! What is asked of it: a processor reads what it must (the source's content, what was written since, zero once it was discarded), and in
//! the end nobody waits and nothing is missing. Rules that are left out on purpose must be found. A schedule follows from its seed;
//! `STERNA_SIMULATIONS` sets how many are lived through.

mod machine;

use machine::{Chance, Machine, Page, Refusal, Told, page_at, pages_total, place};
use std::collections::{BTreeSet, VecDeque};
use sterna_engine::policy::{Chunk, Prepaging};
use sterna_engine::units::PAGE_BYTES;
use sterna_engine::wire::Request;
use sterna_engine::wire::batch::Layout;
use sterna_engine::wire::request::REQUEST_BYTES;

/// Random schedules of a normal run; `STERNA_SIMULATIONS` is scaled by what the other simulation does by itself.
const SIMULATIONS: u64 = 5_000;
/// Schedules of `tests/simulation` for one of these.
const SCALE: u64 = 20;
/// Random schedules within which a rule that is left out must be found.
const SIMULATIONS_TO_CATCH: u64 = 20_000;
/// Steps of a calm world within which everything must come to its end.
const CALM_STEPS: u32 = 100_000;
/// Pages of the blocks.
const BLOCKS: [u64; 2] = [20, 9];
const PUSH_STREAMS: usize = 2;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    /// Who takes over does not wake the threads whose faults the dead pager had read.
    NoWakeAtTakeOver,
    /// A discarded page stays missing.
    RemoveDoesNotMark,
    /// The list of missing pages is sent the first time only.
    ListNotSentAgain,
    /// A page counts as delivered before it is copied, and the pager dies in between.
    BitBeforeCopy,
    /// What the guest waits for is not asked for again.
    FaultsNotAskedAgain,
    /// A copy that is to be tried again is not.
    AgainIsDropped,
    /// Whether a page is delivered already is looked at when it arrives, not when it is copied.
    BitsSeenEarlier,
    /// A discard is read from the kernel, and marked a moment later.
    MarksLater,
    /// The pager dies after it has read a discard and before it has marked it. No rule prevents this: it shows what the two must be
    /// close together for.
    DiesBeforeItMarks,
}

/// Work of the pager's threads.
#[derive(Clone, Copy)]
enum Job {
    Install(Page, u64),
    Zero(Page),
}

/// The target's agent while it lives.
#[derive(Default)]
struct Pager {
    /// Pages that the guest waits for and that were asked for.
    outstanding: BTreeSet<Page>,
    jobs: Vec<Job>,
    /// Discards that were read and not marked; only where that rule is left out.
    unmarked: Vec<(Page, usize)>,
}

type Frame = Vec<(Page, u64)>;

/// The connections of both ends, and what is on its way. Lost as a whole when an end sees that one of them is.
struct Session {
    requests: VecDeque<[u8; REQUEST_BYTES]>,
    /// The demand connection's answers, then the push streams.
    frames: [VecDeque<Frame>; 1 + PUSH_STREAMS],
    cut: [bool; 1 + PUSH_STREAMS],
    /// The source's state: what it was asked for.
    pages: Prepaging,
    answered: BTreeSet<Page>,
    /// What the guest waited for when the session began.
    waited_for: BTreeSet<Page>,
}

impl Session {
    fn ask(&mut self, request: Request) {
        let mut raw = Vec::new();
        request.encode(&mut raw);
        if !self.cut[0] {
            self.requests.push_back(raw.try_into().expect("a request has one length"));
        }
    }

    fn send(&mut self, connection: usize, frame: Frame) {
        if !self.cut[connection] {
            self.frames[connection].push_back(frame);
        }
    }

    fn cut(&mut self, connection: usize) {
        self.cut[connection] = true;
        self.frames[connection].clear();
        if connection == 0 {
            self.requests.clear();
        }
    }
}

struct World {
    chance: Chance,
    mutation: Option<Mutation>,
    /// Connections are cut and agents die.
    stormy: bool,
    source: Vec<u64>,
    source_lives: bool,
    machine: Machine,
    /// The target's file of delivered pages: it outlives the pager.
    delivered: Vec<bool>,
    pager: Option<Pager>,
    session: Option<Session>,
    sessions: u32,
    deaths: u32,
}

impl World {
    fn new(seed: u64, mutation: Option<Mutation>) -> Self {
        let mut chance = Chance(seed);
        let missing_percent = [30, 70, 100][chance.below(3) as usize];
        let source = (0..pages_total()).map(|page| if chance.percent(25) { 0 } else { 100 + page as u64 });
        let source = source.collect::<Vec<_>>();
        let delivered = source.iter().map(|_| !chance.percent(missing_percent)).collect::<Vec<_>>();
        let memory = source.iter().zip(&delivered).map(|(content, there)| {
            // A page that reads as zero need not be there.
            Some(*content).filter(|content| *there && *content != 0)
        });
        let machine = Machine::new(&source, memory.collect(), &mut chance);
        let pager = Some(Pager::default());
        let (session, sessions, deaths) = (None, 0, 0);
        let (stormy, source_lives) = (true, true);
        Self {
            chance,
            mutation,
            stormy,
            source,
            source_lives,
            machine,
            delivered,
            pager,
            session,
            sessions,
            deaths,
        }
    }

    fn without(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// Lives through a storm and what follows it.
    fn live(&mut self) -> Result<(), String> {
        for _ in 0..self.chance.below(1500) {
            self.step()?;
        }
        self.stormy = false;
        for _ in 0..CALM_STEPS {
            if self.machine.is_done() && self.delivered.iter().all(|there| *there) {
                return self.machine.compare();
            }
            self.step()?;
        }
        let waits = self.machine.threads();
        let missing = (0..pages_total()).filter(|page| !self.delivered[*page]).collect::<Vec<_>>();
        Err(format!("it never ends: threads {waits:?}, pages {missing:?} are missing"))
    }

    fn step(&mut self) -> Result<(), String> {
        match self.chance.below(100) {
            0..30 => {
                return self.machine.step(&mut self.chance);
            }
            30..45 => self.read_told(),
            45..60 => self.work(),
            60..75 => self.receive(),
            75..85 => self.serve(),
            85..92 => return self.push(),
            92..95 => self.reconnect(),
            95..97 => self.come_back(),
            _ if self.stormy => self.storm(),
            _ => {}
        }
        Ok(())
    }

    fn storm(&mut self) {
        match self.chance.below(6) {
            0..4 => {
                let connection = self.chance.below(1 + PUSH_STREAMS as u64) as usize;
                if let Some(session) = &mut self.session {
                    session.cut(connection);
                }
            }
            4 => self.pager_dies(),
            _ => (self.source_lives, self.session) = (false, None),
        }
    }

    fn pager_dies(&mut self) {
        (self.pager, self.session) = (None, None);
        self.deaths += 1;
    }

    /// Whether the pager dies here, between two things that it does.
    fn pager_dies_here(&mut self) -> bool {
        let dies = self.stormy && self.chance.percent(10);
        if dies {
            self.pager_dies();
        }
        dies
    }

    fn come_back(&mut self) {
        self.source_lives = true;
        if self.pager.is_none() {
            self.pager = Some(Pager::default());
            if !self.without(Mutation::NoWakeAtTakeOver) {
                self.machine.wake(|_| true);
            }
        }
    }

    /// The target connects when there is no session, or sees that one is broken.
    fn reconnect(&mut self) {
        let broken = self.session.as_ref().is_some_and(|session| session.cut.contains(&true));
        if broken {
            self.session = None;
        }
        let Some(pager) = self.pager.as_ref().filter(|_| self.source_lives && self.session.is_none()) else {
            return;
        };
        let mut waited_for = self.machine.waited_for();
        waited_for.retain(|page| !self.delivered[*page]);
        let mut session = Session {
            requests: VecDeque::new(),
            frames: Default::default(),
            cut: Default::default(),
            pages: Prepaging::new(BLOCKS),
            answered: BTreeSet::new(),
            waited_for,
        };
        if !self.without(Mutation::FaultsNotAskedAgain) {
            pager.outstanding.iter().for_each(|page| session.ask(fault(*page)));
        }
        if !self.without(Mutation::ListNotSentAgain) || self.sessions == 0 {
            missing(&self.delivered).for_each(|request| session.ask(request));
            session.ask(Request::Listed);
        }
        self.sessions += 1;
        self.session = Some(session);
    }

    /// The pager reads one thing from the kernel, and holds its lock while it does.
    fn read_told(&mut self) {
        let later = self.without(Mutation::MarksLater);
        let Some(pager) = &mut self.pager else { return };
        if let Some((first, pages)) = pager.unmarked.pop() {
            return self.mark(first, pages);
        }
        match self.machine.read() {
            Some(Told::Fault(page)) => self.faulted(page),
            Some(Told::Remove(first, pages)) if later => pager.unmarked.push((first, pages)),
            Some(Told::Remove(first, pages)) => {
                if self.without(Mutation::DiesBeforeItMarks) && self.pager_dies_here() {
                    return;
                }
                self.mark(first, pages);
            }
            None => {}
        }
    }

    fn faulted(&mut self, page: Page) {
        let Some(pager) = &mut self.pager else { return };
        if self.delivered[page] {
            // It was discarded since.
            pager.jobs.push(Job::Zero(page));
        } else if pager.outstanding.insert(page)
            && let Some(session) = &mut self.session
        {
            session.ask(fault(page));
        }
    }

    /// Discarded pages are delivered: they are zero. So are those that a thread waits for.
    fn mark(&mut self, first: Page, pages: usize) {
        if self.without(Mutation::RemoveDoesNotMark) {
            return;
        }
        let Some(pager) = &mut self.pager else { return };
        for page in first..first + pages {
            self.delivered[page] = true;
            if pager.outstanding.remove(&page) {
                pager.jobs.push(Job::Zero(page));
            }
        }
    }

    /// One of the pager's threads does a piece of its work.
    fn work(&mut self) {
        let Some(pager) = self.pager.as_mut().filter(|pager| !pager.jobs.is_empty()) else { return };
        let at = self.chance.below(pager.jobs.len() as u64) as usize;
        let job = pager.jobs.swap_remove(at);
        let done = match job {
            Job::Zero(page) => self.machine.copy(page, 0),
            Job::Install(page, _) if self.delivered[page] && !self.without(Mutation::BitsSeenEarlier) => {
                Err(Refusal::Exists)
            }
            Job::Install(page, content) if self.without(Mutation::BitBeforeCopy) => {
                self.delivered[page] = true;
                if self.pager_dies_here() {
                    return;
                }
                let done = self.machine.copy(page, content);
                self.delivered[page] = done != Err(Refusal::Again);
                done
            }
            Job::Install(page, content) => self.machine.copy(page, content),
        };
        match done {
            Err(Refusal::Again) => self.work_again(job),
            done => self.worked(job, done),
        }
    }

    fn work_again(&mut self, job: Job) {
        if !self.without(Mutation::AgainIsDropped)
            && let Some(pager) = &mut self.pager
        {
            pager.jobs.push(job);
        }
        self.read_told();
    }

    fn worked(&mut self, job: Job, done: Result<(), Refusal>) {
        let (Job::Install(page, _) | Job::Zero(page)) = job;
        if done.is_err() {
            self.machine.wake(|at| at == page);
        }
        if self.pager_dies_here() {
            return;
        }
        self.delivered[page] = true;
        if let Some(pager) = &mut self.pager {
            pager.outstanding.remove(&page);
        }
    }

    /// A frame arrives at the target.
    fn receive(&mut self) {
        let connection = self.chance.below(1 + PUSH_STREAMS as u64) as usize;
        let (Some(pager), Some(session)) = (&mut self.pager, &mut self.session) else { return };
        for (page, content) in session.frames[connection].pop_front().unwrap_or_default() {
            if !(self.delivered[page] && self.mutation == Some(Mutation::BitsSeenEarlier)) {
                pager.jobs.push(Job::Install(page, content));
            }
        }
    }

    /// A request arrives at the source.
    fn serve(&mut self) {
        let Some(session) = &mut self.session else { return };
        let Some(raw) = session.requests.pop_front() else { return };
        let request = Request::decode(&raw).expect("it was encoded");
        request
            .check(&Layout::new(BLOCKS.map(|pages| pages * PAGE_BYTES)))
            .expect("it lies within its block");
        match request {
            Request::Fault { block, first, pages } => {
                session.pages.sent(block, first, pages.into());
                session.pages.fault(block, first);
                let pages = (first..first + u64::from(pages)).map(|index| page_at(block, index));
                let frame = pages.map(|page| (page, self.source[page])).collect::<Frame>();
                session.answered.extend(frame.iter().map(|(page, _)| *page));
                session.send(0, frame);
            }
            Request::Missing { block, first, pages } => session.pages.want(block, first, pages.into()),
            Request::Listed => {}
        }
    }

    /// A pusher sends what is next.
    fn push(&mut self) -> Result<(), String> {
        let (connection, most) = (1 + self.chance.below(PUSH_STREAMS as u64), 1 + self.chance.below(8));
        let Some(session) = &mut self.session else { return Ok(()) };
        let Some(Chunk { block, first, pages }) = session.pages.take(most) else { return Ok(()) };
        let late = |page: &&Page| !session.answered.contains(page) && !self.delivered[**page];
        if let Some(page) = session.waited_for.iter().find(late) {
            return Err(format!(
                "the source pushes, and was never asked for page {page}, which is waited for"
            ));
        }
        let pages = (first..first + pages).map(|index| page_at(block, index));
        session.send(connection as usize, pages.map(|page| (page, self.source[page])).collect());
        Ok(())
    }
}

fn fault(page: Page) -> Request {
    let (block, first) = place(page);
    Request::Fault { block, first, pages: 1 }
}

/// The runs of pages that are missing.
fn missing(delivered: &[bool]) -> impl Iterator<Item = Request> {
    let mut runs: Vec<Request> = Vec::new();
    for page in (0..pages_total()).filter(|page| !delivered[*page]) {
        let (at_block, index) = place(page);
        match runs.last_mut() {
            Some(Request::Missing { block, first, pages })
                if *block == at_block && *first + u64::from(*pages) == index =>
            {
                *pages += 1;
            }
            _ => runs.push(Request::Missing { block: at_block, first: index, pages: 1 }),
        }
    }
    runs.into_iter()
}

#[test]
fn whatever_goes_wrong_the_guest_reads_what_it_must() {
    let wanted = std::env::var("STERNA_SIMULATIONS").ok();
    let wanted: Option<u64> = wanted.map(|text| text.parse().expect("STERNA_SIMULATIONS is a number"));
    let count = wanted.map_or(SIMULATIONS, |count| count.div_ceil(SCALE));
    let (mut sessions, mut deaths) = (0, 0);
    for seed in 0..count {
        let mut world = World::new(seed, None);
        world.live().unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        sessions += world.sessions;
        deaths += world.deaths;
    }
    println!("{count} schedules, {sessions} sessions, {deaths} deaths of the pager");
    if count >= SIMULATIONS {
        assert!(u64::from(sessions) > 3 * count && u64::from(deaths) > count, "{sessions} {deaths}");
    }
}

const WRONG: &[&str] = &["reads", "in the end"];
const STUCK: &[&str] = &["never ends"];

/// A pager or a server that breaks this rule is found by random schedules, for one of these reasons.
fn caught(mutation: Mutation, reasons: &[&str]) {
    let lived = |seed| World::new(seed, Some(mutation)).live().err().map(|why| (seed, why));
    let (seed, why) =
        (0..SIMULATIONS_TO_CATCH).find_map(lived).unwrap_or_else(|| panic!("{mutation:?} was not caught"));
    println!("{mutation:?} is caught by seed {seed}: {why}");
    assert!(reasons.iter().any(|reason| why.contains(reason)), "{mutation:?}: {why}");
}

#[test]
fn every_rule_that_is_left_out_is_caught() {
    caught(Mutation::RemoveDoesNotMark, WRONG);
    caught(Mutation::ListNotSentAgain, STUCK);
    caught(Mutation::BitBeforeCopy, WRONG);
    caught(Mutation::FaultsNotAskedAgain, &["was never asked"]);
    caught(Mutation::AgainIsDropped, STUCK);
    caught(Mutation::BitsSeenEarlier, WRONG);
    caught(Mutation::MarksLater, WRONG);
}

/// A fault that the dead pager had read is in no list once its page counts as delivered: only waking asks for it again. Until then it
/// is late, when nobody asks for its page before the rest is pushed.
#[test]
fn a_take_over_that_wakes_nobody_is_caught() {
    let mutation = Mutation::NoWakeAtTakeOver;
    caught(mutation, &["never ends", "was never asked"]);
    let lived = |seed| World::new(seed, Some(mutation)).live().err();
    let stuck = (0..SIMULATIONS_TO_CATCH).filter_map(lived).find(|why| why.contains("never ends"));
    assert!(stuck.is_some(), "nobody waits for ever");
}

/// What is left: between the read of a discard and its mark a death brings old content back to a page that the guest gave away. It
/// is a few instructions, and what a balloon gave away has no content that a guest relies on.
#[test]
fn a_death_between_a_discard_and_its_mark_is_the_window_that_remains() {
    caught(Mutation::DiesBeforeItMarks, WRONG);
}
