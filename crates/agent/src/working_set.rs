//! Measures what a VM writes, without a migration: a thread that arms all memory, waits, looks, and begins anew.
//!
//! It touches the VM as a migration's first rounds do, by the same [`Collector`], and leaves nothing behind: the tracking ends with
//! the thread, and should the agent die, with its last descriptor. The measurement ends early when nobody listens any more, and
//! when a migration of the VM begins: a host that is being emptied must not wait for a measurement, which can be done again.

mod slot;
mod view;

pub(crate) use slot::Slot;

use crate::AgentError;
use crate::agent::DOWNTIME_LIMIT_MS_MAX;
use crate::control::explain;
use crate::host::Host;
use crate::model::{IntervalView, WorkingSetEvent, WorkingSetRequest};
use crate::offer::source_blocks;
use crate::pages::{Collector, SendSet, SourceBlock, Writers};
use crate::registry::Vm;
use slot::Place;
use std::sync::Arc;
use std::time::{Duration, Instant};
use sterna_engine::policy::{Glimpse, INTERVALS_MAX, Pace, Run, WorkingSet, cost_share};
use sterna_engine::units::Pages;
use sterna_memory::{PAGE, Process, Reader, Span, is_zero};
use sterna_vmm::{Layout, Vmm};
use tokio::sync::mpsc;

/// Shorter intervals are mostly scans.
const INTERVAL_MS_MIN: u64 = 100;
/// An interval that is asked for; longer ones tell little that the growth does not.
const INTERVAL_MS_MAX: u64 = 60_000;
/// Longest measurement: a day and a night show all that a guest does.
const DURATION_MS_MAX: u64 = 86_400_000;
/// Links for which migrations are predicted at once: more would not be read.
const BANDWIDTHS_MAX: usize = 16;
/// An interval is stretched up to this part of the measurement, so that there are some.
const LONGEST_PART: u32 = 4;
/// How soon the end of a measurement is noticed: a migration may wait for it.
const TICK: Duration = Duration::from_millis(10);
/// Events that wait for a client that does not keep up; intervals beyond are left to the result.
const EVENTS_WAITING_MAX: usize = 64;
/// How often an interval as asked for is looked at before its end, each time after twice as long; a stretched one more often. A look
/// arms nothing and costs the guest nothing.
const GLIMPSES: usize = 6;
/// The same for the longest interval beside the shortest that can be asked for.
const GLIMPSES_MAX: usize = GLIMPSES + (INTERVAL_MS_MAX / INTERVAL_MS_MIN).ilog2() as usize + 1;
/// A look this soon after the begin would measure the scan that began it.
const GLIMPSE_AFTER_MIN: Duration = Duration::from_millis(5);
/// A look is left out where scans take longer than this part of the time until it.
const GLIMPSE_SCAN_PART: u32 = 10;
/// Pages that are read to learn how many are zero: 4 MiB, in one system call.
const SAMPLE_PAGES: u64 = 1024;

/// How a measurement ended.
enum Ending {
    Completed,
    /// A migration of the VM began.
    GaveWay,
    /// Nobody listens.
    Unheard,
    Failed(String),
}

/// Begins to measure `vm`. Whatever can be said against it is said at once; the receiver gets an event for each interval and then
/// the result. Dropping it ends the measurement.
pub(crate) fn start(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    request: WorkingSetRequest,
) -> Result<mpsc::Receiver<WorkingSetEvent>, AgentError> {
    check(&request)?;
    let (name, here) = (vm.name(), host.name().to_owned());
    if !vm.is_alive() {
        return Err(AgentError::Conflict(format!(
            "VM {name} does not run at host {here}: its QEMU has ended; see its log"
        )));
    }
    if vm.record().incoming || vm.is_released() || vm.doubtful().is_some() {
        return Err(AgentError::Conflict(format!(
            "VM {name} cannot be measured at host {here}: it is not known to run here (sterna ps)"
        )));
    }
    let place = Place::take(vm, &here)?;
    let failed =
        |why: String| AgentError::Failed(format!("VM {name} at host {here} cannot be measured: {why}"));
    let layout = host.with_qemu(vm, |qemu| qemu.layout()).map_err(failed)?;
    let blocks = source_blocks(host, vm, &layout, Writers::Processors).map_err(failed)?;
    let process = host.process_of(vm).map_err(failed)?;
    let (events, receiver) = mpsc::channel(EVENTS_WAITING_MAX);
    let measuring =
        Measuring::arm(place, process, Arc::new(blocks), host, &layout, request, events).map_err(failed)?;
    tracing::info!(vm = name, "its working set is measured");
    std::thread::spawn(move || measuring.run());
    Ok(receiver)
}

fn check(request: &WorkingSetRequest) -> Result<(), AgentError> {
    let WorkingSetRequest { interval, duration, max_cost, bandwidths, downtime_limit, timeout } = request;
    let invalid = |text: String| Err(AgentError::Invalid(text));
    if !(INTERVAL_MS_MIN..=INTERVAL_MS_MAX).contains(interval) {
        return invalid(format!("interval is {INTERVAL_MS_MIN} to {INTERVAL_MS_MAX} ms"));
    }
    if !(*interval..=DURATION_MS_MAX).contains(duration) {
        return invalid(format!(
            "duration is at least the interval, {interval} ms, and at most {DURATION_MS_MAX} ms"
        ));
    }
    if duration / interval > INTERVALS_MAX.into() {
        return invalid(format!(
            "{duration} ms in intervals of {interval} ms are more than {INTERVALS_MAX} intervals: make the interval longer or the \
             duration shorter"
        ));
    }
    if !(0.1..=100.0).contains(max_cost) {
        return invalid("max-cost is 0.1 to 100 percent of a processor".into());
    }
    if !(1..=BANDWIDTHS_MAX).contains(&bandwidths.len()) || bandwidths.contains(&0) {
        return invalid(format!("bandwidths are 1 to {BANDWIDTHS_MAX} numbers of bytes per second above 0"));
    }
    if *downtime_limit > DOWNTIME_LIMIT_MS_MAX {
        return invalid(format!("downtime-limit is at most {DOWNTIME_LIMIT_MS_MAX} ms"));
    }
    if timeout.is_some_and(|seconds| !(seconds.is_finite() && (0.0..1e9).contains(&seconds))) {
        return invalid("timeout is a number of seconds".into());
    }
    Ok(())
}

/// The thread's own. The tracking is dropped before the place that keeps others from tracking.
struct Measuring {
    collector: Collector,
    place: Place,
    host: String,
    /// Names of the blocks, in the order of the collector's.
    blocks: Vec<String>,
    request: WorkingSetRequest,
    events: mpsc::Sender<WorkingSetEvent>,
    began: jiff::Timestamp,
    start: Instant,
    /// When the interval that goes on began: its pages are armed since.
    armed: Instant,
    scan_time: Duration,
    pace: Pace,
    set: WorkingSet,
    intervals: Vec<IntervalView>,
    populated: Pages,
    zero: Pages,
}

impl Measuring {
    fn arm(
        place: Place,
        process: Process,
        blocks: Arc<Vec<SourceBlock>>,
        host: &Host,
        layout: &Layout,
        request: WorkingSetRequest,
        events: mpsc::Sender<WorkingSetEvent>,
    ) -> Result<Self, String> {
        let ms = Duration::from_millis;
        let longest = ms(request.duration / u64::from(LONGEST_PART)).min(ms(INTERVAL_MS_MAX));
        let pace = Pace::new(ms(request.interval), longest, request.max_cost / 100.0);
        let set = WorkingSet::new(blocks.iter().map(|block| Pages(block.region.pages())));
        let name = |block: &SourceBlock| layout.blocks[usize::from(block.index)].name.clone();
        let names = blocks.iter().map(name).collect();
        let reader = Reader::new(&process).map_err(|why| explain(&why))?;
        let mut collector = Collector::arm(process, blocks.clone(), &host.attach(), Writers::Processors)?;
        let armed = Instant::now();
        collector.begin()?;
        let populated = Pages(collector.page_count());
        let zero = zero_pages(&reader, &blocks, &collector.take(), populated)?;
        let (host, began) = (host.name().to_owned(), jiff::Timestamp::now());
        Ok(Self {
            collector,
            place,
            host,
            blocks: names,
            request,
            events,
            began,
            start: armed,
            armed,
            scan_time: armed.elapsed(),
            pace,
            set,
            intervals: Vec::new(),
            populated,
            zero,
        })
    }

    fn run(mut self) {
        let ending = self.measure();
        let result = (!matches!(ending, Ending::Unheard)).then(|| self.view(&ending));
        let Self { collector, place, events, .. } = self;
        // Of a QEMU that has ended nothing is left to restore.
        if !matches!(ending, Ending::Failed(_))
            && let Err(why) = collector.stop()
        {
            tracing::warn!(vm = place.vm(), why, "tracking did not end cleanly");
        }
        tracing::info!(vm = place.vm(), "its working set is no longer measured");
        drop(place);
        if let Some(view) = result {
            // Whoever went away meanwhile needs no result.
            drop(events.blocking_send(WorkingSetEvent::End(Box::new(view))));
        }
    }

    fn measure(&mut self) -> Ending {
        let end = self.start + Duration::from_millis(self.request.duration);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let interval = self.pace.interval();
            // A short last one would cost the guest more than the others.
            if self.set.is_full() || self.set.intervals() > 0 && left < interval * 3 / 4 {
                return Ending::Completed;
            }
            let ends = self.armed + if self.set.intervals() > 0 { interval.min(left) } else { interval };
            match self.interval(ends) {
                Ok(()) => {}
                // A migration is told of as soon as it has something to tell.
                Err(Ending::GaveWay) if self.set.intervals() == 0 => {
                    return self.look(&[]).map_or_else(Ending::Failed, |()| Ending::GaveWay);
                }
                Err(ending) => return ending,
            }
        }
    }

    fn interval(&mut self, ends: Instant) -> Result<(), Ending> {
        let mut glimpses = Vec::new();
        for slot in 0..GLIMPSES_MAX {
            let after = Duration::from_millis(self.request.interval) * (1 << slot) / (1 << GLIMPSES);
            if self.armed + after >= ends {
                break;
            }
            if after < GLIMPSE_AFTER_MIN.max(self.scan_time * GLIMPSE_SCAN_PART) {
                continue;
            }
            self.wait(self.armed + after)?;
            let before = self.armed.elapsed();
            let pages = Pages(self.collector.peek().map_err(Ending::Failed)?);
            // The scan itself takes a moment, and sees each page in another part of it.
            glimpses.push(Glimpse { slot, after: (before + self.armed.elapsed()) / 2, pages });
        }
        self.wait(ends)?;
        self.look(&glimpses).map_err(Ending::Failed)
    }

    /// Ends the interval, and begins the next one.
    fn look(&mut self, glimpses: &[Glimpse]) -> Result<(), String> {
        let began = Instant::now();
        self.collector.scan()?;
        let armed = Instant::now();
        self.scan_time = armed - began;
        let length = armed - self.armed;
        self.armed = armed;
        let found = self.collector.take();
        let runs = found.pages.iter().enumerate().flat_map(|(block, runs)| {
            runs.iter().map(move |run| Run { block, first: run.first, pages: run.pages })
        });
        let pages = self.set.add(length, runs, glimpses);
        let stretched = self.pace.interval() > Duration::from_millis(self.request.interval);
        self.pace.next(pages);
        let interval = IntervalView {
            at: view::ms(self.set.elapsed()),
            length: view::ms(length),
            pages: pages.0,
            unique_pages: self.set.unique().0,
            cost: view::percent(cost_share(pages, length)),
            stretched,
        };
        self.intervals.push(interval.clone());
        // The result has those that a slow client misses.
        drop(self.events.try_send(WorkingSetEvent::Interval(interval)));
        Ok(())
    }

    /// Waits until `when`, unless the measurement is to end before.
    fn wait(&self, when: Instant) -> Result<(), Ending> {
        loop {
            if self.events.is_closed() {
                return Err(Ending::Unheard);
            }
            if self.place.must_end() {
                return Err(Ending::GaveWay);
            }
            let left = when.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(TICK));
        }
    }
}

/// How many of the populated pages are all zero, by a sample that is spread over them.
fn zero_pages(
    reader: &Reader,
    blocks: &[SourceBlock],
    set: &SendSet,
    populated: Pages,
) -> Result<Pages, String> {
    let step = populated.0.div_ceil(SAMPLE_PAGES).max(1);
    let (mut spans, mut at) = (Vec::new(), 0);
    for (block, runs) in blocks.iter().zip(&set.pages) {
        for run in runs {
            let inside = (at..at + run.pages).filter(|page| page.is_multiple_of(step));
            let addr = |page: u64| block.region.base + (run.first + page - at) * PAGE;
            spans.extend(inside.map(|page| Span { addr: addr(page), len: PAGE }));
            at += run.pages;
        }
    }
    let mut bytes = vec![0; spans.len() * PAGE as usize];
    reader.read(&spans, &mut bytes).map_err(|why| explain(&why))?;
    let zero = bytes.chunks_exact(PAGE as usize).filter(|page| is_zero(page)).count() as u64;
    Ok(Pages(populated.0 * zero / (spans.len() as u64).max(1)))
}
