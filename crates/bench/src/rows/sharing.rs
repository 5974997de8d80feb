//! Row 15: guests that have most of their memory in common leave together, and each content travels once.

use std::collections::HashSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use sterna_lab::process::ProcessId;
use sterna_lab::{GuestSpec, Ksm};

use super::{Run, idle};
use crate::crowd;
use crate::figures::Metric;
use crate::meter::pss_mb;
use crate::ours::{self, OurVm};
use crate::results::{Case, Contender, Goal, Limit, Move, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::{self, StockVm, StockWay};
use crate::{BenchError, load};

/// VMs that leave together, and the RAM of each.
const VMS: u8 = 4;
const MEMORY_MIB: u32 = 512;
/// What of a guest's load is the same in all of them, in percent: then 62 of a hundred pages of all are there already.
const ALIKE: u32 = 83;
/// A little of what is a guest's own is written all the time.
const DIRTY_MIB: u32 = 8;
const RATE_MB: u32 = 2;
/// The goals.
const BYTES: f64 = 1.01;
const TIME: f64 = 1.03;
const CPU: f64 = 0.3;
const MEMORY: f64 = 1.02;
/// How long the kernel may take to merge what is alike.
const MERGE: Duration = Duration::from_secs(120);

const PAGE: u64 = 4096;

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    let stage = Stage::up(run.kit, Link::Gigabit, PageStreams::Encrypted, VMS)?;
    let names: Vec<String> = (0..VMS).map(|n| format!("alike-{n}")).collect();
    let boot = |(n, name): (u8, &String)| OurVm::boot(&stage, &guest(&stage, name, n), n);
    let mut vms = (0..).zip(&names).map(boot).collect::<Result<Vec<_>, _>>()?;
    run.tell(&format!(
        "{VMS} guests of {MEMORY_MIB} MiB, {ALIKE} % of whose memory is the same: the kernel merges it"
    ));
    merge(&stage, &vms, load::fill_mib(MEMORY_MIB) * ALIKE / 100)?;
    let content = processes(&stage, &vms)?.into_iter().try_fold(Content::default(), Content::with)?;
    let boot = |n: u8| StockVm::boot(&stage, &guest(&stage, &format!("whole-{n}"), n), n);
    let mut whole = (0..VMS).map(boot).collect::<Result<Vec<_>, BenchError>>()?;
    let (mut cases, mut goals) = (Vec::new(), Vec::new());
    for (name, options, way) in
        [("pre-copy", &[][..], StockWay::Precopy), ("post-copy", &["--postcopy"][..], StockWay::Postcopy)]
    {
        run.tell(name);
        let case = case(run, &stage, (name, options, way), (&mut vms, &mut whole), &content)?;
        goals.extend(goals_of(&case, &content));
        cases.push(case);
    }
    vms.into_iter().try_for_each(|vm| vm.stop(&stage))?;
    drop(whole);
    stage.lab.down()?;
    let notes = vec![format!(
        "All pages of all guests were read and compared before the first move: {:.0} MB are not zero, {:.0} MB of that are different. The share is \
         one over the other. The kernel merged what is alike before the first move (KSM) and was off from then on: what the guests share \
         later is what our moves made shared. CPU is of all processes that take part, the guests included.",
        content.all_mb(),
        content.unique_mb(),
    )];
    Ok(RowResult { cases, goals, notes, ..RowResult::default() })
}

fn guest(stage: &Stage, name: &str, number: u8) -> GuestSpec {
    let fill = load::fill_mib(MEMORY_MIB);
    let alike = fill * ALIKE / 100;
    let (common, own) = (format!("--fill={alike}"), format!("--fill={}", fill - alike));
    let (dirty, rate) = (format!("--dirty={DIRTY_MIB}"), format!("--rate={RATE_MB}"));
    let seed = format!("--seed={}", 1000 + u32::from(number));
    let programs = vec![
        load::memory(&[&common, "--seed=7", "--dirty=0", "--sleep"]),
        load::memory(&[&own, &seed, &dirty, &rate, "--check=written"]),
    ];
    GuestSpec { programs, ..load::plain(stage, name, MEMORY_MIB) }
}

/// Has the kernel merge what is alike, so many MiB of each, and stops it then.
pub(super) fn merge(stage: &Stage, vms: &[OurVm], alike_mib: u32) -> Result<(), BenchError> {
    let ksm = Ksm::run()?;
    let wanted = u64::from(alike_mib) * (1 << 20) / PAGE * 9 / 10;
    let end = std::time::Instant::now() + MERGE;
    while processes(stage, vms)?.iter().any(|process| Ksm::merged_pages(process.pid) < wanted) {
        if std::time::Instant::now() > end {
            return Err(BenchError::Deadline { what: "the kernel to merge pages".into(), limit: MERGE });
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    ksm.wait_for_scans(2, MERGE)?;
    Ok(())
}

fn case(
    run: &Run<'_>,
    stage: &Stage,
    (name, options, way): (&str, &[&str], StockWay),
    (vms, whole): (&mut Vec<OurVm>, &mut Vec<StockVm>),
    content: &Content,
) -> Result<Case, BenchError> {
    let mut contenders =
        [Contender::named("ours"), Contender::named("ours, by hash"), Contender::named(way.name())];
    let hash: Vec<&str> = options.iter().copied().chain(["--dedup", "hash"]).collect();
    for _ in 0..run.extent.pairs {
        for (contender, options) in contenders.iter_mut().zip([options, &hash]) {
            load::warm_memory(MEMORY_MIB * u32::from(VMS));
            contender.moves.push(together(stage, vms, &ours::Order::with(options))?);
        }
        load::warm_memory(MEMORY_MIB * u32::from(VMS));
        contenders[2].moves.push(crowd::stock(stage, whole, stock::Order::of(way))?);
    }
    let proof: Vec<&str> = options.iter().copied().chain(["--verify"]).collect();
    let verified = crowd::verify_gang(stage, vms, &ours::Order::with(&proof));
    if let Some(why) = &verified.error {
        // Where they are now nobody can tell, and what comes next would be what is said.
        run.tell(&format!("RAM is not proved equal: {why}"));
    }
    let verified = Some(verified);
    let link = content.unique_mb() * 1e6 / idle::LINK_BYTES_PER_MS;
    let limits = vec![
        Limit {
            metric: Metric::TotalTime,
            value: link,
            text: "different pages / link (957 Mbit/s)".to_owned(),
        },
        Limit { metric: Metric::WireBytes, value: content.unique_mb(), text: "different pages".to_owned() },
    ];
    Ok(Case {
        name: name.to_owned(),
        workload: format!(
            "{VMS} guests of {MEMORY_MIB} MiB that have {ALIKE} % of their load in common, {DIRTY_MIB} MiB of each written at {RATE_MB} MB/s, leave \
             together by {name}: ours as one command, by frames and by hash, stock side by side"
        ),
        contenders: contenders.into(),
        verified,
        limits,
        ..Case::default()
    })
}

fn goals_of(case: &Case, content: &Content) -> Vec<Goal> {
    let name = &case.name;
    let (ours, peers) = (case.ours(), case.peers());
    let of = |metric| ours.map_or(f64::NAN, |ours| ours.median(metric));
    let peer = |at: usize, metric| peers.get(at).map_or(f64::NAN, |peer| peer.median(metric));
    let share = content.unique_mb() / content.all_mb();
    let link_ms = content.unique_mb() * 1e6 / idle::LINK_BYTES_PER_MS;
    vec![
        Goal::at_most(
            &format!("{name}: bytes, ours / stock, over the share of different pages {share:.3}"),
            of(Metric::WireBytes) / peer(1, Metric::WireBytes) / share,
            BYTES,
        ),
        Goal::at_most(
            &format!("{name}: time / what different pages take on the link, {link_ms:.0} ms"),
            of(Metric::TotalTime) / link_ms,
            TIME,
        ),
        Goal::at_most(&format!("{name}: CPU, ours / by hash"), of(Metric::Cpu) / peer(0, Metric::Cpu), CPU),
        Goal::at_most(
            &format!("{name}: PSS at the target / at the source"),
            of(Metric::PssTarget) / of(Metric::PssSource),
            MEMORY,
        ),
    ]
}

fn together(stage: &Stage, vms: &mut [OurVm], order: &ours::Order) -> Result<Move, BenchError> {
    let sum = |processes: Vec<ProcessId>| processes.into_iter().map(pss_mb).sum::<f64>();
    let before = sum(processes(stage, vms)?);
    let mut moved = crowd::gang(stage, vms, order)?.0;
    moved.figures.set(Metric::PssSource, before);
    moved.figures.set(Metric::PssTarget, sum(processes(stage, vms)?));
    Ok(moved)
}

fn processes(stage: &Stage, vms: &[OurVm]) -> Result<Vec<ProcessId>, BenchError> {
    vms.iter().map(|vm| stage.agents(vm.way).0.qemu(&vm.name)).collect()
}

/// What pages hold, of several guests.
#[derive(Default)]
struct Content {
    pages: u64,
    different: HashSet<u64>,
}

impl Content {
    /// And of this one: its largest mapping of data is its RAM.
    fn with(mut self, process: ProcessId) -> Result<Self, BenchError> {
        let pid = process.pid;
        let failed = |what: &str| {
            let what = format!("{what} of process {pid}");
            move |why: std::io::Error| BenchError::unexpected(what, why.to_string())
        };
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(failed("mappings"))?;
        let range = |line: &str| {
            let (from, to) = line.split(' ').next()?.split_once('-')?;
            Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
        };
        // QEMU's largest mapping is that of the code that it makes, which may be executed.
        let data = maps.lines().filter(|line| line.split(' ').nth(1) == Some("rw-p"));
        let largest = data.filter_map(range).max_by_key(|(from, to)| to - from);
        let (from, to) = largest.ok_or_else(|| BenchError::unexpected("its RAM", "no mapping"))?;
        let entries = File::open(format!("/proc/{pid}/pagemap")).map_err(failed("page tables"))?;
        let memory = File::open(format!("/proc/{pid}/mem")).map_err(failed("memory"))?;
        let mut entry = vec![0; ((to - from) / PAGE * 8) as usize];
        entries.read_exact_at(&mut entry, from / PAGE * 8).map_err(failed("page tables"))?;
        let mut page = vec![0; PAGE as usize];
        for (at, entry) in (0..).zip(entry.as_chunks::<8>().0) {
            if u64::from_ne_bytes(*entry) >> 63 == 0 {
                continue;
            }
            memory.read_exact_at(&mut page, from + at * PAGE).map_err(failed("memory"))?;
            if page.iter().any(|byte| *byte != 0) {
                let mut hasher = DefaultHasher::new();
                hasher.write(&page);
                self.pages += 1;
                self.different.insert(hasher.finish());
            }
        }
        Ok(self)
    }

    fn all_mb(&self) -> f64 {
        self.pages as f64 * PAGE as f64 / 1e6
    }

    fn unique_mb(&self) -> f64 {
        self.different.len() as f64 * PAGE as f64 / 1e6
    }
}
