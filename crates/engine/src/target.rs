//! The target's state machine.
//!
//! ```text
//! Greeting -> Admitting -> Recording -> Preparing -> Receiving -> Loading -> Loaded      never runs the VM
//!                                                                              |
//!                                Over <- Confirming <- Starting <- Committing <-+        owns the VM
//!                                 ^          |
//!                            Completing <- Fetching                                      post-copy: pages are still missing
//! ```
//!
//! Until the release everything that goes wrong ends the waiting QEMU, waits for its death and writes that down
//! ([`Step::Dead`]). The durable store of [`Step::Committed`] is the commit: after it the VM is ours, and only the proven
//! death of a QEMU that never ran gives it back.

use crate::handoff::{Activity, Generation, MigrationId, Record, Step};
use crate::source::STREAMS_MAX;
use crate::wire::message::{
    Accepted, Barrier, Committed, Common, Filled, Hello, Loaded, Mapped, Offer, Reason, Reattached, Refused,
    StateEnd, Text, Welcome,
};
use crate::wire::{Message, VERSION_MAX, VERSION_MIN, batch};
use std::collections::VecDeque;
use std::time::Duration;

/// How long the source may take to say what it wants.
const OFFER_WAIT: Duration = Duration::from_secs(10);
/// How long starting a QEMU and making it wait may take.
const PREPARE_WAIT: Duration = Duration::from_secs(110);
/// How long nothing may arrive before the source counts as gone.
const STALL_WAIT: Duration = Duration::from_secs(60);
/// How long the load may take.
const LOAD_WAIT: Duration = Duration::from_secs(55);
/// How long the source may take to release a VM that is complete.
const RELEASE_WAIT: Duration = Duration::from_secs(30);
/// Pause before a record that could not be stored is tried again: a full disk is not emptied faster.
const RECORD_PAUSE: Duration = Duration::from_secs(1);

/// What happens to the target.
#[derive(Clone, Debug)]
pub enum TargetInput {
    /// A message of the source.
    Message(Message),
    /// The control connection or a stream is lost, or carried something that is not the protocol.
    Disconnected(String),
    /// [`TargetAction::Check`] found nothing against the VM.
    Admitted,
    /// [`TargetAction::Check`] or [`TargetAction::Prepare`] found reasons why the VM cannot come here.
    Refused(Vec<Reason>),
    /// [`TargetAction::Record`] is stored; it took this long.
    Recorded(Duration),
    /// [`TargetAction::Record`] could not be stored.
    RecordFailed(String),
    /// [`TargetAction::Prepare`] is done: a QEMU waits.
    Prepared {
        /// Whether it may run here before all of its pages have come.
        lazily: Lazily,
        /// How many runs of pages in common can be mapped.
        room: u32,
        /// What memory is left if all that it shares is written ([`Accepted::head_room`]).
        head_room: i64,
    },
    /// [`TargetAction::Map`] is done: so many runs are mapped.
    Mapped(u32),
    /// Pages have arrived.
    Received,
    /// A round ended on a stream, and all of it is installed.
    RoundEnd {
        /// Which stream.
        stream: u32,
        /// Which round.
        round: u32,
    },
    /// [`TargetAction::Load`] is done: this many blocks were compared and equal.
    Loaded(u32),
    /// [`TargetAction::Run`] is done: the VM does here what it did; that took this long.
    Running(Duration),
    /// [`TargetAction::Run`] failed and the VM does not run.
    RunFailed(String),
    /// Post-copy: every page has come; what the source is told of it, but for the generation.
    Filled(Filled),
    /// Post-copy: the source has connected again; so many pages are missing.
    Reattached(u64),
    /// Post-copy: the QEMU that runs the VM has ended, or its memory cannot be filled.
    Died(String),
    /// [`TargetAction::Kill`] is done: no QEMU of this migration lives.
    Dead,
    /// A local step failed.
    Failed(String),
    /// The user cancels here.
    Cancel,
    /// Time has passed.
    Tick,
}

/// Whether the VM may run here before all of its pages have come.
#[derive(Clone, Debug, PartialEq)]
pub enum Lazily {
    /// It may, once these blocks (places in the offer) are complete.
    Yes {
        /// In ascending order.
        eager: Vec<u32>,
    },
    /// It may not, for this reason.
    No(String),
}

/// What the target wants done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetAction {
    /// Send a message on the control connection.
    Send(Message),
    /// Look for every reason why this VM cannot come here; touch nothing but the VM's name.
    Check(Offer),
    /// Store a record.
    Record(Record),
    /// Start a QEMU that waits, and compare what it is with what was offered.
    Prepare(Offer),
    /// Map these pages of their store.
    Map(Common),
    /// Load the device state, compare digests if there are any, and leave the VM paused.
    Load(StateEnd),
    /// Take the VM's disks and let it run, or leave it paused if the source has said that it was. The record of the
    /// commit is on disk.
    Run,
    /// List the VM as one of this host's own: who is told next that it is here finds it so.
    Adopt,
    /// Tell the network where the VM is now.
    Announce,
    /// Post-copy: tell people that the missing pages are gone, for this reason: the VM cannot go on.
    Strand(String),
    /// End the waiting QEMU and wait for its death. There may be none.
    Kill,
    /// The migration is over.
    Over(Result<(), String>),
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    Greeting,
    Admitting,
    Recording,
    Preparing,
    Receiving,
    Loading,
    Loaded,
    Committing,
    Starting {
        record: Duration,
    },
    /// What the source has not been told yet, if it has not.
    Confirming(Option<Committed>),
    Fetching,
    /// Every page has come, or none will; it is being written down.
    Completing(Result<Filled, String>),
    Ending {
        why: String,
        released: bool,
        reasons: Vec<Reason>,
    },
    Burying {
        why: String,
    },
    Over,
}

/// The target of one migration.
#[derive(Debug)]
pub struct Target {
    id: MigrationId,
    peer: String,
    state: State,
    offer: Option<Offer>,
    rounds: Vec<u32>,
    state_end: Option<StateEnd>,
    deadline: Option<Duration>,
    actions: VecDeque<TargetAction>,
    connected: bool,
    recorded: bool,
    owns: bool,
    mapped: bool,
    filled: Option<Result<Filled, String>>,
    prepare_began: Duration,
    load_began: Duration,
}

impl Target {
    /// A migration that `peer` has begun with this message.
    pub fn new(hello: &Hello, peer: &str, now: Duration) -> Self {
        let mut target = Self {
            id: MigrationId::default(),
            peer: peer.into(),
            state: State::Greeting,
            offer: None,
            rounds: Vec::new(),
            state_end: None,
            deadline: Some(now + OFFER_WAIT),
            actions: VecDeque::new(),
            connected: true,
            recorded: false,
            owns: false,
            mapped: false,
            filled: None,
            prepare_began: now,
            load_began: now,
        };
        target.greet(hello);
        target
    }

    /// A post-copy that an earlier life of this agent was in the middle of: the VM runs, and the source is waited for.
    pub fn resume(record: &Record, now: Duration) -> Self {
        let mut target = Self::new(&Hello::default(), &record.peer, now);
        let offer = Offer { vm: record.vm.clone(), generation: record.generation.0, ..Offer::default() };
        let paused = record.activity == Activity::Paused;
        target.id = record.id;
        target.offer = Some(offer);
        target.state_end = Some(StateEnd { postcopy: true, paused, ..StateEnd::default() });
        target.state = State::Fetching;
        (target.connected, target.recorded, target.owns) = (false, true, true);
        target.actions.clear();
        target.deadline = None;
        target
    }

    fn greet(&mut self, hello: &Hello) {
        let version = hello.version_max.min(VERSION_MAX);
        let Ok(id) = <[u8; 16]>::try_from(hello.id.as_slice()) else {
            return self.refuse("protocol", "the migration's identity is not 16 bytes".into());
        };
        self.id = MigrationId(id);
        if version < VERSION_MIN || version < hello.version_min {
            let (min, max) = (hello.version_min, hello.version_max);
            return self.refuse(
                "protocol-version",
                format!(
                    "the source speaks protocol {min} to {max}, this host {VERSION_MIN} to {VERSION_MAX}"
                ),
            );
        }
        let software = env!("CARGO_PKG_VERSION").into();
        self.actions.push_back(TargetAction::Send(Message::Welcome(Welcome { version, software })));
    }

    fn refuse(&mut self, code: &str, text: String) {
        self.end(text.clone(), vec![Reason { code: code.into(), text }]);
    }

    /// The next thing to do, if any.
    pub fn poll(&mut self) -> Option<TargetAction> {
        self.actions.pop_front()
    }

    /// When [`TargetInput::Tick`] is due, unless something else happens first.
    pub fn deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// Identity of the migration.
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// True once the VM is ours, and for good once it was seen running.
    pub fn owns(&self) -> bool {
        self.owns
    }

    /// Takes in what happened at `now`.
    pub fn handle(&mut self, input: TargetInput, now: Duration) {
        match input {
            TargetInput::Message(message) => self.on_message(message, now),
            TargetInput::Disconnected(why) => self.on_disconnected(why),
            TargetInput::Admitted if self.state == State::Admitting => {
                self.state = State::Recording;
                // From here on there may be a record, also if this try ends before the store is confirmed.
                self.recorded = true;
                self.record(Step::Incoming);
            }
            TargetInput::Refused(reasons) if matches!(self.state, State::Admitting | State::Preparing) => {
                let why = reasons.first().map_or_else(String::new, |reason| reason.text.clone());
                self.end(why, reasons);
            }
            TargetInput::Recorded(took) => self.on_recorded(took, now),
            TargetInput::RecordFailed(why) => self.on_record_failed(why, now),
            TargetInput::Prepared { lazily, room, head_room } if self.state == State::Preparing => {
                let prepare_us = micros(now.saturating_sub(self.prepare_began));
                self.state = State::Receiving;
                self.deadline = Some(now + STALL_WAIT);
                let (postcopy, postcopy_refusal, eager) = match lazily {
                    Lazily::Yes { eager } => (true, String::new(), eager),
                    Lazily::No(why) => (false, why, Vec::new()),
                };
                let accepted = Accepted { prepare_us, postcopy, postcopy_refusal, eager, room, head_room };
                self.send(Message::Accepted(accepted));
            }
            TargetInput::Received if self.state == State::Receiving => self.deadline = Some(now + STALL_WAIT),
            TargetInput::Mapped(runs) if self.state == State::Receiving => {
                self.deadline = Some(now + STALL_WAIT);
                self.send(Message::Mapped(Mapped { runs }));
            }
            TargetInput::RoundEnd { stream, round } => self.on_round_end(stream, round, now),
            TargetInput::Loaded(blocks_verified) if self.state == State::Loading => {
                let load_us = micros(now.saturating_sub(self.load_began));
                self.state = State::Loaded;
                self.deadline = Some(now + RELEASE_WAIT);
                self.send(Message::Loaded(Loaded { load_us, blocks_verified }));
            }
            TargetInput::Running(took) => self.on_running(took),
            TargetInput::RunFailed(why) => self.on_run_failed(why),
            TargetInput::Filled(filled) => self.on_filled(Ok(filled)),
            TargetInput::Died(why) => self.on_filled(Err(why)),
            TargetInput::Reattached(pages)
                if matches!(self.state, State::Fetching | State::Completing(_)) =>
            {
                self.connected = true;
                self.send(Message::Reattached(Reattached { pages }));
            }
            TargetInput::Dead => self.on_dead(),
            TargetInput::Failed(why) => self.fail(why),
            TargetInput::Cancel => self.fail("the migration was cancelled at the target".into()),
            TargetInput::Tick => self.on_tick(now),
            _ => {}
        }
    }

    fn on_message(&mut self, message: Message, now: Duration) {
        match (message, &self.state) {
            (Message::Offer(offer), State::Greeting) => self.on_offer(offer, now),
            (Message::StateEnd(end), State::Receiving) if self.state_end.is_none() => {
                self.state_end = Some(end);
                self.load_when_complete(now);
            }
            (Message::Common(common), State::Receiving) if self.may_map(common.pending) => {
                self.deadline = Some(now + STALL_WAIT);
                if !common.pending {
                    self.mapped = true;
                    self.actions.push_back(TargetAction::Map(common));
                }
            }
            (Message::Release(release), State::Loaded) if Some(release.generation) == self.generation() => {
                self.state = State::Committing;
                self.deadline = None;
                self.record(Step::Committed);
            }
            (Message::Abort(text), State::Fetching) => {
                self.connected = false;
                self.actions.push_back(TargetAction::Strand(text.text));
            }
            (Message::Abort(text), _) => self.on_disconnected(format!("the source gave up: {}", text.text)),
            (other, _) => self.on_disconnected(format!("the source sent {} out of turn", other.name())),
        }
    }

    /// What is in common is mapped once, before the first page comes: a mapping covers what was there.
    fn may_map(&self, pending: bool) -> bool {
        let asked = self.offer.as_ref().is_some_and(|offer| offer.common);
        asked
            && (pending || !self.mapped)
            && self.state_end.is_none()
            && self.rounds.iter().all(|round| *round == 0)
    }

    fn on_offer(&mut self, offer: Offer, now: Duration) {
        if offer.streams == 0 || offer.streams > STREAMS_MAX {
            return self.refuse("protocol", format!("{} page streams were asked for", offer.streams));
        }
        if offer.blocks.len() > batch::BLOCKS_MAX {
            return self.refuse("protocol", format!("{} blocks of RAM were offered", offer.blocks.len()));
        }
        self.rounds = vec![0; offer.streams as usize];
        self.state = State::Admitting;
        self.prepare_began = now;
        self.deadline = Some(now + PREPARE_WAIT);
        self.actions.push_back(TargetAction::Check(offer.clone()));
        self.offer = Some(offer);
    }

    fn on_disconnected(&mut self, why: String) {
        self.connected = false;
        self.fail(why);
    }

    fn on_recorded(&mut self, took: Duration, now: Duration) {
        match (&self.state, &self.offer) {
            (State::Recording, Some(offer)) => {
                self.actions.push_back(TargetAction::Prepare(offer.clone()));
                self.state = State::Preparing;
                self.deadline = Some(now + PREPARE_WAIT);
            }
            (State::Committing, _) => {
                self.state = State::Starting { record: took };
                self.owns = true;
                self.actions.push_back(TargetAction::Run);
            }
            (State::Confirming(_), _) => {
                self.tell_committed();
                self.actions.push_back(TargetAction::Announce);
                match self.is_postcopy() {
                    true => self.fetch(),
                    false => self.over(Ok(())),
                }
            }
            (State::Completing(result), _) => {
                let result = result.clone();
                self.complete(result);
            }
            (State::Burying { why }, _) => {
                let why = why.clone();
                self.over(Err(why));
            }
            _ => {}
        }
    }

    fn on_record_failed(&mut self, why: String, now: Duration) {
        match &self.state {
            // Whether the commit reached the disk is not known: only a dead QEMU makes either reading safe.
            State::Recording | State::Committing => {
                let released = self.state == State::Committing;
                self.kill(format!("the record could not be stored: {why}"), released, Vec::new());
            }
            // The source may be asking: without this record it would be told to ask again for ever.
            State::Confirming(_) => {
                self.tell_committed();
                self.deadline = Some(now + RECORD_PAUSE);
            }
            State::Burying { .. } | State::Completing(_) => self.deadline = Some(now + RECORD_PAUSE),
            _ => {}
        }
    }

    /// Tells the source, once, that it may let its QEMU go: whoever hears from it that the VM is here may use it here at once.
    fn tell_committed(&mut self) {
        let State::Confirming(untold) = &mut self.state else { return };
        if let Some(committed) = untold.take() {
            self.actions.push_back(TargetAction::Adopt);
            self.send(Message::Committed(committed));
        }
    }

    fn on_round_end(&mut self, stream: u32, round: u32, now: Duration) {
        if self.state != State::Receiving {
            return;
        }
        let Some(last) = self.rounds.get_mut(stream as usize) else {
            return self.fail(format!("the source ended a round on stream {stream}, which does not exist"));
        };
        if round != *last + 1 {
            let last = *last;
            return self
                .fail(format!("the source ended round {round} after round {last} on stream {stream}"));
        }
        *last = round;
        self.deadline = Some(now + STALL_WAIT);
        self.send(Message::Barrier(Barrier { round, stream }));
        self.load_when_complete(now);
    }

    fn load_when_complete(&mut self, now: Duration) {
        let Some(end) = &self.state_end else { return };
        if self.rounds.iter().all(|round| *round == end.last_round) {
            self.actions.push_back(TargetAction::Load(end.clone()));
            self.state = State::Loading;
            self.load_began = now;
            self.deadline = Some(now + LOAD_WAIT);
        }
    }

    fn on_running(&mut self, took: Duration) {
        let State::Starting { record } = self.state else { return };
        let generation = self.generation().unwrap_or_default();
        // Written down before anybody is told: the next migration of the VM has its own record.
        self.record(if self.is_postcopy() { Step::Fetching } else { Step::Running });
        self.state = State::Confirming(Some(Committed {
            generation,
            record_us: micros(record),
            resume_us: micros(took),
        }));
    }

    /// The VM runs, and pages come.
    fn fetch(&mut self) {
        self.state = State::Fetching;
        self.deadline = None;
        if let Some(result) = self.filled.take() {
            self.on_filled(result);
        }
    }

    /// Every page has come, or the QEMU that they were for has died. It is written down before the source hears of it.
    fn on_filled(&mut self, result: Result<Filled, String>) {
        match self.state {
            State::Fetching if result.is_ok() => {
                self.record(Step::Running);
                self.state = State::Completing(result);
            }
            // The record stays as it is: a dead QEMU beside it tells the source that the VM has ended here.
            State::Fetching => self.complete(result),
            // Sooner than the start was written down.
            State::Starting { .. } | State::Confirming(_) => self.filled = Some(result),
            // Before the release it is a failure like any other.
            _ => {
                if let Err(why) = result {
                    self.fail(why);
                }
            }
        }
    }

    fn complete(&mut self, result: Result<Filled, String>) {
        let generation = self.generation().unwrap_or_default();
        let over = match result {
            Ok(filled) => {
                self.send(Message::Filled(Filled { generation, ..filled }));
                Ok(())
            }
            Err(why) => Err(format!("it ran here, and ended before all of its pages had come: {why}")),
        };
        self.over(over);
    }

    fn is_postcopy(&self) -> bool {
        self.state_end.as_ref().is_some_and(|end| end.postcopy)
    }

    /// True while the VM runs here and pages of it are missing.
    pub fn is_fetching(&self) -> bool {
        matches!(self.state, State::Fetching | State::Completing(_))
    }

    /// True while the source can be reached.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    fn on_run_failed(&mut self, why: String) {
        if matches!(self.state, State::Starting { .. }) {
            self.kill(format!("the VM could not be started at the target: {why}"), true, Vec::new());
        }
    }

    fn on_dead(&mut self) {
        let State::Ending { why, released, reasons } = self.state.clone() else { return };
        if self.recorded {
            self.record(Step::Dead);
        }
        if released {
            self.send(Message::NotCommitted(Text { text: why.clone() }));
        } else if !reasons.is_empty() {
            self.send(Message::Refused(Refused { reasons }));
        } else {
            self.send(Message::Abort(Text { text: why.clone() }));
        }
        match self.recorded {
            true => self.state = State::Burying { why },
            false => self.over(Err(why)),
        }
    }

    fn on_tick(&mut self, now: Duration) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match self.state {
            State::Confirming(_) if self.is_postcopy() => return self.record(Step::Fetching),
            State::Confirming(_) | State::Completing(_) => return self.record(Step::Running),
            State::Burying { .. } => return self.record(Step::Dead),
            _ => {}
        }
        self.fail("the target gave up waiting: nothing came from the source, or a step took too long".into());
    }

    fn fail(&mut self, why: String) {
        self.end(why, Vec::new());
    }

    /// Ends a try that has not been released. After the release only our own QEMU can fail it.
    fn end(&mut self, why: String, reasons: Vec<Reason>) {
        match self.state {
            State::Committing
            | State::Starting { .. }
            | State::Confirming(_)
            | State::Fetching
            | State::Completing(_)
            | State::Ending { .. }
            | State::Burying { .. }
            | State::Over => {}
            _ => self.kill(why, false, reasons),
        }
    }

    fn kill(&mut self, why: String, released: bool, reasons: Vec<Reason>) {
        self.actions.clear();
        self.deadline = None;
        self.owns = false;
        self.state = State::Ending { why, released, reasons };
        self.actions.push_back(TargetAction::Kill);
    }

    fn over(&mut self, result: Result<(), String>) {
        self.state = State::Over;
        self.actions.push_back(TargetAction::Over(result));
    }

    fn send(&mut self, message: Message) {
        if self.connected {
            self.actions.push_back(TargetAction::Send(message));
        }
    }

    fn record(&mut self, step: Step) {
        let Some(offer) = &self.offer else { return };
        self.actions.push_back(TargetAction::Record(Record {
            id: self.id,
            generation: Generation(offer.generation),
            vm: offer.vm.clone(),
            peer: self.peer.clone(),
            step,
            activity: self.activity(),
        }));
    }

    /// What the VM is to do here, once the source has said so.
    fn activity(&self) -> Activity {
        match &self.state_end {
            Some(end) if end.paused => Activity::Paused,
            _ => Activity::Running,
        }
    }

    fn generation(&self) -> Option<u64> {
        self.offer.as_ref().map(|offer| offer.generation)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
