//! Threads of a real process, slowed and let go in every way.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sterna_memory::{Attach, Process, Throttle, first_writes};

/// A process that does nothing but compute; killed when dropped.
struct Busy(Child);

impl Busy {
    fn start() -> (Busy, Process) {
        let mut command = Command::new("sh");
        let child = command.args(["-c", "while :; do :; done"]).stdin(Stdio::null()).spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        (Busy(child), process)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Its processor time so far.
    fn used(&self) -> Duration {
        let stat = procfs::process::Process::new(self.pid()).unwrap().stat().unwrap();
        Duration::from_millis((stat.utime + stat.stime) * 1000 / procfs::ticks_per_second())
    }

    /// The part of a second that it gets, in percent.
    fn gets(&self) -> u128 {
        let (before, began) = (self.used(), Instant::now());
        std::thread::sleep(Duration::from_secs(1));
        (self.used() - before).as_millis() * 100 / began.elapsed().as_millis()
    }

    /// Where it is told what it may use.
    fn groups(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/cgroup", self.pid())).unwrap()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn attach() -> Attach {
    Attach::beside_current_exe().unwrap()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < until, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The helpers of a process: who slows it.
fn helpers() -> Vec<PathBuf> {
    let all = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let me = std::process::id().to_string();
    let is_ours = |path: &PathBuf| {
        let stat = std::fs::read_to_string(path.join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)).map(str::to_owned);
        stat.contains("(sterna-attach)") && parent.as_ref() == Some(&me)
    };
    all.filter(is_ours).collect()
}

#[test]
fn a_thread_is_slowed_and_let_go() {
    let (busy, process) = Busy::start();
    let before = busy.groups();
    let mut throttle = Throttle::start(&process, &[busy.pid()], &attach()).unwrap();
    throttle.keep(100).unwrap();
    let slow = busy.gets();
    assert!(slow <= 20, "it got {slow} %");
    // The least there is: a millisecond of each second.
    throttle.keep(1).unwrap();
    let least = busy.gets();
    assert!(least <= 5, "it got {least} %");
    throttle.keep(1000).unwrap();
    drop(throttle);
    wait_until("it is where it was", || busy.groups() == before);
}

#[test]
fn what_a_killed_helper_leaves_is_taken_over_and_removed() {
    let (busy, process) = Busy::start();
    let before = busy.groups();
    let mut first = Throttle::start(&process, &[busy.pid()], &attach()).unwrap();
    first.keep(50).unwrap();
    for helper in helpers() {
        let pid = helper.file_name().unwrap().to_str().unwrap().parse().unwrap();
        Process::open(pid).unwrap().kill().unwrap();
    }
    assert!(first.keep(500).is_err(), "nobody is there to do it");
    assert_ne!(busy.groups(), before, "what nobody undid stays");
    drop(Throttle::start(&process, &[busy.pid()], &attach()).unwrap());
    wait_until("it is where it was", || busy.groups() == before);
}

#[test]
fn threads_of_others_none_and_dead_ones_are_refused() {
    let (busy, process) = Busy::start();
    let refused = |threads: &[i32]| Throttle::start(&process, threads, &attach()).unwrap_err().to_string();
    assert!(refused(&[1]).contains("no thread of it"), "{}", refused(&[1]));
    assert!(refused(&[]).contains("no threads"));
    assert!(refused(&vec![busy.pid(); 5000]).contains("too many"));
    drop(busy);
    assert!(refused(&[process.pid()]).contains("ended"), "{}", refused(&[process.pid()]));
}

#[test]
fn first_writes_are_counted_for_each_thread() {
    let process = Process::open(std::process::id() as i32).unwrap();
    let me = rustix::thread::gettid().as_raw_nonzero().get();
    let before = first_writes(&process, &[me, 1])[0];
    let memory = vec![1u8; 4 << 20];
    std::hint::black_box(&memory);
    let after = first_writes(&process, &[me, -1]);
    assert!(after[0] > before, "writing to new memory faults");
    assert_eq!(after[1], 0, "no thread, no writes");
}
