//! QEMU's options, as far as a VM that moves may have them (`qemu-options.hx` of QEMU 7.2 to 10.0).
//!
//! An allow-list: what is not here is refused at the target by its name.

/// How an option is treated at a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// It names nothing of the host.
    Plain,
    /// Its settings are checked one by one, by [`super::rules`]; here is the key of the first value.
    Settings(&'static str),
    /// Its value is a file that is there.
    Path,
    /// Its value is a file that QEMU makes.
    NewPath,
    /// Its value is a firmware file: a name in QEMU's own folders, or a path.
    Firmware,
    /// Its value is a character device: `null`, `file:/log`, `unix:/socket`, ...
    Character,
    /// Its value is a display's address.
    Display,
    /// It is refused, with the reason.
    Refused(&'static str),
}

/// Whether an option takes a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// It stands alone.
    Nothing,
    /// The next argument is its value.
    Value,
}

const OWN_STATE: &str = "a target's QEMU must wait for its state; Sterna says so itself";
const DAEMON: &str =
    "the process would fork away from whoever watches it; Sterna keeps QEMU in the background itself";
const RAW_IMAGE: &str =
    "QEMU would guess the image's format from what the guest wrote into it; use -drive with format=";
const FILES: &str = "it makes QEMU read or write files of the host";
const SOCKETS: &str = "it opens a socket or device of the host";
const PROGRAMS: &str = "it runs a program or loads code";
const SNAPSHOT: &str = "what the guest writes would be in a temporary file of one host";
const BEHIND: &str = "it changes settings behind the options that are checked; give them where they belong";

use Rule::{Character, Display, Firmware, NewPath, Path, Plain, Refused, Settings};
use Takes::{Nothing, Value};

/// Each option with what it takes and how it is treated.
const OPTIONS: &[(&str, Takes, Rule)] = &[
    ("machine", Value, Settings("type")),
    ("M", Value, Settings("type")),
    ("cpu", Value, Settings("model")),
    ("accel", Value, Settings("accel")),
    ("smp", Value, Settings("cpus")),
    ("m", Value, Settings("size")),
    ("object", Value, Settings("qom-type")),
    ("device", Value, Settings("driver")),
    ("drive", Value, Settings("")),
    ("blockdev", Value, Settings("driver")),
    ("netdev", Value, Settings("type")),
    ("nic", Value, Settings("type")),
    ("net", Value, Settings("type")),
    ("chardev", Value, Settings("backend")),
    ("mon", Value, Settings("chardev")),
    ("numa", Value, Settings("type")),
    ("boot", Value, Settings("order")),
    ("fw_cfg", Value, Settings("name")),
    ("smbios", Value, Settings("")),
    ("global", Value, Settings("")),
    ("rtc", Value, Settings("base")),
    ("name", Value, Settings("guest")),
    ("icount", Value, Settings("shift")),
    ("overcommit", Value, Settings("")),
    ("sandbox", Value, Settings("enable")),
    ("action", Value, Settings("")),
    ("audio", Value, Settings("driver")),
    ("audiodev", Value, Settings("driver")),
    ("display", Value, Settings("type")),
    ("msg", Value, Settings("timestamp")),
    ("compat", Value, Settings("")),
    ("uuid", Value, Plain),
    ("vga", Value, Plain),
    ("k", Value, Plain),
    ("seed", Value, Plain),
    ("watchdog-action", Value, Plain),
    ("usbdevice", Value, Refused("it can name devices of the host; use -device usb-tablet and the like")),
    ("append", Value, Plain),
    ("enable-kvm", Nothing, Plain),
    ("usb", Nothing, Plain),
    ("nodefaults", Nothing, Plain),
    ("no-user-config", Nothing, Plain),
    ("no-reboot", Nothing, Plain),
    ("no-shutdown", Nothing, Plain),
    ("no-acpi", Nothing, Plain),
    ("no-hpet", Nothing, Plain),
    ("no-fd-bootchk", Nothing, Plain),
    ("nographic", Nothing, Plain),
    ("mem-prealloc", Nothing, Plain),
    ("win2k-hack", Nothing, Plain),
    ("kernel", Value, Path),
    ("initrd", Value, Path),
    ("dtb", Value, Path),
    ("mem-path", Value, Path),
    ("L", Value, Path),
    ("bios", Value, Firmware),
    ("pidfile", Value, NewPath),
    ("D", Value, NewPath),
    ("d", Value, Plain),
    ("serial", Value, Character),
    ("parallel", Value, Character),
    ("monitor", Value, Character),
    ("qmp", Value, Character),
    ("qmp-pretty", Value, Character),
    ("debugcon", Value, Character),
    ("vnc", Value, Display),
    ("S", Nothing, Refused(OWN_STATE)),
    ("incoming", Value, Refused(OWN_STATE)),
    ("preconfig", Nothing, Refused(OWN_STATE)),
    ("loadvm", Value, Refused(OWN_STATE)),
    ("only-migratable", Nothing, Plain),
    ("daemonize", Nothing, Refused(DAEMON)),
    ("runas", Value, Refused("the target's own configuration says whom QEMU runs as")),
    ("chroot", Value, Refused("the target's own configuration says where QEMU runs")),
    ("run-with", Value, Refused("the target's own configuration says how QEMU runs")),
    ("readconfig", Value, Refused("what is in that file is not checked; `sterna run` makes options of it")),
    ("writeconfig", Value, Refused(FILES)),
    ("set", Value, Refused(BEHIND)),
    ("hda", Value, Refused(RAW_IMAGE)),
    ("hdb", Value, Refused(RAW_IMAGE)),
    ("hdc", Value, Refused(RAW_IMAGE)),
    ("hdd", Value, Refused(RAW_IMAGE)),
    ("cdrom", Value, Refused(RAW_IMAGE)),
    ("fda", Value, Refused(RAW_IMAGE)),
    ("fdb", Value, Refused(RAW_IMAGE)),
    ("sd", Value, Refused(RAW_IMAGE)),
    ("mtdblock", Value, Refused(RAW_IMAGE)),
    ("pflash", Value, Refused(RAW_IMAGE)),
    ("snapshot", Nothing, Refused(SNAPSHOT)),
    ("acpitable", Value, Refused(FILES)),
    ("option-rom", Value, Refused(FILES)),
    ("trace", Value, Refused(FILES)),
    ("dump-vmstate", Value, Refused(FILES)),
    ("virtfs", Value, Refused("folders shared with the host do not move")),
    ("fsdev", Value, Refused("folders shared with the host do not move")),
    ("iscsi", Value, Refused(SOCKETS)),
    ("spice", Value, Refused(SOCKETS)),
    ("gdb", Value, Refused(SOCKETS)),
    ("s", Nothing, Refused(SOCKETS)),
    ("tpmdev", Value, Refused(SOCKETS)),
    ("add-fd", Value, Refused("descriptors do not travel; name the file itself, in -blockdev or -chardev")),
    ("plugin", Value, Refused(PROGRAMS)),
    ("semihosting", Nothing, Refused(PROGRAMS)),
    ("semihosting-config", Value, Refused(PROGRAMS)),
];

/// Options that a VM under Sterna must not have, wherever it is started.
pub(super) const NEVER: [&str; 4] = ["S", "incoming", "preconfig", "daemonize"];

/// What is known of an option, by its name without dashes.
pub(super) fn known(name: &str) -> Option<(Takes, Rule)> {
    OPTIONS.iter().find(|(known, ..)| *known == name).map(|(_, takes, rule)| (*takes, *rule))
}

/// The key of an option's first value.
pub(super) fn implied_key(name: &str) -> &'static str {
    match known(name) {
        Some((_, Rule::Settings(key))) => key,
        _ => "",
    }
}
