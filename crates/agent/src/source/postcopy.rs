//! What the source of a post-copy does: it tells what is missing, and serves it.

use super::{Event, Outgoing};
use crate::control::{self, CONNECT_WITHIN, FIRST_MESSAGE_WITHIN, explain};
use crate::fit;
use crate::offer;
use crate::pages::{SendSet, Serving, SourceBlock, intersect, merge, rounded, subtract};
use std::sync::Arc;
use std::time::{Duration, Instant};
use sterna_engine::Source;
use sterna_engine::source::Postcopy;
use sterna_engine::units::Pages;
use sterna_engine::wire::Message;
use sterna_engine::wire::message::{BlockDigest, Filled, Purpose, Reattach, Text};
use sterna_memory::{Backing, PAGE, PageRun, own, populated};
use sterna_transport::Connection;

/// How long a target that closes the connections of pages may take to say on the control connection that it has all of them: it lets go of the
/// VM's memory first, and writes that down. One that has lost a connection closes the control connection too, which is noticed at once.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How far this migration is with post-copy.
#[derive(Default)]
pub(super) struct Lazily {
    /// When it switches.
    pub(super) when: Postcopy,
    /// Somebody wants it to switch, and has not been told that it cannot.
    pub(super) asked: bool,
    /// Open and not used yet.
    pub(super) demand: Option<Connection>,
    /// Places of blocks that must be complete before the VM runs at the target.
    pub(super) eager: Vec<u32>,
    /// The stop that comes, or has come, is a switch.
    pub(super) switched: bool,
    /// Push streams: as many as the rounds have, or as many as are usual here.
    pub(super) streams: u32,
    /// Bytes of each block of the offer, as they travel.
    pub(super) bytes: Vec<u64>,
    /// Counts the times that the connections were made anew.
    pub(super) connections: u64,
    serving: Option<Serving>,
    /// What the target's QEMU will read as it loads the devices, block by block: it is sent before it is asked for.
    first: Vec<Vec<PageRun>>,
    /// The target has said that it has all pages.
    filled: bool,
    /// A connection that carries pages is lost, and when that counts.
    fading: Option<(u64, String, Instant)>,
    /// What was not missing at the switch, added up, where RAM is to be proved equal.
    present: Vec<BlockDigest>,
}

impl Lazily {
    pub(super) fn with_streams(streams: u32) -> Self {
        Self { streams, ..Self::default() }
    }

    pub(super) fn disconnect(&mut self) {
        self.connections += 1;
        self.demand = None;
        self.serving = None;
        self.fading = None;
    }

    /// A connection that carries pages is lost: the target may be about to say that it needs no more.
    pub(super) fn fade(&mut self, of: u64, why: String) {
        self.fading.get_or_insert((of, why, Instant::now() + LAST_WORDS));
    }

    /// How long until that counts.
    pub(super) fn fades_in(&self) -> Duration {
        let left = |(_, _, until): &(u64, String, Instant)| until.saturating_duration_since(Instant::now());
        self.fading.as_ref().map_or(Duration::MAX, left)
    }

    /// What has been lost so long ago that it counts.
    pub(super) fn faded(&mut self) -> Option<(u64, String)> {
        let due = |(_, _, until): &mut (u64, String, Instant)| Instant::now() >= *until;
        self.fading.take_if(due).map(|(of, why, _)| (of, why))
    }
}

impl Outgoing {
    /// The blocks whose writes are followed: where no page travels before the stop, only those that must be complete at it.
    pub(super) fn tracked(&self) -> Arc<Vec<SourceBlock>> {
        if self.tracks_all() {
            return self.blocks.clone();
        }
        let eager = self.blocks.iter().filter(|block| self.is_eager(block));
        Arc::new(eager.map(SourceBlock::another).collect())
    }

    /// Whether the writes of all blocks are followed.
    fn tracks_all(&self) -> bool {
        self.lazy.when != Postcopy::AtOnce || self.sharing.is_on()
    }

    pub(super) fn is_eager(&self, block: &SourceBlock) -> bool {
        self.lazy.eager.contains(&u32::from(block.index))
    }

    /// The last round of a post-copy: what is missing is told, and only what must be there is sent. From here on the target may ask for pages.
    pub(super) fn finish_postcopy(&mut self, round: u32) -> Result<Pages, String> {
        let set = self.collector()?.take();
        let missing = self.missing(&set)?;
        let digests = if self.verify { self.sums_without(&missing)? } else { Vec::new() };
        let eager = self.eager_part(&set);
        if let Some(senders) = &self.senders {
            senders.finish(round, eager, self.lists(&missing));
        }
        self.round = round;
        self.lazy.present.clone_from(&digests);
        self.end_state(round, digests, true)?;
        // What the target asks for meanwhile waits; what it is sent unasked must not delay the state.
        self.serve(&missing)?;
        self.look_again()
    }

    /// Tells ahead what the target is to drop. Pages that are written until the stop join them.
    pub(super) fn tell_stale(&mut self, round: u32) -> Result<(), String> {
        let set = self.collector()?.set().clone();
        let lists = self.lists(&self.missing(&set)?);
        if let Some(senders) = &self.senders {
            senders.tell(round, self.blocks.len(), lists);
        }
        self.round = round;
        Ok(())
    }

    /// What the target does not have, or not as it is here, block by block.
    fn missing(&self, set: &SendSet) -> Result<Vec<Vec<PageRun>>, String> {
        let of = |(at, block): (usize, &SourceBlock)| {
            if self.is_eager(block) {
                return Ok(Vec::new());
            }
            let stale = || merge(&merge(&set.pages[at], &set.suspects[at]), &set.holes[at]);
            Ok(match self.lazy.when {
                // What is in common, and was not written since, is there.
                Postcopy::AtOnce if self.tracks_all() => {
                    rounded(&merge(self.sharing.held(at), &stale()), block.backing.granule())
                }
                // What a clone has not written is there.
                Postcopy::AtOnce if block.backing == Backing::Template => self.own(block)?,
                Postcopy::AtOnce => vec![PageRun { first: 0, pages: block.region.bytes.div_ceil(PAGE) }],
                // What the target is to drop reads as zero here, and is fetched as that.
                _ => rounded(&stale(), block.backing.granule()),
            })
        };
        self.blocks.iter().enumerate().map(of).collect()
    }

    /// What a clone has written.
    fn own(&self, block: &SourceBlock) -> Result<Vec<PageRun>, String> {
        let mut pages = Vec::new();
        own(&self.process, &block.region, &mut pages).map_err(|why| explain(&why))?;
        Ok(pages)
    }

    /// What of a send-set belongs to blocks that must be complete, in terms of the blocks that are tracked.
    fn eager_part(&self, set: &SendSet) -> Arc<SendSet> {
        match self.tracks_all() {
            false => Arc::new(set.clone()),
            true => {
                let mut part = set.clone();
                for (at, _) in self.blocks.iter().enumerate().filter(|(_, block)| !self.is_eager(block)) {
                    part.clear(at);
                }
                Arc::new(part)
            }
        }
    }

    /// What is missing, by place in the offer.
    fn lists(&self, missing: &[Vec<PageRun>]) -> Vec<(u16, Vec<PageRun>)> {
        let lists = self.blocks.iter().zip(missing).filter(|(_, runs)| !runs.is_empty());
        lists.map(|(block, runs)| (block.index, runs.clone())).collect()
    }

    fn sums_without(&self, missing: &[Vec<PageRun>]) -> Result<Vec<BlockDigest>, String> {
        let lazy = self.blocks.iter().zip(missing).filter(|(block, _)| !self.is_eager(block));
        let sum = |(block, missing): (&SourceBlock, &Vec<PageRun>)| {
            let mut there = Vec::new();
            populated(&self.process, &block.region, &mut there).map_err(|why| explain(&why))?;
            fit::sum(&self.process, &block.region, block.index, &subtract(&there, missing))
        };
        lazy.map(sum).collect()
    }

    /// Finds out what the target's QEMU will need first, while the VM runs.
    pub(super) fn look_ahead(&mut self) {
        if matches!(self.lazy.when, Postcopy::OnDemand | Postcopy::AtTimeout) {
            return;
        }
        let looked_at = self.qemu(|qemu| Ok(qemu.looked_at())).unwrap_or_default();
        let of = |block: &SourceBlock| {
            let inside =
                looked_at.iter().filter(|run| (block.region.base..block.region.end()).contains(&run.hva));
            let runs: Vec<PageRun> = inside
                .map(|run| PageRun { first: (run.hva - block.region.base) / PAGE, pages: run.pages })
                .collect();
            intersect(&merge(&runs, &[]), &[PageRun { first: 0, pages: block.region.pages() }])
        };
        self.lazy.first = self.blocks.iter().map(of).collect();
    }

    /// Answers the target's requests from now on, those first that are known of the `missing` pages.
    fn serve(&mut self, missing: &[Vec<PageRun>]) -> Result<(), String> {
        let mut first = Vec::new();
        for ((block, known), missing) in self.blocks.iter().zip(&self.lazy.first).zip(missing) {
            let runs = rounded(&intersect(known, missing), block.backing.granule());
            first.extend(runs.into_iter().map(|run| (block.index, run)));
        }
        let demand =
            self.lazy.demand.take().ok_or("the target cannot ask for pages: there is no connection")?;
        let (tell, of) = (self.tell.clone(), self.lazy.connections);
        let failed = move |why| drop(tell.send(Event::Faded(of, why)));
        let how = (self.pacer.clone(), self.counters.clone());
        self.lazy.serving = Some(Serving::start(
            (demand, first),
            &self.process,
            &self.blocks,
            &self.lazy.bytes,
            how,
            failed,
        )?);
        Ok(())
    }

    /// Opens streams for what nobody has asked for.
    pub(super) fn push(&mut self) -> Result<(), String> {
        // Rounds are over, and so is the tracking: the VM does not write here any more.
        self.senders = None;
        if let Some(collector) = self.collector.take()
            && let Err(why) = collector.stop()
        {
            tracing::warn!(vm = self.vm.name(), why, "tracking did not end cleanly");
        }
        let streams = self.open(self.lazy.streams, Purpose::Push)?;
        let (tell, of, options) = (self.tell.clone(), self.lazy.connections, self.options);
        let failed = move |why| drop(tell.send(Event::Faded(of, why)));
        let serving = self.lazy.serving.as_mut().ok_or("nothing is served")?;
        serving.push(streams, options, failed)?;
        self.count_template();
        self.account_here();
        Ok(())
    }

    /// What of a clone did not travel. Where nothing was tracked it was not counted yet, and now there is time.
    fn count_template(&self) {
        if self.tracks_all() {
            return;
        }
        let shared = |block: &SourceBlock| {
            let mut there = Vec::new();
            populated(&self.process, &block.region, &mut there).map_err(|why| explain(&why))?;
            Ok::<_, String>(subtract(&there, &self.own(block)?).iter().map(|run| run.pages).sum::<u64>())
        };
        let clones = self.blocks.iter().filter(|block| block.backing == Backing::Template);
        let counted: Result<u64, String> = clones.map(shared).sum();
        if let Ok(pages @ 1..) = counted {
            self.view.template_pages(pages);
        }
    }

    /// Connects again to a target that runs the VM and misses pages.
    pub(super) fn reattach(&mut self) -> Result<(), String> {
        self.lazy.disconnect();
        self.control = None;
        if self.lazy.bytes.is_empty() {
            self.find_blocks()?;
        }
        let connection = self.host.endpoint().connect(&self.address, &self.peer, CONNECT_WITHIN);
        let mut connection = connection.map_err(|why| explain(&why))?;
        let record = self.vm.record();
        let (id, generation) = (self.id.0.to_vec(), record.generation);
        let reattach = Reattach { id, vm: record.name, generation, streams: self.lazy.streams };
        control::send(&mut connection, &Message::Reattach(reattach))?;
        match control::receive(&mut connection, FIRST_MESSAGE_WITHIN)? {
            Message::Reattached(_) => {}
            Message::Abort(text) => return Err(text.text),
            _ => return Err("the target answered something else".into()),
        }
        self.attach_control(connection);
        self.lazy.demand = self.open(1, Purpose::Demand)?.pop();
        self.serve(&[])
    }

    /// Tells a target that was not connected that the pages which it misses are gone: else it would wait for them, and so would its people.
    pub(super) fn tell_loss(&self, why: &str) {
        let record = self.vm.record();
        let (id, generation) = (self.id.0.to_vec(), record.generation);
        let reattach = Reattach { id, vm: record.name, generation, streams: 0 };
        let told = (|| {
            let connection = self.host.endpoint().connect(&self.address, &self.peer, CONNECT_WITHIN);
            let mut connection = connection.map_err(|why| explain(&why))?;
            control::send(&mut connection, &Message::Reattach(reattach))?;
            control::receive(&mut connection, FIRST_MESSAGE_WITHIN)?;
            control::send(&mut connection, &Message::Abort(Text { text: why.to_owned() }))
        })();
        if let Err(why) = told {
            tracing::warn!(
                vm = self.vm.name(),
                peer = self.peer,
                why,
                "the target cannot be told that pages are lost"
            );
        }
    }

    /// Finds the blocks of a VM that an earlier life of this agent has handed over, in the order in which it offered them.
    fn find_blocks(&mut self) -> Result<(), String> {
        let layout = self.qemu(sterna_vmm::Vmm::layout)?;
        let (blocks, bytes) = offer::blocks_again(&self.host, &self.vm, &layout)?;
        self.blocks = Arc::new(blocks);
        self.lazy.bytes = bytes;
        Ok(())
    }

    /// Who asked for post-copy before the target had said that it cannot.
    pub(super) fn tell_refusal(&mut self, machine: &Source) {
        if let Some(why) = machine.postcopy_refusal()
            && std::mem::take(&mut self.lazy.asked)
        {
            let peer = &self.peer;
            self.view
                .notice(&format!("it cannot switch to post-copy, and goes on as it is: on {peer}: {why}"));
        }
    }

    pub(super) fn show_postcopy(&self) {
        if let Some(serving) = &self.lazy.serving {
            self.view.postcopy(serving.requests(), serving.pushed(), serving.remaining() * PAGE);
        }
    }

    /// Every page has come: what the target says of how it went, and whether what it fetched is what was here.
    pub(super) fn filled(&mut self, filled: &Filled) {
        // It is told until it is answered, also on connections that came after those that the pages went over.
        let served = self.lazy.switched || self.lazy.serving.is_some();
        if !served || std::mem::replace(&mut self.lazy.filled, true) {
            return;
        }
        self.show_postcopy();
        if let Some(faults) = &filled.faults {
            self.view.faults(faults);
        }
        if !self.verify {
            return;
        }
        let proved = if filled.sums.is_empty() { Err(None) } else { self.compare(filled).map_err(Some) };
        match proved {
            Ok(blocks) => self.view.verified(blocks, true),
            Err(None) => self.view.notice(
                "what was fetched cannot be proved equal: a connection was lost, or an agent restarted, and pages may have come unseen",
            ),
            Err(Some(why)) => self.view.notice(&format!("RAM at the target is not proved equal: {why}")),
        }
    }

    fn compare(&self, filled: &Filled) -> Result<u32, String> {
        let value = |digest: &[u8]| <[u8; 16]>::try_from(digest).map(u128::from_le_bytes).unwrap_or_default();
        let find = |list: &[BlockDigest], block: u16| {
            list.iter().find(|found| found.block == u32::from(block)).map_or(0, |found| value(&found.digest))
        };
        let mut proved = 0;
        let told = |block: &&SourceBlock| filled.sums.iter().any(|sum| sum.block == u32::from(block.index));
        for block in self.blocks.iter().filter(told) {
            let mut there = Vec::new();
            populated(&self.process, &block.region, &mut there).map_err(|why| explain(&why))?;
            let whole = value(&fit::sum(&self.process, &block.region, block.index, &there)?.digest);
            let told = find(&self.lazy.present, block.index).wrapping_add(find(&filled.sums, block.index));
            if whole != told {
                return Err(format!("block {} is not what was here", block.index));
            }
            proved += 1;
        }
        Ok(proved)
    }
}
