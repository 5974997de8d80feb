//! The steps of a migration that touch the VM: tracking, scans, rounds, and the stop.

use super::{Event, Outgoing};
use crate::config::Mechanism;
use crate::control::explain;
use crate::offer::activity_of;
use crate::pages::{Collector, Haste, Job, Part, Senders, SourceBlock, Writers};
use std::sync::Arc;
use std::time::Instant;
use sterna_engine::handoff::Activity;
use sterna_engine::source::{Postcopy, SourceInput};
use sterna_engine::units::Pages;
use sterna_engine::wire::Message;
use sterna_engine::wire::message::{BlockDigest, StateEnd};
use sterna_vmm::Vmm;

impl Outgoing {
    /// Attaches, and starts with every page that may not be zero.
    pub(super) fn track(&mut self) -> Result<Pages, String> {
        self.shrink();
        self.sharing.decide();
        let (tracked, attach) = (self.tracked(), self.host.attach());
        let process = self.process.try_clone().map_err(|why| explain(&why))?;
        let mut collector = Collector::arm(process, tracked.clone(), &attach, self.writers)?;
        if !self.host.config().has(Mechanism::Discards) {
            collector.ignore_discards();
        }
        if self.writers == Writers::Disks {
            self.qemu(|qemu| qemu.drain())?;
        }
        collector.begin()?;
        let pages = Pages(collector.page_count());
        self.view.template_pages(collector.shared_pages());
        self.collector = Some(collector);
        self.scanned = Some(Instant::now());
        self.look_at_writers();
        let tell = self.tell.clone();
        let failed = move |why| drop(tell.send(Event::Broken(why)));
        let streams = std::mem::take(&mut self.streams);
        let how = (self.pacer.clone(), self.options);
        let senders = Senders::start(streams, &self.process, &tracked, how, &self.counters, failed)?;
        if self.accepted {
            senders.are_taken();
        }
        self.senders = Some(senders);
        if self.lazy.when == Postcopy::AtOnce && pages == Pages(0) {
            // No round hides it.
            self.qemu(|qemu| qemu.prepare_save())?;
        }
        Ok(pages)
    }

    pub(super) fn collector(&mut self) -> Result<&mut Collector, String> {
        self.collector.as_mut().ok_or_else(|| "the VM's memory is not tracked".into())
    }

    /// Gives the send-set to the senders, and begins an empty one.
    pub(super) fn send(&mut self, round: u32, part: Part) {
        if let (Some(senders), Some(collector)) = (&self.senders, &mut self.collector) {
            let set = collector.take();
            let haste = if self.view.is_stopped() { Haste::Urgent } else { Haste::Polite };
            senders.send(&Job { round, set, part, haste, missing: Arc::default() });
        }
        if part == Part::End {
            self.round = round;
        }
    }

    pub(super) fn send_round(&mut self, round: u32) -> Option<SourceInput> {
        self.send(round, Part::End);
        // The first round takes longest, and hides what must be ready at the stop.
        if round > 1 {
            return None;
        }
        let ready = self.qemu(|qemu| qemu.prepare_save());
        self.account_here();
        ready.err().map(SourceInput::Failed)
    }

    /// Scans, and looks whether the VM still does what it did: its user may pause it, its guest may panic.
    pub(super) fn scan(&mut self) -> Result<Pages, String> {
        self.awake.hold_ahead();
        // While it still runs, so that it costs no downtime: what was plugged in meanwhile can crash QEMU in the save.
        self.has_its_shape()?;
        let state = self.qemu(|qemu| qemu.ready_to_pause())?;
        self.activity = activity_of(&state).ok_or_else(|| {
            format!("the VM became {state} while it was being moved; it is left here as it is")
        })?;
        let left = self.senders.as_ref().map_or_else(Vec::new, Senders::left);
        let collector = self.collector()?;
        collector.scan()?;
        collector.add_left(left);
        let pages = Pages(collector.page_count());
        self.scanned = Some(Instant::now());
        self.look_at_writers();
        Ok(pages)
    }

    pub(super) fn settle(&mut self) -> Result<Pages, String> {
        self.has_its_shape()?;
        self.collector()?.scan()?;
        self.qemu(|qemu| qemu.drain())?;
        let collector = self.collector()?;
        collector.settle();
        Ok(Pages(collector.page_count()))
    }

    /// Stops the VM, and saves its devices while what was written last is on its way already. The second scan is the last
    /// word, for saving may write RAM: virtio gives back what it has taken from its rings.
    pub(super) fn stop(&mut self) -> Result<Pages, String> {
        self.view.stopping();
        self.lap = Instant::now();
        self.stop_tried = true;
        self.awake.hold();
        self.vm.guest().hush();
        let (found, ticket) = self.qemu(|qemu| qemu.pause_and_save())?;
        if activity_of(&found) != Some(self.activity) {
            return Err(format!("the VM was {found} by the time it was to be stopped; try again"));
        }
        self.split("stop");
        let collector = self.collector()?;
        collector.scan()?;
        collector.stands_still();
        collector.settle();
        let early = collector.page_count();
        if !self.lazy.switched {
            self.send(self.round + 1, Part::Beginning);
        }
        self.state = self.qemu(|qemu| qemu.save_finish(ticket))?;
        self.split("save");
        let collector = self.collector()?;
        collector.scan()?;
        let late = collector.page_count();
        self.split("scan");
        Ok(Pages(if self.lazy.switched { late } else { early + late }))
    }

    pub(super) fn split(&mut self, name: &'static str) {
        self.view.split(name, self.lap.elapsed());
        self.lap = Instant::now();
    }

    /// Sends what is left, and uses the time it takes to look whether anything changed behind our back.
    pub(super) fn finish(&mut self, round: u32) -> Result<Pages, String> {
        let digests = if self.verify { self.digests()? } else { Vec::new() };
        self.send(round, Part::End);
        self.end_state(round, digests, false)?;
        self.look_again()
    }

    /// Sends the device state and says that it is complete.
    pub(super) fn end_state(
        &mut self,
        round: u32,
        digests: Vec<BlockDigest>,
        postcopy: bool,
    ) -> Result<(), String> {
        let paused = self.activity == Activity::Paused;
        let end = StateEnd { bytes: self.state.len() as u64, last_round: round, digests, paused, postcopy };
        let Some(control) = &mut self.control else {
            return Err("the connection to the target is gone".into());
        };
        control.send_state(&self.state)?;
        control.send(&Message::StateEnd(end))?;
        self.view.device_state(self.state.len() as u64);
        self.state = Vec::new();
        Ok(())
    }

    /// Whether anything changed behind our back: there is time for that while the target loads, and not before, since QEMU keeps a processor busy
    /// with each question.
    pub(super) fn look_again(&mut self) -> Result<Pages, String> {
        let seen = self.qemu(|qemu| qemu.glance())?;
        is_as_it_was(self.shape.map(|shape| shape.glance) == Some(seen))?;
        self.collector()?.peek().map(Pages)
    }

    fn has_its_shape(&self) -> Result<(), String> {
        let seen = self.qemu(|qemu| qemu.shape())?;
        is_as_it_was(self.shape == Some(seen))
    }

    pub(super) fn digests(&self) -> Result<Vec<BlockDigest>, String> {
        let digest = |block: &SourceBlock| {
            let digest = sterna_memory::digest(&self.process, &block.region).map_err(|why| explain(&why))?;
            Ok(BlockDigest { block: block.index.into(), digest: digest.to_vec() })
        };
        self.blocks.iter().map(digest).collect()
    }
}

/// Whether nothing came or went since the pre-check.
fn is_as_it_was(is: bool) -> Result<(), String> {
    let changed = "a device, disk or memory of the VM came or went while it was being moved; try again";
    if is { Ok(()) } else { Err(changed.into()) }
}
