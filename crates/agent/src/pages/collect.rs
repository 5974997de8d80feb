//! What of a VM's memory is to be sent: found by scans, kept until a sender takes it.
//!
//! # On hardware that writes memory
//!
//! A disk that is read directly (`cache=none`) is read by hardware, right into pages of the guest. The kernel pins such a page
//! when the read is *submitted*: that counts as a write, and a scan reports the page. What the hardware puts there later
//! counts as nothing. So a page that a scan reports, and arms again, may change after it was sent and never be reported again.
//!
//! Whatever was reported by a scan is therefore *at risk* until all disk I/O that was in flight then has come to an end,
//! which QEMU waits for when the VM is stopped ([`Vmm::drain`](sterna_vmm::Vmm::drain)). After that, pages at risk that were
//! sent already are read once more and compared with what was sent ([`SentHashes`](super::SentHashes)): those that differ are
//! sent again. That is done at the stop, or before it while the VM runs, when they are many.

use super::{PAGES_PER_STRIPE, SendSet, SourceBlock, intersect, merge, stripes_of, subtract};
use crate::control::explain;
use std::sync::Arc;
use sterna_engine::policy::writers;
use sterna_memory::{
    Attach, Backing, PageRun, PopulatedError, Process, Region, TrackError, Tracker, WpAsyncTracker, emptied,
    mapped, may_merge, merged, own, own_within, populated, populated_all, populated_and_own, with_data,
};

/// Who may write the VM's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writers {
    /// Processors alone, or QEMU in their place: each write is seen as it happens.
    Processors,
    /// Disks too, at a time of their own.
    Disks,
}

/// Whether what the guest gives back is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Discards {
    Followed,
    /// In a test, which must fail then.
    Ignored,
}

/// The tracking of one VM, and what it has found.
pub(crate) struct Collector {
    process: Process,
    blocks: Arc<Vec<SourceBlock>>,
    tracker: Box<dyn Tracker>,
    writers: Writers,
    set: SendSet,
    /// What the senders were given last and may not have sent yet.
    sending: Arc<SendSet>,
    discards: Discards,
    /// One list a block; empty where only processors write.
    at_risk: Vec<Vec<PageRun>>,
    /// What of a clone was its own at any time, one list a block; of other VMs what of their pages in common was their own at the last look.
    touched: Vec<Vec<PageRun>>,
    /// Pages that are a template's, and travel only once they are written.
    shared: u64,
    /// The VM was stopped before the last scan.
    is_still: bool,
}

impl Collector {
    /// Begins to track. Nothing is to be sent yet: see [`Collector::begin`].
    pub(crate) fn arm(
        process: Process,
        blocks: Arc<Vec<SourceBlock>>,
        attach: &Attach,
        writers: Writers,
    ) -> Result<Self, String> {
        let regions: Vec<Region> = blocks.iter().map(|block| block.region).collect();
        let tracker = WpAsyncTracker::start(&process, regions, attach)
            .map_err(|why| format!("the VM's memory cannot be tracked: {}", explain(&why)))?;
        let set = SendSet::new(blocks.len());
        let at_risk = vec![Vec::new(); blocks.len()];
        let touched = at_risk.clone();
        let (tracker, sending, discards) = (Box::new(tracker), Arc::default(), Discards::Followed);
        Ok(Self {
            process,
            blocks,
            tracker,
            writers,
            set,
            sending,
            discards,
            at_risk,
            touched,
            shared: 0,
            is_still: false,
        })
    }

    /// Leaves pages that the guest gave back at the target: a test sees then that they must not be.
    pub(crate) fn ignore_discards(&mut self) {
        self.discards = Discards::Ignored;
    }

    /// Starts with every page that may not be zero. I/O that was in flight when the tracking began must be over by now.
    pub(crate) fn begin(&mut self) -> Result<(), String> {
        let plain = |block: &&SourceBlock| !has_common(block);
        let regions: Vec<Region> = self.blocks.iter().filter(plain).map(|block| block.region).collect();
        let mut there = populated_all(&self.process, &regions).map_err(|why| unseen(&why))?.into_iter();
        for at in 0..self.blocks.len() {
            let block = &self.blocks[at];
            let mut pages = match has_common(block) {
                true => {
                    let found = populated_and_own(&self.process, &block.region, &block.common);
                    let (pages, own) = found.map_err(|why| unseen(&why))?;
                    self.touched[at] = intersect(&own, &block.common);
                    pages
                }
                false => there.next().unwrap_or_default(),
            };
            if self.blocks[at].backing == Backing::Template {
                // The target has all of the template: what became zero here is not zero there.
                self.blocks[at].sent.set_runs(&pages);
                let all = pages;
                pages = merge(&self.own(at)?, &self.blocks[at].common);
                self.shared += subtract(&all, &pages).iter().map(|run| run.pages).sum::<u64>();
                self.touched[at].clone_from(&pages);
            } else if !has_common(&self.blocks[at]) {
                self.touched[at] = self.own_of_common(at)?;
            }
            self.set.add(at, &pages, &[]);
        }
        self.set.hot = self.hot_stripes()?;
        Ok(())
    }

    /// The target has these pages of the send-set as they are.
    pub(crate) fn is_there(&mut self, block: usize, pages: &[PageRun]) {
        self.set.pages[block] = subtract(&self.set.pages[block], pages);
    }

    /// The target shows something in these pages, whatever it is.
    pub(crate) fn shows_something(&self, block: usize, pages: &[PageRun]) {
        self.blocks[block].sent.set_runs(pages);
    }

    /// Takes what is to be sent of a block out of the send-set.
    pub(crate) fn hold_back(&mut self, block: usize) -> Vec<PageRun> {
        std::mem::take(&mut self.set.pages[block])
    }

    /// The VM stands still, and was scanned since: it gives nothing back any more. What saving its devices writes is seen all the same.
    pub(crate) fn stands_still(&mut self) {
        self.is_still = true;
    }

    /// Adds to the send-set what was written, and what was sent and is a hole now, since the last scan.
    pub(crate) fn scan(&mut self) -> Result<(), String> {
        for at in 0..self.blocks.len() {
            let (pages, holes) = self.changed(at)?;
            let pages = self.without_merged(at, pages)?;
            self.set.add(at, &pages, &holes);
            if self.writers == Writers::Disks {
                self.at_risk[at] = merge(&subtract(&self.at_risk[at], &holes), &pages);
            }
        }
        Ok(())
    }

    /// Pages that the kernel has merged with others look written. They are compared with what was sent, where that is known, and else sent again.
    fn without_merged(&mut self, at: usize, pages: Vec<PageRun>) -> Result<Vec<PageRun>, String> {
        let block = &self.blocks[at];
        if pages.is_empty() || block.hashes.is_none() || !may_merge(&self.process) {
            return Ok(pages);
        }
        let mut found = Vec::new();
        merged(&self.process, &block.region, &pages, &mut found).map_err(|why| unseen(&why))?;
        let suspects = &mut self.set.suspects[at];
        *suspects = merge(suspects, &found);
        Ok(subtract(&pages, &found))
    }

    /// Adds pages that were to be sent in a round that was abandoned. What the last scan says of them comes first.
    pub(crate) fn add_left(&mut self, left: Vec<(usize, PageRun)>) {
        let mut lists = vec![Vec::new(); self.blocks.len()];
        left.into_iter().for_each(|(at, run)| lists[at].push(run));
        for (at, list) in lists.iter().enumerate() {
            let pages = subtract(&merge(list, &[]), &self.set.holes[at]);
            self.set.add(at, &pages, &[]);
        }
    }

    /// Pages that were written, and pages that were sent and are holes now.
    fn changed(&mut self, at: usize) -> Result<(Vec<PageRun>, Vec<PageRun>), String> {
        let Self { blocks, tracker, .. } = self;
        let block = &blocks[at];
        let unscanned = |why: TrackError| format!("the VM's memory cannot be scanned: {}", explain(&why));
        let (mut pages, mut absent) = (Vec::new(), Vec::new());
        if block.backing == Backing::HugePages {
            tracker.collect(at, &mut pages).map_err(unscanned)?;
            let (there, sent) = (self.populated(at)?, self.sent(at));
            let kept = subtract(&intersect(&sent, &there), &pages);
            let region = &self.blocks[at].region;
            let emptied = emptied(&self.process, region, &kept, Backing::HugePages.granule());
            let holes = merge(&subtract(&sent, &there), &emptied.map_err(|why| unseen(&why))?);
            return Ok((intersect(&pages, &there), holes));
        }
        tracker.collect_sorted(at, &mut pages, &mut absent).map_err(unscanned)?;
        if block.backing == Backing::Template {
            let told = merge(&merge(&pages, &absent), &self.returned(at)?);
            return Ok((self.changed_of_clone(at, &told)?, Vec::new()));
        }
        if !block.common.is_empty() {
            // What the guest has given back there shows what is in common again, and is no hole.
            let shown = intersect(&absent, &block.common);
            absent = subtract(&absent, &shown);
            let back = self.returned(at)?;
            pages = merge(&merge(&pages, &shown), &back);
        }
        let block = &self.blocks[at];
        if block.backing == Backing::Anonymous {
            return Ok((pages, intersect(&absent, &self.sent(at))));
        }
        // A discard in a file is not reported as a write. But what was sent was read through the mapping: it is mapped, or it is
        // a hole, or the kernel has reclaimed it. Which, the file tells.
        let mut there = Vec::new();
        mapped(&self.process, &block.region, &mut there).map_err(|why| unseen(&why))?;
        let there = merge(&there, &block.common);
        let gone = subtract(&self.sent(at), &there);
        let data = with_data(&self.process, &self.blocks[at].region, &merge(&gone, &absent));
        let data = data.map_err(|why| unseen(&why))?;
        Ok((merge(&pages, &intersect(&absent, &data)), subtract(&gone, &data)))
    }

    /// What the target may hold of a block. While the VM is being stopped the senders are still at work: what they were given
    /// counts, for they may come to it after this.
    fn sent(&self, block: usize) -> Vec<PageRun> {
        if self.discards == Discards::Ignored {
            return Vec::new();
        }
        let sending = self.sending.pages.get(block).map_or(&[][..], Vec::as_slice);
        merge(&self.blocks[block].sent.runs(), sending)
    }

    /// What of a clone is to be sent of the pages that a scan tells: its own, and those that were its own and are the template's again, for
    /// the target has another content of them.
    fn changed_of_clone(&mut self, at: usize, told: &[PageRun]) -> Result<Vec<PageRun>, String> {
        let mut own = Vec::new();
        own_within(&self.process, &self.blocks[at].region, told, &mut own).map_err(|why| unseen(&why))?;
        let own = merge(&own, &intersect(told, &self.blocks[at].common));
        let pages = merge(&own, &intersect(told, &self.touched[at]));
        self.touched[at] = merge(&self.touched[at], &pages);
        Ok(pages)
    }

    /// What a clone has written.
    fn own(&self, block: usize) -> Result<Vec<PageRun>, String> {
        let mut pages = Vec::new();
        own(&self.process, &self.blocks[block].region, &mut pages).map_err(|why| unseen(&why))?;
        Ok(pages)
    }

    /// What of its pages in common a VM has written.
    fn own_of_common(&self, block: usize) -> Result<Vec<PageRun>, String> {
        let mut pages = Vec::new();
        let block = &self.blocks[block];
        if block.common.is_empty() {
            return Ok(pages);
        }
        own_within(&self.process, &block.region, &block.common, &mut pages).map_err(|why| unseen(&why))?;
        Ok(pages)
    }

    /// Pages in common that were the VM's own at the last look and are not any more: a discard there is not reported as a write.
    fn returned(&mut self, block: usize) -> Result<Vec<PageRun>, String> {
        if self.blocks[block].common.is_empty() || self.is_still {
            return Ok(Vec::new());
        }
        let own = self.own_of_common(block)?;
        let back = subtract(&intersect(&self.touched[block], &self.blocks[block].common), &own);
        if self.blocks[block].backing != Backing::Template {
            self.touched[block] = own;
        }
        Ok(back)
    }

    fn populated(&self, block: usize) -> Result<Vec<PageRun>, String> {
        let mut pages = Vec::new();
        populated(&self.process, &self.blocks[block].region, &mut pages).map_err(|why| unseen(&why))?;
        Ok(pages)
    }

    /// What was at risk is compared with what was sent. All disk I/O that was in flight at the last scan must be over by now.
    pub(crate) fn settle(&mut self) {
        for at in 0..self.blocks.len() {
            self.set.suspects[at] = merge(&self.set.suspects[at], &self.unsettled(at));
            self.at_risk[at].clear();
        }
    }

    /// Pages at risk that were sent, and are not to be sent anyway.
    fn unsettled(&self, at: usize) -> Vec<PageRun> {
        subtract(&subtract(&self.at_risk[at], &self.set.pages[at]), &self.set.holes[at])
    }

    /// Pages that a stop would have to compare.
    pub(crate) fn unsettled_count(&self) -> u64 {
        (0..self.blocks.len()).flat_map(|at| self.unsettled(at)).map(|run| run.pages).sum()
    }

    /// Pages that need not travel, since the target has them in a template.
    pub(crate) fn shared_pages(&self) -> u64 {
        self.shared
    }

    /// Pages to be read and sent.
    pub(crate) fn page_count(&self) -> u64 {
        self.set.page_count()
    }

    /// What is to be sent, as far as it is known.
    pub(crate) fn set(&self) -> &SendSet {
        &self.set
    }

    /// Takes the send-set for the senders, and begins an empty one.
    pub(crate) fn take(&mut self) -> Arc<SendSet> {
        self.sending = Arc::new(std::mem::replace(&mut self.set, SendSet::new(self.blocks.len())));
        self.sending.clone()
    }

    /// How many pages were written since the last scan.
    pub(crate) fn peek(&mut self) -> Result<u64, String> {
        let mut count = 0;
        for at in 0..self.blocks.len() {
            let (mut found, mut alike) = (Vec::new(), Vec::new());
            self.tracker.peek(at, &mut found).map_err(|why| explain(&why))?;
            if !found.is_empty() {
                // The kernel merges pages of a VM that is stopped, too.
                merged(&self.process, &self.blocks[at].region, &found, &mut alike)
                    .map_err(|why| unseen(&why))?;
            }
            count += subtract(&found, &alike).iter().map(|run| run.pages).sum::<u64>();
        }
        Ok(count)
    }

    /// Which stripes of each block are written most, as far as it shows already: the fewest that account for most of what was written
    /// since the last scan, ascending.
    fn hot_stripes(&mut self) -> Result<Vec<Vec<u64>>, String> {
        let (mut stripes, mut counts) = (Vec::new(), Vec::new());
        for at in 0..self.blocks.len() {
            let mut written = Vec::new();
            self.tracker.peek(at, &mut written).map_err(|why| explain(&why))?;
            for stripe in written.into_iter().flat_map(stripes_of) {
                let number = stripe.first / PAGES_PER_STRIPE;
                match stripes.last() {
                    Some(&last) if last == (at, number) => {
                        *counts.last_mut().unwrap_or(&mut 0) += stripe.pages
                    }
                    _ => {
                        stripes.push((at, number));
                        counts.push(stripe.pages);
                    }
                }
            }
        }
        let mut hot = vec![Vec::new(); self.blocks.len()];
        for (at, number) in writers(&counts).into_iter().map(|most| stripes[most]) {
            hot[at].push(number);
        }
        Ok(hot)
    }

    /// Ends the tracking and leaves the process as it was.
    pub(crate) fn stop(self) -> Result<(), String> {
        self.tracker.stop().map_err(|why| explain(&why))
    }
}

/// Whether a block is plain memory of which other VMs have a part too.
fn has_common(block: &SourceBlock) -> bool {
    block.backing == Backing::Anonymous && !block.common.is_empty()
}

fn unseen(why: &PopulatedError) -> String {
    format!("the VM's memory cannot be looked at: {}", explain(why))
}
