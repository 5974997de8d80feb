//! Demand paging of another process's RAM: its pages come when they are touched, or before, and until then who touches one waits.
//!
//! The kernel's userfaultfd tells us of faults where nothing is (`MISSING`), and puts pages in place in one step with waking who
//! waits. Three things make it exact:
//!
//! - *What is there never faults.* So [`Pager::begin`] drops whatever is where pages are to come, and proves that it is gone.
//! - *A page that was delivered and is missing was discarded since.* So there is a bit for each page ([`PageBits`]); a fault where
//!   it is set gets a zero page, and what comes from the source for such a page is not installed.
//! - *The process keeps a copy of the descriptor*, so that faults wait when we die, until [`Pager::take_over`].
//!
//! A discard is told before it happens (`EVENT_REMOVE`), and the discarding thread waits until we have read of it; nothing can be put
//! in place meanwhile. Between our reading and our setting of the bits an installer must not slip in with the old content: it
//! would come after the discard. So installers share a lock, which the reader holds alone over both.
//!
//! Two windows stay open, both too short to be closed from outside. If we die between reading of a discard and setting its bits, the
//! pages come with the content that they had before. And a hole that is punched into the file of shared memory is told only
//! by the `madvise(2)` that follows it (QEMU does both): a page that is delivered just between them keeps its old content. For huge pages
//! of hugetlbfs QEMU makes none, so that one which is discarded before it has come still comes. What a guest gives away it may not
//! count on to be zero.

mod begin;
mod error;
mod huge;
mod serve;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::process::{ForeignRawFd, PidfdGetfdFlags, pidfd_getfd};

pub use error::PagerError;

use crate::attach::Attach;
use crate::backing::{self, Access, Kind, Mappings, Segment};
use crate::bits::PageBits;
use crate::page::{PageRun, Region, Span, append_run};
use crate::process::Process;
use crate::smaps;
use crate::sys;
use crate::sys::uffd::{PAGER_FEATURES, Uffd, features_of};
use huge::HugePages;

/// Bytes that one call makes huge pages of: it copies them, and cannot be interrupted meanwhile.
const COLLAPSE_BYTES: u64 = 64 << 20;

/// Huge pages of x86-64, transparent or of hugetlbfs.
pub(crate) const HUGE_PAGE: u64 = 2 << 20;

/// A thread of the process waits for a page that was not delivered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fault {
    /// Index of the region.
    pub region: usize,
    /// Index of the page in it.
    pub page: u64,
    /// Which thread waits, as a thread id.
    pub thread: u32,
}

/// What became of pages that were given.
#[derive(Debug, Default)]
pub struct Installed {
    /// Pages that were settled by this.
    pub pages: u64,
    /// Pages that had been settled before, or were discarded by the guest: what was given was not needed.
    pub duplicates: u64,
    /// Threads that waited for one of them and go on.
    pub resolved: Vec<Resolved>,
}

/// A thread that waited for a page and goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The thread's id.
    pub thread: u32,
    /// How long it waited since its fault was read.
    pub waited: Duration,
}

/// Delivers pages to a process that runs already. One thread asks for faults ([`Pager::next`]) while others install.
///
/// Dropped without [`Pager::end`] it leaves the process waiting at its next fault.
#[derive(Debug)]
pub struct Pager {
    process: Process,
    attach: Attach,
    regions: Vec<Plan>,
    bits: PageBits,
    uffd: Uffd,
    remote_fd: i32,
    /// Shared by who installs, held alone from the reading of events until the bits of the discards among them are set.
    gate: RwLock<()>,
    waiting: Mutex<Waiting>,
}

/// A region and what is behind it.
#[derive(Debug)]
struct Plan {
    region: Region,
    parts: Vec<Part>,
    /// Where its pages come in pieces.
    huge: Option<HugePages>,
}

/// A part of a region with one mapping behind it.
#[derive(Debug)]
struct Part {
    segment: Segment,
    file: Option<File>,
    /// Where the file of a private mapping has data: a page that is zero must cover it.
    covers: Vec<PageRun>,
    /// A page that is not missing is the file's, if it has one; else it is zero.
    below: bool,
}

/// Who waits. A lock of its own, held for a look.
#[derive(Debug, Default)]
struct Waiting {
    /// Faults that were handed out: region, page and thread.
    faults: BTreeMap<(usize, u64, u32), Instant>,
    /// Delivered pages that somebody misses, which a discard keeps from being made zero at once.
    zeros: BTreeSet<(usize, u64)>,
}

impl Pager {
    /// Why this RAM cannot be paged on demand, in words for an operator, if it cannot. Touches nothing in the process.
    ///
    /// # Errors
    /// The process cannot be asked.
    pub fn refusal(process: &Process, regions: &[Region]) -> Result<Option<String>, PagerError> {
        let mappings = Mappings::of(process, regions)?;
        for region in regions {
            for segment in mappings.segments(region)? {
                let at = segment.start;
                if matches!(segment.kind, Kind::Anonymous | Kind::Common) {
                    continue;
                }
                let file = segment.open(process, Access::Read)?;
                if let Some(page) = segment.huge_page_bytes(&file) {
                    match HugePages::refusal(process, region, &segment, page)? {
                        Some(reason) => return Ok(Some(reason)),
                        None => continue,
                    }
                }
                if !segment.fillable(&file) {
                    return Ok(Some(format!(
                        "the RAM at {at:#x} is a file of a file system on a disk; \
                         only plain memory, memfds and files of tmpfs can be paged on demand"
                    )));
                }
            }
        }
        locked(process, regions)
    }

    /// Makes the userfaultfd in the process, which keeps a copy under the number [`Pager::remote_fd`]. Nothing is paged yet.
    ///
    /// # Errors
    /// [`PagerError::Refused`] if [`Pager::refusal`] has a reason, and whatever keeps us from attaching.
    pub fn attach(
        process: &Process,
        regions: Vec<Region>,
        bits: PageBits,
        attach: &Attach,
    ) -> Result<Pager, PagerError> {
        let pid = process.pid();
        if let Some(reason) = Pager::refusal(process, &regions)? {
            return Err(PagerError::Refused { pid, reason });
        }
        let regions = plans(process, &regions, &bits)?;
        let (fd, remote_fd) = attach.userfaultfd_keep(process)?;
        let uffd = match Uffd::with_features(fd, PAGER_FEATURES) {
            Ok(uffd) => uffd,
            Err(source) => {
                attach.close(process, vec![remote_fd])?;
                return Err(PagerError::Kernel { source });
            }
        };
        Pager::with(process, attach, regions, bits, uffd, remote_fd)
    }

    /// Takes over from a pager that died: `remote_fd` is what its [`Pager::remote_fd`] was, `bits` are its bits opened again. Every
    /// thread that waits tells of its fault anew.
    ///
    /// # Errors
    /// [`PagerError::NotPager`], [`PagerError::NotBegun`]: pages that were missing may have been read as zero, give that process up.
    pub fn take_over(
        process: &Process,
        regions: Vec<Region>,
        bits: PageBits,
        attach: &Attach,
        remote_fd: i32,
    ) -> Result<Pager, PagerError> {
        let pid = process.pid();
        let plans = plans(process, &regions, &bits)?;
        let features = features_of(pid, remote_fd);
        if !process.is_alive() {
            return Err(process.gone().into());
        }
        if features != Some(PAGER_FEATURES) {
            return Err(PagerError::NotPager { pid, fd: remote_fd });
        }
        if bits.clear_count() > 0 {
            must_be_registered(process, &regions)?;
        }
        let fd = pidfd_getfd(process.pidfd(), remote_fd as ForeignRawFd, PidfdGetfdFlags::empty());
        let fd = fd.map_err(|_| PagerError::NotPager { pid, fd: remote_fd })?;
        let pager = Pager::with(process, attach, plans, bits, Uffd::negotiated(fd), remote_fd)?;
        for plan in &pager.regions {
            let span = Span { addr: plan.region.base, len: plan.region.bytes };
            let failed = |source| PagerError::Register { pid, addr: span.addr, source };
            pager.uffd.wake(span).map_err(failed)?;
        }
        Ok(pager)
    }

    /// These regions map a template: a page of them that is not missing, and was not given, is the template's. Elsewhere such a page is
    /// zero.
    #[must_use]
    pub fn over_templates(mut self, regions: &[usize]) -> Self {
        for (at, plan) in self.regions.iter_mut().enumerate() {
            let template = regions.contains(&at);
            plan.parts.iter_mut().for_each(|part| part.below = template || part.segment.kind == Kind::Common);
        }
        self
    }

    /// The number of the descriptor in the process, which [`Pager::take_over`] needs: write it down before [`Pager::begin`].
    pub fn remote_fd(&self) -> i32 {
        self.remote_fd
    }

    /// The bits of the pages that were delivered.
    pub fn bits(&self) -> &PageBits {
        &self.bits
    }

    /// How many pages of a region come and go together: more than one in huge pages of hugetlbfs. Who sets bits sets those of all of
    /// them, and a fault is of the first.
    pub fn granule(&self, region: usize) -> u64 {
        self.regions.get(region).map_or(1, Plan::granule)
    }

    /// How many pages are missing still.
    pub fn remaining(&self) -> u64 {
        self.bits.clear_count()
    }

    /// The pages, as region and index, of faults that were handed out and not resolved: ask for them again after a reconnect.
    pub fn waiting(&self) -> Vec<(usize, u64)> {
        let mut pages: Vec<_> = self.lock().faults.keys().map(|(region, page, _)| (*region, *page)).collect();
        pages.dedup();
        pages
    }

    /// Ends it, when every page is there: the process keeps its memory and nothing of ours.
    ///
    /// # Errors
    /// [`PagerError::Missing`] if pages are missing; the process waits for them still.
    pub fn end(self) -> Result<(), PagerError> {
        let pages = self.remaining();
        if pages > 0 {
            return Err(PagerError::Missing { pid: self.process.pid(), pages });
        }
        self.unregister()?;
        // A discard that began before waits to be read of.
        self.take_events(&mut Vec::new())?;
        Ok(self.attach.close(&self.process, vec![self.remote_fd])?)
    }

    /// Closes the copy of a userfaultfd that a process has kept, where its pager was not used or died when every page was there.
    ///
    /// # Errors
    /// The process cannot be attached to.
    pub fn close(process: &Process, attach: &Attach, remote_fd: i32) -> Result<(), PagerError> {
        Ok(attach.close(process, vec![remote_fd])?)
    }

    /// Has the kernel make huge pages of a region's memory again, where it allows them: paging fills small ones. For after
    /// [`Pager::end`]. Returns how many bytes it was asked for; what cannot be stays as it is.
    ///
    /// # Errors
    /// The process cannot be asked.
    pub fn collapse(process: &Process, region: &Region) -> Result<u64, PagerError> {
        let huge = |segment: Segment| {
            let (from, to) = (segment.start.next_multiple_of(HUGE_PAGE), segment.end / HUGE_PAGE * HUGE_PAGE);
            (segment.kind == Kind::Anonymous && from < to).then_some(Span { addr: from, len: to - from })
        };
        let spans: Vec<Span> = backing::segments(process, region)?.into_iter().filter_map(huge).collect();
        // What one mapping of a region may, all may that are large enough; of those that several VMs share there may be tens of thousands.
        let Some(first) = spans.first() else { return Ok(0) };
        let first = Region { base: first.addr, bytes: first.len };
        if !smaps::first(process, &first)?.is_some_and(|details| details.huge) {
            return Ok(0);
        }
        let mut asked = 0;
        for span in spans {
            for addr in (span.addr..span.end()).step_by(COLLAPSE_BYTES as usize) {
                let len = COLLAPSE_BYTES.min(span.end() - addr);
                if let Err(error) = sys::madvise::collapse(process.pidfd(), Span { addr, len }) {
                    tracing::debug!(%error, addr, "not all of it became huge pages");
                }
                asked += len;
            }
        }
        Ok(asked)
    }

    fn with(
        process: &Process,
        attach: &Attach,
        regions: Vec<Plan>,
        bits: PageBits,
        uffd: Uffd,
        remote_fd: i32,
    ) -> Result<Pager, PagerError> {
        let (process, attach) = (process.try_clone()?, attach.clone());
        let (gate, waiting) = (RwLock::default(), Mutex::default());
        Ok(Pager { process, attach, regions, bits, uffd, remote_fd, gate, waiting })
    }

    /// The region, after checking that the run lies in it.
    fn checked(&self, region: usize, run: PageRun) -> Result<&Plan, PagerError> {
        let PageRun { first, pages } = run;
        let plan = self.regions.get(region).filter(|plan| plan.region.holds(run));
        plan.ok_or(PagerError::OutOfRange { region, first, pages })
    }

    /// Who waits. What a panic has left of it is as good as any: it is changed in single steps.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_alive(&self) -> Result<(), PagerError> {
        if self.process.is_alive() { Ok(()) } else { Err(self.process.gone().into()) }
    }
}

fn plans(process: &Process, regions: &[Region], bits: &PageBits) -> Result<Vec<Plan>, PagerError> {
    if !bits.pages().eq(regions.iter().map(Region::pages)) {
        return Err(PagerError::Bits);
    }
    let mappings = Mappings::of(process, regions)?;
    regions.iter().map(|region| plan(process, &mappings, *region)).collect()
}

impl Plan {
    fn granule(&self) -> u64 {
        if self.huge.is_some() { huge::PIECES } else { 1 }
    }
}

fn plan(process: &Process, mappings: &Mappings, region: Region) -> Result<Plan, PagerError> {
    let (mut parts, mut huge) = (Vec::new(), None);
    for segment in mappings.segments(&region)? {
        let mut covers = Vec::new();
        let file = match segment.kind {
            Kind::Anonymous => None,
            Kind::Common => {
                covers.push(region.run(segment.start, segment.end));
                None
            }
            // Nothing can be dropped from a file that cannot be written, which matters only if something is there.
            Kind::Shared => match segment.open(process, Access::ReadWrite) {
                Ok(file) => Some(file),
                Err(_) => Some(segment.open(process, Access::Read)?),
            },
            Kind::Private => {
                let file = segment.open(process, Access::Read)?;
                // One of huge pages has none.
                if segment.huge_page_bytes(&file).is_none() {
                    let found = |start, end| append_run(&mut covers, region.run(start, end));
                    segment.data(process, &file, segment.start..segment.end, found)?;
                }
                Some(file)
            }
        };
        if file.as_ref().is_some_and(|file| segment.huge_page_bytes(file).is_some()) {
            huge = Some(HugePages::default());
        }
        let below = segment.kind == Kind::Common;
        parts.push(Part { segment, file, covers, below });
    }
    Ok(Plan { region, parts, huge })
}

/// Locked memory is all present, and stays so.
fn locked(process: &Process, regions: &[Region]) -> Result<Option<String>, PagerError> {
    let status = process.read_proc("status")?;
    if status.lines().any(|line| line.strip_prefix("VmLck:").is_some_and(|rest| rest.trim() == "0 kB")) {
        return Ok(None);
    }
    for region in regions {
        if let Some(details) = smaps::details(process, region)?.iter().find(|details| details.has("lo")) {
            return Ok(Some(format!(
                "the RAM at {:#x} is locked (mem-lock), so that all of it is present",
                details.start
            )));
        }
    }
    Ok(None)
}

/// A pager that died before it had begun leaves nothing to take over.
fn must_be_registered(process: &Process, regions: &[Region]) -> Result<(), PagerError> {
    for region in regions {
        if let Some(bare) = smaps::details(process, region)?.iter().find(|details| !details.has("um")) {
            return Err(PagerError::NotBegun { pid: process.pid(), addr: bare.start });
        }
    }
    Ok(())
}
