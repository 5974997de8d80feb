//! Guests with a helper: they ask for their own migration, and slow what writes too fast.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::{BOOT, MOVE, World, idle, load, migrate, request};
use sterna_agent::model::{CompressionMode, MigrateRequest, MigrationView, RunRequest};
use sterna_agent::{Agent, Config};
use sterna_lab::guest::{GuestSpec, Program};

/// How long a guest that was let go may take to be as fast as before.
const RECOVERS: Duration = Duration::from_secs(60);
/// The longest that one order slows.
const LONGEST_MS: u32 = 10_000;

/// An agent whose guests may ask for the hosts that `rules` says.
fn agent(world: &World, name: &str, rules: &str) -> Arc<Agent> {
    let path = world.path(&format!("{name}.toml"));
    std::fs::write(&path, format!("{}\n{rules}\n", world.config(name))).unwrap();
    Agent::start(Config::load(&path).unwrap()).unwrap()
}

fn socket(world: &World) -> PathBuf {
    world.path("sockets-a").join("vm.guest")
}

/// Boots a guest with the port and waits until its helper answers, unless it has none.
fn boot(world: &World, agent: &Agent, programs: Vec<Program>) {
    let helper = programs.iter().any(|program| matches!(program, Program::Helper));
    let guest = GuestSpec { programs, ..world.parts.guest("vm") }.with_helper_port(&socket(world));
    agent
        .run(RunRequest { name: "vm".into(), argv: world.argv_with_orders(&guest), template: None })
        .unwrap();
    world.wait_for("vm", "READY", BOOT);
    if helper {
        world.wait_until("the helper answers", || agent.guest_is_there("vm"));
    }
}

/// Types a line at the console; the test waits for what it prints, which is not in the line itself.
fn say(world: &World, host: &str, line: &str) {
    world.order(host, "vm", line);
}

/// Asks for a migration inside of the guest, and returns what it was told.
fn asks(world: &World, at: &str, to: &str, number: u32) -> String {
    let before = world.console("vm").len();
    say(world, at, &format!("sterna-guest migrate-me {to}; echo AS''KED{number} $?"));
    let mark = format!("ASKED{number}");
    world.wait_for("vm", &mark, BOOT);
    let console = world.console("vm");
    let told = console.get(before..).unwrap_or(&console);
    told[..told.find(&mark).unwrap()].to_owned()
}

fn the_only_migration(agent: &Arc<Agent>) -> MigrationView {
    let all = agent.migrations();
    assert_eq!(all.len(), 1, "{all:?}");
    crate::support::wait(agent, &all[0].id)
}

fn moves_itself(version: &str) {
    let world = World::new(version);
    let a = agent(&world, "a", "[guests]\nmay-migrate-to = [\"b\"]");
    let b = agent(&world, "b", "[guests.vms.vm]\nmay-migrate-to = [\"a\"]");
    boot(&world, &a, vec![load(5), Program::Helper]);
    let helper = a.vm("vm").unwrap().guest_helper.expect("the helper has greeted");
    assert_eq!((helper.version, helper.capabilities.join(" ").as_str()), (1, "migrate stun"));
    let told = asks(&world, "a", "b", 1);
    assert!(told.contains("accepted: migration"), "{told}");
    let view = the_only_migration(&a);
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("completed", "b"), "{view:?}");
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    // The same daemon in the guest finds the other host's agent.
    world.wait_until("the helper answers at the target", || b.guest_is_there("vm"));
    assert_eq!(b.vm("vm").unwrap().guest_helper, Some(helper));
    let told = asks(&world, "b", "c", 2);
    assert!(told.contains("may-migrate-to"), "the host where it is decides: {told}");
    let told = asks(&world, "b", "a", 3);
    // On a slow machine the minute may be over by now.
    let here = jiff::Timestamp::now().duration_since(b.vm("vm").map_or(jiff::Timestamp::MIN, |vm| vm.since));
    if here.as_secs() < 60 {
        assert!(told.contains("less than a minute"), "it went back at once: {told}");
        assert!(b.migrations().is_empty());
        b.stop("vm").unwrap();
    }
}

#[test]
fn a_guest_moves_itself() {
    moves_itself("7.2");
}

#[test]
fn a_guest_moves_itself_on_the_newer_qemu() {
    moves_itself("10.0");
}

#[test]
fn a_guest_that_may_not_is_refused_and_stays() {
    let world = World::new("7.2");
    let a =
        agent(&world, "a", "[guests]\nmay-migrate-to = [\"b\"]\n[guests.vms.vm]\nmay-migrate-to = [\"c\"]");
    let b = world.agent("b");
    boot(&world, &a, vec![idle(), Program::Helper]);
    for (number, host) in ["b", "a", "nowhere"].into_iter().enumerate() {
        let told = asks(&world, "a", host, number as u32);
        assert!(told.contains("refused:") && told.contains("may-migrate-to"), "{host}: {told}");
    }
    // It may ask for this one, which the host does not know: it learns no more than that.
    let told = asks(&world, "a", "c", 9);
    assert!(told.contains("refused: this VM cannot be moved there"), "{told}");
    assert!(world.console("vm").contains("ASKED9 1"), "{}", world.console("vm"));
    assert!(a.migrations().is_empty() && b.vms().is_empty());
    assert_eq!(a.vm("vm").unwrap().state, "running");
    // The operator may, all the same.
    let view = migrate(&a, request("vm", "b"));
    assert_eq!(view.status, "completed", "{view:?}");
    b.stop("vm").unwrap();
}

/// Without the daemon the program asks over the port itself.
#[test]
fn a_guest_without_a_daemon_may_ask_and_moves_as_before() {
    let world = World::new("7.2");
    let (a, b) = (agent(&world, "a", "[guests]\nmay-migrate-to = [\"b\"]"), world.agent("b"));
    boot(&world, &a, vec![load(5)]);
    assert!(!a.guest_is_there("vm") && !a.stun_guest("vm", 50, 1000));
    assert!(a.vm("vm").unwrap().guest_helper.is_none());
    let told = asks(&world, "a", "b", 1);
    assert!(told.contains("accepted: migration"), "{told}");
    let view = the_only_migration(&a);
    assert_eq!(view.status, "completed", "{view:?}");
    let view = migrate(&b, request("vm", "a"));
    assert_eq!(view.status, "completed", "{view:?}");
    assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    a.stop("vm").unwrap();
}

/// A hostile program has the port in the helper's place: it floods, and replays what it has seen.
#[test]
fn a_hostile_guest_is_cut_off_and_moves_when_its_host_wants() {
    let world = World::new("7.2");
    let (a, b) = (agent(&world, "a", "[guests]\nmay-migrate-to = [\"b\"]"), world.agent("b"));
    boot(&world, &a, vec![load(5)]);
    say(&world, "a", "(while :; do echo migrate x 1 b; done) >/dev/vport0p1 & echo FLO''ODS");
    world.wait_for("vm", "FLOODS", BOOT);
    std::thread::sleep(Duration::from_secs(2));
    assert!(!a.guest_is_there("vm") && a.migrations().is_empty());
    let view = migrate(&a, request("vm", "b"));
    assert_eq!(view.status, "completed", "{view:?}");
    assert!(b.migrations().is_empty());
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    b.stop("vm").unwrap();
}

/// The part of its processor that the load gets, as the guest's kernel counts it: what it writes in a second would also tell how
/// busy this machine is.
struct Share<'a> {
    world: &'a World,
}

impl<'a> Share<'a> {
    /// The guest tells it by itself from now on: each line that is typed at its console may be broken by one that it prints.
    fn new(world: &'a World) -> Self {
        let stat = "cut -d' ' -f14,15 /proc/$(busybox pidof load)/stat";
        say(world, "a", &format!("while sleep 1;do echo ST''AT $({stat}) $(cat /proc/uptime) END;done&"));
        Self { world }
    }

    /// Seconds that the load has computed, and seconds since the boot.
    fn look(&self) -> (f64, f64) {
        /// Ticks of proc(5) in a second.
        const TICKS: f64 = 100.0;
        let told = |text: &str| text.matches("STAT ").count();
        let next = told(&self.world.console("vm")) + 1;
        let text =
            || self.world.console("vm").split("STAT ").nth(next).map(str::to_owned).unwrap_or_default();
        self.world.wait_until("the guest counts", || text().contains("END"));
        // The load may speak in the middle of it, in a line of its own.
        let text = text();
        let words = text.split_whitespace().take_while(|word| *word != "END");
        let numbers: Vec<f64> = words.filter_map(|word| word.parse().ok()).collect();
        ((numbers[0] + numbers[1]) / TICKS, numbers[2])
    }

    fn of_next(&self, seconds: u64) -> f64 {
        let before = self.look();
        std::thread::sleep(Duration::from_secs(seconds));
        let after = self.look();
        (after.0 - before.0) / (after.1 - before.1)
    }

    /// Keeps the guest slow, and measures what the load still gets.
    fn slowed(&self, agent: &Agent, percent: u32) -> f64 {
        assert!(agent.guest_is_there("vm"));
        assert!(agent.stun_guest("vm", percent, LONGEST_MS));
        // Where the machine is busy its first look may be too early.
        let found = || agent.guest_stunned("vm").is_some_and(|(processes, _)| processes > 0);
        self.world.wait_until("the guest has found the load", found);
        // Only the load writes; where the machine is busy the shell that tells of it may be found beside it.
        let stunned = agent.guest_stunned("vm");
        assert!(stunned.is_some_and(|(found, by)| found <= 2 && by == percent), "{stunned:?}");
        assert!(agent.stun_guest("vm", percent, LONGEST_MS), "it may be said again");
        self.of_next(4)
    }

    /// Waits until the load has its processor again.
    fn is_back(&self) -> Duration {
        let began = Instant::now();
        while self.of_next(1) < 0.6 {
            assert!(began.elapsed() < RECOVERS, "it stays slow");
        }
        began.elapsed()
    }
}

/// A load that writes as fast as it can. It is the only process that computes.
fn fast() -> Program {
    Program::Load(["--fill=64", "--dirty=64", "--rate=0"].map(str::to_owned).to_vec())
}

#[test]
fn what_writes_fast_is_slowed_as_asked_and_always_let_go() {
    let world = World::new("7.2");
    let a = world.agent("a");
    boot(&world, &a, vec![fast(), Program::Helper]);
    let share = Share::new(&world);
    let full = share.of_next(3);

    let half = share.slowed(&a, 50);
    a.unstun_guest("vm");
    let after_word = share.is_back();
    assert_eq!(a.guest_stunned("vm"), None);

    let tenth = share.slowed(&a, 90);
    assert!(a.stun_guest("vm", 90, 2000));
    let after_deadline = share.is_back();

    let twentieth = share.slowed(&a, 95);
    assert!(a.stun_guest("vm", 95, LONGEST_MS));
    say(&world, "a", "kill -9 $(ps | grep '[g]uest daemon' | cut -c1-5); echo KIL''LED");
    world.wait_for("vm", "KILLED", BOOT);
    let after_kill = share.is_back();
    eprintln!(
        "of a processor: {full:.2} alone, {half:.2} at 50 %, {tenth:.2} at 90 %, {twentieth:.2} at 95 %; back \
         {after_word:?} after unstun, {after_deadline:?} after the deadline, {after_kill:?} after the kill"
    );
    // Who counts computes too.
    assert!(full > 0.6, "{full}");
    assert!(half > 0.25 && half < 0.7, "{half}");
    assert!(tenth > 0.0 && tenth < 0.25, "{tenth}");
    assert!(twentieth > 0.0 && twentieth < 0.2, "{twentieth}");
    a.stop("vm").unwrap();
}

/// The helper knows which process it is, and is asked before the guest's processors are limited from outside. Nothing of it is left
/// when the guest has moved.
#[test]
fn a_guest_that_outruns_its_move_is_slowed_from_inside_first() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    boot(&world, &a, vec![fast(), Program::Helper]);
    world.wait_for("vm", "LOAD t=", BOOT);
    let asked = MigrateRequest {
        auto_converge: true,
        max_bandwidth: Some(20_000_000),
        delta_cache: Some(0),
        timeout: None,
        ..request("vm", "b")
    };
    let id = a.migrate(asked, None).unwrap().id;
    world.wait_until("its helper slows it", || {
        let view = a.watch(&id).unwrap().borrow().clone();
        let slowed = a.guest_stunned("vm").is_some();
        assert!(
            slowed || ["setup", "active"].contains(&view.status.as_str()),
            "not before it moved: {view:?}"
        );
        slowed
    });
    let view = crate::support::wait(&a, &id);
    assert_eq!(view.status, "completed", "{view:?}");
    assert_eq!(view.notices, [""; 0]);
    world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    world
        .wait_until("its helper slows nothing", || b.guest_is_there("vm") && b.guest_stunned("vm").is_none());
    b.stop("vm").unwrap();
}

/// Its rounds are so short that the guest is to be slowed by all that may be taken before the helper's time is over: the floor is
/// reached with nothing done. The processors are limited from outside all the same.
#[test]
fn a_helper_that_does_nothing_does_not_keep_its_guest_from_being_slowed() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let quick = Program::Load(["--fill=16", "--dirty=16", "--rate=0"].map(str::to_owned).to_vec());
    boot(&world, &a, vec![quick, Program::Helper]);
    world.wait_for("vm", "LOAD t=", BOOT);
    say(&world, "a", "kill -STOP $(ps | grep '[g]uest daemon' | cut -c1-5); echo STOP''PED");
    world.wait_for("vm", "STOPPED", BOOT);
    let asked = MigrateRequest {
        auto_converge: true,
        max_bandwidth: Some(20_000_000),
        delta_cache: Some(0),
        compression: CompressionMode::None,
        timeout: None,
        ..request("vm", "b")
    };
    let view = migrate(&a, asked);
    assert_eq!(view.status, "completed", "{view:?}");
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    b.stop("vm").unwrap();
}

/// The agent goes away without a word: the guest sees its port close.
#[test]
fn a_guest_whose_agent_ends_is_let_go() {
    let world = World::new("7.2");
    let a = world.agent("a");
    boot(&world, &a, vec![fast(), Program::Helper]);
    let share = Share::new(&world);
    let slow = share.slowed(&a, 95);
    assert!(slow < 0.2, "{slow}");
    assert!(a.stun_guest("vm", 95, LONGEST_MS));
    drop(a);
    share.is_back();
    // The next one is heard as well.
    let a = world.agent("a");
    world.wait_until("the helper answers the next agent", || a.guest_is_there("vm"));
    a.stop("vm").unwrap();
}

/// Whoever connects to the socket first keeps the agent out; nothing waits for it.
#[test]
fn a_port_that_somebody_else_has_is_no_harm() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let guest =
        GuestSpec { programs: vec![load(5)], ..world.parts.guest("vm") }.with_helper_port(&socket(&world));
    a.run(RunRequest { name: "vm".into(), argv: world.argv(&guest), template: None }).unwrap();
    world.wait_for("vm", "READY", BOOT);
    let mut other = UnixStream::connect(socket(&world)).unwrap();
    drop(other.write_all(b"hello 1 theirs\n"));
    let view = migrate(&a, request("vm", "b"));
    assert_eq!(view.status, "completed", "{view:?}");
    other.set_read_timeout(Some(MOVE)).unwrap();
    drop(other.read(&mut [0; 16]));
    b.stop("vm").unwrap();
}
