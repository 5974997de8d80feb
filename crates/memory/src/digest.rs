//! A digest of a region's content, to prove that two machines hold the same RAM.

use crate::backing::BackingError;
use crate::copy::{CopyError, Reader};
use crate::page::{PAGE, PageRun, Region, is_zero};
use crate::populated::{PopulatedError, populated};
use crate::process::{Process, ProcessError};

/// Pages read and hashed at once: 1 MiB, long enough for the widest vector code of BLAKE3.
const PAGES_PER_BATCH: u64 = 256;

/// Why a digest could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DigestError {
    /// The process could not be asked.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The mappings behind the region could not be read.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The populated pages could not be found.
    #[error(transparent)]
    Populated(#[from] PopulatedError),
    /// A page could not be read.
    #[error(transparent)]
    Copy(#[from] CopyError),
}

/// The BLAKE3 hash over every page that is not all zero, in order: its index (8 bytes, little-endian), then its bytes.
///
/// Equal content gives an equal digest, however it is laid out: a hole and a page of zeros are the same. Holes are never
/// read. The process must be stopped, or the digest is one of no single moment.
pub fn digest(process: &Process, region: &Region) -> Result<[u8; 32], DigestError> {
    let mut runs = Vec::new();
    populated(process, region, &mut runs)?;
    let reader = Reader::new(process)?;
    let mut hasher = blake3::Hasher::new();
    let mut bytes = vec![0u8; (PAGES_PER_BATCH * PAGE) as usize];
    let mut input = Vec::with_capacity(bytes.len() + PAGES_PER_BATCH as usize * size_of::<u64>());
    for run in runs {
        let mut first = run.first;
        while first < run.end() {
            let part = PageRun { first, pages: (run.end() - first).min(PAGES_PER_BATCH) };
            let bytes = &mut bytes[..part.bytes() as usize];
            reader.read(&[region.span(part)], bytes)?;
            input.clear();
            for (index, page) in (first..).zip(bytes.chunks_exact(PAGE as usize)).filter(|(_, p)| !is_zero(p))
            {
                input.extend_from_slice(&index.to_le_bytes());
                input.extend_from_slice(page);
            }
            hasher.update(&input);
            first = part.end();
        }
    }
    Ok(*hasher.finalize().as_bytes())
}
