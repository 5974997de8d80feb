//! The victim's side: commands line by line on standard input, one answer each on standard output.
//!
//! - `map KIND PAGES PATH` -> base in hex. Kinds: `anon`, `anon-thp`, `anon-small`, `memfd-private`, `memfd-shared`,
//!   `file-private`, `file-shared`, `anon-shared`, and `huge-private`, `huge-shared`: a memfd in huge pages of 2 MiB.
//! - `fill FIRST PAGES SEED`, `verify FIRST PAGES SEED`, `zero FIRST PAGES` (how many pages are all zero), `blocks`,
//!   `store FIRST PAGES SEED` (into the file, not through the mapping), `scatter SEED COUNT`, `comb APART` (a byte to each APARTth page), `drop FIRST PAGES`
//! - `kernel FIRST PAGES SEED`: as `verify`, but the kernel reads the pages; `lock`: all of it into memory
//! - `churn HOW THREADS FIRST PAGES SEED`: threads discard page after page, look, and write every third; then how many were not zero.
//!   `churned FIRST PAGES SEED`: how many pages are not as that has left them
//! - `open PATH`: the number of a descriptor for it
//! - `twin`: the pid of a child that shares all memory by fork(2)
//! - `sit KIND` -> sits in a system call over and over until the next line; then how often, and what was wrong.

use std::arch::asm;
use std::fs::File;
use std::io::{BufRead, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::libc;

use super::{ROLE, Random, content};

const PAGE: usize = sterna_memory::PAGE as usize;

#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn before_main() {
        match std::env::var(ROLE).as_deref() {
            Ok("victim") => serve(),
            Ok("tracker") => track_for_ever(),
            Ok("preflight") => reply(&format!("{:?}", sterna_memory::preflight())),
            _ => return,
        }
        std::process::exit(0);
    }
    before_main
};

/// Starts and stops tracking over and over (`STERNA_TEST_PID`, `STERNA_TEST_BASE`, `STERNA_TEST_BYTES`), to be killed.
fn track_for_ever() {
    use sterna_memory::{Process, Region, WpAsyncTracker};
    let number = |name: &str| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let process = Process::open(number("STERNA_TEST_PID") as i32).unwrap();
    let region = Region { base: number("STERNA_TEST_BASE"), bytes: number("STERNA_TEST_BYTES") };
    loop {
        let tracker = WpAsyncTracker::start(&process, vec![region], &super::attach()).unwrap();
        reply("tracking");
        if std::env::var("STERNA_TEST_HOLD").is_ok() {
            std::thread::sleep(super::PATIENCE);
        }
        drop(tracker);
    }
}

fn reply(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").unwrap();
    out.flush().unwrap();
}

struct Memory {
    base: *mut u8,
    pages: usize,
    file: Option<File>,
    shared: bool,
    huge: bool,
}

fn serve() {
    reply("ready");
    let mut memory = Memory { base: std::ptr::null_mut(), pages: 0, file: None, shared: false, huge: false };
    let mut line = String::new();
    loop {
        line.clear();
        if std::io::stdin().lock().read_line(&mut line).unwrap() == 0 {
            return;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |i: usize| words[i].parse::<u64>().unwrap();
        let answer = match words[0] {
            "map" => {
                memory = map(words[1], number(2) as usize, words.get(3).copied().unwrap_or_default());
                format!("{:x}", memory.base.addr())
            }
            "fill" => memory.fill(number(1), number(2), number(3)),
            "store" => memory.store(number(1), number(2), number(3)),
            "verify" => memory.verify(number(1), number(2), number(3)),
            "zero" => memory.zero(number(1), number(2)),
            "scatter" => memory.scatter(number(1), number(2)),
            "comb" => memory.comb(number(1)),
            "drop" => memory.discard(number(1), number(2)),
            "dontneed" => memory.dontneed(number(1), number(2)),
            "kernel" => memory.kernel(number(1), number(2), number(3)),
            "lock" => memory.lock(),
            "churn" => memory.churn(words[1], number(2), number(3), number(4), number(5)),
            "churned" => memory.churned(number(1), number(2), number(3)),
            "blocks" => memory.file.as_ref().map_or(0, |f| f.metadata().unwrap().blocks()).to_string(),
            "open" => open(words[1]),
            "sit" => sit(words[1]),
            "vfork" => vfork(number(1)),
            "twin" => twin(),
            "park" => park(),
            "seccomp" => forbid_userfaultfd(),
            "traps" => traps(words[1]),
            "leftover" => memory.leftover(number(1)),
            other => format!("what is {other}?"),
        };
        reply(&answer);
    }
}

/// Opens a file for good; its number.
fn open(path: &str) -> String {
    let file = File::options().read(true).open(path).unwrap();
    std::os::fd::IntoRawFd::into_raw_fd(file).to_string()
}

fn map(kind: &str, pages: usize, path: &str) -> Memory {
    let len = pages * PAGE;
    let shared = kind.ends_with("-shared");
    let file = match kind.split('-').next().unwrap() {
        "memfd" => {
            // SAFETY: the name is a valid C string; the descriptor is new and owned by nobody else.
            Some(unsafe { File::from_raw_fd(libc::memfd_create(c"victim".as_ptr(), 0)) })
        }
        "huge" => {
            let flags = libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
            // SAFETY: the name is a valid C string; the descriptor is new and owned by nobody else.
            Some(unsafe { File::from_raw_fd(libc::memfd_create(c"victim".as_ptr(), flags)) })
        }
        "file" => {
            Some(File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap())
        }
        _ => None,
    };
    if let Some(file) = &file {
        file.set_len(len as u64).unwrap();
    }
    let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let flags = flags | if file.is_none() { libc::MAP_ANONYMOUS } else { 0 };
    let fd = file.as_ref().map_or(-1, |f| f.as_raw_fd());
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base =
        unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    assert_ne!(base, libc::MAP_FAILED);
    let advice = match kind {
        "anon-thp" => Some(libc::MADV_HUGEPAGE),
        "anon-small" => Some(libc::MADV_NOHUGEPAGE),
        _ => None,
    };
    if let Some(advice) = advice {
        // SAFETY: the range was just mapped.
        assert_eq!(unsafe { libc::madvise(base, len, advice) }, 0);
    }
    Memory { base: base.cast(), pages, file, shared, huge: kind.starts_with("huge") }
}

impl Memory {
    fn page(&self, page: u64) -> &'static mut [u8] {
        assert!((page as usize) < self.pages);
        // SAFETY: within the mapping, which is never unmapped; nobody in this process holds another reference.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(page as usize * PAGE), PAGE) }
    }

    fn fill(&self, first: u64, count: u64, seed: u64) -> String {
        (first..first + count).for_each(|p| self.page(p).copy_from_slice(&content(seed, p)));
        "ok".into()
    }

    fn store(&self, first: u64, count: u64, seed: u64) -> String {
        let file = self.file.as_ref().unwrap();
        if self.huge {
            return self.store_huge(file, first, count, seed);
        }
        (first..first + count).for_each(|p| file.write_all_at(&content(seed, p), p * PAGE as u64).unwrap());
        "ok".into()
    }

    /// hugetlbfs has no write(2): through another mapping, which is gone after.
    fn store_huge(&self, file: &File, first: u64, count: u64, seed: u64) -> String {
        let (len, rights) = (self.pages * PAGE, libc::PROT_READ | libc::PROT_WRITE);
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice, written within its bounds and unmapped by its length.
        unsafe {
            let base = libc::mmap(std::ptr::null_mut(), len, rights, flags, file.as_raw_fd(), 0);
            assert_ne!(base, libc::MAP_FAILED);
            for page in first..first + count {
                let to = base.cast::<u8>().add(page as usize * PAGE);
                std::ptr::copy_nonoverlapping(content(seed, page).as_ptr(), to, PAGE);
            }
            libc::munmap(base, len);
        }
        "ok".into()
    }

    fn verify(&self, first: u64, count: u64, seed: u64) -> String {
        let wrong: Vec<u64> = (first..first + count).filter(|&p| *self.page(p) != content(seed, p)).collect();
        if wrong.is_empty() { "ok".into() } else { format!("wrong: {wrong:?}") }
    }

    /// Written to a file from where they are: it is the kernel that finds them missing.
    fn kernel(&self, first: u64, count: u64, seed: u64) -> String {
        // SAFETY: the name is a valid C string; the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"copy".as_ptr(), 0)) };
        let mut wrong = Vec::new();
        for page in first..first + count {
            file.write_all_at(self.page(page), 0).unwrap();
            let mut copy = vec![0; PAGE];
            file.read_exact_at(&mut copy, 0).unwrap();
            if copy != content(seed, page) {
                wrong.push(page);
            }
        }
        if wrong.is_empty() { "ok".into() } else { format!("wrong: {wrong:?}") }
    }

    fn lock(&self) -> String {
        // SAFETY: the range is mapped.
        assert_eq!(unsafe { libc::mlock(self.base.cast(), self.pages * PAGE) }, 0);
        "ok".into()
    }

    fn churn(&self, how: &str, threads: u64, first: u64, count: u64, seed: u64) -> String {
        let not_zero = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..threads {
                // Only numbers go to the threads: each has pages of its own.
                let (base, not_zero) = (self.base.expose_provenance(), &not_zero);
                scope.spawn(move || {
                    for page in (first + thread..first + count).step_by(threads as usize) {
                        let start = std::ptr::with_exposed_provenance_mut::<u8>(base + page as usize * PAGE);
                        let advice = if how == "remove" { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
                        if how == "wait" {
                            // The second thread discards what the first one waits for.
                            if thread == 1 {
                                std::thread::sleep(4 * NAP);
                                // SAFETY: a range within the mapping, of which nobody holds a reference yet.
                                let result = unsafe { libc::madvise(start.sub(PAGE).cast(), PAGE, advice) };
                                assert_eq!(result, 0);
                            } else {
                                // SAFETY: within the mapping.
                                let byte = unsafe { start.read_volatile() };
                                not_zero.fetch_add(byte.into(), Ordering::Relaxed);
                            }
                            continue;
                        }
                        // SAFETY: within the mapping, and nobody else holds a reference to this page.
                        let bytes = unsafe {
                            assert_eq!(libc::madvise(start.cast(), PAGE, advice), 0);
                            std::slice::from_raw_parts_mut(start, PAGE)
                        };
                        if bytes.iter().any(|b| *b != 0) {
                            not_zero.fetch_add(1, Ordering::Relaxed);
                        }
                        if page.is_multiple_of(3) {
                            bytes.copy_from_slice(&content(seed, page));
                        }
                    }
                });
            }
        });
        not_zero.into_inner().to_string()
    }

    fn churned(&self, first: u64, count: u64, seed: u64) -> String {
        let left = |page: u64| if page.is_multiple_of(3) { content(seed, page) } else { vec![0; PAGE] };
        (first..first + count).filter(|&p| *self.page(p) != left(p)).count().to_string()
    }

    fn zero(&self, first: u64, count: u64) -> String {
        (first..first + count).filter(|&p| self.page(p).iter().all(|&b| b == 0)).count().to_string()
    }

    /// Writes one byte, never the value that is there, to each of `count` random pages.
    fn scatter(&self, seed: u64, count: u64) -> String {
        let mut random = Random(seed);
        for _ in 0..count {
            let page = random.below(self.pages as u64);
            let byte = &mut self.page(page)[random.below(PAGE as u64) as usize];
            *byte = byte.wrapping_add(1);
        }
        "ok".into()
    }

    fn comb(&self, apart: u64) -> String {
        (0..self.pages as u64).step_by(apart as usize).for_each(|page| self.page(page)[0] = 1);
        "ok".into()
    }

    /// Leaves a userfaultfd with these features open, with all memory registered, as an attach that was cut short might.
    fn leftover(&self, features: u64) -> String {
        use linux_raw_sys::{general, ioctl};
        let range = general::uffdio_range { start: self.base.addr() as u64, len: (self.pages * PAGE) as u64 };
        let mut api = general::uffdio_api { api: general::UFFD_API.into(), features, ioctls: 0 };
        let mode = general::UFFDIO_REGISTER_MODE_WP.into();
        let mut register = general::uffdio_register { range, mode, ioctls: 0 };
        // SAFETY: the structures are locals that outlive the calls; the descriptor is meant to stay open.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
            assert_eq!(libc::ioctl(fd, ioctl::UFFDIO_API.into(), &mut api), 0);
            assert_eq!(libc::ioctl(fd, ioctl::UFFDIO_REGISTER.into(), &mut register), 0);
            fd.to_string()
        }
    }

    fn dontneed(&self, first: u64, count: u64) -> String {
        let (offset, len) = (first as usize * PAGE, count as usize * PAGE);
        // SAFETY: within the mapping; no reference to it is held.
        let result = unsafe { libc::madvise(self.base.add(offset).cast(), len, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
        "ok".into()
    }

    fn discard(&self, first: u64, count: u64) -> String {
        let (offset, len) = (first as usize * PAGE, count as usize * PAGE);
        // SAFETY: within the mapping; no reference to it is held.
        let advise = |advice| unsafe { libc::madvise(self.base.add(offset).cast(), len, advice) };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: plain numbers.
        let punch =
            |file: &File| unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) };
        // As QEMU does: what is backed by a descriptor is punched, and what is private is dropped too unless it is huge.
        let result = match (&self.file, self.shared || self.huge) {
            (None, true) => advise(libc::MADV_REMOVE),
            (None, false) => advise(libc::MADV_DONTNEED),
            (Some(file), true) => punch(file),
            (Some(file), false) => advise(libc::MADV_DONTNEED) | punch(file),
        };
        assert_eq!(result, 0);
        "ok".into()
    }
}

/// Sleeps uninterruptibly: a parent does, until its child that was made by vfork ends.
fn vfork(ms: u64) -> String {
    // SAFETY: without CLONE_VM the child has memory of its own; it makes only async-signal-safe calls.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_VFORK | libc::SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        let time = libc::timespec { tv_sec: (ms / 1000) as i64, tv_nsec: (ms % 1000 * 1_000_000) as i64 };
        // SAFETY: a local that outlives the call; _exit does not return.
        unsafe {
            libc::nanosleep(&time, std::ptr::null_mut());
            libc::_exit(0);
        }
    }
    let mut status = 0;
    // SAFETY: a local that outlives the call.
    let got = unsafe { libc::waitpid(child as i32, &mut status, 0) };
    if i64::from(got) == child && status == 0 { "ok".into() } else { format!("child {got}, status {status}") }
}

/// Forks a child that shares its memory and sleeps as long as its parent lives; its pid.
fn twin() -> String {
    // SAFETY: the child makes only async-signal-safe calls.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: neither takes a pointer; pause returns only for a signal, and none is handled.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
    }
    child.to_string()
}

/// Starts a thread that sits in futex(2) for ever.
fn park() -> String {
    std::thread::spawn(|| {
        loop {
            std::thread::park();
        }
    });
    "ok".into()
}

/// From now on, userfaultfd(2) kills this process.
fn forbid_userfaultfd() -> String {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_userfaultfd as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the program is a local that outlives the calls.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
    "ok".into()
}

/// Real-time signals, each of which is queued, and SIGBUS, of which one can be pending.
static SIGNALS: AtomicU64 = AtomicU64::new(0);
static FAULTS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_signal(signal: libc::c_int) {
    let counter = if signal == libc::SIGBUS { &FAULTS } else { &SIGNALS };
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What becomes of a SIGTRAP from now on.
fn traps(how: &str) -> String {
    let handler = match how {
        "ignore" => libc::SIG_IGN,
        _ => count_signal as *const () as libc::sighandler_t,
    };
    SIGNALS.store(0, Ordering::Relaxed);
    // SAFETY: the handler only touches an atomic.
    unsafe { libc::signal(libc::SIGTRAP, handler) };
    "set".into()
}

fn sit(kind: &str) -> String {
    SIGNALS.store(0, Ordering::Relaxed);
    if kind == "signals" {
        for signal in [libc::SIGRTMIN() + 5, libc::SIGBUS] {
            // SAFETY: the handler only touches an atomic.
            unsafe { libc::signal(signal, count_signal as *const () as libc::sighandler_t) };
        }
    }
    reply("sitting");
    let mut wrong: Vec<String> = Vec::new();
    let mut calls = 0u64;
    while !line_waits() {
        let began = Instant::now();
        if let Err(what) = once(kind, began) {
            wrong.push(what);
        }
        calls += 1;
    }
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
    wrong.truncate(5);
    let (signals, faults) = (SIGNALS.load(Ordering::Relaxed), FAULTS.load(Ordering::Relaxed));
    format!(
        "{} {wrong:?} signals {signals} faults {faults} calls {calls}",
        if wrong.is_empty() { "fine" } else { "WRONG" }
    )
}

const NAP: Duration = Duration::from_millis(5);

fn nap() -> libc::timespec {
    libc::timespec { tv_sec: 0, tv_nsec: NAP.as_nanos() as i64 }
}

/// One call that must take its time and return just what it returns when nobody disturbs it.
fn once(kind: &str, began: Instant) -> Result<(), String> {
    static WORD: AtomicU64 = AtomicU64::new(0);
    let word = WORD.as_ptr();
    let nothing: *mut libc::pollfd = std::ptr::null_mut();
    // SAFETY: every pointer is to a local or static of the right type that outlives the call, or null where that is allowed.
    let (got, want) = unsafe {
        match kind {
            "nanosleep" => (errno(libc::nanosleep(&nap(), std::ptr::null_mut()).into()), 0),
            "poll" => (errno(libc::poll(nothing, 0, NAP.as_millis() as i32).into()), 0),
            "ppoll" => {
                let mut mask = std::mem::zeroed();
                libc::sigemptyset(&mut mask);
                (errno(libc::ppoll(nothing, 0, &nap(), &mask).into()), 0)
            }
            "futex" => {
                let wait = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
                (errno(libc::syscall(libc::SYS_futex, word, wait, 0, &nap())), -libc::ETIMEDOUT as i64)
            }
            "read" => return read_pipe(),
            "spin" => return spin(),
            "signals" => {
                libc::nanosleep(&nap(), std::ptr::null_mut());
                return Ok(());
            }
            other => return Err(format!("what is {other}?")),
        }
    };
    match began.elapsed() {
        _ if got != want => Err(format!("{kind} returned {got}, not {want}")),
        short if short < NAP => Err(format!("{kind} took only {short:?}")),
        _ => Ok(()),
    }
}

fn errno(result: i64) -> i64 {
    if result == -1 { -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap()) } else { result }
}

/// Blocks in read(2) until a timer thread of the kernel (a timerfd) has expired: a call without a timeout of its own.
fn read_pipe() -> Result<(), String> {
    // SAFETY: the structures are locals that outlive the calls; the descriptor is new and closed at the end of its `File`.
    unsafe {
        let timer = File::from_raw_fd(libc::timerfd_create(libc::CLOCK_MONOTONIC, 0));
        let spec = libc::itimerspec { it_interval: std::mem::zeroed(), it_value: nap() };
        assert_eq!(libc::timerfd_settime(timer.as_raw_fd(), 0, &spec, std::ptr::null_mut()), 0);
        let mut expirations = 0u64;
        let got = errno(libc::read(timer.as_raw_fd(), (&raw mut expirations).cast(), 8) as i64);
        if got == 8 && expirations == 1 { Ok(()) } else { Err(format!("read returned {got}, {expirations}")) }
    }
}

/// Spins in user mode with known values in general and vector registers, and in the red zone below the stack pointer.
fn spin() -> Result<(), String> {
    let pattern: [u64; 4] =
        [0x1111_2222_3333_4444, 0x5555_6666_7777_8888, 0x9999_aaaa_bbbb_cccc, 0xdddd_eeee_ffff_0001];
    let mut seen = [0u64; 4];
    let (mut r8, mut r9, mut r10, mut r11, mut rdi): (u64, u64, u64, u64, u64) = (8, 9, 10, 11, 7);
    let (red, left): (u64, u64);
    // SAFETY: the code only uses the registers that it declares, memory of two locals, and 8 bytes of the red zone, which
    // nobody else uses since the block calls nothing.
    unsafe {
        asm!(
            "mov qword ptr [rsp - 64], 0x5ea51de",
            "vmovdqu ymm7, ymmword ptr [{p}]",
            "2: dec rcx",
            "jnz 2b",
            "vmovdqu ymmword ptr [{s}], ymm7",
            "mov {red}, qword ptr [rsp - 64]",
            p = in(reg) pattern.as_ptr(), s = in(reg) seen.as_mut_ptr(), red = out(reg) red,
            inout("rcx") 2_000_000u64 => left,
            inout("r8") r8, inout("r9") r9, inout("r10") r10, inout("r11") r11, inout("rdi") rdi, out("ymm7") _,
        );
    }
    let general = [r8, r9, r10, r11, rdi, left, red];
    match general == [8, 9, 10, 11, 7, 0, 0x5ea_51de] && seen == pattern {
        true => Ok(()),
        false => Err(format!("registers {general:x?}, vector {seen:x?}")),
    }
}

fn line_waits() -> bool {
    let mut stdin = libc::pollfd { fd: 0, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that outlives the call.
    unsafe { libc::poll(&mut stdin, 1, 0) > 0 }
}
