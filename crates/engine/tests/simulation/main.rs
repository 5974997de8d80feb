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

use checker::{Report, Violation};
use world::{Crash, CrashPoint, Mutation, Plan, simulate};

/// Random schedules of a normal run.
const SIMULATIONS: u64 = 4000;

const CALM: Plan = Plan { seed: 0, crash: None, random: false, mutation: None };

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

/// Every step of each host's machines, in every kind of crash.
fn crash_everywhere(crash: Crash, seed: u64) -> Vec<Report> {
    let beyond = CrashPoint { host: 0, nth: u32::MAX, crash };
    let steps = lived_through(Plan { seed, crash: Some(beyond), ..CALM }).steps;
    let points = (0..2).flat_map(|host| (1..=steps[host]).map(move |nth| CrashPoint { host, nth, crash }));
    points.map(|point| lived_through(Plan { seed, crash: Some(point), ..CALM })).collect()
}

#[test]
fn an_agent_crashes_at_every_step() {
    for seed in 0..8 {
        let reports = crash_everywhere(Crash::Agent, seed);
        assert!(reports.len() > 150, "only {} steps were found", reports.len());
        assert!(reports.iter().all(|report| report.destroyed == 0), "an agent's death destroys no VM");
        assert!(reports.iter().any(|report| report.taken_back > 0), "no crash led to a proven death");
    }
}

#[test]
fn a_host_crashes_at_every_step() {
    for seed in 0..8 {
        let reports = crash_everywhere(Crash::Host, seed);
        assert!(reports.iter().any(|report| report.destroyed > 0));
        assert!(reports.iter().any(|report| report.destroyed == 0));
    }
}

#[test]
fn whatever_goes_wrong_the_vm_has_one_owner() {
    let wanted = std::env::var("STERNA_SIMULATIONS").ok();
    let count = wanted.map_or(SIMULATIONS, |text| text.parse().expect("STERNA_SIMULATIONS is a number"));
    let mut sum = Report::default();
    for seed in 0..count {
        let report = lived_through(Plan { seed, random: true, ..CALM });
        sum.completed += report.completed;
        sum.overtaken += report.overtaken;
        sum.not_completed += report.not_completed;
        sum.taken_back += report.taken_back;
        sum.destroyed += report.destroyed;
        sum.unresolved += report.unresolved;
    }
    println!("{count} schedules: {sum:?}");
}
