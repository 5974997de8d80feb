//! One stream's thread: it reads its share of the send-set from the guest and writes batches.

use super::kept::{Kept, Sent};
use super::pack::Packer;
use super::send::{Haste, Job, Part, SendCounters, SendOptions, Shared};
use super::{PAGES_PER_STRIPE, SourceBlock, stream_of, stripes_of, subtract};
use crate::control::explain;
use crate::registry::lock;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use sterna_engine::units::Bytes;
use sterna_engine::wire::Encoding;
use sterna_engine::wire::batch::{
    BatchHeader, Content, DESCRIPTORS_MAX, Descriptor, PAYLOAD_BYTES_MAX, encode_batch, encode_packed_batch,
};
use sterna_memory::{Backing, PAGE, PageRun, Peeker, Process, Reader, Span, is_zero};
use sterna_transport::{Connection, Pacer, TransportError};

/// How long a write to a stream may wait: the machine's own deadline for pages that do not move comes first.
const WRITE_WITHIN: Duration = Duration::from_secs(120);

/// Pages that travel at once: 256 KiB stay in a processor's own cache on their way from the guest to the socket, and at the
/// other end from the socket to the guest.
const BATCH_PAGES_MAX: u64 = 64;

/// How much nicer (nice(2), for the thread alone) a sender is than the guest's processors while the guest runs: where both
/// want the same core the guest gets nine tenths of it.
const POLITE: i32 = 10;
/// The kernel takes a socket's buffer to hold its bookkeeping too, and doubles what it is told (socket(7)).
const KERNEL_DOUBLES: usize = 2;

/// A write that takes longer, before the target takes pages, waits for that and not for the link.
const STALLED: Duration = Duration::from_millis(50);

/// Pages that are looked through to find out whether a few of them were written: fewer than would cost another system call.
const PEEK_GAP: u64 = 512;

/// The first round that brings pages which may come again: what was sent once is seldom sent twice.
const FIRST_KEPT: u32 = 2;

/// A stream.
pub(super) struct Link {
    stream: u32,
    connection: Connection,
    pacer: Arc<Pacer>,
    counters: Arc<SendCounters>,
    /// Since the last write, for room in the socket.
    waited: Duration,
    /// How long a write may wait.
    pub(super) within: Duration,
}

/// Whether a page that the target has is sent once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resend {
    Always,
    IfChanged,
}

/// What is to be done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Nothing: it is zero there too, or was compared with what was sent.
    Nothing,
    /// Nothing: it is what was kept of it.
    Same,
    /// The target drops it.
    Discard,
    /// What has changed travels.
    Patch,
    /// All of it travels.
    Whole,
}

pub(super) struct Sender {
    link: Link,
    resend: Resend,
    streams: u32,
    reader: Reader,
    /// Where pages that were written again wait.
    peeker: Option<Peeker>,
    packer: Packer,
    kept: Kept,
    blocks: Arc<Vec<SourceBlock>>,
    pending: Vec<PageRun>,
    buffer: Vec<u8>,
    head: Vec<u8>,
    /// Runs that travel whole, and those that do not travel any more.
    descriptors: Vec<Descriptor>,
    /// Runs of which only what has changed travels, and that.
    patched: Vec<Descriptor>,
    patches: Vec<u8>,
    haste: Haste,
    shared: Arc<Shared>,
}

impl Sender {
    /// A sender for the stream with this number, of so many.
    pub(super) fn new(
        (stream, streams, connection, pacer, counters): (u32, u32, Connection, Arc<Pacer>, Arc<SendCounters>),
        process: &Process,
        blocks: Arc<Vec<SourceBlock>>,
        options: SendOptions,
        shared: Arc<Shared>,
    ) -> Result<Self, String> {
        // No others are read in a way of their own.
        let huge = blocks.iter().filter(|block| block.backing == Backing::HugePages);
        let regions: Vec<_> = huge.map(|block| block.region).collect();
        let peeker = options.postpone.then(|| Peeker::new(process)).transpose();
        Ok(Self {
            link: Link::new(stream, connection, pacer, counters),
            resend: Resend::Always,
            streams,
            reader: Reader::of(process, &regions).map_err(|why| explain(&why))?,
            peeker: peeker.map_err(|why| why.to_string())?,
            packer: Packer::new(PAYLOAD_BYTES_MAX, options.methods),
            kept: Kept::new(options.delta_cache / u64::from(streams.max(1))),
            blocks,
            pending: Vec::with_capacity(PAGES_PER_STRIPE as usize),
            buffer: vec![0; PAYLOAD_BYTES_MAX],
            head: Vec::with_capacity(16 << 10),
            descriptors: Vec::with_capacity(DESCRIPTORS_MAX),
            patched: Vec::new(),
            patches: Vec::new(),
            haste: Haste::Urgent,
            shared,
        })
    }

    pub(super) fn round(&mut self, job: &Job) -> Result<(), String> {
        self.make(job.haste);
        let blocks = self.blocks.clone();
        for (at, block) in blocks.iter().enumerate() {
            self.discard(block, job.round, &job.set.holes[at])?;
            self.resend = Resend::Always;
            self.send_pages((at, block), job.round, &job.set.pages[at], &job.set.hot[at])?;
            self.resend = Resend::IfChanged;
            self.send_pages((at, block), job.round, &job.set.suspects[at], &[])?;
        }
        if self.link.stream == 0 {
            self.tell_missing(job)?;
        }
        if job.part == Part::End {
            self.head.clear();
            self.head.extend_from_slice(&BatchHeader::round_end(job.round).encode());
            self.link.write(&self.head, &[])?;
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
        runs.into_iter()
            .flat_map(stripes_of)
            .filter(move |run| stream_of(index, run.first, streams) == stream)
    }

    /// Sends what of `runs` is this stream's, what is farthest from `hot` stripes first: whoever writes there comes to the stripes
    /// around them soon, and what was written by the time that it is looked at need not be sent now.
    fn send_pages(
        &mut self,
        (at, block): (usize, &SourceBlock),
        round: u32,
        runs: &[PageRun],
        hot: &[u64],
    ) -> Result<(), String> {
        let mut share: Vec<PageRun> = self.share(block, runs).collect();
        if !hot.is_empty() {
            share.sort_by_key(|run| std::cmp::Reverse(distance(hot, run.first)));
        }
        let mut pages = 0;
        for mut run in share {
            if self.haste == Haste::Polite && self.shared.abandoned.load(Ordering::Relaxed) {
                lock(&self.shared.left).push((at, run));
                continue;
            }
            // A batch is in ascending order.
            if self.pending.last().is_some_and(|last| run.first < last.end()) {
                self.send_pending(block, round)?;
                pages = 0;
            }
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

    /// Leaves out what was written again since the scan that found it: that scan's successor finds it anew, and it would be sent
    /// twice (Clark et al., NSDI 2005, section 4.1).
    fn postpone(&mut self, block: &SourceBlock) -> Result<(), String> {
        let Some(peeker) = self.peeker.as_mut().filter(|_| self.haste == Haste::Polite) else {
            return Ok(());
        };
        let mut again = Vec::new();
        let mut runs = self.pending.iter().copied().peekable();
        while let Some(mut within) = runs.next() {
            while let Some(next) = runs.next_if(|next| next.first - within.end() < PEEK_GAP) {
                within.pages = next.end() - within.first;
            }
            peeker.written(&block.region, within, &mut again).map_err(|why| why.to_string())?;
        }
        if !again.is_empty() {
            let left = subtract(&self.pending, &again);
            add(&self.link.counters.postponed, count(&self.pending) - count(&left));
            self.pending = left;
        }
        Ok(())
    }

    /// Reads the pending pages, drops the zero ones, and writes a batch of those that travel whole and one of those that do not.
    fn send_pending(&mut self, block: &SourceBlock, round: u32) -> Result<(), String> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let taken = self.shared.taken.load(Ordering::Relaxed);
        self.link.wait_for_room()?;
        self.postpone(block)?;
        let spans: Vec<Span> = self.pending.iter().map(|run| block.region.span(*run)).collect();
        let bytes: usize = spans.iter().map(|span| span.len as usize).sum();
        self.reader
            .read(&spans, &mut self.buffer[..bytes])
            .map_err(|why| format!("the guest's memory cannot be read: {why}"))?;
        let whole = self.describe(block, round);
        self.pending.clear();
        if !self.patched.is_empty() {
            self.head.clear();
            let packed = (Encoding::Delta, self.patches.len());
            encode_packed_batch(block.index, round, &self.patched, packed, &mut self.head);
            self.link.write(&self.head, &[&self.patches])?;
        }
        if self.descriptors.is_empty() { Ok(()) } else { self.send_whole(block, round, &whole, taken) }
    }

    fn send_whole(
        &mut self,
        block: &SourceBlock,
        round: u32,
        whole: &[Range<usize>],
        taken: bool,
    ) -> Result<(), String> {
        self.head.clear();
        let took = match self.packer.pack(&self.buffer, whole) {
            Some((encoding, bytes)) => {
                let packed = (encoding, bytes.len());
                let saved = whole.iter().map(Range::len).sum::<usize>() - bytes.len();
                add(&self.link.counters.packed_saved, saved as u64);
                encode_packed_batch(block.index, round, &self.descriptors, packed, &mut self.head);
                self.link.write(&self.head, &[bytes])?
            }
            None => {
                encode_batch(block.index, round, &self.descriptors, &mut self.head);
                let parts: Vec<&[u8]> = whole.iter().map(|part| &self.buffer[part.clone()]).collect();
                self.link.write(&self.head, &parts)?
            }
        };
        if taken || took.1 < STALLED {
            self.packer.rule.wrote(took.0, took.1);
        }
        Ok(())
    }

    /// Describes what was read, and tells which parts of the buffer travel whole. What of a page has changed goes to the patches.
    fn describe(&mut self, block: &SourceBlock, round: u32) -> Vec<Range<usize>> {
        self.descriptors.clear();
        self.patched.clear();
        self.patches.clear();
        let began = Instant::now();
        let pages: Vec<u64> = self.pending.iter().flat_map(|run| run.first..run.end()).collect();
        let keeps = round >= FIRST_KEPT && self.kept.is_on(pages.len() as u32);
        let mut whole: Vec<Range<usize>> = Vec::new();
        let (mut duplicate, mut patched, mut same) = (0, 0, 0);
        for (at, &page) in pages.iter().enumerate() {
            let here = at * PAGE as usize..(at + 1) * PAGE as usize;
            match self.look(block, page, here.clone(), round, keeps) {
                What::Nothing => duplicate += 1,
                What::Same => same += 1,
                What::Discard => {
                    duplicate += 1;
                    append(&mut self.descriptors, page, Content::Discard);
                }
                What::Patch => {
                    patched += 1;
                    append(&mut self.patched, page, Content::Bytes);
                }
                What::Whole => {
                    append(&mut self.descriptors, page, Content::Bytes);
                    match whole.last_mut() {
                        Some(last) if last.end == here.start => last.end = here.end,
                        _ => whole.push(here),
                    }
                }
            }
        }
        let counters = &self.link.counters;
        add(&counters.normal, pages.len() as u64 - duplicate - same);
        add(&counters.duplicate, duplicate + same);
        let found = std::mem::take(&mut self.kept.found);
        if found > 0 {
            let saved = (patched + same) * PAGE - self.patches.len() as u64;
            add(&counters.patched, patched);
            add(&counters.patched_saved, saved);
            let link = self.packer.rule.link().map_or(0.0, |rate| 1.0 / rate.0.max(1) as f64);
            self.kept.rule.compared(found, Bytes(saved), began.elapsed(), link);
        }
        whole
    }

    /// What is to be done with a page that was read.
    fn look(&mut self, block: &SourceBlock, page: u64, here: Range<usize>, round: u32, keeps: bool) -> What {
        let content = &self.buffer[here];
        let (zero, sent) = (is_zero(content), block.sent.has(page));
        let place = place(block, page, self.streams);
        if zero {
            self.kept.forget(place);
            block.sent.set(page, false);
            return if sent { What::Discard } else { What::Nothing };
        }
        let same = block.hashes.as_ref().is_some_and(|hashes| hashes.note(page, content));
        if same && sent && self.resend == Resend::IfChanged {
            return What::Nothing;
        }
        block.sent.set(page, true);
        if !keeps {
            // What is not compared now is not what was kept either.
            self.kept.forget(place);
            return What::Whole;
        }
        match self.kept.send(place, round, content, &mut self.patches) {
            Sent::Same => What::Same,
            Sent::Patch => What::Patch,
            Sent::Whole => What::Whole,
        }
    }

    /// Tells the target to drop what it holds of these pages.
    fn discard(&mut self, block: &SourceBlock, round: u32, runs: &[PageRun]) -> Result<(), String> {
        self.descriptors.clear();
        for run in self.share(block, runs) {
            for page in run.first..run.end() {
                block.sent.set(page, false);
                self.kept.forget(place(block, page, self.streams));
            }
            let pages = run.pages as u16; // a stripe has 256
            self.descriptors.push(Descriptor { first: run.first as u32, pages, content: Content::Discard });
            if self.descriptors.len() == DESCRIPTORS_MAX {
                self.write_descriptors(block.index, round)?;
            }
        }
        if self.descriptors.is_empty() { Ok(()) } else { self.write_descriptors(block.index, round) }
    }

    /// Tells what the target does not have, and gets when it asks.
    fn tell_missing(&mut self, job: &Job) -> Result<(), String> {
        for (place, runs) in job.missing.iter() {
            self.descriptors.clear();
            for run in runs {
                let mut first = run.first;
                while first < run.end() {
                    let pages = (run.end() - first).min(u16::MAX.into());
                    let content = Content::Missing;
                    self.descriptors.push(Descriptor { first: first as u32, pages: pages as u16, content });
                    first += pages;
                    if self.descriptors.len() == DESCRIPTORS_MAX {
                        self.write_descriptors(*place, job.round)?;
                    }
                }
            }
            if !self.descriptors.is_empty() {
                self.write_descriptors(*place, job.round)?;
            }
        }
        Ok(())
    }

    fn write_descriptors(&mut self, place: u16, round: u32) -> Result<(), String> {
        self.head.clear();
        encode_batch(place, round, &self.descriptors, &mut self.head);
        self.descriptors.clear();
        self.link.write(&self.head, &[]).map(drop)
    }
}

/// Bounds what a connection's socket may hold; no less than two segments: the other end acknowledges every second one at once, and a single one
/// 40 ms later. Those of loopback are longer than what is begun with.
pub(crate) fn set_queue(connection: &Connection, bytes: Bytes) -> Result<(), TransportError> {
    let bytes = bytes.0 as usize / KERNEL_DOUBLES;
    connection.set_send_buffer(bytes.max(connection.segment_bytes().unwrap_or(0)))
}

impl Link {
    pub(super) fn new(
        stream: u32,
        connection: Connection,
        pacer: Arc<Pacer>,
        counters: Arc<SendCounters>,
    ) -> Self {
        Self { stream, connection, pacer, counters, waited: Duration::ZERO, within: WRITE_WITHIN }
    }

    /// What its socket may hold ([`set_queue`]).
    pub(super) fn set_queue(&self, bytes: Bytes) -> Result<(), String> {
        set_queue(&self.connection, bytes).map_err(|why| self.failed(&why))
    }

    /// How long what is sent takes to be acknowledged just now.
    pub(super) fn round_trip(&self) -> Option<Duration> {
        self.connection.round_trip()
    }

    pub(super) fn flush(&mut self) -> Result<(), String> {
        let flushed = self.connection.flush();
        flushed.map_err(|why| self.failed(&why))
    }

    /// Waits until the socket takes more: what is read before would be cold, and old, when it can go.
    pub(super) fn wait_for_room(&mut self) -> Result<(), String> {
        let began = Instant::now();
        let waited = self.connection.wait_for_room(Some(began + self.within));
        self.waited += began.elapsed();
        waited.map_err(|why| self.failed(&why))
    }

    fn failed(&self, why: &sterna_transport::TransportError) -> String {
        format!("page stream {} to the target failed: {why}", self.stream)
    }

    /// Writes a frame in its turn, and tells what the link took and how long, waits included.
    pub(super) fn write(&mut self, head: &[u8], payload: &[&[u8]]) -> Result<(Bytes, Duration), String> {
        let parts = std::iter::once(head).chain(payload.iter().copied());
        let parts: Vec<IoSlice> = parts.map(IoSlice::new).collect();
        let (bytes, began) = (parts.iter().map(|part| part.len()).sum(), Instant::now());
        self.pacer.acquire(bytes);
        self.connection.set_write_deadline(Some(Instant::now() + self.within));
        let written = self.connection.write_vectored(&parts);
        written.map_err(|why| self.failed(&why))?;
        add(&self.counters.bytes, bytes as u64);
        Ok((Bytes(bytes as u64), std::mem::take(&mut self.waited) + began.elapsed()))
    }
}

/// A page's own number among those of its stream: dense, so that neighbours do not take each other's place.
fn place(block: &SourceBlock, page: u64, streams: u32) -> (u16, u32, u64) {
    let stripe = page / PAGES_PER_STRIPE / u64::from(streams.max(1));
    (block.index, page as u32, stripe * PAGES_PER_STRIPE + page % PAGES_PER_STRIPE + u64::from(block.index))
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

fn count(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| run.pages).sum()
}

/// Adds a page to the last run if it continues it.
pub(super) fn append(descriptors: &mut Vec<Descriptor>, page: u64, content: Content) {
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

/// How far a page's stripe is from the next hot one; `hot` is ascending.
fn distance(hot: &[u64], page: u64) -> u64 {
    let stripe = page / PAGES_PER_STRIPE;
    let after = hot.partition_point(|&other| other < stripe);
    let near = hot[..after].last().into_iter().chain(hot.get(after));
    near.map(|other| stripe.abs_diff(*other)).min().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_far_from_hot_stripes_is_known() {
        let hot = [3, 10];
        let of = |stripe: u64| distance(&hot, stripe * PAGES_PER_STRIPE + 7);
        assert_eq!([0, 3, 4, 6, 7, 10, 100].map(of), [3, 0, 1, 3, 3, 0, 90]);
        assert_eq!(distance(&[], 5), 0);
    }

    #[test]
    fn stripes_cover_a_run_and_never_cross_a_stream() {
        let run = PageRun { first: 250, pages: 600 };
        let cut: Vec<_> = stripes_of(run).collect();
        assert_eq!(cut.iter().map(|run| run.pages).collect::<Vec<_>>(), [6, 256, 256, 82]);
        for stripe in cut {
            assert_eq!(stream_of(3, stripe.first, 2), stream_of(3, stripe.end() - 1, 2));
        }
    }
}
