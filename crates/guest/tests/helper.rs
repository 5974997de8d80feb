//! The guest's helper, with this test as its host: the port is a socket. Only programs that the test starts are slowed.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const HELPER: &str = env!("CARGO_BIN_EXE_sterna-guest");
const LOAD: &str = env!("CARGO_BIN_EXE_load");
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder, a daemon whose port we are, and a load under a name of its own.
struct Scene {
    folder: PathBuf,
    daemon: Child,
    load: Child,
    agent: UnixStream,
    heard: BufReader<UnixStream>,
}

impl Scene {
    fn new(name: &str) -> Scene {
        let folder = std::env::temp_dir().join(format!("sterna-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        // The kernel tells 15 bytes of a name: this one is no other program's.
        let program = format!("w{}-{name}", std::process::id()).chars().take(15).collect::<String>();
        std::fs::copy(LOAD, folder.join(&program)).unwrap();
        let listener = UnixListener::bind(folder.join("port")).unwrap();
        let daemon = Command::new(HELPER)
            .arg("daemon")
            .arg(format!("--port={}", folder.join("port").display()))
            .arg(format!("--socket={}", folder.join("daemon.sock").display()))
            .arg(format!("--only={program}"))
            .spawn()
            .unwrap();
        let (agent, _) = listener.accept().unwrap();
        agent.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut load = Command::new(folder.join(&program));
        load.args(["--fill=32", "--dirty=32", "--rate=0"]).stdout(Stdio::null());
        let load = load.spawn().unwrap();
        let heard = BufReader::new(agent.try_clone().unwrap());
        Scene { folder, daemon, load, agent, heard }
    }

    fn say(&mut self, line: &str) {
        self.agent.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// The next line of the daemon that begins with a word.
    fn hear(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.heard.read_line(&mut line).unwrap() > 0, "the daemon is gone");
            if line.starts_with(word) {
                return line.trim_end().to_owned();
            }
        }
    }

    fn greet(&mut self) {
        self.say("\nhello 1 abcdef");
        while !self.hear("hello").contains(" abcdef ") {}
    }

    fn ask(&self, host: &str) -> Child {
        let mut command = Command::new(HELPER);
        command.args(["migrate-me", host]);
        command.arg(format!("--socket={}", self.folder.join("daemon.sock").display()));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Whether the load is stopped at any of a hundred looks.
    fn is_slowed(&self) -> bool {
        (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            state(self.load.id()) == 'T'
        })
    }

    fn wait_until_it_runs(&self) {
        let end = Instant::now() + PATIENCE;
        while self.is_slowed() {
            assert!(Instant::now() < end, "the load is still slowed");
        }
    }

    /// The share of a processor that the load gets, of 100.
    fn share(&self) -> f64 {
        const LOOK: Duration = Duration::from_secs(3);
        let (before, began) = (ticks(self.load.id()), Instant::now());
        std::thread::sleep(LOOK);
        (ticks(self.load.id()) - before) as f64 / began.elapsed().as_secs_f64()
    }

    fn stun(&mut self, percent: u32, ms: u32) {
        self.greet();
        self.say(&format!("stun {percent} {ms}"));
        assert_eq!(self.hear("stunned"), format!("stunned 1 {percent}"));
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for child in [&mut self.load, &mut self.daemon] {
            drop(child.kill());
            drop(child.wait());
        }
        drop(std::fs::remove_dir_all(&self.folder));
    }
}

fn stat(pid: u32) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    text.rsplit_once(')').unwrap().1.split_whitespace().map(str::to_owned).collect()
}

fn state(pid: u32) -> char {
    stat(pid)[0].chars().next().unwrap()
}

fn ticks(pid: u32) -> u64 {
    let stat = stat(pid);
    stat[11].parse::<u64>().unwrap() + stat[12].parse::<u64>().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_process_that_writes_is_slowed_and_let_go_by_word() {
    let mut scene = Scene::new("word");
    scene.stun(90, 10_000);
    assert!(scene.is_slowed());
    // Whatever else this machine does, it cannot get more than it is left.
    let share = scene.share();
    assert!(share < 30.0, "it gets {share} % of a processor, 10 were asked for");
    scene.say("unstun");
    assert_eq!(scene.hear("running"), "running");
    scene.wait_until_it_runs();
}

#[test]
fn it_ends_at_the_deadline_by_itself() {
    let mut scene = Scene::new("deadline");
    scene.stun(50, 1000);
    assert_eq!(scene.hear("running"), "running");
    scene.wait_until_it_runs();
}

#[test]
fn it_ends_when_the_host_goes_away() {
    let mut scene = Scene::new("away");
    scene.stun(95, 10_000);
    scene.agent.shutdown(std::net::Shutdown::Both).unwrap();
    let began = Instant::now();
    scene.wait_until_it_runs();
    assert!(began.elapsed() < Duration::from_secs(9), "only the deadline has ended it");
}

#[test]
fn it_ends_when_the_daemon_is_ended() {
    for signal in ["TERM", "INT", "KILL"] {
        let mut scene = Scene::new(signal);
        scene.stun(95, 10_000);
        assert!(scene.is_slowed());
        let pid = scene.daemon.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        scene.daemon.wait().unwrap();
        let began = Instant::now();
        scene.wait_until_it_runs();
        assert!(began.elapsed() < Duration::from_secs(9), "{signal}: only the deadline has ended it");
    }
}

#[test]
fn without_its_watchdog_it_stops_nobody_until_it_has_another() {
    let mut scene = Scene::new("watchdog");
    scene.stun(95, 10_000);
    let children = format!("/proc/{0}/task/{0}/children", scene.daemon.id());
    let watchdog = std::fs::read_to_string(children).unwrap();
    assert!(Command::new("kill").args(["-9", watchdog.trim()]).status().unwrap().success());
    assert_eq!(scene.hear("running"), "running");
    scene.wait_until_it_runs();
    scene.stun(95, 10_000);
    assert!(scene.is_slowed());
}

#[test]
fn requests_go_to_the_host_and_answers_come_back() {
    let mut scene = Scene::new("ask");
    scene.greet();
    let asked = scene.ask("hostb");
    assert_eq!(scene.hear("migrate"), "migrate abcdef 1 hostb");
    scene.say("accepted 1 0123 hostb");
    let output = asked.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output).as_str()),
        (Some(0), "accepted: migration 0123 to hostb\n")
    );
    let asked = scene.ask("hostc");
    assert_eq!(scene.hear("migrate"), "migrate abcdef 2 hostc");
    // What answers an earlier request answers none.
    scene.say("accepted 1 0123 hostb");
    scene.say("refused 2 not to that host");
    let output = asked.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output).as_str()), (Some(1), "refused: not to that host\n"));
}

#[test]
fn a_request_whose_agent_goes_away_is_answered() {
    let mut scene = Scene::new("lost");
    scene.greet();
    let asked = scene.ask("hostb");
    scene.hear("migrate");
    scene.agent.shutdown(std::net::Shutdown::Both).unwrap();
    let output = asked.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("ask again"), "{}", text(&output));
    // Nobody has said hello since.
    let output = scene.ask("hostb").wait_with_output().unwrap();
    assert!(text(&output).contains("no agent answers"), "{}", text(&output));
}

#[test]
fn junk_from_the_host_is_left_out() {
    let mut scene = Scene::new("junk");
    scene.agent.write_all(&vec![b'x'; 1 << 20]).unwrap();
    scene.agent.write_all(b"\n\xff\xfe\nstun\nstun x y\naccepted\nhello 99999999999 a\n").unwrap();
    scene.greet();
}

#[test]
fn without_a_daemon_the_port_is_used() {
    let folder = std::env::temp_dir().join(format!("sterna-direct-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let listener = UnixListener::bind(folder.join("port")).unwrap();
    let asked = ask_directly(&folder);
    let (mut agent, _) = listener.accept().unwrap();
    let mut heard = BufReader::new(agent.try_clone().unwrap());
    let mut next = || {
        let mut line = String::new();
        while line.trim().is_empty() {
            line.clear();
            heard.read_line(&mut line).unwrap();
        }
        line
    };
    assert!(next().starts_with("hello 1 - migrate sterna-guest/"));
    agent.write_all(b"\nhello 1 n1\n").unwrap();
    assert!(next().starts_with("hello 1 n1 migrate "));
    assert_eq!(next(), "migrate n1 1 hostb\n");
    agent.write_all(b"refused 1 not there\n").unwrap();
    let output = asked.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output).as_str()), (Some(1), "refused: not there\n"));
    std::fs::remove_dir_all(&folder).unwrap();
}

fn ask_directly(folder: &Path) -> Child {
    let mut command = Command::new(HELPER);
    command.args(["migrate-me", "hostb"]).arg(format!("--port={}", folder.join("port").display()));
    command.arg(format!("--socket={}", folder.join("none.sock").display()));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn wrong_arguments_are_told() {
    for (arguments, told) in [
        (&["--help"][..], "may-migrate-to"),
        (&["migrate-me"], "needs the name"),
        (&["migrate-me", "a b"], "no name of a host"),
        (&["dance"], "not understood"),
        (&["daemon", "--port=/nowhere"], "cannot be opened"),
        (&["--stun=1"], "--stun"),
    ] {
        let output = Command::new(HELPER).args(arguments).output().unwrap();
        assert!(text(&output).contains(told), "{arguments:?}: {}", text(&output));
        assert_eq!(output.status.code(), Some(if arguments == ["--help"] { 0 } else { 2 }), "{arguments:?}");
    }
}
