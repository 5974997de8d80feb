//! The source's state machine.
//!
//! ```text
//! Recording -> Negotiating -> (Offered) -> Opening -> Arming -> (Sharing) -> Sending <-> Scanning,    the VM runs
//!                                                                           Settling, Resting
//!                                                                            |
//!                                           Releasing <- Finishing <- Stopping         the VM is stopped, and ours
//!                                               |
//!                                           Released -> (Asking) -> Ending -> Done     the VM is not ours to resume
//!                                               |           |
//!                                               |        Fencing -> Reclaiming         an operator has decided
//!                                           Serving <-> Asking, Reattaching            post-copy: the target fetches pages
//! ```
//!
//! The target's answer to the offer, that a QEMU waits, comes in *Offered*, or in any state behind it up to *Sending*: what the first pages
//! need is made ready meanwhile, and they are on their way.
//!
//! Anything that goes wrong before *Released* leads to [`State::Undoing`]: the VM is resumed here first, then the rest
//! is taken down. Anything that goes wrong after it leads to *Asking*, until the target proves who owns the VM.

use crate::handoff::{Activity, Choice, Generation, Ownership, Record, Step};
use crate::policy::{Convergence, RateLimits, Stun};
use crate::progress::{Progress, Status};
use crate::units::{Bytes, Pages};
use crate::wire::message::{Hello, Offer, Release, Text};
use crate::wire::{Message, VERSION_MAX, VERSION_MIN};
use std::collections::VecDeque;
use std::time::Duration;

mod interface;
mod offer;
mod postcopy;
mod recover;
mod rounds;
mod share;

use postcopy::Lazy;
use rounds::Rounds;

pub use interface::{Outcome, Postcopy, SourceAction, SourceInput, SourceParameters};

/// How long the target may take to answer the first message.
const WELCOME_WAIT: Duration = Duration::from_secs(10);
/// How long the target may take to start a QEMU: seconds on a busy host, more with huge pages to reserve.
const ACCEPT_WAIT: Duration = Duration::from_secs(120);
/// How long a local step (tracking, scan, stop) may take before the try is given up.
const LOCAL_WAIT: Duration = Duration::from_secs(60);
/// How long pages may fail to move before the target counts as gone.
const STALL_WAIT: Duration = Duration::from_secs(30);
/// How long pages may fail to move while the VM is stopped: it waits for them, and can go on here.
const STOPPED_STALL_WAIT: Duration = Duration::from_secs(5);
/// How long the target may take to load the device state and answer: it takes milliseconds, and the VM is stopped.
const LOAD_WAIT: Duration = Duration::from_secs(10);
/// The same where the target is to prove RAM equal first, which reads all of it.
const VERIFY_WAIT: Duration = Duration::from_secs(60);
/// How long to wait before the VM's QEMU here is ended once more, when it did not die.
const END_PAUSE: Duration = Duration::from_secs(1);
/// How long the target may take to say that it committed before it is asked.
const COMMIT_WAIT: Duration = Duration::from_secs(5);
/// First pause between questions to a target that does not answer; it doubles.
const ASK_PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause between questions.
const ASK_PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long after the release an operator is told that the owner is not known.
const ATTENTION_AFTER: Duration = Duration::from_secs(10);
/// Most page streams: the barrier set is a 64-bit mask, and more streams than this never helped anyone.
pub const STREAMS_MAX: u32 = 64;

#[derive(Clone, Debug, PartialEq)]
enum State {
    Recording,
    Negotiating,
    Offered,
    Opening,
    Arming,
    /// What the VM has in common with others goes first.
    Sharing,
    Sending {
        round: u32,
        began: Duration,
        sent_before: Bytes,
        barriers: u64,
    },
    Scanning {
        round_time: Duration,
    },
    Settling,
    /// Most of the last round was written again before it could go, or the VM may not stop yet: the next one begins at the deadline.
    Resting {
        pages: Pages,
    },
    /// The target drops what it has of pages that will be missing, before the VM stops.
    Dropping {
        round: u32,
        barriers: u64,
    },
    Stopping,
    Finishing {
        round: u32,
        barriers: u64,
        quiet: bool,
        loaded: bool,
    },
    Releasing,
    Released,
    Asking {
        pause: Duration,
    },
    Serving,
    Reattaching,
    Fencing,
    Reclaiming,
    Ending,
    Undoing(Outcome),
    Over,
}

/// The source of one migration.
#[derive(Debug)]
pub struct Source {
    parameters: SourceParameters,
    convergence: Convergence,
    state: State,
    began: Duration,
    deadline: Option<Duration>,
    actions: VecDeque<SourceAction>,
    progress: Progress,
    stopped_at: Option<Duration>,
    /// An earlier life of this agent has stopped the VM, nobody knows when.
    recovered: bool,
    released_at: Option<Duration>,
    connected: bool,
    /// A QEMU waits at the target.
    accepted: bool,
    /// Until when it may take to start.
    accept_by: Duration,
    /// What the VM has in common with others is looked for.
    shares: bool,
    last_sent: Bytes,
    cancelling: bool,
    choice: Option<Choice>,
    ended: Status,
    unsettled: Pages,
    /// How many runs of pages in common the target can map.
    room: u32,
    rounds: Rounds,
    stun: Stun,
    lazy: Lazy,
}

impl Source {
    /// A migration that begins now, with an open control connection.
    pub fn new(parameters: SourceParameters, now: Duration) -> Self {
        let mut source = Self::in_state(parameters, State::Recording, now);
        source.connected = true;
        source.record(Step::Sending);
        source.wait(now, LOCAL_WAIT);
        source
    }

    /// A migration that an earlier life of this agent released, and whose owner is to be found.
    pub fn recover(record: &Record, now: Duration) -> Self {
        let offer = Offer { vm: record.vm.clone(), generation: record.generation.0, ..Offer::default() };
        let parameters = SourceParameters {
            id: record.id,
            peer: record.peer.clone(),
            offer,
            downtime_limit: Duration::ZERO,
            timeout: None,
            activity: record.activity,
            rate: RateLimits::default(),
            auto_converge: false,
            postcopy: Postcopy::default(),
            awaits: false,
        };
        let mut source = Self::in_state(parameters, State::Over, now);
        source.released_at = Some(now);
        source.stopped_at = Some(now);
        source.recovered = true;
        if record.step == Step::Serving {
            source.lazy.serves();
        }
        source.ask(now);
        source
    }

    fn in_state(parameters: SourceParameters, state: State, now: Duration) -> Self {
        let ram_total = Bytes(parameters.offer.blocks.iter().map(|block| block.bytes).sum());
        Self {
            convergence: Convergence::new(parameters.downtime_limit, postcopy::timeout_of_stop(&parameters)),
            rounds: Rounds::new(&parameters),
            stun: Stun::new(parameters.auto_converge),
            lazy: Lazy::default(),
            parameters,
            state,
            began: now,
            deadline: None,
            actions: VecDeque::new(),
            progress: Progress { ram_total, ..Progress::default() },
            stopped_at: None,
            recovered: false,
            released_at: None,
            connected: false,
            accepted: false,
            accept_by: Duration::ZERO,
            shares: false,
            last_sent: Bytes(0),
            cancelling: false,
            choice: None,
            ended: Status::Completed,
            unsettled: Pages(0),
            room: 0,
        }
    }

    /// The next thing to do, if any.
    pub fn poll(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When [`SourceInput::Tick`] is due, unless something else happens first.
    pub fn deadline(&self) -> Option<Duration> {
        self.deadline.into_iter().chain(self.switch_at()).min()
    }

    /// The figures of this migration. The driver adds what only it can count (normal, duplicate, device state).
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// True while the VM can still be kept: after the release a cancellation comes too late.
    pub fn can_cancel(&self) -> bool {
        !self.is_settled_or_out() && !matches!(self.state, State::Undoing(_))
    }

    /// The VM is not ours to resume, or the migration is over.
    fn is_settled_or_out(&self) -> bool {
        use State::{Asking, Ending, Fencing, Over, Reattaching, Reclaiming, Released, Serving};
        let handed_over = matches!(self.state, Released | Asking { .. } | Serving | Reattaching);
        handed_over || matches!(self.state, Fencing | Reclaiming | Ending | Over)
    }

    /// QEMU's word for where the migration is.
    pub fn status(&self, now: Duration) -> Status {
        match &self.state {
            State::Recording | State::Negotiating | State::Offered | State::Opening | State::Arming => {
                Status::Setup
            }
            State::Sharing
            | State::Sending { .. }
            | State::Scanning { .. }
            | State::Settling
            | State::Resting { .. }
            | State::Dropping { .. } => Status::Active,
            State::Undoing(_) if self.cancelling => Status::Cancelling,
            State::Serving => Status::PostcopyActive,
            State::Reattaching => Status::PostcopyRecover,
            State::Asking { .. } if self.lazy.is_served() => Status::PostcopyPaused,
            State::Released | State::Asking { .. } if self.needs_attention(now) => Status::Unresolved,
            State::Undoing(_) => Status::Failed,
            State::Over => self.ended,
            _ => Status::Device,
        }
    }

    /// True when the VM was released long ago and the target has not said who owns it.
    pub fn needs_attention(&self, now: Duration) -> bool {
        matches!(self.state, State::Released | State::Asking { .. })
            && !self.lazy.is_served()
            && self.released_at.is_some_and(|at| now.saturating_sub(at) >= ATTENTION_AFTER)
    }

    /// Takes in what happened at `now`.
    pub fn handle(&mut self, input: SourceInput, now: Duration) {
        if self.state != State::Over {
            self.progress.total_time = now.saturating_sub(self.began);
        }
        match input {
            SourceInput::Message(message) => self.on_message(message, now),
            SourceInput::Disconnected(why) => self.on_disconnected(why, now),
            SourceInput::Recorded => self.on_recorded(now),
            SourceInput::RecordFailed(why) => self.on_record_failed(why, now),
            SourceInput::Opened if self.state == State::Opening => {
                // Whether the target can map anything may be part of its answer.
                self.shares = self.parameters.offer.common && (self.room > 0 || !self.accepted);
                self.enter(State::Arming, SourceAction::Track, now, LOCAL_WAIT);
            }
            SourceInput::Tracked(pages) if self.state == State::Arming => self.on_tracked(pages, now),
            SourceInput::Sharing if self.state == State::Sharing => self.wait(now, LOCAL_WAIT),
            SourceInput::Shared(pages) if self.state == State::Sharing && self.accepted => {
                self.begin_sending(pages, now)
            }
            SourceInput::Sent(bytes) => self.on_sent(bytes, now),
            SourceInput::Counted { normal, postponed } => self.on_counted(normal, postponed),
            SourceInput::Writes(rate) => self.on_writes(rate),
            SourceInput::Activity(activity) => self.on_activity(activity),
            SourceInput::Unsettled(pages) => self.unsettled = pages,
            SourceInput::Arrived => self.on_arrived(now),
            SourceInput::Scanned(pages) => self.on_scanned(pages, now),
            SourceInput::Settled(pages) if self.state == State::Settling => {
                self.begin_round(self.progress.rounds + 1, pages, now);
            }
            SourceInput::Stopped(pages) if self.state == State::Stopping => self.on_stopped(pages, now),
            SourceInput::Finished(pages) => self.on_finished(pages, now),
            SourceInput::Resumed if self.state == State::Reclaiming => self.on_reclaimed(),
            SourceInput::Resumed => self.over(),
            SourceInput::ResumeFailed(why) if self.state == State::Reclaiming => self.unfence(&why, now),
            SourceInput::ResumeFailed(why) => self.on_resume_failed(why),
            SourceInput::Answered(ownership) => self.on_answer(ownership, now),
            SourceInput::AskFailed(_) if self.is_asked_to_decide() => self.decide(),
            SourceInput::AskFailed(_) => self.ask_later(now),
            SourceInput::Recover(choice) => self.on_recover(choice, now),
            SourceInput::Ended if self.state == State::Ending => {
                self.state = State::Over;
                self.reply(Ok(()));
                let outcome = self.lazy.ended_there().map_or(Outcome::Completed, Outcome::EndedThere);
                if outcome != Outcome::Completed {
                    self.ended = Status::Failed;
                }
                self.actions.push_back(SourceAction::Release);
                self.actions.push_back(SourceAction::Over(outcome));
            }
            SourceInput::Failed(_) if self.state == State::Ending => self.wait(now, END_PAUSE),
            SourceInput::Failed(_) if self.lazy.is_served() => self.lose(now),
            SourceInput::Failed(why) => self.fail(Outcome::Failed(why)),
            SourceInput::PagesLost(why) => self.on_pages_lost(why),
            SourceInput::Switch => self.on_switch(now),
            SourceInput::Reattached => self.on_reattached(now),
            SourceInput::Cancel if self.can_cancel() => {
                self.cancelling = true;
                self.fail(Outcome::Cancelled);
            }
            SourceInput::DowntimeLimit(limit) => self.convergence.set_downtime_limit(limit),
            SourceInput::RateLimits(limits) => self.on_rate_limits(limits),
            SourceInput::AutoConverge(allowed) => self.on_auto_converge(allowed),
            SourceInput::Tick => self.on_tick(now),
            _ => {}
        }
    }

    fn on_message(&mut self, message: Message, now: Duration) {
        match (message, &self.state) {
            (Message::Welcome(welcome), State::Negotiating) => {
                if !(VERSION_MIN..=VERSION_MAX).contains(&welcome.version) {
                    return self.fail(Outcome::Failed(format!(
                        "the target chose protocol version {}, this host speaks {VERSION_MIN} to {VERSION_MAX}",
                        welcome.version
                    )));
                }
                self.offer(now);
            }
            (Message::Accepted(accepted), _) if self.awaits_target() => self.on_accepted(&accepted, now),
            (Message::Refused(refused), State::Negotiating) => self.fail(Outcome::Refused(refused.reasons)),
            (Message::Refused(refused), _) if self.awaits_target() => {
                self.fail(Outcome::Refused(refused.reasons));
            }
            (Message::Barrier(barrier), _) => self.on_barrier(barrier.round, barrier.stream, now),
            (Message::Loaded(_), State::Finishing { loaded: false, barriers, .. })
                if *barriers == self.all_barriers() =>
            {
                if let State::Finishing { loaded, .. } = &mut self.state {
                    *loaded = true;
                }
                self.release_when_ready();
            }
            (Message::Committed(committed), State::Released | State::Asking { .. })
                if committed.generation == self.parameters.offer.generation =>
            {
                match self.lazy.is_switched() {
                    true => self.serve(now),
                    false => self.on_answer(Ownership::Target, now),
                }
            }
            (Message::Filled(filled), State::Serving)
                if filled.generation == self.parameters.offer.generation =>
            {
                self.end();
            }
            (Message::NotCommitted(text), State::Released | State::Asking { .. }) => {
                self.given_back(text.text);
            }
            (Message::Abort(text), _) => self.on_disconnected(text.text, now),
            (other, _) => self.on_disconnected(format!("the target sent {} out of turn", other.name()), now),
        }
    }

    fn on_disconnected(&mut self, why: String, now: Duration) {
        self.connected = false;
        match self.state {
            State::Released => self.ask(now),
            State::Serving | State::Reattaching => self.lose(now),
            _ => self.fail(Outcome::Failed(why)),
        }
    }

    fn on_recorded(&mut self, now: Duration) {
        match self.state {
            State::Recording => {
                let hello = Hello {
                    version_min: VERSION_MIN,
                    version_max: VERSION_MAX,
                    id: self.parameters.id.0.to_vec(),
                    software: env!("CARGO_PKG_VERSION").into(),
                };
                self.enter(State::Negotiating, SourceAction::Send(Message::Hello(hello)), now, WELCOME_WAIT);
            }
            State::Releasing => {
                self.released_at = Some(now);
                let release = Release { generation: self.parameters.offer.generation };
                self.enter(State::Released, SourceAction::Send(Message::Release(release)), now, COMMIT_WAIT);
            }
            State::Fencing => {
                self.state = State::Reclaiming;
                self.actions.push_back(SourceAction::Resume);
            }
            State::Ending => self.actions.push_back(SourceAction::End),
            _ => {}
        }
    }

    fn on_record_failed(&mut self, why: String, now: Duration) {
        match self.state {
            State::Fencing => self.unfence(&why, now),
            State::Recording | State::Scanning { .. } | State::Releasing => self.fail(Outcome::Failed(why)),
            // The target's record decides; ours only saves a question after a crash.
            State::Ending => self.actions.push_back(SourceAction::End),
            _ => {}
        }
    }

    /// Written down before the stop: whoever undoes it after a crash must know whether the VM ran.
    fn on_activity(&mut self, activity: Activity) {
        if matches!(self.state, State::Scanning { .. }) && self.parameters.activity != activity {
            self.parameters.activity = activity;
            self.record(Step::Sending);
        }
    }

    fn on_stopped(&mut self, pages: Pages, now: Duration) {
        self.progress.rounds += 1;
        let round = self.progress.rounds + self.lazy.empty_rounds();
        self.progress.ram_remaining = pages.bytes();
        let state = State::Finishing { round, barriers: 0, quiet: false, loaded: false };
        let finish = match self.lazy.is_switched() {
            true => SourceAction::FinishPostcopy(round),
            false => SourceAction::Finish(round),
        };
        self.enter(state, finish, now, STOPPED_STALL_WAIT);
    }

    fn on_finished(&mut self, found: Pages, now: Duration) {
        let all = self.all_barriers();
        let State::Finishing { quiet, barriers, .. } = &mut self.state else { return };
        if found != Pages(0) {
            let pages = found.0;
            return self.fail(Outcome::Failed(format!(
                "{pages} pages were written after the VM was stopped and scanned; something else writes its memory"
            )));
        }
        *quiet = true;
        // What was done here took its time; the target's begins now.
        let wait = if *barriers == all { self.load_wait() } else { STOPPED_STALL_WAIT };
        self.wait(now, wait);
        self.release_when_ready();
    }

    /// The point of no return is the store of this record: all RAM and state are at the target, complete.
    fn release_when_ready(&mut self) {
        if matches!(self.state, State::Finishing { quiet: true, loaded: true, .. }) {
            self.state = State::Releasing;
            self.record(Step::Released);
        }
    }

    fn on_answer(&mut self, ownership: Ownership, now: Duration) {
        if !matches!(self.state, State::Released | State::Asking { .. }) {
            return;
        }
        let peer = self.parameters.peer.clone();
        match ownership {
            Ownership::Target => {
                self.contradict(
                    Choice::Here,
                    format!("host {peer} answers that it runs the VM: it is ended here"),
                );
                self.note_downtime(now);
                self.end();
            }
            Ownership::Ended => {
                let text = format!("host {peer} answers that the VM ran there and has ended");
                self.contradict(Choice::Here, text.clone());
                self.end_there(text);
            }
            Ownership::Fetching => {
                let text = format!(
                    "host {peer} answers that it runs the VM, and needs pages of it: they are sent now"
                );
                self.reply(Err(text));
                self.reattach(now);
            }
            Ownership::Source => {
                self.given_back("the target's QEMU died before it owned the VM".into());
            }
            Ownership::Unknown if self.choice.is_some() => self.decide(),
            Ownership::Undecided | Ownership::Unknown => {
                self.reply(Err(format!("host {peer} answers, and is still at work on the VM: wait for it")));
                self.ask_later(now);
            }
        }
    }

    /// For how long the VM was stopped. Who came to it later, after a restart, does not know.
    fn note_downtime(&mut self, now: Duration) {
        if !self.recovered {
            let downtime = self.stopped_at.map(|at| now.saturating_sub(at));
            self.progress.downtime = self.progress.downtime.or(downtime);
        }
    }

    /// What is left of the VM here goes.
    fn end(&mut self) {
        self.state = State::Ending;
        self.record(Step::Gone);
        self.deadline = None;
    }

    fn ask(&mut self, now: Duration) {
        self.state = State::Asking { pause: ASK_PAUSE_MIN };
        self.actions.push_back(SourceAction::Ask);
        self.deadline = None;
        let _ = now;
    }

    fn ask_later(&mut self, now: Duration) {
        if let State::Asking { pause } = &mut self.state {
            let wait = *pause;
            *pause = (wait * 2).min(ASK_PAUSE_MAX);
            self.wait(now, wait);
        }
    }

    fn on_tick(&mut self, now: Duration) {
        if self.switch_at().is_some_and(|at| now >= at) {
            return self.on_switch(now);
        }
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match &self.state {
            State::Released => self.ask(now),
            State::Asking { .. } => self.actions.push_back(SourceAction::Ask),
            State::Ending => self.actions.push_back(SourceAction::End),
            State::Resting { pages } => self.begin_round(self.progress.rounds + 1, *pages, now),
            State::Reattaching => self.lose(now),
            State::Undoing(_) | State::Over => {}
            state => {
                let what = waiting_for(state, self.accepted);
                self.fail(Outcome::Failed(format!("gave up waiting for {what}")));
            }
        }
    }

    /// Before the release: the VM stays ours, whatever the target does.
    fn fail(&mut self, outcome: Outcome) {
        if self.can_cancel() {
            self.take_back(outcome);
        }
    }

    /// The guest first: it runs before anything else is taken down.
    fn take_back(&mut self, outcome: Outcome) {
        self.actions.clear();
        self.deadline = None;
        let text = match &outcome {
            Outcome::Cancelled => "the migration was cancelled".into(),
            Outcome::Failed(why) | Outcome::Stranded(why) => why.clone(),
            _ => String::new(),
        };
        let stopped = self.stopped_at.is_some();
        self.state = State::Undoing(outcome);
        if stopped {
            self.actions.push_back(SourceAction::Resume);
        }
        self.let_go();
        if self.connected && self.released_at.is_none() {
            self.actions.push_back(SourceAction::Send(Message::Abort(Text { text })));
        }
        self.actions.push_back(SourceAction::Release);
        if !stopped {
            self.over();
        }
    }

    fn on_resume_failed(&mut self, why: String) {
        if let State::Undoing(outcome) = &mut self.state {
            let before = match outcome {
                Outcome::Failed(before) => before.clone(),
                _ => "the migration was cancelled".into(),
            };
            let text = format!("{before}; and the VM could not be resumed here: {why}");
            *outcome = Outcome::Stranded(text.clone());
            self.reply(Err(text));
            self.over();
        }
    }

    fn over(&mut self) {
        if let State::Undoing(outcome) = &self.state {
            let outcome = outcome.clone();
            self.reply(Ok(()));
            if !matches!(outcome, Outcome::Stranded(_)) {
                self.record(Step::Kept);
            }
            self.ended = match outcome {
                Outcome::Cancelled => Status::Cancelled,
                Outcome::Stranded(_) => Status::Unresolved,
                _ => Status::Failed,
            };
            self.state = State::Over;
            self.actions.push_back(SourceAction::Over(outcome));
        }
    }

    fn enter(&mut self, state: State, action: SourceAction, now: Duration, wait: Duration) {
        self.state = state;
        self.actions.push_back(action);
        self.wait(now, wait);
    }

    /// At the most so long, or as long as the target may take to start a QEMU: before that it takes no pages.
    fn wait(&mut self, now: Duration, wait: Duration) {
        let deadline = now + wait;
        self.deadline = Some(if self.accepted { deadline } else { deadline.max(self.accept_by) });
    }

    fn record(&mut self, step: Step) {
        self.actions.push_back(SourceAction::Record(Record {
            id: self.parameters.id,
            generation: Generation(self.parameters.offer.generation),
            vm: self.parameters.offer.vm.clone(),
            peer: self.parameters.peer.clone(),
            step,
            activity: self.parameters.activity,
        }));
    }

    fn load_wait(&self) -> Duration {
        if self.parameters.offer.verify { VERIFY_WAIT } else { LOAD_WAIT }
    }

    fn all_barriers(&self) -> u64 {
        match self.parameters.offer.streams {
            streams if streams >= STREAMS_MAX => u64::MAX,
            streams => (1 << streams) - 1,
        }
    }
}

fn waiting_for(state: &State, accepted: bool) -> &'static str {
    match state {
        State::Negotiating => "the target's first answer",
        State::Offered => "the target to start a QEMU",
        State::Arming | State::Sharing | State::Sending { .. } if !accepted => "the target to start a QEMU",
        State::Sharing => "the target to map what the VM has in common with others",
        State::Sending { .. } => "pages to move: the target takes none",
        State::Finishing { .. } => "the target to load the VM",
        _ => "a step on this host",
    }
}
