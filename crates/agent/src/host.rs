//! What every migration of this host shares: configuration, keys, journal, VMs, and how QEMUs are held.

use crate::Config;
use crate::control::explain;
use crate::incoming::Incoming;
use crate::journal::FileJournal;
use crate::registry::{Registry, Vm, is_usable, lock};
use crate::sharing::Stores;
use crate::templates::Templates;
use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use sterna_memory::{Attach, Process, SealedMemory};
use sterna_transport::{Endpoint, Identity};
use sterna_vmm::qemu::{CommandLine, Launch, Launched, Qemu, TargetPolicy, User};
use sterna_vmm::{Fingerprint, VmmError};

/// How long an attach may try to stop a thread of QEMU. It takes 0.3 ms; all threads in disk sleep are waited out.
const ATTACH_WITHIN: Duration = Duration::from_secs(5);
/// How long a QEMU may take to start and answer.
const LAUNCH_WITHIN: Duration = Duration::from_secs(60);
/// Page streams unless the user says otherwise: two keep a fast link full, one leaves a small host a core.
const STREAMS_DEFAULT: usize = 2;

/// One per agent.
pub(crate) struct Host {
    config: Config,
    endpoint: Endpoint,
    journal: Mutex<FileJournal>,
    registry: Arc<Registry>,
    user: Option<User>,
    incoming: Incoming,
    templates: Templates,
    stores: Stores,
    /// Held as long as this agent lives: two would end each other's VMs.
    _alone: [File; 2],
}

impl Host {
    /// Reads the keys and opens the state folder.
    pub(crate) fn open(mut config: Config) -> Result<Self, String> {
        let (tls, name) = (&config.tls, &config.name);
        let identity = Identity::load(&tls.ca, &tls.cert, &tls.key).map_err(|why| explain(&why))?;
        let endpoint = Endpoint::new(&identity).map_err(|why| explain(&why))?;
        let shown = identity.certificate().host().unwrap_or_default();
        if shown != name {
            return Err(format!(
                "the certificate is for host {shown:?}, the configuration names it {name:?}"
            ));
        }
        let helper = config.attach_helper.clone().map_or_else(helper_beside_us, Ok)?;
        if !helper.is_file() {
            return Err(format!("the attach helper {} is not there; set attach-helper", helper.display()));
        }
        config.attach_helper = Some(helper);
        let alone = [alone_in(&config.state_dir)?, alone_in(&config.run_dir)?];
        let user = config.qemu.user.as_deref().map(find_user).transpose()?;
        let folder = |name: &str| config.state_dir.join(name);
        let cannot = |why: std::io::Error| format!("the state folder {}: {why}", config.state_dir.display());
        let journal = Mutex::new(FileJournal::open(folder("records")).map_err(cannot)?);
        let registry = Arc::new(Registry::open(folder("vms")).map_err(cannot)?);
        std::fs::create_dir_all(config.run_dir.join("vms")).map_err(cannot)?;
        std::fs::create_dir_all(config.run_dir.join("log")).map_err(cannot)?;
        let templates = Templates::open(folder("templates")).map_err(cannot)?;
        let incoming = Incoming::default();
        let stores = Stores::default();
        Ok(Self { endpoint, journal, registry, user, incoming, templates, stores, config, _alone: alone })
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// Whom QEMUs run as, if not as this agent.
    pub(crate) fn user(&self) -> Option<&User> {
        self.user.as_ref()
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn journal(&self) -> MutexGuard<'_, FileJournal> {
        lock(&self.journal)
    }

    pub(crate) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    pub(crate) fn templates(&self) -> &Templates {
        &self.templates
    }

    /// What VMs that come here together have in common.
    pub(crate) fn stores(&self) -> &Stores {
        &self.stores
    }

    /// Incoming migrations that go on.
    pub(crate) fn incoming(&self) -> &Incoming {
        &self.incoming
    }

    pub(crate) fn address_of(&self, host: &str) -> Result<String, String> {
        let found = self.config.hosts.get(host).map(|host| host.address.clone());
        found.ok_or_else(|| format!("host {host} is not in the list of hosts of {}", self.config.name))
    }

    /// The name under which a verified peer is in the list of hosts.
    pub(crate) fn known_peer<'a>(&self, names: impl Iterator<Item = &'a str>) -> Option<String> {
        names.into_iter().find(|name| self.config.hosts.contains_key(*name)).map(str::to_owned)
    }

    pub(crate) fn default_streams(&self) -> u32 {
        std::thread::available_parallelism().map_or(1, |cores| cores.get().min(STREAMS_DEFAULT)) as u32
    }

    pub(crate) fn attach(&self) -> Attach {
        let helper = self.config.attach_helper.clone().unwrap_or_default();
        Attach { deadline: ATTACH_WITHIN, ..Attach::new(helper) }
    }

    pub(crate) fn policy(&self) -> TargetPolicy {
        let qemu = &self.config.qemu;
        TargetPolicy { binaries: qemu.binaries.clone(), path_roots: qemu.path_roots.clone() }
    }

    /// Folder of a VM's socket.
    pub(crate) fn run_dir(&self, vm: &str) -> PathBuf {
        self.config.run_dir.join("vms").join(vm)
    }

    /// Where a VM's QEMU writes to.
    pub(crate) fn log(&self, vm: &str) -> PathBuf {
        self.config.run_dir.join("log").join(format!("{vm}.log"))
    }

    pub(crate) fn launch(
        &self,
        vm: &str,
        argv: Vec<String>,
        memory: Option<Arc<SealedMemory>>,
    ) -> Result<Launched, VmmError> {
        let (run_dir, log) = (self.run_dir(vm), self.log(vm));
        let user = self.user.clone();
        let launch = Launch { argv, name: vm.into(), run_dir, log, user, cwd: None, memory };
        launch.start(LAUNCH_WITHIN).inspect_err(|_| self.remove_run_dir(vm))
    }

    /// Removes the folder of a VM whose QEMU is dead, or never was.
    pub(crate) fn remove_run_dir(&self, vm: &str) {
        if !is_usable(vm) {
            return;
        }
        match std::fs::remove_dir_all(self.run_dir(vm)) {
            Err(why) if why.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(vm, %why, "its folder cannot be removed");
            }
            _ => {}
        }
    }

    /// The VM's process, for its memory.
    pub(crate) fn process_of(&self, vm: &Vm) -> Result<Process, String> {
        let id = vm.record().process;
        Process::open_as(id.pid, id.start_time)
            .map_err(|why| format!("the QEMU of VM {} is gone: {}", vm.name(), explain(&why)))
    }

    /// Runs `call` with the VM's QEMU.
    pub(crate) fn with_qemu<T>(
        &self,
        vm: &Vm,
        call: impl FnOnce(&mut Qemu) -> Result<T, VmmError>,
    ) -> Result<T, String> {
        match &mut *vm.qemu() {
            Some(qemu) => call(qemu).map_err(|why| explain(&why)),
            None => Err(format!("the QEMU of VM {} is not connected; see its log", vm.name())),
        }
    }

    /// Ends whatever QEMU was started for this VM and never became one of ours: it is found by the socket that only we
    /// give it, and waited for. Used after a crash in the middle of an incoming migration.
    pub(crate) fn end_stray(&self, vm: &str) -> Result<(), String> {
        let socket = self.run_dir(vm).join("qmp.sock").display().to_string();
        for pid in pids() {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if !String::from_utf8_lossy(&line).contains(&socket) || pid == std::process::id() as i32 {
                continue;
            }
            let Ok(process) = Process::open(pid) else { continue };
            process.kill().map_err(|why| explain(&why))?;
            if !process.wait_exit(LAUNCH_WITHIN) {
                return Err(format!("process {pid} was killed and does not end"));
            }
        }
        Ok(())
    }
}

/// Makes sure that no other agent works with this folder, before anything in it is read.
fn alone_in(folder: &Path) -> Result<File, String> {
    let cannot = |why: std::io::Error| format!("the folder {} cannot be used: {why}", folder.display());
    std::fs::create_dir_all(folder).map_err(cannot)?;
    let path = folder.join("agent.lock");
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(cannot)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(why)) => return Err(cannot(why)),
        Err(TryLockError::WouldBlock) => {
            let mut other = String::new();
            drop(file.read_to_string(&mut other));
            let (folder, other) = (folder.display(), other.trim());
            return Err(format!(
                "another agent (process {other}) works with {folder}: stop it, or give this one a state-dir and run-dir of \
                 its own"
            ));
        }
    }
    // Only told to people: where the disk is full, the lock holds all the same.
    if let Err(why) = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())) {
        tracing::warn!(folder = %folder.display(), %why, "the agent's process id cannot be written down; make room there");
    }
    Ok(file)
}

/// RAM that a command line asks for; 0 when it cannot be told.
pub(crate) fn ram_of(argv: &[String]) -> u64 {
    CommandLine::parse(argv.to_vec()).ok().and_then(|line| line.ram_bytes().ok()).unwrap_or_default()
}

/// A fingerprint as lines of the offer.
pub(crate) fn fingerprint_lines(fingerprint: &Fingerprint) -> Vec<String> {
    let facts = fingerprint.lines.iter().map(|line| format!("fact {line}"));
    let firmware = fingerprint.firmware.iter().map(|line| format!("firmware {line}"));
    let needs = fingerprint.needs_firmware.then(|| "needs-firmware".to_owned());
    facts.chain(firmware).chain(needs).collect()
}

/// The fingerprint that an offer brings.
pub(crate) fn fingerprint_of(lines: &[String]) -> Fingerprint {
    let with = |prefix: &str| -> BTreeSet<String> {
        lines.iter().filter_map(|line| line.strip_prefix(prefix)).map(str::to_owned).collect()
    };
    Fingerprint {
        lines: with("fact "),
        firmware: with("firmware "),
        needs_firmware: lines.iter().any(|line| line == "needs-firmware"),
    }
}

pub(crate) fn pids() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn helper_beside_us() -> Result<PathBuf, String> {
    let exe = std::env::current_exe().map_err(|why| why.to_string())?;
    Ok(exe.with_file_name("sterna-attach"))
}

/// Asks the system's user database, whatever it is made of.
fn find_user(name: &str) -> Result<User, String> {
    let ask = |what: &str| -> Result<Vec<u32>, String> {
        let output = std::process::Command::new("id").args([what, "--", name]).output();
        let output = output.map_err(|why| format!("id cannot be run: {why}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let ids: Option<Vec<u32>> = text.split_whitespace().map(|id| id.parse().ok()).collect();
        ids.filter(|ids| output.status.success() && !ids.is_empty())
            .ok_or_else(|| format!("the user {name} of [qemu] does not exist on this host"))
    };
    Ok(User { uid: ask("-u")?[0], gid: ask("-g")?[0], groups: ask("-G")? })
}
