//! The agent's configuration file (TOML). Everything that belongs to this host alone is said here, and never by a peer.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use sterna_vmm::qemu::HostMap;

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Name of this host, as in its certificate.
    pub name: String,
    /// Where the agent keeps its records; survives a reboot.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Where sockets and logs of running VMs are; need not survive a reboot.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Address and port at which peers call.
    pub listen: String,
    /// The API's Unix socket; `run-dir/agent.sock` when absent.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// The `sterna-attach` helper; beside the running program when absent.
    #[serde(default)]
    pub attach_helper: Option<PathBuf>,
    /// Keys.
    pub tls: Tls,
    /// Hosts that VMs may go to and come from. Nobody else is talked to, whatever certificate it has.
    #[serde(default)]
    pub hosts: BTreeMap<String, Host>,
    /// Which QEMUs are started, and how.
    #[serde(default)]
    pub qemu: QemuConfig,
    /// What a peer's names of taps and files are called here.
    #[serde(default)]
    pub map: HostMap,
    /// What guests may ask for.
    #[serde(default)]
    pub guests: Guests,
    /// How memory that VMs have in common is shared.
    #[serde(default)]
    pub sharing: SharingConfig,
    /// What is switched off; no file can say so.
    #[serde(skip)]
    pub(crate) without: Vec<Mechanism>,
}

/// Something that keeps a move exact, and that a test switches off to see that it is needed.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// Pages that the guest gave back after they were sent are dropped at the target.
    Discards,
    /// Pages that hardware may have written unseen are looked at once more.
    DirectIo,
    /// Pages that were written again are left for the next round.
    Postponing,
}

/// Files in PEM.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tls {
    /// The authority that signed every host's certificate.
    pub ca: PathBuf,
    /// This host's certificate.
    pub cert: PathBuf,
    /// Its key; readable by its owner only.
    pub key: PathBuf,
    /// What protects pages on their way. Everything else is always encrypted.
    #[serde(default)]
    pub page_streams: PageStreams,
}

/// What protects the pages of VMs on their way between two hosts.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum PageStreams {
    /// TLS.
    #[default]
    Encrypted,
    /// Nothing, where the other host says the same: for networks that only these hosts can reach. Both ends still prove who
    /// they are, but whoever listens sees the memory of VMs, and whoever writes to the network can change it.
    Clear,
}

/// Another host.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Host {
    /// Address and port of its agent.
    pub address: String,
}

/// QEMU on this host.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct QemuConfig {
    /// Programs that a peer may ask for, by their file names.
    #[serde(default)]
    pub binaries: Vec<PathBuf>,
    /// User that QEMU runs as; the agent's own when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// Folders below which every file that a peer names must lie.
    #[serde(default)]
    pub path_roots: Vec<PathBuf>,
}

/// Memory that VMs have in common, and that they share here when they have come.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SharingConfig {
    /// Most runs of pages that a VM may have in common with others: each takes up to two mappings of its process (`vm.max_map_count` of the
    /// kernel counts them). What is above travels as bytes. 0: nothing is shared here.
    #[serde(default = "default_max_runs")]
    pub max_runs: u32,
    /// What the agent raises the kernel's `vm.max_map_count` to when it starts, if it is lower.
    #[serde(default)]
    pub max_map_count: Option<u64>,
}

impl Default for SharingConfig {
    fn default() -> Self {
        Self { max_runs: default_max_runs(), max_map_count: None }
    }
}

fn default_max_runs() -> u32 {
    u32::MAX
}

/// What guests may ask for, through their port. A guest is trusted by nobody: what is not written here, it may not.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Guests {
    /// Hosts that a guest may ask to be moved to.
    #[serde(default)]
    pub may_migrate_to: Vec<String>,
    /// What holds for single VMs in its place, by their names.
    #[serde(default)]
    pub vms: BTreeMap<String, GuestRules>,
}

/// What one VM's guest may ask for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GuestRules {
    /// Hosts that it may ask to be moved to.
    #[serde(default)]
    pub may_migrate_to: Vec<String>,
}

impl Guests {
    /// Whether the guest of this VM may ask to be moved to this host.
    pub fn may_migrate(&self, vm: &str, host: &str) -> bool {
        let hosts = self.vms.get(vm).map_or(&self.may_migrate_to, |rules| &rules.may_migrate_to);
        hosts.iter().any(|allowed| allowed == host)
    }
}

fn default_state_dir() -> PathBuf {
    "/var/lib/sterna".into()
}

fn default_run_dir() -> PathBuf {
    "/run/sterna".into()
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// A text that names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path)
            .map_err(|why| format!("the configuration {} cannot be read: {why}", path.display()))?;
        toml::from_str(&text).map_err(|why| format!("the configuration {}: {why}", path.display()))
    }

    /// The same, with a mechanism switched off.
    #[doc(hidden)]
    #[must_use]
    pub fn without(mut self, mechanism: Mechanism) -> Self {
        self.without.push(mechanism);
        self
    }

    pub(crate) fn has(&self, mechanism: Mechanism) -> bool {
        !self.without.contains(&mechanism)
    }

    /// The API's socket.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.run_dir.join("agent.sock"))
    }
}
