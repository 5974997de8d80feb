//! QEMU at the target and the kernel's userfaultfd: what outlives the pager.

use crate::BLOCKS;
use std::collections::{BTreeSet, VecDeque};

/// A seeded generator (SplitMix64, Steele et al. 2014).
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    pub(crate) fn percent(&mut self, of: u64) -> bool {
        self.below(100) < of
    }
}

/// A page of the VM: all blocks behind each other.
pub(crate) type Page = usize;

pub(crate) fn pages_total() -> usize {
    BLOCKS.iter().sum::<u64>() as usize
}

pub(crate) fn place(page: Page) -> (u16, u64) {
    let page = page as u64;
    if page < BLOCKS[0] { (0, page) } else { (1, page - BLOCKS[0]) }
}

pub(crate) fn page_at(block: u16, index: u64) -> Page {
    (if block == 0 { index } else { BLOCKS[0] + index }) as usize
}

#[derive(Clone, Copy, Debug)]
enum Access {
    Read(Page),
    Write(Page, u64),
    Discard(Page, usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thread {
    Runs,
    /// Its fault is in the kernel, and was read or not.
    Waits {
        page: Page,
        read: bool,
    },
    /// It discards: the kernel has told so, and that was read or not.
    Removes {
        read: bool,
    },
}

/// A thread of QEMU: a processor of the guest, which has its balloon too.
struct Processor {
    thread: Thread,
    access: Option<Access>,
    left: u32,
}

/// What the kernel tells the pager.
pub(crate) enum Told {
    Fault(Page),
    Remove(Page, usize),
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Again,
    Exists,
}

/// QEMU at the target, and what the kernel knows of it. Outlives the pager.
pub(crate) struct Machine {
    memory: Vec<Option<u64>>,
    /// What each page must read as.
    truth: Vec<u64>,
    processors: Vec<Processor>,
    /// Faults that nobody has read, by processor.
    faults: VecDeque<usize>,
    /// Discards that nobody has read.
    removes: VecDeque<(usize, Page, usize)>,
}

impl Machine {
    /// A VM that was handed over with this in its memory.
    pub(crate) fn new(source: &[u64], memory: Vec<Option<u64>>, chance: &mut Chance) -> Self {
        let processor = |left| Processor { thread: Thread::Runs, access: None, left };
        let processors = (0..2 + chance.below(3)).map(|_| processor(5 + chance.below(25) as u32)).collect();
        let (faults, removes) = Default::default();
        Self { memory, truth: source.to_vec(), processors, faults, removes }
    }

    /// One step of one of the processors. Err for a page that is not what it must be.
    pub(crate) fn step(&mut self, chance: &mut Chance) -> Result<(), String> {
        let at = chance.below(self.processors.len() as u64) as usize;
        let access = match (self.processors[at].thread, self.processors[at].access) {
            (Thread::Runs, Some(access)) => access,
            (Thread::Runs, None) if self.processors[at].left > 0 => {
                self.processors[at].left -= 1;
                self.processors[at].access = Some(Self::any_access(chance));
                return Ok(());
            }
            (Thread::Removes { read: true }, Some(access)) => {
                self.drop_pages(access);
                (self.processors[at].thread, self.processors[at].access) = (Thread::Runs, None);
                return Ok(());
            }
            _ => return Ok(()),
        };
        match access {
            Access::Read(page) | Access::Write(page, _) if self.memory[page].is_none() => {
                self.processors[at].thread = Thread::Waits { page, read: false };
                self.faults.push_back(at);
                return Ok(());
            }
            Access::Discard(first, pages) => {
                self.processors[at].thread = Thread::Removes { read: false };
                self.removes.push_back((at, first, pages));
                return Ok(());
            }
            Access::Read(page) if self.memory[page] != Some(self.truth[page]) => {
                let (is, must) = (self.memory[page], self.truth[page]);
                return Err(format!("processor {at} reads {is:?} of page {page} instead of {must}"));
            }
            Access::Read(_) => {}
            Access::Write(page, value) => {
                (self.memory[page], self.truth[page]) = (Some(value), value);
            }
        }
        self.processors[at].access = None;
        Ok(())
    }

    fn any_access(chance: &mut Chance) -> Access {
        let page = chance.below(pages_total() as u64) as usize;
        match chance.below(10) {
            0..5 => Access::Read(page),
            5..8 => Access::Write(page, 1_000_000 + chance.below(1_000_000)),
            _ => {
                let (block, index) = place(page);
                let pages = (1 + chance.below(4)).min(BLOCKS[usize::from(block)] - index);
                Access::Discard(page, pages as usize)
            }
        }
    }

    fn drop_pages(&mut self, access: Access) {
        if let Access::Discard(first, pages) = access {
            self.memory[first..first + pages].fill(None);
            self.truth[first..first + pages].fill(0);
        }
    }

    /// Reads what the pager is told: faults come first.
    pub(crate) fn read(&mut self) -> Option<Told> {
        if let Some(at) = self.faults.pop_front() {
            let thread = &mut self.processors[at].thread;
            let Thread::Waits { page, read } = thread else { unreachable!("it waits until it is woken") };
            *read = true;
            return Some(Told::Fault(*page));
        }
        let (at, first, pages) = self.removes.pop_front()?;
        self.processors[at].thread = Thread::Removes { read: true };
        Some(Told::Remove(first, pages))
    }

    /// UFFDIO_COPY, or UFFDIO_ZEROPAGE.
    pub(crate) fn copy(&mut self, page: Page, content: u64) -> Result<(), Refusal> {
        if self.processors.iter().any(|one| matches!(one.thread, Thread::Removes { .. })) {
            return Err(Refusal::Again);
        }
        if self.memory[page].is_some() {
            return Err(Refusal::Exists);
        }
        self.memory[page] = Some(content);
        self.wake(|at| at == page);
        Ok(())
    }

    /// UFFDIO_WAKE.
    pub(crate) fn wake(&mut self, which: impl Fn(Page) -> bool) {
        for (at, processor) in self.processors.iter_mut().enumerate() {
            if matches!(processor.thread, Thread::Waits { page, .. } if which(page)) {
                processor.thread = Thread::Runs;
                self.faults.retain(|fault| *fault != at);
            }
        }
    }

    /// Pages that a thread waits for and whose fault was read.
    pub(crate) fn waited_for(&self) -> BTreeSet<Page> {
        let waits = |one: &Processor| match one.thread {
            Thread::Waits { page, read: true } => Some(page),
            _ => None,
        };
        self.processors.iter().filter_map(waits).collect()
    }

    /// What each thread does.
    pub(crate) fn threads(&self) -> Vec<Thread> {
        self.processors.iter().map(|one| one.thread).collect()
    }

    /// What the guest would read at last.
    pub(crate) fn compare(&self) -> Result<(), String> {
        for (page, must) in self.truth.iter().enumerate() {
            let is = self.memory[page].unwrap_or(0);
            if is != *must {
                return Err(format!("page {page} is {is} in the end instead of {must}"));
            }
        }
        Ok(())
    }

    /// Whether every processor has done all that it had to.
    pub(crate) fn is_done(&self) -> bool {
        let done = |one: &Processor| one.left == 0 && one.access.is_none();
        self.processors.iter().all(done)
    }
}
