//! The target's machine, fed with what a hostile source may send and what its own host may say. Each byte of a script
//! picks a step; messages are decoded from the bytes that follow. The VM must not run without a release, nor a QEMU
//! that was to be killed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::time::Duration;
use sterna_engine::handoff::Step;
use sterna_engine::target::{Lazily, Target, TargetAction, TargetInput};
use sterna_engine::wire::control::decode_message;
use sterna_engine::wire::message::{Hello, Offer, Reason, Release, StateEnd};
use sterna_engine::wire::{Message, VERSION_MAX, VERSION_MIN};

const GENERATION: u64 = 3;

#[derive(Default)]
struct Seen {
    offered: Option<u64>,
    loaded: bool,
    released: bool,
    recorded: bool,
    killed: bool,
    overs: u32,
}

fuzz_target!(|data: &[u8]| {
    let hello =
        Hello { version_min: VERSION_MIN, version_max: VERSION_MAX, id: vec![1; 16], ..Hello::default() };
    let mut target = Target::new(&hello, "peer", Duration::ZERO);
    let (mut seen, mut now, mut rest) = (Seen::default(), Duration::ZERO, data);
    while let Some(input) = next_input(&mut rest) {
        if let TargetInput::Message(Message::Release(release)) = &input {
            seen.released |= seen.loaded && Some(release.generation) == seen.offered;
        }
        now += Duration::from_millis(700);
        target.handle(input, now);
        while let Some(action) = target.poll() {
            check(&mut seen, action);
        }
    }
    assert!(seen.overs <= 1);
});

fn check(seen: &mut Seen, action: TargetAction) {
    match action {
        TargetAction::Check(offer) => seen.offered = Some(offer.generation),
        TargetAction::Send(Message::Loaded(_)) => seen.loaded = true,
        TargetAction::Record(record) => seen.recorded |= record.step == Step::Committed,
        TargetAction::Run => assert!(seen.released && seen.recorded && !seen.killed),
        TargetAction::Kill => seen.killed = true,
        TargetAction::Over(_) => seen.overs += 1,
        _ => {}
    }
}

fn next_input(rest: &mut &[u8]) -> Option<TargetInput> {
    let kind = take(rest, 1)?[0];
    let took = Duration::from_millis(1);
    Some(match kind % 20 {
        0 => {
            let bytes = take(rest, 1)?[0].into();
            TargetInput::Message(decode_message(take(rest, bytes)?).ok()?)
        }
        1 => TargetInput::Message(Message::Offer(Offer {
            streams: 1,
            generation: GENERATION,
            ..Offer::default()
        })),
        2 => TargetInput::Admitted,
        3 => TargetInput::Recorded(took),
        4 => TargetInput::Prepared { lazily: Lazily::No(String::new()), room: 3 },
        5 => {
            let raw = take(rest, 2)?;
            TargetInput::RoundEnd { stream: raw[0].into(), round: raw[1].into() }
        }
        6 => TargetInput::Message(Message::StateEnd(StateEnd { last_round: 1, ..StateEnd::default() })),
        7 => TargetInput::Loaded(0),
        8 => TargetInput::Message(Message::Release(Release { generation: GENERATION })),
        9 => TargetInput::Running(took),
        10 => TargetInput::RunFailed("no".into()),
        11 => TargetInput::Dead,
        12 => TargetInput::RecordFailed("full".into()),
        13 => TargetInput::Disconnected("cut".into()),
        14 => TargetInput::Refused(vec![Reason::default()]),
        15 => TargetInput::Failed("no".into()),
        16 => TargetInput::Cancel,
        17 => TargetInput::Received,
        18 => TargetInput::RoundEnd { stream: 0, round: 1 },
        _ => TargetInput::Tick,
    })
}

fn take<'a>(rest: &mut &'a [u8], bytes: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(bytes)?;
    *rest = tail;
    Some(head)
}
