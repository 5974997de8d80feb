//! A template of a VM: it stands still while its memory and devices are read, and goes on afterwards.

use super::format::{Manifest, Pages, PagesWriter, StoredBlock};
use super::{Base, Entry, NEW, PAGES, Template, Templates, disks, unusable_name};
use crate::control::explain;
use crate::host::{Host, fingerprint_lines};
use crate::model::TemplateRequest;
use crate::pages::PAGES_PER_STRIPE;
use crate::registry::{Vm, VmRecord, is_usable, lock};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use sterna_memory::{PAGE, PageRun, Process, Reader, Region, SealedMemory, append_run, is_zero, populated};
use sterna_vmm::qemu::CommandLine;
use sterna_vmm::{Layout, Vmm};

/// How long the VM may take to quit where the request wants it to.
const QUIT_WITHIN: Duration = Duration::from_secs(10);

/// Makes a template of a VM, which runs on or is ended.
///
/// # Errors
/// What keeps it from that, all reasons at once. The VM is as it was, unless the text says that it has ended.
pub(crate) fn make(host: &Arc<Host>, vm: &Arc<Vm>, request: &TemplateRequest) -> Result<Entry, String> {
    let TemplateRequest { name, end, .. } = request;
    let templates = host.templates();
    let _alone = lock(&templates.busy);
    let Candidate { record, layout, own, manifest } = look(host, vm, request)?;
    let folder = templates.unfinished(&format!("{NEW}{name}")).map_err(|why| explain(&why))?;
    let made = write(host, vm, &layout, (&folder, *end), manifest).and_then(|(mut manifest, memory)| {
        if *end {
            quit(vm)?;
            manifest.disks = disks::left(own, &record.name)?;
        }
        keep(templates, &folder, name, manifest, memory)
    });
    let made = made.map_err(|why| {
        drop(fs::remove_dir_all(&folder));
        let restored = if *end && vm.is_alive() { host.with_qemu(vm, |qemu| qemu.restore()) } else { Ok(()) };
        restored.err().map_or_else(|| why.clone(), |and| format!("{why}; and the VM stands still: {and}"))
    });
    made.map_err(|why| if vm.is_alive() { why } else { format!("{why}; VM {} has ended", record.name) })
}

/// A VM that can become a template.
struct Candidate {
    record: VmRecord,
    layout: Layout,
    /// Images that it would leave.
    own: Vec<String>,
    manifest: Manifest,
}

/// What is asked for, and of which VM.
struct Asked {
    record: VmRecord,
    argv: Vec<String>,
    line: CommandLine,
    own: Vec<String>,
    /// Those images by their names.
    written: Vec<String>,
}

/// Whether this can be asked for at all.
fn asked(host: &Host, vm: &Vm, request: &TemplateRequest) -> Result<Asked, String> {
    let TemplateRequest { name, argv, end, .. } = request;
    if !is_usable(name) {
        return Err(unusable_name(name));
    }
    if let Some(known) = host.templates().find(name) {
        return Err(format!("host {} has a template {name} already (digest {})", host.name(), known.digest));
    }
    let record = vm.record();
    let argv = argv.clone().unwrap_or_else(|| record.argv.clone());
    if super::start::named(&argv, &record.name) != record.argv {
        let why = match record.argv.iter().any(|argument| argument.contains(super::start::PLACEHOLDER)) {
            true => {
                "sterna run has taken the {vm} in its command line as it stands there; start it without, or have it booted for the template (no --from)"
            }
            false => "it was started with another command line",
        };
        return Err(format!("VM {} cannot become a template: {why}", record.name));
    }
    let line = CommandLine::parse(argv.clone()).map_err(|why| explain(&why))?;
    // Only a VM that is ended leaves its disks as its memory has them.
    let own = if *end { disks::own(&line) } else { Vec::new() };
    let written = super::start::named(&own, &record.name);
    Ok(Asked { record, argv, line, own, written })
}

/// All reasons at once.
fn refused(record: &VmRecord, texts: &[String]) -> Result<(), String> {
    match texts {
        [] => Ok(()),
        _ => Err(format!("VM {} cannot become a template: {}", record.name, texts.join("; "))),
    }
}

/// Looks whether a VM whose guest may not be ready yet could become a template. Nothing is done to it.
///
/// # Errors
/// What keeps it from that whatever its guest does, all reasons at once.
pub(crate) fn check(host: &Arc<Host>, vm: &Arc<Vm>, request: &TemplateRequest) -> Result<(), String> {
    let Asked { record, line, written, .. } = asked(host, vm, request)?;
    let reasons = host.with_qemu(vm, |qemu| qemu.early_template_reasons(&written))?;
    let mut texts: Vec<String> = reasons.into_iter().map(|reason| reason.text).collect();
    // Whatever its memory is called, and however large it is.
    texts.extend(line.on_template("memory", PAGE).err().map(str::to_owned));
    refused(&record, &texts)
}

fn look(host: &Arc<Host>, vm: &Arc<Vm>, request: &TemplateRequest) -> Result<Candidate, String> {
    let Asked { record, argv, line, own, written } = asked(host, vm, request)?;
    let mut reasons = Vec::new();
    let looked = host.with_qemu(vm, |qemu| {
        reasons.extend(qemu.source_reasons()?);
        reasons.extend(qemu.template_reasons(&written)?);
        let version = qemu.version().to_string();
        Ok((qemu.layout()?, qemu.fingerprint()?, qemu.machine_type()?, qemu.cpu_model()?, version))
    });
    let (layout, fingerprint, machine, cpu, qemu) = looked?;
    let mut texts: Vec<String> = reasons.into_iter().map(|reason| reason.text).collect();
    let main = main_block(&layout);
    if let Err(why) = line.on_template(&layout.blocks[main].name, layout.blocks[main].bytes) {
        texts.push(why.to_owned());
    }
    refused(&record, &texts)?;
    let manifest = Manifest {
        argv,
        machine,
        cpu,
        qemu,
        fingerprint: fingerprint_lines(&fingerprint),
        blocks: Vec::new(),
        main,
        state_bytes: 0,
        bytes: 0,
        pages_digest: String::new(),
        disks: Vec::new(),
    };
    Ok(Candidate { record, layout, own, manifest })
}

/// Ends a VM that stands still and is stored.
fn quit(vm: &Vm) -> Result<(), String> {
    let ended = vm.qemu().as_mut().map(|qemu| qemu.quit(QUIT_WITHIN).map_err(|why| explain(&why)));
    ended.unwrap_or_else(|| Err("nobody can speak to its QEMU".into()))
}

/// Clones share main memory: the largest block.
fn main_block(layout: &Layout) -> usize {
    let blocks = layout.blocks.iter().enumerate().filter(|(_, block)| block.hva.is_some());
    blocks.max_by_key(|(_, block)| block.bytes).map_or(0, |(at, _)| at)
}

/// Stops the VM, writes it down, and lets it go on, unless it is to end.
fn write(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    layout: &Layout,
    (folder, end): (&Path, bool),
    mut manifest: Manifest,
) -> Result<(Manifest, SealedMemory), String> {
    let process = host.process_of(vm)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(folder.join(PAGES));
    let file = file.map_err(|why| explain(&why))?;
    let mut writer = PagesWriter::new(file);
    host.with_qemu(vm, |qemu| qemu.prepare_save())?;
    let state = host.with_qemu(vm, |qemu| {
        qemu.pause()?;
        let ticket = qemu.save_begin()?;
        qemu.save_finish(ticket)
    });
    // If nothing comes of it the VM goes on, whatever was to become of it.
    let written = state.and_then(|state| {
        let found = read_blocks(&process, layout, manifest.main, &mut writer)?;
        writer.write(&state).map_err(|why| explain(&why))?;
        manifest.state_bytes = state.len() as u64;
        Ok(found)
    });
    let goes_on = !end || written.is_err();
    let restored = if goes_on { host.with_qemu(vm, |qemu| qemu.restore()) } else { Ok(()) };
    let (runs, memory) = written?;
    restored?;
    for (block, runs) in layout.blocks.iter().zip(&runs) {
        manifest.blocks.push(StoredBlock {
            name: block.name.clone(),
            bytes: block.bytes,
            travels: block.hva.is_some(),
            pages: runs.iter().map(|run| run.pages).sum(),
            runs: runs.len() as u64,
        });
    }
    (manifest.bytes, manifest.pages_digest) = writer.finish(&runs).map_err(|why| explain(&why))?;
    Ok((manifest, memory))
}

/// Writes the pages that are not zero, those of main memory also where clones will share them.
fn read_blocks(
    process: &Process,
    layout: &Layout,
    main: usize,
    writer: &mut PagesWriter,
) -> Result<(Vec<Vec<PageRun>>, SealedMemory), String> {
    let memory = SealedMemory::new("sterna-template", layout.blocks[main].bytes);
    let memory = memory.map_err(|why| explain(&why))?;
    let reader = Reader::new(process).map_err(|why| explain(&why))?;
    let mut buffer = vec![0; (PAGES_PER_STRIPE * PAGE) as usize];
    let mut all = Vec::with_capacity(layout.blocks.len());
    for (at, block) in layout.blocks.iter().enumerate() {
        let (mut there, mut kept) = (Vec::new(), Vec::new());
        if let Some(base) = block.hva {
            let region = Region { base, bytes: block.bytes };
            populated(process, &region, &mut there).map_err(|why| explain(&why))?;
            for piece in there.iter().flat_map(|run| crate::fit::pieces(*run)) {
                let bytes = &mut buffer[..piece.bytes() as usize];
                reader.read(&[region.span(piece)], bytes).map_err(|why| explain(&why))?;
                for run in not_zero(piece, bytes) {
                    let from = ((run.first - piece.first) * PAGE) as usize;
                    let content = &bytes[from..from + run.bytes() as usize];
                    writer.write(content).map_err(|why| format!("its pages cannot be stored: {why}"))?;
                    if at == main {
                        memory.write(content, run.first * PAGE).map_err(|why| explain(&why))?;
                    }
                    append_run(&mut kept, run);
                }
            }
        }
        all.push(kept);
    }
    memory.seal().map_err(|why| explain(&why))?;
    Ok((all, memory))
}

/// The runs of a piece that have content.
fn not_zero(piece: PageRun, bytes: &[u8]) -> Vec<PageRun> {
    let mut runs = Vec::new();
    for (first, content) in (piece.first..).zip(bytes.chunks_exact(PAGE as usize)) {
        if !is_zero(content) {
            append_run(&mut runs, PageRun { first, pages: 1 });
        }
    }
    runs
}

/// Makes it one of this host's, ready for its first clone.
fn keep(
    templates: &Templates,
    folder: &Path,
    name: &str,
    manifest: Manifest,
    memory: SealedMemory,
) -> Result<Entry, String> {
    let (encoded, digest) = manifest.encode();
    let failed = |why: std::io::Error| format!("the template cannot be stored: {}", explain(&why));
    templates.adopt(folder, name, &encoded, &digest, None).map_err(failed)?;
    let entry = templates.entry(&digest).ok_or("the template was stored and cannot be read")?;
    let file = fs::File::open(templates.dir.join(&digest).join(PAGES)).map_err(failed)?;
    let pages = Pages::open(file, &manifest).map_err(failed)?;
    let base = Base::here((entry.name.clone(), digest.clone()), manifest, Arc::new(memory));
    let template = Template { base, origin: None, pages };
    lock(&templates.loaded).insert(digest, Arc::new(template));
    Ok(entry)
}
