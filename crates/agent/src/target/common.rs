//! What a VM has in common with others is mapped before its pages come ([`crate::sharing`]).

use super::{Arriving, process_of};
use crate::control::explain;
use crate::pages::{Sink, subtract};
use std::os::fd::AsFd;
use std::sync::PoisonError;
use sterna_engine::target::TargetInput;
use sterna_engine::wire::common;
use sterna_engine::wire::message::Common;
use sterna_memory::{CommonRun, PAGE, PageRun, Process, Region, common_room};
use sterna_vmm::Vmm;

impl Arriving<'_> {
    /// How many runs of pages in common can be mapped in the QEMU that waits.
    pub(super) fn room(&self) -> u32 {
        let Some(Ok(process)) = self.qemu.as_ref().map(process_of) else { return 0 };
        let room = common_room(&process).unwrap_or(0).min(common::RUNS_MAX as u64);
        room.min(self.host.config().sharing.max_runs.into()) as u32
    }

    /// Has the kernel map what the VM has in common with others, which runs here by now: it need not come to it page by page.
    pub(super) fn touch_common(&self) {
        let Some(vm) = self.vm.as_ref().filter(|vm| self.mapped > 0 && vm.is_alive()) else { return };
        let regions: Vec<Region> = self.lazy.plain_regions();
        let touch = |process: Process| {
            let common = sterna_memory::common(&process, &regions).map_err(|why| explain(&why))?;
            let pages = regions.iter().copied().zip(common.iter().map(Vec::as_slice));
            sterna_memory::touch_common(&process, pages).map_err(|why| explain(&why))
        };
        if let Err(why) = self.host.process_of(vm).and_then(touch) {
            tracing::debug!(vm = vm.name(), why, "pages in common are mapped as they are touched");
        }
    }

    pub(super) fn map(&mut self, asked: &Common) -> TargetInput {
        match self.try_map(asked) {
            Ok(runs) => TargetInput::Mapped(runs),
            Err(why) => TargetInput::Failed(self.explain_failure(why)),
        }
    }

    fn try_map(&mut self, asked: &Common) -> Result<u32, String> {
        let sinks = self.sinks.clone().ok_or("nothing is ready")?;
        let pages: Vec<u64> = self.offer.blocks.iter().map(|block| block.bytes.div_ceil(PAGE)).collect();
        let mut mapped = vec![Vec::new(); sinks.regions.len()];
        let mut count = 0;
        if asked.store.is_empty() {
            if let Some(reasons) = self.admit_whole() {
                return Err(reasons.into_iter().map(|reason| reason.text).collect::<Vec<_>>().join("; "));
            }
        } else {
            let store = self.host.stores().find(&self.peer, &asked.store);
            let store = store.ok_or("the source refers to pages in common that did not come")?;
            let runs = common::decode(&asked.runs, &pages, store.pages).map_err(|why| why.to_string())?;
            if runs.len() > self.room() as usize {
                return Err(format!(
                    "the source has {} runs of pages in common, more than there is room for",
                    runs.len()
                ));
            }
            let mut wanted: Vec<(usize, Vec<CommonRun>)> = Vec::new();
            for run in runs {
                let Some(Sink::Region(region)) = sinks.blocks.get(usize::from(run.block)) else {
                    return Err(format!("block {} has nothing in common with others", run.block));
                };
                let common = CommonRun {
                    run: PageRun { first: run.first.into(), pages: run.pages.into() },
                    at: run.at.into(),
                };
                match wanted.last_mut() {
                    Some((last, runs)) if last == region => runs.push(common),
                    _ => wanted.push((*region, vec![common])),
                }
            }
            let qemu = self.qemu.as_mut().ok_or("no QEMU waits")?;
            let lent = qemu.lend_fd(store.memory.file().as_fd()).map_err(|why| explain(&why))?;
            let mut installer = sinks.installer.write().unwrap_or_else(PoisonError::into_inner);
            let done =
                installer.as_mut().ok_or("the last page is in its place")?.map_common(lent.number, &wanted);
            drop(installer);
            qemu.take_back_fd(lent).map_err(|why| explain(&why))?;
            count = done.map_err(|why| explain(&why))?;
            let in_order =
                wanted.iter().flat_map(|(region, runs)| runs.iter().map(move |run| (*region, run.run)));
            in_order.take(count).for_each(|(region, run)| mapped[region].push(run));
        }
        drop(sinks);
        if self.offer.postcopy {
            // What QEMU has written for itself goes; what was mapped stays.
            let all = self.lazy.whole_regions();
            let missing: Vec<Vec<PageRun>> =
                all.iter().zip(&mapped).map(|(all, mapped)| subtract(all, mapped)).collect();
            self.get_ready(&missing)?;
        }
        self.mapped = count;
        tracing::debug!(vm = self.offer.vm, runs = count, "pages in common are mapped");
        Ok(count as u32)
    }
}
