//! The rounds of a source, driven through the machine by guests that write as recorded or made up: how fast they go, when they rest, whom they
//! slow, and that all of it ends.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use proptest::prelude::*;
use std::time::Duration;
use sterna_engine::Status;
use sterna_engine::handoff::{Activity, MigrationId};
use sterna_engine::policy::{KEEP_ALL, RateLimits};
use sterna_engine::source::{Outcome, Postcopy, Source, SourceAction, SourceInput, SourceParameters};
use sterna_engine::units::{Bytes, Pages, Rate};
use sterna_engine::wire::message::{Accepted, Barrier, Block, Offer, Reason, Refused, Welcome};
use sterna_engine::wire::{Message, VERSION_MAX};

/// Pages of RAM: 512 MiB.
const RAM: u64 = 131_072;
/// What the link takes.
const LINK: u64 = 119_000_000;

/// A guest that writes pages of a working set over and over.
#[derive(Clone, Copy, Debug)]
struct Guest {
    pages: u64,
    bytes_per_second: u64,
}

impl Guest {
    /// Different pages written in so much time, with this part of the guest's own.
    fn written(&self, time: Duration, keep: u32) -> u64 {
        let all = time.as_secs_f64() * self.bytes_per_second as f64 * f64::from(keep)
            / f64::from(KEEP_ALL)
            / 4096.0;
        (all as u64).min(self.pages)
    }
}

/// What a migration was like.
#[derive(Debug, Default)]
struct Seen {
    paces: Vec<Option<Rate>>,
    keeps: Vec<u32>,
    rounds: u32,
    stopped: Option<u64>,
    rested: u32,
}

fn parameters(rate: RateLimits, auto_converge: bool, limit: Duration) -> SourceParameters {
    let block = Block { name: "ram".into(), bytes: RAM * 4096, travels: true };
    let offer = Offer { vm: "vm".into(), generation: 1, blocks: vec![block], streams: 1, ..Offer::default() };
    SourceParameters {
        id: MigrationId([1; 16]),
        peer: "b".into(),
        offer,
        downtime_limit: limit,
        timeout: None,
        activity: Activity::Running,
        rate,
        auto_converge,
        postcopy: Postcopy::OnDemand,
        awaits: false,
    }
}

/// A migration that is cancelled has let its guest go.
fn assert_let_go(source: &mut Source, now: Duration, mut keep: u32) {
    assert_eq!(source.status(now), Status::Active);
    source.handle(SourceInput::Cancel, now);
    while let Some(action) = source.poll() {
        if let SourceAction::Stun(part) = action {
            keep = part;
        }
    }
    assert_eq!(keep, KEEP_ALL, "the guest was left slow");
}

/// Drives a migration of `guest` until its stop or the end of its time.
fn drive(guest: Guest, rate: RateLimits, auto_converge: bool, limit: Duration, at_most: Duration) -> Seen {
    let parameters = parameters(rate, auto_converge, limit);
    let mut now = Duration::ZERO;
    let mut source = Source::new(parameters, now);
    let mut seen = Seen { paces: vec![rate.max], ..Seen::default() };
    let (mut to_send, mut sent, mut keep, mut since_scan) = (RAM, 0u64, KEEP_ALL, Duration::ZERO);
    let mut inputs = std::collections::VecDeque::new();
    while now < at_most {
        while let Some(action) = source.poll() {
            match action {
                SourceAction::Record(_) => inputs.push_back(SourceInput::Recorded),
                SourceAction::Send(Message::Hello(_)) => {
                    let welcome = Welcome { version: VERSION_MAX, software: String::new() };
                    inputs.push_back(SourceInput::Message(Message::Welcome(welcome)));
                }
                SourceAction::Send(Message::Offer(_)) => {
                    inputs.push_back(SourceInput::Message(Message::Accepted(Accepted::default())));
                }
                SourceAction::OpenStreams(_) => inputs.push_back(SourceInput::Opened),
                SourceAction::Track => inputs.push_back(SourceInput::Tracked(Pages(RAM))),
                SourceAction::Pace(pace) => seen.paces.push(pace),
                SourceAction::Stun(part) => {
                    keep = part;
                    seen.keeps.push(part);
                }
                SourceAction::SendRound(round) => {
                    seen.rounds = round;
                    let pace = seen.paces.last().copied().flatten().map_or(LINK, |pace| pace.0.min(LINK));
                    let took = Rate(pace).time_for(Pages(to_send).bytes());
                    if took > Duration::from_millis(200) {
                        let moment = Duration::from_millis(200);
                        let pages = Pages(guest.written(moment, keep));
                        let writes = Rate::measured(pages.bytes(), moment).unwrap();
                        source.handle(SourceInput::Writes(writes), now + moment);
                    }
                    now += took.max(Duration::from_micros(500));
                    sent += to_send;
                    since_scan += took;
                    source.handle(SourceInput::Sent(Pages(sent).bytes()), now);
                    inputs.push_back(SourceInput::Message(Message::Barrier(Barrier { round, stream: 0 })));
                }
                SourceAction::Scan => {
                    to_send = guest.written(since_scan.max(Duration::from_micros(500)), keep);
                    since_scan = Duration::ZERO;
                    let counted = SourceInput::Counted { normal: Pages(sent), postponed: Pages(0) };
                    source.handle(counted, now);
                    inputs.push_back(SourceInput::Scanned(Pages(to_send)));
                }
                SourceAction::Stop => {
                    seen.stopped = Some(to_send);
                    assert_eq!(keep, KEEP_ALL, "a guest that has little time stops late");
                    return seen;
                }
                other => panic!("{other:?} has no place in a migration that goes well"),
            }
        }
        match inputs.pop_front() {
            Some(input) => source.handle(input, now),
            None => {
                seen.rested += 1;
                let at = source.deadline().expect("it waits for something");
                since_scan += at - now;
                now = at;
                source.handle(SourceInput::Tick, now);
            }
        }
    }
    assert_let_go(&mut source, now, keep);
    seen
}

/// What a migration does that was accepted and tracks, second by second, as these things happen.
fn steps(parameters: SourceParameters, inputs: Vec<SourceInput>) -> (Source, Vec<SourceAction>) {
    let mut source = Source::new(parameters, Duration::ZERO);
    let welcome = Welcome { version: VERSION_MAX, software: String::new() };
    let accepted = Accepted { postcopy: true, ..Accepted::default() };
    let before = [
        SourceInput::Recorded,
        SourceInput::Message(Message::Welcome(welcome)),
        SourceInput::Message(Message::Accepted(accepted)),
        SourceInput::Opened,
    ];
    let mut done = Vec::new();
    for (second, input) in (1..).zip(before.into_iter().chain(inputs)) {
        source.handle(input, Duration::from_secs(second));
        let actions = std::iter::from_fn(|| source.poll());
        done.extend(actions.filter(|action| {
            use SourceAction::{Finish, FinishPostcopy, Scan, SendRound, Stop, TellStale};
            matches!(action, SendRound(_) | Scan | TellStale(_) | Stop | Finish(_) | FinishPostcopy(_))
        }));
    }
    (source, done)
}

fn barrier(round: u32) -> SourceInput {
    SourceInput::Message(Message::Barrier(Barrier { round, stream: 0 }))
}

/// While the target starts a QEMU, which may take minutes, pages go already; what the link takes is measured once they are taken.
#[test]
fn the_first_round_begins_while_the_target_starts_a_qemu() {
    let at = Duration::from_millis;
    let offered = || {
        let mut source = Source::new(parameters(RateLimits::default(), false, LIMIT), at(0));
        let welcome = Welcome { version: VERSION_MAX, software: String::new() };
        source.handle(SourceInput::Recorded, at(0));
        source.handle(SourceInput::Message(Message::Welcome(welcome)), at(0));
        source.handle(SourceInput::Opened, at(10));
        source.handle(SourceInput::Tracked(Pages(RAM)), at(20));
        let done: Vec<_> = std::iter::from_fn(|| source.poll()).skip(3).collect();
        assert_eq!(
            done,
            [SourceAction::OpenStreams(1), SourceAction::Track, SourceAction::SendRound(1)],
            "the target has not answered yet"
        );
        source.handle(SourceInput::Sent(Bytes(8 << 20)), at(100));
        source
    };
    let mut source = offered();
    assert!(source.deadline() > Some(Duration::from_secs(100)), "it may take its time to start a QEMU");
    source.handle(SourceInput::Message(Message::Accepted(Accepted::default())), at(60_000));
    assert!(source.deadline() < Some(Duration::from_secs(100)), "pages must move from now on");
    assert_eq!(source.progress().target_ready, Some((at(60_000), Bytes(8 << 20))));
    source.handle(SourceInput::Sent(Bytes(RAM * 4096)), at(61_000));
    source.handle(barrier(1), at(61_000));
    assert_eq!(source.progress().bandwidth, Rate::measured(Bytes(RAM * 4096 - (8 << 20)), at(1000)));
    assert_eq!(source.poll(), Some(SourceAction::Scan));

    // All of it went before: as fast as the target has read it ahead.
    let mut early = offered();
    early.handle(SourceInput::Sent(Bytes(32 << 20)), at(270));
    early.handle(SourceInput::Message(Message::Accepted(Accepted::default())), at(3000));
    early.handle(barrier(1), at(3010));
    assert_eq!(early.progress().bandwidth, Rate::measured(Bytes(32 << 20), at(250)));

    let mut refused = offered();
    let reasons = vec![Reason { code: "target-qemu".into(), text: "no".into() }];
    refused.handle(SourceInput::Message(Message::Refused(Refused { reasons: reasons.clone() })), at(200));
    assert!(
        std::iter::from_fn(|| refused.poll())
            .any(|done| done == SourceAction::Over(Outcome::Refused(reasons.clone())))
    );

    let mut confirmed = offered();
    confirmed.handle(barrier(1), at(200));
    assert_eq!(confirmed.status(at(200)), Status::Failed, "nobody can have installed what was sent");
}

/// Sockets take bytes for a while though nobody reads them: a target that never answers is waited for as long as it may take, and no longer.
#[test]
fn bytes_that_go_do_not_keep_a_target_that_never_answers() {
    let mut source = Source::new(parameters(RateLimits::default(), false, LIMIT), Duration::ZERO);
    let welcome = Welcome { version: VERSION_MAX, software: String::new() };
    let before =
        [SourceInput::Recorded, SourceInput::Message(Message::Welcome(welcome)), SourceInput::Opened];
    for input in before.into_iter().chain([SourceInput::Tracked(Pages(RAM))]) {
        source.handle(input, Duration::ZERO);
    }
    let second = |second| Duration::from_secs(second);
    let waits = |source: &mut Source, at: u64| {
        source.handle(SourceInput::Sent(Bytes(at << 20)), second(at));
        source.handle(SourceInput::Tick, second(at));
        source.status(second(at)) == Status::Active
    };
    let given_up = (1..200).find(|at| !waits(&mut source, *at));
    assert_eq!(given_up, Some(120));
}

/// A switch that is asked for before it is known whether the target can do it ends the round only if it can: else nothing more would be sent.
#[test]
fn a_switch_that_is_asked_for_early_waits_for_the_targets_word() {
    for can in [true, false] {
        let mut source = Source::new(parameters(RateLimits::default(), false, LIMIT), Duration::ZERO);
        let welcome = Welcome { version: VERSION_MAX, software: String::new() };
        let before =
            [SourceInput::Recorded, SourceInput::Message(Message::Welcome(welcome)), SourceInput::Opened];
        for input in before.into_iter().chain([SourceInput::Tracked(Pages(RAM)), SourceInput::Switch]) {
            source.handle(input, Duration::ZERO);
        }
        assert!(!std::iter::from_fn(|| source.poll()).any(|done| done == SourceAction::Abandon));
        let accepted = Accepted { postcopy: can, ..Accepted::default() };
        source.handle(SourceInput::Message(Message::Accepted(accepted)), Duration::from_secs(1));
        assert_eq!(std::iter::from_fn(|| source.poll()).any(|done| done == SourceAction::Abandon), can);
    }
}

/// What is to be dropped at the target is told while the VM runs: a round that sends nothing, then the stop, whose round follows that one and
/// is counted as if there had been none.
#[test]
fn a_switch_tells_before_the_stop_what_is_stale() {
    let parameters = SourceParameters {
        postcopy: Postcopy::AfterPrecopy,
        ..parameters(RateLimits::default(), false, LIMIT)
    };
    let all = Pages(RAM);
    let inputs = vec![
        SourceInput::Tracked(all),
        barrier(1),
        SourceInput::Scanned(all),
        barrier(2),
        SourceInput::Stopped(all),
    ];
    let (source, done) = steps(parameters, inputs);
    let told = [
        SourceAction::SendRound(1),
        SourceAction::Scan,
        SourceAction::TellStale(2),
        SourceAction::Stop,
        SourceAction::FinishPostcopy(3),
    ];
    assert_eq!(done, told);
    assert_eq!((source.progress().rounds, source.is_postcopy()), (2, true));
}

/// However little is left: what the target needs beside the pages is there before the VM stops. Rounds go on, and the stop follows at once.
#[test]
fn a_vm_does_not_stop_before_what_it_awaits_is_there() {
    // Its time is over at once: it would stop after any scan.
    let timeout = Some(Duration::from_secs(1));
    let awaiting =
        SourceParameters { awaits: true, timeout, ..parameters(RateLimits::default(), false, LIMIT) };
    let inputs = vec![
        SourceInput::Tracked(Pages(RAM)),
        barrier(1),
        SourceInput::Scanned(Pages(1)),
        SourceInput::Tick,
        SourceInput::Tick,
        barrier(2),
        SourceInput::Scanned(Pages(0)),
    ];
    let (mut source, done) = steps(awaiting, inputs);
    let (rounds, scan) = (|round| SourceAction::SendRound(round), SourceAction::Scan);
    assert_eq!(done, [rounds(1), scan.clone(), rounds(2), scan.clone()]);
    let at = Duration::from_secs(20);
    source.handle(SourceInput::Arrived, at);
    // What was written while it rested is more than what is written in a round: it goes first, once.
    source.handle(SourceInput::Scanned(Pages(2000)), at);
    source.handle(barrier(3), at + Duration::from_millis(70));
    source.handle(SourceInput::Scanned(Pages(2000)), at + Duration::from_millis(70));
    let after: Vec<_> = std::iter::from_fn(|| source.poll()).collect();
    assert_eq!(after, [scan.clone(), rounds(3), scan, SourceAction::Stop]);
}

/// The same of one that switches at once, and of one that switches when its time is over: it does not look again and again meanwhile.
#[test]
fn a_switch_waits_too() {
    let of = |postcopy, timeout| SourceParameters {
        awaits: true,
        postcopy,
        timeout,
        ..parameters(RateLimits::default(), false, LIMIT)
    };
    let (mut source, done) = steps(of(Postcopy::AtOnce, None), vec![SourceInput::Tracked(Pages(0))]);
    assert_eq!(done, []);
    let at = Duration::from_secs(20);
    source.handle(SourceInput::Arrived, at);
    source.handle(SourceInput::Scanned(Pages(0)), at);
    assert_eq!(
        std::iter::from_fn(|| source.poll()).collect::<Vec<_>>(),
        [SourceAction::Scan, SourceAction::Stop]
    );
    assert!(source.is_postcopy());

    let timeout = Some(Duration::from_secs(6));
    let inputs = vec![SourceInput::Tracked(Pages(RAM)), barrier(1), SourceInput::Scanned(Pages(RAM))];
    let (mut source, done) = steps(of(Postcopy::AtTimeout, timeout), inputs);
    assert_eq!(done, [SourceAction::SendRound(1), SourceAction::Scan]);
    assert!(source.deadline().is_some_and(|at| at > Duration::from_secs(7)), "{:?}", source.deadline());
    source.handle(SourceInput::Arrived, at);
    source.handle(SourceInput::Scanned(Pages(RAM)), at);
    let after: Vec<_> = std::iter::from_fn(|| source.poll()).collect();
    assert_eq!(after, [SourceAction::Scan, SourceAction::TellStale(2)]);
}

fn mbit(rate: u64) -> Rate {
    Rate(rate * 1_000_000 / 8)
}

const SECONDS_40: Duration = Duration::from_secs(40);
const LIMIT: Duration = Duration::from_millis(300);

#[test]
fn an_idle_guest_needs_two_rounds_at_most() {
    let idle = Guest { pages: 10, bytes_per_second: 40_960 };
    let seen = drive(idle, RateLimits::default(), true, LIMIT, SECONDS_40);
    assert!(seen.rounds <= 2 && seen.stopped.is_some() && seen.keeps.is_empty(), "{seen:?}");
}

#[test]
fn rounds_follow_what_the_guest_writes() {
    let guest = Guest { pages: 32_768, bytes_per_second: 30_000_000 };
    let limits = RateLimits { min: Some(mbit(100)), max: Some(mbit(800)), ..RateLimits::default() };
    let seen = drive(guest, limits, false, LIMIT, Duration::from_secs(100));
    assert_eq!(seen.paces[1], Some(mbit(100)), "the first round goes at the minimum: {seen:?}");
    assert_eq!(seen.paces.last(), Some(&Some(mbit(800))), "the last one at the maximum: {seen:?}");
    let stopped = Pages(seen.stopped.expect("it converges")).bytes();
    assert!(Rate(LINK).time_for(stopped) <= LIMIT, "{seen:?}");
}

/// MMuncher of the paper and of the benchmarks: it never converges by itself, and does within two seconds of rounds when it is slowed.
#[test]
fn a_guest_that_outruns_the_link_converges_only_when_it_is_slowed() {
    let muncher = Guest { pages: 32_768, bytes_per_second: 200_000_000 };
    let limit = Duration::from_millis(30);
    let free = drive(muncher, RateLimits::default(), false, limit, SECONDS_40);
    assert!(free.stopped.is_none() && free.keeps.is_empty(), "{free:?}");
    let slowed = drive(muncher, RateLimits::default(), true, limit, Duration::from_millis(6500));
    assert!(slowed.stopped.is_some(), "{slowed:?}");
    assert_eq!(slowed.keeps.last(), Some(&KEEP_ALL), "{slowed:?}");
}

/// Who takes the permission back has his guest back at once, in the middle of a round.
#[test]
fn a_guest_that_may_not_be_slowed_any_more_is_let_go_at_once() {
    let mut source =
        Source::new(parameters(RateLimits::default(), true, Duration::from_millis(1)), Duration::ZERO);
    let mut keep = Vec::new();
    for second in 0..20 {
        let now = Duration::from_secs(second);
        while let Some(action) = source.poll() {
            let input = match action {
                SourceAction::Record(_) => SourceInput::Recorded,
                SourceAction::Send(Message::Hello(_)) => SourceInput::Message(Message::Welcome(Welcome {
                    version: VERSION_MAX,
                    ..Welcome::default()
                })),
                SourceAction::Send(_) => SourceInput::Message(Message::Accepted(Accepted::default())),
                SourceAction::OpenStreams(_) => SourceInput::Opened,
                SourceAction::Track => SourceInput::Tracked(Pages(RAM)),
                SourceAction::Scan => SourceInput::Scanned(Pages(RAM)),
                SourceAction::Stun(part) => {
                    keep.push(part);
                    continue;
                }
                SourceAction::SendRound(round) if keep.is_empty() => {
                    source.handle(SourceInput::Sent(Pages(RAM * u64::from(round)).bytes()), now);
                    SourceInput::Message(Message::Barrier(Barrier { round, stream: 0 }))
                }
                _ => continue,
            };
            source.handle(input, now);
        }
    }
    assert!(keep.len() == 1 && keep[0] < KEEP_ALL, "{keep:?}");
    source.handle(SourceInput::AutoConverge(false), Duration::from_secs(20));
    assert_eq!(source.poll(), Some(SourceAction::Stun(KEEP_ALL)));
    assert_eq!(source.progress().throttle, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the guest does and the user asks for: no pace leaves its limits, and a guest that was slowed is let go.
    #[test]
    fn no_pace_leaves_its_limits_and_no_guest_is_left_slow(
        pages in 1u64..RAM, written in 0u64..2_000_000_000, min in 1u64..200_000_000, more in 0u64..200_000_000,
        auto_converge in any::<bool>(), limit_ms in 1u64..1000, seconds in 1u64..60,
    ) {
        let (min, max) = (Rate(min), Rate(min + more));
        let limits = RateLimits { min: Some(min), max: Some(max), ..RateLimits::default() };
        let guest = Guest { pages, bytes_per_second: written };
        // The driver itself asserts that the guest is let go, and that it is before a stop.
        let seen = drive(guest, limits, auto_converge, Duration::from_millis(limit_ms), Duration::from_secs(seconds));
        for pace in seen.paces.iter().flatten() {
            prop_assert!(min <= *pace && *pace <= max);
        }
        prop_assert!(auto_converge || seen.keeps.is_empty());
        if let Some(pages) = seen.stopped {
            // At the stop the link, or the limit, is what holds; a paced round is never told to be faster than it was.
            let fits = Rate(LINK.min(max.0)).time_for(Pages(pages).bytes());
            prop_assert!(fits <= Duration::from_millis(limit_ms) * 11 / 10 + Duration::from_millis(1), "{seen:?}");
        }
    }
}
