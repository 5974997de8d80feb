//! The target in post-copy: its QEMU runs with pages missing, and waits where it touches one.
//!
//! One thread hears of faults and asks for their pages on the demand connection; a receiver thread a connection puts in place what comes, whether it was asked for or
//! not. Connections come and go; the pager, and the file of which pages are there, stay, and with them everything that must be known.

use super::receive::{Install, Received, Receiver};
use super::{URGENT, rounded, subtract};
use crate::registry::lock;
use hdrhistogram::Histogram;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use sterna_engine::wire::batch::{Content, Descriptor, Layout};
use sterna_engine::wire::message::{BlockDigest, Faults};
use sterna_engine::wire::request::{REQUEST_BYTES, Request};
use sterna_memory::{Fault, Installed, PAGE, PageBits, PageRun, Pager, PagerError, Resolved};
use sterna_transport::{Connection, Shutdown, Writer};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// How long a look for faults lasts at most: then it is looked whether there is to be another.
const LOOK: Duration = Duration::from_millis(100);
/// How long requests may take to be written. The other end reads all the time; only a dead one lets this pass.
const WRITE_WITHIN: Duration = Duration::from_secs(5);
/// How long nothing may come while pages are missing and somebody is to send them.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Requests that are written at once while what is missing is listed: a fault must not wait for all of them.
const LISTED_AT_ONCE: usize = 512;
/// Digits of waits that are kept.
const DIGITS: u8 = 2;
/// The longest wait that is told apart from longer ones: an hour.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// What becomes of it.
#[derive(Debug)]
pub(crate) enum Fetched {
    /// Every page is there.
    Filled,
    /// A connection is lost, or carried something that is not the protocol; which generation of them it was of.
    Lost(u64, String),
    /// The QEMU has ended, or its memory cannot be filled.
    Died(String),
}

/// What all threads share.
struct Shared {
    pager: Pager,
    layout: Layout,
    /// The pager's region of each place in the offer, where pages of it are fetched.
    regions: Vec<Option<usize>>,
    /// The place of each region.
    places: Vec<u16>,
    demand: Mutex<Option<Writer>>,
    /// What was fetched, added up, where it is to be proved.
    sums: Option<Sums>,
    waits: Mutex<Waits>,
    tell: Box<dyn Fn(Fetched) + Send + Sync>,
    /// The generation of connections.
    connections: AtomicU64,
    filled: AtomicBool,
    over: AtomicBool,
    /// When something came last.
    heard: Mutex<Instant>,
    /// What of each region is a template's that was not here when it began, and whether it is still to come.
    template: OnceLock<Vec<Vec<PageRun>>>,
    awaits: AtomicBool,
    /// Pages may be put in place: what comes before waits.
    begun: OnceLock<()>,
}

/// How long the guest waited, in microseconds.
struct Waits {
    all: Histogram<u64>,
    threads: BTreeMap<u32, Duration>,
}

/// Sums of pages, and which ones they are of.
struct Sums {
    /// Those that need not be seen any more.
    seen: PageBits,
    /// How many are not in a sum and are to be.
    expected: AtomicU64,
    sums: Mutex<Vec<u128>>,
    /// False once pages may have come that were not seen here.
    whole: AtomicBool,
}

/// A fetch that goes on.
pub(crate) struct Fetch {
    shared: Arc<Shared>,
    faults: Option<JoinHandle<()>>,
    /// Maps what a clone shares with its template.
    mapper: Option<JoinHandle<()>>,
    receivers: Vec<Receiver>,
    demand: Option<Shutdown>,
}

/// The hash of a page that is part of a sum; a page that is zero has none.
pub(crate) fn summand(page: u64, content: &[u8]) -> u128 {
    xxh3_128_with_seed(content, page)
}

impl Fetch {
    /// Gets everything ready, so that little is left to do while the VM stands still. `regions` tells the pager's region of each place in the offer.
    pub(crate) fn start(
        pager: Pager,
        layout: Layout,
        regions: Vec<Option<usize>>,
        prove: bool,
        connections: u64,
        tell: impl Fn(Fetched) + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let mut places = vec![0; regions.iter().flatten().count()];
        for (place, region) in
            regions.iter().enumerate().filter_map(|(place, region)| Some((place, (*region)?)))
        {
            places[region] = place as u16;
        }
        let sums = if prove { Some(Sums::new(pager.bits().pages().collect())?) } else { None };
        let waits = Waits::new()?;
        let shared = Arc::new(Shared {
            pager,
            layout,
            regions,
            places,
            demand: Mutex::default(),
            sums,
            waits: Mutex::new(waits),
            tell: Box::new(tell),
            connections: AtomicU64::new(connections),
            filled: AtomicBool::new(false),
            over: AtomicBool::new(false),
            heard: Mutex::new(Instant::now()),
            template: OnceLock::new(),
            awaits: AtomicBool::new(false),
            begun: OnceLock::new(),
        });
        let listening = shared.clone();
        let thread = std::thread::Builder::new().name("pages-faults".into()).spawn(move || {
            let _ = rustix::process::nice(URGENT);
            listening.listen();
        });
        let faults = Some(thread.map_err(|why| format!("no thread can be started: {why}"))?);
        Ok(Self { shared, faults, mapper: None, receivers: Vec::new(), demand: None })
    }

    /// Who touches a missing page waits for it from now on. Of each region what is not `missing` is there, or will be with the template: of
    /// that only what is touched before is fetched.
    pub(crate) fn begin(
        &self,
        missing: &[Vec<PageRun>],
        of_template: Vec<Vec<PageRun>>,
    ) -> Result<(), String> {
        let pager = &self.shared.pager;
        self.shared.awaits.store(!of_template.is_empty(), Ordering::Relaxed);
        let _ = self.shared.template.set(of_template);
        let pages: Vec<u64> = pager.bits().pages().collect();
        let mut unsummed: Vec<Vec<PageRun>> = Vec::with_capacity(pages.len());
        for (region, (pages, missing)) in pages.into_iter().zip(missing).enumerate() {
            let there = subtract(&[PageRun { first: 0, pages }], missing);
            for run in subtract(&there, self.shared.of_template(region)) {
                pager.bits().set(region, run);
            }
            // Those of a template are proved by its digest.
            unsummed.push(there.into_iter().chain(self.shared.of_template(region).iter().copied()).collect());
        }
        if let Some(sums) = &self.shared.sums {
            sums.expect(unsummed);
        }
        pager.begin().map_err(|why| crate::control::explain(&why))?;
        self.go_on();
        Ok(())
    }

    /// Drops what is here of pages that will be missing, region by region, ahead of [`Fetch::begin`].
    pub(crate) fn drop_ahead(&self, missing: &[Vec<PageRun>]) -> Result<(), String> {
        let pager = &self.shared.pager;
        let missing: Vec<Vec<PageRun>> =
            (0..).zip(missing).map(|(region, runs)| rounded(runs, pager.granule(region))).collect();
        pager.drop_ahead(&missing).map_err(|why| crate::control::explain(&why))
    }

    /// The same where an earlier life of this agent had begun.
    pub(crate) fn go_on(&self) {
        *lock(&self.shared.heard) = Instant::now();
        let _ = self.shared.begun.set(());
    }

    /// The number of the pager's descriptor in the process.
    pub(crate) fn remote_fd(&self) -> i32 {
        self.shared.pager.remote_fd()
    }

    /// How many pages of a region come together.
    pub(crate) fn granule(&self, region: usize) -> u64 {
        self.shared.pager.granule(region)
    }

    /// Whether there is a connection to ask for pages on.
    pub(crate) fn can_ask(&self) -> bool {
        lock(&self.shared.demand).is_some()
    }

    /// Pages are asked for on this connection from now on, those first that are waited for.
    pub(crate) fn demand(&mut self, connection: Connection) -> Result<(), String> {
        let shutdown = connection.shutdown_handle();
        let (reader, writer) = connection.split();
        self.receive(u32::MAX, reader, URGENT)?;
        *lock(&self.shared.heard) = Instant::now();
        *lock(&self.shared.demand) = Some(writer);
        self.demand = Some(shutdown);
        let waiting = self.shared.pager.waiting();
        self.shared.ask(waiting.into_iter());
        Ok(())
    }

    /// Pages come on this connection too.
    pub(crate) fn push(&mut self, index: u32, connection: Connection) -> Result<(), String> {
        let (reader, _) = connection.split();
        self.receive(index, reader, 0)
    }

    fn receive(&mut self, index: u32, reader: sterna_transport::Reader, nice: i32) -> Result<(), String> {
        let (shared, telling) = (self.shared.clone(), self.shared.clone());
        let of = telling.connections.load(Ordering::Relaxed);
        let receiver = Receiver::start((index, 0), reader, shared, nice, move |received| match received {
            Received::Lost(why) => telling.lose(of, why),
            Received::Failed(why) => (telling.tell)(Fetched::Died(why)),
            Received::Pages | Received::RoundEnd { .. } => {}
        });
        self.receivers.push(receiver.map_err(|why| format!("no thread can be started: {why}"))?);
        Ok(())
    }

    /// Tells the source all that is missing, so that it pushes that.
    pub(crate) fn list(&self) {
        let (shared, mut requests) = (&self.shared, Vec::new());
        for (region, &block) in shared.places.iter().enumerate() {
            let mut missing = Vec::new();
            // What is to be proved comes even if the guest has given it back meanwhile.
            let proved = shared.sums.as_ref().filter(|sums| sums.is_whole()).map(|sums| &sums.seen);
            proved.unwrap_or(shared.pager.bits()).clear_runs(region, |run| missing.push(run));
            if shared.awaits.load(Ordering::Relaxed) {
                missing = subtract(&missing, shared.of_template(region));
            }
            for run in missing {
                let mut first = run.first;
                while first < run.end() {
                    let pages = u32::try_from(run.end() - first).unwrap_or(u32::MAX);
                    requests.push(Request::Missing { block, first, pages });
                    first += u64::from(pages);
                }
            }
        }
        requests.push(Request::Listed);
        for some in requests.chunks(LISTED_AT_ONCE) {
            shared.write(some.iter());
        }
        shared.look_whether_filled();
    }

    /// The template is here: what of it was not fetched is there, and who waits for it goes on.
    pub(crate) fn template_is_here(&mut self) -> Result<(), String> {
        let shared = self.shared.clone();
        if shared.awaits.swap(false, Ordering::Relaxed) {
            let settled = shared.settle_template();
            settled.map_err(|why| crate::control::explain(&why))?;
            self.map_templates();
            shared.look_whether_filled();
        }
        Ok(())
    }

    /// It will not come: its pages are missing as others are.
    pub(crate) fn template_is_lost(&self) {
        if self.shared.awaits.swap(false, Ordering::Relaxed) {
            *lock(&self.shared.heard) = Instant::now();
            if let Some(sums) = &self.shared.sums {
                // What was fetched of it was left out.
                sums.lose();
            }
            self.list();
        }
    }

    /// Begins to map what the VM shares with its template, while it runs; one that is still to come later.
    pub(crate) fn map_templates(&mut self) {
        let shared = self.shared.clone();
        if shared.awaits.load(Ordering::Relaxed) {
            return;
        }
        let named = std::thread::Builder::new().name("template-in".into());
        let mapper = named.spawn(move || match shared.pager.map_templates() {
            Ok(pages) => tracing::debug!(pages, "the template's pages are mapped"),
            Err(why) => tracing::warn!(%why, "the template's pages are mapped as they are touched"),
        });
        // Where no thread can be had each is mapped when it is touched.
        self.mapper = self.mapper.take().or(mapper.ok());
    }

    /// Lets go of the connections; whoever waits for a page waits on. Those that come next are of this generation.
    pub(crate) fn disconnect(&mut self, connections: u64) {
        self.shared.connections.store(connections, Ordering::Relaxed);
        lock(&self.shared.demand).take();
        self.demand.take().iter().for_each(Shutdown::shutdown);
        self.receivers.iter().for_each(Receiver::cut);
        self.receivers.clear();
        if let Some(sums) = &self.shared.sums {
            sums.lose();
        }
    }

    /// Pages that are missing.
    pub(crate) fn remaining(&self) -> u64 {
        self.shared.pager.remaining()
    }

    /// How long the guest has waited for pages; `processors` are its threads.
    pub(crate) fn faults(&self, processors: &[u32]) -> Faults {
        lock(&self.shared.waits).told(processors)
    }

    /// Sums of what was fetched, where they were asked for and all of it was seen.
    pub(crate) fn sums(&self) -> Vec<BlockDigest> {
        let Some(sums) = self.shared.sums.as_ref().filter(|sums| sums.is_whole()) else {
            return Vec::new();
        };
        let found = lock(&sums.sums);
        let of = |(place, sum): (&u16, &u128)| BlockDigest {
            block: u32::from(*place),
            digest: sum.to_le_bytes().to_vec(),
        };
        self.shared.places.iter().zip(found.iter()).map(of).collect()
    }

    /// Ends it, once every page is there: nothing of ours is left in the QEMU.
    pub(crate) fn end(mut self) -> Result<(), String> {
        self.stop();
        let shared = self.shared.clone();
        drop(self);
        let shared = Arc::into_inner(shared).ok_or("its threads have not ended")?;
        shared.pager.end().map_err(|why| crate::control::explain(&why))
    }

    fn stop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        let _ = self.shared.begun.set(());
        self.disconnect(u64::MAX);
        for thread in self.mapper.take().into_iter().chain(self.faults.take()) {
            drop(thread.join());
        }
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn listen(&self) {
        self.begun.wait();
        let mut faults: Vec<Fault> = Vec::new();
        while !self.over.load(Ordering::Relaxed) {
            faults.clear();
            if let Err(why) = self.pager.next(LOOK, &mut faults) {
                if !self.over.load(Ordering::Relaxed) {
                    (self.tell)(Fetched::Died(crate::control::explain(&why)));
                }
                return;
            }
            self.ask(faults.iter().map(|fault| (fault.region, fault.page)));
            self.look_whether_filled();
            self.look_whether_heard();
        }
    }

    /// A connection over which nothing comes may be one whose other end is gone without a word.
    fn look_whether_heard(&self) {
        // While a template comes, which is heard elsewhere, there may be nothing to say here.
        let expects = !self.is_filled() && !self.awaits.load(Ordering::Relaxed);
        let silent = expects && lock(&self.heard).elapsed() > SILENCE_MAX;
        if silent && let Some(writer) = lock(&self.demand).take() {
            let of = self.connections.load(Ordering::Relaxed);
            writer.shutdown_handle().shutdown();
            self.lose(of, "nothing comes from the source, though pages are to come".into());
        }
    }

    fn ask(&self, pages: impl Iterator<Item = (usize, u64)>) {
        let request = |(region, first): (usize, u64)| Request::Fault {
            block: self.places[region],
            first,
            pages: self.pager.granule(region) as u32,
        };
        let requests: Vec<Request> = pages.map(request).collect();
        if !requests.is_empty() {
            self.write(requests.iter());
        }
    }

    fn write<'a>(&self, requests: impl Iterator<Item = &'a Request>) {
        let mut frame = Vec::with_capacity(REQUEST_BYTES);
        requests.for_each(|request| request.encode(&mut frame));
        let mut demand = lock(&self.demand);
        let Some(writer) = demand.as_mut() else { return };
        writer.set_deadline(Some(Instant::now() + WRITE_WITHIN));
        if let Err(why) = writer.write_all(&frame).and_then(|()| writer.flush()) {
            *demand = None;
            drop(demand);
            let of = self.connections.load(Ordering::Relaxed);
            self.lose(of, format!("the demand connection to the source is lost: {why}"));
        }
    }

    fn lose(&self, of: u64, why: String) {
        if !self.over.load(Ordering::Relaxed) {
            (self.tell)(Fetched::Lost(of, why));
        }
    }

    fn look_whether_filled(&self) {
        if self.is_filled() && !self.filled.swap(true, Ordering::Relaxed) {
            (self.tell)(Fetched::Filled);
        }
    }

    /// Whether nothing more is needed: no page, nor one that the guest has given back since and that is to be proved all the same.
    fn is_filled(&self) -> bool {
        self.pager.remaining() == 0 && self.sums.as_ref().is_none_or(Sums::is_complete)
    }

    fn of_template(&self, region: usize) -> &[PageRun] {
        self.template.get().and_then(|of| of.get(region)).map_or(&[], Vec::as_slice)
    }

    fn settle_template(&self) -> Result<(), PagerError> {
        self.begun.wait();
        *lock(&self.heard) = Instant::now();
        for region in 0..self.places.len() {
            for run in self.of_template(region) {
                self.note(&self.pager.settle_template(region, *run)?);
            }
        }
        Ok(())
    }

    fn note(&self, installed: &Installed) {
        if installed.resolved.is_empty() {
            return;
        }
        let mut waits = lock(&self.waits);
        installed.resolved.iter().for_each(|resolved| waits.add(resolved));
    }

    fn place(&self, region: usize, runs: &[Descriptor], mut payload: &[u8]) -> Result<(), PagerError> {
        self.begun.wait();
        for run in runs.iter().filter(|_| !self.over.load(Ordering::Relaxed)) {
            let (first, pages) = (u64::from(run.first), u64::from(run.pages));
            let installed = match run.content {
                Content::Bytes => {
                    let (bytes, rest) = payload.split_at((pages * PAGE) as usize);
                    payload = rest;
                    if let Some(sums) = &self.sums {
                        sums.add(region, first, bytes);
                    }
                    self.pager.install(region, first, bytes)?
                }
                Content::Discard => {
                    let run = PageRun { first, pages };
                    self.sums.iter().for_each(|sums| sums.add_zeros(region, run));
                    self.pager.settle_zero(region, run)?
                }
                // Only before the hand-off is anything told to be missing.
                Content::Missing => continue,
            };
            self.note(&installed);
        }
        Ok(())
    }
}

impl Waits {
    fn new() -> Result<Self, String> {
        let all = Histogram::new_with_max(micros(WAIT_MAX), DIGITS);
        let all = all.map_err(|why| format!("no histogram can be made: {why}"))?;
        Ok(Self { all, threads: BTreeMap::new() })
    }

    fn add(&mut self, resolved: &Resolved) {
        self.all.saturating_record(micros(resolved.waited));
        *self.threads.entry(resolved.thread).or_default() += resolved.waited;
    }

    fn told(&self, processors: &[u32]) -> Faults {
        let blocked = |thread: &u32| self.threads.get(thread).copied().map_or(0, micros);
        Faults {
            count: self.all.len(),
            mean_us: self.all.mean() as u64,
            p50_us: self.all.value_at_quantile(0.5),
            p99_us: self.all.value_at_quantile(0.99),
            max_us: self.all.max(),
            vcpu_blocked_us: processors.iter().map(blocked).collect(),
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Install for Shared {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn install(&self, block: usize, runs: &[Descriptor], payload: &[u8]) -> Result<(), Received> {
        let region = self.regions.get(block).copied().flatten();
        let region = region.ok_or_else(|| {
            Received::Lost(format!("the source sent pages of block {block}, which is complete"))
        })?;
        *lock(&self.heard) = Instant::now();
        self.place(region, runs, payload).map_err(|why| Received::Failed(crate::control::explain(&why)))?;
        self.look_whether_filled();
        Ok(())
    }

    fn patch(&self, _: usize, _: &[Descriptor], _: &[(u64, u64)], _: &[u8]) -> Result<(), Received> {
        Err(Received::Lost("the source sent what has changed of pages that are not here".into()))
    }
}

impl Sums {
    /// Not whole before it is told what will come.
    fn new(pages: Vec<u64>) -> Result<Self, String> {
        let seen = PageBits::unnamed(&pages).map_err(|why| format!("no memory for what is proved: {why}"))?;
        let (sums, whole) = (Mutex::new(vec![0; pages.len()]), AtomicBool::new(false));
        Ok(Self { seen, expected: AtomicU64::new(0), sums, whole })
    }

    /// Pages come, of each region all but these.
    fn expect(&self, there: impl IntoIterator<Item = Vec<PageRun>>) {
        for (region, runs) in there.into_iter().enumerate() {
            for run in runs {
                self.seen.set(region, run);
            }
        }
        self.expected.store(self.seen.clear_count(), Ordering::Relaxed);
        self.whole.store(true, Ordering::Relaxed);
    }

    /// Pages may come, or have come, that are not seen here.
    fn lose(&self) {
        self.whole.store(false, Ordering::Relaxed);
    }

    fn is_whole(&self) -> bool {
        self.whole.load(Ordering::Relaxed)
    }

    /// Whether nothing is to come that can be proved.
    fn is_complete(&self) -> bool {
        !self.is_whole() || self.expected.load(Ordering::Acquire) == 0
    }

    /// Adds pages, each the first time that it comes.
    fn add(&self, region: usize, first: u64, bytes: &[u8]) {
        let (mut sum, mut new) = (0u128, 0);
        for (page, content) in (first..).zip(bytes.chunks_exact(PAGE as usize)) {
            if self.seen.set(region, PageRun { first: page, pages: 1 }) > 0 {
                sum = sum.wrapping_add(summand(page, content));
                new += 1;
            }
        }
        let mut sums = lock(&self.sums);
        sums[region] = sums[region].wrapping_add(sum);
        drop(sums);
        self.expected.fetch_sub(new, Ordering::Release);
    }

    /// Pages that are zero add nothing.
    fn add_zeros(&self, region: usize, run: PageRun) {
        self.expected.fetch_sub(self.seen.set(region, run), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_proved_is_each_page_once_and_not_before_all_have_come() {
        let sums = Sums::new(vec![100, 10]).unwrap();
        assert!(!sums.is_whole() && sums.is_complete(), "nobody has said yet what will come");
        // Pages 20 to 29 of the first region, and one of the second.
        sums.expect(
            [&[(0, 20), (30, 70)][..], &[(0, 9)]].map(|there| {
                there.iter().map(|&(first, pages)| PageRun { first, pages }).collect::<Vec<_>>()
            }),
        );
        assert!(sums.is_whole() && !sums.is_complete());
        let bytes: Vec<u8> = (0..4 * PAGE).map(|byte| (byte / PAGE) as u8 + 1).collect();
        let page = |at: usize| summand(20 + at as u64, &bytes[at * PAGE as usize..][..PAGE as usize]);
        sums.add(0, 20, &bytes);
        sums.add(0, 20, &bytes);
        assert_eq!(lock(&sums.sums)[0], (0..4).map(page).fold(0, u128::wrapping_add));
        sums.add_zeros(0, PageRun { first: 22, pages: 8 });
        assert!(!sums.is_complete(), "the other region's page has not come");
        sums.add_zeros(1, PageRun { first: 9, pages: 1 });
        assert!(sums.is_complete());
        assert_eq!(lock(&sums.sums)[1], 0);
        let lost = Sums::new(vec![1]).unwrap();
        lost.expect([Vec::new()]);
        assert!(!lost.is_complete());
        lost.lose();
        assert!(lost.is_complete(), "what cannot be proved is not waited for");
    }

    #[test]
    fn waits_of_all_lengths_are_told_as_they_were() {
        let mut waits = Waits::new().unwrap_or_else(|why| panic!("{why}"));
        for ms in 1..=1000 {
            waits.add(&Resolved { thread: 7 + ms % 2, waited: Duration::from_millis(ms.into()) });
        }
        waits.add(&Resolved { thread: 9, waited: WAIT_MAX * 2 });
        let told = waits.told(&[7, 8, 6]);
        assert_eq!(told.count, 1001);
        for (found, ms) in [(told.p50_us, 500), (told.p99_us, 990)] {
            assert!((ms * 1000..ms * 1020).contains(&found), "{found} for {ms} ms");
        }
        assert!(told.max_us >= micros(WAIT_MAX), "{}", told.max_us);
        assert_eq!(told.vcpu_blocked_us, [250_500_000, 250_000_000, 0]);
    }
}
