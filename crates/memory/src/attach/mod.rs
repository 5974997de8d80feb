//! Making another process execute system calls: the client of the helper `sterna-attach`.
//!
//! The work is done in a process of its own because a tracer's death in the middle of an injection would kill QEMU: the
//! helper is tiny, deaf to signals and moves into QEMU's own cgroup, so the agent may die at any time.

pub(crate) mod protocol;

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::page::Span;
use crate::process::Process;
use protocol::{Answer, Done, Failure, MAX_ANSWER, Op, Request};

/// Name of the helper's executable, short enough to be its whole name for the kernel too (15 bytes).
pub(crate) const HELPER: &str = "sterna-attach";

/// The deadline that [`Attach::new`] sets: a thousand times what an attach takes, for a host that is badly overloaded.
const DEADLINE: Duration = Duration::from_secs(2);

/// How much longer than the helper we wait: it gives up at the deadline, and still has to start and to answer.
const GRACE: Duration = Duration::from_secs(1);

/// How to run system calls inside another process.
#[derive(Clone, Debug)]
pub struct Attach {
    /// The executable `sterna-attach`.
    pub helper: PathBuf,
    /// How long it may try to get hold of a thread. It never abandons a call that it has begun.
    pub deadline: Duration,
    /// Number, *in the target process*, of an open `/dev/userfaultfd`, to make the userfaultfd from. Write-protect tracking
    /// and installing do not need one: they ask only for faults of user mode, which Linux grants to anybody. Demand paging
    /// of a QEMU that is not root does, since it must also serve faults of the kernel.
    pub device_fd: Option<i32>,
}

/// Why a system call could not be run in the target.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The helper could not be started.
    #[error("cannot start the helper {}; is it installed beside the agent?", helper.display())]
    Start {
        /// The executable that was tried.
        helper: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The helper did not answer, or not in its language.
    #[error("the attach helper did not answer ({detail}); the process is left as it was, try again")]
    NoAnswer {
        /// What was seen.
        detail: String,
    },
    /// The process ended, or its pid belongs to another one now.
    #[error("process {pid} has ended or is another one now")]
    Gone {
        /// The process's pid.
        pid: i32,
    },
    /// A debugger or another tracer holds the process.
    #[error("process {pid} is traced by process {tracer}; detach that debugger or tracer and try again")]
    Traced {
        /// The process's pid.
        pid: i32,
        /// The tracer's pid.
        tracer: i32,
    },
    /// We may not trace the process.
    #[error("no permission to attach to process {pid}; run as root or with CAP_SYS_PTRACE")]
    Refused {
        /// The process's pid.
        pid: i32,
    },
    /// No thread stopped in time.
    #[error(
        "no thread of process {pid} could be stopped in time ({detail}); try again when its disks answer"
    )]
    NoThread {
        /// The process's pid.
        pid: i32,
        /// How the threads were.
        detail: String,
    },
    /// The system call ran and failed.
    #[error("{call} failed in process {pid}")]
    Call {
        /// The process's pid.
        pid: i32,
        /// Name of the system call.
        call: String,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Something else went wrong in the helper.
    #[error("the attach helper failed on process {pid}: {detail}")]
    Helper {
        /// The process's pid.
        pid: i32,
        /// What it said.
        detail: String,
    },
}

impl Attach {
    /// With this helper, the usual deadline and no device.
    pub fn new(helper: impl Into<PathBuf>) -> Attach {
        Attach { helper: helper.into(), deadline: DEADLINE, device_fd: None }
    }

    /// With the helper that lies beside the running executable, or one directory above it (where cargo puts tests).
    pub fn beside_current_exe() -> io::Result<Attach> {
        let exe = std::env::current_exe()?;
        let found = exe.ancestors().skip(1).take(2).map(|dir| dir.join(HELPER)).find(|p| p.is_file());
        let missing =
            || io::Error::new(io::ErrorKind::NotFound, format!("no {HELPER} beside {}", exe.display()));
        found.map(Attach::new).ok_or_else(missing)
    }

    /// Makes a userfaultfd of the target, for faults of user mode unless it comes from a device.
    ///
    /// Only we hold it then: our death ends what it does.
    pub(crate) fn userfaultfd(&self, process: &Process) -> Result<OwnedFd, AttachError> {
        let op = Op::Userfaultfd { device_fd: self.device_fd };
        let (_, fd) = self.run(process, op)?;
        fd.ok_or_else(|| AttachError::NoAnswer { detail: "no descriptor came".into() })
    }

    /// Makes a userfaultfd of the target for all faults, also those of the kernel on its behalf, of which the target keeps a copy
    /// under the number that is returned: when we die, who faults waits.
    pub(crate) fn userfaultfd_keep(&self, process: &Process) -> Result<(OwnedFd, i32), AttachError> {
        let (done, fd) = self.run(process, Op::UserfaultfdKeep { device_fd: self.device_fd })?;
        fd.zip(done.remote_fd)
            .ok_or_else(|| AttachError::NoAnswer { detail: "no descriptor or no number came".into() })
    }

    /// Closes descriptors of the target; those that are closed already do not count.
    pub(crate) fn close(&self, process: &Process, fds: Vec<i32>) -> Result<(), AttachError> {
        self.run(process, Op::Close { fds }).map(drop)
    }

    /// Gives the spans' memory back (`madvise(MADV_DONTNEED)`), in one attach; how many spans were done before one failed.
    pub(crate) fn dontneed(&self, process: &Process, spans: &[Span]) -> Result<Done, AttachError> {
        let ranges = spans.iter().map(|s| (s.addr, s.len)).collect();
        Ok(self.run(process, Op::MadviseDontneed { ranges })?.0)
    }

    /// Does what answers with figures alone.
    pub(crate) fn perform(&self, process: &Process, op: Op) -> Result<Done, AttachError> {
        Ok(self.run(process, op)?.0)
    }

    /// Begins what lasts as long as the connection that is returned.
    pub(crate) fn begin(&self, process: &Process, op: Op) -> Result<UnixStream, AttachError> {
        let (child, stream, answer) = self.ask(process, op)?;
        // It ends when the connection does.
        reap(child, false);
        answer.map(|_| stream)
    }

    fn run(&self, process: &Process, op: Op) -> Result<(Done, Option<OwnedFd>), AttachError> {
        let (child, stream, answer) = self.ask(process, op)?;
        drop(stream);
        reap(child, !matches!(answer, Err(AttachError::NoAnswer { .. })));
        answer
    }

    #[expect(clippy::type_complexity, reason = "taken apart at once by both callers")]
    fn ask(
        &self,
        process: &Process,
        op: Op,
    ) -> Result<(Child, UnixStream, Result<(Done, Option<OwnedFd>), AttachError>), AttachError> {
        let pid = process.pid();
        let deadline_ms = self.deadline.as_millis().try_into().unwrap_or(u64::MAX);
        let request = Request { pid, start_time: process.start_time(), deadline_ms, op };
        let (child, mut stream) = start(&self.helper)?;
        let answer = match converse(&mut stream, &request, self.deadline.saturating_add(GRACE)) {
            Err(why) => Err(AttachError::NoAnswer { detail: why.to_string() }),
            Ok((Answer::Done(done), fd)) => Ok((done, fd)),
            Ok((Answer::Failed(failure), _)) => Err(failed(pid, failure)),
        };
        Ok((child, stream, answer))
    }
}

fn failed(pid: i32, failure: Failure) -> AttachError {
    match failure {
        Failure::Gone => AttachError::Gone { pid },
        Failure::Traced { tracer } => AttachError::Traced { pid, tracer },
        Failure::Refused => AttachError::Refused { pid },
        Failure::NoThread { detail } => AttachError::NoThread { pid, detail },
        Failure::Call { call, errno } => {
            AttachError::Call { pid, call, source: io::Error::from_raw_os_error(errno) }
        }
        Failure::Other { detail } => AttachError::Helper { pid, detail },
    }
}

fn start(helper: &Path) -> Result<(Child, UnixStream), AttachError> {
    let failed = |source| AttachError::Start { helper: helper.to_path_buf(), source };
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let mut command = Command::new(helper);
    command.env_clear().stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    let child = command.spawn().map_err(failed)?;
    Ok((child, ours))
}

/// Sends the request, waits for the answer. The limit is one for the whole conversation.
fn converse(
    stream: &mut UnixStream,
    request: &Request,
    limit: Duration,
) -> io::Result<(Answer, Option<OwnedFd>)> {
    let until = Instant::now() + limit;
    stream.set_write_timeout(Some(limit))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let (mut answer, mut fd) = (Vec::new(), None);
    while !answer.ends_with(b"\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
        }
        stream.set_read_timeout(Some(left))?;
        if receive(stream, &mut answer, &mut fd)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without an answer"));
        }
        if answer.len() > MAX_ANSWER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its answer is too long"));
        }
    }
    Ok((serde_json::from_slice(&answer)?, fd))
}

fn receive(stream: &UnixStream, bytes: &mut Vec<u8>, fd: &mut Option<OwnedFd>) -> io::Result<usize> {
    let mut part = [0u8; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [io::IoSliceMut::new(&mut part)];
    let got = loop {
        match recvmsg(stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?.bytes,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            *fd = fds.last().or(fd.take());
        }
    }
    bytes.extend_from_slice(&part[..got]);
    Ok(got)
}

/// Reaps the helper: at once when it has answered, for then it only has to exit; else aside, for it may still have to wait
/// until a thread can be restored.
fn reap(mut child: Child, answered: bool) {
    if answered {
        let _ = child.wait();
    } else {
        std::thread::spawn(move || child.wait());
    }
}
