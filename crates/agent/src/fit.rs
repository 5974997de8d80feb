//! Where the pages of an offered VM go in the QEMU that waits for it, and the proof that they are what they were.

use crate::control::explain;
use crate::host::Host;
use crate::pages::{PAGES_PER_STRIPE, Sink, Sinks, summand};
use crate::registry::FetchRegion;
use std::sync::{Mutex, PoisonError, RwLock};
use sterna_engine::wire::batch::{self, PAYLOAD_BYTES_MAX};
use sterna_engine::wire::message::{BlockDigest, Offer, StateEnd};
use sterna_memory::{
    Installer, PAGE, PageRun, Process, Reader, Region, digest, is_zero, lone_block, own, populated,
};
use sterna_vmm::Layout;

/// RAM that may be kept aside because QEMU does not yet say where it belongs: video memory.
const STAGED_BYTES_MAX: u64 = 512 << 20;

/// Where each block of the offer goes in the QEMU that waits.
///
/// A block of a template is not made zero: what the source never sends is the template's there.
pub(crate) fn sinks(
    host: &Host,
    process: &Process,
    offer: &Offer,
    layout: &Layout,
    template: Option<usize>,
) -> Result<Sinks, String> {
    let (mut regions, mut guessed, mut blocks, mut staged) = (Vec::new(), Vec::new(), Vec::new(), 0u64);
    let hvas = layout.blocks.iter().filter_map(|block| Some((block.hva?, block.bytes)));
    let mut taken: Vec<Region> = hvas.map(|(base, bytes)| Region { base, bytes }).collect();
    for offered in &offer.blocks {
        let here = layout.block(&offered.name).filter(|block| block.bytes == offered.bytes);
        let here = here.ok_or_else(|| format!("its RAM block {} is not there in this size", offered.name))?;
        blocks.push(match here.hva {
            _ if !offered.travels => Sink::Rebuilt,
            Some(base) => {
                let (place, template) = (blocks.len() as u16, template == Some(blocks.len()));
                regions.push(FetchRegion { place, base, bytes: here.bytes, template });
                Sink::Region(regions.len() - 1)
            }
            None if here.is_rebuilt() => Sink::Rebuilt,
            None => match lone_block(process, here.bytes, &taken).map_err(|why| explain(&why))? {
                Some(base) => {
                    let place = blocks.len() as u16;
                    taken.push(Region { base, bytes: here.bytes });
                    guessed.push(FetchRegion { place, base, bytes: here.bytes, template: false });
                    regions.extend(guessed.last());
                    Sink::Region(regions.len() - 1)
                }
                None => {
                    staged += here.bytes;
                    if staged > STAGED_BYTES_MAX {
                        return Err(format!("this QEMU does not tell where its RAM block {} is", here.name));
                    }
                    Sink::Staged(Mutex::new(vec![0; here.bytes as usize]))
                }
            },
        });
    }
    let plain: Vec<Region> = regions.iter().map(FetchRegion::region).collect();
    let installer = Installer::open(process, plain.clone(), &host.attach()).map_err(|why| explain(&why))?;
    for (at, region) in plain.iter().enumerate() {
        match regions[at].template {
            true => uncover(process, &installer, at, region)?,
            false => clear(process, &installer, at, region)?,
        }
    }
    let bytes = offer.blocks.iter().map(|block| if block.travels { block.bytes } else { 0 });
    let missing = Mutex::new(vec![Vec::new(); offer.blocks.len()]);
    let installer = RwLock::new(Some(installer));
    Ok(Sinks { layout: batch::Layout::new(bytes), blocks, installer, regions, guessed, missing })
}

/// Makes a block read as zero: what the source never sends is zero there. A fresh QEMU has little that is not, firmware.
fn clear(process: &Process, installer: &Installer, at: usize, region: &Region) -> Result<(), String> {
    let (mut present, mut dirty) = (Vec::new(), Vec::new());
    populated(process, region, &mut present).map_err(|why| explain(&why))?;
    let reader = Reader::new(process).map_err(|why| explain(&why))?;
    let mut buffer = vec![0; PAYLOAD_BYTES_MAX];
    for run in present.iter().flat_map(|run| pieces(*run)) {
        let bytes = &mut buffer[..run.bytes() as usize];
        reader.read(&[region.span(run)], bytes).map_err(|why| explain(&why))?;
        for (page, content) in (run.first..).zip(bytes.chunks_exact(PAGE as usize)) {
            if !is_zero(content) {
                sterna_memory::append_run(&mut dirty, PageRun { first: page, pages: 1 });
            }
        }
    }
    if !dirty.is_empty() {
        installer.discard(at, &dirty).map_err(|why| explain(&why))?;
    }
    installer.is_zero_now(at);
    Ok(())
}

/// Drops what a fresh QEMU has written over a template.
fn uncover(process: &Process, installer: &Installer, at: usize, region: &Region) -> Result<(), String> {
    let mut written = Vec::new();
    own(process, region, &mut written).map_err(|why| explain(&why))?;
    if written.is_empty() { Ok(()) } else { installer.uncover(at, &written).map_err(|why| explain(&why)) }
}

/// A run in pieces of one batch.
pub(crate) fn pieces(run: PageRun) -> impl Iterator<Item = PageRun> {
    let most = PAGES_PER_STRIPE;
    (run.first..run.end())
        .step_by(most as usize)
        .map(move |first| PageRun { first, pages: most.min(run.end() - first) })
}

/// Sees to blocks whose address QEMU tells only after the load: writes those that were kept aside, and makes sure that the others
/// are where they were believed to be. Where one is not, this QEMU is worth nothing, and the VM runs on where it was.
pub(crate) fn settle_late(
    host: &Host,
    process: &Process,
    offer: &Offer,
    layout: &Layout,
    blocks: &[Sink],
    guessed: &[FetchRegion],
) -> Result<(), String> {
    for region in guessed {
        let name = &offer.blocks[usize::from(region.place)].name;
        let told = layout.block(name).and_then(|block| block.hva);
        if told != Some(region.base) {
            return Err(format!("QEMU does not have its RAM block {name} where it seemed to"));
        }
    }
    for (offered, sink) in offer.blocks.iter().zip(blocks) {
        let Sink::Staged(buffer) = sink else { continue };
        let bytes = std::mem::take(&mut *buffer.lock().unwrap_or_else(PoisonError::into_inner));
        let base = layout.block(&offered.name).and_then(|block| block.hva);
        let base =
            base.ok_or_else(|| format!("QEMU does not tell where its RAM block {} is", offered.name))?;
        let region = Region { base, bytes: offered.bytes };
        let installer =
            Installer::open(process, vec![region], &host.attach()).map_err(|why| explain(&why))?;
        clear(process, &installer, 0, &region)?;
        let mut runs = Vec::new();
        for (page, content) in (0..).zip(bytes.chunks_exact(PAGE as usize)) {
            if !is_zero(content) {
                sterna_memory::append_run(&mut runs, PageRun { first: page, pages: 1 });
            }
        }
        for run in runs.iter().flat_map(|run| pieces(*run)) {
            let content = &bytes[(run.first * PAGE) as usize..(run.end() * PAGE) as usize];
            installer.install(0, &[run], content).map_err(|why| explain(&why))?;
        }
        installer.finish().map_err(|why| explain(&why))?;
    }
    Ok(())
}

/// The sum of pages of a block: each that is not zero counts, in any order.
pub(crate) fn sum(
    process: &Process,
    region: &Region,
    block: u16,
    runs: &[PageRun],
) -> Result<BlockDigest, String> {
    let reader = Reader::new(process).map_err(|why| explain(&why))?;
    let mut buffer = vec![0; PAYLOAD_BYTES_MAX];
    let mut sum = 0u128;
    for run in runs.iter().flat_map(|run| pieces(*run)) {
        let bytes = &mut buffer[..run.bytes() as usize];
        reader.read(&[region.span(run)], bytes).map_err(|why| explain(&why))?;
        for (page, content) in (run.first..).zip(bytes.chunks_exact(PAGE as usize)) {
            if !is_zero(content) {
                sum = sum.wrapping_add(summand(page, content));
            }
        }
    }
    Ok(BlockDigest { block: block.into(), digest: sum.to_le_bytes().to_vec() })
}

/// Each block has one digest at most: a digest reads a whole block, and a short message has room for many.
pub(crate) fn check_digests(end: &StateEnd) -> Result<(), String> {
    match end.digests.is_sorted_by(|one, next| one.block < next.block) {
        true => Ok(()),
        false => Err("the source sent digests twice or out of order".into()),
    }
}

/// Whether a digest is of a block that is written only after the load.
pub(crate) fn is_staged(blocks: &[Sink], digest: &BlockDigest) -> bool {
    matches!(blocks.get(digest.block as usize), Some(Sink::Staged(_)))
}

/// The layout with the blocks where they are believed to be of which QEMU does not tell yet.
pub(crate) fn with_guesses(mut layout: Layout, offer: &Offer, guessed: &[FetchRegion]) -> Layout {
    for region in guessed {
        let name = &offer.blocks[usize::from(region.place)].name;
        if let Some(block) = layout.blocks.iter_mut().find(|block| block.name == *name) {
            block.hva = Some(region.base);
        }
    }
    layout
}

/// Compares the digests that the source took after its stop with what is here now; returns how many blocks were equal.
pub(crate) fn verify(
    process: &Process,
    offer: &Offer,
    layout: &Layout,
    digests: &[&BlockDigest],
) -> Result<u32, String> {
    let mut verified = 0;
    for expected in digests {
        let block =
            offer.blocks.get(expected.block as usize).ok_or("the source sent a digest of no block")?;
        let Some(base) = layout.block(&block.name).and_then(|block| block.hva) else { continue };
        let found = digest(process, &Region { base, bytes: block.bytes }).map_err(|why| explain(&why))?;
        if found.as_slice() != expected.digest {
            return Err(format!("RAM block {} is not what it was at the source", block.name));
        }
        verified += 1;
    }
    Ok(verified)
}
