//! The table of Clark et al., *Live Migration of Virtual Machines*, NSDI 2005: what a web server, a game and MMuncher see of a
//! move. Each host has one network card of 1 Gbit/s, as theirs had; guests are smaller, and emulated.

use std::time::Duration;

use sterna_lab::GuestSpec;
use sterna_lab::guest::Program;

use super::Run;
use super::served::{Service, with_servers};
use crate::BenchError;
use crate::contest::{Contest, Terms};
use crate::figures::Metric;
use crate::load;
use crate::pulse::App;
use crate::results::{Case, Goal, RowResult};
use crate::stage::{Link, PageStreams, Stage};
use crate::stock::StockWay;
use crate::wishes::{Granted, Wish};

/// RAM of the guests, and of the smaller one of the game.
const MEMORY_MIB: u32 = 512;
const GAME_MEMORY_MIB: u32 = 192;
/// What is noise beside the web server and the game.
const WEB_NOISE_MIB: u32 = 288;
const GAME_NOISE_MIB: u32 = 64;
/// The array that MMuncher writes.
const MUNCHED_MIB: u32 = 256;
/// Rates of the first round and of the last ones, in Mbit/s: an emulated nginx was seen to send up to 540 in undisturbed seconds.
const MIN_BANDWIDTH_MBIT: u32 = 300;
const MAX_BANDWIDTH_MBIT: u32 = 1000;
/// Who has not moved MMuncher by then never will.
const NO_END: Duration = Duration::from_secs(40);
/// Seconds after which MMuncher is stopped where nothing holds it up: the paper's pre-copy stops it too.
const STOPS_S: &str = "10";

/// Downtimes of the paper, in milliseconds.
const WEB_PAPER_MS: f64 = 165.0;
const GAME_PAPER_MS: f64 = 60.0;
const MUNCHER_PAPER_MS: f64 = 3500.0;

pub(super) fn run(run: &Run<'_>) -> Result<RowResult, BenchError> {
    run.tell("the image with servers");
    let kit = with_servers(run.kit)?;
    let stage = Stage::up(&kit, Link::SharedGigabit, PageStreams::Encrypted, 1)?;
    let limited = run
        .abilities
        .grant(&[Wish::MinBandwidth(MIN_BANDWIDTH_MBIT), Wish::MaxBandwidth(MAX_BANDWIDTH_MBIT)]);
    let stunned = run.abilities.grant(&[Wish::AutoConverge]);
    run.tell(&limited.note());
    run.tell(&stunned.note());
    let cases =
        vec![web(run, &stage, &limited)?, game(run, &stage, &limited)?, muncher(run, &stage, &stunned)?];
    stage.lab.down()?;
    let goals = goals(&cases);
    let notes = vec![
        format!("Web server and game: {}", limited.note()),
        format!("MMuncher: {}", stunned.note()),
        "The paper's figures are of Xen on other machines; of SPECweb99 there is no case, for it is not free. What can be compared \
         is the shape, and with stock QEMU on this machine."
            .to_owned(),
    ];
    Ok(RowResult { cases, goals, notes, ..RowResult::default() })
}

fn goals(cases: &[Case]) -> Vec<Goal> {
    let papers = [WEB_PAPER_MS, GAME_PAPER_MS, MUNCHER_PAPER_MS];
    let goal = |(case, paper): (&Case, f64)| {
        let text = format!("{}: downtime, ms, beside the paper's", case.name);
        Goal::at_most(&text, case.value(Metric::Downtime), paper)
    };
    cases.iter().zip(papers).map(goal).collect()
}

fn web(run: &Run<'_>, stage: &Stage, granted: &Granted) -> Result<Case, BenchError> {
    let guest = |name: &str| GuestSpec {
        nic: Some(load::nic(stage, 0)),
        programs: vec![Program::Web, load::beacon(stage), noise(WEB_NOISE_MIB)],
        ..load::plain(stage, name, MEMORY_MIB)
    };
    let service = Service {
        stage,
        name: "web server",
        workload: format!(
            "{MEMORY_MIB} MiB, {WEB_NOISE_MIB} of it noise, one vCPU; nginx serves a file of 512 KiB to 100 clients (wrk) through the \
             link that the migration takes"
        ),
        guest: &guest,
        app: Some(App::WebCrowd),
        listen: |stage, _| load::listen(stage),
        silence: Metric::Blackout,
        terms: terms(granted),
        peers: peers(run),
    };
    let beside = vec![
        format!(
            "Clark et al., Apache 1.3, a file of 512 KB to 100 clients: downtime {WEB_PAPER_MS} ms. The first round is sent at the \
             lowest rate, each later one as fast as the guest wrote in the one before and 50 Mbit/s more, and the last pages, while it \
             is stopped, at the highest rate: the clients' throughput falls a little at first, further in the later rounds, once to \
             nothing, and is what it was afterwards."
        ),
        "SPECweb99, not measured here: 210 ms.".to_owned(),
    ];
    let mut case = service.case(run)?;
    case.beside.extend(beside);
    Ok(case)
}

fn game(run: &Run<'_>, stage: &Stage, granted: &Granted) -> Result<Case, BenchError> {
    let guest = |name: &str| GuestSpec {
        nic: Some(load::nic(stage, 0)),
        programs: vec![Program::Game, noise(GAME_NOISE_MIB)],
        ..load::plain(stage, name, GAME_MEMORY_MIB)
    };
    let service = Service {
        stage,
        name: "game",
        workload: format!(
            "{GAME_MEMORY_MIB} MiB, {GAME_NOISE_MIB} of it noise, one vCPU; a server whose world of 4 MiB moves 20 times a second, and \
             6 players who send 20 inputs a second each and are told of every step"
        ),
        guest: &guest,
        app: None,
        listen: load::play,
        silence: Metric::UpdateGap,
        terms: terms(granted),
        peers: peers(run),
    };
    let beside = [format!(
        "Clark et al., a Quake 3 server: downtime {GAME_PAPER_MS} ms. The longest wait of a player has the 50 ms between two steps in it."
    )];
    let mut case = service.case(run)?;
    case.beside.extend(beside);
    Ok(case)
}

fn muncher(run: &Run<'_>, stage: &Stage, granted: &Granted) -> Result<Case, BenchError> {
    let array = [format!("--fill={MUNCHED_MIB}"), format!("--dirty={MUNCHED_MIB}")];
    let guest = |vm: &str, _| GuestSpec {
        programs: vec![load::memory(&[&array[0], &array[1], "--rate=0", "--write=mixed"])],
        ..load::plain(stage, &format!("munch-{vm}"), MEMORY_MIB)
    };
    let held = granted.has(Wish::AutoConverge);
    let mut terms = terms(granted);
    if !held {
        terms.options.extend(["--timeout".to_owned(), STOPS_S.to_owned()]);
    }
    terms.limit = Some(NO_END);
    let how = if held { "ours holds it up" } else { "ours stops it after 10 s (--timeout)" };
    let workload = format!(
        "{MEMORY_MIB} MiB, one vCPU, which writes all of an array of {MUNCHED_MIB} MiB over and over as fast as it can; {how}"
    );
    let contest = Contest { stage, workload, guest: &guest, peers: peers(run), terms };
    let case = contest.busy(run, run.extent.pairs)?;
    let beside = vec![format!(
        "Clark et al., MMuncher, which writes faster than the link carries: downtime {} s.",
        MUNCHER_PAPER_MS / 1e3
    )];
    Ok(Case { name: "MMuncher".to_owned(), beside, ..case })
}

/// A quick run only shows that it works: it has no time for others.
fn peers(run: &Run<'_>) -> &'static [StockWay] {
    if run.extent.quick { &[] } else { &[StockWay::Precopy] }
}

fn terms(granted: &Granted) -> Terms {
    Terms { options: granted.order.options.clone(), ..Terms::default() }
}

fn noise(mib: u32) -> Program {
    load::memory(&[&format!("--fill={mib}"), "--dirty=0", "--sleep"])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Figures;
    use crate::results::{Contender, Move};

    #[test]
    fn each_case_is_held_to_its_own_downtime_of_the_paper() {
        let case = |name: &str, ms: f64| {
            let moves =
                vec![Move { figures: Figures::default().with(Metric::Downtime, ms), ..Move::default() }];
            let contenders = vec![Contender { moves, ..Contender::named("ours") }];
            Case { name: name.to_owned(), contenders, ..Case::default() }
        };
        let goals = goals(&[case("web server", 100.0), case("game", 100.0), case("MMuncher", 100.0)]);
        assert_eq!(goals.iter().map(|g| g.met).collect::<Vec<_>>(), [true, false, true]);
        assert!(goals[1].text.starts_with("game:"));
    }
}
