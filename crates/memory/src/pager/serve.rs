//! Serving: faults and discards are read here, and pages put in place.

use std::io;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Fault, Installed, Pager, PagerError, Plan, Resolved};
use crate::backing::Kind;
use crate::page::{PAGE, PageRun, Span, difference, intersection};
use crate::sys::uffd::{Event, Progress};

/// Pages put in place while the gate is held: 64 KiB, some 10 us, for so long a fault may have to wait to be read.
const PAGES_PER_HOLD: u64 = 16;

/// How long a discard may keep pages from being put in place: its thread only has to be told, and to run.
const DISCARD_WAIT: Duration = Duration::from_secs(5);

/// Looks at a discard that is under way without sleeping between them; then the pause between later looks.
const QUICK_LOOKS: u32 = 20;
const LOOK_PAUSE: Duration = Duration::from_micros(50);

/// How soon zeros that a discard has kept from being put in place are tried again.
const ZEROS_PAUSE: Duration = Duration::from_millis(1);

/// What is put in place.
#[derive(Clone, Copy)]
pub(super) enum Content<'a> {
    Bytes(&'a [u8]),
    Zeros,
}

/// Why putting in place has stopped.
enum Stop {
    /// All was done.
    Done,
    /// A discard is going on: let go, and look again.
    Discard,
}

impl Pager {
    /// Waits for faults on pages that were not delivered, at most so long, and puts them into `faults` instead of what was there.
    ///
    /// Faults on pages that were delivered are resolved here (they were discarded since), and pages that the process discards
    /// count as delivered from then on. One thread must call this all the time, or discards hang.
    ///
    /// # Errors
    /// [`PagerError::Gone`] when the process has ended.
    pub fn next(&self, timeout: Duration, faults: &mut Vec<Fault>) -> Result<(), PagerError> {
        faults.clear();
        let until = Instant::now() + timeout;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let owes = !self.lock().zeros.is_empty();
            if self.wait(if owes { left.min(ZEROS_PAUSE) } else { left })? {
                self.take_events(faults)?;
            }
            self.put_zeros()?;
            if !faults.is_empty() || Instant::now() >= until {
                return Ok(());
            }
        }
    }

    /// Puts pages in place, from page `first` of a region on, and lets those go on that wait for them. Pages that were delivered
    /// already are skipped. Several threads may do so at once, also with the same pages. Of a huge page of hugetlbfs nothing is there before
    /// all of it has been given.
    ///
    /// # Errors
    /// [`PagerError::Gone`] when the process has ended; [`PagerError::Stuck`] if nobody calls [`Pager::next`];
    /// [`PagerError::Scattered`] if pieces of too many huge pages are given.
    pub fn install(&self, region: usize, first: u64, bytes: &[u8]) -> Result<Installed, PagerError> {
        if !bytes.len().is_multiple_of(PAGE as usize) {
            return Err(PagerError::Length { bytes: bytes.len() });
        }
        let mut done = Installed::default();
        if !bytes.is_empty() {
            let run = PageRun { first, pages: bytes.len() as u64 / PAGE };
            self.checked(region, run)?;
            self.fill(region, run, Content::Bytes(bytes), &mut done)?;
        }
        Ok(done)
    }

    /// These pages are zero at the source: nothing is put in place but where somebody waits. What is touched later becomes zero
    /// by itself.
    ///
    /// # Errors
    /// As [`Pager::install`].
    pub fn settle_zero(&self, region: usize, run: PageRun) -> Result<Installed, PagerError> {
        let plan = self.checked(region, run)?;
        let (mut done, mut covered) = (Installed::default(), Vec::new());
        if let Some(huge) = &plan.huge {
            self.assemble(region, huge, run, Content::Zeros, &mut done)?;
            return Ok(done);
        }
        // When the pager ends, the file's page would be seen.
        plan.parts_of(run).iter().for_each(|part| intersection(&part.covers, &[run], &mut covered));
        for run in covered {
            self.fill(region, run, Content::Zeros, &mut done)?;
        }
        self.settle(region, run, &mut done)?;
        done.duplicates = run.pages - done.pages;
        Ok(done)
    }

    /// The template's pages of a run are in its file by now: what of the run was not given is the template's, and who waits there goes on.
    ///
    /// # Errors
    /// As [`Pager::install`].
    pub fn settle_template(&self, region: usize, run: PageRun) -> Result<Installed, PagerError> {
        self.checked(region, run)?;
        let mut done = Installed::default();
        self.settle(region, run, &mut done)?;
        Ok(done)
    }

    /// Nothing will come for a run: who waits there gets zeros, as will who comes later.
    pub(super) fn settle(&self, region: usize, run: PageRun, done: &mut Installed) -> Result<(), PagerError> {
        let shared = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        done.pages += self.bits.set(region, run);
        let waited: Vec<u64> = self.resolve(region, run, &mut done.resolved);
        drop(shared);
        for page in waited {
            let (since, mut looks) = (Instant::now(), 0);
            while !self.zero(region, page)? {
                self.pause(since, &mut looks, self.regions[region].address(page))?;
            }
        }
        Ok(())
    }

    /// Reads what has happened. Nobody puts anything in place between the reading of a discard and the setting of its bits.
    pub(super) fn take_events(&self, faults: &mut Vec<Fault>) -> Result<(), PagerError> {
        let mut events = Vec::new();
        let alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let read = self.uffd.read(&mut events);
        for event in &events {
            if let Event::Remove(span) = event {
                self.discarded(*span);
            }
        }
        for event in &events {
            if let Event::Fault { addr, thread } = *event {
                self.faulted(addr, thread, faults);
            }
        }
        drop(alone);
        read.map_err(|source| PagerError::Events { pid: self.process.pid(), source })
    }

    /// A discard is about to happen: what it takes is settled, and who waits there gets zeros.
    fn discarded(&self, span: Span) {
        for (region, plan) in self.regions.iter().enumerate() {
            let (start, end) = (span.addr.max(plan.region.base), span.end().min(plan.region.end()));
            if start < end {
                let run = plan.region.run(start, end);
                self.bits.set(region, run);
                plan.huge.iter().for_each(|huge| huge.forget(run));
                let pages = self.resolve(region, run, &mut Vec::new());
                self.lock().zeros.extend(pages.into_iter().map(|page| (region, page)));
            }
        }
    }

    fn faulted(&self, addr: u64, thread: u32, faults: &mut Vec<Fault>) {
        let holds = |plan: &Plan| plan.region.base <= addr && addr < plan.region.end();
        let Some(region) = self.regions.iter().position(holds) else { return };
        let plan = &self.regions[region];
        let page = (addr - plan.region.base) / PAGE / plan.granule() * plan.granule();
        let mut waiting = self.lock();
        if self.bits.get(region, page) {
            waiting.zeros.insert((region, page));
        } else {
            waiting.faults.entry((region, page, thread)).or_insert_with(Instant::now);
            faults.push(Fault { region, page, thread });
        }
    }

    /// Puts zeros where delivered pages are missed; what a discard keeps from it stays for later.
    fn put_zeros(&self) -> Result<(), PagerError> {
        let zeros = std::mem::take(&mut self.lock().zeros);
        for (region, page) in zeros {
            if !self.zero(region, page)? {
                self.lock().zeros.insert((region, page));
            }
        }
        Ok(())
    }

    /// Makes a delivered page zero if nothing is there, or the template's where it has one, and lets those go on that wait; false while a discard is going on.
    fn zero(&self, region: usize, page: u64) -> Result<bool, PagerError> {
        let plan = &self.regions[region];
        let (addr, len) = (plan.address(page), plan.granule() * PAGE);
        let span = Span { addr, len };
        let below = plan.parts_of(PageRun { first: page, pages: 1 }).first().is_some_and(|part| part.below);
        if below && self.uffd.map_existing(span).bytes > 0 {
            return Ok(true);
        }
        let zeroed = match &plan.huge {
            None => self.uffd.zero(span),
            Some(_) => self.uffd.copy(addr, &vec![0; len as usize]),
        };
        match zeroed.stopped {
            None => Ok(true),
            Some(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Some(e) if e.kind() == io::ErrorKind::AlreadyExists => self.wake(span).map(|()| true),
            Some(e) => Err(self.failed(addr, e)),
        }
    }

    /// Maps what templates have of pages that are not missing, for whoever touches one later would wait for it, if only a little. How many
    /// pages were mapped by this.
    ///
    /// # Errors
    /// [`PagerError::Gone`] when the process has ended.
    pub fn map_templates(&self) -> Result<u64, PagerError> {
        let mut mapped = 0;
        for (region, plan) in self.regions.iter().enumerate() {
            let mut missing = Vec::new();
            self.bits.clear_runs(region, |run| missing.push(run));
            // What is in common maps itself, as any file does, but where pages of it were missing.
            let below = plan.parts.iter().filter(|part| part.below && part.segment.kind != Kind::Common);
            let covered = below.flat_map(|part| &part.covers);
            let (covered, mut runs): (Vec<PageRun>, _) = (covered.copied().collect(), Vec::new());
            difference(&covered, &missing, &mut runs);
            for span in runs.into_iter().map(|run| plan.region.span(run)) {
                let mut at = span.addr;
                while at < span.end() {
                    let progress = self.uffd.map_existing(Span { addr: at, len: span.end() - at });
                    mapped += progress.bytes / PAGE;
                    // A page that is mapped already, or that the file does not have, stops it there.
                    at += if progress.bytes == 0 { PAGE } else { progress.bytes };
                }
                self.check_alive()?;
            }
        }
        Ok(mapped)
    }

    /// Puts all of a run in place that was not delivered, a few pages at a time.
    fn fill(
        &self,
        region: usize,
        run: PageRun,
        content: Content<'_>,
        done: &mut Installed,
    ) -> Result<(), PagerError> {
        let plan = &self.regions[region];
        if let Some(huge) = &plan.huge {
            return self.assemble(region, huge, run, content, done);
        }
        for first in (run.first..run.end()).step_by(PAGES_PER_HOLD as usize) {
            let chunk = PageRun { first, pages: PAGES_PER_HOLD.min(run.end() - first) };
            let content = content.from(first - run.first, chunk.pages);
            let before = done.pages;
            let (since, mut looks) = (Instant::now(), 0);
            while let Stop::Discard = self.fill_some(region, chunk, content, done)? {
                self.pause(since, &mut looks, plan.address(first))?;
            }
            done.duplicates += chunk.pages - (done.pages - before);
        }
        Ok(())
    }

    fn fill_some(
        &self,
        region: usize,
        chunk: PageRun,
        content: Content<'_>,
        done: &mut Installed,
    ) -> Result<Stop, PagerError> {
        let _shared = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let mut clear = [PageRun { first: 0, pages: 0 }; PAGES_PER_HOLD as usize];
        let mut runs = 0;
        self.bits.clear_within(region, chunk, |run| {
            clear[runs] = run;
            runs += 1;
        });
        for &run in &clear[..runs] {
            let content = content.from(run.first - chunk.first, run.pages);
            if let Stop::Discard = self.fill_run(region, run, content, done)? {
                return Ok(Stop::Discard);
            }
        }
        Ok(Stop::Done)
    }

    /// Puts a run in place; the caller holds the gate.
    fn fill_run(
        &self,
        region: usize,
        run: PageRun,
        content: Content<'_>,
        done: &mut Installed,
    ) -> Result<Stop, PagerError> {
        let plan = &self.regions[region];
        let (mut at, mut most) = (run.first, run.pages);
        while at < run.end() {
            let step = PageRun { first: at, pages: most.min(run.end() - at) };
            let progress = self.put(plan.region.span(step), content.from(at - run.first, step.pages));
            let settled = PageRun { first: at, pages: progress.bytes / PAGE };
            if settled.pages > 0 {
                done.pages += self.bits.set(region, settled);
                self.resolve(region, settled, &mut done.resolved);
                at = settled.end();
                continue;
            }
            let here = PageRun { first: at, pages: 1 };
            match progress.stopped {
                Some(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Stop::Discard),
                Some(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    self.wake(plan.region.span(here))?;
                    self.bits.set(region, here);
                    self.resolve(region, here, &mut done.resolved);
                    at += 1;
                }
                // Not all of it lies in one mapping.
                Some(e) if e.kind() == io::ErrorKind::NotFound && step.pages > 1 => most = 1,
                Some(e) => return Err(self.failed(plan.address(at), e)),
                None => return Err(self.failed(plan.address(at), io::ErrorKind::WriteZero.into())),
            }
        }
        Ok(Stop::Done)
    }

    fn put(&self, span: Span, content: Content<'_>) -> Progress {
        match content {
            Content::Bytes(bytes) => self.uffd.copy(span.addr, bytes),
            Content::Zeros => self.uffd.zero(span),
        }
    }

    /// Takes the faults that were handed out for a run from the list; their pages.
    pub(super) fn resolve(&self, region: usize, run: PageRun, resolved: &mut Vec<Resolved>) -> Vec<u64> {
        let mut waiting = self.lock();
        let within = (region, run.first, 0)..(region, run.end(), 0);
        let mut pages = Vec::new();
        while let Some((&key, since)) = waiting.faults.range(within.clone()).next() {
            resolved.push(Resolved { thread: key.2, waited: since.elapsed() });
            pages.push(key.1);
            waiting.faults.remove(&key);
        }
        pages.dedup();
        pages
    }

    pub(super) fn wake(&self, span: Span) -> Result<(), PagerError> {
        self.uffd.wake(span).map_err(|source| self.failed(span.addr, source))
    }

    /// Waits for an event; whether there is one.
    fn wait(&self, timeout: Duration) -> Result<bool, PagerError> {
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        let pidfd = self.process.pidfd();
        let mut fds = [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(e) => Err(PagerError::Events { pid: self.process.pid(), source: e.into() }),
            Ok(_) if !fds[1].revents().is_empty() => Err(self.process.gone().into()),
            Ok(_) => Ok(!fds[0].revents().is_empty()),
        }
    }

    /// Lets a discard go on, which only ends when somebody else has read of it and its thread has run.
    pub(super) fn pause(&self, since: Instant, looks: &mut u32, addr: u64) -> Result<(), PagerError> {
        self.check_alive()?;
        if since.elapsed() > DISCARD_WAIT {
            return Err(PagerError::Stuck { pid: self.process.pid(), addr });
        }
        *looks += 1;
        if *looks < QUICK_LOOKS {
            std::thread::yield_now()
        } else {
            std::thread::sleep(LOOK_PAUSE)
        }
        Ok(())
    }

    pub(super) fn failed(&self, addr: u64, source: io::Error) -> PagerError {
        match self.check_alive() {
            Err(gone) => gone,
            Ok(()) => PagerError::Fill { pid: self.process.pid(), addr, source },
        }
    }
}

impl Content<'_> {
    /// What belongs to some pages of it.
    pub(super) fn from(&self, skip: u64, pages: u64) -> Content<'_> {
        match self {
            Content::Bytes(bytes) => {
                Content::Bytes(&bytes[(skip * PAGE) as usize..((skip + pages) * PAGE) as usize])
            }
            Content::Zeros => Content::Zeros,
        }
    }
}

impl Plan {
    /// The parts that a run touches.
    fn parts_of(&self, run: PageRun) -> &[super::Part] {
        let span = self.region.span(run);
        let first = self.parts.partition_point(|part| part.segment.end <= span.addr);
        let end = self.parts.partition_point(|part| part.segment.start < span.end());
        &self.parts[first..end]
    }

    fn address(&self, page: u64) -> u64 {
        self.region.span(PageRun { first: page, pages: 1 }).addr
    }
}
