//! What each setting of an option may be at a target: passed on, put into this host's words, or refused.
//!
//! The peer that sends the command line is authenticated and all the same hostile: nothing it writes may run a
//! program, open a file outside of the allowed folders, or open a socket.

use super::keyval::Settings;
use super::policy::{Host, Presence, Why};
use crate::types::Code;

/// What a setting is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A number, a name, a switch: no slash and no colon with a path behind it.
    Word,
    /// Free text that no part of QEMU opens.
    Text,
    /// A file that is there.
    Path,
    /// An image that is there, or nothing.
    Image,
    /// A file that QEMU makes.
    NewPath,
    /// The kernel's source of random numbers.
    Random,
    /// A program.
    Script,
    /// Not allowed, with the reason.
    Refused(&'static str),
}

use Kind::{Image, NewPath, Path, Random, Refused, Script, Text, Word};

const DESCRIPTOR: &str =
    "descriptors do not travel between hosts; name what was opened, with path= or filename=";
/// How QEMU names what `-add-fd` has passed to it.
const FDSET: &str = "/dev/fdset/";
const TAP_DESCRIPTOR: &str = "descriptors do not travel between hosts; use ifname=TAP,script=no,downscript=no, and vhost=on without a descriptor";
const HELPER: &str = "it runs a program";
const SOCKET: &str = "it opens a socket of the host";
const FILE: &str = "it makes QEMU read or write a file of the host";
const UNKNOWN: &str = "this setting is not known to be safe at a target";

/// Puts the settings of `option` into this host's words, or says why it refuses.
pub(super) fn apply(option: &str, settings: &mut Settings, host: Host<'_>) -> Result<(), Why> {
    let rule = rule(option, settings)?;
    if option == "chardev" {
        keep_logs(settings, host)?;
    }
    if matches!(option, "netdev" | "nic") && settings.value("type").as_deref() == Some("tap") {
        complete_tap(settings, host)?;
    }
    if option == "object" {
        not_libvirts_key(settings)?;
    }
    settings.rewrite(&mut |key, value| {
        check_key(key)?;
        let done = match rule(key) {
            Word => word(value),
            Text => Ok(value.to_owned()),
            Path => host.path(value, Presence::Required),
            Image if value.is_empty() => Ok(String::new()),
            Image if value.starts_with(FDSET) => Err(DESCRIPTOR.to_owned()),
            Image => host.path(value, Presence::Required),
            NewPath => host.path(value, Presence::Created),
            Random if matches!(value, "/dev/urandom" | "/dev/random") => Ok(value.to_owned()),
            Random => Err("another source of random numbers; use /dev/urandom, or rng-builtin".to_owned()),
            Script => host.script(value),
            Refused(reason) => Err(reason.to_owned()),
        };
        let code = if rule(key) == Image && !value.starts_with(FDSET) && host.lacks(value) {
            Code::Image
        } else {
            Code::CommandLine
        };
        done.map_err(|reason| Why { code, text: format!("{key}={value}: {reason}") })
    })
}

type KindOf = fn(&str) -> Kind;

fn rule(option: &str, settings: &Settings) -> Result<KindOf, String> {
    let chosen = |key: &str| settings.value(key).unwrap_or_default();
    match option {
        "machine" | "M" => Ok(machine),
        "device" => device(&chosen("driver")),
        "object" => object(&chosen("qom-type")),
        "drive"
            if settings.value("format").is_none()
                && settings.value("file").is_some_and(|file| !file.is_empty()) =>
        {
            Err("without format= QEMU would guess it from what the guest wrote into the image".to_owned())
        }
        "drive" => Ok(drive),
        "blockdev" => Ok(blockdev),
        "netdev" | "nic" => network(&chosen("type")),
        "net" => legacy_network(&chosen("type")),
        "chardev" => chardev(&chosen("backend")),
        "boot" => Ok(boot),
        "fw_cfg" => Ok(fw_cfg),
        "smbios" => Ok(smbios),
        "global" => Ok(global),
        "display" => only(&chosen("type"), &["none"]),
        "audio" | "audiodev" => only(&chosen("driver"), &["none"]),
        "name" => Ok(|_| Text),
        "icount" => {
            Ok(|key| if matches!(key, "rr" | "rrfile" | "rrsnapshot") { Refused(FILE) } else { Word })
        }
        "rtc" => Ok(|_| Text),
        _ => Ok(|_| Word),
    }
}

/// A key must be one: QEMU's several parsers disagree about odd ones.
fn check_key(key: &str) -> Result<(), String> {
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '[' | ']');
    if !key.is_empty() && key.chars().all(usable) {
        Ok(())
    } else {
        Err(format!("{key:?} is no name of a setting"))
    }
}

/// A value that cannot name a file elsewhere, a URL or a program with arguments.
fn word(value: &str) -> Result<String, String> {
    let odd = |c: char| c == '/' || c == '|' || c.is_control();
    if value.contains(odd) || value.starts_with("..") {
        return Err("a path is not expected here, and is refused".to_owned());
    }
    Ok(value.to_owned())
}

fn machine(key: &str) -> Kind {
    match key {
        "kernel" | "initrd" | "dtb" | "firmware" => Path,
        "append" => Text,
        "dumpdtb" | "dt-compatible" => Refused(FILE),
        "memory-encryption" | "confidential-guest-support" => {
            Refused("encrypted memory cannot be moved from outside")
        }
        _ => Word,
    }
}

/// The devices that keep all their state where QEMU's device state and the VM's RAM have it.
const DEVICES: &[&str] = &[
    "virtio-",
    "e1000",
    "rtl8139",
    "vmxnet3",
    "pcnet",
    "ne2k",
    "i82",
    "tulip",
    "VGA",
    "secondary-vga",
    "bochs-display",
    "cirrus-vga",
    "vmware-svga",
    "ramfb",
    "isa-",
    "ide-",
    "scsi-",
    "ahci",
    "ich9-",
    "piix",
    "lsi",
    "mptsas",
    "megasas",
    "am53c974",
    "pvscsi",
    "pci-bridge",
    "pcie-",
    "pci-serial",
    "pxb",
    "ioh3420",
    "x3130-upstream",
    "xio3130-downstream",
    "i82801b11-bridge",
    "qemu-xhci",
    "nec-usb-xhci",
    "usb-ehci",
    "usb-uhci",
    "pci-ohci",
    "usb-tablet",
    "usb-kbd",
    "usb-mouse",
    "usb-hub",
    "usb-storage",
    "usb-uas",
    "usb-net",
    "usb-serial",
    "usb-audio",
    "pc-dimm",
    "pvpanic",
    "vmcoreinfo",
    "vmgenid",
    "i6300esb",
    "ib700",
    "intel-hda",
    "hda-",
    "AC97",
    "ES1370",
    "sdhci-pci",
    "sd-card",
    "intel-iommu",
    "vmmouse",
    "vmport",
    "hyperv-",
    "virtconsole",
    "virtserialport",
    "edu",
];

/// Those among them that are not: hostile to a move, or doors into the host.
const NOT_DEVICES: &[&str] = &[
    "virtio-9p",
    "virtio-fs",
    "virtio-input-host",
    "virtio-mem",
    "virtio-pmem",
    "virtio-vhost",
    "virtio-gpu-gl",
    "virtio-vga-gl",
    "virtio-gpu-rutabaga",
    "virtio-vga-rutabaga",
    "virtio-nsm",
    "isa-applesmc",
    "scsi-generic",
    "scsi-block",
    "isa-parallel",
    "virtio-snd",
];

fn device(driver: &str) -> Result<KindOf, String> {
    let starts = |list: &[&str]| list.iter().any(|prefix| driver.starts_with(prefix));
    if !starts(DEVICES) || starts(NOT_DEVICES) {
        return Err(format!(
            "device {driver:?} is not known to move: its state may be outside of what is moved"
        ));
    }
    Ok(|key| match key {
        "romfile" => Path,
        "vhostfd" | "vhostfds" | "fd" | "fds" => Refused(DESCRIPTOR),
        "evdev" | "sysfsdev" | "rootdir" | "hostdevice" | "filename" | "file" => Refused(FILE),
        _ => Word,
    })
}

fn object(kind: &str) -> Result<KindOf, String> {
    match kind {
        "memory-backend-ram"
        | "memory-backend-memfd"
        | "iothread"
        | "rng-builtin"
        | "throttle-group"
        | "main-loop"
        | "thread-context" => Ok(|_| Word),
        "memory-backend-file" => Ok(|key| if key == "mem-path" { Path } else { Word }),
        // Only the kernel's own: reading from another device can do anything.
        "rng-random" => Ok(|key| match key {
            "qom-type" | "id" => Word,
            "filename" => Random,
            _ => Refused("another source of random numbers; use rng-builtin"),
        }),
        "secret" => Ok(|key| match key {
            "file" => Path,
            "data" => Text,
            _ => Word,
        }),
        _ => Err(format!("object {kind:?} is not known to be safe at a target")),
    }
}

fn drive(key: &str) -> Kind {
    match key {
        "file" | "file.filename" => Image,
        "file.driver" | "driver" | "format" => Word,
        "snapshot" => Refused("what the guest writes would be in a temporary file of one host"),
        "serial" => Text,
        "if"
        | "index"
        | "bus"
        | "unit"
        | "media"
        | "id"
        | "cache"
        | "aio"
        | "discard"
        | "detect-zeroes"
        | "readonly"
        | "read-only"
        | "auto-read-only"
        | "werror"
        | "rerror"
        | "node-name"
        | "copy-on-read"
        | "file.locking"
        | "file.node-name"
        | "file.aio"
        | "file.discard"
        | "locking"
        | "l2-cache-size"
        | "cache-size"
        | "refcount-cache-size"
        | "cache-clean-interval"
        | "lazy-refcounts" => Word,
        _ if ["cache.", "file.cache.", "throttling", "bps", "iops", "group"]
            .iter()
            .any(|p| key.starts_with(p)) =>
        {
            Word
        }
        _ => Refused(UNKNOWN),
    }
}

fn blockdev(key: &str) -> Kind {
    // A graph of nodes: `file.`, `backing.` and the like lead from one to the next.
    let leaf = key.rsplit_once('.').map_or(key, |(_, leaf)| leaf);
    match leaf {
        "filename" => Image,
        "driver"
        | "node-name"
        | "read-only"
        | "auto-read-only"
        | "discard"
        | "detect-zeroes"
        | "force-share"
        | "direct"
        | "no-flush"
        | "locking"
        | "aio"
        | "aio-max-batch"
        | "size"
        | "offset"
        | "file"
        | "backing"
        | "throttle-group"
        | "l2-cache-size"
        | "cache-size"
        | "refcount-cache-size"
        | "cache-clean-interval"
        | "lazy-refcounts"
        | "read-zeroes"
        | "latency-ns"
        | "l2-cache-entry-size"
        | "pass-discard-request" => Word,
        _ => Refused(UNKNOWN),
    }
}

fn network(kind: &str) -> Result<KindOf, String> {
    match kind {
        "tap" => Ok(|key| match key {
            // Put into this host's words before.
            "ifname" => Word,
            "script" | "downscript" => Script,
            "fd" | "fds" | "vhostfd" | "vhostfds" => Refused(TAP_DESCRIPTOR),
            "helper" | "br" => Refused(HELPER),
            _ => Word,
        }),
        "user" => Ok(|key| match key {
            "hostfwd" => Refused(SOCKET),
            "guestfwd" => Refused("it opens a socket or runs a program"),
            "smb" | "smbserver" => Refused(HELPER),
            "tftp" | "bootfile" | "tftp-server-name" => Refused(FILE),
            // Networks are written as 10.0.2.0/24.
            "net" | "ip" | "ipv6-net" | "ipv6-prefix" | "ipv6-host" | "dnssearch" => Text,
            _ => Word,
        }),
        "none" | "hubport" => Ok(|_| Word),
        "bridge" => Err("the bridge helper is a program; use a tap, which the target's map names".to_owned()),
        other => Err(format!("network {other:?} {SOCKET}; use a tap")),
    }
}

fn legacy_network(kind: &str) -> Result<KindOf, String> {
    match kind {
        "none" | "nic" => Ok(|_| Word),
        _ => Err("use -netdev in its place".to_owned()),
    }
}

/// libvirt gives each VM a key in a file of one host, for the passwords that it passes on.
fn not_libvirts_key(settings: &Settings) -> Result<(), String> {
    let is = |key: &str, value: &str| settings.value(key).as_deref() == Some(value);
    if is("qom-type", "secret") && is("id", "masterKey0") {
        return Err(
            "it is libvirt's own key, in a file of one host; leave it out, and give each secret as -object \
                    secret,id=ID,file=FILE with a file that both hosts have"
                .to_owned(),
        );
    }
    Ok(())
}

/// A tap of this host in the place of the source's, and no script but the map's: without `script=` QEMU would run
/// its default one.
fn complete_tap(settings: &mut Settings, host: Host<'_>) -> Result<(), String> {
    let asked = settings.value("ifname");
    let asked = asked
        .ok_or("a tap without ifname= cannot be told from another; give it ifname=TAP, and no descriptor")?;
    settings.set("ifname", &host.tap(&asked)?);
    for key in ["script", "downscript"] {
        if settings.value(key).is_none() {
            settings.set(key, "no");
        }
    }
    Ok(())
}

/// The waiting QEMU would empty a file that is there: the source may be writing it, and still has the VM.
fn keep_logs(settings: &Settings, host: Host<'_>) -> Result<(), String> {
    let file = settings.value("backend").as_deref() == Some("file");
    for (path, append) in [("path", "append"), ("logfile", "logappend")] {
        let kept = settings.value(append).as_deref() == Some("on") || (path == "path" && !file);
        if let Some(value) = settings.value(path).filter(|_| !kept) {
            not_emptied(&host.path(&value, Presence::Created)?, &format!("add {append}=on"))?;
        }
    }
    Ok(())
}

fn not_emptied(path: &str, instead: &str) -> Result<(), String> {
    match std::path::Path::new(path).is_file() {
        true => Err(format!("QEMU would empty {path} as soon as it waits for the VM; {instead}")),
        false => Ok(()),
    }
}

fn chardev(backend: &str) -> Result<KindOf, String> {
    match backend {
        "null" | "ringbuf" | "memory" | "pty" | "vc" | "stdio" => Ok(|key| match key {
            "logfile" => NewPath,
            _ => Word,
        }),
        "file" => Ok(|key| match key {
            "path" | "logfile" => NewPath,
            "input-path" => Refused(FILE),
            _ => Word,
        }),
        "socket" => Ok(|key| match key {
            "path" | "logfile" => NewPath,
            "host" | "port" | "to" | "ipv4" | "ipv6" => Refused(SOCKET),
            "fd" => Refused(DESCRIPTOR),
            _ => Word,
        }),
        other => Err(format!("character device {other:?} {SOCKET}, or a device or program of it")),
    }
}

fn boot(key: &str) -> Kind {
    match key {
        "splash" => Path,
        "order" | "once" | "menu" | "strict" | "splash-time" | "reboot-timeout" => Word,
        _ => Refused(UNKNOWN),
    }
}

fn fw_cfg(key: &str) -> Kind {
    match key {
        // Names of the guest's own, with slashes: opt/org.example/key.
        "name" | "string" => Text,
        "file" => Path,
        _ => Refused(UNKNOWN),
    }
}

fn smbios(key: &str) -> Kind {
    match key {
        "file" | "path" => Path,
        _ => Text,
    }
}

fn global(key: &str) -> Kind {
    let property = key.rsplit_once('.').map_or(key, |(_, property)| property);
    match property {
        "romfile" | "vhostfd" | "fd" | "filename" | "evdev" | "sysfsdev" | "rootdir" => Refused(FILE),
        _ => Word,
    }
}

fn only(found: &str, allowed: &[&str]) -> Result<KindOf, String> {
    if allowed.contains(&found) {
        return Ok(|_| Word);
    }
    Err(format!("{found:?} uses something of the host; a VM that moves may have {}", allowed.join(", ")))
}

/// Puts `null`, `file:/log`, `unix:/socket,server=on` and the like into this host's words.
pub(super) fn character(value: &str, host: Host<'_>) -> Result<String, String> {
    if let Some(inner) = value.strip_prefix("mon:") {
        return character(inner, host).map(|inner| format!("mon:{inner}"));
    }
    let (kind, rest) = value.split_once(':').unwrap_or((value, ""));
    match kind {
        "null" | "none" | "stdio" | "pty" | "vc" if !value.contains('/') => Ok(value.to_owned()),
        "chardev" => word(rest).map(|id| format!("chardev:{id}")),
        "file" => {
            let path = host.path(rest, Presence::Created)?;
            not_emptied(&path, "use -chardev file,id=ID,path=FILE,append=on and chardev:ID in its place")?;
            Ok(format!("file:{}", without_commas(&path)?))
        }
        "unix" => {
            let (path, flags) =
                rest.split_once(',').map_or((rest, None), |(path, flags)| (path, Some(flags)));
            let path = host.path(path, Presence::Created)?;
            let path = without_commas(&path)?;
            let flags = flags.map(word).transpose()?.map(|flags| format!(",{flags}")).unwrap_or_default();
            Ok(format!("unix:{path}{flags}"))
        }
        _ => Err(format!("{value:?} {SOCKET}, or a device of it; use null, file: or unix:")),
    }
}

/// Puts the value of `-vnc` into this host's words.
pub(super) fn display(value: &str, host: Host<'_>) -> Result<String, String> {
    if value == "none" {
        return Ok(value.to_owned());
    }
    let (address, flags) =
        value.split_once(',').map_or((value, None), |(address, flags)| (address, Some(flags)));
    let flags = flags.map(vnc_flags).transpose()?.unwrap_or_default();
    let address = match address.strip_prefix("unix:") {
        Some(path) => format!("unix:{}", without_commas(&host.path(path, Presence::Created)?)?),
        None => without_commas(&host.address(address)?)?.to_owned(),
    };
    Ok(format!("{address}{flags}"))
}

fn vnc_flags(flags: &str) -> Result<String, String> {
    let allowed =
        ["password=", "password-secret=", "share=", "audiodev=", "lossy=", "non-adaptive=", "power-control="];
    for flag in flags.split(',') {
        if !allowed.iter().any(|prefix| flag.starts_with(prefix)) {
            return Err(format!("{flag}: {UNKNOWN}"));
        }
        word(flag)?;
    }
    Ok(format!(",{flags}"))
}

/// Firmware: a bare name is one of QEMU's own files.
pub(super) fn firmware(value: &str, host: Host<'_>) -> Result<String, String> {
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if !value.is_empty() && !value.starts_with('.') && value.chars().all(usable) {
        return Ok(value.to_owned());
    }
    host.path(value, Presence::Required)
}

/// A path that goes where a comma would end it.
pub(super) fn without_commas(path: &str) -> Result<&str, String> {
    if path.contains(',') { Err(format!("{path:?}: a comma cannot be used here")) } else { Ok(path) }
}
