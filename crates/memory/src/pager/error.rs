//! What can go wrong when RAM is paged on demand.

use std::io;

use crate::attach::AttachError;
use crate::backing::BackingError;
use crate::populated::PopulatedError;
use crate::process::ProcessError;

/// Why RAM cannot be paged on demand, or a page was not delivered.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The process has ended, and its memory with it.
    #[error("process {pid} has ended; its memory is gone")]
    Gone {
        /// The process's pid.
        pid: i32,
    },
    /// The process could not be asked.
    #[error(transparent)]
    Process(ProcessError),
    /// No system call could be run in the process.
    #[error(transparent)]
    Attach(AttachError),
    /// The mappings behind a region could not be read.
    #[error(transparent)]
    Backing(BackingError),
    /// The page tables could not be read.
    #[error(transparent)]
    Populated(PopulatedError),
    /// Its RAM is not of a kind that can be paged on demand.
    #[error("the RAM of process {pid} cannot be paged on demand: {reason}")]
    Refused {
        /// The process's pid.
        pid: i32,
        /// Why, see [`crate::Pager::refusal`].
        reason: String,
    },
    /// The kernel lacks what is needed.
    #[error("the kernel cannot page another process's memory on demand; Linux 6.7 or later is needed")]
    Kernel {
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The bits are those of other regions.
    #[error("the bits of delivered pages do not fit the regions; give those that were made for them")]
    Bits,
    /// A part of a region could not be registered or released.
    #[error(
        "cannot register the memory at {addr:#x} of process {pid} for paging; does somebody else serve it?"
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
    /// What is present where a page is to come could not be dropped.
    #[error("cannot drop what is at {addr:#x} of process {pid}; is its memory locked, or its file sealed?")]
    Drop {
        /// The process's pid.
        pid: i32,
        /// Where it begins.
        addr: u64,
        /// What the kernel said, if it was asked by us.
        #[source]
        source: Option<io::Error>,
    },
    /// A page that is to come is there already, again and again: its zeros would be read.
    #[error(
        "the page at {addr:#x} of process {pid} comes back each time it is dropped; does its RAM still run?"
    )]
    Present {
        /// The process's pid.
        pid: i32,
        /// Address of the page.
        addr: u64,
    },
    /// The descriptor that was to be taken over is none of a pager.
    #[error(
        "descriptor {fd} of process {pid} is not that of a pager; nobody can deliver its missing pages any more"
    )]
    NotPager {
        /// The process's pid.
        pid: i32,
        /// Its number in the process.
        fd: i32,
    },
    /// The memory that was to be taken over is not registered, so that missing pages may have been read as zero.
    #[error(
        "the memory at {addr:#x} of process {pid} is not paged; missing pages may have been read as zero"
    )]
    NotBegun {
        /// The process's pid.
        pid: i32,
        /// Where it begins.
        addr: u64,
    },
    /// Faults could not be read.
    #[error("cannot read the page faults of process {pid}")]
    Events {
        /// The process's pid.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A page could not be put in place.
    #[error("cannot fill the page at {addr:#x} of process {pid}; is there memory left?")]
    Fill {
        /// The process's pid.
        pid: i32,
        /// Address of the page.
        addr: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A discard did not end, so that nothing could be put in place.
    #[error(
        "the page at {addr:#x} of process {pid} cannot be filled while a discard lasts; are its faults read?"
    )]
    Stuck {
        /// The process's pid.
        pid: i32,
        /// Address of the page.
        addr: u64,
    },
    /// Pieces of too many huge pages came at once: they wait in our memory for the rest.
    #[error(
        "the RAM of process {pid} in huge pages comes in pieces of too many at once; send one after the other"
    )]
    Scattered {
        /// The process's pid.
        pid: i32,
    },
    /// Pages are missing still: without a pager they would be read as zero.
    #[error(
        "{pages} pages of process {pid} are missing still; the pager cannot end before they are delivered"
    )]
    Missing {
        /// The process's pid.
        pid: i32,
        /// How many.
        pages: u64,
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
    /// The bytes are not whole pages.
    #[error("{bytes} bytes are not whole pages")]
    Length {
        /// Bytes given.
        bytes: usize,
    },
}

impl From<ProcessError> for PagerError {
    fn from(error: ProcessError) -> PagerError {
        match error {
            ProcessError::Gone { pid } => PagerError::Gone { pid },
            other => PagerError::Process(other),
        }
    }
}

impl From<AttachError> for PagerError {
    fn from(error: AttachError) -> PagerError {
        match error {
            AttachError::Gone { pid } => PagerError::Gone { pid },
            other => PagerError::Attach(other),
        }
    }
}

impl From<BackingError> for PagerError {
    fn from(error: BackingError) -> PagerError {
        match error {
            BackingError::Process(error) => error.into(),
            other => PagerError::Backing(other),
        }
    }
}

impl From<PopulatedError> for PagerError {
    fn from(error: PopulatedError) -> PagerError {
        match error {
            PopulatedError::Process(error) => error.into(),
            PopulatedError::Backing(error) => error.into(),
            other => PagerError::Populated(other),
        }
    }
}
