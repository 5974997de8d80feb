//! Senders: one thread a stream reads its share of the send-set from the guest and writes batches.

use super::{PAGES_PER_STRIPE, SendSet, stream_of};
use lz4_flex::block::{compress_into, get_maximum_output_size};
use std::io::IoSlice;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use sterna_engine::policy::Compression;
use sterna_engine::units::Bytes;
use sterna_engine::wire::batch::{
    BatchHeader, Content, DESCRIPTORS_MAX, Descriptor, PAYLOAD_BYTES_MAX, encode_batch, encode_lz4_batch,
};
use sterna_memory::{Backing, PAGE, PageRun, Process, Reader, Region, Span, is_zero};
use sterna_transport::{Connection, Pacer, Shutdown};
use xxhash_rust::xxh3::xxh3_64;

/// How long a write to a stream may wait: the machine's own deadline for pages that do not move comes first.
const WRITE_WITHIN: Duration = Duration::from_secs(120);
/// Bytes a stream's socket may queue. Autotuning keeps milliseconds of queue that the last round would wait for.
const SEND_BUFFER_BYTES: usize = 1 << 20;

/// Pages that travel at once: 256 KiB stay in a processor's own cache on their way from the guest to the socket, and at the
/// other end from the socket to the guest.
const BATCH_PAGES_MAX: u64 = 64;

/// How much of a batch is compressed to see whether the rest should be: two pages.
const SAMPLE_BYTES: usize = 8 << 10;

/// How much nicer (nice(2), for the thread alone) a sender is than the guest's processors while the guest runs: where both
/// want the same core the guest gets nine tenths of it.
const POLITE: i32 = 10;

/// Which pages of a block the target may hold as anything but zero: a bit each.
#[derive(Debug)]
pub(crate) struct SentPages(Vec<AtomicU64>);

impl SentPages {
    pub(crate) fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn set(&self, page: u64, sent: bool) {
        let (word, bit) = (&self.0[(page / 64) as usize], 1 << (page % 64));
        match sent {
            true => word.fetch_or(bit, Ordering::Relaxed),
            false => word.fetch_and(!bit, Ordering::Relaxed),
        };
    }

    fn has(&self, page: u64) -> bool {
        self.0[(page / 64) as usize].load(Ordering::Relaxed) & (1 << (page % 64)) != 0
    }

    /// All of them as runs.
    pub(crate) fn runs(&self) -> Vec<PageRun> {
        let mut out = Vec::new();
        for (at, word) in self.0.iter().enumerate() {
            let mut left = word.load(Ordering::Relaxed);
            let mut page = at as u64 * 64;
            while left != 0 {
                let skip = left.trailing_zeros();
                left = left.checked_shr(skip).unwrap_or(0);
                page += u64::from(skip);
                let pages = left.trailing_ones();
                sterna_memory::append_run(&mut out, PageRun { first: page, pages: pages.into() });
                left = left.checked_shr(pages).unwrap_or(0);
                page += u64::from(pages);
            }
        }
        out
    }
}

/// What the pages of a block were when they were last sent: a hash each, 8 bytes for 4096. Two contents of a page have the
/// same once in 2^64 tries; who could make them so is the guest, to itself.
#[derive(Debug)]
pub(crate) struct SentHashes(Vec<AtomicU64>);

impl SentHashes {
    pub(crate) fn new(pages: u64) -> Self {
        Self((0..pages).map(|_| AtomicU64::new(0)).collect())
    }

    /// Notes what the page is now; true when it was that before.
    fn note(&self, page: u64, content: &[u8]) -> bool {
        let hash = xxh3_64(content);
        self.0[page as usize].swap(hash, Ordering::Relaxed) == hash
    }
}

/// A block of RAM that travels.
#[derive(Debug)]
pub(crate) struct SourceBlock {
    /// Its place in the offer.
    pub(crate) index: u16,
    /// Where it is in the QEMU.
    pub(crate) region: Region,
    /// What it is made of.
    pub(crate) backing: Backing,
    /// Whether the target proves it equal when asked: not what it makes anew from its own firmware files.
    pub(crate) provable: bool,
    /// What the target holds of it.
    pub(crate) sent: SentPages,
    /// What that was, where it must be known.
    pub(crate) hashes: Option<SentHashes>,
}

/// Counted by all senders of a migration.
#[derive(Debug, Default)]
pub(crate) struct SendCounters {
    /// Bytes of frames.
    pub(crate) bytes: AtomicU64,
    /// Pages sent as bytes.
    pub(crate) normal: AtomicU64,
    /// Pages that were read, are zero, and were left out or discarded.
    pub(crate) duplicate: AtomicU64,
}

/// A round, or the beginning of one, for all senders.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) round: u32,
    pub(crate) set: Arc<SendSet>,
    pub(crate) part: Part,
    pub(crate) haste: Haste,
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
}

impl Senders {
    /// Starts a thread for each stream. `failed` is told once a stream cannot go on.
    pub(crate) fn start(
        streams: Vec<Connection>,
        process: &Process,
        blocks: Arc<Vec<SourceBlock>>,
        pacer: Arc<Pacer>,
        counters: Arc<SendCounters>,
        failed: impl Fn(String) + Clone + Send + 'static,
    ) -> Result<Self, String> {
        let count = streams.len() as u32;
        let mut senders =
            Self { jobs: Vec::new(), threads: Vec::new(), shutdowns: Vec::new(), pacer: pacer.clone() };
        for (stream, connection) in streams.into_iter().enumerate() {
            connection.set_send_buffer(SEND_BUFFER_BYTES).map_err(|why| why.to_string())?;
            senders.shutdowns.push(connection.shutdown_handle());
            let (tell, jobs) = mpsc::channel();
            let mut sender = Sender {
                resend: Resend::Always,
                link: Link {
                    stream: stream as u32,
                    connection,
                    pacer: pacer.clone(),
                    counters: counters.clone(),
                    compression: Compression::default(),
                    waited: Duration::ZERO,
                },
                streams: count,
                reader: Reader::new(process).map_err(|why| why.to_string())?,
                blocks: blocks.clone(),
                pending: Vec::with_capacity(PAGES_PER_STRIPE as usize),
                buffer: vec![0; PAYLOAD_BYTES_MAX],
                head: Vec::with_capacity(16 << 10),
                descriptors: Vec::with_capacity(DESCRIPTORS_MAX),
                haste: Haste::Urgent,
                packed: vec![0; get_maximum_output_size(PAYLOAD_BYTES_MAX)],
            };
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

    /// Gives every sender its share of a round.
    pub(crate) fn send(&self, job: &Job) {
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

/// A stream, and what was learned of it.
struct Link {
    stream: u32,
    connection: Connection,
    pacer: Arc<Pacer>,
    counters: Arc<SendCounters>,
    compression: Compression,
    /// Since the last write, for room in the socket.
    waited: Duration,
}

/// Whether a page that the target has is sent once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resend {
    Always,
    IfChanged,
}

struct Sender {
    link: Link,
    resend: Resend,
    streams: u32,
    reader: Reader,
    blocks: Arc<Vec<SourceBlock>>,
    pending: Vec<PageRun>,
    buffer: Vec<u8>,
    head: Vec<u8>,
    descriptors: Vec<Descriptor>,
    packed: Vec<u8>,
    haste: Haste,
}

impl Sender {
    fn round(&mut self, job: &Job) -> Result<(), String> {
        self.make(job.haste);
        let blocks = self.blocks.clone();
        for (at, block) in blocks.iter().enumerate() {
            self.discard(block, job.round, &job.set.holes[at])?;
            self.resend = Resend::Always;
            self.send_pages(block, job.round, &job.set.pages[at])?;
            self.resend = Resend::IfChanged;
            self.send_pages(block, job.round, &job.set.suspects[at])?;
        }
        if job.part == Part::End {
            self.link.write(&[IoSlice::new(&BatchHeader::round_end(job.round).encode())])?;
        }
        self.link.connection.flush().map_err(|why| why.to_string())
    }

    /// Gives way to the guest, or not any more. Where the kernel does not allow it, everything is as it was.
    fn make(&mut self, haste: Haste) {
        if self.haste != haste {
            self.haste = haste;
            let change = if haste == Haste::Polite { POLITE } else { -POLITE };
            let _ = rustix::process::nice(change);
        }
    }

    /// The pages of `runs` that are this stream's, in stripes.
    fn share(&self, block: &SourceBlock, runs: &[PageRun]) -> impl Iterator<Item = PageRun> + use<> {
        let (stream, streams, index) = (self.link.stream, self.streams, usize::from(block.index));
        let runs = runs.to_vec();
        runs.into_iter().flat_map(stripes).filter(move |run| stream_of(index, run.first, streams) == stream)
    }

    fn send_pages(&mut self, block: &SourceBlock, round: u32, runs: &[PageRun]) -> Result<(), String> {
        let mut pages = 0;
        for mut run in self.share(block, runs) {
            while run.pages > 0 {
                let limit = (self.link.pacer.batch_limit() as u64 / PAGE).clamp(1, BATCH_PAGES_MAX);
                let take = run.pages.min(limit.saturating_sub(pages));
                if take > 0 {
                    self.pending.push(PageRun { first: run.first, pages: take });
                    run = PageRun { first: run.first + take, pages: run.pages - take };
                    pages += take;
                }
                if pages >= limit {
                    self.send_pending(block, round)?;
                    pages = 0;
                }
            }
        }
        self.send_pending(block, round)
    }

    /// Reads the pending pages, drops the zero ones, and writes one batch.
    fn send_pending(&mut self, block: &SourceBlock, round: u32) -> Result<(), String> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let spans: Vec<Span> = self.pending.iter().map(|run| block.region.span(*run)).collect();
        let bytes: usize = spans.iter().map(|span| span.len as usize).sum();
        self.link.wait_for_room()?;
        self.reader
            .read(&spans, &mut self.buffer[..bytes])
            .map_err(|why| format!("the guest's memory cannot be read: {why}"))?;
        let slices = self.describe(block);
        self.pending.clear();
        if self.descriptors.is_empty() {
            return Ok(());
        }
        self.head.clear();
        let packed = self.pack(slices.as_slice());
        match packed {
            Some(bytes) => encode_lz4_batch(block.index, round, &self.descriptors, bytes, &mut self.head),
            None => encode_batch(block.index, round, &self.descriptors, &mut self.head),
        }
        match packed {
            Some(bytes) => self.link.write(&[IoSlice::new(&self.head), IoSlice::new(&self.packed[..bytes])]),
            None => {
                let parts = slices.iter().map(|slice| IoSlice::new(&self.buffer[slice.clone()]));
                let parts: Vec<IoSlice> = std::iter::once(IoSlice::new(&self.head)).chain(parts).collect();
                self.link.write(&parts)
            }
        }
    }

    /// Compresses the batch if that makes it arrive sooner, as a sample of it tells; the bytes it has then.
    fn pack(&mut self, slices: &[Range<usize>]) -> Option<usize> {
        let first = slices.first().filter(|_| self.link.compression.may_pay())?;
        let sample = first.start..first.end.min(first.start + SAMPLE_BYTES);
        let ratio = self.compress(sample.clone())? as f64 / sample.len() as f64;
        if !self.link.compression.pays(ratio) {
            return None;
        }
        // One LZ4 block for all: what lies apart is moved together, in a copy that leaves the pages where they are.
        let mut together = Vec::new();
        let all = match slices {
            [all] => &self.buffer[all.clone()],
            _ => {
                slices.iter().for_each(|slice| together.extend_from_slice(&self.buffer[slice.clone()]));
                &together[..]
            }
        };
        let began = Instant::now();
        let packed = compress_into(all, &mut self.packed).ok()?;
        self.link.compression.compressed(Bytes(all.len() as u64), began.elapsed());
        (packed < all.len()).then_some(packed)
    }

    fn compress(&mut self, part: Range<usize>) -> Option<usize> {
        let (began, bytes) = (Instant::now(), part.len() as u64);
        let packed = compress_into(&self.buffer[part], &mut self.packed).ok()?;
        self.link.compression.compressed(Bytes(bytes), began.elapsed());
        Some(packed)
    }

    /// Describes what was read, and tells which parts of the buffer travel.
    fn describe(&mut self, block: &SourceBlock) -> Vec<Range<usize>> {
        self.descriptors.clear();
        let mut slices: Vec<Range<usize>> = Vec::new();
        let (mut at, mut normal, mut duplicate) = (0, 0, 0);
        for page in self.pending.iter().flat_map(|run| run.first..run.end()) {
            let here = at..at + PAGE as usize;
            at = here.end;
            let zero = is_zero(&self.buffer[here.clone()]);
            match zero {
                true => duplicate += 1,
                false => normal += 1,
            }
            let same = !zero
                && block.hashes.as_ref().is_some_and(|hashes| hashes.note(page, &self.buffer[here.clone()]));
            let sent = block.sent.has(page);
            if zero && !sent || same && sent && self.resend == Resend::IfChanged {
                continue;
            }
            block.sent.set(page, !zero);
            append(&mut self.descriptors, page, if zero { Content::Discard } else { Content::Bytes });
            match slices.last_mut() {
                _ if zero => {}
                Some(last) if last.end == here.start => last.end = here.end,
                _ => slices.push(here),
            }
        }
        self.link.counters.normal.fetch_add(normal, Ordering::Relaxed);
        self.link.counters.duplicate.fetch_add(duplicate, Ordering::Relaxed);
        slices
    }

    /// Tells the target to drop what it holds of these pages.
    fn discard(&mut self, block: &SourceBlock, round: u32, runs: &[PageRun]) -> Result<(), String> {
        self.descriptors.clear();
        for run in self.share(block, runs) {
            for page in run.first..run.end() {
                block.sent.set(page, false);
            }
            let pages = run.pages as u16; // a stripe has 256
            self.descriptors.push(Descriptor { first: run.first as u32, pages, content: Content::Discard });
            if self.descriptors.len() == DESCRIPTORS_MAX {
                self.write_discards(block, round)?;
            }
        }
        if self.descriptors.is_empty() { Ok(()) } else { self.write_discards(block, round) }
    }

    fn write_discards(&mut self, block: &SourceBlock, round: u32) -> Result<(), String> {
        let mut head = Vec::new();
        encode_batch(block.index, round, &self.descriptors, &mut head);
        self.descriptors.clear();
        self.link.write(&[IoSlice::new(&head)])
    }
}

impl Link {
    /// Waits until the socket takes more: what is read before would be cold, and old, when it can go.
    fn wait_for_room(&mut self) -> Result<(), String> {
        let began = Instant::now();
        let waited = self.connection.wait_for_room(Some(began + WRITE_WITHIN));
        self.waited += began.elapsed();
        waited.map_err(|why| self.failed(&why))
    }

    fn failed(&self, why: &sterna_transport::TransportError) -> String {
        format!("page stream {} to the target failed: {why}", self.stream)
    }

    /// Writes a frame in its turn, and learns what the link takes.
    fn write(&mut self, parts: &[IoSlice<'_>]) -> Result<(), String> {
        let (bytes, began) = (parts.iter().map(|part| part.len()).sum(), Instant::now());
        self.pacer.acquire(bytes);
        self.connection.set_write_deadline(Some(Instant::now() + WRITE_WITHIN));
        let written = self.connection.write_vectored(parts);
        written.map_err(|why| self.failed(&why))?;
        self.counters.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let took = std::mem::take(&mut self.waited) + began.elapsed();
        self.compression.wrote(Bytes(bytes as u64), took);
        Ok(())
    }
}

/// Adds a page to the last run if it continues it.
fn append(descriptors: &mut Vec<Descriptor>, page: u64, content: Content) {
    match descriptors.last_mut() {
        Some(last)
            if last.content == content
                && u64::from(last.first) + u64::from(last.pages) == page
                && last.pages < u16::MAX =>
        {
            last.pages += 1;
        }
        _ => descriptors.push(Descriptor { first: page as u32, pages: 1, content }),
    }
}

/// A run cut where the stream may change.
fn stripes(mut run: PageRun) -> impl Iterator<Item = PageRun> {
    std::iter::from_fn(move || {
        let pages = run.pages.min(PAGES_PER_STRIPE - run.first % PAGES_PER_STRIPE);
        let stripe = PageRun { first: run.first, pages };
        run = PageRun { first: run.first + pages, pages: run.pages - pages };
        (pages > 0).then_some(stripe)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripes_cover_a_run_and_never_cross_a_stream() {
        let run = PageRun { first: 250, pages: 600 };
        let cut: Vec<_> = stripes(run).collect();
        assert_eq!(cut.iter().map(|run| run.pages).collect::<Vec<_>>(), [6, 256, 256, 82]);
        for stripe in cut {
            assert_eq!(stream_of(3, stripe.first, 2), stream_of(3, stripe.end() - 1, 2));
        }
    }

    #[test]
    fn sent_pages_come_back_as_runs() {
        let sent = SentPages::new(200);
        for page in [0, 1, 2, 63, 64, 65, 128, 199] {
            sent.set(page, true);
        }
        sent.set(1, false);
        let runs: Vec<_> = sent.runs().iter().map(|run| (run.first, run.pages)).collect();
        assert_eq!(runs, [(0, 1), (2, 1), (63, 3), (128, 1), (199, 1)]);
        let full = SentPages::new(128);
        (0..128).for_each(|page| full.set(page, true));
        assert_eq!(full.runs(), [PageRun { first: 0, pages: 128 }]);
    }
}
