//! Starts a QEMU so that it outlives whoever started it, as the user it belongs to.
//!
//! The chain is `systemd-run --scope` (where systemd runs the host), `setsid`, `setpriv`, QEMU: each replaces itself
//! by the next, so the pid is QEMU's from the beginning and no code of ours runs between fork and exec.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sterna_memory::{Process, ProcessError, SealedMemory};

use super::qmp::{Qmp, QmpError, reach_within};
use super::{LOG_TAIL_BYTES, Qemu};
use crate::types::VmmError;

/// The socket's name in a VM's run directory.
pub(super) const QMP_SOCKET: &str = "qmp.sock";
/// How long one wait for the socket is, between two looks whether QEMU has exited.
const SOCKET_SLICE: Duration = Duration::from_millis(100);
/// The longest name of a VM: it becomes part of unit and cgroup names and of socket paths.
const NAME_CHARS_MAX: usize = 64;
/// The cgroup that holds those of the VMs, where systemd does not manage them.
const CGROUP_PARENT: &str = "sterna";
/// How often, and how far apart, it is tried to remove a cgroup: the kernel lets go within milliseconds.
const CGROUP_TRIES: u32 = 20;
/// See [`CGROUP_TRIES`].
const CGROUP_PAUSE: Duration = Duration::from_millis(5);
/// systemd runs the host when this is there (sd_booted(3)).
const SYSTEMD_RUNS: &str = "/run/systemd/system";

/// How many were launched by this process.
static LAUNCHES: AtomicU64 = AtomicU64::new(0);

/// Whom a QEMU runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Further groups, such as the one that may use `/dev/kvm`.
    pub groups: Vec<u32>,
}

/// A QEMU to be started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The whole command line, as [`CommandLine::for_source`](super::CommandLine::for_source) or
    /// [`for_target`](super::CommandLine::for_target) made it for this run directory.
    pub argv: Vec<String>,
    /// The VM's name, for its scope.
    pub name: String,
    /// A directory of the VM's own, where its socket goes; made if it is not there.
    pub run_dir: PathBuf,
    /// Where QEMU's output goes; appended to.
    pub log: PathBuf,
    /// Where the relative paths of the user's line begin; the run directory when it is not given.
    pub cwd: Option<PathBuf>,
    /// Whom it runs as; nobody else than we when it is not given.
    pub user: Option<User>,
    /// The memory of the template that it is a clone of: its standard input, which is nothing otherwise.
    pub memory: Option<Arc<SealedMemory>>,
}

/// Why a QEMU did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The name cannot be used.
    #[error("the name {name:?} cannot be used: up to 64 letters, digits, and _ . - in between")]
    Name {
        /// The name.
        name: String,
    },
    /// A file or directory of the VM cannot be made.
    #[error("{} cannot be prepared", path.display())]
    Prepare {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The chain of programs did not start.
    #[error("{program} cannot be started; it is in util-linux or systemd")]
    Spawn {
        /// The first program of the chain.
        program: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// QEMU exited before it answered.
    #[error("QEMU exited ({status}) instead of starting; the end of {}: {tail}", log.display())]
    Exited {
        /// How it ended.
        status: ExitStatus,
        /// Its log.
        log: PathBuf,
        /// The end of the log.
        tail: String,
    },
    /// QEMU runs and does not answer; it was killed.
    #[error("QEMU started, did not answer and was killed; the end of {}: {tail}", log.display())]
    Silent {
        /// Its log.
        log: PathBuf,
        /// The end of the log.
        tail: String,
        /// What was waited for.
        #[source]
        source: QmpError,
    },
    /// The process was gone before it could be held.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// A QEMU that was started, and word of its end.
#[derive(Debug)]
pub struct Launched {
    /// The VM.
    pub qemu: Qemu,
    /// How it ended, once it has.
    pub exit: Exit,
}

/// How a child of ours ended. A thread waits for it, so that it never stays a zombie.
#[derive(Clone, Debug)]
pub struct Exit {
    state: Arc<(Mutex<Option<ExitStatus>>, Condvar)>,
}

impl Exit {
    fn of(mut child: Child, cgroup: Option<PathBuf>) -> Self {
        let exit = Self { state: Arc::default() };
        let state = Arc::clone(&exit.state);
        std::thread::spawn(move || {
            let status = child.wait().unwrap_or_default();
            if let Some(dir) = cgroup {
                remove_cgroup(&dir);
            }
            *state.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
            state.1.notify_all();
        });
        exit
    }

    /// How it ended, if it has.
    pub fn status(&self) -> Option<ExitStatus> {
        *self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for its end.
    pub fn wait(&self, within: Duration) -> Option<ExitStatus> {
        let guard = self.state.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.state.1.wait_timeout_while(guard, within, |status| status.is_none());
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Launch {
    /// Starts it and waits until it answers. Whoever fails here leaves no process behind.
    pub fn start(&self, within: Duration) -> Result<Launched, VmmError> {
        let end = Instant::now() + within;
        // What earlier QEMUs of this VM wrote stays in the log, and out of this one's errors.
        let before = fs::metadata(&self.log).map_or(0, |known| known.len());
        self.check_name()?;
        self.prepare_run_dir()?;
        let (process, exit) = self.spawn(before)?;
        match self.wait_for_qmp(&exit, end, before) {
            Ok(qmp) => {
                let qemu = Qemu::new(qmp, process, Some(self.log.clone()))?;
                Ok(Launched { qemu, exit })
            }
            Err(error) => {
                process.kill()?;
                process.wait_exit(SOCKET_SLICE);
                Err(error.into())
            }
        }
    }

    fn check_name(&self) -> Result<(), LaunchError> {
        let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        let first = self.name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if first && self.name.len() <= NAME_CHARS_MAX && self.name.chars().all(usable) {
            return Ok(());
        }
        Err(LaunchError::Name { name: self.name.clone() })
    }

    fn prepare_run_dir(&self) -> Result<(), LaunchError> {
        let failed = |source| LaunchError::Prepare { path: self.run_dir.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.run_dir).map_err(failed)?;
        fs::set_permissions(&self.run_dir, Permissions::from_mode(0o700)).map_err(failed)?;
        if let Some(user) = &self.user {
            chown(&self.run_dir, Some(user.uid), Some(user.gid)).map_err(failed)?;
        }
        // A socket of an earlier QEMU would refuse us until the new one has replaced it.
        match fs::remove_file(self.run_dir.join(QMP_SOCKET)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(e)),
            _ => Ok(()),
        }
    }

    fn spawn(&self, before: u64) -> Result<(Process, Exit), LaunchError> {
        let log =
            open_log(&self.log).map_err(|source| LaunchError::Prepare { path: self.log.clone(), source })?;
        let errors =
            log.try_clone().map_err(|source| LaunchError::Prepare { path: self.log.clone(), source })?;
        let chain = self.chain();
        let (program, args) = chain.split_first().map(|(p, a)| (p.clone(), a)).unwrap_or_default();
        let mut command = Command::new(&program);
        command.args(args).current_dir(self.cwd.as_ref().unwrap_or(&self.run_dir));
        let stdin = match &self.memory {
            None => Stdio::null(),
            Some(memory) => memory
                .file()
                .try_clone()
                .map(Stdio::from)
                .map_err(|source| LaunchError::Spawn { program: program.clone(), source })?,
        };
        let spawned = command.stdin(stdin).stdout(log).stderr(errors).spawn();
        let child = spawned.map_err(|source| LaunchError::Spawn { program, source })?;
        let pid = i32::try_from(child.id()).unwrap_or_default();
        // Held before the reaper can wait for it: until then the pid cannot be used again.
        let process = Process::open(pid);
        if !systemd_runs() {
            move_to_cgroup(&self.name, pid);
        }
        let exit = Exit::of(child, own_cgroup(pid));
        match (process, exit.status()) {
            (Err(ProcessError::Gone { .. }), _) => Err(self.exited(&exit, before)),
            (process, _) => Ok((process?, exit)),
        }
    }

    /// The programs that lead to QEMU, each replacing itself by the next.
    fn chain(&self) -> Vec<String> {
        let mut chain = Vec::new();
        if systemd_runs() {
            // A name is used again, maybe before systemd has forgotten the unit of its last VM.
            let (agent, number) = (std::process::id(), LAUNCHES.fetch_add(1, Ordering::Relaxed));
            let unit = format!("--unit=sterna-vm-{}-{agent}-{number}", self.name);
            chain.extend(["systemd-run", "--scope", "--quiet", "--collect", &unit, "--"].map(str::to_owned));
        }
        // A session of its own: no terminal's signal reaches it.
        chain.push("setsid".to_owned());
        if let Some(user) = &self.user {
            chain.push("setpriv".to_owned());
            chain.push(format!("--reuid={}", user.uid));
            chain.push(format!("--regid={}", user.gid));
            chain.push(groups_option(&user.groups));
            chain.push("--".to_owned());
        }
        chain.extend(self.argv.iter().cloned());
        chain
    }

    fn wait_for_qmp(&self, exit: &Exit, end: Instant, before: u64) -> Result<Qmp, LaunchError> {
        let socket = self.run_dir.join(QMP_SOCKET);
        loop {
            // Once connected, it is waited for the greeting to the end: QEMU is slow when the host is.
            let result = reach_within(&socket, SOCKET_SLICE)
                .and_then(|socket| Qmp::over(socket, end.saturating_duration_since(Instant::now())));
            if exit.status().is_some() {
                return Err(self.exited(exit, before));
            }
            match result {
                Ok(qmp) => return Ok(qmp),
                Err(source) if Instant::now() >= end => {
                    return Err(LaunchError::Silent {
                        log: self.log.clone(),
                        tail: self.tail(before),
                        source,
                    });
                }
                Err(error) => tracing::trace!(%error, "QEMU does not answer yet"),
            }
        }
    }

    fn exited(&self, exit: &Exit, before: u64) -> LaunchError {
        let status = exit.wait(SOCKET_SLICE).unwrap_or_default();
        LaunchError::Exited { status, log: self.log.clone(), tail: self.tail(before) }
    }

    fn tail(&self, before: u64) -> String {
        let written = fs::metadata(&self.log).map_or(0, |known| known.len()).saturating_sub(before);
        log_tail(&self.log, written.min(LOG_TAIL_BYTES))
    }
}

fn groups_option(groups: &[u32]) -> String {
    if groups.is_empty() {
        return "--clear-groups".to_owned();
    }
    let list: Vec<String> = groups.iter().map(u32::to_string).collect();
    format!("--groups={}", list.join(","))
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// The last lines of a log, at most `bytes` of them.
pub fn log_tail(path: &Path, bytes: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
        let mut tail = Vec::new();
        file.take(bytes).read_to_end(&mut tail)?;
        Ok(tail)
    };
    match read() {
        Ok(tail) if tail.is_empty() => "(empty)".to_owned(),
        Ok(tail) => String::from_utf8_lossy(&tail).trim().to_owned(),
        Err(error) => format!("({} cannot be read: {error})", path.display()),
    }
}

fn systemd_runs() -> bool {
    Path::new(SYSTEMD_RUNS).is_dir()
}

/// Puts a process into a cgroup of its own, where there is one to make it in, so that ending ours does not end it.
fn move_to_cgroup(name: &str, pid: i32) {
    let Some(root) = cgroup_root() else {
        tracing::debug!("no cgroup v2 on this host: the VM stays in our cgroup");
        return;
    };
    let dir = root.join(CGROUP_PARENT).join(format!("{name}-{pid}"));
    let moved = fs::create_dir_all(&dir).and_then(|()| {
        OpenOptions::new().write(true).open(dir.join("cgroup.procs"))?.write_all(pid.to_string().as_bytes())
    });
    if let Err(error) = moved {
        tracing::warn!(%error, dir = %dir.display(), "the VM stays in our cgroup and may end with it");
    }
}

/// Where cgroup v2 is mounted: hosts that still have v1 put it elsewhere than `/sys/fs/cgroup`.
fn cgroup_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mut found = mount.filter(|fields| fields.get(2) == Some(&"cgroup2"));
    found.next()?.get(1).map(PathBuf::from)
}

/// The cgroup that we made for a process, to be removed when the process is gone.
pub(super) fn own_cgroup(pid: i32) -> Option<PathBuf> {
    let lines = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = lines.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Path::new(path).starts_with(CGROUP_PARENT).then(|| cgroup_root().map(|root| root.join(path))).flatten()
}

/// Removes the cgroups of VMs that ended while nobody watched: after the death of the agent that had made them. One in which
/// something runs is in use; the kernel keeps it.
pub fn sweep_scopes() {
    let Some(parent) = cgroup_root().map(|root| root.join(CGROUP_PARENT)) else { return };
    for scope in fs::read_dir(parent).into_iter().flatten().flatten() {
        // The process is named in it: a scope that was made this moment is still empty.
        let pid = scope.file_name().to_str().and_then(|name| name.rsplit_once('-')?.1.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            let _ = fs::remove_dir(scope.path());
        }
    }
}

/// Removes an empty cgroup of ours. The kernel refuses for a moment after the last process has gone.
pub(super) fn remove_cgroup(dir: &Path) {
    for _ in 0..CGROUP_TRIES {
        match fs::remove_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => std::thread::sleep(CGROUP_PAUSE),
            _ => return,
        }
    }
}
