//! The user's own command line of QEMU, and what is made of it.
//!
//! The source runs it as it is, with a QMP socket added. The target runs it with `-incoming defer -S` added, with the
//! machine type and processor that the source's QEMU resolved (an alias such as `q35` means another machine in each
//! version), and with everything that belongs to a host put into the target's own words by [`HostMap`].

use std::path::Path;

use super::huge::{self, HugePages};
use super::images::{self, Image};
use super::keyval::Settings;
use super::launch::QMP_SOCKET;
use super::options::{NEVER, Rule, Takes, implied_key, known};
use super::policy::{Host, HostMap, Presence, Refusal, TargetPolicy, Why};
use super::rules;
use crate::types::Code;

/// The most arguments taken: large VMs of libvirt have about 200.
const ARGS_MAX: usize = 4096;
/// The most bytes of all arguments: the kernel's own limit for one of them is 128 KiB.
const BYTES_MAX: usize = 1 << 20;
/// What QEMU gives a VM that asks for no size (`hw/core/machine.c`).
const RAM_BYTES_DEFAULT: u64 = 128 << 20;
/// Where a QEMU finds the memory of the template that it is a clone of.
const TEMPLATE: &str = "/proc/self/fd/0";
/// The ids that are ours.
const OUR_ID: &str = "sterna-qmp";

/// Why a command line cannot be used at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// There is no program.
    #[error("the command line is empty; give qemu-system-x86_64 and its options")]
    Empty,
    /// It is too long.
    #[error("the command line is longer than any VM's")]
    TooLong,
    /// A byte that no argument can have.
    #[error("argument {at} holds a zero byte")]
    ZeroByte {
        /// Its place.
        at: usize,
    },
    /// An option at the end lacks its value.
    #[error("-{option} needs a value")]
    NoValue {
        /// The option.
        option: String,
    },
    /// An option that a VM under Sterna must not have.
    #[error("-{option} cannot be used: {reason}")]
    Never {
        /// The option.
        option: String,
        /// Why.
        reason: &'static str,
    },
    /// A configuration file that cannot be made into options.
    #[error("-readconfig {file} cannot be used: {detail}")]
    Config {
        /// The file.
        file: String,
        /// What is wrong with it.
        detail: String,
    },
    /// A size that is none.
    #[error("{text:?} is no size of memory")]
    Size {
        /// What was written.
        text: String,
    },
}

/// One option with its value, as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Opt {
    /// The name without dashes.
    name: String,
    /// The dashes as they were written: QEMU takes one or two; a bare image has none.
    dashes: &'static str,
    value: Option<String>,
}

/// A command line of QEMU, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    program: String,
    options: Vec<Opt>,
}

impl CommandLine {
    /// Reads a command line; the first argument is the program.
    pub fn parse(argv: Vec<String>) -> Result<Self, CommandLineError> {
        let line = Self::read(argv)?;
        line.check_never()?;
        Ok(line)
    }

    fn read(argv: Vec<String>) -> Result<Self, CommandLineError> {
        check_limits(&argv)?;
        let mut args = argv.into_iter();
        let program = args.next().filter(|program| !program.is_empty()).ok_or(CommandLineError::Empty)?;
        let mut options = Vec::new();
        while let Some(arg) = args.next() {
            options.push(parse_option(arg, &mut args)?);
        }
        Ok(Self { program, options })
    }

    /// Reads one that runs already: our own options may be in it.
    pub(super) fn parse_any(argv: Vec<String>) -> Option<Self> {
        Self::read(argv).ok()
    }

    /// Reads one as it is executed ([`CommandLine::for_target`]).
    pub fn parse_launched(argv: Vec<String>) -> Option<Self> {
        Self::parse_any(argv)
    }

    /// Whether one monitor is all that a QEMU with this command line has. It makes one by itself only where it is told of none.
    pub(super) fn has_one_monitor(&self) -> bool {
        let is_monitor = |option: &&Opt| match option.name.as_str() {
            "mon" | "qmp" | "qmp-pretty" => true,
            "monitor" => option.value.as_deref() != Some("none"),
            // `-serial mon:stdio`, or whatever a file says.
            "readconfig" => true,
            _ => option.value.as_deref().is_some_and(|value| value.starts_with("mon:")),
        };
        self.options.iter().filter(is_monitor).count() == 1
    }

    /// The command line as it was read.
    pub fn to_argv(&self) -> Vec<String> {
        let mut argv = vec![self.program.clone()];
        argv.extend(self.options.iter().flat_map(Opt::to_args));
        argv
    }

    /// What is run at the source: the user's own line and our QMP socket in the VM's run directory.
    pub fn for_source(&self, run_dir: &Path) -> Vec<String> {
        let mut argv = self.to_argv();
        argv.extend(qmp_args(run_dir));
        argv
    }

    /// What is run at the target, in the target's own words; or everything that the target refuses.
    ///
    /// `machine` and `cpu` are what the source's QEMU resolved them to ([`Qemu::machine_type`](super::Qemu::machine_type),
    /// [`Qemu::cpu_model`](super::Qemu::cpu_model)); `cpu` counts only where the user gave none.
    pub fn for_target(
        &self,
        run_dir: &Path,
        machine: &str,
        cpu: Option<&str>,
        map: &HostMap,
        policy: &TargetPolicy,
    ) -> Result<Vec<String>, Vec<Refusal>> {
        let host = Host { map, policy };
        let mut refusals = Vec::new();
        let program = host.binary(&self.program).unwrap_or_else(|reason| {
            refusals.push(Refusal { code: Code::CommandLine, option: self.program.clone(), reason });
            String::new()
        });
        let mut argv = vec![program];
        for option in self.with_resolved(machine, cpu, &mut refusals) {
            match translate(&option, host) {
                Ok(translated) => argv.extend(translated.to_args()),
                Err(why) => {
                    refusals.push(Refusal { code: why.code, option: option.shown(), reason: why.text })
                }
            }
        }
        argv.extend(["-incoming", "defer", "-S"].map(str::to_owned));
        argv.extend(qmp_args(run_dir));
        if refusals.is_empty() { Ok(argv) } else { Err(refusals) }
    }

    /// The same VM with its main memory mapped copy-on-write from the file that QEMU is given as its standard input
    /// ([`Launch::memory`](super::Launch)): `block` is the name of that memory's block, of so many bytes.
    ///
    /// # Errors
    /// What of the command line cannot be brought together with that.
    pub fn on_template(&self, block: &str, bytes: u64) -> Result<Self, &'static str> {
        let mut options = self.options.clone();
        if options.iter().any(|option| matches!(option.name.as_str(), "mem-path" | "mem-prealloc" | "numa")) {
            return Err(
                "its memory is of a kind of its own (-mem-path, -mem-prealloc, -numa): leave that out, for clones map the template's",
            );
        }
        let mut replaced = None;
        for option in options.iter_mut().filter(|option| is_machine(&option.name)) {
            let settings = option.value.as_deref().and_then(|value| Settings::parse(value, "type"));
            let Some(mut settings) = settings else { continue };
            if let Some(id) = settings.remove("memory-backend") {
                replaced = Some(id);
                option.value = Some(settings.to_text());
            }
        }
        options.retain(|option| {
            let settings = option.value.as_deref().filter(|_| option.name == "object");
            let id = settings.and_then(|value| Settings::parse(value, "qom-type")?.value("id"));
            id.is_none() || id != replaced
        });
        // QEMU calls the block after the object's path, unless it shall be called after its name alone.
        let (id, path) = block.strip_prefix("/objects/").map_or((block, "off"), |id| (id, "on"));
        if !is_plain_name(id) {
            return Err("the name of its memory is no name of an object");
        }
        let object = format!(
            "memory-backend-file,id={id},size={bytes},share=off,mem-path={TEMPLATE},x-use-canonical-path-for-ramblock-id={path}"
        );
        for (name, value) in [("object", object), ("machine", format!("memory-backend={id}"))] {
            options.push(Opt { name: name.to_owned(), dashes: "-", value: Some(value) });
        }
        Ok(Self { program: self.program.clone(), options })
    }

    /// What is run to make a clone of a template here: the line of its first VM, with the machine type and the processor that its
    /// QEMU resolved, waiting for its device state.
    pub fn for_clone(&self, run_dir: &Path, machine: &str, cpu: Option<&str>) -> Vec<String> {
        let mut refusals = Vec::new();
        let options = self.with_resolved(machine, cpu, &mut refusals);
        let mut argv = vec![self.program.clone()];
        argv.extend(options.iter().flat_map(Opt::to_args));
        argv.extend(["-incoming", "defer", "-S"].map(str::to_owned));
        argv.extend(qmp_args(run_dir));
        argv
    }

    /// How much RAM the VM has, for the check whether the target has it: main memory and DIMMs.
    pub fn ram_bytes(&self) -> Result<u64, CommandLineError> {
        let mut main = RAM_BYTES_DEFAULT;
        for size in self.settings_of("m").filter_map(|settings| settings.value("size")) {
            main = size_bytes(&size, 20)?;
        }
        let used: Vec<String> =
            self.settings_of("device").filter_map(|settings| settings.value("memdev")).collect();
        let mut total = main;
        for object in self.settings_of("object") {
            if let (Some(id), Some(size)) = (object.value("id"), object.value("size"))
                && used.contains(&id)
            {
                total =
                    total.checked_add(size_bytes(&size, 0)?).ok_or(CommandLineError::Size { text: size })?;
            }
        }
        Ok(total)
    }

    /// The disk images that it names as qcow2, whose files say what lies below them.
    pub fn qcow2_images(&self) -> Vec<String> {
        self.images().into_iter().filter(|image| image.opens_below).map(|image| image.path).collect()
    }

    /// The disk images that it names.
    pub(super) fn images(&self) -> Vec<Image> {
        let pairs_of = |name| self.settings_of(name).map(|settings| settings.pairs()).collect::<Vec<_>>();
        images::images_in(&pairs_of("drive"), &pairs_of("blockdev"))
    }

    pub(super) fn settings_of<'a>(&'a self, name: &'static str) -> impl Iterator<Item = Settings> + 'a {
        let values = self.options.iter().filter(move |option| option.name == name);
        values.filter_map(move |option| Settings::parse(option.value.as_deref()?, implied_key(name)))
    }

    fn check_never(&self) -> Result<(), CommandLineError> {
        for option in &self.options {
            if let (true, Some((_, Rule::Refused(reason)))) =
                (NEVER.contains(&option.name.as_str()), known(&option.name))
            {
                return Err(CommandLineError::Never { option: option.name.clone(), reason });
            }
            if option.value.as_deref().is_some_and(|value| value.contains(OUR_ID)) {
                let reason = "it uses an id that Sterna needs for itself";
                return Err(CommandLineError::Never { option: option.name.clone(), reason });
            }
        }
        Ok(())
    }

    /// The options, with the machine type and the processor as the source's QEMU resolved them.
    fn with_resolved(&self, machine: &str, cpu: Option<&str>, refusals: &mut Vec<Refusal>) -> Vec<Opt> {
        let mut options = self.options.clone();
        let mut resolved = false;
        for option in options.iter_mut().filter(|option| is_machine(&option.name)) {
            let settings = option.value.as_deref().and_then(|value| Settings::parse(value, "type"));
            if let Some(mut settings) = settings.filter(|settings| settings.value("type").is_some()) {
                settings.set("type", machine);
                option.value = Some(settings.to_text());
                resolved = true;
            }
        }
        let mut add = |name: &str, value: &str| {
            options.insert(0, Opt { name: name.to_owned(), dashes: "-", value: Some(value.to_owned()) });
        };
        if !resolved {
            add("machine", machine);
        }
        if let Some(cpu) = cpu.filter(|_| !self.options.iter().any(|option| option.name == "cpu")) {
            add("cpu", cpu);
        }
        for (what, name) in [("machine", Some(machine)), ("cpu", cpu)] {
            if name.is_some_and(|name| !is_plain_name(name)) {
                let reason = "what the source says that it resolved is no name".to_owned();
                let option = format!("-{what}");
                refusals.push(Refusal { code: Code::CommandLine, option, reason });
            }
        }
        options
    }
}

impl Opt {
    fn to_args(&self) -> Vec<String> {
        let name = (!self.dashes.is_empty()).then(|| format!("{}{}", self.dashes, self.name));
        name.into_iter().chain(self.value.clone()).collect()
    }

    fn shown(&self) -> String {
        self.to_args().join(" ")
    }
}

/// The huge pages of hugetlbfs that this host must have for a command line in its own words, as it is executed
/// ([`CommandLine::for_target`]).
pub fn huge_pages(argv: &[String]) -> Vec<HugePages> {
    let Ok(line) = CommandLine::read(argv.to_vec()) else { return Vec::new() };
    let folder = line.options.iter().rev().find(|option| option.name == "mem-path");
    let main = line.settings_of("m").filter_map(|settings| settings.value("size")).last();
    let main = main.map_or(Some(RAM_BYTES_DEFAULT), |size| size_bytes(&size, 20).ok());
    let of_main = folder.and_then(|option| huge::in_folder(option.value.as_deref()?, main?));
    of_main.into_iter().chain(line.settings_of("object").filter_map(|object| huge_object(&object))).collect()
}

/// What a memory object takes of huge pages. One that reserves nothing (`reserve=off`) takes them as it can.
fn huge_object(object: &Settings) -> Option<HugePages> {
    let pairs = object.pairs();
    let value =
        |key: &str| pairs.iter().rev().find(|(known, _)| known == key).map(|(_, value)| value.as_str());
    let size = |key: &str| value(key).and_then(|size| size_bytes(size, 0).ok());
    if value("reserve").is_some_and(is_off) {
        return None;
    }
    match value("qom-type")? {
        "memory-backend-memfd" if value("hugetlb").is_some_and(|word| !is_off(word)) => {
            let page_bytes =
                size("hugetlbsize").filter(|bytes| *bytes > 0).or_else(huge::default_page_bytes)?;
            Some(HugePages { page_bytes, bytes: size("size")? })
        }
        "memory-backend-file" => huge::in_folder(value("mem-path")?, size("size")?),
        _ => None,
    }
}

/// As QEMU reads a truth value (`qapi_bool_parse`).
fn is_off(word: &str) -> bool {
    matches!(word, "off" | "no" | "false" | "n")
}

fn is_machine(name: &str) -> bool {
    matches!(name, "machine" | "M")
}

fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

fn check_limits(argv: &[String]) -> Result<(), CommandLineError> {
    if argv.len() > ARGS_MAX || argv.iter().map(String::len).sum::<usize>() > BYTES_MAX {
        return Err(CommandLineError::TooLong);
    }
    match argv.iter().position(|arg| arg.contains('\0')) {
        Some(at) => Err(CommandLineError::ZeroByte { at }),
        None => Ok(()),
    }
}

fn parse_option(arg: String, rest: &mut std::vec::IntoIter<String>) -> Result<Opt, CommandLineError> {
    let Some(name) = arg.strip_prefix('-') else {
        return Ok(Opt { name: String::new(), dashes: "", value: Some(arg) });
    };
    let (name, dashes) = name.strip_prefix('-').map_or((name, "-"), |name| (name, "--"));
    let name = name.to_owned();
    let value = match known(&name) {
        Some((Takes::Nothing, _)) => None,
        Some((Takes::Value, _)) => {
            Some(rest.next().ok_or_else(|| CommandLineError::NoValue { option: name.clone() })?)
        }
        // Whether it takes a value only QEMU knows; for the source it makes no difference, and the target
        // refuses it by its name.
        None => {
            rest.as_slice().first().is_some_and(|next| !next.starts_with('-')).then(|| rest.next()).flatten()
        }
    };
    Ok(Opt { name, dashes, value })
}

/// One option in this host's words.
fn translate(option: &Opt, host: Host<'_>) -> Result<Opt, Why> {
    let value = option.value.as_deref().unwrap_or_default();
    let (_, rule) = match known(&option.name) {
        Some(known) => known,
        None if option.dashes.is_empty() => {
            return Err(
                "an image without -drive: QEMU would guess its format; use -drive with format=".into()
            );
        }
        None => return Err("this option is not known to be safe at a target".into()),
    };
    let translated = match rule {
        Rule::Plain => value.to_owned(),
        Rule::Refused(reason) => return Err(reason.into()),
        Rule::Path => rules::without_commas(&host.path(value, Presence::Required)?)?.to_owned(),
        Rule::NewPath => host.path(value, Presence::Created)?,
        Rule::Firmware => rules::firmware(value, host)?,
        Rule::Character => rules::character(value, host)?,
        Rule::Display => rules::display(value, host)?,
        Rule::Settings(implied) => {
            let mut settings = Settings::parse(value, implied).ok_or("its value cannot be read")?;
            rules::apply(&option.name, &mut settings, host)?;
            settings.to_text()
        }
    };
    let value = option.value.is_some().then_some(translated);
    Ok(Opt { name: option.name.clone(), dashes: option.dashes, value })
}

/// The arguments that a process was started with.
pub(super) fn argv_of(pid: i32) -> std::io::Result<Vec<String>> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline"))?;
    let args = line.strip_suffix(b"\0").unwrap_or(&line).split(|byte| *byte == 0);
    Ok(args.map(|arg| String::from_utf8_lossy(arg).into()).collect())
}

fn qmp_args(run_dir: &Path) -> [String; 4] {
    let path = run_dir.join(QMP_SOCKET).to_string_lossy().replace(',', ",,");
    [
        "-chardev".to_owned(),
        format!("socket,id={OUR_ID},path={path},server=on,wait=off"),
        "-mon".to_owned(),
        format!("chardev={OUR_ID},mode=control"),
    ]
}

/// Reads a size as QEMU does (`qemu_strtosz`): hexadecimal, or decimal with a fraction, with a suffix; without one
/// it counts in units of `1 << shift`.
fn size_bytes(text: &str, shift: u32) -> Result<u64, CommandLineError> {
    let wrong = || CommandLineError::Size { text: text.to_owned() };
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let number = u64::from_str_radix(digits, 16).map_err(|_| wrong())?;
        return number.checked_mul(1 << shift).ok_or_else(wrong);
    }
    let last = text.chars().next_back().ok_or_else(wrong)?;
    let suffix = "BKMGTPE".find(last.to_ascii_uppercase());
    let (digits, shift) = match suffix {
        Some(power) => (text.get(..text.len() - 1).ok_or_else(wrong)?, power as u32 * 10),
        None => (text, shift),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let fraction: f64 = format!("0.{fraction}").parse().map_err(|_| wrong())?;
    let unit = 1u64 << shift;
    let whole = whole.checked_mul(unit).ok_or_else(wrong)?;
    whole.checked_add((fraction * unit as f64) as u64).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_has_no_other_monitor_has_one() {
        let ours = qmp_args(Path::new("/run/x"));
        let has_one = |more: &[&str]| {
            let line =
                ["qemu-system-x86_64"].iter().chain(more).map(|arg| (*arg).to_owned()).chain(ours.clone());
            CommandLine::parse_any(line.collect()).unwrap().has_one_monitor()
        };
        // What `-mon` is given once, QEMU makes no other by itself.
        for one in [&[][..], &["-nodefaults"], &["-monitor", "none"], &["-serial", "stdio"], &["-vnc", ":1"]]
        {
            assert!(has_one(one), "{one:?}");
        }
        for more in [
            &["-qmp", "unix:/x,server=on"][..],
            &["--monitor", "stdio"],
            &["-serial", "mon:stdio"],
            &["-chardev", "pty,id=x", "-mon", "x"],
            &["-qmp-pretty", "stdio"],
            &["-readconfig", "/x"],
        ] {
            assert!(!has_one(more), "{more:?}");
        }
    }
}
