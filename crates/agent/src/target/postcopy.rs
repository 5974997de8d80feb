//! What the target of a post-copy does: it runs a VM whose pages are not all here, and fetches them.

use super::{Arriving, Event, process_of};
use crate::control::{self, explain};
use crate::fit;
use crate::host::Host;
use crate::incoming::Incoming;
use crate::pages::{Fetch, Fetched, Sink, merge, rounded, subtract};
use crate::recovery::go_on;
use crate::registry::{FetchRecord, FetchRegion, Vm, VmRecord, lock};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use sterna_engine::Target;
use sterna_engine::handoff::{Activity, Record};
use sterna_engine::target::{Lazily, TargetInput};
use sterna_engine::wire::Message;
use sterna_engine::wire::batch::Layout;
use sterna_engine::wire::message::{BlockDigest, Filled, Offer, StateEnd, Text};
use sterna_memory::{Attach, PAGE, PageBits, PageRun, Pager, Process, Region, populated};
use sterna_transport::Connection;
use sterna_vmm::qemu::Qemu;
use sterna_vmm::{LentFd, Vmm};

/// Which pages are here: a file beside the VM's socket, gone with it.
const BITS: &str = "pages";
/// Where the kernel makes userfaultfds for whoever is not root.
const DEVICE: &str = "/dev/userfaultfd";
/// How long a QEMU whose processors may wait for pages may take to answer, and the pause before the next try.
const ATTACH_WITHIN: Duration = Duration::from_secs(5);
const ATTACH_PAUSE: Duration = Duration::from_millis(200);

/// How long a source may be away before people are told.
const TOLD_AFTER: Duration = Duration::from_secs(10);

/// How far this migration is with post-copy.
#[derive(Default)]
pub(super) struct Lazy {
    /// Regions of the QEMU, in the installer's order, with their blocks' places.
    pub(super) regions: Vec<FetchRegion>,
    /// Got ready for a switch that may come, and not begun.
    ready: Option<Fetch>,
    pub(super) fetch: Option<Fetch>,
    /// What will be missing was dropped ahead.
    dropped: bool,
    /// Came before there was anything to ask with.
    demand: Option<Connection>,
    /// Counts the times that the connections were made anew: what is heard of older ones means nothing.
    pub(super) connections: u64,
    threads: Vec<u32>,
    runs: bool,
    /// Since when the source cannot be reached, and whether people know.
    paused: Option<Instant>,
    told: bool,
    /// Every page is here: connections that come now are of no use.
    pub(super) filled: bool,
}

impl Lazy {
    pub(super) fn plain_regions(&self) -> Vec<Region> {
        self.regions.iter().map(FetchRegion::region).collect()
    }

    /// All pages of each region.
    pub(super) fn whole_regions(&self) -> Vec<Vec<PageRun>> {
        self.regions.iter().map(|region| vec![whole(region.bytes)]).collect()
    }
}

/// All pages of a region.
fn whole(bytes: u64) -> PageRun {
    PageRun { first: 0, pages: bytes.div_ceil(PAGE) }
}

/// Where it is written which pages are here.
fn bits_of(run_dir: &std::path::Path) -> PathBuf {
    run_dir.join(BITS)
}

/// A descriptor from which a QEMU that is not root may make a userfaultfd that serves the kernel's faults too.
fn lend_device(host: &Host, qemu: &mut Qemu) -> Result<Option<LentFd>, String> {
    if host.config().qemu.user.is_none() {
        return Ok(None);
    }
    let device = File::options().read(true).write(true).open(DEVICE);
    let device = device.map_err(|why| format!("{DEVICE} cannot be opened: {why}"))?;
    qemu.lend_fd(device.as_fd()).map(Some).map_err(|why| explain(&why))
}

/// Makes the pager in a QEMU that waits.
fn attach(
    host: &Host,
    qemu: &mut Qemu,
    process: &Process,
    regions: &[FetchRegion],
    run_dir: &std::path::Path,
) -> Result<Pager, String> {
    let pages: Vec<u64> = regions.iter().map(|region| region.bytes.div_ceil(PAGE)).collect();
    let bits = PageBits::create(&bits_of(run_dir), &pages).map_err(|why| explain(&why))?;
    let lent = lend_device(host, qemu)?;
    let device_fd = lent.as_ref().map(|lent| lent.number);
    let attach = Attach { device_fd, ..host.attach() };
    let pager = Pager::attach(process, regions.iter().map(FetchRegion::region).collect(), bits, &attach);
    if let Some(lent) = lent {
        qemu.take_back_fd(lent).map_err(|why| explain(&why))?;
    }
    pager.map(|pager| pager.over_templates(&templates_of(regions))).map_err(|why| explain(&why))
}

/// The regions that map a template.
fn templates_of(regions: &[FetchRegion]) -> Vec<usize> {
    (0..regions.len()).filter(|at| regions[*at].template).collect()
}

impl Arriving<'_> {
    /// Whether this VM may run here before all of its pages have come; if that is likely, it is got ready for.
    pub(super) fn prepare_lazily(&mut self) -> Lazily {
        match self.try_lazily() {
            Ok(eager) => Lazily::Yes { eager },
            Err(why) => Lazily::No(why),
        }
    }

    fn try_lazily(&mut self) -> Result<Vec<u32>, String> {
        let sinks = self.sinks.as_ref().ok_or("nothing is ready")?;
        let qemu = self.qemu.as_mut().ok_or("no QEMU waits")?;
        let process = process_of(qemu)?;
        let mut eager = Vec::new();
        let staged = (0..).zip(&sinks.blocks).filter(|(_, sink)| matches!(sink, Sink::Staged(_)));
        eager.extend(staged.map(|(place, _)| place));
        self.lazy.regions = sinks.regions.clone();
        let regions: Vec<Region> = self.lazy.regions.iter().map(FetchRegion::region).collect();
        if let Some(why) = Pager::refusal(&process, &regions).map_err(|why| explain(&why))? {
            return Err(why);
        }
        if self.offer.postcopy && !self.offer.common {
            // What QEMU has written for itself: to drop it takes an attach, and the VM runs while this is done.
            self.get_ready(&self.lazy.whole_regions())?;
        }
        Ok(eager)
    }

    /// Makes the pager of a switch that is likely, or near, and drops what is here of these pages, region by region.
    pub(super) fn get_ready(&mut self, missing: &[Vec<PageRun>]) -> Result<(), String> {
        if self.lazy.ready.is_none() {
            let layout = self.sinks.as_ref().ok_or("nothing is ready")?.layout.clone();
            let pager = self.attach_pager()?;
            self.lazy.ready = Some(self.start_fetch(pager, layout)?);
        }
        self.lazy.ready.as_ref().map_or(Ok(()), |ready| ready.drop_ahead(missing))
    }

    /// What the source has told to be missing while its VM runs is dropped before it stops.
    pub(super) fn drop_stale(&mut self) -> Result<(), String> {
        let Some(sinks) = self.sinks.as_ref().filter(|_| !self.lazy.dropped) else { return Ok(()) };
        let told = lock(&sinks.missing).clone();
        let of = |region: &FetchRegion| {
            told.get(usize::from(region.place)).map_or_else(Vec::new, |runs| merge(runs, &[]))
        };
        let told: Vec<Vec<PageRun>> = self.lazy.regions.iter().map(of).collect();
        let all = |(region, told): (&FetchRegion, &Vec<PageRun>)| *told == [whole(region.bytes)];
        if told.iter().all(Vec::is_empty) || self.lazy.regions.iter().zip(&told).all(all) {
            // Where all is missing nothing has come, and this is the last round.
            return Ok(());
        }
        self.lazy.dropped = true;
        self.get_ready(&told)
    }

    fn attach_pager(&mut self) -> Result<Pager, String> {
        let (Some(qemu), Some(vm)) = (&mut self.qemu, &self.vm) else { return Err("no QEMU waits".into()) };
        let process = process_of(qemu)?;
        let run_dir = self.host.run_dir(&self.offer.vm);
        let pager = attach(&self.host, qemu, &process, &self.lazy.regions, &run_dir)?;
        self.lazy.threads =
            qemu.vcpu_threads().map_err(|why| explain(&why))?.into_iter().map(|id| id as u32).collect();
        let fetch = FetchRecord { remote_fd: pager.remote_fd(), regions: self.lazy.regions.clone() };
        let written = self.host.registry().update(vm, |record| record.fetch = Some(fetch));
        written.map_err(|why| format!("the VM cannot be written down: {why}"))?;
        Ok(pager)
    }

    /// A connection of post-copy.
    pub(super) fn add_demand(&mut self, connection: Connection) -> Option<TargetInput> {
        if self.lazy.filled {
            return None;
        }
        if let Some(ready) = &mut self.lazy.ready {
            return ready.demand(connection).err().and_then(|why| self.lost(why));
        }
        let Some(fetch) = &mut self.lazy.fetch else {
            self.lazy.demand = Some(connection);
            return None;
        };
        if let Err(why) = fetch.demand(connection) {
            return self.lost(why);
        }
        if self.lazy.runs {
            fetch.list();
        }
        None
    }

    pub(super) fn add_push(&mut self, index: u32, connection: Connection) -> Option<TargetInput> {
        if self.lazy.filled {
            return None;
        }
        let pushed = self.lazy.fetch.as_mut().map(|fetch| fetch.push(index, connection));
        pushed
            .unwrap_or_else(|| Err("the source pushes pages out of turn".into()))
            .err()
            .and_then(|why| self.lost(why))
    }

    /// Lets go of all connections: the source makes them anew.
    fn lost(&mut self, why: String) -> Option<TargetInput> {
        self.lazy.connections += 1;
        if self.lazy.runs && !why.is_empty() {
            tracing::warn!(
                vm = self.offer.vm,
                why,
                "the host that has missing pages is not connected any more"
            );
        }
        if let Some(fetch) = &mut self.lazy.fetch {
            fetch.disconnect(self.lazy.connections);
        }
        self.control = None;
        self.show_fetching(false);
        Some(TargetInput::Disconnected(why))
    }

    /// What becomes of the fetch, as its threads tell.
    pub(super) fn fetched(&mut self, fetched: Fetched) -> Option<TargetInput> {
        // What is only ready loses nothing, and its QEMU is watched by others.
        self.lazy.fetch.as_ref()?;
        match fetched {
            Fetched::Filled => {
                self.lazy.filled = true;
                let fetch = self.lazy.fetch.as_ref()?;
                let (sums, faults) = (fetch.sums(), Some(fetch.faults(&self.lazy.threads)));
                // Before anybody hears of it: the next migration of the VM tracks the same memory.
                self.end_fetch();
                Some(TargetInput::Filled(Filled { generation: 0, sums, faults }))
            }
            Fetched::Lost(connections, _) if connections != self.lazy.connections => None,
            Fetched::Lost(_, why) => self.lost(why),
            Fetched::Died(why) => Some(TargetInput::Died(self.explain_failure(why))),
        }
    }

    /// The control connection of a VM that runs here with pages missing is gone.
    pub(super) fn lost_control(&mut self, connections: u64, why: String) -> Option<TargetInput> {
        match &self.lazy.fetch {
            Some(_) if connections != self.lazy.connections => None,
            Some(_) => self.lost(why),
            // Nothing more is needed of it.
            None if self.lazy.filled => None,
            None => Some(TargetInput::Disconnected(why)),
        }
    }

    /// The source is back, on this connection.
    pub(super) fn reattach(&mut self, mut connection: Connection) -> Option<TargetInput> {
        if !self.lazy.runs || self.lazy.fetch.is_none() {
            let text = format!("host {} does not fetch pages of this VM now", self.host.name());
            drop(control::send(&mut connection, &Message::Abort(Text { text })));
            return None;
        }
        drop(self.lost(String::new()));
        self.attach_control(connection);
        self.show_fetching(true);
        let missing = self.lazy.fetch.as_ref().map_or(0, Fetch::remaining);
        tracing::info!(vm = self.offer.vm, missing, "the host that has missing pages is connected again");
        Some(TargetInput::Reattached(missing))
    }

    /// From here on the QEMU waits where it touches a page that is not here.
    pub(super) fn begin_fetch(
        &mut self,
        end: &StateEnd,
        layout: Layout,
        missing: &[Vec<PageRun>],
        awaits_template: bool,
    ) -> Result<(), String> {
        let mut fetch = match self.lazy.ready.take() {
            Some(ready) => ready,
            None => {
                let pager = self.attach_pager()?;
                self.start_fetch(pager, layout)?
            }
        };
        let mut missed = Vec::with_capacity(self.lazy.regions.len());
        for (at, region) in self.lazy.regions.iter().enumerate() {
            let missing = rounded(&missing[usize::from(region.place)], fetch.granule(at));
            // A template that is still to come is proved by its own digest.
            let proved = awaits_template && region.template;
            if !end.digests.is_empty() && !proved {
                self.verify_present(end, region, &missing)?;
            }
            missed.push(missing);
        }
        let of_template = if awaits_template { self.of_template(&missed)? } else { Vec::new() };
        fetch.begin(&missed, of_template)?;
        if let Some(demand) = self.lazy.demand.take() {
            fetch.demand(demand)?;
        }
        if !fetch.can_ask() {
            return Err("the source has opened no connection to ask for pages on".into());
        }
        self.lazy.fetch = Some(fetch);
        Ok(())
    }

    fn start_fetch(&self, pager: Pager, layout: Layout) -> Result<Fetch, String> {
        let blocks = layout.blocks();
        let region_of =
            |place| self.lazy.regions.iter().position(|region| usize::from(region.place) == place);
        let regions = (0..blocks).map(region_of).collect();
        let tell = self.tell.clone();
        Fetch::start(pager, layout, regions, self.offer.verify, self.lazy.connections, move |fetched| {
            drop(tell.send(Event::Fetched(fetched)));
        })
    }

    /// The VM is complete: a restarted agent is not to take it for one that is not.
    pub(super) fn need_no_fetch(&self) {
        if self.lazy.ready.is_some() {
            drop(std::fs::remove_file(bits_of(&self.host.run_dir(&self.offer.vm))));
        }
    }

    /// Proves that what is here already, and stays, is what was there.
    fn verify_present(
        &self,
        end: &StateEnd,
        region: &FetchRegion,
        missing: &[PageRun],
    ) -> Result<(), String> {
        let find = |digest: &&BlockDigest| digest.block == u32::from(region.place);
        let Some(expected) = end.digests.iter().find(find) else { return Ok(()) };
        let process = process_of(self.qemu.as_ref().ok_or("no QEMU waits")?)?;
        let mut there = Vec::new();
        populated(&process, &region.region(), &mut there).map_err(|why| explain(&why))?;
        let found = fit::sum(&process, &region.region(), region.place, &subtract(&there, missing))?;
        match found.digest == expected.digest {
            true => Ok(()),
            false => Err(format!("what was sent before of RAM block {} is not what it was", region.place)),
        }
    }

    /// The VM runs: what is missing may be pushed.
    pub(super) fn run_lazily(&mut self) {
        self.lazy.runs = true;
        let missing = self.lazy.fetch.as_ref().map_or(0, Fetch::remaining);
        tracing::info!(
            vm = self.offer.vm,
            missing,
            "the VM runs here now, and fetches the pages that are missing"
        );
        self.show_fetching(true);
        if let Some(fetch) = &mut self.lazy.fetch {
            fetch.list();
            fetch.map_templates();
        }
    }

    pub(super) fn show_fetching(&mut self, connected: bool) {
        let Some(vm) = self.vm.as_ref().filter(|_| self.lazy.fetch.is_some() && self.lazy.runs) else {
            return;
        };
        vm.set_fetching(Some(if connected { "postcopy-active" } else { "postcopy-paused" }));
        self.lazy.paused = if connected { None } else { self.lazy.paused.or_else(|| Some(Instant::now())) };
        if connected && std::mem::take(&mut self.lazy.told) {
            vm.notify(None);
        }
    }

    /// Tells people of a source that has been away for long: the VM may stand still, and nobody here can change that.
    pub(super) fn look_at_pause(&mut self) {
        let long = self.lazy.paused.is_some_and(|since| since.elapsed() > TOLD_AFTER);
        if let (true, false, Some(vm), Some(fetch)) = (long, self.lazy.told, &self.vm, &self.lazy.fetch) {
            self.lazy.told = true;
            let (pages, name) = (fetch.remaining(), vm.name());
            vm.notify(Some(format!(
                "{pages} pages of it are still at the host that it came from, which cannot be reached: it waits where it touches one, and \
                 goes on by itself once that host is back. If that host is lost for good they are too, and it cannot go on: sterna stop {name}"
            )));
        }
    }

    /// The missing pages are gone.
    pub(super) fn strand(&mut self, why: &str) {
        if self.lazy.fetch.as_ref().is_some_and(|fetch| fetch.remaining() == 0) {
            // All is here but what would prove it: without the connection that is not waited for.
            drop(self.lost(String::new()));
            return;
        }
        drop(self.lost(String::new()));
        (self.lazy.paused, self.lazy.told) = (None, true);
        if let Some(vm) = &self.vm {
            let (name, missing) = (vm.name(), self.lazy.fetch.as_ref().map_or(0, Fetch::remaining));
            tracing::error!(vm = name, missing, why, "pages of the VM are lost for good");
            vm.notify(Some(format!(
                "{missing} pages of it are lost for good ({why}): it waits where it touches one, and cannot go on: sterna stop {name}"
            )));
        }
    }

    /// Nothing of ours stays in the QEMU, whether pages were fetched or not.
    pub(super) fn end_fetch(&mut self) {
        let Some(vm) = self.vm.clone() else { return };
        let ended = match (self.lazy.fetch.take(), self.lazy.ready.take()) {
            (Some(fetch), _) => fetch.end(),
            (None, Some(ready)) => {
                let number = ready.remote_fd();
                drop(ready);
                close(&self.host, &vm, number)
            }
            (None, None) => return,
        };
        vm.set_fetching(None);
        forget(&self.host, &vm);
        if let Err(why) = ended {
            tracing::warn!(vm = vm.name(), why, "the paging of its memory did not end cleanly");
        }
    }

    /// Paging fills small pages: has the kernel make huge ones of them again, where it had before.
    pub(super) fn collapse(&self) {
        let Some(vm) = self.vm.as_ref().filter(|_| self.lazy.filled) else { return };
        if let Ok(process) = self.host.process_of(vm) {
            for region in &self.lazy.regions {
                drop(Pager::collapse(&process, &region.region()));
            }
        }
    }
}

/// Closes the copy of a pager's descriptor that a VM's QEMU has.
fn close(host: &Host, vm: &Arc<Vm>, number: i32) -> Result<(), String> {
    let process = host.process_of(vm)?;
    Pager::close(&process, &host.attach(), number).map_err(|why| explain(&why))
}

/// Nothing is fetched any more.
fn forget(host: &Host, vm: &Arc<Vm>) {
    drop(std::fs::remove_file(bits_of(&vm.record().run_dir)));
    host.registry().fetched(vm);
}

/// A VM that runs here like any other, and whose agent died before it had let go of its memory.
pub(crate) fn let_go(host: &Arc<Host>, vm: &Arc<Vm>) {
    let Some(fetch) = vm.record().fetch else { return };
    if let Err(why) = close(host, vm, fetch.remote_fd) {
        tracing::warn!(
            vm = vm.name(),
            why,
            "a userfaultfd of an earlier life of this agent is left in its QEMU"
        );
    }
    forget(host, vm);
}

/// Whether a VM that was committed to was to fetch pages: only then is it written which are here.
pub(crate) fn is_unfilled(record: &VmRecord) -> bool {
    record.fetch.is_some() && bits_of(&record.run_dir).exists()
}

/// What is known of the processors of a VM whose agent was restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Processors {
    /// They were let run.
    Run,
    /// They may not have been.
    MayStand,
}

/// Goes on with a post-copy that an earlier life of this agent was in the middle of. Its QEMU waits where it touches a page that is missing,
/// until the source is here again.
pub(crate) fn resume(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    record: &Record,
    processors: Processors,
) -> Result<(), String> {
    let fetch = vm.record().fetch.ok_or("it is not written down what is missing")?;
    let process = host.process_of(vm)?;
    let pages: Vec<u64> = fetch.regions.iter().map(|region| region.bytes.div_ceil(PAGE)).collect();
    let bits = PageBits::open(&bits_of(&vm.record().run_dir), &pages).map_err(|why| explain(&why))?;
    let regions: Vec<Region> = fetch.regions.iter().map(FetchRegion::region).collect();
    let pager = Pager::take_over(&process, regions, bits, &host.attach(), fetch.remote_fd);
    let pager = pager.map_err(|why| explain(&why))?.over_templates(&templates_of(&fetch.regions));
    let (tell, events) = mpsc::channel();
    if !host.incoming().enter(record.id, &record.peer, tell.clone()) {
        return Err("its migration goes on already".into());
    }
    host.incoming().takes_no_rounds(record.id);
    let (host, vm, record) = (host.clone(), vm.clone(), record.clone());
    std::thread::spawn(move || {
        let mut machine = Target::resume(&record, Duration::ZERO);
        let offer = Offer { vm: vm.name(), generation: record.generation.0, ..Offer::default() };
        let incoming: &Incoming = host.incoming();
        let mut arriving = Arriving::new((record.id, &record.peer), host.clone(), incoming, tell);
        arriving.offer = offer;
        arriving.vm = Some(vm.clone());
        arriving.lazy.regions = fetch.regions;
        arriving.lazy.runs = true;
        // Blocks that have no region here have no pages to come.
        let places = arriving
            .lazy
            .regions
            .iter()
            .map(|region| region.place)
            .max()
            .map_or(0, |most| usize::from(most) + 1);
        let mut bytes = vec![0; places];
        arriving.lazy.regions.iter().for_each(|region| bytes[usize::from(region.place)] = region.bytes);
        match arriving.start_fetch(pager, Layout::new(bytes)) {
            Ok(fetch) => {
                fetch.go_on();
                arriving.lazy.fetch = Some(fetch);
            }
            Err(why) => tracing::error!(vm = vm.name(), why, "its pages cannot be fetched"),
        }
        arriving.show_fetching(false);
        let activity = (processors == Processors::MayStand).then_some(record.activity);
        let attaching = attach_later(&host, &vm, activity);
        arriving.finish(&mut machine, &events, &record.peer);
        drop(attaching.join());
    });
    Ok(())
}

/// Speaks to the QEMU again once it answers: it may wait for a page itself. Makes it do what it is to do, if that is not known to have been said.
fn attach_later(host: &Arc<Host>, vm: &Arc<Vm>, activity: Option<Activity>) -> std::thread::JoinHandle<()> {
    let (host, vm) = (host.clone(), vm.clone());
    std::thread::spawn(move || {
        let record = vm.record();
        let socket = record.run_dir.join("qmp.sock");
        let began = Instant::now();
        while vm.is_alive() && vm.qemu().is_none() {
            match Qemu::attach(record.process, &socket, Some(record.log.clone()), ATTACH_WITHIN) {
                Ok(qemu) => {
                    *vm.qemu() = Some(qemu);
                    let told = activity.map(|activity| host.with_qemu(&vm, |qemu| go_on(qemu, activity)));
                    if let Some(Err(why)) = told {
                        tracing::error!(vm = record.name, why, "the VM is ours and could not be resumed");
                        vm.notify(Some(format!("it came here and could not be resumed: {why}")));
                    }
                    crate::balloon::give_back(&host, &vm);
                }
                Err(why) => {
                    tracing::warn!(vm = record.name, why = explain(&why), after = ?began.elapsed(), "its QEMU does not answer yet");
                    std::thread::sleep(ATTACH_PAUSE);
                }
            }
        }
    })
}
