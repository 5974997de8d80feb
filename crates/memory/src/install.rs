//! Writing guest memory at the target, each kind of mapping in the way that costs no memory twice.
//!
//! Plain anonymous memory is written with `process_vm_writev`; a shared mapping through its file. A *private* mapping of a memfd or a tmpfs
//! file must not be: a write fault there first fills the file's page and then copies it, so that memory is used twice. Such
//! pages are put in place with `UFFDIO_COPY`, which makes the private page alone. It asks for a registered range; ours is
//! registered for write-protect events that nothing ever arms and that the kernel would resolve itself (`WP_ASYNC`), so no
//! access of the process ever waits for us.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use crate::attach::{Attach, AttachError};
use crate::backing::{Access, BackingError, Kind, Mappings, Segment};
use crate::copy::{self, CopyError};
use crate::huge_target::HugePages;
use crate::page::{PAGE, PageRun, Region, Span};
use crate::populated::{PopulatedError, present};
use crate::process::{Process, ProcessError};
use crate::shared::{CommonRun, SharedError, map_common};
use crate::sys::pagemap::PageMap;
use crate::sys::uffd::{INSTALL_FEATURES, Uffd};

/// How often one page is tried again when the address space changes under the copy (EAGAIN) without any progress.
const RETRIES: u32 = 1000;

/// Why pages could not be written or discarded.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The process could not be asked, or has ended.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// No system call could be run in the process.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The mappings behind a region could not be read.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The page tables could not be read.
    #[error(transparent)]
    Populated(#[from] PopulatedError),
    /// Pages in common with others could not be mapped.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// Bytes could not be written.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The kernel cannot fill private memory from outside.
    #[error("the kernel cannot fill private memory of another process; Linux 6.7 or later is needed")]
    Kernel {
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// A part of a region could not be registered for filling or released from it.
    #[error(
        "cannot register the memory at {addr:#x} of process {pid} for filling; does somebody else serve it?"
    )]
    Register {
        /// The process's pid.
        pid: i32,
        /// Where the part begins.
        addr: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A page could not be filled.
    #[error("cannot fill the page at {addr:#x} of process {pid}")]
    Fill {
        /// The process's pid.
        pid: i32,
        /// Address of the page.
        addr: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A huge page of hugetlbfs could not be had.
    #[error(
        "cannot write the huge page at {addr:#x} of process {pid}; are any left (HugePages_Free of /proc/meminfo)?"
    )]
    HugePage {
        /// The process's pid.
        pid: i32,
        /// Where the write failed.
        addr: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The caller named pages that are not there.
    #[error("region {region} has no pages {first}..{first}+{pages}")]
    OutOfRange {
        /// Index of the region.
        region: usize,
        /// First page of the run.
        first: u64,
        /// Length of the run.
        pages: u64,
    },
    /// The bytes are not as many as the runs need.
    #[error("{bytes} bytes were given for {pages} pages")]
    Length {
        /// Bytes given.
        bytes: usize,
        /// Pages of all runs.
        pages: u64,
    },
}

/// Writes and discards pages of a process whose guest does not run yet. Several threads may install *disjoint* pages at once.
pub struct Installer {
    pub(crate) process: Process,
    pub(crate) regions: Vec<Plan>,
    pub(crate) attach: Attach,
    uffd: Option<Uffd>,
    scanners: Mutex<Vec<PageMap>>,
}

/// A region and how to write its parts.
pub(crate) struct Plan {
    pub(crate) region: Region,
    pub(crate) parts: Vec<Part>,
}

/// A part of a region with one kind of memory behind it.
pub(crate) struct Part {
    pub(crate) segment: Segment,
    pub(crate) file: Option<File>,
    pub(crate) way: Way,
    /// Where the way is [`Way::Huge`].
    pub(crate) huge: Option<HugePages>,
}

/// How pages are put in place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// By an ordinary write.
    Write,
    /// By `UFFDIO_COPY` where no page is, by a write where one is.
    Fill,
    /// By a write into the file: no page is zeroed first and no page table is filled, which is half as much work again.
    Store,
    /// By an ordinary write, with a note of what a huge page holds: one that holds nothing any more is given back whole.
    Huge,
}

impl Installer {
    /// Looks at what is behind the regions and gets ready. Attaches to the process only if a part must be filled.
    pub fn open(process: &Process, regions: Vec<Region>, attach: &Attach) -> Result<Installer, InstallError> {
        let mappings = Mappings::of(process, &regions)?;
        let plans: Result<Vec<Plan>, _> =
            regions.into_iter().map(|region| plan(process, &mappings, region)).collect();
        let regions = plans?;
        let uffd = register(process, &regions, attach)?;
        let (process, attach) = (process.try_clone()?, attach.clone());
        Ok(Installer { process, regions, attach, uffd, scanners: Mutex::default() })
    }

    /// Writes pages: `bytes` are those of the runs, one after the other.
    pub fn install(&self, region: usize, runs: &[PageRun], bytes: &[u8]) -> Result<(), InstallError> {
        let plan = self.checked(region, runs)?;
        let pages: u64 = runs.iter().map(|r| r.pages).sum();
        if pages.saturating_mul(PAGE) != bytes.len() as u64 {
            return Err(InstallError::Length { bytes: bytes.len(), pages });
        }
        // Ordinary writes are gathered, so that many short runs cost one call.
        let (mut gathered, mut from, mut at) = (Vec::with_capacity(runs.len()), 0, 0);
        for span in runs.iter().map(|&run| plan.region.span(run)) {
            for (part, piece) in plan.pieces(span) {
                let end = at + piece.len as usize;
                if part.way == Way::Write {
                    gathered.push(piece);
                } else {
                    self.write(&gathered, &bytes[from..at])?;
                    gathered.clear();
                    self.place(plan, part, piece.addr, &bytes[at..end])?;
                    from = end;
                }
                at = end;
            }
        }
        self.write(&gathered, &bytes[from..at])
    }

    /// Changes parts of pages that were installed before: each `(offset in the region, bytes)` of `changes`, whose bytes lie one after
    /// the other in `bytes`. A page that was not installed is made, and zero elsewhere.
    pub fn patch(&self, region: usize, changes: &[(u64, u64)], bytes: &[u8]) -> Result<(), InstallError> {
        let plan = self.checked(region, &[])?;
        let out = |first: u64| InstallError::OutOfRange { region, first: first / PAGE, pages: 1 };
        let mut spans = Vec::with_capacity(changes.len());
        for &(offset, len) in changes {
            let end =
                offset.checked_add(len).filter(|end| *end <= plan.region.bytes).ok_or_else(|| out(offset))?;
            spans.push(Span { addr: plan.region.base + offset, len: end - offset });
        }
        self.write(&spans, bytes)
    }

    /// Maps pages that are in common with others over what is there, `fd` being the number of their store in the process; what is installed
    /// later covers them. How many of the runs were mapped, region by region in order ([`map_common`]).
    pub fn map_common(&mut self, fd: RawFd, runs: &[(usize, Vec<CommonRun>)]) -> Result<usize, InstallError> {
        let mut regions = Vec::with_capacity(runs.len());
        for (region, runs) in runs {
            let plain: Vec<PageRun> = runs.iter().map(|common| common.run).collect();
            regions.push((self.checked(*region, &plain)?.region, runs.clone()));
        }
        for (region, runs) in &regions {
            self.must_be_private(region, runs)?;
        }
        let mapped = map_common(&self.process, &self.attach, fd, &regions)?;
        let changed: Vec<Region> = regions.iter().map(|(region, _)| *region).collect();
        let mappings = Mappings::of(&self.process, &changed)?;
        for (region, _) in runs {
            self.regions[*region] = plan(&self.process, &mappings, self.regions[*region].region)?;
        }
        Ok(mapped)
    }

    /// A mapping that others see too would be hidden from them.
    fn must_be_private(&self, region: &Region, runs: &[CommonRun]) -> Result<(), InstallError> {
        let plan = self.regions.iter().find(|plan| plan.region.base == region.base);
        for common in runs {
            let mut pieces = plan.into_iter().flat_map(|plan| plan.pieces(region.span(common.run)));
            if pieces.any(|(part, _)| part.segment.kind == Kind::Shared || part.huge.is_some()) {
                let source = io::ErrorKind::Unsupported.into();
                return Err(InstallError::Fill { pid: self.process.pid(), addr: region.base, source });
            }
        }
        Ok(())
    }

    /// Ends it: the process keeps its pages, and nothing of ours. Dropping does the same, without telling whether it worked.
    pub fn finish(self) -> Result<(), InstallError> {
        self.give_huge_back()?;
        let Some(uffd) = &self.uffd else { return Ok(()) };
        for span in self.regions.iter().flat_map(Plan::filled) {
            match uffd.unregister(span) {
                Err(source) if self.process.is_alive() => {
                    return Err(InstallError::Register { pid: self.process.pid(), addr: span.addr, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The region, after checking that all runs lie in it.
    pub(crate) fn checked(&self, region: usize, runs: &[PageRun]) -> Result<&Plan, InstallError> {
        let out = |run: PageRun| InstallError::OutOfRange { region, first: run.first, pages: run.pages };
        let plan = self.regions.get(region).ok_or_else(|| out(PageRun { first: 0, pages: 0 }))?;
        match runs.iter().find(|run| !plan.region.holds(**run)) {
            Some(&run) => Err(out(run)),
            None => Ok(plan),
        }
    }

    pub(crate) fn write(&self, spans: &[Span], bytes: &[u8]) -> Result<(), InstallError> {
        if spans.is_empty() { Ok(()) } else { Ok(copy::write(&self.process, spans, bytes)?) }
    }

    /// The pages of `start..end` that are present or swapped out, as runs of the region.
    pub(crate) fn present(&self, plan: &Plan, span: Span) -> Result<Vec<PageRun>, InstallError> {
        // A poisoned pool is as good as any: its scanners hold no state between scans.
        let pool = || self.scanners.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let idle = pool().pop();
        let mut scanner = match idle {
            Some(scanner) => scanner,
            None => PageMap::new(self.process.open_proc("pagemap")?),
        };
        let mut runs = Vec::new();
        present(&mut scanner, &self.process, &plan.region, span.addr, span.end(), &mut runs)?;
        pool().push(scanner);
        Ok(runs)
    }

    fn place(&self, plan: &Plan, part: &Part, addr: u64, bytes: &[u8]) -> Result<(), InstallError> {
        if let Some(huge) = &part.huge {
            return self.place_huge(huge, addr, bytes);
        }
        let (Way::Store, Some(file)) = (part.way, &part.file) else {
            return self.fill(plan, addr, bytes);
        };
        let offset = part.segment.offset + (addr - part.segment.start);
        let stored = file.write_all_at(bytes, offset);
        if !self.process.is_alive() {
            return Err(self.process.gone().into());
        }
        stored.map_err(|source| InstallError::Fill { pid: self.process.pid(), addr, source })
    }

    /// Puts pages in place in one go where none is; from the first that is there already, piece by piece.
    fn fill(&self, plan: &Plan, addr: u64, bytes: &[u8]) -> Result<(), InstallError> {
        let done = self.fill_absent(addr, bytes)?;
        let rest = Span { addr: addr + done as u64, len: (bytes.len() - done) as u64 };
        if rest.len == 0 {
            return Ok(());
        }
        let part = |from: u64, to: u64| &bytes[(from - addr) as usize..(to - addr) as usize];
        let mut at = rest.addr;
        for span in self.present(plan, rest)?.into_iter().map(|run| plan.region.span(run)) {
            self.fill_unsure(at, part(at, span.addr))?;
            self.write(&[span], part(span.addr, span.end()))?;
            at = span.end();
        }
        self.fill_unsure(at, part(at, rest.end()))
    }

    /// Fills pages most of which are absent; one that has come meanwhile is written.
    fn fill_unsure(&self, addr: u64, bytes: &[u8]) -> Result<(), InstallError> {
        let mut done = 0;
        while done < bytes.len() {
            done += self.fill_absent(addr + done as u64, &bytes[done..])?;
            if done < bytes.len() {
                let page = &bytes[done..done + PAGE as usize];
                self.write(&[Span { addr: addr + done as u64, len: PAGE }], page)?;
                done += page.len();
            }
        }
        Ok(())
    }

    /// Fills pages up to the first that is there already; how many bytes that were.
    fn fill_absent(&self, addr: u64, bytes: &[u8]) -> Result<usize, InstallError> {
        let Some(uffd) = &self.uffd else { return Ok(0) };
        self.advance(addr, bytes.len(), |done| uffd.copy(addr + done as u64, &bytes[done..]))
    }

    /// Makes pages zero up to the first that is there already; how many bytes that were.
    pub(crate) fn zero_absent(&self, span: Span) -> Result<u64, InstallError> {
        let Some(uffd) = &self.uffd else { return Ok(0) };
        let step =
            |done: usize| uffd.zero(Span { addr: span.addr + done as u64, len: span.len - done as u64 });
        Ok(self.advance(span.addr, span.len as usize, step)? as u64)
    }

    /// Repeats a step that may stop early until all is done or a page is there already.
    fn advance(
        &self,
        addr: u64,
        len: usize,
        step: impl Fn(usize) -> crate::sys::uffd::Progress,
    ) -> Result<usize, InstallError> {
        let (mut done, mut idle) = (0, 0);
        while done < len {
            let progress = step(done);
            done += (progress.bytes as usize).min(len - done);
            idle = if progress.bytes > 0 { 0 } else { idle + 1 };
            match progress.stopped {
                None => {}
                Some(e) if e.kind() == io::ErrorKind::AlreadyExists => break,
                Some(e) if e.kind() == io::ErrorKind::WouldBlock && idle < RETRIES => {}
                Some(_) if progress.bytes > 0 => {}
                Some(source) => {
                    let (pid, addr) = (self.process.pid(), addr + done as u64);
                    return Err(InstallError::Fill { pid, addr, source });
                }
            }
        }
        Ok(done)
    }
}

impl Plan {
    /// The parts that a span of the region touches, each with what it touches of it.
    pub(crate) fn pieces(&self, span: Span) -> impl Iterator<Item = (&Part, Span)> {
        let first = self.parts.partition_point(|p| p.segment.end <= span.addr);
        self.parts[first..].iter().take_while(move |p| p.segment.start < span.end()).map(move |p| {
            let addr = span.addr.max(p.segment.start);
            (p, Span { addr, len: span.end().min(p.segment.end) - addr })
        })
    }

    fn filled(&self) -> impl Iterator<Item = Span> {
        let filled = self.parts.iter().filter(|p| p.way == Way::Fill);
        filled.map(|p| Span { addr: p.segment.start, len: p.segment.end - p.segment.start })
    }
}

fn plan(process: &Process, mappings: &Mappings, region: Region) -> Result<Plan, InstallError> {
    let parts = mappings.segments(&region)?.into_iter().map(|segment| part(process, &region, segment));
    Ok(Plan { region, parts: parts.collect::<Result<_, _>>()? })
}

fn part(process: &Process, region: &Region, segment: Segment) -> Result<Part, InstallError> {
    let file = match segment.kind {
        Kind::Anonymous | Kind::Common => None,
        Kind::Private => Some((segment.open(process, Access::Read)?, Access::Read)),
        // Sealed or read-only for us: all is done through the mapping.
        Kind::Shared => Some(match segment.open(process, Access::ReadWrite) {
            Ok(file) => (file, Access::ReadWrite),
            Err(_) => (segment.open(process, Access::Read)?, Access::Read),
        }),
    };
    let huge = file.as_ref().and_then(|(file, _)| segment.huge_page_bytes(file));
    let huge = huge.map(|page| HugePages::open(process, region, &segment, page)).transpose()?;
    let way = match &file {
        Some(_) if huge.is_some() => Way::Huge,
        Some((file, _)) if segment.kind == Kind::Private && segment.fillable(file) => Way::Fill,
        Some((file, Access::ReadWrite)) if segment.storable(file) => Way::Store,
        _ => Way::Write,
    };
    Ok(Part { segment, file: file.map(|(file, _)| file), way, huge })
}

fn register(process: &Process, plans: &[Plan], attach: &Attach) -> Result<Option<Uffd>, InstallError> {
    let mut uffd = None;
    for span in plans.iter().flat_map(Plan::filled) {
        let uffd = match &mut uffd {
            Some(uffd) => uffd,
            none => {
                let fd = attach.userfaultfd(process)?;
                let new = Uffd::with_features(fd, INSTALL_FEATURES);
                none.insert(new.map_err(|source| InstallError::Kernel { source })?)
            }
        };
        let failed = |source| InstallError::Register { pid: process.pid(), addr: span.addr, source };
        uffd.register_wp(span).map_err(failed)?;
    }
    Ok(uffd)
}
