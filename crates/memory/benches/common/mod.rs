//! A process to measure: the benchmark's own executable, started again, with memory that it writes when told to.

#![allow(dead_code, reason = "each benchmark uses a part of it")]

pub(crate) mod harness;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::libc;
use sterna_memory::{Attach, PAGE, Process, Region};

/// Environment variable that makes the executable the measured process: the kind of memory and its bytes.
const ROLE: &str = "STERNA_BENCH_SUBJECT";

/// What is behind the measured memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Private and without a file, in small pages: plain `-m` RAM.
    Private,
    /// The same in huge pages.
    Huge,
    /// A memfd, shared.
    Shared,
    /// A memfd, private.
    PrivateFile,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Private, Kind::Huge, Kind::Shared, Kind::PrivateFile];

    /// As benchmarks are named.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Private => "private",
            Kind::Huge => "huge",
            Kind::Shared => "shared",
            Kind::PrivateFile => "private-memfd",
        }
    }
}

/// The measured process; killed when dropped.
pub(crate) struct Subject {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub(crate) process: Process,
    pub(crate) region: Region,
}

impl Subject {
    /// With this much memory, none of it touched yet.
    pub(crate) fn start(kind: Kind, bytes: u64) -> Subject {
        let mut command = Command::new("/proc/self/exe");
        command.env(ROLE, format!("{} {bytes}", kind.name()));
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("can start itself");
        let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let mut output = BufReader::new(output);
        let region = Region { base: number(&mut output), bytes };
        let process = Process::open(child.id() as i32).expect("alive");
        Subject { child, input, output, process, region }
    }

    /// With all of its memory written.
    pub(crate) fn written(kind: Kind, bytes: u64) -> Subject {
        let mut subject = Subject::start(kind, bytes);
        subject.write(1);
        subject
    }

    /// Has a byte written to every page, or to every `apart`th; the processor's time that it took.
    pub(crate) fn write(&mut self, apart: u64) -> Duration {
        writeln!(self.input, "{apart}").expect("alive");
        Duration::from_nanos(number(&mut self.output))
    }

    /// Bytes of its memory that are in huge pages.
    pub(crate) fn huge_bytes(&self) -> u64 {
        let path = format!("/proc/{}/smaps_rollup", self.process.pid());
        let text = std::fs::read_to_string(path).expect("alive");
        let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kib.expect("Linux tells it") << 10
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn number(output: &mut impl BufRead) -> u64 {
    let mut line = String::new();
    output.read_line(&mut line).expect("alive");
    line.trim().parse().expect("a number")
}

/// In the measured process: does what is asked, and returns true when it may end. To be called first by every `main`.
pub(crate) fn served() -> bool {
    let Ok(role) = std::env::var(ROLE) else { return false };
    let (name, bytes) = role.split_once(' ').expect("kind and bytes");
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name).expect("a kind");
    serve(kind, bytes.parse().expect("a number"));
    true
}

fn serve(kind: Kind, bytes: usize) {
    let base = map(kind, bytes);
    println!("{}", base.addr());
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let apart: usize = line.parse().expect("a number");
        let taken = harness::cpu_time(|| {
            for at in (0..bytes).step_by(apart * PAGE as usize) {
                // SAFETY:
                // - `at` is within the mapping, which is writable and nobody else's in this process.
                unsafe { base.add(at).write_volatile(at as u8 | 1) };
            }
        });
        println!("{}", taken.as_nanos());
    }
}

fn map(kind: Kind, bytes: usize) -> *mut u8 {
    let (flags, advice) = match kind {
        Kind::Private => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::MADV_NOHUGEPAGE),
        Kind::Huge => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::MADV_HUGEPAGE),
        Kind::Shared => (libc::MAP_SHARED, libc::MADV_NOHUGEPAGE),
        Kind::PrivateFile => (libc::MAP_PRIVATE, libc::MADV_NOHUGEPAGE),
    };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY:
    // - The name is a C string, the file is our own and as long as what is mapped of it.
    // - The mapping is new, at an address of the kernel's choice, and lives as long as the process.
    unsafe {
        let fd = if flags & libc::MAP_ANONYMOUS != 0 { -1 } else { libc::memfd_create(c"bench".as_ptr(), 0) };
        assert!(fd < 0 || libc::ftruncate(fd, bytes as i64) == 0, "cannot make a file of {bytes} bytes");
        let base = libc::mmap(std::ptr::null_mut(), bytes, prot, flags, fd, 0);
        assert_ne!(base, libc::MAP_FAILED, "cannot map {bytes} bytes");
        libc::madvise(base, bytes, advice);
        base.cast()
    }
}

/// The helper that cargo built together with the benchmark.
pub(crate) fn attach() -> Attach {
    match option_env!("CARGO_BIN_EXE_sterna-attach") {
        Some(helper) => Attach::new(helper),
        None => {
            Attach::beside_current_exe().expect("build the helper first: cargo build -r -p sterna-memory")
        }
    }
}
