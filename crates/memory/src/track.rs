//! Dirty tracking: which pages a process has written.

use std::io;

use crate::attach::{Attach, AttachError};
use crate::backing;
use crate::huge;
use crate::page::{PAGE, PageRun, Region, Span, append_run};
use crate::process::{Process, ProcessError};
use crate::sys::pagemap::{Action, PRESENT, PageMap, Query, SWAPPED, WRITTEN, ZERO};
use crate::sys::uffd::{TRACK_FEATURES, Uffd, features_of};

/// A way to learn which pages of a process were written. Regions are named by their place in the list it was started with.
pub trait Tracker: Send {
    /// Appends the pages that were written since the last collect (or the start), and arms them again atomically.
    ///
    /// A page in it may be a hole by now (discarded): compare with [`crate::populated`]. A discard in memory of a file or
    /// memfd, shared or private, is *not* reported. After an error some pages may be armed and not reported: start anew.
    fn collect(&mut self, region: usize, out: &mut Vec<PageRun>) -> Result<(), TrackError>;

    /// Collects like [`Tracker::collect`] and tells in the same pass what the pages are: those that hold something are
    /// appended to `pages`, those that read as zero because nothing is there to `holes`. Runs of each list are ascending.
    ///
    /// In a region that is not [`crate::Backing::Anonymous`] a page that is not mapped may still have content
    /// ([`crate::with_data`]). Not for huge pages of hugetlbfs.
    fn collect_sorted(
        &mut self,
        region: usize,
        pages: &mut Vec<PageRun>,
        holes: &mut Vec<PageRun>,
    ) -> Result<(), TrackError>;

    /// Appends the same pages, without arming them.
    fn peek(&mut self, region: usize, out: &mut Vec<PageRun>) -> Result<(), TrackError>;

    /// Ends tracking and leaves the process as it was. Dropping does the same, without telling whether it worked.
    fn stop(self: Box<Self>) -> Result<(), TrackError>;
}

/// Why tracking failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The process could not be asked, or has ended.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The userfaultfd could not be had from the process.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The kernel cannot track this way.
    #[error("the kernel cannot track writes asynchronously; Linux 6.7 or later is needed")]
    Kernel {
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Somebody else has registered the memory.
    #[error("the memory at {base:#x} of process {pid} is tracked or served by somebody else; end that first")]
    Busy {
        /// The process's pid.
        pid: i32,
        /// Base of the region.
        base: u64,
    },
    /// A region could not be registered.
    #[error("cannot register {bytes} bytes at {base:#x} of process {pid}; is its RAM layout still the same?")]
    Register {
        /// The process's pid.
        pid: i32,
        /// Base of the region.
        base: u64,
        /// Its length.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A scan failed.
    #[error("cannot scan {bytes} bytes at {base:#x} of process {pid}; start tracking anew")]
    Scan {
        /// The process's pid.
        pid: i32,
        /// Base of the region.
        base: u64,
        /// Its length.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is no such region.
    #[error("region {index} was not given when tracking was started")]
    NoRegion {
        /// The index that was given.
        index: usize,
    },
}

/// Tracks by write protection that the kernel itself removes at the first write (userfaultfd `WP_ASYNC`, Linux 6.7): no
/// fault ever waits for us, and if we die, the last descriptor closes and tracking ends.
pub struct WpAsyncTracker {
    process: Process,
    regions: Vec<Region>,
    /// Which of them are in huge pages of hugetlbfs.
    huge: Vec<bool>,
    uffd: Uffd,
    scanner: PageMap,
}

impl WpAsyncTracker {
    /// Starts to track: after this, the first collect gives just what was written since.
    pub fn start(process: &Process, regions: Vec<Region>, attach: &Attach) -> Result<Self, TrackError> {
        let uffd = match register(process, &regions, attach) {
            Err(TrackError::Busy { .. }) if close_leftovers(process, attach)? > 0 => {
                register(process, &regions, attach)?
            }
            result => result?,
        };
        let scanner = PageMap::new(process.open_proc("pagemap")?);
        // Such memory is of one kind: its first page tells.
        let is_huge = |region: &Region| {
            let first = Region { bytes: region.bytes.min(PAGE), ..*region };
            backing::segments(process, &first).is_ok_and(|segments| huge::is_huge(process, &segments))
        };
        let huge = regions.iter().map(is_huge).collect();
        let mut tracker = WpAsyncTracker { process: process.try_clone()?, regions, huge, uffd, scanner };
        for index in 0..tracker.regions.len() {
            tracker.scan(index, Action::Rearm, 0, |_, _| {})?;
        }
        Ok(tracker)
    }

    fn scan(
        &mut self,
        index: usize,
        action: Action,
        tell: u64,
        mut found: impl FnMut(PageRun, u64),
    ) -> Result<(), TrackError> {
        let region = *self.regions.get(index).ok_or(TrackError::NoRegion { index })?;
        let query = Query { all: WRITTEN, tell: WRITTEN | tell, action, ..Query::default() };
        let result = self
            .scanner
            .scan(query, region.base, region.end(), |start, end, is| found(region.run(start, end), is));
        // A dead process has no page tables left, and the scan of nothing succeeds.
        if !self.process.is_alive() {
            return Err(self.process.gone().into());
        }
        let (pid, base, bytes) = (self.process.pid(), region.base, region.bytes);
        result.map_err(|source| TrackError::Scan { pid, base, bytes, source })
    }

    /// Takes the markers away that discards have left in huge pages, where they look like pages that the kernel is moving
    /// (see [`crate::huge`]). One that does move counts as written from now on. Where it fails, the markers stay.
    fn clear_markers(&mut self, region: &Region) {
        let query = Query { all: SWAPPED, none: PRESENT | WRITTEN, ..Query::default() };
        let mut markers = Vec::new();
        let found = |start, end, _| markers.push(Span { addr: start, len: end - start });
        let scanned = self.scanner.scan(query, region.base, region.end(), found);
        let cleared = scanned.and_then(|()| markers.iter().try_for_each(|span| self.uffd.unprotect(*span)));
        if let Err(error) = cleared {
            tracing::debug!(%error, base = region.base, "markers of discarded huge pages stay");
        }
    }
}

impl Tracker for WpAsyncTracker {
    fn collect(&mut self, region: usize, out: &mut Vec<PageRun>) -> Result<(), TrackError> {
        self.scan(region, Action::Rearm, 0, |run, _| append_run(out, run))?;
        if self.huge[region] {
            self.clear_markers(&self.regions[region].clone());
        }
        Ok(())
    }

    fn collect_sorted(
        &mut self,
        region: usize,
        pages: &mut Vec<PageRun>,
        holes: &mut Vec<PageRun>,
    ) -> Result<(), TrackError> {
        // A written page has no marker of ours, so that what looks swapped here is swapped.
        self.scan(region, Action::Rearm, PRESENT | SWAPPED | ZERO, |run, is| {
            let holds = is & (PRESENT | SWAPPED) != 0 && is & ZERO == 0;
            append_run(if holds { &mut *pages } else { &mut *holes }, run);
        })
    }

    fn peek(&mut self, region: usize, out: &mut Vec<PageRun>) -> Result<(), TrackError> {
        self.scan(region, Action::LookTracked, 0, |run, _| append_run(out, run))
    }

    fn stop(self: Box<Self>) -> Result<(), TrackError> {
        let pid = self.process.pid();
        for region in &self.regions {
            match self.uffd.unregister(region.span(PageRun { first: 0, pages: region.pages() })) {
                Err(source) if self.process.is_alive() => {
                    let (base, bytes) = (region.base, region.bytes);
                    return Err(TrackError::Register { pid, base, bytes, source });
                }
                // Of a dead process nothing is left to restore.
                _ => {}
            }
        }
        Ok(())
    }
}

/// Looks, without changing anything, at what was written since the tracker's last collect: a sender's own, one for each thread.
pub struct Peeker {
    process: Process,
    scanner: PageMap,
}

impl Peeker {
    /// For a process that is tracked.
    pub fn new(process: &Process) -> Result<Peeker, TrackError> {
        Ok(Peeker { process: process.try_clone()?, scanner: PageMap::new(process.open_proc("pagemap")?) })
    }

    /// Appends the pages of `within` that were written since the last collect, ascending. All pages between are looked at, so keep
    /// it short.
    ///
    /// # Errors
    /// [`TrackError::Scan`]; a process that is dead or no longer tracked has nothing written.
    pub fn written(
        &mut self,
        region: &Region,
        within: PageRun,
        out: &mut Vec<PageRun>,
    ) -> Result<(), TrackError> {
        let query = Query { all: WRITTEN, action: Action::Look, ..Query::default() };
        let span = region.span(within);
        let found = |start, end, _| append_run(out, region.run(start, end));
        self.scanner.scan(query, span.addr, span.end(), found).map_err(|source| TrackError::Scan {
            pid: self.process.pid(),
            base: span.addr,
            bytes: span.len,
            source,
        })
    }
}

/// A userfaultfd of the process with all regions registered.
fn register(process: &Process, regions: &[Region], attach: &Attach) -> Result<Uffd, TrackError> {
    let fd = attach.userfaultfd(process)?;
    let uffd = Uffd::with_features(fd, TRACK_FEATURES).map_err(|source| TrackError::Kernel { source })?;
    let pid = process.pid();
    for region in regions {
        let Region { base, bytes } = *region;
        if !region.is_valid() {
            return Err(TrackError::Register {
                pid,
                base,
                bytes,
                source: io::ErrorKind::InvalidInput.into(),
            });
        }
        uffd.register_wp(region.span(PageRun { first: 0, pages: region.pages() })).map_err(|source| {
            match source.kind() {
                io::ErrorKind::ResourceBusy => TrackError::Busy { pid, base },
                _ => TrackError::Register { pid, base, bytes, source },
            }
        })?;
    }
    Ok(uffd)
}

/// Closes, in the process, userfaultfds that an earlier crash of ours left open there; how many they were.
fn close_leftovers(process: &Process, attach: &Attach) -> Result<usize, TrackError> {
    let pid = process.pid();
    let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Ok(0) };
    let numbers = fds.flatten().filter(|fd| {
        std::fs::read_link(fd.path()).is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
    });
    let numbers = numbers.filter_map(|fd| fd.file_name().to_str()?.parse::<i32>().ok());
    let ours: Vec<i32> = numbers.filter(|fd| is_ours(pid, *fd)).collect();
    let count = ours.len();
    if count > 0 {
        tracing::warn!(pid, ?ours, "closing userfaultfds that an earlier run left in the process");
        attach.close(process, ours)?;
    }
    Ok(count)
}

/// Whether a userfaultfd has just our features and nobody waits for it. QEMU's own (its post-copy, its background snapshots)
/// have others.
fn is_ours(pid: i32, fd: i32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
    let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)).map(str::trim);
    value("total:") == Some("0") && features_of(pid, fd) == Some(TRACK_FEATURES)
}
