//! Receivers: one thread a stream reads batches and installs them in the QEMU that waits.

use super::Ahead;
use crate::registry::FetchRegion;
use lz4_flex::block::decompress_into;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use sterna_engine::wire::WireError;
use sterna_engine::wire::batch::{
    BatchHeader, Content, DESCRIPTOR_BYTES, DESCRIPTORS_MAX, Descriptor, Encoding, FrameKind, HEADER_BYTES,
    Layout, PAYLOAD_BYTES_MAX,
};
use sterna_engine::wire::patch;
use sterna_memory::{Installer, PAGE, PageRun};
use sterna_transport::Shutdown;

/// How long a stream may be silent. The machine's own deadlines come first; this ends a thread that they forgot.
const READ_WITHIN: Duration = Duration::from_secs(180);

/// How often a stream tells that pages come.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Where the pages of a block go.
#[derive(Debug)]
pub(crate) enum Sink {
    /// Into the QEMU: the installer's region.
    Region(usize),
    /// Into a buffer: QEMU does not say where the block is before the device state is loaded, nor is there just one place for it.
    Staged(Mutex<Vec<u8>>),
    /// Nowhere: the target rebuilds this block.
    Rebuilt,
}

/// What a stream tells its migration.
#[derive(Debug)]
pub(crate) enum Received {
    /// Pages were installed.
    Pages,
    /// A round is over and all of it installed.
    RoundEnd { stream: u32, round: u32 },
    /// The stream is lost, or what came is not the protocol.
    Lost(String),
    /// A page could not be installed.
    Failed(String),
}

/// Where the pages of all receivers of a migration go.
pub(crate) trait Install: Send + Sync {
    /// The VM's blocks.
    fn layout(&self) -> &Layout;

    /// Runs of a block, and the pages of those that are bytes.
    fn install(&self, block: usize, runs: &[Descriptor], payload: &[u8]) -> Result<(), Received>;

    /// The same where only what has changed comes: places in the block with their lengths, and these bytes.
    fn patch(
        &self,
        block: usize,
        runs: &[Descriptor],
        changes: &[(u64, u64)],
        bytes: &[u8],
    ) -> Result<(), Received>;
}

/// What all receivers of rounds share.
pub(crate) struct Sinks {
    pub(crate) layout: Layout,
    pub(crate) blocks: Vec<Sink>,
    /// Held alone only while what is in common is mapped, which no page is sent before. Taken away when the last page is in its place: then
    /// nobody writes the QEMU's memory any more.
    pub(crate) installer: RwLock<Option<Installer>>,
    /// The installer's regions, with the places of their blocks in the offer.
    pub(crate) regions: Vec<FetchRegion>,
    /// Those of them of which QEMU tells only after the load whether they are where we believe.
    pub(crate) guessed: Vec<FetchRegion>,
    /// What the source says is missing, block by block, when the VM is handed over before all is here.
    pub(crate) missing: Mutex<Vec<Vec<PageRun>>>,
}

/// A receiver thread.
pub(crate) struct Receiver {
    shutdown: Shutdown,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Starts a thread that installs what arrives on a stream, from this round on; 0 is none, and stays. `nice` is how much nicer than others
    /// the thread is.
    pub(crate) fn start(
        (stream, round): (u32, u32),
        reader: impl Into<Ahead>,
        sinks: Arc<dyn Install>,
        nice: i32,
        tell: impl Fn(Received) + Send + 'static,
    ) -> std::io::Result<Self> {
        let reader = reader.into();
        let shutdown = reader.shutdown_handle();
        let mut receiving = Receiving {
            stream,
            round,
            reader,
            sinks,
            raw: vec![0; DESCRIPTORS_MAX * DESCRIPTOR_BYTES],
            runs: Vec::with_capacity(DESCRIPTORS_MAX),
            payload: vec![0; PAYLOAD_BYTES_MAX],
            unpacked: vec![0; PAYLOAD_BYTES_MAX],
            zstd: zstd::bulk::Decompressor::new()?,
            patches: Patches::default(),
        };
        let named = std::thread::Builder::new().name(format!("pages-in-{stream}"));
        let thread = named.spawn(move || {
            if nice != 0 {
                let _ = rustix::process::nice(nice);
            }
            let mut told: Option<Instant> = None;
            loop {
                match receiving.frame() {
                    // Pages only show that the stream lives.
                    Ok(Received::Pages) if told.is_some_and(|at| at.elapsed() < TELL_EVERY) => {}
                    Ok(received) => {
                        told = Some(Instant::now());
                        tell(received);
                    }
                    Err(end) => return tell(end),
                }
            }
        });
        Ok(Self { shutdown, thread: Some(thread?) })
    }

    /// Cuts the stream; what was received of it is still installed.
    pub(crate) fn cut(&self) {
        self.shutdown.shutdown();
    }
}

impl Drop for Receiver {
    /// Cuts the stream and waits for the thread: nothing writes the QEMU's memory any more.
    fn drop(&mut self) {
        self.cut();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

struct Receiving {
    stream: u32,
    round: u32,
    reader: Ahead,
    sinks: Arc<dyn Install>,
    raw: Vec<u8>,
    runs: Vec<Descriptor>,
    payload: Vec<u8>,
    unpacked: Vec<u8>,
    zstd: zstd::bulk::Decompressor<'static>,
    patches: Patches,
}

/// What changes in pages that are there already.
#[derive(Default)]
struct Patches {
    /// Where in the block and how many bytes.
    changes: Vec<(u64, u64)>,
    /// These, one after the other.
    bytes: Vec<u8>,
    /// The pages of a batch, one by one.
    pages: Vec<u64>,
}

impl Patches {
    /// Reads the patches of a batch. Nothing of one that is damaged is used.
    fn read(&mut self, runs: &[Descriptor], payload: &[u8]) -> Result<(), WireError> {
        self.changes.clear();
        self.bytes.clear();
        self.pages.clear();
        for run in runs.iter().filter(|run| run.content == Content::Bytes) {
            self.pages.extend((0..u64::from(run.pages)).map(|page| u64::from(run.first) + page));
        }
        let Self { changes, bytes, pages } = self;
        patch::decode(payload, pages.len(), |page, change| {
            changes.push((pages[page] * PAGE + change.offset as u64, change.bytes.len() as u64));
            bytes.extend_from_slice(change.bytes);
        })
    }
}

impl Receiving {
    fn frame(&mut self) -> Result<Received, Received> {
        let lost = |stream: u32| move |why: String| Received::Lost(format!("page stream {stream}: {why}"));
        let lost = lost(self.stream);
        self.reader.set_deadline(Some(Instant::now() + READ_WITHIN));
        let mut head = [0; HEADER_BYTES];
        self.reader.read_exact(&mut head).map_err(|why| lost(why.to_string()))?;
        let header = BatchHeader::decode(&head).map_err(|why| lost(why.to_string()))?;
        if header.round != self.round {
            return Err(lost(format!("the source sent round {} during round {}", header.round, self.round)));
        }
        if header.kind == FrameKind::RoundEnd {
            if self.round == 0 {
                return Err(lost("the source ended a round that never began".into()));
            }
            self.round += 1;
            return Ok(Received::RoundEnd { stream: self.stream, round: header.round });
        }
        let raw = &mut self.raw[..header.descriptors * DESCRIPTOR_BYTES];
        self.reader.read_exact(raw).map_err(|why| lost(why.to_string()))?;
        self.sinks.layout().decode_runs(&header, raw, &mut self.runs).map_err(|why| lost(why.to_string()))?;
        let payload = &mut self.payload[..header.payload_bytes];
        self.reader.read_exact(payload).map_err(|why| lost(why.to_string()))?;
        let block = usize::from(header.block);
        let pages = match header.encoding {
            Encoding::Raw => &self.payload[..header.payload_bytes],
            Encoding::Lz4 | Encoding::Zstd => {
                let bytes = self.unpack(&header).map_err(lost)?;
                &self.unpacked[..bytes]
            }
            Encoding::Delta => {
                let patches = &mut self.patches;
                patches
                    .read(&self.runs, &self.payload[..header.payload_bytes])
                    .map_err(|why| lost(why.to_string()))?;
                self.sinks.patch(block, &self.runs, &patches.changes, &patches.bytes)?;
                return Ok(Received::Pages);
            }
        };
        self.sinks.install(block, &self.runs, pages)?;
        Ok(Received::Pages)
    }

    /// Unpacks the pages of a compressed batch, which are as many bytes as its runs say.
    fn unpack(&mut self, header: &BatchHeader) -> Result<usize, String> {
        let bytes = self.runs.iter().map(|run| run.payload_bytes()).sum();
        let (packed, out) = (&self.payload[..header.payload_bytes], &mut self.unpacked[..bytes]);
        let unpacked = match header.encoding {
            Encoding::Zstd => self.zstd.decompress_to_buffer(packed, &mut *out).ok(),
            _ => decompress_into(packed, out).ok(),
        };
        match unpacked == Some(bytes) {
            true => Ok(bytes),
            false => Err("the source sent compressed pages that cannot be unpacked".into()),
        }
    }
}

/// The runs of one kind.
fn of(runs: &[Descriptor], content: Content) -> Vec<PageRun> {
    let runs = runs.iter().filter(|run| run.content == content);
    runs.map(|run| PageRun { first: run.first.into(), pages: run.pages.into() }).collect()
}

impl Install for Sinks {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn install(&self, block: usize, runs: &[Descriptor], payload: &[u8]) -> Result<(), Received> {
        self.put(block, runs, payload).map_err(Received::Failed)
    }

    /// Changes parts of pages, and drops those that are holes now.
    fn patch(
        &self,
        block: usize,
        runs: &[Descriptor],
        changes: &[(u64, u64)],
        bytes: &[u8],
    ) -> Result<(), Received> {
        let others: Vec<Descriptor> =
            runs.iter().copied().filter(|run| run.content != Content::Bytes).collect();
        self.install(block, &others, &[])?;
        let patched = self.with_installer(|installer| {
            match &self.blocks[block] {
                Sink::Region(region) => {
                    installer.patch(*region, changes, bytes).map_err(|why| why.to_string())?;
                }
                Sink::Staged(buffer) => {
                    let mut buffer = buffer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let mut bytes = bytes;
                    for &(offset, len) in changes {
                        let (now, rest) = bytes.split_at(len as usize);
                        buffer[offset as usize..][..now.len()].copy_from_slice(now);
                        bytes = rest;
                    }
                }
                Sink::Rebuilt => {}
            }
            Ok(())
        });
        patched.map_err(Received::Failed)
    }
}

impl Sinks {
    /// Takes the installer away; what the source still sends is refused.
    pub(crate) fn close(&self) -> Option<Installer> {
        self.installer.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Pages of all kinds come only as long as there is an installer.
    fn with_installer(&self, what: impl FnOnce(&Installer) -> Result<(), String>) -> Result<(), String> {
        match &*self.installer.read().unwrap_or_else(PoisonError::into_inner) {
            Some(installer) => what(installer),
            None => Err("the source sent pages after the last round".into()),
        }
    }

    fn put(&self, block: usize, runs: &[Descriptor], payload: &[u8]) -> Result<(), String> {
        self.with_installer(|installer| self.put_by(installer, block, runs, payload))
    }

    fn put_by(
        &self,
        installer: &Installer,
        block: usize,
        runs: &[Descriptor],
        payload: &[u8],
    ) -> Result<(), String> {
        let (pages, holes) = (of(runs, Content::Bytes), of(runs, Content::Discard));
        let missing = of(runs, Content::Missing);
        match &self.blocks[block] {
            Sink::Region(region) => {
                if !pages.is_empty() {
                    installer.install(*region, &pages, payload).map_err(|why| why.to_string())?;
                }
                if !holes.is_empty() {
                    installer.discard(*region, &holes).map_err(|why| why.to_string())?;
                }
                if !missing.is_empty() {
                    crate::registry::lock(&self.missing)[block].extend(missing);
                }
            }
            _ if !missing.is_empty() => {
                return Err(format!("the source does not send pages of block {block}"));
            }
            Sink::Staged(buffer) => stage(buffer, &pages, &holes, payload),
            Sink::Rebuilt => {}
        }
        Ok(())
    }
}

fn stage(buffer: &Mutex<Vec<u8>>, pages: &[PageRun], holes: &[PageRun], mut payload: &[u8]) {
    let mut buffer = buffer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let place = |run: &PageRun| (run.first * PAGE) as usize..(run.end() * PAGE) as usize;
    for run in pages {
        let (bytes, rest) = payload.split_at(run.bytes() as usize);
        buffer[place(run)].copy_from_slice(bytes);
        payload = rest;
    }
    for run in holes {
        buffer[place(run)].fill(0);
    }
}
