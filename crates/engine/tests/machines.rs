//! The machines against arbitrary inputs: in any order, duplicated, late, or made up. Nothing panics, the source never
//! resumes what it released without proof, the target never runs what was not released to it, and both come to an end.

use proptest::prelude::*;
use std::collections::VecDeque;
use std::time::Duration;
use sterna_engine::handoff::{Activity, Generation, MigrationId, Ownership, Record, Step, answer};
use sterna_engine::policy::{KEEP_ALL, RateLimits};
use sterna_engine::source::{Outcome, Postcopy, Source, SourceAction, SourceInput, SourceParameters};
use sterna_engine::target::{Lazily, Target, TargetAction, TargetInput};
use sterna_engine::units::{Bytes, Pages};
use sterna_engine::wire::Message;
use sterna_engine::wire::message::{
    Accepted, Barrier, Block, Committed, Common, Filled, Hello, Loaded, Mapped, Offer, Query, Reason,
    Refused, Release, StateEnd, Text, Welcome,
};
use sterna_engine::{Status, wire};

const GENERATION: u64 = 7;
const STREAMS: u32 = 2;
const ID: MigrationId = MigrationId([9; 16]);

fn offer() -> Offer {
    let block = Block { name: "pc.ram".into(), bytes: 1 << 20, travels: true };
    Offer {
        vm: "db".into(),
        generation: GENERATION,
        blocks: vec![block],
        streams: STREAMS,
        common: true,
        expected_bytes: 0,
        account: false,
        ..Offer::default()
    }
}

fn hello() -> Hello {
    let (version_min, version_max) = (wire::VERSION_MIN, wire::VERSION_MAX);
    Hello { version_min, version_max, id: ID.0.to_vec(), software: "test".into() }
}

fn any_message() -> impl Strategy<Value = Message> {
    let generation = prop_oneof![3 => Just(GENERATION), 1 => any::<u64>()];
    prop_oneof![
        Just(Message::Hello(hello())),
        (0u32..3).prop_map(|version| Message::Welcome(Welcome { version, software: String::new() })),
        Just(Message::Offer(offer())),
        any::<u32>().prop_map(|streams| Message::Offer(Offer { streams, ..offer() })),
        Just(Message::Accepted(Accepted::default())),
        Just(Message::Accepted(Accepted { room: 3, ..Accepted::default() })),
        any::<bool>().prop_map(|pending| Message::Common(Common { pending, ..Common::default() })),
        Just(Message::Mapped(Mapped { runs: 1 })),
        Just(Message::Refused(Refused { reasons: vec![Reason::default()] })),
        (0u32..5, 0u32..70).prop_map(|(round, stream)| Message::Barrier(Barrier { round, stream })),
        (0u32..5).prop_map(|last_round| Message::StateEnd(StateEnd { last_round, ..StateEnd::default() })),
        Just(Message::Loaded(Loaded::default())),
        generation.clone().prop_map(|generation| Message::Release(Release { generation })),
        generation
            .prop_map(|generation| Message::Committed(Committed { generation, ..Committed::default() })),
        Just(Message::NotCommitted(Text::default())),
        Just(Message::Filled(Filled { generation: GENERATION, ..Filled::default() })),
        Just(Message::Abort(Text::default())),
        Just(Message::Query(Query::default())),
    ]
}

fn any_source_input() -> impl Strategy<Value = SourceInput> {
    let ownership = prop_oneof![
        Just(Ownership::Target),
        Just(Ownership::Source),
        Just(Ownership::Undecided),
        Just(Ownership::Fetching),
        Just(Ownership::Ended),
        Just(Ownership::Unknown)
    ];
    prop_oneof![
        8 => any_message().prop_map(SourceInput::Message),
        1 => Just(SourceInput::Disconnected("cut".into())),
        1 => Just(SourceInput::Recorded),
        1 => Just(SourceInput::RecordFailed("full".into())),
        1 => Just(SourceInput::Opened),
        1 => any::<u64>().prop_map(|pages| SourceInput::Tracked(Pages(pages))),
        1 => Just(SourceInput::Sharing),
        1 => any::<u64>().prop_map(|pages| SourceInput::Shared(Pages(pages))),
        1 => any::<u64>().prop_map(|bytes| SourceInput::Sent(Bytes(bytes))),
        1 => any::<u64>().prop_map(|pages| SourceInput::Scanned(Pages(pages))),
        1 => (0u64..9).prop_map(|pages| SourceInput::Stopped(Pages(pages))),
        1 => (0u64..2).prop_map(|pages| SourceInput::Finished(Pages(pages))),
        1 => Just(SourceInput::Resumed),
        1 => Just(SourceInput::ResumeFailed("no".into())),
        1 => ownership.prop_map(SourceInput::Answered),
        1 => Just(SourceInput::AskFailed("no".into())),
        1 => Just(SourceInput::Ended),
        1 => Just(SourceInput::Failed("no".into())),
        1 => Just(SourceInput::Cancel),
        1 => Just(SourceInput::Switch),
        1 => Just(SourceInput::PagesLost("killed".into())),
        1 => Just(SourceInput::Reattached),
        1 => Just(SourceInput::DowntimeLimit(Duration::from_millis(1))),
        1 => Just(SourceInput::Tick),
    ]
}

fn any_postcopy() -> impl Strategy<Value = Postcopy> {
    use Postcopy::{AfterPrecopy, AtOnce, AtTimeout, OnDemand};
    prop_oneof![Just(OnDemand), Just(AtOnce), Just(AfterPrecopy), Just(AtTimeout)]
}

fn any_lazily() -> impl Strategy<Value = Lazily> {
    prop_oneof![Just(Lazily::Yes { eager: Vec::new() }), Just(Lazily::No("a file".into()))]
}

fn any_target_input() -> impl Strategy<Value = TargetInput> {
    prop_oneof![
        6 => any_message().prop_map(TargetInput::Message),
        1 => Just(TargetInput::Disconnected("cut".into())),
        1 => Just(TargetInput::Admitted),
        1 => Just(TargetInput::Refused(vec![Reason::default()])),
        1 => Just(TargetInput::Recorded(Duration::from_millis(1))),
        1 => Just(TargetInput::RecordFailed("full".into())),
        1 => any_lazily().prop_map(|lazily| TargetInput::Prepared { lazily, room: 3, head_room: -1 }),
        1 => any::<u32>().prop_map(TargetInput::Mapped),
        1 => Just(TargetInput::Filled(Filled::default())),
        1 => Just(TargetInput::Died("killed".into())),
        1 => any::<u64>().prop_map(TargetInput::Reattached),
        1 => Just(TargetInput::Received),
        2 => (0u32..4, 0u32..4).prop_map(|(stream, round)| TargetInput::RoundEnd { stream, round }),
        1 => Just(TargetInput::Loaded(1)),
        1 => Just(TargetInput::Running(Duration::from_millis(1))),
        1 => Just(TargetInput::RunFailed("no".into())),
        1 => Just(TargetInput::Dead),
        1 => Just(TargetInput::Failed("no".into())),
        1 => Just(TargetInput::Cancel),
        1 => Just(TargetInput::Tick),
    ]
}

/// Some inputs are what an honest driver and peer would say next; between them comes anything.
fn mixed<T: Clone + std::fmt::Debug>(
    any: impl Strategy<Value = T>,
) -> impl Strategy<Value = Vec<(Option<T>, u64)>> {
    prop::collection::vec((prop::option::weighted(0.15, any), 0u64..400), 0..80)
}

struct SourceDriver {
    source: Source,
    now: Duration,
    honest: VecDeque<SourceInput>,
    record_stored: bool,
    released: bool,
    proof: bool,
    owned_by_target: bool,
    /// The target runs the VM, and needs pages of it.
    needed: bool,
    /// The part of its time that the guest has.
    keep: u32,
    overs: u32,
}

impl SourceDriver {
    fn new(postcopy: Postcopy) -> Self {
        let parameters = SourceParameters {
            id: ID,
            peer: "b".into(),
            offer: offer(),
            downtime_limit: Duration::from_millis(300),
            timeout: None,
            activity: Activity::Running,
            rate: RateLimits::default(),
            auto_converge: true,
            postcopy,
            awaits: false,
        };
        Self {
            source: Source::new(parameters, Duration::ZERO),
            now: Duration::ZERO,
            honest: VecDeque::new(),
            record_stored: false,
            released: false,
            proof: false,
            owned_by_target: false,
            needed: false,
            keep: KEEP_ALL,
            overs: 0,
        }
    }

    fn feed(&mut self, input: SourceInput) {
        match &input {
            SourceInput::Message(Message::NotCommitted(_)) | SourceInput::Answered(Ownership::Source) => {
                self.proof |= self.released;
            }
            SourceInput::Answered(Ownership::Target | Ownership::Ended) => {
                (self.owned_by_target, self.needed) = (true, false);
            }
            SourceInput::Message(Message::Committed(_)) | SourceInput::Answered(Ownership::Fetching) => {
                self.owned_by_target = true;
            }
            SourceInput::Message(Message::Filled(_)) => self.needed = false,
            _ => {}
        }
        self.source.handle(input, self.now);
        // Not every word is taken: only in its turn.
        let status = self.source.status(self.now);
        self.needed |= matches!(status, Status::PostcopyActive | Status::PostcopyRecover);
        let _ = (self.source.can_cancel(), self.source.progress());
        while let Some(action) = self.source.poll() {
            self.act(action);
        }
    }

    fn act(&mut self, action: SourceAction) {
        use SourceInput as In;
        match action {
            SourceAction::Record(record) => {
                self.record_stored |= record.step == Step::Released;
                self.honest.push_back(In::Recorded);
            }
            SourceAction::Send(message) => self.sent(message),
            SourceAction::OpenStreams(_) => self.honest.push_back(In::Opened),
            SourceAction::Track => self.honest.push_back(In::Tracked(Pages(9))),
            SourceAction::Share => self.honest.extend([In::Sharing, In::Shared(Pages(7))]),
            SourceAction::SendRound(round)
            | SourceAction::TellStale(round)
            | SourceAction::Finish(round)
            | SourceAction::FinishPostcopy(round) => {
                let barrier = |stream| In::Message(Message::Barrier(Barrier { round, stream }));
                self.honest.extend((0..STREAMS).map(barrier));
                // Too early during a round, and then it is out of turn; right after the last one.
                if !matches!(action, SourceAction::SendRound(_) | SourceAction::TellStale(_)) {
                    self.honest.push_back(In::Finished(Pages(0)));
                    self.honest.push_back(In::Message(Message::Loaded(Loaded::default())));
                }
            }
            SourceAction::Pace(_) | SourceAction::Abandon | SourceAction::OpenDemand => {}
            SourceAction::Push => {
                assert!(self.needed || !self.owned_by_target, "served nobody");
                let filled = Filled { generation: GENERATION, ..Filled::default() };
                self.honest.push_back(In::Message(Message::Filled(filled)));
            }
            SourceAction::Reattach => self.honest.push_back(In::Reattached),
            SourceAction::Stun(keep) => {
                assert!((1..=KEEP_ALL).contains(&keep), "below the floor");
                self.keep = keep;
            }
            SourceAction::Scan => self.honest.push_back(In::Scanned(Pages(0))),
            SourceAction::Settle => self.honest.push_back(In::Settled(Pages(0))),
            SourceAction::Stop => {
                assert_eq!(self.keep, KEEP_ALL, "a guest that has little time stops late");
                self.honest.push_back(In::Stopped(Pages(1)));
            }
            SourceAction::Resume => {
                assert!(!self.released || self.proof, "resumed after a release without proof");
                self.honest.push_back(In::Resumed);
            }
            SourceAction::Release => {}
            SourceAction::Reply(_) => panic!("nobody has asked"),
            SourceAction::Ask => self.honest.push_back(In::Answered(Ownership::Undecided)),
            SourceAction::End => {
                assert!(self.released && self.owned_by_target, "ended a VM that nobody else owns");
                assert!(!self.needed, "ended what the target needs pages of");
                self.honest.push_back(In::Ended);
            }
            SourceAction::Over(outcome) => {
                self.overs += 1;
                assert_eq!(self.keep, KEEP_ALL, "the guest was left stunned");
                let lost = matches!(outcome, Outcome::PagesLost(_) | Outcome::EndedThere(_));
                assert!(!lost || self.owned_by_target, "pages that nobody needs");
                let kept = outcome != Outcome::Completed && !lost;
                assert!(!kept || !self.released || self.proof, "gave up a released VM: {outcome:?}");
                assert_ne!(self.source.status(self.now) == Status::Completed, kept || lost);
            }
        }
    }

    fn sent(&mut self, message: Message) {
        let reply = match message {
            Message::Hello(_) => {
                Message::Welcome(Welcome { version: wire::VERSION_MAX, software: String::new() })
            }
            Message::Offer(_) => {
                Message::Accepted(Accepted { postcopy: true, room: 3, ..Accepted::default() })
            }
            Message::Release(release) => {
                assert!(self.record_stored, "released before the record was asked for");
                self.released = true;
                let generation = release.generation;
                Message::Committed(Committed { generation, ..Committed::default() })
            }
            _ => return,
        };
        self.honest.push_back(SourceInput::Message(reply));
    }
}

struct TargetDriver {
    postcopy: bool,
    died: bool,
    target: Target,
    now: Duration,
    honest: VecDeque<TargetInput>,
    loaded: bool,
    release_seen: bool,
    commit_stored: bool,
    run_recorded: bool,
    adopted: bool,
    mapped: bool,
    runs: u32,
    killed: bool,
    dead: bool,
    overs: u32,
}

impl TargetDriver {
    fn new(postcopy: bool) -> Self {
        let mut driver = Self {
            postcopy,
            died: false,
            target: Target::new(&hello(), "a", Duration::ZERO),
            now: Duration::ZERO,
            honest: VecDeque::from([TargetInput::Message(Message::Offer(offer()))]),
            loaded: false,
            release_seen: false,
            commit_stored: false,
            run_recorded: false,
            adopted: false,
            mapped: false,
            runs: 0,
            killed: false,
            dead: false,
            overs: 0,
        };
        driver.drain();
        driver
    }

    fn feed(&mut self, input: TargetInput) {
        match &input {
            TargetInput::Message(Message::Release(release)) if release.generation == GENERATION => {
                self.release_seen |= self.loaded;
            }
            TargetInput::Dead => self.dead |= self.killed,
            TargetInput::Died(_) => self.died = true,
            _ => {}
        }
        self.target.handle(input, self.now);
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(action) = self.target.poll() {
            self.act(action);
        }
    }

    fn act(&mut self, action: TargetAction) {
        use TargetInput as In;
        match action {
            TargetAction::Send(message) => self.sent(&message),
            TargetAction::Check(_) => self.honest.push_back(In::Admitted),
            TargetAction::Record(record) => {
                let late = record.step == Step::Dead && !self.dead;
                assert!(!late, "a death was written down before it was reported");
                self.commit_stored |= record.step == Step::Committed;
                self.run_recorded |= matches!(record.step, Step::Running | Step::Fetching);
                self.honest.push_back(In::Recorded(Duration::from_millis(1)));
            }
            TargetAction::Prepare(_) => {
                self.honest.push_back(In::Prepared {
                    lazily: Lazily::Yes { eager: Vec::new() },
                    room: 0,
                    head_room: 0,
                });
            }
            TargetAction::Map(common) => {
                assert!(!common.pending && !self.mapped, "mapped twice, or nothing");
                self.mapped = true;
                self.honest.push_back(In::Mapped(0));
            }
            TargetAction::Load(_) => self.honest.push_back(In::Loaded(1)),
            TargetAction::Run => {
                assert!(self.release_seen && self.commit_stored, "ran without a release or its record");
                assert!(!self.killed, "ran what was to be killed");
                self.runs += 1;
                self.honest.push_back(In::Running(Duration::from_millis(1)));
            }
            TargetAction::Adopt => self.adopted = true,
            TargetAction::Strand(_) => {}
            TargetAction::Announce => self.honest.push_back(In::Filled(Filled::default())),
            TargetAction::Kill => {
                self.killed = true;
                self.honest.push_back(In::Dead);
            }
            TargetAction::Over(result) => {
                self.overs += 1;
                let runs = self.runs == 1 && !self.killed;
                assert_eq!(self.target.owns(), runs);
                // What ran and ended before it was complete was this host's all the same.
                assert!(result.is_ok() == runs || (runs && self.died), "{result:?}");
            }
        }
    }

    fn sent(&mut self, message: &Message) {
        match message {
            Message::Accepted(_) => {
                self.honest.push_back(TargetInput::Message(Message::Common(Common::default())));
                let end = |stream| TargetInput::RoundEnd { stream, round: 1 };
                self.honest.extend((0..STREAMS).map(end));
                let end = StateEnd { last_round: 1, postcopy: self.postcopy, ..StateEnd::default() };
                self.honest.push_back(TargetInput::Message(Message::StateEnd(end)));
            }
            Message::Loaded(_) => {
                self.loaded = true;
                let release = Release { generation: GENERATION };
                self.honest.push_back(TargetInput::Message(Message::Release(release)));
            }
            Message::Committed(_) => {
                assert_eq!((self.runs, self.killed), (1, false), "committed and not running");
                assert!(self.run_recorded && self.adopted, "told, and not one of the host's own VMs yet");
            }
            Message::NotCommitted(_) => assert!(self.dead, "a death was told before it was reported"),
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_source_never_takes_back_without_proof(
        inputs in mixed(any_source_input()), postcopy in any_postcopy(),
    ) {
        let mut driver = SourceDriver::new(postcopy);
        driver.feed(SourceInput::DowntimeLimit(Duration::from_millis(300)));
        for (input, wait_ms) in inputs {
            driver.now += Duration::from_millis(wait_ms);
            if let Some(input) = input.or_else(|| driver.honest.pop_front()) {
                driver.feed(input);
            }
        }
        // From here on all that is outstanding is answered, and time passes: it ends, once.
        for _ in 0..400 {
            let answered = match driver.honest.pop_front() {
                // Who runs a VM does not give it back.
                Some(SourceInput::Answered(_)) if driver.owned_by_target => SourceInput::Answered(Ownership::Target),
                Some(SourceInput::Answered(_)) => SourceInput::Answered(Ownership::Source),
                Some(input) => input,
                None => SourceInput::Tick,
            };
            driver.feed(answered);
            driver.now = driver.now.max(driver.source.deadline().unwrap_or_default());
        }
        prop_assert_eq!(driver.overs, 1);
    }

    #[test]
    fn a_target_never_runs_without_a_release(inputs in mixed(any_target_input()), postcopy in any::<bool>()) {
        let mut driver = TargetDriver::new(postcopy);
        for (input, wait_ms) in inputs {
            driver.now += Duration::from_millis(wait_ms);
            if let Some(input) = input.or_else(|| driver.honest.pop_front()) {
                driver.feed(input);
            }
        }
        for _ in 0..400 {
            let input = driver.honest.pop_front().unwrap_or(TargetInput::Tick);
            driver.feed(input);
            driver.now = driver.now.max(driver.target.deadline().unwrap_or_default());
        }
        prop_assert_eq!(driver.overs, 1);
    }
}

#[test]
fn left_alone_with_honest_peers_both_machines_hand_over() {
    for postcopy in [Postcopy::OnDemand, Postcopy::AtOnce, Postcopy::AfterPrecopy] {
        hand_over(postcopy);
    }
}

fn hand_over(postcopy: Postcopy) {
    let mut source = SourceDriver::new(postcopy);
    source.feed(SourceInput::DowntimeLimit(Duration::from_millis(300)));
    while let Some(input) = source.honest.pop_front() {
        source.now += Duration::from_millis(1);
        source.feed(input);
    }
    assert!(source.released && source.overs == 1);
    assert_eq!(source.source.status(source.now), Status::Completed);
    assert_eq!(source.source.is_postcopy(), postcopy == Postcopy::AtOnce);
    let mut target = TargetDriver::new(postcopy == Postcopy::AtOnce);
    while let Some(input) = target.honest.pop_front() {
        target.feed(input);
    }
    assert!(target.target.owns() && target.overs == 1);
}

fn record(generation: u64, step: Step) -> Record {
    Record {
        id: ID,
        generation: Generation(generation),
        vm: "db".into(),
        peer: "a".into(),
        step,
        activity: Activity::Running,
    }
}

/// A target whose commit was stored, but whose QEMU had not run yet, answered that it owned the VM. The start could
/// still fail, which gives the VM back; a source that had asked in between had ended its own QEMU, and the VM was lost.
#[test]
fn a_commit_is_no_answer_until_the_vm_was_seen_running() {
    let ask = |step, lives| answer(ID, Generation(GENERATION), Some(&record(GENERATION, step)), lives);
    assert_eq!(ask(Step::Committed, true), Ownership::Undecided);
    assert_eq!(ask(Step::Committed, false), Ownership::Unknown);
    assert_eq!(ask(Step::Running, true), Ownership::Target);
    assert_eq!(ask(Step::Fetching, true), Ownership::Fetching);
    assert_eq!(ask(Step::Fetching, false), Ownership::Ended, "it must not be taken for one that has moved");
    assert_eq!(ask(Step::Incoming, true), Ownership::Undecided);
    assert_eq!(ask(Step::Dead, false), Ownership::Source);
}

#[test]
fn newer_records_prove_that_the_vm_came_and_went() {
    let (old, new) = (Generation(GENERATION), record(GENERATION + 1, Step::Sending));
    assert_eq!(answer(ID, old, Some(&new), true), Ownership::Target);
    assert_eq!(
        answer(MigrationId([1; 16]), old, Some(&record(GENERATION + 1, Step::Dead)), false),
        Ownership::Target
    );
    assert_eq!(
        answer(MigrationId([1; 16]), old, Some(&record(GENERATION, Step::Dead)), false),
        Ownership::Unknown
    );
    assert_eq!(answer(ID, old, None, false), Ownership::Unknown);
}

/// A target that lost its source while the record of the waiting QEMU was being stored forgot that there was one: it
/// killed the QEMU and left the record saying that one waits, for ever.
#[test]
fn a_record_under_way_when_the_link_is_lost_is_buried_too() {
    let mut driver = TargetDriver::new(false);
    driver.feed(TargetInput::Message(Message::Offer(offer())));
    driver.feed(TargetInput::Admitted);
    driver.feed(TargetInput::Disconnected("cut".into()));
    driver.feed(TargetInput::Recorded(Duration::from_millis(1)));
    driver.honest.clear();
    driver.feed(TargetInput::Dead);
    assert_eq!(driver.honest.len(), 1, "the death was not written down");
}

/// A target that could not store its QEMU's death, or that its VM runs, let it be. The record went on saying that it was
/// still at it, and a source that asked was told to ask again, until the agent was restarted.
#[test]
fn a_last_record_that_fails_is_stored_again() {
    for runs in [true, false] {
        let mut driver = TargetDriver::new(false);
        while driver.runs == 0 {
            let input = driver.honest.pop_front().expect("an honest source leads to the start");
            driver.feed(input);
        }
        driver.feed(match runs {
            true => TargetInput::Running(Duration::ZERO),
            false => TargetInput::RunFailed("no".into()),
        });
        if !runs {
            driver.feed(TargetInput::Dead);
        }
        for _ in 0..3 {
            driver.honest.clear();
            driver.feed(TargetInput::RecordFailed("full".into()));
            assert_eq!(driver.overs, 0);
            driver.now = driver.target.deadline().expect("a deadline");
            driver.feed(TargetInput::Tick);
            assert_eq!(driver.honest.len(), 1, "the record was not stored again");
        }
        driver.feed(TargetInput::Recorded(Duration::ZERO));
        assert_eq!((driver.overs, driver.target.owns()), (1, runs));
    }
}

/// A driver that reported its figures after the barriers of the first round made its bandwidth zero. Later rounds were
/// too short to measure another, nothing ever fitted the downtime limit, and the VM was never stopped.
#[test]
fn figures_that_come_late_do_not_keep_the_vm_from_stopping() {
    let mut driver = SourceDriver::new(Postcopy::OnDemand);
    driver.feed(SourceInput::DowntimeLimit(Duration::from_millis(300)));
    let mut sent = 0;
    while !driver.released {
        let input = driver.honest.pop_front().expect("an honest target leads to the release");
        driver.now += Duration::from_millis(1);
        let scanned = matches!(input, SourceInput::Scanned(_));
        driver.feed(if scanned { SourceInput::Scanned(Pages(20)) } else { input });
        if scanned {
            sent += 80_000;
            driver.feed(SourceInput::Sent(Bytes(sent)));
        }
        assert!(driver.source.progress().rounds < 30, "it never stops");
    }
}

#[test]
fn an_identity_is_32_hexadecimal_digits_and_nothing_else() {
    let text = ID.to_string();
    assert_eq!(text.parse(), Ok(ID));
    for bad in ["", "0", &text[1..], &format!("{text}0"), &"+1".repeat(16), &"é".repeat(16)] {
        assert_eq!(bad.parse::<MigrationId>(), Err(()), "{bad}");
    }
}
