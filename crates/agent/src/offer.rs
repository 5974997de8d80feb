//! The pre-check at the source, and the offer that it makes of a VM. Nothing is touched here.

use crate::config::{Mechanism, PageStreams};
use crate::control::{self, explain};
use crate::host::Host;
use crate::pages::{SentHashes, SentPages, SourceBlock, Writers};
use crate::registry::{Vm, VmRecord};
use crate::room;
use std::collections::BTreeSet;
use std::sync::Arc;
use sterna_engine::handoff::Activity;
use sterna_engine::source::Outcome;
use sterna_engine::wire::message::{Block, Image, Offer, Reason};
use sterna_engine::wire::{Message, batch};
use sterna_memory::{Backing, PAGE, Region};
use sterna_vmm::qemu::{CommandLine, ImageProof, MarkedImages, Qemu, changed_parts, mark_images};
use sterna_vmm::{Fingerprint, Layout, RunState, Shape, Vmm, VmmError};

/// Everything the pre-check found out about a VM.
pub(crate) struct Checked {
    pub(crate) offer: Offer,
    pub(crate) blocks: Vec<SourceBlock>,
    pub(crate) shape: Shape,
    pub(crate) writers: Writers,
    pub(crate) activity: Activity,
    /// Shows the target that it sees the same images; kept until it does not matter any more.
    pub(crate) images: MarkedImages,
}

/// What a VM in this state does; nothing for one that cannot be moved.
pub(crate) fn activity_of(state: &RunState) -> Option<Activity> {
    match state {
        state if state.runs() => Some(Activity::Running),
        state if state.stands() => Some(Activity::Paused),
        _ => None,
    }
}

/// What QEMU says of a VM.
struct Looked {
    shape: Shape,
    reasons: Vec<sterna_vmm::Reason>,
    layout: Layout,
    state: RunState,
    reads_directly: bool,
    fingerprint: Fingerprint,
    machine: String,
    cpu: String,
    version: String,
    parts: BTreeSet<String>,
}

impl Looked {
    fn at(qemu: &mut Qemu) -> Result<Self, VmmError> {
        Ok(Self {
            // First of all: it is compared at the stop, so that what comes or goes while the rest is asked shows.
            shape: qemu.shape()?,
            reasons: qemu.source_reasons()?,
            layout: qemu.layout()?,
            state: qemu.status()?,
            reads_directly: qemu.reads_directly()?,
            fingerprint: qemu.fingerprint()?,
            machine: qemu.machine_type()?,
            cpu: qemu.cpu_model()?,
            version: qemu.version().to_string(),
            parts: qemu.parts()?,
        })
    }
}

/// Looks at the VM from all sides without touching it, and at the target if something speaks against the move already,
/// so that every reason is told at once.
pub(crate) fn check(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    streams: u32,
    verify: bool,
    (peer, address): (&str, &str),
) -> Result<Checked, Outcome> {
    let failed = |why: String| Outcome::Failed(why);
    // The memory can be tracked once: the migration comes first.
    vm.measurement().give_way(&vm.name()).map_err(failed)?;
    let looked = host.with_qemu(vm, |qemu| qemu.at_once(Looked::at)).map_err(failed)?;
    let Looked { shape, layout, state, fingerprint, .. } = looked;
    let mut reasons: Vec<Reason> = looked.reasons.into_iter().map(to_wire).collect();
    let direct = looked.reads_directly && host.config().has(Mechanism::DirectIo);
    let writers = if direct { Writers::Disks } else { Writers::Processors };
    let record = vm.record();
    let changed =
        record.parts.as_ref().map(|launched| changed_parts(launched, &looked.parts)).unwrap_or_default();
    reasons.extend(changed.into_iter().map(to_wire));
    let images = images(&record).unwrap_or_else(|found| {
        reasons.extend(found);
        MarkedImages::default()
    });
    let travels = |block: &sterna_vmm::Block| block.hva.is_some();
    let offer = Offer {
        vm: record.name,
        generation: record.generation,
        argv: record.argv,
        machine: looked.machine,
        cpu: looked.cpu,
        blocks: layout
            .blocks
            .iter()
            .map(|block| Block { name: block.name.clone(), bytes: block.bytes, travels: travels(block) })
            .collect(),
        fingerprint: crate::host::fingerprint_lines(&fingerprint),
        streams,
        verify,
        qemu: looked.version,
        images: images.proofs.iter().map(image_of).collect(),
        clear_pages: host.config().tls.page_streams == PageStreams::Clear,
        balloon: 0,
        postcopy: false,
        template: record.template.map(|template| template.digest).unwrap_or_default(),
        common: false,
        expected_bytes: 0,
        account: true,
    };
    if layout.blocks.len() > batch::BLOCKS_MAX {
        reasons.push(Reason { code: "layout".into(), text: "it has too many blocks of RAM".into() });
    }
    if !reasons.is_empty() {
        return Err(Outcome::Refused(with_targets_reasons(host, vm, reasons, offer, (peer, address))));
    }
    let blocks = source_blocks(host, vm, &layout, writers).map_err(failed)?;
    // One that cannot be moved has a reason against it.
    let activity = activity_of(&state).unwrap_or_default();
    Ok(Checked { blocks, offer, shape, writers, activity, images })
}

/// Looks for every reason against a move, at both ends, before anything is sent for it.
pub(crate) fn check_there(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    verify: bool,
    (peer, address): (&str, &str),
) -> Result<(), Outcome> {
    let checked = check(host, vm, 1, verify, (peer, address))?;
    // The images are marked as long as `checked` is there.
    match with_targets_reasons(host, vm, Vec::new(), checked.offer.clone(), (peer, address)) {
        reasons if reasons.is_empty() => Ok(()),
        reasons => Err(Outcome::Refused(reasons)),
    }
}

/// Adds what the target has against the VM, so that every reason is told at once.
fn with_targets_reasons(
    host: &Host,
    vm: &Vm,
    mut reasons: Vec<Reason>,
    offer: Offer,
    (peer, address): (&str, &str),
) -> Vec<Reason> {
    let process = host.process_of(vm);
    let expected = process.and_then(|process| room::expected(&process, !offer.template.is_empty(), 1, &[]));
    let offer = Offer { expected_bytes: expected.unwrap_or_default(), ..offer };
    let asked = control::ask(host.endpoint(), address, peer, &Message::Check(offer));
    let Ok(Message::Refused(more)) = asked else { return reasons };
    // What the target says of images that could not be marked here is no news.
    let told = |code: &str| code == "image" && reasons.iter().any(|reason| reason.code == code);
    let news: Vec<_> = more.reasons.into_iter().filter(|reason| !told(&reason.code)).collect();
    reasons.extend(news);
    reasons
}

/// The blocks that travel.
pub(crate) fn source_blocks(
    host: &Host,
    vm: &Vm,
    layout: &Layout,
    writers: Writers,
) -> Result<Vec<SourceBlock>, String> {
    let process = host.process_of(vm)?;
    let shared = vm.record().template.map(|template| template.block);
    let placed =
        layout.blocks.iter().enumerate().filter_map(|(index, block)| Some((index, block, block.hva?)));
    let placed: Vec<_> =
        placed.map(|(index, block, base)| (index, block, Region { base, bytes: block.bytes })).collect();
    let regions: Vec<Region> = placed.iter().map(|(_, _, region)| *region).collect();
    let merges = sterna_memory::may_merge(&process);
    let backings = Backing::of_all(&process, &regions).map_err(|why| explain(&why))?;
    let mut blocks = Vec::new();
    for ((index, block, region), (backing, common)) in placed.into_iter().zip(backings) {
        let pages = block.bytes.div_ceil(PAGE);
        blocks.push(SourceBlock {
            index: index as u16,
            region,
            backing: match shared.as_ref() == Some(&block.name) {
                true => Backing::Template,
                false => backing,
            },
            common,
            provable: !block.is_rebuilt(),
            sent: SentPages::new(pages),
            hashes: (writers == Writers::Disks || merges).then(|| SentHashes::new(pages)),
        });
    }
    Ok(blocks)
}

/// The blocks of a VM that was handed over by an earlier life of this agent, and the bytes of all blocks as they travel.
pub(crate) fn blocks_again(
    host: &Host,
    vm: &Vm,
    layout: &Layout,
) -> Result<(Vec<SourceBlock>, Vec<u64>), String> {
    let bytes = layout.blocks.iter().map(|block| if block.hva.is_some() { block.bytes } else { 0 });
    Ok((source_blocks(host, vm, layout, Writers::Processors)?, bytes.collect()))
}

/// Marks the VM's images, or tells every reason why that cannot be.
fn images(record: &VmRecord) -> Result<MarkedImages, Vec<Reason>> {
    let line = CommandLine::parse(record.argv.clone())
        .map_err(|why| vec![Reason { code: "command-line".into(), text: explain(&why) }])?;
    mark_images(&line, record.process.pid).map_err(|found| found.into_iter().map(to_wire).collect())
}

fn image_of(proof: &ImageProof) -> Image {
    let ImageProof { path, mark, held, digest } = proof.clone();
    Image { path, mark, held, digest }
}

fn to_wire(reason: sterna_vmm::Reason) -> Reason {
    Reason { code: word(&reason.code), text: reason.text }
}

/// A code of the pre-check as scripts see it.
pub(crate) fn word(code: &sterna_vmm::Code) -> String {
    serde_json::to_value(code).ok().and_then(|code| code.as_str().map(str::to_owned)).unwrap_or_default()
}
