//! A VM that comes as a clone of a template which is itself on its way here.

use super::{Arriving, Event, process_of};
use crate::control::explain;
use crate::pages::{merge, subtract};
use crate::registry::FetchRegion;
use crate::templates::Base;
use std::sync::Arc;
use sterna_engine::target::TargetInput;
use sterna_engine::wire::message::Reason;
use sterna_memory::{PageRun, SealedMemory, own};
use sterna_vmm::qemu::{CommandLine, Qemu};

/// What speaks against a clone whose template is not here yet: nothing may punch holes into memory that is not sealed, and that others map too.
pub(super) fn reasons(template: Option<&Base>, qemu: &mut Qemu) -> Result<Vec<Reason>, String> {
    if template.is_none_or(|template| template.is_here() == Ok(true)) {
        return Ok(Vec::new());
    }
    let found = qemu.balloon_reason().map_err(|why| explain(&why))?;
    let reason = |found: sterna_vmm::Reason| Reason { code: "template".into(), text: found.text };
    Ok(found.into_iter().map(reason).collect())
}

impl Arriving<'_> {
    /// The command line and the memory of a clone, where the VM is one.
    pub(super) fn on_template(
        &mut self,
        argv: Vec<String>,
    ) -> Result<(Vec<String>, Option<Arc<SealedMemory>>), String> {
        if self.offer.template.is_empty() {
            return Ok((argv, None));
        }
        let template = self.host.templates().base(&self.offer.template)?;
        let main = template.manifest.main_block();
        let line = CommandLine::parse_launched(argv).ok_or("its command line cannot be read")?;
        let argv = line.on_template(&main.name, main.bytes)?.to_argv();
        let memory = template.memory.clone();
        self.await_template(&template);
        self.template = Some(template);
        Ok((argv, Some(memory)))
    }

    /// Has it heard of when its template is here, if it is not.
    fn await_template(&self, template: &Base) {
        if template.is_here() != Ok(true) {
            let tell = self.tell.clone();
            template.tell(move |how| drop(tell.send(Event::Template(how))));
        }
    }

    /// Whether the VM is to run here before its template is here; without post-copy it cannot.
    pub(super) fn awaits_template(&self, postcopy: bool) -> Result<bool, String> {
        let lost = |why| format!("its template did not come: {why}");
        let here = self.template.as_ref().map_or(Ok(true), |template| template.is_here()).map_err(lost)?;
        match (here, postcopy) {
            (false, false) => Err("the source did not wait until its template was here".into()),
            (false, true) if self.mapped > 0 => {
                Err("it has pages in common with others, and its template is not here".into())
            }
            _ => Ok(!here),
        }
    }

    /// What of each region is the template's, which is not here yet: what is neither missing nor the VM's own.
    pub(super) fn of_template(&self, missing: &[Vec<PageRun>]) -> Result<Vec<Vec<PageRun>>, String> {
        let process = process_of(self.qemu.as_ref().ok_or("no QEMU waits")?)?;
        let of = |(region, missing): (&FetchRegion, &Vec<PageRun>)| {
            if !region.template {
                return Ok(Vec::new());
            }
            let (region, mut written) = (region.region(), Vec::new());
            own(&process, &region, &mut written).map_err(|why| explain(&why))?;
            let all = [PageRun { first: 0, pages: region.pages() }];
            Ok(subtract(&all, &merge(missing, &written)))
        };
        self.lazy.regions.iter().zip(missing).map(of).collect()
    }

    /// It has come, or will not: what waits for it goes on, or is fetched from the source.
    pub(super) fn template_known(&mut self, how: Result<(), String>) -> Option<TargetInput> {
        match (&mut self.lazy.fetch, how) {
            (Some(fetch), Ok(())) => {
                let settled = fetch.template_is_here();
                settled.err().map(|why| TargetInput::Died(self.explain_failure(why)))
            }
            (Some(fetch), Err(why)) => {
                tracing::warn!(
                    vm = self.offer.vm,
                    why,
                    "its template did not come: its pages are fetched one by one"
                );
                fetch.template_is_lost();
                None
            }
            // It is looked at when the VM is loaded.
            (None, Ok(())) => None,
            (None, Err(why)) if !self.lazy.filled => {
                Some(TargetInput::Failed(format!("its template did not come: {why}")))
            }
            (None, Err(_)) => None,
        }
    }
}
