//! One bit per page, in a file that is mapped shared: what was delivered stays known when the agent dies.
//!
//! The file is a row of 64-bit words of this machine: a magic number, how many regions, the pages of each, then the bits of each
//! region from a new word on. It is allocated when it is made, so that a full file system cannot end us later.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, fallocate, memfd_create};

use crate::page::PageRun;
use crate::sys::shared::SharedWords;

/// Pages in a word.
const WORD: u64 = u64::BITS as u64;

/// The first word: another layout gets another number.
const MAGIC: u64 = u64::from_be_bytes(*b"sternab1");

/// Words before those that tell the regions' pages.
const FIXED_WORDS: usize = 2;

/// Why the file of bits could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum BitsError {
    /// It could not be made.
    #[error("cannot make {} for the pages that were delivered; is there room?", path.display())]
    Create {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It could not be opened.
    #[error("cannot open {}, which tells the pages that were delivered", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It was made for another memory, or is none of ours.
    #[error("{} does not tell about RAM of this layout; it is of another virtual machine, or damaged", path.display())]
    Layout {
        /// Which file.
        path: PathBuf,
    },
}

/// One bit per page of several regions. A set bit says that the page's content is settled: *delivered*.
///
/// Pages and regions that do not exist have no bits: they are never set, and setting them does nothing.
#[derive(Debug)]
pub struct PageBits {
    words: SharedWords,
    regions: Vec<Place>,
    clear: AtomicU64,
}

#[derive(Debug)]
struct Place {
    pages: u64,
    first_word: usize,
}

impl PageBits {
    /// Makes the file with all bits clear, in one step: what was there under the name, also a symbolic link, is replaced.
    ///
    /// # Errors
    /// [`BitsError::Create`].
    pub fn create(path: &Path, pages: &[u64]) -> Result<PageBits, BitsError> {
        make(path, pages).map_err(|source| BitsError::Create { path: path.into(), source })
    }

    /// The same in memory alone: gone with us.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unnamed(pages: &[u64]) -> io::Result<PageBits> {
        let (regions, words) = places(pages).ok_or(io::ErrorKind::InvalidInput)?;
        let file = File::from(memfd_create("sterna-bits", MemfdFlags::CLOEXEC)?);
        let mapped = fill(&file, words, pages)?;
        Ok(PageBits { words: mapped, regions, clear: AtomicU64::new(pages.iter().sum()) })
    }

    /// Opens a file that was made for regions of just these pages.
    ///
    /// # Errors
    /// [`BitsError::Open`]; [`BitsError::Layout`] if it does not fit.
    pub fn open(path: &Path, pages: &[u64]) -> Result<PageBits, BitsError> {
        let failed = |source| BitsError::Open { path: path.into(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32);
        let file = options.open(path).map_err(failed)?;
        let layout = || BitsError::Layout { path: path.into() };
        let (regions, words) = places(pages).ok_or_else(layout)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() || metadata.len() != words as u64 * size_of::<u64>() as u64 {
            return Err(layout());
        }
        let mapped = SharedWords::map(&file, words).map_err(failed)?;
        let header = header(pages);
        if !mapped.words().iter().zip(&header).all(|(word, want)| word.load(Ordering::Acquire) == *want) {
            return Err(layout());
        }
        let bits = PageBits { words: mapped, regions, clear: AtomicU64::new(0) };
        let mut clear = 0;
        (0..pages.len()).for_each(|region| bits.clear_runs(region, |run| clear += run.pages));
        bits.clear.store(clear, Ordering::Release);
        Ok(bits)
    }

    /// How many pages each region has.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = u64> {
        self.regions.iter().map(|place| place.pages)
    }

    /// Whether the page was delivered.
    pub fn get(&self, region: usize, page: u64) -> bool {
        let mut clear = false;
        self.clear_within(region, PageRun { first: page, pages: 1 }, |_| clear = true);
        !clear && self.regions.get(region).is_some_and(|place| page < place.pages)
    }

    /// Sets the bits of a run; how many of them were clear.
    pub fn set(&self, region: usize, run: PageRun) -> u64 {
        let mut newly = 0;
        for (word, _, mask) in self.masks(region, run) {
            if word.load(Ordering::Acquire) & mask != mask {
                let before = word.fetch_or(mask, Ordering::AcqRel);
                newly += u64::from((mask & !before).count_ones());
            }
        }
        self.clear.fetch_sub(newly, Ordering::AcqRel);
        newly
    }

    /// Calls `found` with each run of clear bits of a region, ascending; runs do not touch.
    pub fn clear_runs(&self, region: usize, found: impl FnMut(PageRun)) {
        self.clear_within(region, PageRun { first: 0, pages: u64::MAX }, found);
    }

    /// How many bits of all regions are clear.
    pub fn clear_count(&self) -> u64 {
        self.clear.load(Ordering::Acquire)
    }

    /// Calls `found` with each run of clear bits within a run.
    pub(crate) fn clear_within(&self, region: usize, run: PageRun, mut found: impl FnMut(PageRun)) {
        let mut open = PageRun { first: 0, pages: 0 };
        for (word, base, mask) in self.masks(region, run) {
            let mut clear = !word.load(Ordering::Acquire) & mask;
            while clear != 0 {
                let from = clear.trailing_zeros();
                let len = (clear >> from).trailing_ones();
                let first = base + u64::from(from);
                if open.pages > 0 && open.end() == first {
                    open.pages += u64::from(len);
                } else {
                    if open.pages > 0 {
                        found(open);
                    }
                    open = PageRun { first, pages: len.into() };
                }
                clear &= u64::MAX.checked_shl(from + len).unwrap_or(0);
            }
        }
        if open.pages > 0 {
            found(open);
        }
    }

    /// The words that hold a run's bits: each with the page of its first bit, and which of its bits belong to the run.
    fn masks(&self, region: usize, run: PageRun) -> impl Iterator<Item = (&AtomicU64, u64, u64)> {
        let (pages, first_word) = self.regions.get(region).map_or((0, 0), |p| (p.pages, p.first_word));
        let (first, end) = (run.first.min(pages), run.end().min(pages));
        let words = first / WORD..if first < end { end.div_ceil(WORD) } else { first / WORD };
        words.map(move |index| {
            let base = index * WORD;
            let low = u64::MAX << first.saturating_sub(base);
            let high = u64::MAX >> (base + WORD).saturating_sub(end);
            (&self.words.words()[first_word + index as usize], base, low & high)
        })
    }
}

fn header(pages: &[u64]) -> Vec<u64> {
    [MAGIC, pages.len() as u64].into_iter().chain(pages.iter().copied()).collect()
}

/// Where each region's bits are, and how many words there are in all; nothing if they are too many to count.
fn places(pages: &[u64]) -> Option<(Vec<Place>, usize)> {
    let mut at = FIXED_WORDS + pages.len();
    let mut places = Vec::with_capacity(pages.len());
    for &pages in pages {
        places.push(Place { pages, first_word: at });
        at = at.checked_add(usize::try_from(pages.div_ceil(WORD)).ok()?)?;
    }
    (at <= isize::MAX as usize / size_of::<u64>()).then_some((places, at))
}

fn make(path: &Path, pages: &[u64]) -> io::Result<PageBits> {
    let (regions, words) = places(pages).ok_or(io::ErrorKind::InvalidInput)?;
    let mut name: OsString = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    // One that a crash has left.
    match std::fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&new)?;
    let made = fill(&file, words, pages).and_then(|mapped| {
        std::fs::rename(&new, path)?;
        Ok(mapped)
    });
    let mapped = made.inspect_err(|_| drop(std::fs::remove_file(&new)))?;
    Ok(PageBits { words: mapped, regions, clear: AtomicU64::new(pages.iter().sum()) })
}

fn fill(file: &File, words: usize, pages: &[u64]) -> io::Result<SharedWords> {
    fallocate(file, FallocateFlags::empty(), 0, words as u64 * size_of::<u64>() as u64)?;
    let mapped = SharedWords::map(file, words)?;
    for (word, value) in mapped.words().iter().zip(header(pages)) {
        word.store(value, Ordering::Release);
    }
    Ok(mapped)
}
