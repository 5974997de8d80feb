//! An operator's decision about a VM whose target does not answer: every order of what the source's operator, the source's
//! restarted agent and the target's can do is tried, and never do two QEMUs run the VM, or none that could.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;
use sterna_engine::handoff::{
    Activity, Choice, Continuation, Generation, MigrationId, Ownership, Record, Step, answer,
    answer_to_target, may_continue,
};
use sterna_engine::source::{Outcome, Source, SourceAction, SourceInput};
use sterna_engine::wire::Message;
use sterna_engine::wire::message::{Committed, Text};

const ID: MigrationId = MigrationId([5; 16]);
const GENERATION: u64 = 7;
const NOW: Duration = Duration::from_secs(60);

fn record(generation: u64, step: Step) -> Record {
    Record {
        id: ID,
        generation: Generation(generation),
        vm: "db".into(),
        peer: "b".into(),
        step,
        activity: Activity::Running,
    }
}

/// A source that asks in vain; its first question is taken out.
fn asking() -> Source {
    let mut source = Source::recover(&record(GENERATION, Step::Released), Duration::ZERO);
    assert_eq!(source.poll(), Some(SourceAction::Ask));
    source.handle(SourceInput::AskFailed("no answer".into()), NOW);
    source
}

/// All actions that are due.
fn drain(source: &mut Source) -> Vec<SourceAction> {
    std::iter::from_fn(|| source.poll()).collect()
}

fn decided(choice: Choice, answer: SourceInput) -> (Source, Vec<SourceAction>) {
    let mut source = asking();
    source.handle(SourceInput::Recover(choice), NOW);
    assert_eq!(drain(&mut source), [SourceAction::Ask], "the target is asked once more");
    source.handle(answer, NOW);
    let actions = drain(&mut source);
    (source, actions)
}

fn no_answer() -> SourceInput {
    SourceInput::AskFailed("no answer".into())
}

fn is_refused(action: &SourceAction) -> bool {
    matches!(action, SourceAction::Reply(Err(_)))
}

#[test]
fn here_fences_before_it_resumes() {
    for answer in [no_answer(), SourceInput::Answered(Ownership::Unknown)] {
        let (mut source, actions) = decided(Choice::Here, answer);
        assert_eq!(actions, [SourceAction::Record(record(GENERATION + 1, Step::Fenced))]);
        // What the old try still says counts no more.
        let committed = Committed { generation: GENERATION, ..Committed::default() };
        source.handle(SourceInput::Message(Message::Committed(committed)), NOW);
        source.handle(SourceInput::Message(Message::NotCommitted(Text::default())), NOW);
        source.handle(SourceInput::Disconnected("late".into()), NOW);
        source.handle(SourceInput::Failed("late".into()), NOW);
        source.handle(SourceInput::Cancel, NOW);
        assert_eq!(drain(&mut source), []);
        source.handle(SourceInput::Recorded, NOW);
        assert_eq!(drain(&mut source), [SourceAction::Resume]);
        source.handle(SourceInput::Resumed, NOW);
        let actions = drain(&mut source);
        assert_eq!(actions[0], SourceAction::Reply(Ok(())));
        assert!(actions.contains(&SourceAction::Record(record(GENERATION + 1, Step::Kept))), "{actions:?}");
        assert!(matches!(actions.last(), Some(SourceAction::Over(Outcome::Failed(_)))), "{actions:?}");
    }
}

/// The image's lock, or a disk that takes no record.
#[test]
fn a_vm_that_cannot_be_taken_back_is_asked_about_again() {
    for resume in [true, false] {
        let (mut source, _) = decided(Choice::Here, no_answer());
        if resume {
            source.handle(SourceInput::Recorded, NOW);
            assert_eq!(drain(&mut source), [SourceAction::Resume]);
            source.handle(SourceInput::ResumeFailed("locked".into()), NOW);
        } else {
            source.handle(SourceInput::RecordFailed("full".into()), NOW);
        }
        let actions = drain(&mut source);
        assert_eq!(actions[0], SourceAction::Record(record(GENERATION, Step::Released)));
        assert!(is_refused(&actions[1]) && actions.len() == 2, "{actions:?}");
        source.handle(SourceInput::Tick, source.deadline().unwrap());
        assert_eq!(drain(&mut source), [SourceAction::Ask]);
        source.handle(SourceInput::Answered(Ownership::Target), NOW);
        assert_eq!(drain(&mut source), [SourceAction::Record(record(GENERATION, Step::Gone))]);
    }
}

#[test]
fn there_ends_what_is_left_here() {
    let (mut source, actions) = decided(Choice::There, no_answer());
    assert_eq!(actions, [SourceAction::Record(record(GENERATION, Step::Gone))]);
    source.handle(SourceInput::Recorded, NOW);
    assert_eq!(drain(&mut source), [SourceAction::End]);
    source.handle(SourceInput::Ended, NOW);
    let over = [SourceAction::Reply(Ok(())), SourceAction::Release, SourceAction::Over(Outcome::Completed)];
    assert_eq!(drain(&mut source), over);
}

#[test]
fn an_answer_goes_before_the_operators_word() {
    let (_, actions) = decided(Choice::Here, SourceInput::Answered(Ownership::Target));
    assert!(
        is_refused(&actions[0]) && actions.contains(&SourceAction::Record(record(GENERATION, Step::Gone)))
    );
    let (_, actions) = decided(Choice::There, SourceInput::Answered(Ownership::Source));
    assert!(actions[0] == SourceAction::Resume && actions.iter().any(is_refused), "{actions:?}");
    for choice in [Choice::Here, Choice::There] {
        let (mut source, actions) = decided(choice, SourceInput::Answered(Ownership::Undecided));
        assert!(is_refused(&actions[0]) && actions.len() == 1, "{actions:?}");
        // The question stays, and may be decided later.
        source.handle(SourceInput::Recover(choice), NOW);
        assert_eq!(drain(&mut source), [SourceAction::Ask]);
    }
    let agreed = decided(Choice::Here, SourceInput::Answered(Ownership::Source)).1;
    assert!(agreed[0] == SourceAction::Resume && !agreed.iter().any(is_refused), "{agreed:?}");
}

#[test]
fn nothing_is_decided_about_a_vm_that_is_not_unresolved() {
    let (mut source, _) = decided(Choice::There, no_answer());
    source.handle(SourceInput::Recover(Choice::Here), NOW);
    let actions = drain(&mut source);
    assert!(is_refused(&actions[0]) && actions.len() == 1, "{actions:?}");
}

/// A small world: what each host has on its disk, and which QEMU runs.
#[derive(Clone)]
struct World {
    source: Record,
    target: Record,
    source_runs: bool,
    target_runs: bool,
    target_lives: bool,
    promised: bool,
    /// The source's operator is past the last question, which nobody answered.
    deciding: bool,
}

/// What can happen next, in any order and as often as it likes.
#[derive(Clone, Copy, Debug)]
enum Event {
    OperatorAsks,
    OperatorFences,
    SourceRestarts,
    SourceAsks,
    TargetAsks,
}

const EVENTS: [Event; 5] =
    [Event::OperatorAsks, Event::OperatorFences, Event::SourceRestarts, Event::SourceAsks, Event::TargetAsks];

impl World {
    fn happens(&mut self, event: Event) {
        match event {
            // Nobody answers: the target's agent is dead until its first question.
            Event::OperatorAsks => self.deciding = self.source.step == Step::Released,
            Event::OperatorFences if self.deciding => {
                self.deciding = false;
                if !std::mem::take(&mut self.promised) {
                    self.source = record(GENERATION + 1, Step::Fenced);
                    self.source_runs = true;
                }
            }
            Event::SourceRestarts => {
                self.deciding = false;
                self.source_runs |= self.source.step == Step::Fenced;
            }
            Event::SourceAsks if self.source.step == Step::Released => self.source_asks(),
            Event::TargetAsks if self.target.step == Step::Committed => self.target_asks(),
            _ => {}
        }
    }

    fn source_asks(&mut self) {
        match answer(ID, Generation(GENERATION), Some(&self.target), self.target_lives) {
            Ownership::Target => self.source.step = Step::Gone,
            Ownership::Source => self.source_runs = true,
            _ => {}
        }
    }

    fn target_asks(&mut self) {
        let said = answer_to_target(ID, Generation(GENERATION), Some(&self.source));
        self.promised |= said == Ownership::Target;
        match may_continue(Some(said)) {
            Continuation::Run => {
                self.target_runs = true;
                self.target.step = Step::Running;
            }
            Continuation::Kill => {
                self.target_lives = false;
                self.target.step = Step::Dead;
            }
            Continuation::Ask => {}
        }
    }

    fn check(&self, story: &[Event]) {
        assert!(!(self.source_runs && self.target_runs), "two run: {story:?}");
        let source_may = self.source.step != Step::Gone;
        assert!(source_may || self.target_lives, "nobody can run it: {story:?}");
    }
}

fn live(world: &World, story: &mut Vec<Event>, left: u32) {
    world.check(story);
    if left == 0 {
        return;
    }
    for event in EVENTS {
        let mut next = world.clone();
        next.happens(event);
        story.push(event);
        // An operator who saw the refusal insists only while the target does not run the VM: that is what it asks for.
        if !(matches!(event, Event::OperatorFences) && world.target_runs && !world.promised) {
            live(&next, story, left - 1);
        }
        story.pop();
    }
}

/// The target committed and did not run the VM, its agent is dead, and the source does not know.
#[test]
fn in_whatever_order_things_happen_one_runs() {
    let world = World {
        source: record(GENERATION, Step::Released),
        target: record(GENERATION, Step::Committed),
        source_runs: false,
        target_runs: false,
        target_lives: true,
        promised: false,
        deciding: false,
    };
    live(&world, &mut Vec::new(), 7);
}

#[test]
fn a_target_runs_what_was_not_taken_back() {
    let to =
        |record: Option<&Record>| may_continue(Some(answer_to_target(ID, Generation(GENERATION), record)));
    for step in [Step::Sending, Step::Released, Step::Gone] {
        assert_eq!(to(Some(&record(GENERATION, step))), Continuation::Run);
    }
    // A host that lost its later records lost its QEMU with them.
    assert_eq!(to(Some(&record(GENERATION - 1, Step::Kept))), Continuation::Run);
    assert_eq!(to(None), Continuation::Run);
    for step in [Step::Fenced, Step::Kept, Step::Sending, Step::Gone, Step::Running] {
        assert_eq!(to(Some(&record(GENERATION + 1, step))), Continuation::Kill);
    }
    assert_eq!(may_continue(None), Continuation::Ask);
    assert_eq!(may_continue(Some(Ownership::Undecided)), Continuation::Ask);
    assert!(Step::Fenced.must_be_durable());
}
