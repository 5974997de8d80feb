//! Row 3: a guest that writes moves under a client's load, and leaves the client its part of the link.
//!
//! Each host has one network card, as the hosts of Clark et al. had: what migrates and what the guest serves share 1 Gbit/s.

use std::time::Duration;

use sterna_lab::GuestSpec;
use sterna_lab::guest::Program;

use super::served::{Service, with_servers};
use super::{Run, idle};
use crate::BenchError;
use crate::contest::Terms;
use crate::figures::Metric;
use crate::load;
use crate::pulse::App;
use crate::results::{Case, Goal, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;
use crate::wishes::Wish;

const MEMORY_MIB: u32 = 512;
/// What is noise, servers and their image beside it; the part that is written, and how fast.
const NOISE_MIB: u32 = 288;
const WORKING_SET_MIB: u32 = 128;
const RATE_MB: u32 = 60;
/// What the client wants of the guest. An emulated server would fill the link by itself, and nothing could leave it that.
const CLIENT_MBIT: u32 = 200;
/// The rate of the first round: what the link carries (957 Mbit/s) without that.
const MIN_BANDWIDTH_MBIT: u32 = 740;
/// The link's.
const MAX_BANDWIDTH_MBIT: u32 = 1000;

/// Who has not got through by then never will: the client leaves it less of the link than the guest writes.
const NO_END: Duration = Duration::from_secs(60);
const NO_END_QUICK: Duration = Duration::from_secs(20);

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    run.tell("the image with servers");
    let kit = with_servers(run.kit)?;
    let stage = Stage::up(&kit, Link::SharedGigabit, PageStreams::Encrypted, 1)?;
    let granted = run
        .abilities
        .grant(&[Wish::MinBandwidth(MIN_BANDWIDTH_MBIT), Wish::MaxBandwidth(MAX_BANDWIDTH_MBIT)]);
    run.tell(&granted.note());
    let service = Service {
        stage: &stage,
        name: "writing",
        workload: format!(
            "{MEMORY_MIB} MiB, {NOISE_MIB} of it noise, {WORKING_SET_MIB} MiB of that written over and over at {RATE_MB} MB/s, \
             one vCPU; a client receives {CLIENT_MBIT} Mbit/s (iperf3) through the link that the migration takes, and another \
             writes 100 keys a second to Redis and reads all back"
        ),
        guest: &|vm| guest(&stage, vm),
        app: Some(App::Steady(CLIENT_MBIT)),
        listen: load::watch_gently,
        silence: Metric::Blackout,
        terms: Terms {
            options: granted.order.options.clone(),
            limit: Some(if run.extent.quick { NO_END_QUICK } else { NO_END }),
            ..Terms::default()
        },
        peers: &[StockWay::Precopy],
    };
    let mut case = service.case(run)?;
    stage.lab.down()?;
    case.limits.extend(idle::limit_once(&case));
    let goals = goals(&case);
    Ok(RowResult { cases: vec![case], goals, notes: notes(granted.note()), ..RowResult::default() })
}

fn guest(stage: &Stage, name: &str) -> GuestSpec {
    let options = [
        format!("--fill={NOISE_MIB}"),
        format!("--dirty={WORKING_SET_MIB}"),
        format!("--rate={RATE_MB}"),
        "--check".to_owned(),
    ];
    GuestSpec {
        nic: Some(load::nic(stage, 0)),
        programs: vec![
            Program::Redis,
            Program::Iperf3,
            load::beacon(stage),
            load::memory(&options.each_ref().map(String::as_str)),
        ],
        ..load::plain(stage, name, MEMORY_MIB)
    }
}

fn goals(case: &Case) -> Vec<Goal> {
    vec![
        Goal::at_most("total time, ours / stock pre-copy", case.ratio(Metric::TotalTime, 0), 0.92),
        Goal::at_most("downtime, ours / stock pre-copy", case.ratio(Metric::Downtime, 0), 0.05),
        Goal::at_least(
            "client's throughput in round one / undisturbed",
            case.value(Metric::AppRoundOne) / 100.0,
            0.88,
        ),
    ]
}

fn notes(granted: String) -> Vec<String> {
    vec![
        granted,
        "The client's throughput is what iperf3 receives, by quarters of a second. In round one: the mean from the first \
         page until the second round begins, beside the mean of the 3 s before the command; of stock QEMU as of ours."
            .to_owned(),
        "Bytes on the wire are the migration's alone. The limit on time knows nothing of the client, who has a part of the link."
            .to_owned(),
        "Stock QEMU is tuned as its documentation says: max-bandwidth above the link, downtime-limit 300 ms as ours."
            .to_owned(),
    ]
}
