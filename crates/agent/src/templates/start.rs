//! A clone of a template: a QEMU whose memory is the template's, copy-on-write, loaded with its devices.

use super::disks::Made;
use super::{StoredBlock, Template};
use crate::control::explain;
use crate::fit::{settle_late, sinks};
use crate::host::{Host, fingerprint_of};
use crate::pages::{Install as _, PAGES_PER_STRIPE, Received, Sink, Sinks};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use sterna_engine::wire::batch::{Content, Descriptor};
use sterna_memory::{Process, Region, own};
use sterna_vmm::qemu::{CommandLine, Qemu, chain_reasons};
use sterna_vmm::{Layout, Vmm, difference};

/// How long a QEMU that could not be made a clone may take to quit before it is killed.
const QUIT_WITHIN: Duration = Duration::from_secs(10);
/// What stands for the name of a clone in a template's command line.
pub(super) const PLACEHOLDER: &str = "{vm}";

/// A clone that runs.
pub(crate) struct Started {
    pub(crate) qemu: Qemu,
    /// Its command line.
    pub(crate) argv: Vec<String>,
    pub(crate) parts: Option<BTreeSet<String>>,
    /// Removed again unless they are kept.
    pub(super) disks: Made,
}

/// A template's command line with the name of a clone in its places.
pub(super) fn named(argv: &[String], vm: &str) -> Vec<String> {
    argv.iter().map(|argument| argument.replace(PLACEHOLDER, vm)).collect()
}

/// Starts a clone.
///
/// # Errors
/// What failed; nothing of it is left.
pub(crate) fn start(host: &Arc<Host>, template: &Template, vm: &str) -> Result<Started, String> {
    let began = Instant::now();
    let manifest = &template.base.manifest;
    let argv = named(&manifest.argv, vm);
    let disks = Made::of(host, &manifest.disks, vm, template.origin.is_some())?;
    let argv_here = command_line(host, template, vm, &argv)?;
    let launched = host.launch(vm, argv_here, Some(template.base.memory.clone()));
    let mut qemu = launched.map_err(|why| explain(&why))?.qemu;
    let launched = began.elapsed();
    match load(host, template, (vm, &disks.names()), &mut qemu) {
        Ok(()) => {
            tracing::debug!(vm, template = template.base.name, ?launched, took = ?began.elapsed(), "a clone runs");
            let parts = qemu.parts().ok();
            Ok(Started { qemu, argv, parts, disks })
        }
        Err(why) => {
            drop(qemu.quit(QUIT_WITHIN));
            host.remove_run_dir(vm);
            Err(why)
        }
    }
}

/// The command line of a clone on this host. That of a template of a peer's is put into this host's words first, as that of a VM which comes
/// from there is, or refused: nothing that a peer writes runs a program or opens a file that this host does not allow.
fn command_line(host: &Host, template: &Template, vm: &str, argv: &[String]) -> Result<Vec<String>, String> {
    let manifest = &template.base.manifest;
    let (main, run_dir) = (manifest.main_block(), host.run_dir(vm));
    let line = CommandLine::parse(argv.to_vec()).map_err(|why| explain(&why))?;
    let cpu = Some(manifest.cpu.as_str()).filter(|cpu| !cpu.is_empty());
    let Some(origin) = &template.origin else {
        let line = line.on_template(&main.name, main.bytes)?;
        return Ok(line.for_clone(&run_dir, &manifest.machine, cpu));
    };
    let ours = line.for_target(&run_dir, &manifest.machine, cpu, &host.config().map, &host.policy());
    let refused = |texts: Vec<String>| {
        let name = &template.base.name;
        Err(format!(
            "template {name} came from host {origin}, and this host does not allow: {}",
            texts.join("; ")
        ))
    };
    let ours = match ours {
        Ok(ours) => ours,
        Err(refusals) => return refused(refusals.iter().map(ToString::to_string).collect()),
    };
    let chains = chain_reasons(&line, &host.config().map, &host.policy());
    if !chains.is_empty() {
        return refused(chains.into_iter().map(|reason| reason.text).collect());
    }
    let ours = CommandLine::parse_launched(ours).ok_or("its command line cannot be read")?;
    Ok(ours.on_template(&main.name, main.bytes)?.to_argv())
}

/// Puts into the QEMU what is not in the shared memory, and lets it run.
fn load(
    host: &Arc<Host>,
    template: &Template,
    (vm, disks): (&str, &[String]),
    qemu: &mut Qemu,
) -> Result<(), String> {
    let manifest = &template.base.manifest;
    let failed = |why: sterna_vmm::VmmError| explain(&why);
    if qemu.version().to_string() != manifest.qemu {
        let found = qemu.fingerprint().map_err(failed)?;
        let differences = difference(&fingerprint_of(&manifest.fingerprint), &found);
        if !differences.is_empty() {
            return Err(format!(
                "this host's QEMU is another than that of template {}: {}",
                template.base.name,
                differences.join("; ")
            ));
        }
    }
    if template.origin.is_some() {
        // What is made here was looked at when it was made.
        let reasons = qemu.template_reasons(disks).map_err(failed)?;
        if let Some(reason) = reasons.first() {
            return Err(format!("template {} cannot be used: {}", template.base.name, reason.text));
        }
    }
    qemu.prepare_load().map_err(failed)?;
    let layout = qemu.layout().map_err(failed)?;
    let id = qemu.process_id();
    let process = Process::open_as(id.pid, id.start_time).map_err(|why| explain(&why))?;
    let mut offer = manifest.as_offer(vm);
    // Main memory is there as it is mapped, and nothing is written to it: to get ready for that would take an attach.
    offer.blocks[manifest.main].travels = false;
    is_untouched(&process, &layout, manifest.main_block())?;
    let sinks = sinks(host, &process, &offer, &layout, None)?;
    fill(template, &sinks)?;
    let installer = sinks.close().ok_or("it was filled before")?;
    installer.finish().map_err(|why| explain(&why))?;
    let Sinks { blocks, guessed, .. } = sinks;
    let state = template.pages.state().map_err(|why| explain(&why))?;
    qemu.load(&state).map_err(failed)?;
    if !guessed.is_empty() || blocks.iter().any(|sink| matches!(sink, Sink::Staged(_))) {
        let layout = qemu.layout().map_err(failed)?;
        settle_late(host, &process, &offer, &layout, &blocks, &guessed)?;
    }
    qemu.resume().map_err(failed)
}

/// A QEMU that waits for its device state has written nothing over the template: not even firmware, which comes with the state.
fn is_untouched(process: &Process, layout: &Layout, main: &StoredBlock) -> Result<(), String> {
    let base = layout.block(&main.name).filter(|block| block.bytes == main.bytes).and_then(|block| block.hva);
    let base = base.ok_or_else(|| format!("its memory {} is not there in this size", main.name))?;
    let mut written = Vec::new();
    own(process, &Region { base, bytes: main.bytes }, &mut written).map_err(|why| explain(&why))?;
    match written.first() {
        None => Ok(()),
        Some(run) => Err(format!(
            "its QEMU has written page {} of {} already: this version or device cannot start from a template",
            run.first, main.name
        )),
    }
}

fn fill(template: &Template, sinks: &Sinks) -> Result<(), String> {
    let manifest = &template.base.manifest;
    let others = (0..manifest.blocks.len()).filter(|at| *at != manifest.main && manifest.blocks[*at].travels);
    for at in others {
        template.pages.read(at, PAGES_PER_STRIPE, |run, bytes| {
            let descriptor =
                Descriptor { first: run.first as u32, pages: run.pages as u16, content: Content::Bytes };
            sinks.install(at, &[descriptor], bytes).map_err(|why| match why {
                Received::Failed(why) | Received::Lost(why) => why,
                Received::Pages | Received::RoundEnd { .. } => String::new(),
            })
        })?;
    }
    Ok(())
}
