//! What machine a result comes from: no figure means anything without.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sterna_lab::packages::qemu_version;

use crate::Kit;

/// The machine, and what ran on it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HostFacts {
    /// When the measurement began.
    pub began: String,
    /// Kernel release.
    pub kernel: String,
    /// Processor.
    pub cpu: String,
    /// Logical processors that we may use.
    pub cores: usize,
    /// RAM of the machine.
    pub memory_mib: u64,
    /// Load average over a minute before it began: what else the machine did.
    pub load_before: f64,
    /// The QEMU that was migrated.
    pub qemu: String,
    /// Where the agents' records lie: on tmpfs, syncing them costs nothing.
    pub records_on: String,
    /// Whether the machine kept its free memory while it was measured, or may have given it back to its own host.
    pub free_memory_kept: bool,
    /// The version of Sterna.
    pub sterna: String,
    /// The revision of the sources that measured it, `+` behind one that was changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

impl HostFacts {
    /// Of this machine, now.
    #[must_use]
    pub fn gather(kit: &Kit, qemu: &Path) -> HostFacts {
        HostFacts {
            began: jiff::Timestamp::now().to_string(),
            kernel: first_line("/proc/sys/kernel/osrelease"),
            cpu: cpu(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory_mib(),
            load_before: load_average(),
            qemu: qemu_version(qemu).unwrap_or_default(),
            records_on: filesystem_of(Path::new("/run/sterna-lab")),
            free_memory_kept: crate::load::is_memory_kept(),
            sterna: version(kit),
            revision: revision(),
        }
    }
}

fn revision() -> Option<String> {
    let git = |args: &[&str]| {
        let mut git = std::process::Command::new("git");
        let output = git.current_dir(env!("CARGO_MANIFEST_DIR")).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    git(&["rev-parse", "--short=12", "HEAD"]).map(|revision| revision + if changed { "+" } else { "" })
}

/// Load average of the last minute.
pub(crate) fn load_average() -> f64 {
    let text = first_line("/proc/loadavg");
    text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default()
}

fn first_line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().lines().next().unwrap_or_default().to_owned()
}

fn cpu() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find(|l| l.starts_with("model name"));
    model.and_then(|l| l.split_once(':')).map_or(String::new(), |(_, name)| name.trim().to_owned())
}

fn memory_mib() -> u64 {
    let text = first_line("/proc/meminfo");
    text.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() >> 10
}

/// The type of the file system whose mount point is the longest beginning of the path.
fn filesystem_of(path: &Path) -> String {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let fields = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    let fitting = fields.filter(|f| f.len() > 2 && path.starts_with(f[1]));
    fitting.max_by_key(|f| f[1].len()).map_or(String::new(), |f| f[2].to_owned())
}

fn version(kit: &Kit) -> String {
    let output = std::process::Command::new(&kit.sterna).arg("--version").output();
    output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_facts() {
        assert!(memory_mib() > 0);
        assert!(!first_line("/proc/sys/kernel/osrelease").is_empty());
        assert_eq!(filesystem_of(Path::new("/proc/self")), "proc");
    }
}
