//! Slowing threads of a process: the client of what `sterna-attach` does with control groups.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::attach::protocol::{KEEP_ALL, MAX_THREADS, Op};
use crate::attach::{Attach, AttachError};
use crate::process::Process;

/// How long the helper may take to change a quota: it writes one file.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// Threads of a process that may be slowed. Dropping it lets them go; so does the death of who holds it, however it dies, since a
/// helper process outlives it.
#[derive(Debug)]
pub struct Throttle {
    stream: BufReader<UnixStream>,
}

impl Throttle {
    /// Gets hold of the threads (ids as the kernel has them). They have all of their time until [`Throttle::keep`] says otherwise.
    ///
    /// # Errors
    /// [`AttachError`] where the helper cannot be started, a thread is not the process's, or the host's control groups do not let
    /// us: nothing has changed then.
    pub fn start(process: &Process, threads: &[i32], attach: &Attach) -> Result<Throttle, AttachError> {
        let detail = match threads.len() {
            0 => Some("no threads were named"),
            1..=MAX_THREADS => None,
            _ => Some("too many threads were named"),
        };
        if let Some(detail) = detail {
            return Err(AttachError::Helper { pid: process.pid(), detail: detail.into() });
        }
        let stream = attach.begin(process, Op::Throttle { threads: threads.to_vec() })?;
        let limited = stream
            .set_read_timeout(Some(ANSWER_WAIT))
            .and_then(|()| stream.set_write_timeout(Some(ANSWER_WAIT)));
        limited.map_err(|why| AttachError::NoAnswer { detail: why.to_string() })?;
        Ok(Throttle { stream: BufReader::new(stream) })
    }

    /// Lets the threads have this part of their time, in thousandths (1 to 1000): each of them on average, and a busy one more while
    /// another does not need its own.
    ///
    /// # Errors
    /// What the kernel says, or that the helper is gone: then the threads have all of their time.
    pub fn keep(&mut self, part: u32) -> io::Result<()> {
        self.stream.get_mut().write_all(format!("{}\n", part.clamp(1, KEEP_ALL)).as_bytes())?;
        let mut answer = String::new();
        self.stream.read_line(&mut answer)?;
        match answer.trim_end() {
            "ok" => Ok(()),
            "" => Err(io::ErrorKind::UnexpectedEof.into()),
            why => Err(io::Error::other(why.to_owned())),
        }
    }
}

/// How often each of these threads has written to a page for the first time since it was armed, or touched one that was not there: their
/// minor faults (field 10 of `/proc/PID/task/TID/stat`, see proc(5)), which the kernel counts for a processor of KVM as well. A thread that has ended has none.
pub fn first_writes(process: &Process, threads: &[i32]) -> Vec<u64> {
    let stat = |thread: &i32| std::fs::read_to_string(format!("/proc/{}/task/{thread}/stat", process.pid()));
    let faults = |stat: String| stat.rsplit_once(") ")?.1.split(' ').nth(7)?.parse().ok();
    threads.iter().map(|thread| stat(thread).ok().and_then(faults).unwrap_or(0)).collect()
}
