//! Whether this host can do what this crate does: tried on ourselves, not guessed from a version.

use std::fs::File;

use crate::page::{PAGE, Region};
use crate::sys::pagemap::{PRESENT, PageMap, Query};
use crate::sys::uffd::{TRACK_FEATURES, Uffd};

/// `CAP_SYS_PTRACE` and `CAP_SYS_ADMIN` of linux/capability.h.
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;

/// Finds out whether memory of other processes can be tracked and copied here; else every reason, with what to do about it.
pub fn preflight() -> Result<(), Vec<String>> {
    let reasons: Vec<String> = [scan(), track(), capabilities(), yama()].into_iter().flatten().collect();
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}

fn scan() -> Option<String> {
    let here = [0u8; 1];
    let base = (&raw const here).addr() as u64 / PAGE * PAGE;
    let page = Region { base, bytes: PAGE };
    let tried = File::open("/proc/self/pagemap").and_then(|file| {
        let query = Query { all: PRESENT, tell: PRESENT, ..Query::default() };
        PageMap::new(file).scan(query, page.base, page.end(), |_, _, _| {})
    });
    tried.err().map(|e| {
        format!(
            "The kernel has no PAGEMAP_SCAN ({e}); boot Linux 6.7 or later with CONFIG_PROC_PAGE_MONITOR."
        )
    })
}

fn track() -> Option<String> {
    let uffd = match Uffd::own() {
        Ok(fd) => fd,
        Err(e) => {
            return Some(format!(
                "userfaultfd(2) does not work ({e}); boot a kernel with CONFIG_USERFAULTFD."
            ));
        }
    };
    let tried = Uffd::with_features(uffd, TRACK_FEATURES);
    tried.err().map(|e| {
        format!("The kernel cannot track writes asynchronously ({e}); boot Linux 6.7 or later (UFFD_FEATURE_WP_ASYNC).")
    })
}

fn capabilities() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    let needed = [(CAP_SYS_PTRACE, "CAP_SYS_PTRACE"), (CAP_SYS_ADMIN, "CAP_SYS_ADMIN")];
    let missing: Vec<&str> =
        needed.iter().filter(|(bit, _)| effective & 1 << bit == 0).map(|(_, n)| *n).collect();
    let text = || format!("The privilege {} is missing; run the agent as root.", missing.join(" and "));
    (!missing.is_empty()).then(text)
}

fn yama() -> Option<String> {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    (scope.trim() == "3").then(|| {
        "kernel.yama.ptrace_scope is 3, which forbids attaching even to root; set it to 2 or less and reboot.".to_owned()
    })
}
