//! The source in post-copy: a server of pages. Its QEMU is stopped for good, so what it has does not change any more.
//!
//! One thread answers what the target's guest waits for, on the demand connection; it does nothing else, so that an answer takes as long as
//! the network and one copy. Pusher threads send everything else that the target says is missing, in the order of [`Prepaging`], on streams whose queue is
//! kept short: what lies in a queue already delays the answers, which share the link with it.

use super::pack::Packer;
use super::send::{SendCounters, SendOptions};
use super::sender::{Link, append};
use super::{SourceBlock, URGENT};
use crate::registry::lock;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use sterna_engine::policy::{Prepaging, PushQueue};
use sterna_engine::wire::batch::{
    Content, DESCRIPTORS_MAX, Descriptor, Layout, PAYLOAD_BYTES_MAX, encode_batch, encode_packed_batch,
};
use sterna_engine::wire::request::{REQUEST_BYTES, Request};
use sterna_memory::{Backing, PAGE, PageRun, Process, Reader, Region, Span, is_zero, populated};
use sterna_transport::{Connection, Pacer, Shutdown, Writer};

/// Pages of an answer: what a frame has room for. The target may ask for more at once.
const ANSWER_PAGES_MAX: u64 = PAYLOAD_BYTES_MAX as u64 / PAGE;
/// Pages that a pusher sends at once: more would make a fault's answer wait behind them.
const PUSH_PAGES_MAX: u64 = 16;
/// How long a write may wait. A target whose guest runs takes pages all the time: one that does not is gone.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// Batches of post-copy belong to no round.
const NO_ROUND: u32 = 0;
/// How long an idle pusher waits before it looks whether it is to end.
const IDLE: Duration = Duration::from_millis(200);

/// What all threads share.
struct Shelf {
    blocks: Arc<Vec<SourceBlock>>,
    /// The block of each place in the offer.
    places: Vec<Option<usize>>,
    layout: Layout,
    reader: Reader,
    process: Process,
    /// What can differ from zero, block by block: found while the first answers go.
    populated: OnceLock<Vec<Vec<PageRun>>>,
    order: Mutex<Order>,
    more: Condvar,
    /// Whether the link takes more than one push stream.
    wide: AtomicBool,
    over: AtomicBool,
    counters: Arc<SendCounters>,
    figures: Figures,
}

/// What is to be pushed, and whether the target has said all of it.
struct Order {
    prepaging: Prepaging,
    listed: bool,
}

/// What was asked for.
#[derive(Debug, Default)]
struct Figures {
    requests: AtomicU64,
    pushed: AtomicU64,
}

/// A server of pages, while it is connected.
pub(crate) struct Serving {
    shelf: Arc<Shelf>,
    threads: Vec<JoinHandle<()>>,
    shutdowns: Vec<Shutdown>,
    pacer: Arc<Pacer>,
}

impl Serving {
    /// Begins to answer on the demand connection, and sends before that what is `first`, by place. `bytes` are those of the offer's blocks, as they travel; `failed` is told once when it cannot go on.
    pub(crate) fn start(
        (demand, first): (Connection, Vec<(u16, PageRun)>),
        process: &Process,
        blocks: &Arc<Vec<SourceBlock>>,
        bytes: &[u64],
        (pacer, counters): (Arc<Pacer>, Arc<SendCounters>),
        failed: impl FnOnce(String) + Send + 'static,
    ) -> Result<Self, String> {
        let place = |at| blocks.iter().position(|block| usize::from(block.index) == at);
        let pages: Vec<u64> = bytes.iter().map(|bytes| bytes.div_ceil(PAGE)).collect();
        let order = Order { prepaging: Prepaging::new(pages), listed: false };
        let shelf = Arc::new(Shelf {
            blocks: blocks.clone(),
            places: (0..bytes.len()).map(place).collect(),
            layout: Layout::new(bytes.iter().copied()),
            reader: Reader::new(process).map_err(|why| why.to_string())?,
            process: process.try_clone().map_err(|why| why.to_string())?,
            populated: OnceLock::new(),
            order: Mutex::new(order),
            more: Condvar::new(),
            wide: AtomicBool::new(false),
            over: AtomicBool::new(false),
            counters,
            figures: Figures::default(),
        });
        let mut serving = Self {
            shelf: shelf.clone(),
            threads: Vec::new(),
            shutdowns: vec![demand.shutdown_handle()],
            pacer,
        };
        serving.spawn("pages-demand", move || {
            let _ = rustix::process::nice(URGENT);
            let (reader, writer) = demand.split();
            if let Err(why) = Answering::new(shelf, writer).serve(reader, first) {
                failed(why);
            }
        })?;
        Ok(serving)
    }

    /// Begins to push. The VM runs at the target by now: what is looked for here takes no time from its start.
    pub(crate) fn push(
        &mut self,
        streams: Vec<Connection>,
        options: SendOptions,
        failed: impl Fn(String) + Clone + Send + 'static,
    ) -> Result<(), String> {
        let (looking, failed_to_look) = (self.shelf.clone(), failed.clone());
        self.spawn("pages-look", move || {
            if let Err(why) = looking.look() {
                failed_to_look(why);
            }
        })?;
        for (at, connection) in streams.into_iter().enumerate() {
            self.shutdowns.push(connection.shutdown_handle());
            let (shelf, failed) = (self.shelf.clone(), failed.clone());
            let mut link = Link::new(at as u32, connection, self.pacer.clone(), shelf.counters.clone());
            link.within = WRITE_WITHIN;
            link.set_queue(PushQueue::first())?;
            let mut pusher = Pushing {
                shelf,
                link,
                packer: Packer::new(PUSH_PAGES_MAX as usize * PAGE as usize, options.methods),
                page: Pages::new(PUSH_PAGES_MAX),
                stream: at,
                began: Instant::now(),
                queue: PushQueue::new(Duration::ZERO),
            };
            self.spawn(&format!("pages-push-{at}"), move || {
                if let Err(why) = pusher.push() {
                    failed(why);
                }
            })?;
        }
        Ok(())
    }

    /// Faults that were answered.
    pub(crate) fn requests(&self) -> u64 {
        self.shelf.figures.requests.load(Ordering::Relaxed)
    }

    /// Pages that went before they were asked for.
    pub(crate) fn pushed(&self) -> u64 {
        self.shelf.figures.pushed.load(Ordering::Relaxed)
    }

    /// Pages that the target misses and that nobody has sent yet.
    pub(crate) fn remaining(&self) -> u64 {
        lock(&self.shelf.order).prepaging.remaining()
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(work);
        self.threads.push(thread.map_err(|why| format!("no thread can be started: {why}"))?);
        Ok(())
    }
}

impl Drop for Serving {
    /// Cuts the connections and waits for the threads: none reads the guest any more.
    fn drop(&mut self) {
        self.shelf.over.store(true, Ordering::Relaxed);
        self.shelf.more.notify_all();
        self.shutdowns.iter().for_each(Shutdown::shutdown);
        let rate = self.pacer.rate();
        self.pacer.set_rate(None);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
        self.pacer.set_rate(rate);
    }
}

impl Shelf {
    fn look(&self) -> Result<(), String> {
        let mut all = Vec::with_capacity(self.blocks.len());
        for block in self.blocks.iter() {
            let mut runs = Vec::new();
            populated(&self.process, &block.region, &mut runs).map_err(|why| why.to_string())?;
            all.push(runs);
        }
        let _ = self.populated.set(all);
        let _order = lock(&self.order);
        self.more.notify_all();
        Ok(())
    }

    fn block(&self, place: u16) -> Result<(usize, &SourceBlock), String> {
        let at = self.places.get(usize::from(place)).copied().flatten();
        at.map(|at| (at, &self.blocks[at]))
            .ok_or_else(|| format!("the target asked for pages of block {place}"))
    }

    /// What of a run can differ from zero. The rest is not read: to read a hole of a file is to fill it.
    fn there(&self, at: usize, run: PageRun) -> Result<Vec<PageRun>, String> {
        let (block, mut there) = (&self.blocks[at], Vec::new());
        match self.populated.get() {
            Some(populated) => within(&populated[at], run, &mut there),
            // Nothing is known yet: the first answers, while the target loads the VM.
            None if block.backing == Backing::Anonymous => there.push(run),
            None => {
                let span = block.region.span(run);
                let part = Region { base: span.addr, bytes: span.len };
                populated(&self.process, &part, &mut there).map_err(|why| why.to_string())?;
                there.iter_mut().for_each(|found| found.first += run.first);
            }
        }
        Ok(there)
    }

    /// How many pages of a place come and go together.
    fn granule(&self, place: u16) -> u64 {
        self.block(place).map_or(1, |(_, block)| block.backing.granule())
    }

    /// The next pages to push on the stream of this number; nothing once it is over. Of huge pages all that belongs together: the target
    /// keeps what it has of one until it has all.
    fn next(&self, stream: usize) -> Option<(u16, PageRun)> {
        let mut order = lock(&self.order);
        while !self.over.load(Ordering::Relaxed) {
            if order.listed
                && (stream == 0 || self.wide.load(Ordering::Relaxed))
                && self.populated.get().is_some()
                && let Some(chunk) = order.prepaging.take(PUSH_PAGES_MAX)
            {
                let granule = self.granule(chunk.block);
                let first = chunk.first / granule * granule;
                let end = (chunk.first + chunk.pages).next_multiple_of(granule);
                order.prepaging.sent(chunk.block, first, end - first);
                return Some((chunk.block, PageRun { first, pages: end - first }));
            }
            let waited = self.more.wait_timeout(order, IDLE);
            order = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        None
    }
}

/// Pages on their way from the guest to a connection.
struct Pages {
    buffer: Vec<u8>,
    descriptors: Vec<Descriptor>,
    /// The parts of the buffer that travel.
    parts: Vec<Range<usize>>,
    head: Vec<u8>,
}

impl Pages {
    fn new(most: u64) -> Self {
        Self {
            buffer: vec![0; (most * PAGE) as usize],
            descriptors: Vec::with_capacity(DESCRIPTORS_MAX),
            parts: Vec::new(),
            head: Vec::with_capacity(4 << 10),
        }
    }

    /// Reads what is `there` of a run, and describes each page of it: bytes, or zero.
    fn read(&mut self, shelf: &Shelf, at: usize, run: PageRun, there: &[PageRun]) -> Result<(), String> {
        let block = &shelf.blocks[at];
        self.descriptors.clear();
        self.parts.clear();
        let spans: Vec<Span> = there.iter().map(|run| block.region.span(*run)).collect();
        let bytes: usize = spans.iter().map(|span| span.len as usize).sum();
        let buffer = &mut self.buffer[..bytes];
        shelf
            .reader
            .read(&spans, buffer)
            .map_err(|why| format!("the guest's memory cannot be read: {why}"))?;
        let mut here = 0;
        let mut pages = there.iter().flat_map(|run| run.first..run.end()).peekable();
        for page in run.first..run.end() {
            let content = match pages.next_if_eq(&page) {
                Some(_) => {
                    let part = here..here + PAGE as usize;
                    here = part.end;
                    if is_zero(&self.buffer[part.clone()]) {
                        Content::Discard
                    } else {
                        match self.parts.last_mut() {
                            Some(last) if last.end == part.start => last.end = part.end,
                            _ => self.parts.push(part),
                        }
                        Content::Bytes
                    }
                }
                None => Content::Discard,
            };
            append(&mut self.descriptors, page, content);
        }
        let sent: usize = self.parts.iter().map(Range::len).sum::<usize>() / PAGE as usize;
        shelf.counters.normal.fetch_add(sent as u64, Ordering::Relaxed);
        shelf.counters.duplicate.fetch_add(run.pages - sent as u64, Ordering::Relaxed);
        Ok(())
    }

    fn payload(&self) -> impl Iterator<Item = &[u8]> {
        self.parts.iter().map(|part| &self.buffer[part.clone()])
    }
}

/// What of `runs`, which are ascending and disjoint, lies within one run.
fn within(runs: &[PageRun], run: PageRun, out: &mut Vec<PageRun>) {
    let from = runs.partition_point(|other| other.end() <= run.first);
    for other in runs[from..].iter().take_while(|other| other.first < run.end()) {
        let first = other.first.max(run.first);
        out.push(PageRun { first, pages: other.end().min(run.end()) - first });
    }
}

/// The thread that answers.
struct Answering {
    shelf: Arc<Shelf>,
    writer: Writer,
    pages: Pages,
}

impl Answering {
    fn new(shelf: Arc<Shelf>, writer: Writer) -> Self {
        Self { shelf, writer, pages: Pages::new(ANSWER_PAGES_MAX) }
    }

    fn serve(
        mut self,
        mut reader: sterna_transport::Reader,
        first: Vec<(u16, PageRun)>,
    ) -> Result<(), String> {
        let lost =
            |why: &dyn std::fmt::Display| format!("the demand connection to the target is lost: {why}");
        reader.set_deadline(None);
        for (place, run) in first {
            self.send(place, run)?;
        }
        let mut raw = [0; REQUEST_BYTES];
        loop {
            reader.read_exact(&mut raw).map_err(|why| lost(&why))?;
            let request = Request::decode(&raw).map_err(|why| lost(&why))?;
            request.check(&self.shelf.layout).map_err(|why| lost(&why))?;
            match request {
                Request::Fault { block, first, pages } => {
                    self.answer(block, PageRun { first, pages: pages.into() })?;
                }
                Request::Missing { block, first, pages } => {
                    self.shelf.block(block)?;
                    lock(&self.shelf.order).prepaging.want(block, first, pages.into());
                }
                Request::Listed => {
                    lock(&self.shelf.order).listed = true;
                    self.shelf.more.notify_all();
                }
            }
        }
    }

    /// Answers what the guest waits for, in batches that a frame has room for.
    fn answer(&mut self, place: u16, asked: PageRun) -> Result<(), String> {
        self.shelf.block(place)?;
        if self.is_coming(place, asked) {
            return Ok(());
        }
        self.send(place, asked)?;
        self.shelf.figures.requests.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn send(&mut self, place: u16, asked: PageRun) -> Result<(), String> {
        let (at, _) = self.shelf.block(place)?;
        for first in (asked.first..asked.end()).step_by(ANSWER_PAGES_MAX as usize) {
            let run = PageRun { first, pages: ANSWER_PAGES_MAX.min(asked.end() - first) };
            let there = self.shelf.there(at, run)?;
            self.pages.read(&self.shelf, at, run, &there)?;
            self.write(place)?;
        }
        Ok(())
    }

    /// Whether a page that is asked for is on its way already, ahead of a guest that walks along a stream: to send it twice would only keep the
    /// next ones waiting. A page elsewhere may lie behind others on its way, and goes once more; a huge one does not, it is that long itself.
    /// Nobody else sends what is answered.
    fn is_coming(&self, place: u16, asked: PageRun) -> bool {
        let mut order = lock(&self.shelf.order);
        let Order { prepaging, listed } = &mut *order;
        let taken = *listed && (asked.first..asked.end()).all(|page| prepaging.is_taken(place, page));
        prepaging.sent(place, asked.first, asked.pages);
        prepaging.fault(place, asked.first);
        taken && (prepaging.is_streaming() || self.shelf.granule(place) > 1)
    }

    fn write(&mut self, place: u16) -> Result<(), String> {
        let Pages { head, descriptors, .. } = &mut self.pages;
        head.clear();
        encode_batch(place, NO_ROUND, descriptors, head);
        let head = std::iter::once(&self.pages.head[..]);
        let parts: Vec<IoSlice> = head.chain(self.pages.payload()).map(IoSlice::new).collect();
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        self.writer.set_deadline(Some(Instant::now() + WRITE_WITHIN));
        let written = self.writer.write_vectored(&parts).and_then(|()| self.writer.flush());
        written.map_err(|why| format!("the demand connection to the target failed: {why}"))?;
        self.shelf.counters.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// A thread that pushes.
struct Pushing {
    shelf: Arc<Shelf>,
    link: Link,
    packer: Packer,
    page: Pages,
    stream: usize,
    began: Instant,
    queue: PushQueue,
}

impl Pushing {
    fn push(&mut self) -> Result<(), String> {
        loop {
            self.link.wait_for_room()?;
            let shelf = self.shelf.clone();
            let Some((place, run)) = shelf.next(self.stream) else { return Ok(()) };
            let (at, _) = shelf.block(place)?;
            for first in (run.first..run.end()).step_by(PUSH_PAGES_MAX as usize) {
                let some = PageRun { first, pages: PUSH_PAGES_MAX.min(run.end() - first) };
                let there = shelf.there(at, some)?;
                self.page.read(&shelf, at, some, &there)?;
                self.send(place)?;
            }
            shelf.figures.pushed.fetch_add(run.pages, Ordering::Relaxed);
        }
    }

    fn send(&mut self, place: u16) -> Result<(), String> {
        let Pages { buffer, descriptors, parts, head } = &mut self.page;
        head.clear();
        let took = match self.packer.pack(buffer, parts) {
            Some((encoding, bytes)) => {
                encode_packed_batch(place, NO_ROUND, descriptors, (encoding, bytes.len()), head);
                let saved = parts.iter().map(Range::len).sum::<usize>() - bytes.len();
                self.shelf.counters.packed_saved.fetch_add(saved as u64, Ordering::Relaxed);
                self.link.write(head, &[bytes])?
            }
            None => {
                encode_batch(place, NO_ROUND, descriptors, head);
                let parts: Vec<&[u8]> = parts.iter().map(|part| &buffer[part.clone()]).collect();
                self.link.write(head, &parts)?
            }
        };
        self.link.flush()?;
        let told = self.queue.wrote(took.0, self.began.elapsed(), || self.link.round_trip());
        if let Some(bytes) = told {
            self.link.set_queue(bytes)?;
            if self.queue.is_wide() && !self.shelf.wide.swap(true, Ordering::Relaxed) {
                self.shelf.more.notify_all();
            }
        }
        self.packer.rule.wrote(took.0, took.1);
        Ok(())
    }
}
