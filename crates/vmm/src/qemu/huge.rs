//! Huge pages of hugetlbfs that a VM needs, and whether this host has them free.
//!
//! QEMU reserves them when it maps its memory and does not start without; a guest whose memory cannot reserve any is killed at
//! its first touch of a page that is not there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::types::{Code, Reason};

/// Where the kernel tells of its pools (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Type of such a file system (`HUGETLBFS_MAGIC` of linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Huge pages of one size that a part of a VM's memory takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// Size of one.
    pub page_bytes: u64,
    /// How much memory is in them.
    pub bytes: u64,
}

/// What a file in a folder takes, or the file itself if it is there: nothing if that is no hugetlbfs.
pub(super) fn in_folder(path: &str, bytes: u64) -> Option<HugePages> {
    let path = Path::new(path);
    let there = if path.exists() { path } else { path.parent()? };
    let system = rustix::fs::statfs(there).ok().filter(|system| system.f_type == HUGETLBFS_MAGIC)?;
    // What the file holds already is taken.
    let held = fs::metadata(path).ok().filter(fs::Metadata::is_file).map_or(0, |file| file.blocks() * 512);
    Some(HugePages { page_bytes: u64::try_from(system.f_bsize).ok()?, bytes: bytes.saturating_sub(held) })
}

/// The size that the kernel gives who names none.
pub(super) fn default_page_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// A reason for each size of which too few are free.
pub(super) fn reasons(needed: &[HugePages]) -> Vec<Reason> {
    let mut sizes: Vec<u64> =
        needed.iter().map(|pages| pages.page_bytes).filter(|bytes| *bytes > 0).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let lacking = sizes.into_iter().filter_map(|size| {
        let of_size = needed.iter().filter(|pages| pages.page_bytes == size);
        let count = of_size.fold(0u64, |sum, pages| sum.saturating_add(pages.bytes.div_ceil(size)));
        let free = free_pages(size);
        (free < count).then(|| {
            format!(
                "the target has {free} huge pages of {} KiB to give and the VM needs {count}; reserve more \
                 ({POOLS}/hugepages-{0}kB/nr_hugepages), or choose another host",
                size >> 10
            )
        })
    });
    lacking.map(|text| Reason::new(Code::Memory, text)).collect()
}

/// Pages that are free and not promised to anybody, and those that the kernel may still make when asked.
fn free_pages(size: u64) -> u64 {
    let number = |name: &str| -> u64 {
        let text = fs::read_to_string(format!("{POOLS}/hugepages-{}kB/{name}_hugepages", size >> 10));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    let unpromised = number("free").saturating_sub(number("resv"));
    unpromised.saturating_add(number("nr_overcommit").saturating_sub(number("surplus")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn each_size_that_is_short_is_named() {
        assert_eq!(reasons(&[]), []);
        let pages = |page_bytes, bytes| HugePages { page_bytes, bytes };
        let found = reasons(&[pages(2 << 20, GIB << 20), pages(2 << 20, 1), pages(GIB, GIB << 20)]);
        let texts: Vec<_> = found.iter().map(|reason| reason.text.as_str()).collect();
        assert_eq!(texts.len(), 2, "{texts:?}");
        assert!(texts[0].contains("2048 KiB to give and the VM needs 536870913;"), "{texts:?}");
        assert!(texts[1].contains("1048576 KiB to give and the VM needs 1048576;"), "{texts:?}");
    }

    #[test]
    fn ordinary_folders_have_no_huge_pages() {
        assert_eq!(in_folder("/tmp", GIB), None);
        assert_eq!(in_folder("/nowhere/at/all", GIB), None);
    }
}
