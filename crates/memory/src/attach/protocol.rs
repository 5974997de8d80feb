//! What the library and `sterna-attach` say to each other: one line of JSON each way, a descriptor beside the answer.

use serde::{Deserialize, Serialize};

/// Longest request in bytes: [`MAX_RANGES`] ranges of two 20-digit numbers fit.
pub(crate) const MAX_REQUEST: usize = 4 << 20;

/// Longest answer in bytes; the longest is a list of thread states, cut far below this.
pub(crate) const MAX_ANSWER: usize = 64 << 10;

/// Ranges in one request: at about 2 us each, a thread of QEMU is held for about 0.1 s at most.
pub(crate) const MAX_RANGES: usize = 1 << 15;

/// Descriptors closed in one request: leftovers are few, one per crash.
pub(crate) const MAX_CLOSED: usize = 1024;

/// Threads that are slowed together: QEMU's own limit of processors is below.
pub(crate) const MAX_THREADS: usize = 1024;

/// All of a thread's time, in thousandths.
pub(crate) const KEEP_ALL: u32 = 1000;

/// What the helper shall do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) pid: i32,
    pub(crate) start_time: u64,
    pub(crate) deadline_ms: u64,
    pub(crate) op: Op,
}

/// The operations.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Op {
    /// Make a userfaultfd (of `/dev/userfaultfd` if its number is given), hand it over, close the target's copy.
    Userfaultfd { device_fd: Option<i32> },
    /// The same, but for all faults, and the target keeps its copy, so that faults wait when its pager dies.
    UserfaultfdKeep { device_fd: Option<i32> },
    /// Close descriptors.
    Close { fds: Vec<i32> },
    /// Give ranges (address, length) of private memory back.
    MadviseDontneed { ranges: Vec<(u64, u64)> },
    /// Have all pages of ranges (address, length) of private memory, as if they had been written.
    Populate { ranges: Vec<(u64, u64)> },
    /// Map ranges (address, length, offset) of a file that is open in the target privately, over what is there, and give each such advice
    /// (madvise(2)).
    MapPrivate { fd: i32, ranges: Vec<(u64, u64, u64)>, reserve: bool, advice: Vec<i32> },
    /// Give threads a control group of their own. The conversation goes on then, and the group ends with it.
    Throttle { threads: Vec<i32> },
}

/// What the helper says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// Done; a descriptor comes with it if one was asked for.
    Done(Done),
    /// Not done; the process is as it was.
    Failed(Failure),
}

/// Figures of a success.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Number that the descriptor has in the target, where the target keeps it.
    pub(crate) remote_fd: Option<i32>,
    /// How many ranges were given back or mapped; the first that was refused ends the work.
    pub(crate) ranges: usize,
    /// How long the thread was held, in microseconds.
    pub(crate) held_us: u64,
}

/// Why it failed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Failure {
    Gone,
    Traced { tracer: i32 },
    Refused,
    NoThread { detail: String },
    Call { call: String, errno: i32 },
    Other { detail: String },
}
