//! Row 17: how fast pages move where no link limits.

use sterna_lab::GuestSpec;
use sterna_lab::guest::Ram;

use super::Run;
use crate::BenchError;
use crate::contest::{Contest, Terms};
use crate::figures::Metric;
use crate::load;
use crate::results::{Case, Goal, Limit, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;

/// RAM of the guest.
const MEMORY_MIB: u32 = 1024;
/// Seen here for a plain copy between two processes over TCP, in Gbit/s.
const LIMIT_GBPS: f64 = 25.0;

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Unshaped, PageStreams::Encrypted, 1)?;
    let encrypted = case(run, &stage, "encrypted", Ram::Plain, false)?;
    stage.lab.down()?;
    let stage = Stage::up(run.kit, Link::Unshaped, PageStreams::Clear, 1)?;
    let private = case(run, &stage, "private", Ram::Plain, false)?;
    let shared = case(run, &stage, "shared", Ram::SharedMemfd, false)?;
    let busy = case(run, &stage, "busy", Ram::Plain, true)?;
    stage.lab.down()?;
    let rate = |case: &Case| case.value(Metric::Throughput);
    let best = |case: &Case| {
        let peers = (0..case.peers().len()).map(|peer| case.ratio(Metric::Throughput, peer));
        peers.fold(f64::NAN, f64::min)
    };
    let goals = vec![
        Goal::at_least("private: throughput, ours / best of stock", best(&private), 1.7),
        Goal::at_least("private: Gbit/s", rate(&private), 18.0),
        Goal::at_least("shared: throughput, ours / best of stock", best(&shared), 2.5),
        Goal::at_least("shared: Gbit/s", rate(&shared), 18.0),
        Goal::at_least("busy: throughput, ours / best of stock", best(&busy), 1.2),
    ];
    let notes = vec![
        "Throughput is pages that travelled as bytes, over the time from the first page until the VM runs at the target: \
         stock QEMU sends most of them while the VM is stopped, since that is what its downtime limit allows on such a link. \
         Its pages are not encrypted; ours are compared in the clear as well (`page-streams = \"clear\"`). The case \
         `encrypted` shows what TLS costs, which is what an agent does when nothing is said."
            .to_owned(),
    ];
    Ok(RowResult { cases: vec![private, shared, busy, encrypted], goals, notes, ..RowResult::default() })
}

fn case(run: &Run<'_>, stage: &Stage, name: &str, ram: Ram, is_busy: bool) -> Result<Case, BenchError> {
    let fill = format!("--fill={}", load::fill_mib(MEMORY_MIB));
    let load: &[&str] = match is_busy {
        true => &[&fill, "--dirty=64", "--rate=50"],
        false => &[&fill, "--dirty=0", "--sleep"],
    };
    let guest = |vm: &str, _| GuestSpec {
        ram,
        programs: vec![load::memory(load)],
        ..load::plain(stage, &format!("{name}-{vm}"), MEMORY_MIB)
    };
    let doing = if is_busy { "writing 64 MiB of it again and again at 50 MB/s" } else { "sleeping" };
    let workload = format!("{MEMORY_MIB} MiB of {} RAM full of noise, one vCPU, {doing}", kind(ram));
    run.tell(&workload);
    let contest = Contest {
        stage,
        workload,
        guest: &guest,
        peers: &[StockWay::Precopy, StockWay::Multifd],
        terms: Terms::default(),
    };
    let case = match is_busy {
        true => contest.busy(run, run.extent.pairs)?,
        false => contest.idle(run, run.extent.pairs)?,
    };
    let text = "a copy through TCP on this machine".to_owned();
    let limit = Limit { metric: Metric::Throughput, value: LIMIT_GBPS, text };
    Ok(Case { name: name.to_owned(), limits: vec![limit], ..case })
}

fn kind(ram: Ram) -> &'static str {
    if ram == Ram::SharedMemfd { "shared" } else { "private" }
}
