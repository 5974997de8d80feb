//! The bulk path: which pages are to be sent, how they are read and written to the streams, how they are installed.
//!
//! A page's stream is a function of its place ([`stream_of`]), so every version of it travels on one connection and
//! cannot be overtaken by an older one. Threads, 1 MiB batches, no message, allocation or system call per page.

mod ahead;
mod block;
mod collect;
mod fetch;
mod kept;
mod pack;
mod receive;
mod send;
mod sender;
mod serve;
mod set;

pub(crate) use ahead::{Ahead, Budget, Gate};
pub(crate) use block::{SentHashes, SentPages, SourceBlock};
pub(crate) use collect::{Collector, Writers};
pub(crate) use fetch::{Fetch, Fetched, summand};
pub(crate) use receive::{Install, Received, Receiver, Sink, Sinks};
pub(crate) use send::{Haste, Job, Part, SendCounters, SendOptions, Senders};
pub(crate) use sender::set_queue;
pub(crate) use serve::Serving;
pub(crate) use set::{SendSet, intersect, merge, rounded, subtract};

use sterna_engine::wire::batch::PAYLOAD_BYTES_MAX;
use sterna_memory::{PAGE, PageRun};

/// How much less nice (nice(2), for the thread alone) a thread is that a guest waits for. Where the kernel does not allow it, it is like any other.
const URGENT: i32 = -15;

/// Pages that always share a stream: one full batch, so that a contiguous run is one read, one frame, one install.
pub(crate) const PAGES_PER_STRIPE: u64 = PAYLOAD_BYTES_MAX as u64 / PAGE;

/// A run cut where the stream may change.
fn stripes_of(mut run: PageRun) -> impl Iterator<Item = PageRun> {
    std::iter::from_fn(move || {
        let pages = run.pages.min(PAGES_PER_STRIPE - run.first % PAGES_PER_STRIPE);
        let stripe = PageRun { first: run.first, pages };
        run = PageRun { first: run.first + pages, pages: run.pages - pages };
        (pages > 0).then_some(stripe)
    })
}

/// The stream that carries every version of this page (PROTOCOL.md, "Order").
pub(crate) fn stream_of(block: usize, page: u64, streams: u32) -> u32 {
    ((block as u64 + page / PAGES_PER_STRIPE) % u64::from(streams.max(1))) as u32
}
