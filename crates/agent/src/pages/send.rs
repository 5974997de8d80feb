//! Senders: one thread a stream, what all of them are told and what they count. The thread's own work is in `sender.rs`.

use super::sender::Sender;
use super::{SendSet, SourceBlock};
use crate::registry::lock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use sterna_engine::policy::Method;
use sterna_memory::{PageRun, Process};
use sterna_transport::{Connection, Pacer, Shutdown, UNANSWERED_MAX};

/// Bytes a stream's socket may queue. Autotuning keeps milliseconds of queue that the last round would wait for.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// How long a target may take to start its QEMU, and more: the machine's own deadline comes first.
const STARTS_WITHIN: Duration = Duration::from_secs(180);

/// Counted by all senders of a migration.
#[derive(Debug, Default)]
pub(crate) struct SendCounters {
    /// Bytes of frames.
    pub(crate) bytes: AtomicU64,
    /// Pages sent as bytes, whole or in part.
    pub(crate) normal: AtomicU64,
    /// Pages that were read and needed no bytes: they are zero, or at the target as they are.
    pub(crate) duplicate: AtomicU64,
    /// Pages that were to be sent and had been written again by then, so that they wait for the next round.
    pub(crate) postponed: AtomicU64,
    /// Pages of which only what has changed was sent.
    pub(crate) patched: AtomicU64,
    /// Bytes that this saved.
    pub(crate) patched_saved: AtomicU64,
    /// Bytes that compression saved.
    pub(crate) packed_saved: AtomicU64,
}

/// How pages are sent, as the user wants it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SendOptions {
    /// Ways to compress that may be tried.
    pub(crate) methods: &'static [Method],
    /// Bytes of pages that are kept, to send only what has changed of them.
    pub(crate) delta_cache: u64,
    /// Whether pages that were written again are left for the next round.
    pub(crate) postpone: bool,
}

/// A round, or the beginning of one, for all senders.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) round: u32,
    pub(crate) set: Arc<SendSet>,
    pub(crate) part: Part,
    pub(crate) haste: Haste,
    /// Pages that are not sent but told to be missing, with their block's place in the offer.
    pub(crate) missing: Arc<Vec<(u16, Vec<PageRun>)>>,
}

/// Who comes first where a processor is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Haste {
    /// The guest runs: it comes first.
    Polite,
    /// The guest is stopped and waits for this.
    Urgent,
}

/// Whether more of a round follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// More pages of the same round will come.
    Beginning,
    /// The round is over with these pages.
    End,
}

/// The sender threads of a migration.
pub(crate) struct Senders {
    jobs: Vec<mpsc::Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    shutdowns: Vec<Shutdown>,
    pacer: Arc<Pacer>,
    shared: Arc<Shared>,
}

/// What all senders know, and what they leave when a round is abandoned.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The target takes pages. Before that it reads ahead as much as it likes, and a write that waits tells nothing of the link.
    pub(super) taken: AtomicBool,
    pub(super) abandoned: AtomicBool,
    /// Runs that are left, with their block's place among those that are sent.
    pub(super) left: Mutex<Vec<(usize, PageRun)>>,
}

impl Senders {
    /// Starts a thread for each stream. `failed` is told once a stream cannot go on.
    pub(crate) fn start(
        streams: Vec<Connection>,
        process: &Process,
        blocks: &Arc<Vec<SourceBlock>>,
        (pacer, options): (Arc<Pacer>, SendOptions),
        counters: &Arc<SendCounters>,
        failed: impl Fn(String) + Clone + Send + 'static,
    ) -> Result<Self, String> {
        let count = streams.len() as u32;
        let mut senders = Self {
            jobs: Vec::new(),
            threads: Vec::new(),
            shutdowns: Vec::new(),
            pacer: pacer.clone(),
            shared: Arc::default(),
        };
        for (stream, connection) in streams.into_iter().enumerate() {
            connection.set_send_buffer(SEND_BUFFER_BYTES).map_err(|why| why.to_string())?;
            let handle = connection.shutdown_handle();
            // A target that has read enough ahead takes nothing while it starts its QEMU. Whether it lives is seen on the control connection.
            handle.set_unanswered_max(STARTS_WITHIN);
            senders.shutdowns.push(handle);
            let (tell, jobs) = mpsc::channel::<Job>();
            let link = (stream as u32, count, connection, pacer.clone(), counters.clone());
            let mut sender = Sender::new(link, process, blocks.clone(), options, senders.shared.clone())?;
            let failed = failed.clone();
            let thread = std::thread::Builder::new().name(format!("pages-out-{stream}")).spawn(move || {
                while let Ok(job) = jobs.recv() {
                    if let Err(why) = sender.round(&job) {
                        return failed(why);
                    }
                }
            });
            senders.threads.push(thread.map_err(|why| format!("no thread can be started: {why}"))?);
            senders.jobs.push(tell);
        }
        Ok(senders)
    }

    /// From now on the target takes pages.
    pub(crate) fn are_taken(&self) {
        self.shared.taken.store(true, Ordering::Relaxed);
        self.shutdowns.iter().for_each(|stream| stream.set_unanswered_max(UNANSWERED_MAX));
    }

    /// Nothing more of the round that is under way is sent, but its end.
    pub(crate) fn abandon(&self) {
        self.shared.abandoned.store(true, Ordering::Relaxed);
    }

    /// What was left of it: complete once the round has ended.
    pub(crate) fn left(&self) -> Vec<(usize, PageRun)> {
        std::mem::take(&mut lock(&self.shared.left))
    }

    /// The last round of a post-copy: these pages, and what is missing.
    pub(crate) fn finish(&self, round: u32, set: Arc<SendSet>, missing: Vec<(u16, Vec<PageRun>)>) {
        self.send(&Job { round, set, part: Part::End, haste: Haste::Urgent, missing: Arc::new(missing) });
    }

    /// A round that sends no page, and tells what the target is to drop of so many blocks.
    pub(crate) fn tell(&self, round: u32, blocks: usize, missing: Vec<(u16, Vec<PageRun>)>) {
        let (set, missing) = (Arc::new(SendSet::new(blocks)), Arc::new(missing));
        self.send(&Job { round, set, part: Part::End, haste: Haste::Polite, missing });
    }

    /// Gives every sender its share of a round.
    pub(crate) fn send(&self, job: &Job) {
        if job.haste == Haste::Polite {
            // The round that was abandoned has ended.
            self.shared.abandoned.store(false, Ordering::Relaxed);
        }
        // A sender that has failed has told so already.
        self.jobs.iter().for_each(|sender| drop(sender.send(job.clone())));
    }
}

impl Drop for Senders {
    /// Cuts the streams, so that no sender blocks, and waits for the threads: none reads the guest any more.
    fn drop(&mut self) {
        self.jobs.clear();
        self.shutdowns.iter().for_each(Shutdown::shutdown);
        // Nor waits for a turn that a low limit puts off for hours. Its write fails at once.
        let rate = self.pacer.rate();
        self.pacer.set_rate(None);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
        self.pacer.set_rate(rate);
    }
}
