//! What both ends must agree on, as QEMU itself tells it: one fact a line, so that a difference can be read.
//!
//! The device state of a VM with a hot-added DIMM loads *without error* into a QEMU that has no such DIMM. So what
//! is loaded into what is compared beforehand, and again at the stop, for QEMU does not know that we migrate and
//! locks nothing out.
//!
//! Only what is the same in a running VM and in a fresh one that waits for its state may be a line: no addresses
//! that the guest programs, no bus numbers, no paths, no generated node names. So PCI devices behind bridges are
//! told by their place in QEMU's object tree, and by `query-pci` on the root bus alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use rustix::io::Errno;
use serde_json::{Value, json};

use super::cmdline::argv_of;
use super::qmp::{QmpError, Ticket};
use super::{COMMAND_WITHIN, Qemu, devices};
use crate::Vmm;
use crate::types::{Fingerprint, Glance, Shape, VmmError};

/// Where QEMU keeps the devices of the command line and those added later, by id and without one.
const DEVICE_ROOTS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
/// Where QEMU keeps the devices of the machine itself, and those of old options such as `-vga`.
const MACHINE_ROOT: &str = "/machine/unattached";
/// What QEMU is asked for by the questions of a shape.
const TELL_SHAPE: &str = "tell whether it has changed";
/// How many devices are looked at: more than QEMU's buses take.
const DEVICES_MAX: usize = 4096;
/// The largest firmware file that is digested: UEFI firmware has 4 to 16 MiB.
const FIRMWARE_BYTES_MAX: u64 = 256 << 20;

pub(super) fn fingerprint(qemu: &mut Qemu) -> Result<Fingerprint, VmmError> {
    let layout = qemu.layout()?;
    let mut lines: BTreeSet<String> =
        layout.blocks.iter().map(|block| format!("ram {} bytes {}", block.name, block.bytes)).collect();
    lines.insert(format!("machine {}", qemu.machine_type()?));
    cpu_lines(qemu, &mut lines)?;
    for device in devices(qemu)? {
        lines.insert(device_line(qemu, &device));
    }
    pci_lines(qemu, &mut lines)?;
    memory_device_lines(qemu, &mut lines)?;
    disk_lines(qemu, &mut lines)?;
    let needs_firmware = layout.blocks.iter().any(|block| block.hva.is_none());
    // Read once: QEMU itself read these files at its start, and asking again takes longer than a stop should.
    let firmware = match qemu.firmware.take() {
        Some(known) => known,
        None => firmware(qemu)?,
    };
    qemu.firmware = Some(firmware.clone());
    Ok(Fingerprint { lines, firmware, needs_firmware })
}

/// A question for QEMU: the command, and what it is about.
type Question = (&'static str, &'static str);

/// What tells whether a VM is still the one whose fingerprint was taken: a question or two for each kind of thing that can be plugged in.
const LASTING: [Question; 3] =
    [(HMP, "info ramblock"), ("query-memory-devices", ""), ("query-cpus-fast", "")];

/// Those of it without one of which no device comes or goes and no disk changes: asked after the stop too, where others than we can have told QEMU to.
const PARTS: [Question; 3] = [(LIST, DEVICE_ROOTS[0]), (LIST, DEVICE_ROOTS[1]), (DISKS, "")];

/// What the guest alone can change too: whether anything forbids a migration, and whether the VM runs.
const GUEST: [Question; 2] = [("query-migrate", ""), (STATUS, "")];

/// What QEMU tells when a guest opens a drive, or lets go of a device that it was asked for.
const GUEST_CHANGED: [&str; 2] = ["DEVICE_TRAY_MOVED", "DEVICE_DELETED"];

const HMP: &str = "human-monitor-command";
const LIST: &str = "qom-list";
const DISKS: &str = "query-block";
const STATUS: &str = "query-status";

pub(super) fn shape(qemu: &mut Qemu) -> Result<Shape, VmmError> {
    // What comes from here on is seen by a glance, or by these answers.
    qemu.qmp.forget_events();
    let lasting = if qemu.alone { [&LASTING[..], &PARTS].concat() } else { LASTING.into() };
    let (lasting, glance) = (ask(qemu, lasting)?, ask(qemu, at_a_glance(qemu))?);
    Ok(Shape { lasting: answers(qemu, lasting)?, glance: Glance(answers(qemu, glance)?) })
}

pub(super) fn glance(qemu: &mut Qemu) -> Result<Glance, VmmError> {
    let glance = ask(qemu, at_a_glance(qemu))?;
    let seen = Glance(answers(qemu, glance)?);
    let changed = qemu.qmp.has_event(&GUEST_CHANGED).map_err(|e| qemu.explain(TELL_SHAPE, e))?;
    Ok(if changed { Glance::default() } else { seen })
}

/// Each question keeps QEMU's monitor busy for a quarter of a millisecond ([`super::qmp`]): what nobody else can have told QEMU is not asked.
fn at_a_glance(qemu: &Qemu) -> Vec<Question> {
    if qemu.alone { GUEST.into() } else { [&GUEST[..], &PARTS].concat() }
}

/// All of them are under way at once.
fn ask(qemu: &mut Qemu, questions: Vec<Question>) -> Result<Vec<(Question, Ticket)>, VmmError> {
    let mut asked = Vec::new();
    for question in questions {
        let (command, about) = question;
        let args = match command {
            HMP => json!({ "command-line": about }),
            LIST => json!({ "path": about }),
            _ => Value::Null,
        };
        let sent = qemu.qmp.send(command, args, COMMAND_WITHIN);
        asked.push((question, sent.map_err(|e| qemu.explain(TELL_SHAPE, e))?));
    }
    Ok(asked)
}

fn answers(qemu: &mut Qemu, asked: Vec<(Question, Ticket)>) -> Result<[u8; 32], VmmError> {
    let found = hashed(qemu, &asked);
    // Those that were not waited for, where one has failed.
    asked.iter().for_each(|(_, ticket)| qemu.qmp.forget(ticket));
    found
}

fn hashed(qemu: &mut Qemu, asked: &[(Question, Ticket)]) -> Result<[u8; 32], VmmError> {
    let mut hasher = blake3::Hasher::new();
    for ((command, _), ticket) in asked {
        let answer = match qemu.qmp.wait(ticket, COMMAND_WITHIN) {
            // A machine without memory devices refuses that question, each time in the same words.
            Err(QmpError::Refused { desc, .. }) => Value::String(desc),
            answer => answer.map_err(|e| qemu.explain(TELL_SHAPE, e))?,
        };
        match *command {
            STATUS => {
                let state = answer["status"].as_str().unwrap_or("silent");
                devices::check_stopped(qemu, state.to_owned().into())?;
            }
            // The rest of that answer changes all the time.
            DISKS => drive_parts(&answer).for_each(|part| hash_text(&mut hasher, &part)),
            _ => hash_text(&mut hasher, &stable(answer).to_string()),
        }
    }
    Ok(*hasher.finalize().as_bytes())
}

/// Of what QEMU tells of its own migration only what blocks it belongs to the shape.
fn stable(answer: Value) -> Value {
    match answer.get("blocked-reasons") {
        Some(reasons) => reasons.clone(),
        None if answer.get("status").is_some() => Value::Null,
        None => answer,
    }
}

fn hash_text(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text.as_bytes());
}

/// The processor model, as `-cpu` takes it.
pub(super) fn cpu_model(qemu: &mut Qemu) -> Result<String, VmmError> {
    let operation = "tell its processors";
    let cpus = qemu.ask("query-cpus-fast", Value::Null, operation)?;
    let first = cpus[0]["qom-path"].as_str().map(str::to_owned);
    let first = first.ok_or_else(|| VmmError::Answer { operation, detail: "no processor".to_owned() })?;
    let class = qemu.qom_text(&first, "type", operation)?;
    // The type is MODEL-ARCHITECTURE-cpu, where the model may hold dashes: `Skylake-Client-x86_64-cpu`.
    let model = class.strip_suffix("-cpu").and_then(|rest| rest.rsplit_once('-')).map(|(model, _)| model);
    Ok(model.unwrap_or(&class).to_owned())
}

/// The processors and what they really offer. Asked of the processors themselves, not of the model's name
/// (`query-cpu-model-expansion`): `-cpu X,+flag` and what the host's own processor took away show only there.
fn cpu_lines(qemu: &mut Qemu, lines: &mut BTreeSet<String>) -> Result<(), VmmError> {
    let operation = "tell its processors";
    let cpus = qemu.ask("query-cpus-fast", Value::Null, operation)?;
    let cpus: Vec<Value> = cpus.as_array().cloned().unwrap_or_default();
    lines.insert(format!("cpus {}", cpus.len()));
    for (index, cpu) in cpus.iter().enumerate() {
        let path = cpu["qom-path"].as_str().unwrap_or_default();
        lines.insert(format!("cpu {index} {} at {}", qemu.qom_text(path, "type", operation)?, cpu["props"]));
        // All processors of a machine are of one model: one tells for all.
        if index == 0 {
            cpu_feature_lines(qemu, path, lines);
        }
    }
    Ok(())
}

fn cpu_feature_lines(qemu: &mut Qemu, path: &str, lines: &mut BTreeSet<String>) {
    let operation = "tell its processors";
    for word in qemu.qom(path, "feature-words", operation).ok().iter().filter_map(Value::as_array).flatten() {
        let features = word["features"].as_u64().unwrap_or_default() & !told_by_topology(word);
        // A word without features is the same as one that an older QEMU does not know.
        if features == 0 {
            continue;
        }
        lines.insert(format!(
            "cpu feature word {}.{} {} {features:#x}",
            word["cpuid-input-eax"],
            word["cpuid-input-ecx"],
            word["cpuid-register"].as_str().unwrap_or_default(),
        ));
    }
    // Not the TSC's frequency: hosts of one model differ a little, and the device state carries it.
    for name in ["vendor", "model-id", "family", "model", "stepping", "level", "xlevel", "phys-bits"] {
        // Other architectures have other properties: what is not there at both ends is equal.
        if let Ok(value) = qemu.qom(path, name, operation) {
            lines.insert(format!("cpu {name} {value}"));
        }
    }
}

/// The bits that say whether there are several processors: older QEMUs add them when the guest asks, newer ones keep them
/// with the others (`x86_cpu_expand_features`). The guest sees the same, and `-smp` tells the rest.
fn told_by_topology(word: &Value) -> u64 {
    const HYPER_THREADING: u64 = 1 << 28;
    const CORES_AS_THREADS: u64 = 1 << 1;
    match (word["cpuid-input-eax"].as_u64(), word["cpuid-register"].as_str()) {
        (Some(1), Some("EDX")) => HYPER_THREADING,
        (Some(0x8000_0001), Some("ECX")) => CORES_AS_THREADS,
        _ => 0,
    }
}

/// A device of the command line, or one that was added later.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) path: String,
    pub(super) class: String,
}

/// Every device that the user asked for by `-device`, or added later.
fn devices(qemu: &mut Qemu) -> Result<Vec<Device>, VmmError> {
    devices_below(qemu, &DEVICE_ROOTS)
}

/// Every device, also those of the machine itself.
pub(super) fn all_devices(qemu: &mut Qemu) -> Result<Vec<Device>, VmmError> {
    devices_below(qemu, &[DEVICE_ROOTS[0], DEVICE_ROOTS[1], MACHINE_ROOT])
}

fn devices_below(qemu: &mut Qemu, roots: &[&str]) -> Result<Vec<Device>, VmmError> {
    let mut found = Vec::new();
    for root in roots {
        for child in children(qemu, root)? {
            found.push(Device { path: format!("{root}/{}", child.0), class: child.1 });
        }
    }
    found.truncate(DEVICES_MAX);
    Ok(found)
}

/// The children of an object: their names and classes.
pub(super) fn children(qemu: &mut Qemu, path: &str) -> Result<Vec<(String, String)>, VmmError> {
    let listed = qemu.ask("qom-list", json!({ "path": path }), "list its devices")?;
    let child = |entry: &Value| {
        let class = entry["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some((entry["name"].as_str()?.to_owned(), class.to_owned()))
    };
    Ok(listed.as_array().into_iter().flatten().filter_map(child).collect())
}

fn device_line(qemu: &mut Qemu, device: &Device) -> String {
    let mut line = format!("device {} {}", device.path, device.class);
    // Where it sits, and what the network knows it by. A device without such a property has none at either end.
    for property in ["parent_bus", "addr", "mac"] {
        if let Ok(value) = qemu.qom(&device.path, property, "tell of a device") {
            line.push_str(&format!(" {property} {value}"));
        }
    }
    line
}

fn pci_lines(qemu: &mut Qemu, lines: &mut BTreeSet<String>) -> Result<(), VmmError> {
    // Machines without PCI refuse, or know no bus.
    let Ok(buses) = qemu.ask("query-pci", Value::Null, "list its PCI devices") else { return Ok(()) };
    for bus in buses.as_array().into_iter().flatten() {
        for device in bus["devices"].as_array().into_iter().flatten() {
            lines.insert(format!(
                "pci {}:{}.{} {:#x}:{:#x} class {} id {}",
                bus["bus"],
                device["slot"],
                device["function"],
                device["id"]["vendor"].as_u64().unwrap_or_default(),
                device["id"]["device"].as_u64().unwrap_or_default(),
                device["class_info"]["class"],
                device["qdev_id"],
            ));
        }
    }
    Ok(())
}

fn memory_device_lines(qemu: &mut Qemu, lines: &mut BTreeSet<String>) -> Result<(), VmmError> {
    let Ok(listed) = qemu.ask("query-memory-devices", Value::Null, "list its memory devices") else {
        return Ok(());
    };
    for device in listed.as_array().into_iter().flatten() {
        let data = &device["data"];
        lines.insert(format!(
            "memory device {} id {} addr {} size {} slot {} node {}",
            device["type"], data["id"], data["addr"], data["size"], data["slot"], data["node"],
        ));
    }
    Ok(())
}

fn disk_lines(qemu: &mut Qemu, lines: &mut BTreeSet<String>) -> Result<(), VmmError> {
    let disks = qemu.ask("query-block", Value::Null, "list its disks")?;
    for disk in disks.as_array().into_iter().flatten() {
        let image = &disk["inserted"]["image"];
        lines.insert(format!(
            "disk {} at {} format {} bytes {}",
            disk["device"],
            place_of(disk),
            image["format"],
            image["virtual-size"],
        ));
    }
    Ok(())
}

/// Where a disk is plugged in. The machine's own devices have numbers, which each version of QEMU gives anew.
fn place_of(disk: &Value) -> &str {
    let place = disk["qdev"].as_str().unwrap_or("no device");
    if place.starts_with(MACHINE_ROOT) { MACHINE_ROOT } else { place }
}

/// What somebody can add to a running VM, or take away: devices, memory, and what is in its drives. QEMU's command
/// line tells nothing of it, and a target is started from that.
pub(super) fn parts(qemu: &mut Qemu) -> Result<BTreeSet<String>, VmmError> {
    let mut parts: BTreeSet<String> = BTreeSet::new();
    for device in devices(qemu)? {
        let name = device.path.rsplit('/').next().unwrap_or_default();
        parts.insert(format!("device {name} ({})", device.class));
    }
    for (name, class) in children(qemu, "/objects")? {
        if class.starts_with("memory-backend") {
            parts.insert(format!("object {name} ({class})"));
        }
    }
    let disks = qemu.ask("query-block", Value::Null, "list its disks")?;
    parts.extend(drive_parts(&disks));
    Ok(parts)
}

/// Each drive with its file: a snapshot or a finished mirror makes QEMU write into another than the command line says.
fn drive_parts(disks: &Value) -> impl Iterator<Item = String> + '_ {
    let file = |disk: &Value| disk["inserted"]["file"].as_str().map(str::to_owned);
    disks.as_array().into_iter().flatten().map(move |disk| {
        let name = disk["device"].as_str().filter(|name| !name.is_empty()).unwrap_or(place_of(disk));
        match file(disk) {
            Some(file) => format!("drive {name} with {file}"),
            None => format!("drive {name} without a medium"),
        }
    })
}

/// The firmware files behind the blocks that each QEMU makes for itself, with a digest of each file's content.
///
/// QEMU before 8.2 does not tell where it keeps what it read from them, so the files are read: from the folders
/// that QEMU itself searches. A file that is not found is a line too, with its size as QEMU has it.
fn firmware(qemu: &mut Qemu) -> Result<BTreeSet<String>, VmmError> {
    let mut names = roms(&qemu.hmp("info roms", "list its ROMs")?);
    // All devices with their properties. To ask which kinds of devices are PCI devices would make QEMU load all its modules.
    let tree = qemu.hmp("info qtree", "list its devices")?;
    names.extend(option_roms(&tree).map(|file| (file.to_owned(), "option ROM".to_owned())));
    names.retain(|(name, _)| !name.is_empty());
    // What could not be read for want of descriptors must not be remembered as if it were not there.
    let lines = data_folders(qemu.process.pid()).and_then(|folders| {
        names.iter().map(|(name, size)| firmware_line(name, size, &folders)).collect::<io::Result<_>>()
    });
    lines.map_err(|source| VmmError::Host { operation: "reading QEMU's firmware files", source })
}

/// Reads `info qtree`: PCI devices have a line `romfile = "efi-virtio.rom"`.
fn option_roms(tree: &str) -> impl Iterator<Item = &str> {
    tree.lines().filter_map(|line| line.trim().strip_prefix("romfile = \"")?.strip_suffix('"'))
}

/// Reads `info roms`: lines that end with `size=0x002400 name="kvmvapic.bin"`.
fn roms(text: &str) -> BTreeSet<(String, String)> {
    let rom = |line: &str| {
        let (head, name) = line.trim().split_once(" name=\"")?;
        let size = head.split_whitespace().find_map(|field| field.strip_prefix("size="))?;
        Some((name.trim_end_matches('"').to_owned(), size.to_owned()))
    };
    text.lines().filter_map(rom).collect()
}

fn firmware_line(name: &str, size: &str, folders: &[PathBuf]) -> io::Result<String> {
    let named = Path::new(name);
    // A kernel given by the user carries its whole path, which another host may not have.
    let shown = named.file_name().map_or(name.into(), |file| file.to_string_lossy());
    for folder in folders {
        if let Some(digest) = digest(&folder.join(named))? {
            return Ok(format!("firmware {shown} {size} {digest}"));
        }
    }
    Ok(format!("firmware {shown} {size} made by QEMU"))
}

/// Answers that are remembered, by their questions.
type Memory<K, V> = Mutex<BTreeMap<K, V>>;
/// Digests of files that were read before: a host has few firmware files, and every VM of it uses the same.
static DIGESTS: Memory<(PathBuf, u64, Option<SystemTime>), String> = Mutex::new(BTreeMap::new());
/// What each program has said of its folders before: asking starts the program.
static FOLDERS: Memory<Vec<String>, Vec<PathBuf>> = Mutex::new(BTreeMap::new());
/// When a memory of answers is emptied: it only saves time.
const REMEMBERED_MAX: usize = 1024;

/// The remembered answer, or a new one that is remembered.
fn remember<K: Ord + Clone, V: Clone>(
    memory: &Memory<K, V>,
    key: &K,
    find: impl FnOnce() -> io::Result<V>,
) -> io::Result<V> {
    if let Some(known) = memory.lock().unwrap_or_else(PoisonError::into_inner).get(key) {
        return Ok(known.clone());
    }
    let found = find()?;
    let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
    if memory.len() >= REMEMBERED_MAX {
        memory.clear();
    }
    memory.insert(key.clone(), found.clone());
    Ok(found)
}

/// None when there is no such file.
fn digest(path: &Path) -> io::Result<Option<String>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(why) if why.raw_os_error().is_some_and(is_shortage) => return Err(why),
        Err(_) => return Ok(None),
    };
    let known = file.metadata()?;
    if !known.is_file() || known.len() > FIRMWARE_BYTES_MAX {
        return Ok(None);
    }
    let found = remember(&DIGESTS, &(path.to_owned(), known.len(), known.modified().ok()), || {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file)?;
        Ok(hasher.finalize().to_hex().to_string())
    });
    found.map(Some)
}

/// Whether an error tells of this host's limits, and nothing of the file.
fn is_shortage(errno: i32) -> bool {
    [Errno::MFILE, Errno::NFILE, Errno::NOMEM].iter().any(|error| error.raw_os_error() == errno)
}

/// The folders that a QEMU searches for firmware: its own program says (`-L help`), told the same `-L`.
fn data_folders(pid: i32) -> io::Result<Vec<PathBuf>> {
    let args = argv_of(pid)?;
    let program = std::fs::read_link(format!("/proc/{pid}/exe"))?;
    let mut line = vec![program.to_string_lossy().into_owned()];
    for pair in args.windows(2) {
        if let [option, folder] = pair
            && matches!(option.as_str(), "-L" | "--L")
        {
            line.extend(["-L".to_owned(), folder.clone()]);
        }
    }
    remember(&FOLDERS, &line, || {
        let mut command = Command::new(&program);
        let output = command.args(&line[1..]).args(["-L", "help"]).stdin(Stdio::null()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roms_are_read_with_names_and_sizes() {
        let text = "fw=genroms/kvmvapic.bin size=0x002400 name=\"kvmvapic.bin\"\n\
                    addr=00000000fffc0000 size=0x040000 mem=rom name=\"bios-256k.bin\"\nnonsense\n";
        let expected = [("bios-256k.bin", "0x040000"), ("kvmvapic.bin", "0x002400")];
        let expected = expected.map(|(name, size)| (name.to_owned(), size.to_owned()));
        assert_eq!(roms(text), BTreeSet::from(expected));
    }

    #[test]
    fn option_roms_are_read_from_the_tree_of_devices() {
        let tree = "bus: main-system-bus\n  dev: VGA, id \"\"\n    vgamem_mb = 16 (0x10)\n    romfile = \"vgabios-stdvga.bin\"\n\
                    \x20   romsize = 65536\n  dev: ICH9-LPC, id \"\"\n    romfile = \"\"\n";
        assert_eq!(option_roms(tree).collect::<Vec<_>>(), ["vgabios-stdvga.bin", ""]);
    }

    #[test]
    fn a_firmware_file_of_other_content_is_another_line() {
        let folder = tempfile::tempdir().unwrap();
        let line = |content: &str| {
            std::fs::write(folder.path().join("bios.bin"), content).unwrap();
            firmware_line("bios.bin", "0x4", &[folder.path().to_owned()]).unwrap()
        };
        assert_ne!(line("abcd"), line("abce"));
        assert!(firmware_line("etc/acpi/rsdp", "0x1000", &[]).unwrap().ends_with("made by QEMU"));
    }
}
