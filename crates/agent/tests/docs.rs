//! The documents say what is so: their configurations load, and they leave out no key, reason, crate or file.
#![allow(clippy::unwrap_used, reason = "a test that cannot read the documents fails")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sterna_agent::Config;

/// Documents whose links are followed.
const DOCUMENTS: [&str; 7] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "PROTOCOL.md",
    "docs/guide.md",
    "docs/reliability.md",
];
/// The guide has all that an operator looks up.
const GUIDE: &str = "docs/guide.md";
const EXAMPLE: &str = "docs/agent.example.toml";
/// Words by which a file proves that it does what the engine must not.
const NOT_IN_THE_ENGINE: [&str; 6] =
    ["Instant", "SystemTime", "std::thread", "std::net", "std::fs", "std::process"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|why| panic!("{}: {why}", path.display()))
}

/// What stands between lines of three backticks with this word.
fn blocks(document: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    let inside = |part: &str| part.split("\n```").next().map(str::to_owned);
    document.split(&fence).skip(1).filter_map(inside).collect()
}

fn load(text: &str) -> Config {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, text).unwrap();
    Config::load(file.path()).unwrap_or_else(|why| panic!("{why}\n{text}"))
}

/// Public fields of the structures in a source file, as keys of the configuration.
fn keys(source: &str) -> BTreeSet<String> {
    let names = read(source);
    let fields = names.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.split_once(": "));
    let fields = fields.filter(|(name, _)| name.chars().all(|c| c.is_ascii_lowercase() || c == '_'));
    fields.map(|(name, _)| name.replace('_', "-")).collect()
}

/// Rust files below a folder.
fn sources(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            sources(&entry, out);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            out.push(entry);
        }
    }
}

fn crates() -> Vec<String> {
    let entries = std::fs::read_dir(root().join("crates")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_configuration_in_the_documents_loads() {
    for document in ["README.md", GUIDE] {
        let found = blocks(&read(document), "toml");
        assert!(!found.is_empty(), "{document} shows no configuration");
        for text in found {
            let config = load(&text);
            assert!(config.hosts.contains_key(&config.name), "{document}: the list of hosts suits all hosts");
        }
    }
    let config = load(&read(EXAMPLE));
    let map = &config.map;
    assert!(!map.taps.is_empty() && !map.paths.is_empty());
    assert!(!map.scripts.is_empty() && !map.addresses.is_empty());
}

#[test]
fn every_key_is_in_the_guide_and_in_the_example() {
    let mut keys = keys("crates/agent/src/config.rs");
    keys.extend(["binaries", "taps", "paths", "scripts", "addresses"].map(str::to_owned));
    assert!(keys.len() > 15, "{keys:?}");
    let (guide, example) = (read(GUIDE), read(EXAMPLE));
    for key in &keys {
        let written =
            [format!("{key} = "), format!("[{key}"), format!("[map.{key}]"), format!("[guests.{key}.")];
        let has = |text: &str| written.iter().any(|form| text.contains(form));
        assert!(has(&guide), "{GUIDE} does not show {key}");
        assert!(has(&example), "{EXAMPLE} does not show {key}");
        let told = [format!("`{key}`"), format!(".{key}`"), format!("`{key}.")]
            .iter()
            .any(|form| guide.contains(form));
        assert!(told, "{GUIDE} does not explain {key}");
    }
}

#[test]
fn the_defaults_in_the_guide_are_those_of_the_code() {
    let least = "name = \"a\"\nlisten = \"h:1\"\n[tls]\nca = \"a\"\ncert = \"b\"\nkey = \"c\"\n";
    let (config, guide) = (load(least), read(GUIDE));
    for (key, value) in [("state-dir", &config.state_dir), ("run-dir", &config.run_dir)] {
        let row = format!("| `{key}` | `{}` |", value.display());
        assert!(guide.contains(&row), "{GUIDE} has no {row}");
    }
    assert_eq!(config.socket(), config.run_dir.join("agent.sock"));
    assert!(guide.contains("| `socket` | `run-dir/agent.sock` |"));
}

#[test]
fn every_reason_is_explained() {
    let mut codes = BTreeSet::new();
    for folder in ["crates/agent/src", "crates/engine/src"] {
        let mut files = Vec::new();
        sources(&root().join(folder), &mut files);
        for file in files {
            let text = read(&file);
            for call in ["code:", "reason(", ".refuse("] {
                codes.extend(text.split(call).skip(1).filter_map(word));
            }
        }
    }
    assert!(codes.contains("name-taken") && codes.contains("protocol-version"), "{codes:?}");
    use sterna_vmm::Code::*;
    let ours = [Blocked, Device, RunState, Disk, Version, Layout, Tracked, CommandLine, Memory, Host];
    codes.extend(ours.map(|code| serde_json::to_value(code).unwrap().as_str().unwrap().to_owned()));
    let guide = read(GUIDE);
    for code in codes {
        assert!(guide.contains(&format!("`{code}`")), "{GUIDE} does not explain the reason {code}");
    }
}

/// The text that an argument is, if it is one.
fn word(argument: &str) -> Option<String> {
    argument.trim_start().strip_prefix('"')?.split('"').next().map(str::to_owned)
}

#[test]
fn every_link_leads_somewhere() {
    let adr = std::fs::read_dir(root().join("docs/adr")).unwrap();
    let adr = adr.map(|entry| entry.unwrap().path().strip_prefix(root()).unwrap().to_path_buf());
    let mut followed = 0;
    for document in DOCUMENTS.iter().map(PathBuf::from).chain(adr) {
        let text = read(&document);
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.starts_with("http")) {
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = root().join(&document).with_file_name(path);
            let file = if path.is_empty() { root().join(&document) } else { file };
            assert!(file.exists(), "{} links to {target}, which is not there", document.display());
            assert!(
                anchor.is_empty() || anchors(&file).contains(anchor),
                "{}: no {target}",
                document.display()
            );
            followed += 1;
        }
    }
    assert!(followed > 20, "only {followed} links were found");
}

/// Headings as they are linked to.
fn anchors(document: &Path) -> BTreeSet<String> {
    let text = read(document);
    let titles =
        text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches(['#', ' ']));
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    titles
        .map(|title| title.to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-"))
        .collect()
}

#[test]
fn every_file_of_ours_that_is_named_is_there() {
    for document in DOCUMENTS {
        let text = read(document);
        let named = text.split('`').skip(1).step_by(2).filter(|word| {
            ["crates/", "docs/", "fuzz/", "xtask/"].iter().any(|folder| word.starts_with(folder))
        });
        for path in named {
            assert!(root().join(path).exists(), "{document} names {path}, which is not there");
        }
    }
}

#[test]
fn the_map_of_the_crates_is_complete() {
    let text = read("ARCHITECTURE.md");
    for name in crates() {
        assert!(
            text.contains(&format!("| `crates/{name}` |")),
            "ARCHITECTURE.md does not tell what {name} is"
        );
    }
}

#[test]
fn only_memory_may_be_unsafe() {
    for name in crates().into_iter().filter(|name| name != "memory") {
        let root_file =
            ["lib.rs", "main.rs"].map(|file| root().join("crates").join(&name).join("src").join(file));
        let found = root_file.iter().filter(|file| file.exists()).map(read).collect::<Vec<_>>();
        assert!(!found.is_empty(), "{name} has no root");
        assert!(
            found.iter().all(|text| text.contains("#![forbid(unsafe_code)]")),
            "{name} allows unsafe code"
        );
    }
}

#[test]
fn the_engine_knows_nothing_of_the_world() {
    let manifest = read("crates/engine/Cargo.toml");
    assert!(!manifest.contains("\nsterna-"), "the engine depends on a crate of ours");
    let mut files = Vec::new();
    sources(&root().join("crates/engine/src"), &mut files);
    assert!(files.len() > 8);
    for file in files {
        let text = read(&file);
        for word in NOT_IN_THE_ENGINE {
            assert!(!text.contains(word), "{} uses {word}", file.display());
        }
    }
}

#[test]
fn only_vmm_and_the_lab_know_qmp() {
    for name in crates() {
        let mut files = Vec::new();
        sources(&root().join("crates").join(&name).join("src"), &mut files);
        for file in files.iter().filter(|file| read(file).contains("qmp_capabilities")) {
            let path = file.strip_prefix(root().join("crates")).unwrap();
            let allowed = path.starts_with("vmm/src/qemu") || path.starts_with("lab/src");
            assert!(allowed, "{} speaks QMP", path.display());
        }
    }
}
