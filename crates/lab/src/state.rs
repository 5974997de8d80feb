//! What each lab owns, in a file made before the first thing is: whoever finds it can remove everything.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::place::{remove_tree, replace};
use crate::process::ProcessId;
use crate::{LabError, run};

/// Here lie one `NAME.json` and one directory `NAME/` per lab. On tmpfs, so that a reboot forgets them with the rest.
const DIR: &str = "/run/sterna-lab";

/// Who answers for a lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// The lab goes when this process goes.
    Process(ProcessId),
    /// Nobody: it stays until it is taken down by name.
    Detached,
}

/// The content of a lab's file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// The lab's name, the prefix of all its namespaces.
    pub name: String,
    /// Who answers for it.
    pub owner: Owner,
    /// Every namespace, listed before the first is made.
    pub namespaces: Vec<String>,
    /// Processes outside the namespaces (those inside are found there).
    pub processes: Vec<ProcessId>,
}

impl State {
    /// Writes the file, in one step.
    pub fn save(&self) -> Result<(), LabError> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| LabError::unexpected("the lab's state", e.to_string()))?;
        replace(&file_of(&self.name), text.as_bytes(), 0o644)
    }

    /// Removes everything that the lab made, in an order that a second try can repeat after any failure.
    pub fn remove(&self) -> Result<(), LabError> {
        for process in &self.processes {
            process.kill()?;
        }
        for namespace in &self.namespaces {
            empty(namespace)?;
            let deleted = run::output(Command::new("ip").args(["netns", "delete", namespace]), run::QUICK);
            // Several may remove the same lab at once (its reaper, a sweep): only what is still there is an error.
            if namespace_path(namespace).exists() {
                deleted?;
            }
        }
        remove_tree(&dir_of(&self.name))?;
        match std::fs::remove_file(file_of(&self.name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(LabError::file("remove", file_of(&self.name))(e))
            }
            _ => Ok(()),
        }
    }

    /// Whether a living process answers for it.
    #[must_use]
    pub fn living_owner(&self) -> Option<ProcessId> {
        match self.owner {
            Owner::Process(id) if id.is_alive() => Some(id),
            _ => None,
        }
    }
}

/// All labs that have a file. A file that cannot be read is left alone and named in the error.
pub fn all() -> Result<Vec<State>, LabError> {
    let Ok(entries) = std::fs::read_dir(DIR) else { return Ok(Vec::new()) };
    let files = entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "json"));
    let mut states = Vec::new();
    for path in files {
        match std::fs::read_to_string(&path) {
            Ok(text) => states.push(parse(&path, &text)?),
            // Its owner removed it since the directory was listed.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(LabError::file("read", path)(e)),
        }
    }
    Ok(states)
}

/// Removes the labs whose owner died; returns their names.
pub fn sweep() -> Result<Vec<String>, LabError> {
    let dead = |s: &State| matches!(s.owner, Owner::Process(id) if !id.is_alive());
    let mut removed = Vec::new();
    for state in all()?.into_iter().filter(dead) {
        state.remove()?;
        removed.push(state.name);
    }
    Ok(removed)
}

/// Where a lab keeps its logs and sockets.
#[must_use]
pub fn dir_of(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

/// The file that says what the lab owns.
#[must_use]
pub fn file_of(name: &str) -> PathBuf {
    Path::new(DIR).join(format!("{name}.json"))
}

/// Where `ip netns` keeps a namespace.
#[must_use]
pub fn namespace_path(namespace: &str) -> PathBuf {
    Path::new("/run/netns").join(namespace)
}

/// Kills whatever runs in a namespace. The namespace is ours alone, so is everything in it: also what processes of the
/// lab started and nobody recorded, as an agent starts QEMUs.
fn empty(namespace: &str) -> Result<(), LabError> {
    run::until(&format!("the end of the processes in {namespace}"), crate::process::GONE, || {
        let inside = inside(namespace);
        for process in &inside {
            process.signal(rustix::process::Signal::KILL);
        }
        inside.is_empty()
    })
}

/// The living processes in a namespace.
fn inside(namespace: &str) -> Vec<ProcessId> {
    let list = run::output(Command::new("ip").args(["netns", "pids", namespace]), run::QUICK);
    let pids = list.unwrap_or_default();
    let ids = pids.lines().filter_map(|l| l.trim().parse().ok()).filter_map(ProcessId::of);
    ids.filter(|id| id.is_alive()).collect()
}

fn parse(path: &Path, text: &str) -> Result<State, LabError> {
    let state: State = serde_json::from_str(text)
        .map_err(|e| LabError::unexpected(path.display().to_string(), e.to_string()))?;
    // The names go to `ip netns delete` as root: only what a lab makes is believed.
    let ours = state.namespaces.iter().all(|n| n.starts_with(&format!("{}-", state.name)));
    if !ours || !state.name.starts_with("st") || state.name.contains('/') {
        return Err(LabError::unexpected(path.display().to_string(), "names that no lab makes"));
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_names_are_refused() {
        let owner = Owner::Detached;
        let state = State { name: "st1".into(), owner, namespaces: vec!["prod".into()], processes: vec![] };
        let text = serde_json::to_string(&state).unwrap();
        parse(Path::new("x"), &text).unwrap_err();
        let ours = State { namespaces: vec!["st1-a".into()], ..state };
        parse(Path::new("x"), &serde_json::to_string(&ours).unwrap()).unwrap();
    }
}
