//! The helper process `sterna-attach`: one request, one attach, one answer; and [`throttle`], which lasts.
//!
//! It must not be ended in the middle, since a tracer's death would leave a thread of QEMU with our registers. So it first
//! makes itself deaf to signals, takes a session of its own and moves into the target's cgroup; only a SIGKILL aimed at it
//! could still end it. Its parent may die at any time: the work is finished, and the descriptor that nobody takes closes.

mod inject;
mod throttle;
mod victim;

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use linux_raw_sys::general::{
    __NR_close, __NR_ioctl, __NR_madvise, __NR_mmap, __NR_mprotect, __NR_munmap, __NR_process_madvise,
    __NR_userfaultfd, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, O_CLOEXEC, O_NONBLOCK, PROT_EXEC,
    PROT_READ, PROT_WRITE, UFFD_USER_MODE_ONLY,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{ForeignRawFd, Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::attach::protocol::{
    Answer, Done, Failure, MAX_CLOSED, MAX_RANGES, MAX_REQUEST, MAX_THREADS, Op, Request,
};
use crate::copy;
use crate::page::{PAGE, Span};
use crate::process::Process;
use crate::sys;
use crate::sys::ptrace::Registers;
use inject::Held;

/// How long the request may take to come: the parent writes it right after starting us.
const REQUEST_WAIT: Duration = Duration::from_secs(5);

/// How long the answer may take to go; a parent that does not read is as good as dead.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// `MADV_DONTNEED` of asm-generic/mman-common.h.
const MADV_DONTNEED: u64 = 4;

/// `MADV_POPULATE_WRITE` of asm-generic/mman-common.h (since Linux 5.14).
const MADV_POPULATE_WRITE: u64 = 23;

/// Ranges from which on a mapping is made for the list of them.
const MANY_RANGES: usize = 16;

/// mmap(2) for each entry of a list, until one fails: x86-64 code that may lie anywhere. `rbx` is where the next entry is (address, length,
/// offset in the file), `r12` how many are left; `rdx`, `r10` and `r8` are the other arguments of the call, which leaves all of these alone.
#[rustfmt::skip]
const MAP_LOOP: [u8; 41] = [
    0x4d, 0x85, 0xe4,                   //  0: test r12, r12
    0x74, 0x23,                         //  3: jz   40
    0x48, 0x8b, 0x3b,                   //  5: mov  rdi, [rbx]
    0x48, 0x8b, 0x73, 0x08,             //  8: mov  rsi, [rbx + 8]
    0x4c, 0x8b, 0x4b, 0x10,             // 12: mov  r9, [rbx + 16]
    0xb8, __NR_mmap as u8, 0, 0, 0,     // 16: mov  eax, mmap
    0x0f, 0x05,                         // 21: syscall
    0x48, 0x3d, 0x00, 0xf0, 0xff, 0xff, // 23: cmp  rax, -4096
    0x77, 0x09,                         // 29: ja   40
    0x48, 0x83, 0xc3, 0x18,             // 31: add  rbx, 24
    0x49, 0xff, 0xcc,                   // 35: dec  r12
    0xeb, 0xd8,                         // 38: jmp  0
    0xcc,                               // 40: int3
];

/// Ranges given back by one call (`UIO_MAXIOV` of linux/uio.h).
const RANGES_PER_CALL: usize = 1024;

/// `PIDFD_SELF_THREAD_GROUP` of linux/pidfd.h: instead of a descriptor, the process that calls.
const PIDFD_SELF: u64 = -10_001_i64 as u64;

/// The whole program: reads a request from the socket that is standard input, does it, answers.
///
/// Only for the binary `sterna-attach`: it changes signal dispositions and the session of the process that calls it.
pub fn helper_main() -> ExitCode {
    become_undisturbed();
    let Ok(mut stream) = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from) else {
        return ExitCode::FAILURE;
    };
    let request = read_request(&mut stream);
    if let Ok(Request { pid, start_time, op: Op::Throttle { threads }, .. }) = &request {
        return throttled(&stream, *pid, *start_time, threads);
    }
    let (answer, fd) = match request.and_then(|r| serve(&r)) {
        Ok((done, fd)) => (Answer::Done(done), fd),
        Err(failure) => (Answer::Failed(failure), None),
    };
    code(send(&stream, &answer, fd.as_ref().map(AsFd::as_fd)))
}

fn code(sent: io::Result<()>) -> ExitCode {
    if sent.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Slows threads as long as somebody wants it.
fn throttled(stream: &UnixStream, pid: i32, start_time: u64, threads: &[i32]) -> ExitCode {
    let group = are_of(pid, start_time, threads).and_then(|()| {
        join_cgroup(pid);
        throttle::Group::make(pid, threads)
    });
    match group {
        Err(failure) => code(send(stream, &Answer::Failed(failure), None)),
        Ok(group) => {
            let sent = send(stream, &Answer::Done(Done::default()), None);
            if sent.is_ok() {
                throttle::obey(stream, &group);
            }
            drop(group);
            code(sent)
        }
    }
}

/// Whether all threads are the process's, and it is the one that is meant.
fn are_of(pid: i32, start_time: u64, threads: &[i32]) -> Result<(), Failure> {
    if threads.is_empty() || threads.len() > MAX_THREADS {
        return Err(Failure::Other { detail: "no threads, or too many in one request".into() });
    }
    if crate::process::start_time(pid).ok() != Some(start_time) {
        return Err(Failure::Gone);
    }
    match threads.iter().find(|thread| !std::path::Path::new(&format!("/proc/{pid}/task/{thread}")).exists())
    {
        Some(thread) => Err(Failure::Other { detail: format!("{thread} is no thread of it") }),
        None => Ok(()),
    }
}

fn become_undisturbed() {
    sys::signals::ignore_all();
    // Fails only if we lead a session already, which is what is wanted.
    let _ = rustix::process::setsid();
    // The kernel shall take anybody else when memory runs out; refused without privilege.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
}

fn read_request(stream: &mut UnixStream) -> Result<Request, Failure> {
    let unreadable = |e: &dyn std::fmt::Display| Failure::Other { detail: format!("no valid request: {e}") };
    stream.set_read_timeout(Some(REQUEST_WAIT)).map_err(|e| unreadable(&e))?;
    let (mut line, mut part) = (Vec::new(), vec![0u8; 64 << 10]);
    while !line.ends_with(b"\n") {
        let got = stream.read(&mut part).map_err(|e| unreadable(&e))?;
        if got == 0 || line.len() + got > MAX_REQUEST {
            return Err(unreadable(&"it was cut or is too long"));
        }
        line.extend_from_slice(&part[..got]);
    }
    serde_json::from_slice(&line).map_err(|e| unreadable(&e))
}

fn serve(request: &Request) -> Result<(Done, Option<OwnedFd>), Failure> {
    check(request)?;
    join_cgroup(request.pid);
    let until = Instant::now() + Duration::from_millis(request.deadline_ms);
    let mut held = victim::hold(request.pid, request.start_time, until)?;
    let since = Instant::now();
    let result = perform(&mut held, request);
    // Also restores when the work failed; dropping it would do the same, without telling whether it worked.
    held.restore()?;
    let (mut done, fd) = result?;
    done.held_us = since.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
    Ok((done, fd))
}

fn check(request: &Request) -> Result<(), Failure> {
    let refuse = |detail: &str| Err(Failure::Other { detail: detail.into() });
    match &request.op {
        _ if request.pid <= 0 || request.pid.unsigned_abs() == std::process::id() => {
            refuse("not a pid to attach to")
        }
        Op::Close { fds } if fds.len() > MAX_CLOSED => refuse("too many descriptors in one request"),
        Op::Throttle { .. } => refuse("a conversation, and no single call"),
        Op::MadviseDontneed { ranges } | Op::Populate { ranges } if ranges.len() > MAX_RANGES => {
            refuse("too many ranges in one request")
        }
        Op::MapPrivate { ranges, .. } if ranges.len() > MAX_RANGES => {
            refuse("too many ranges in one request")
        }
        _ => Ok(()),
    }
}

/// Moves this process into the target's cgroup (version 2, where it is mounted), so that ending the agent's cgroup does not
/// end us. Best effort: without it we are where the agent is, as any child.
fn join_cgroup(pid: i32) {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let Some(path) = groups.lines().find_map(|l| l.strip_prefix("0::")) else { return };
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        let procs = format!("{root}{path}/cgroup.procs");
        if std::fs::write(procs, std::process::id().to_string()).is_ok() {
            return;
        }
    }
}

fn perform(held: &mut Held, request: &Request) -> Result<(Done, Option<OwnedFd>), Failure> {
    match &request.op {
        Op::Userfaultfd { device_fd } => {
            let flags = O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY;
            let number = make_userfaultfd(held, *device_fd, flags)?;
            let fd = fetch(request.pid, number);
            close(held, number)?;
            Ok((Done::default(), Some(fd?)))
        }
        Op::UserfaultfdKeep { device_fd } => {
            let number = make_userfaultfd(held, *device_fd, O_CLOEXEC | O_NONBLOCK)?;
            match fetch(request.pid, number) {
                Ok(fd) => Ok((Done { remote_fd: Some(number), ..Done::default() }, Some(fd))),
                Err(failure) => close(held, number).and(Err(failure)),
            }
        }
        Op::Close { fds } => {
            fds.iter().try_for_each(|&fd| close(held, fd))?;
            Ok((Done::default(), None))
        }
        Op::MadviseDontneed { ranges } => Ok((dontneed(held, request, ranges)?, None)),
        Op::Populate { ranges } => Ok((advise(held, ranges, MADV_POPULATE_WRITE)?, None)),
        Op::MapPrivate { fd, ranges, reserve, advice } => {
            Ok((map_private(held, request, (*fd, ranges), *reserve, advice)?, None))
        }
        Op::Throttle { .. } => Ok((Done::default(), None)),
    }
}

fn make_userfaultfd(held: &mut Held, device_fd: Option<i32>, flags: u32) -> Result<i32, Failure> {
    let flags = u64::from(flags);
    let (call, result) = match device_fd {
        None => ("userfaultfd", held.call(__NR_userfaultfd, [flags, 0, 0])?),
        Some(fd) => {
            let args = [i64::from(fd) as u64, sys::uffd::IOC_NEW, flags];
            ("ioctl(USERFAULTFD_IOC_NEW)", held.call(__NR_ioctl, args)?)
        }
    };
    succeeded(call, result).map(|fd| fd as i32)
}

fn close(held: &mut Held, fd: i32) -> Result<(), Failure> {
    let result = held.call(__NR_close, [i64::from(fd) as u64, 0, 0])?;
    match succeeded("close", result) {
        Err(Failure::Call { errno, .. }) if errno == nix::libc::EBADF => Ok(()),
        other => other.map(drop),
    }
}

fn dontneed(held: &mut Held, request: &Request, ranges: &[(u64, u64)]) -> Result<Done, Failure> {
    let mut done = Done::default();
    if ranges.len() >= MANY_RANGES {
        done.ranges = dontneed_many(held, request, ranges)?;
    }
    // Locked memory is refused, for one: the caller writes zeros instead.
    done.ranges += advise(held, &ranges[done.ranges..], MADV_DONTNEED)?.ranges;
    Ok(done)
}

/// Gives ranges the same advice (madvise(2)), up to the first that is refused.
fn advise(held: &mut Held, ranges: &[(u64, u64)], advice: u64) -> Result<Done, Failure> {
    let mut done = Done::default();
    for &(addr, len) in ranges {
        let result = held.call(__NR_madvise, [addr, len, advice])?;
        if succeeded("madvise", result).is_err() {
            break;
        }
        done.ranges += 1;
    }
    Ok(done)
}

/// Maps ranges of a file. Between the first and the last address that were mapped, all is given the advice: the rest of it has it already.
fn map_private(
    held: &mut Held,
    request: &Request,
    (fd, ranges): (i32, &[(u64, u64, u64)]),
    reserve: bool,
    advice: &[i32],
) -> Result<Done, Failure> {
    let mut done = Done::default();
    let rights = u64::from(PROT_READ | PROT_WRITE);
    let kind = u64::from(MAP_PRIVATE | MAP_FIXED | if reserve { 0 } else { MAP_NORESERVE });
    let fd = i64::from(fd) as u64;
    if ranges.len() >= MANY_RANGES {
        done.ranges = map_many(held, request, ranges, (rights, kind, fd))?;
    }
    for &(addr, len, offset) in &ranges[done.ranges..] {
        let mapped = held.call_long(__NR_mmap, [addr, len, rights, kind, fd, offset])?;
        match succeeded("mmap", mapped) {
            Ok(_) => done.ranges += 1,
            Err(failure) if done.ranges == 0 => return Err(failure),
            Err(_) => break, // no room for more mappings: what is left stays as it is
        }
    }
    let (Some(first), Some(last)) = (ranges.first(), ranges[..done.ranges].last()) else { return Ok(done) };
    for advice in advice {
        let args = [first.0, last.0 + last.1 - first.0, i64::from(*advice) as u64];
        succeeded("madvise", held.call(__NR_madvise, args)?)?;
    }
    Ok(done)
}

/// Makes many mappings by [`MAP_LOOP`], which the process runs by itself in a mapping that is made for it: to stop it twice for each takes many
/// times as long as what the kernel does. How many were made: none where it may run no code that it has not loaded (SELinux), and not all where
/// the kernel has refused one.
fn map_many(
    held: &mut Held,
    request: &Request,
    ranges: &[(u64, u64, u64)],
    (rights, kind, fd): (u64, u64, u64),
) -> Result<usize, Failure> {
    let process = Process::open_as(request.pid, request.start_time).map_err(|_| Failure::Gone)?;
    let list: Vec<u8> = ranges
        .iter()
        .flat_map(|(addr, len, offset)| [*addr, *len, *offset])
        .flat_map(u64::to_ne_bytes)
        .collect();
    let len = PAGE + (list.len() as u64).next_multiple_of(PAGE);
    let left = with_mapping(held, len, |held, at| {
        run_loop(held, &process, (at, &list), |regs| {
            (regs.rbx, regs.r12) = (at + PAGE, ranges.len() as u64);
            (regs.rdx, regs.r10, regs.r8) = (rights, kind, fd);
        })
    })?;
    let left = left.flatten().map_or(ranges.len(), |left| left as usize);
    Ok(ranges.len().saturating_sub(left))
}

/// Lends the process so many bytes of memory of its own, and takes them away again whatever comes of it. Nothing where it has no room.
fn with_mapping<T>(
    held: &mut Held,
    len: u64,
    what: impl FnOnce(&mut Held, u64) -> Result<T, Failure>,
) -> Result<Option<T>, Failure> {
    let (rights, kind) = (u64::from(PROT_READ | PROT_WRITE), u64::from(MAP_PRIVATE | MAP_ANONYMOUS));
    let made = held.call_long(__NR_mmap, [0, len, rights, kind, u64::MAX, 0])?;
    let Ok(made) = succeeded("mmap", made) else { return Ok(None) };
    let at = made as u64;
    let done = what(held, at);
    // What failed first is told first: a thread that is gone unmaps nothing either.
    let unmapped = held.call(__NR_munmap, [at, len, 0]);
    let done = done?;
    succeeded("munmap", unmapped?)?;
    Ok(Some(done))
}

/// How many are left when it has ended; nothing where it did not run.
fn run_loop(
    held: &mut Held,
    process: &Process,
    (at, list): (u64, &[u8]),
    set: impl FnOnce(&mut Registers),
) -> Result<Option<u64>, Failure> {
    let len = MAP_LOOP.len() as u64;
    let parts = [Span { addr: at, len }, Span { addr: at + PAGE, len: list.len() as u64 }];
    if copy::write(process, &parts, &[&MAP_LOOP, list].concat()).is_err() {
        return Ok(None);
    }
    let rights = u64::from(PROT_READ | PROT_EXEC);
    if succeeded("mprotect", held.call(__NR_mprotect, [at, PAGE, rights])?).is_err() {
        return Ok(None);
    }
    let ended = held.run(at..at + len, set)?;
    Ok(ended.map(|regs| regs.r12))
}

/// Gives many ranges back with few calls, by process_madvise(2) of the process on itself (since Linux 6.15): a call of ours takes
/// several times as long as what it does. The ranges lie in a mapping that is made for them. How many were done, for the
/// kernel may be older.
fn dontneed_many(held: &mut Held, request: &Request, ranges: &[(u64, u64)]) -> Result<usize, Failure> {
    let process = Process::open_as(request.pid, request.start_time).map_err(|_| Failure::Gone)?;
    let len = (RANGES_PER_CALL * size_of::<[u64; 2]>()) as u64;
    let done = with_mapping(held, len, |held, at| {
        let mut done = 0;
        for chunk in ranges.chunks(RANGES_PER_CALL) {
            let vector: Vec<u8> =
                chunk.iter().flat_map(|(addr, len)| [*addr, *len]).flat_map(u64::to_ne_bytes).collect();
            let span = Span { addr: at, len: vector.len() as u64 };
            if copy::write(&process, &[span], &vector).is_err() {
                break;
            }
            let args = [PIDFD_SELF, at, chunk.len() as u64, MADV_DONTNEED, 0, 0];
            let mut bytes = held.call_long(__NR_process_madvise, args)?;
            let whole = chunk.iter().take_while(|(_, len)| {
                bytes = bytes.saturating_sub_unsigned(*len);
                bytes >= 0
            });
            let whole = whole.count();
            done += whole;
            if whole < chunk.len() {
                break;
            }
        }
        Ok(done)
    })?;
    Ok(done.unwrap_or(0))
}

/// The kernel's convention: -4095 to -1 are negated error numbers.
fn succeeded(call: &str, result: i64) -> Result<i64, Failure> {
    match result {
        -4095..=-1 => Err(Failure::Call { call: call.into(), errno: (-result) as i32 }),
        _ => Ok(result),
    }
}

fn fetch(pid: i32, number: i32) -> Result<OwnedFd, Failure> {
    let pid = Pid::from_raw(pid).ok_or(Failure::Gone)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| Failure::Gone)?;
    pidfd_getfd(&pidfd, number as ForeignRawFd, PidfdGetfdFlags::empty()).map_err(|e| Failure::Call {
        call: "pidfd_getfd (run by the helper)".into(),
        errno: e.raw_os_error(),
    })
}

fn send(stream: &UnixStream, answer: &Answer, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    stream.set_write_timeout(Some(ANSWER_WAIT))?;
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let mut sent = sendmsg(stream, &[IoSlice::new(&line)], &mut ancillary, SendFlags::NOSIGNAL)?;
    while sent < line.len() {
        let rest = [IoSlice::new(&line[sent..])];
        let n = sendmsg(stream, &rest, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?;
        sent += n.max(1);
    }
    Ok(())
}
