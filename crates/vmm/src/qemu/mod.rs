//! QEMU, unmodified, as a [`Vmm`]. The only place that knows QMP and QEMU's command line.
//!
//! - [`CommandLine`]: the user's own command line, and what is made of it at the source and at the target
//! - [`Launch`]: starts it as its own user, in a scope of its own, so that it outlives us
//! - [`Qemu`]: a running one; [`Qemu::attach`] finds it again after a restart of ours
//! - [`target_reasons`]: the target's half of the pre-check

mod balloon;
mod cmdline;
mod devices;
mod disks;
mod fingerprint;
mod huge;
mod images;
mod keyval;
mod launch;
mod layout;
mod looked_at;
mod options;
mod policy;
mod port;
mod precheck;
mod qmp;
mod readconfig;
mod rules;
mod template;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;
use serde_json::{Value, json};
use sterna_memory::Process;

pub use cmdline::{CommandLine, CommandLineError, huge_pages};
pub use huge::HugePages;
pub use images::{ImageProof, MarkedImages, chain_reasons, image_reasons, mark_images};
pub use launch::{Exit, Launch, LaunchError, Launched, User, log_tail, sweep_scopes};
pub use looked_at::LookedAt;
pub use policy::{HostMap, Refusal, TargetPolicy, new_file};
pub use port::port_socket;
pub use precheck::{Room, available_bytes, changed_parts, is_upgrade, older_qemu, target_reasons};
pub use qmp::{Event, Qmp, QmpError, Ticket, Version};
pub use readconfig::expand;

use crate::Vmm;
use crate::process::ProcessId;
use crate::types::{Fingerprint, Glance, Layout, LentFd, Reason, RunState, SaveTicket, Shape, VmmError};
use devices::Devices;

/// How long an ordinary command may take. QEMU answers in a millisecond; its main thread can be held up for seconds
/// by a slow disk or an overloaded host, and a healthy VM must not be given up for that.
pub const COMMAND_WITHIN: Duration = Duration::from_secs(10);
/// How long `stop`, a save and `cont` may take: they wait until the disks have taken what was in flight.
pub const DRAIN_WITHIN: Duration = Duration::from_secs(30);
/// The nice value (setpriority(2)) of a QEMU that is about to end.
const LAST_IN_LINE: i32 = 19;
/// What our descriptors are called in QEMU, so that those of an agent that died are found.
const OUR_FDS: &str = "sterna";
/// How much of the log goes into an error.
const LOG_TAIL_BYTES: u64 = 2048;

/// A running QEMU, held by its process and its QMP socket.
#[derive(Debug)]
pub struct Qemu {
    qmp: Qmp,
    process: Process,
    log: Option<PathBuf>,
    /// Addresses of RAM blocks that were found before. They never change, but may become hard to find.
    addresses: BTreeMap<String, u64>,
    devices: Devices,
    /// Whether our monitor is its only one: nobody else can tell it anything.
    alone: bool,
    /// The firmware files' part of the fingerprint, once it was found.
    firmware: Option<BTreeSet<String>>,
    /// The cgroup that was made for it, to be removed after it.
    cgroup: Option<PathBuf>,
    /// Whether there is RAM that was not found when it was looked for last.
    late: bool,
    /// Lines of the human monitor that were sent ahead of who asks.
    ahead: BTreeMap<&'static str, Ticket>,
    /// Answers that were given during one look at the VM.
    seen: Option<BTreeMap<String, Value>>,
}

impl Qemu {
    /// Takes hold of a QEMU that runs, known by its process: after a restart of ours.
    pub fn attach(
        id: ProcessId,
        qmp_path: &Path,
        log: Option<PathBuf>,
        within: Duration,
    ) -> Result<Self, VmmError> {
        let process = id.open()?;
        let qmp = Qmp::connect(qmp_path, within).map_err(asked("greet us"))?;
        let mut qemu = Self::new(qmp, process, log)?;
        qemu.drop_leftovers()?;
        Ok(qemu)
    }

    fn new(qmp: Qmp, process: Process, log: Option<PathBuf>) -> Result<Self, VmmError> {
        let peer = socket_peercred(qmp.socket())
            .map_err(|e| VmmError::Host { operation: "asking who holds the QMP socket", source: e.into() })?;
        let (found, expected) = (peer.pid.as_raw_nonzero().get(), process.pid());
        if found != expected {
            return Err(VmmError::WrongProcess { found, expected });
        }
        let cgroup = launch::own_cgroup(expected);
        let alone = cmdline::argv_of(expected)
            .is_ok_and(|argv| CommandLine::parse_any(argv).is_some_and(|line| line.has_one_monitor()));
        let (addresses, devices) = (BTreeMap::new(), Devices::default());
        Ok(Self {
            qmp,
            process,
            log,
            addresses,
            devices,
            alone,
            firmware: None,
            cgroup,
            late: false,
            ahead: BTreeMap::new(),
            seen: None,
        })
    }

    /// The version that QEMU itself tells.
    pub fn version(&self) -> Version {
        self.qmp.version()
    }

    /// The QMP connection, for what is not a [`Vmm`]'s business.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The machine type as QEMU resolved it: `pc-q35-7.2` where the user said `q35`.
    pub fn machine_type(&mut self) -> Result<String, VmmError> {
        let name = self.qom_text("/machine", "type", "tell its machine type")?;
        Ok(name.strip_suffix("-machine").unwrap_or(&name).to_owned())
    }

    /// The processor model, as `-cpu` takes it.
    pub fn cpu_model(&mut self) -> Result<String, VmmError> {
        fingerprint::cpu_model(self)
    }

    /// Ids of the threads that run the guest's processors: one each, but where QEMU emulates all of them in one.
    pub fn vcpu_threads(&mut self) -> Result<Vec<i32>, VmmError> {
        let answer = self.ask("query-cpus-fast", Value::Null, "list its processors")?;
        let threads = answer.as_array().into_iter().flatten().filter_map(|cpu| cpu["thread-id"].as_i64());
        let threads: BTreeSet<i32> = threads.filter_map(|thread| i32::try_from(thread).ok()).collect();
        Ok(threads.into_iter().collect())
    }

    /// Pages of the guest that a QEMU reads while it loads this VM's devices, as far as that is known: see [`LookedAt`]. Takes a question for
    /// each virtio queue and page.
    pub fn looked_at(&mut self) -> Vec<LookedAt> {
        looked_at::looked_at(self)
    }

    /// What can be plugged in and out while the VM runs, a line each: to be compared with the same at its start.
    pub fn parts(&mut self) -> Result<BTreeSet<String>, VmmError> {
        fingerprint::parts(self)
    }

    /// The addresses of RAM blocks as the guest's memory map gives them away: the only way before QEMU 8.2, and a
    /// second opinion since.
    pub fn addresses_by_map(&mut self) -> Result<BTreeMap<String, u64>, VmmError> {
        let blocks = self.layout()?.blocks;
        layout::addresses_by_map(self, &blocks, &BTreeSet::new())
    }

    /// Looks at the VM from several sides at once: what more than one of them asks for is asked once. A question takes QEMU the
    /// better part of a millisecond, since two of its threads wake up for each.
    pub fn at_once<T>(&mut self, look: impl FnOnce(&mut Self) -> T) -> T {
        self.seen = Some(BTreeMap::new());
        let found = look(self);
        self.seen = None;
        found
    }

    /// One command with the ordinary deadline.
    fn ask(&mut self, command: &str, args: Value, operation: &'static str) -> Result<Value, VmmError> {
        // Only what nothing of ours changes.
        let is_kept = matches!(command, "qom-list" | "query-block" | "query-cpus-fast");
        let key = format!("{command} {args}");
        if is_kept && let Some(answer) = self.seen.as_ref().and_then(|seen| seen.get(&key)) {
            return Ok(answer.clone());
        }
        let answer = self.command(command, args, operation)?;
        if is_kept && let Some(seen) = &mut self.seen {
            seen.insert(key, answer.clone());
        }
        Ok(answer)
    }

    fn command(&mut self, command: &str, args: Value, operation: &'static str) -> Result<Value, VmmError> {
        self.qmp.execute(command, args, COMMAND_WITHIN).map_err(|error| self.explain(operation, error))
    }

    fn hmp(&mut self, line: &str, operation: &'static str) -> Result<String, VmmError> {
        let answer = match self.ahead.remove(line) {
            Some(ticket) => self.qmp.hmp_finish(&ticket, COMMAND_WITHIN),
            None => self.qmp.hmp(line, COMMAND_WITHIN),
        };
        answer.map_err(|error| self.explain(operation, error))
    }

    fn qom(&mut self, path: &str, property: &str, operation: &'static str) -> Result<Value, VmmError> {
        self.ask("qom-get", json!({ "path": path, "property": property }), operation)
    }

    fn qom_text(&mut self, path: &str, property: &str, operation: &'static str) -> Result<String, VmmError> {
        let value = self.qom(path, property, operation)?;
        let text = value.as_str().map(str::to_owned);
        text.ok_or_else(|| VmmError::Answer { operation, detail: format!("{property} of {path} is no text") })
    }

    /// An error of the connection, with the end of the log when QEMU is gone.
    fn explain(&self, operation: &'static str, error: QmpError) -> VmmError {
        match (&error, &self.log) {
            (QmpError::Closed { .. }, Some(log)) => {
                VmmError::Exited { operation, log: log_tail(log, LOG_TAIL_BYTES) }
            }
            _ => VmmError::Qmp { operation, source: error },
        }
    }

    /// Closes descriptors that an earlier agent lent and could not take back.
    fn drop_leftovers(&mut self) -> Result<(), VmmError> {
        let sets = self.ask("query-fdsets", Value::Null, "list its descriptors")?;
        for set in sets.as_array().into_iter().flatten() {
            let ours = set["fds"].as_array().into_iter().flatten().any(|fd| fd["opaque"] == OUR_FDS);
            if let (true, Some(id)) = (ours, set["fdset-id"].as_i64()) {
                self.ask("remove-fd", json!({ "fdset-id": id }), "close a descriptor")?;
            }
        }
        Ok(())
    }

    fn log_end(&self) -> String {
        self.log.as_deref().map(|log| log_tail(log, LOG_TAIL_BYTES)).unwrap_or_default()
    }
}

fn asked(operation: &'static str) -> impl Fn(QmpError) -> VmmError {
    move |source| VmmError::Qmp { operation, source }
}

impl Vmm for Qemu {
    fn process_id(&self) -> ProcessId {
        ProcessId::of(&self.process)
    }

    fn status(&mut self) -> Result<RunState, VmmError> {
        let operation = "tell its run state";
        let answer = self.ask("query-status", Value::Null, operation)?;
        let word = answer["status"].as_str();
        let word = word.ok_or_else(|| VmmError::Answer { operation, detail: "no status".to_owned() })?;
        Ok(RunState::from(word.to_owned()))
    }

    fn source_reasons(&mut self) -> Result<Vec<Reason>, VmmError> {
        precheck::source_reasons(self)
    }

    fn layout(&mut self) -> Result<Layout, VmmError> {
        layout::layout(self)
    }

    fn fingerprint(&mut self) -> Result<Fingerprint, VmmError> {
        fingerprint::fingerprint(self)
    }

    fn shape(&mut self) -> Result<Shape, VmmError> {
        fingerprint::shape(self)
    }

    fn glance(&mut self) -> Result<Glance, VmmError> {
        fingerprint::glance(self)
    }

    fn lend_fd(&mut self, fd: BorrowedFd<'_>) -> Result<LentFd, VmmError> {
        let operation = "take a descriptor";
        let answer = self
            .qmp
            .execute_with_fds("add-fd", json!({ "opaque": OUR_FDS }), &[fd], COMMAND_WITHIN)
            .map_err(|error| self.explain(operation, error))?;
        let number = answer["fd"].as_i64().and_then(|n| i32::try_from(n).ok());
        match (answer["fdset-id"].as_i64(), number) {
            (Some(set), Some(number)) => Ok(LentFd { set, number }),
            _ => Err(VmmError::Answer { operation, detail: "no descriptor number".to_owned() }),
        }
    }

    fn take_back_fd(&mut self, lent: LentFd) -> Result<(), VmmError> {
        self.ask("remove-fd", json!({ "fdset-id": lent.set }), "close a descriptor").map(drop)
    }

    fn prepare_save(&mut self) -> Result<(), VmmError> {
        devices::prepare_save(self)
    }

    fn reads_directly(&mut self) -> Result<bool, VmmError> {
        precheck::reads_directly(self)
    }

    fn pause(&mut self) -> Result<RunState, VmmError> {
        devices::pause(self)
    }

    fn ready_to_pause(&mut self) -> Result<RunState, VmmError> {
        devices::ready_to_pause(self)
    }

    fn pause_and_save(&mut self) -> Result<(RunState, SaveTicket), VmmError> {
        devices::pause_and_save(self)
    }

    fn drain(&mut self) -> Result<(), VmmError> {
        devices::drain(self)
    }

    fn restore(&mut self) -> Result<(), VmmError> {
        devices::restore(self)
    }

    fn take_disks(&mut self) -> Result<(), VmmError> {
        devices::take_disks(self)
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        devices::resume(self)
    }

    fn save_begin(&mut self) -> Result<SaveTicket, VmmError> {
        devices::save_begin(self)
    }

    fn save_finish(&mut self, ticket: SaveTicket) -> Result<Vec<u8>, VmmError> {
        devices::save_finish(self, ticket)
    }

    fn prepare_load(&mut self) -> Result<(), VmmError> {
        devices::prepare_load(self)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), VmmError> {
        devices::load(self, state)
    }

    fn announce(&mut self) -> Result<(), VmmError> {
        // A first packet at once, then ever rarer for half a second: switches and hosts lose packets too.
        let times = json!({ "initial": 20, "max": 550, "rounds": 5, "step": 100 });
        self.ask("announce-self", times, "announce itself").map(drop)
    }

    fn quit(&mut self, within: Duration) -> Result<(), VmmError> {
        let end = Instant::now() + within;
        // Giving back the memory of a large VM takes seconds of a processor, which the host's other guests come before.
        let pid = rustix::process::Pid::from_raw(self.process.pid());
        let _ = rustix::process::setpriority_process(pid, LAST_IN_LINE);
        // It may close the connection before the answer comes, or hang: only the process's end counts.
        if let Err(error) = self.qmp.execute("quit", Value::Null, within) {
            tracing::debug!(%error, pid = self.process.pid(), "quit was not answered");
        }
        if !self.process.wait_exit(end.saturating_duration_since(Instant::now())) {
            self.process.kill()?;
        }
        if !self.process.wait_exit(COMMAND_WITHIN) {
            return Err(VmmError::DoesNotDie { id: self.process_id() });
        }
        if let Some(dir) = self.cgroup.take() {
            launch::remove_cgroup(&dir);
        }
        Ok(())
    }
}
