//! Huge pages of the machine, reserved for a test or a benchmark and given back.

use std::fs::{self, File};
use std::path::Path;

use crate::LabError;

/// How many huge pages of the default size the machine keeps (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Who holds this file locked is the one who reserves.
const TURN: &str = "sterna-lab-huge-pages.lock";

/// Huge pages that are free as long as this lives, beside those that the machine had before.
///
/// There is one pool for the whole machine and whoever is quick takes from it. So reservations of this kind exclude each
/// other, also those of other processes: the second waits until the first is dropped.
#[derive(Debug)]
pub struct HugePages {
    added: u64,
    _turn: File,
}

impl HugePages {
    /// Reserves so many pages of the default size.
    ///
    /// # Errors
    ///
    /// The pool cannot be changed (it takes root), or the kernel finds less than so many pages in one piece.
    pub fn reserve(pages: u64) -> Result<Self, LabError> {
        let path = std::env::temp_dir().join(TURN);
        let locked = File::create(&path).and_then(|file| file.lock().map(|()| file));
        let turn = locked.map_err(|source| LabError::File { action: "lock", path, source })?;
        let before = pool()?;
        set_pool(before + pages)?;
        let reserved = Self { added: pool()?.saturating_sub(before), _turn: turn };
        if reserved.added < pages {
            return Err(LabError::TooFewHugePages { wanted: pages, found: reserved.added });
        }
        Ok(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // What others changed in the meantime stays; and there is nobody left to tell of an error.
        drop(pool().and_then(|pages| set_pool(pages.saturating_sub(self.added))));
    }
}

fn pool() -> Result<u64, LabError> {
    let failed = |source| LabError::File { action: "read", path: Path::new(POOL).into(), source };
    let text = fs::read_to_string(POOL).map_err(failed)?;
    text.trim().parse().map_err(|_| failed(std::io::ErrorKind::InvalidData.into()))
}

fn set_pool(pages: u64) -> Result<(), LabError> {
    let failed = |source| LabError::File { action: "write", path: Path::new(POOL).into(), source };
    fs::write(POOL, pages.to_string()).map_err(failed)
}
