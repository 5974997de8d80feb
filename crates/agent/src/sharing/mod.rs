//! Pages that VMs which leave together have in common, or one VM in several places: each content travels once, and is shared at the target too.
//!
//! After Eswaran et al., "Sharing-aware live migration" (CCGRID 2024), and, where it is asked for, Deshpande et al., "Live gang migration of virtual
//! machines" (HPDC 2011), which hashes. Whatever has left two pages on one frame at the source (KSM, a private mapping of one file,
//! an earlier migration) is seen in the page tables. Bytes are compared all the same before a page counts as another's: frames are used again.
//!
//! ```text
//! gang   who leaves together, and waits for whom     send    each content is sent once, into a store, and bytes are compared
//! find   pages on one frame, or of one hash          store   a store at the target: filled, sealed, mapped, forgotten
//! ```
//!
//! It all happens before the first round, while tracking is on already: what is written after it was compared is found by the next scan, and
//! travels like any other page.

mod find;
mod gang;
mod send;
mod store;

use sterna_engine::wire::common::Run;

pub(crate) use gang::{Gang, Member, Room, Seat, Told};
pub(crate) use send::Held;
pub(crate) use store::{Stores, receive};

use crate::pages::SourceBlock;
use std::sync::Arc;
use sterna_memory::PageRun;

/// How many mappings a process may have.
const MAX_MAP_COUNT: &str = "/proc/sys/vm/max_map_count";

/// What a VM's migration hears.
pub(crate) enum Word {
    /// Where its pages will lie: the target may map them while they come.
    Found(Found),
    /// All that will come has come, and which of these pages are not what lies there.
    Compared(Compared),
}

/// What the comparison of bytes has found.
#[derive(Default)]
pub(crate) struct Compared {
    /// Block by block the pages that must be sent all the same.
    pub(crate) different: Vec<Vec<PageRun>>,
    /// Keeps the store at the target.
    #[expect(dead_code, reason = "it is there to be dropped")]
    pub(crate) held: Option<Arc<Held>>,
}

/// What was found of one VM.
#[derive(Default)]
pub(crate) struct Found {
    /// The store, empty where nothing is in common.
    pub(crate) store: Vec<u8>,
    /// Its pages there, ascending.
    pub(crate) runs: Vec<Run>,
    /// Pages that are in common and travel as bytes all the same: more mappings than these are not to be had.
    pub(crate) fallbacks: u64,
    /// Bytes that are sent into the store because of this VM, or of it first.
    pub(crate) bytes: u64,
}

impl Found {
    /// Leaves out the shortest runs where the target can map only so many.
    pub(crate) fn limit(&mut self, room: usize) {
        if self.runs.len() > room {
            self.runs.sort_by_key(|run| std::cmp::Reverse(run.pages));
            let excess = self.runs.split_off(room);
            self.fallbacks += excess.iter().map(|run| u64::from(run.pages)).sum::<u64>();
            self.runs.sort_by_key(|run| (run.block, run.first));
        }
        if self.runs.is_empty() {
            self.store.clear();
        }
    }

    /// The pages of its first runs, block by block.
    pub(crate) fn pages(&self, blocks: &[SourceBlock], runs: usize) -> Vec<Vec<PageRun>> {
        let mut pages = vec![Vec::new(); blocks.len()];
        for run in &self.runs[..runs.min(self.runs.len())] {
            if let Some(at) = blocks.iter().position(|block| block.index == run.block) {
                let run = PageRun { first: run.first.into(), pages: run.pages.into() };
                sterna_memory::append_run(&mut pages[at], run);
            }
        }
        pages
    }
}

/// Gives processes of this host room for so many mappings, if they have less.
pub(crate) fn raise_map_count(wanted: Option<u64>) {
    let Some(wanted) = wanted else { return };
    let now = std::fs::read_to_string(MAX_MAP_COUNT).ok().and_then(|text| text.trim().parse::<u64>().ok());
    if now.is_some_and(|now| now >= wanted) {
        return;
    }
    match std::fs::write(MAX_MAP_COUNT, wanted.to_string()) {
        Ok(()) => tracing::info!(?now, wanted, "vm.max_map_count is raised"),
        Err(why) => {
            tracing::warn!(%why, wanted, "vm.max_map_count cannot be raised: less is shared here than could be")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_target_has_no_room_for_is_the_shortest() {
        let run = |first, pages| Run { block: 0, first, pages, at: first };
        let all = vec![run(0, 1), run(10, 9), run(20, 2), run(30, 8)];
        let found = || Found { store: vec![1], runs: all.clone(), fallbacks: 1, bytes: 0 };
        let mut some = found();
        some.limit(2);
        assert_eq!((some.runs, some.fallbacks), (vec![run(10, 9), run(30, 8)], 4));
        let (mut enough, mut none) = (found(), found());
        enough.limit(4);
        none.limit(0);
        assert_eq!((enough.runs, enough.fallbacks), (all, 1));
        assert!(none.runs.is_empty() && none.store.is_empty() && none.fallbacks == 21, "nothing is mapped");
    }
}
