//! QEMU's configuration files (`-readconfig`, docs/config/*.cfg), read once and made into ordinary options.
//!
//! A file is another one on each host, and changes. So its settings become part of the VM's own command line when it
//! is started, are checked as all others, and travel with it.

use std::path::Path;

use super::cmdline::CommandLineError;

/// QEMU reads lines of up to a kilobyte (`qemu_config_foreach`).
const FILE_BYTES_MAX: usize = 1 << 20;
/// Groups of a file with the options that mean the same, where the names differ.
const RENAMED: [(&str, &str); 3] = [("memory", "m"), ("smp-opts", "smp"), ("boot-opts", "boot")];
/// Groups that are called as their options are.
const KNOWN: [&str; 19] = [
    "machine",
    "accel",
    "device",
    "drive",
    "netdev",
    "nic",
    "net",
    "chardev",
    "mon",
    "object",
    "global",
    "rtc",
    "name",
    "fw_cfg",
    "msg",
    "overcommit",
    "sandbox",
    "icount",
    "numa",
];

/// The command line with the files' settings in the place of each `-readconfig`. Relative paths begin at `folder`.
pub fn expand(argv: Vec<String>, folder: &Path) -> Result<Vec<String>, CommandLineError> {
    let mut expanded = Vec::with_capacity(argv.len());
    let mut args = argv.into_iter();
    while let Some(arg) = args.next() {
        if !matches!(arg.as_str(), "-readconfig" | "--readconfig") {
            expanded.push(arg);
            continue;
        }
        let file = args.next().ok_or(CommandLineError::NoValue { option: "readconfig".to_owned() })?;
        let unusable = |detail: String| CommandLineError::Config { file: file.clone(), detail };
        let text = std::fs::read_to_string(folder.join(&file)).map_err(|why| unusable(why.to_string()))?;
        expanded.extend(options(&text).map_err(unusable)?);
    }
    Ok(expanded)
}

/// The options that a file stands for.
fn options(text: &str) -> Result<Vec<String>, String> {
    if text.len() > FILE_BYTES_MAX {
        return Err("it is larger than any configuration".to_owned());
    }
    let mut options: Vec<(String, Vec<String>)> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        let odd = |what: &str| format!("line {number}: {what}");
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(group) = line.strip_prefix('[') {
            options.push(
                group_of(group).ok_or_else(|| odd("not a group that Sterna knows; give it as an option"))?,
            );
            continue;
        }
        let (key, value) =
            setting_of(line).ok_or_else(|| odd("neither [group \"id\"] nor key = \"value\""))?;
        let (_, settings) = options.last_mut().ok_or_else(|| odd("a setting without a group"))?;
        settings.push(format!("{key}={}", value.replace(',', ",,")));
    }
    // A group without settings says nothing.
    let said = options.into_iter().filter(|(_, settings)| !settings.is_empty());
    Ok(said.flat_map(|(option, settings)| [format!("-{option}"), settings.join(",")]).collect())
}

/// Reads `device "net0"]` or `machine]`.
fn group_of(text: &str) -> Option<(String, Vec<String>)> {
    let text = text.strip_suffix(']')?.trim();
    let (group, id) = match text.split_once(char::is_whitespace) {
        Some((group, id)) => (group, Some(id.trim().strip_prefix('"')?.strip_suffix('"')?)),
        None => (text, None),
    };
    let renamed = RENAMED.iter().find(|(from, _)| *from == group).map(|(_, to)| *to);
    let option = renamed.or_else(|| KNOWN.contains(&group).then_some(group))?;
    Some((option.to_owned(), id.map(|id| format!("id={}", id.replace(',', ",,"))).into_iter().collect()))
}

/// Reads `key = "value"`.
fn setting_of(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let (key, value) = (key.trim(), value.trim().strip_prefix('"')?.strip_suffix('"')?);
    (!key.is_empty() && !key.contains(char::is_whitespace) && !value.contains('"')).then_some((key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_becomes_the_options_that_it_stands_for() {
        let text = "# a machine\n[machine]\n  type = \"q35\"\n\n[device \"net,0\"]\n  driver = \"virtio-net-pci\"\n  \
                    addr = \"1.0\"\n[memory]\nsize = \"1G\"\n[smp-opts]\n cpus = \"2\"\n[boot-opts]\n strict = \"on\"\n\
                    [global]\ndriver=\"a\"\nproperty=\"b\"\nvalue=\"\"\n[rtc]\n";
        let expected = "-machine type=q35 -device id=net,,0,driver=virtio-net-pci,addr=1.0 -m size=1G -smp cpus=2 \
                        -boot strict=on -global driver=a,property=b,value=";
        assert_eq!(options(text).unwrap().join(" "), expected);
    }

    #[test]
    fn what_is_not_understood_is_told_with_its_line() {
        for (text, why) in [
            ("\nx = \"1\"", "line 2: a setting without a group"),
            ("[plugin]\nfile = \"x\"", "line 1: not a group"),
            ("[device \"x]\n", "line 1: not a group"),
            ("[machine]\ntype = q35", "line 2: neither"),
            ("[machine]\ntype", "line 2: neither"),
        ] {
            assert!(options(text).unwrap_err().starts_with(why), "{text}");
        }
    }

    #[test]
    fn the_file_goes_and_its_settings_stay() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("vm.cfg"), "[machine]\ntype = \"q35\"\n").unwrap();
        let argv = |list: &[&str]| list.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
        let line = expand(argv(&["q", "-readconfig", "vm.cfg", "-m", "64"]), folder.path()).unwrap();
        assert_eq!(line, argv(&["q", "-machine", "type=q35", "-m", "64"]));
        let missing = expand(argv(&["q", "-readconfig", "no.cfg"]), folder.path()).unwrap_err();
        assert!(missing.to_string().contains("no.cfg"), "{missing}");
        assert!(expand(argv(&["q", "-readconfig"]), folder.path()).is_err());
    }
}
