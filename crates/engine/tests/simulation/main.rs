//! Source and target over a virtual network with a virtual clock: the engine's machines, driven as an agent drives
//! them, while hosts, agents, QEMUs, disks and connections fail. After every event the processes themselves are
//! looked at: never two that run the VM, never none that could, RAM equal when it comes to life.
//!
//! A schedule follows from its [`world::Plan`]; a violation prints the plan and what happened. `STERNA_SIMULATIONS`
//! sets how many random schedules are lived through.

mod agent;
mod checker;
mod clock;
mod host;
mod network;
mod source;
mod target;
mod world;

use checker::Report;
use world::{Crash, CrashPoint, Fate, MessageFate, Mutation, Plan, simulate};

/// Random schedules of a normal run.
const SIMULATIONS: u64 = 100_000;
/// Random schedules within which a broken hand-off must be found.
const SIMULATIONS_TO_CATCH: u64 = 20_000;

const CALM: Plan = Plan { seed: 0, crash: None, fate: None, random: false, mutation: None };

fn lived_through(plan: Plan) -> Report {
    simulate(plan).unwrap_or_else(|violation| panic!("{}", violation.story()))
}

#[test]
fn what_nothing_disturbs_completes() {
    for seed in 0..50 {
        let report = lived_through(Plan { seed, ..CALM });
        assert_eq!((report.completed, report.not_completed), (2, 0));
    }
}

/// Every step of each host's machines, in one kind of crash.
fn crash_everywhere(crash: Crash, seed: u64) -> Vec<Report> {
    plans_of_crashes(crash, Plan { seed, ..CALM }).map(lived_through).collect()
}

fn plans_of_crashes(crash: Crash, plan: Plan) -> impl Iterator<Item = Plan> {
    let beyond = CrashPoint { host: 0, nth: u32::MAX, crash };
    let steps = lived_through(Plan { crash: Some(beyond), mutation: None, ..plan }).steps;
    let points =
        (0..2).flat_map(move |host| (1..=steps[host]).map(move |nth| CrashPoint { host, nth, crash }));
    points.map(move |point| Plan { crash: Some(point), ..plan })
}

#[test]
fn an_agent_crashes_at_every_step() {
    for seed in 0..20 {
        let reports = crash_everywhere(Crash::Agent, seed);
        assert!(reports.len() > 150, "only {} steps were found", reports.len());
        assert!(reports.iter().all(|report| report.destroyed == 0), "an agent's death destroys no VM");
        assert!(reports.iter().all(|report| report.unresolved == 0), "nor does it leave a question");
        assert!(reports.iter().any(|report| report.taken_back > 0), "no crash led to a proven death");
    }
}

#[test]
fn every_connection_is_cut_at_every_step() {
    let reports = (0..20).flat_map(|seed| crash_everywhere(Crash::Connections, seed)).collect::<Vec<_>>();
    assert!(reports.iter().all(|report| report.destroyed == 0 && report.unresolved == 0));
    assert!(reports.iter().any(|report| report.taken_back > 0), "no cut led to a proven death");
}

#[test]
fn a_host_crashes_at_every_step() {
    for seed in 0..20 {
        let reports = crash_everywhere(Crash::Host, seed);
        assert!(reports.iter().any(|report| report.destroyed > 0));
        assert!(reports.iter().any(|report| report.destroyed == 0 && report.completed > 0));
    }
}

#[test]
fn an_agent_and_then_its_host_crash_at_every_step() {
    for seed in 0..20 {
        let reports = crash_everywhere(Crash::AgentThenHost, seed);
        assert!(reports.iter().any(|report| report.destroyed > 0));
        assert!(reports.iter().any(|report| report.destroyed == 0 && report.completed > 0));
    }
}

#[test]
fn a_host_that_freezes_at_every_step_and_comes_back() {
    let reports = (0..20).flat_map(|seed| crash_everywhere(Crash::Freeze, seed)).collect::<Vec<_>>();
    assert!(reports.iter().all(|report| report.destroyed == 0 && report.unresolved == 0));
    assert!(reports.iter().any(|report| report.taken_back > 0), "no freeze led to a proven death");
}

/// From the stop of the VM on: every message is lost, late, or comes twice, at once or long after, and with each of these
/// either host fails in every way at every step.
#[test]
fn every_fate_of_every_message_with_a_crash_at_every_step_of_the_handoff() {
    let (mut schedules, mut taken_back) = (0, 0);
    for plan in fates(CALM) {
        for crash in [Crash::Agent, Crash::Host, Crash::AgentThenHost, Crash::Freeze, Crash::Connections] {
            for report in plans_of_handoff(crash, plan).map(lived_through) {
                schedules += 1;
                taken_back += report.taken_back;
            }
        }
    }
    println!("{schedules} schedules, {taken_back} VMs were taken back");
    assert!(schedules > 10_000 && taken_back > 0, "only {schedules} schedules");
}

/// Every fate of every message from the stop on.
fn fates(plan: Plan) -> impl Iterator<Item = Plan> {
    let messages = lived_through(plan).messages;
    let fates = [Fate::Lost, Fate::Late, Fate::Twice, Fate::Again];
    let each = move |nth| fates.map(|fate| Plan { fate: Some(MessageFate { nth, fate }), ..plan });
    (1..=messages).flat_map(each)
}

/// A crash at each step of either host from the stop on.
fn plans_of_handoff(crash: Crash, plan: Plan) -> impl Iterator<Item = Plan> {
    let beyond = CrashPoint { host: 0, nth: u32::MAX, crash };
    let report = lived_through(Plan { crash: Some(beyond), ..plan });
    let steps = move |host: usize| report.steps_before[host] + 1..=report.steps[host];
    let points = (0..2).flat_map(move |host| steps(host).map(move |nth| CrashPoint { host, nth, crash }));
    points.map(move |point| Plan { crash: Some(point), ..plan })
}

#[test]
fn whatever_goes_wrong_the_vm_has_one_owner() {
    let wanted = std::env::var("STERNA_SIMULATIONS").ok();
    let count = wanted.map_or(SIMULATIONS, |text| text.parse().expect("STERNA_SIMULATIONS is a number"));
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let share = |of: u64| {
        let seeds = (of..count).step_by(cores as usize);
        seeds.map(|seed| lived_through(Plan { seed, random: true, ..CALM })).sum::<Report>()
    };
    let sum = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|of| scope.spawn(move || share(of))).collect();
        let ends = threads.into_iter().map(|thread| thread.join());
        ends.map(|end| end.unwrap_or_else(|why| std::panic::resume_unwind(why))).sum::<Report>()
    });
    println!("{count} schedules: {sum:?}");
    if count >= SIMULATIONS {
        // The schedules reach every way in which a migration can end.
        assert!(sum.taken_back > 0 && sum.destroyed > 0 && sum.unresolved > 0, "{sum:?}");
    }
}

/// A hand-off that is broken in this way is found by random schedules, and for one of these reasons.
fn caught(mutation: Mutation, reasons: &[&str]) {
    let plan = |seed| Plan { seed, random: true, mutation: Some(mutation), ..CALM };
    caught_by((0..SIMULATIONS_TO_CATCH).map(plan), mutation, reasons);
}

fn caught_by(mut plans: impl Iterator<Item = Plan>, mutation: Mutation, reasons: &[&str]) {
    let found = plans.find_map(|plan| simulate(plan).err());
    let found = found.unwrap_or_else(|| panic!("{mutation:?} was not caught"));
    println!("{mutation:?} is caught: {}", found.what);
    assert!(reasons.iter().any(|reason| found.what.contains(reason)), "{mutation:?}: {}", found.story());
}

const TWO_RUN: &str = "two QEMUs run";
const BACK_IN_TIME: &str = "which has gone on in";
const RAM_DIFFERS: &str = "RAM differs";
const NO_PROOF: &str = "resumes a VM it released while the target's QEMU is alive";
const NONE_LEFT: &str = "no QEMU is left";

#[test]
fn a_commit_that_is_not_durable_is_caught() {
    caught(Mutation::CommitNotDurable, &[BACK_IN_TIME]);
}

/// A restarted target let its QEMU run because it read that it had committed. The crash had come between the write of
/// that record and its sync: when the host went down too, the older record came back, the target proved a death, and
/// the source resumed a VM that had gone on elsewhere. Now such a record is stored again before the QEMU runs.
#[test]
fn a_recovery_that_trusts_the_page_cache_is_caught() {
    let mutation = Mutation::RecoveryTrustsPageCache;
    let plan = |seed| Plan { seed, mutation: Some(mutation), ..CALM };
    let plans = (0..500).flat_map(|seed| plans_of_crashes(Crash::AgentThenHost, plan(seed)));
    caught_by(plans, mutation, &[BACK_IN_TIME]);
}

#[test]
fn a_source_that_resumes_on_its_own_is_caught() {
    caught(Mutation::SourceResumesAlone, &[TWO_RUN, NO_PROOF, BACK_IN_TIME]);
}

#[test]
fn a_target_that_runs_before_the_release_is_caught() {
    caught(Mutation::RunsOnLoaded, &[TWO_RUN, BACK_IN_TIME, NONE_LEFT, RAM_DIFFERS]);
}

#[test]
fn a_death_that_is_not_waited_for_is_caught() {
    caught(Mutation::DeadWithoutWaiting, &[NO_PROOF]);
}

#[test]
fn a_release_sent_before_its_record_is_caught() {
    caught(Mutation::ReleaseBeforeRecord, &[TWO_RUN, NO_PROOF, BACK_IN_TIME]);
}

#[test]
fn a_last_scan_that_is_skipped_is_caught() {
    caught(Mutation::LastScanSkipped, &[RAM_DIFFERS]);
}

#[test]
fn discards_that_are_forgotten_are_caught() {
    caught(Mutation::DiscardsForgotten, &[RAM_DIFFERS]);
}

#[test]
fn page_streams_that_are_reordered_are_caught() {
    caught(Mutation::StreamsReordered, &[RAM_DIFFERS]);
}

/// Nobody answers for a while: that is no proof. The target's host stood still, and goes on.
#[test]
fn a_silence_taken_for_a_death_is_caught() {
    let mutation = Mutation::SourceResumesAlone;
    let plan = |seed| Plan { seed, mutation: Some(mutation), ..CALM };
    let plans = (0..500).flat_map(|seed| plans_of_crashes(Crash::Freeze, plan(seed)));
    caught_by(plans, mutation, &[TWO_RUN, NO_PROOF, BACK_IN_TIME]);
}

#[test]
fn a_target_that_gives_in_when_it_is_asked_again_is_caught() {
    caught(Mutation::GivesInWhenAskedAgain, &[TWO_RUN, NO_PROOF, BACK_IN_TIME, NONE_LEFT]);
}

/// A target that had stored its commit answered at once that it owned the VM. Its QEMU could still refuse to start,
/// which gives the VM back; a source that had lost its connection and asked in between had ended its own QEMU by then,
/// and the VM was gone. Now it is told to ask again until the VM was seen running.
#[test]
fn a_commit_taken_for_ownership_is_caught() {
    caught(Mutation::CommitAnsweredAsOwnership, &[NONE_LEFT, "the source says completed"]);
}
