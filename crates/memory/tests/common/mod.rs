//! Real processes to work on: the test's own executable, started again as a victim that does what it is told.
//!
//! A constructor that runs before `main` turns the executable into the victim when an environment variable says so. The
//! victim thereby has just one thread, its main one, and none of the test harness's.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(unreachable_pub, reason = "shared by test files, none of which is a library")]

pub mod qemu;
pub mod victim;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use sterna_memory::{Attach, Footprint, PAGE, PageRun, Process, Reader, Region};

/// Kinds of memory that a victim can map.
pub const KINDS: [&str; 8] = [
    "anon",
    "anon-thp",
    "anon-small",
    "anon-shared",
    "memfd-private",
    "memfd-shared",
    "file-private",
    "file-shared",
];

/// Environment variable that makes the executable a victim.
pub const ROLE: &str = "STERNA_TEST_ROLE";

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A process that does what it is told; killed when dropped.
pub struct Victim {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub process: Process,
}

impl Victim {
    pub fn start() -> Victim {
        Victim::spawn(&mut Victim::command("victim"))
    }

    /// As an ordinary user, with `/dev/userfaultfd` open under the number that is returned.
    pub fn start_unprivileged() -> (Victim, i32) {
        let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
        let device = device.expect("/dev/userfaultfd is missing: the kernel needs CONFIG_USERFAULTFD");
        let mut command = Victim::command("victim");
        const NUMBER: i32 = 77;
        let raw = std::os::fd::AsRawFd::as_raw_fd(&device);
        // SAFETY:
        // - Only async-signal-safe calls are made between fork and exec.
        unsafe {
            command.pre_exec(move || match nix::libc::dup2(raw, NUMBER) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            })
        };
        (Victim::spawn(command.uid(65534).gid(65534)), NUMBER)
    }

    /// The command that starts this executable in another role.
    pub fn command(role: &str) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped());
        command
    }

    fn spawn(command: &mut Command) -> Victim {
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let process = Process::open(child.id() as i32).unwrap();
        let mut victim = Victim { child, input, output: BufReader::new(output), process };
        assert_eq!(victim.read(), "ready");
        victim
    }

    /// Sends a command without waiting for the answer.
    pub fn send(&mut self, line: &str) {
        self.input.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Reads an answer.
    pub fn read(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the victim has ended");
        line.trim().to_owned()
    }

    /// Has a command carried out.
    pub fn tell(&mut self, line: &str) -> String {
        self.send(line);
        self.read()
    }

    /// Has memory of a kind mapped (see [`victim`]); files are made at `path`.
    pub fn map(&mut self, kind: &str, pages: u64, path: &str) -> Region {
        let base = self.tell(&format!("map {kind} {pages} {path}"));
        let base = u64::from_str_radix(&base, 16).unwrap_or_else(|_| panic!("map {kind}: {base}"));
        Region { base, bytes: pages * PAGE }
    }

    /// Gives it a second thread, whom the helper may stop while the main thread waits for a page.
    pub fn park(&mut self) {
        self.tell("park");
        wait_until("its second thread to sit", || self.sitting() == 2);
    }

    /// How many threads wait in futex(2) or read(2).
    fn sitting(&self) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process.pid())).unwrap().flatten();
        let call = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("syscall")).ok();
        tasks.filter_map(call).filter(|call| call.starts_with("202 ") || call.starts_with("0 ")).count()
    }

    /// 512-byte blocks of the mapped file.
    pub fn blocks(&mut self) -> u64 {
        self.tell("blocks").parse().unwrap()
    }

    /// The anomalies that a `sit` has seen, after ending it.
    pub fn stand_up(&mut self) -> String {
        self.tell("stop")
    }

    /// Its state letter in /proc/PID/stat.
    pub fn state(&self) -> char {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.process.pid())).unwrap();
        text.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    }

    /// Waits until it is in a state.
    pub fn wait_state(&self, state: char) {
        wait_until(&format!("state {state}"), || self.state() == state);
    }

    /// Reads pages that are known to be populated.
    pub fn bytes(&self, region: &Region, run: PageRun) -> Vec<u8> {
        let mut bytes = vec![0; run.bytes() as usize];
        Reader::new(&self.process).unwrap().read(&[region.span(run)], &mut bytes).unwrap();
        bytes
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The helper that cargo built for this test.
pub fn attach() -> Attach {
    let mut attach = Attach::new(PathBuf::from(env!("CARGO_BIN_EXE_sterna-attach")));
    attach.deadline = Duration::from_secs(10);
    attach
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Fails with what differs between two footprints.
pub fn assert_same(before: &Footprint, after: &Footprint, what: &str) {
    assert!(before == after, "{what}: {:#?}", before.differences(after));
}

pub fn run(first: u64, pages: u64) -> PageRun {
    PageRun { first, pages }
}

/// All pages of runs.
pub fn pages(runs: &[PageRun]) -> std::collections::BTreeSet<u64> {
    runs.iter().flat_map(|r| r.first..r.end()).collect()
}

/// A small generator of numbers, the same for a given seed (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}

/// What the victim's `fill` writes to a page.
pub fn content(seed: u64, page: u64) -> Vec<u8> {
    let mut bytes = vec![(seed ^ page) as u8 | 1; PAGE as usize];
    bytes[..8].copy_from_slice(&(seed << 32 | page).to_le_bytes());
    bytes
}
