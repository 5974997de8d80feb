//! What can be asked of an agent: the façade that the API calls.

use crate::Config;
use crate::control::explain;
use crate::guest::Guests;
use crate::host::{Host, ram_of};
use crate::model::{
    GangRefusal, GangRequest, GangView, HostView, MigrateRequest, MigrationView, ReasonView, RecoverRequest,
    RecoverView, RunRequest, SetRequest, Side, VmView, WorkingSetEvent, WorkingSetRequest,
};
use crate::registry::{Decision, Leaving, NAME_RULE, Vm, VmRecord, is_usable, lock};
use crate::sharing::{Gang, Seat};
use crate::source::{self, Handle, Order};
use crate::{peer, postcopy, recovery, working_set};
use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::Duration;
use sterna_engine::handoff::MigrationId;
use sterna_engine::source::STREAMS_MAX;
use sterna_transport::{Limits, Listener, ServerHandle};
use sterna_vmm::Vmm;
use sterna_vmm::qemu::{CommandLine, Qemu, expand};
use tokio::sync::watch;

/// Ended migrations that are remembered, so that `sterna status` can tell of them.
const HISTORY_MAX: usize = 1000;
/// Longest downtime limit: QEMU's own, 2000 s.
pub(crate) const DOWNTIME_LIMIT_MS_MAX: u64 = 2_000_000;
/// How long a decision may take: a last question to a host that does not answer, and the end or the resume of a QEMU.
const RECOVER_WITHIN: Duration = Duration::from_secs(50);
/// How long a QEMU may take to quit before it is killed.
const QUIT_WITHIN: Duration = Duration::from_secs(10);

/// Why the agent did not do what it was asked to. Each text says what happened, to which VM, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The request makes no sense as it is.
    #[error("{0}")]
    Invalid(String),
    /// There is no such VM, host or migration.
    #[error("{0}")]
    NotFound(String),
    /// It cannot be done in the state things are in.
    #[error("{0}")]
    Conflict(String),
    /// The pre-check speaks against it: every reason.
    #[error("VM {vm} cannot move to {host}; it runs here as before")]
    Refused {
        /// Name of the VM.
        vm: String,
        /// Name of the host it should go to.
        host: String,
        /// The reasons.
        reasons: Vec<ReasonView>,
    },
    /// Something on this host failed.
    #[error("{0}")]
    Failed(String),
}

impl AgentError {
    /// A word for scripts.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::NotFound(_) => "not-found",
            Self::Conflict(_) => "conflict",
            Self::Refused { .. } => "refused",
            Self::Failed(_) => "failed",
        }
    }
}

/// One per host. All methods block; the API calls them on threads of their own.
pub struct Agent {
    host: Arc<Host>,
    jobs: Mutex<Jobs>,
    guests: OnceLock<Guests>,
    _server: ServerHandle,
}

#[derive(Default)]
struct Jobs {
    by_id: HashMap<String, Handle>,
    order: Vec<String>,
    keys: HashMap<String, String>,
}

impl Agent {
    /// Opens the state folder, finds the VMs of an earlier life again, settles what was left open, and listens for peers.
    ///
    /// # Errors
    /// [`AgentError::Failed`] when the state, the keys or the address cannot be used.
    pub fn start(config: Config) -> Result<Arc<Self>, AgentError> {
        #[cfg(feature = "holds")]
        tracing::warn!("{}", crate::hold::ANNOUNCED);
        let listener = Listener::bind(&config.listen).map_err(|why| AgentError::Failed(explain(&why)))?;
        let host = Arc::new(Host::open(config).map_err(AgentError::Failed)?);
        crate::sharing::raise_map_count(host.config().sharing.max_map_count);
        let open = recovery::recover(&host);
        let (for_peers, endpoint) = (host.clone(), host.endpoint().clone());
        let server = listener
            .serve(endpoint, Limits::default(), move |connection| peer::handle(&for_peers, connection))
            .map_err(|why| AgentError::Failed(explain(&why)))?;
        let agent = Arc::new(Self { host, jobs: Mutex::default(), guests: OnceLock::new(), _server: server });
        for (vm, record) in open {
            let id = record.id.to_string();
            if vm.reserve(&id).is_ok() {
                let ended = ending(&agent.host, &vm);
                let handle = source::resolve(&agent.host, &vm, &record, ended);
                lock(&agent.jobs).add(id, None, handle);
            }
        }
        // Last: a guest is heard once it is known whose it is.
        let guests = Guests::serve(&agent).map_err(|why| AgentError::Failed(format!("guests: {why}")))?;
        agent.guests.get_or_init(|| guests);
        Ok(agent)
    }

    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Name of this host.
    pub fn name(&self) -> &str {
        self.host.name()
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] for a name or command line that cannot be used, [`AgentError::Conflict`] for a name that
    /// is taken, [`AgentError::Failed`] when QEMU does not start, with the end of its log.
    pub fn run(&self, request: RunRequest) -> Result<VmView, AgentError> {
        if !is_usable(&request.name) {
            let name = &request.name;
            return Err(AgentError::Invalid(format!("the name {name:?} cannot be used: {NAME_RULE}")));
        }
        let claim = self.host.registry().claim(&request.name);
        let Some(_claim) = claim else {
            let (us, name) = (self.name(), &request.name);
            return Err(AgentError::Conflict(format!("host {us} has a VM named {name} already")));
        };
        if let Some(template) = &request.template {
            return self.run_clone(&request, template);
        }
        let RunRequest { name, argv, .. } = request;
        let unusable = |why| AgentError::Invalid(explain(&why));
        // What was in a configuration file travels, the file does not.
        let argv = expand(argv, &self.host.run_dir(&name)).map_err(unusable)?;
        let line = CommandLine::parse(argv.clone()).map_err(unusable)?;
        let ours = line.for_source(&self.host.run_dir(&name));
        let launched =
            self.host.launch(&name, ours, None).map_err(|why| AgentError::Failed(explain(&why)))?;
        let mut qemu = launched.qemu;
        // Where RAM is can be told best before firmware has hidden parts of it; the addresses are remembered.
        let layout = qemu.layout();
        let parts = qemu.parts();
        let mut record = self.fresh_record(&name, argv, &qemu);
        record.parts = parts.ok();
        if let Err(why) = layout {
            tracing::warn!(
                vm = name,
                why = explain(&why),
                "its RAM is not understood; it runs and cannot be moved"
            );
        }
        tracing::info!(vm = name, pid = record.process.pid, "the VM was started");
        let vm = Vm::new(record, Some(qemu));
        if let Err(why) = self.host.registry().insert(&vm) {
            return Err(self.abandon(&vm, &why));
        }
        Ok(vm.view())
    }

    /// What is written down about a VM that was started just now.
    pub(crate) fn fresh_record(&self, name: &str, argv: Vec<String>, qemu: &Qemu) -> VmRecord {
        VmRecord {
            name: name.to_owned(),
            ram_bytes: ram_of(&argv),
            argv,
            process: qemu.process_id(),
            run_dir: self.host.run_dir(name),
            log: self.host.log(name),
            generation: self.first_generation(name),
            since: jiff::Timestamp::now(),
            incoming: false,
            leaving: None,
            parts: None,
            balloon: None,
            fetch: None,
            template: None,
        }
    }

    /// A VM that cannot be written down must not run: no later life of this agent would find it again.
    pub(crate) fn abandon(&self, vm: &Vm, why: &std::io::Error) -> AgentError {
        let killed = self.kill(vm).err().map(|why| format!("; and {why}")).unwrap_or_default();
        self.host.registry().remove(vm);
        let (name, folder) = (vm.name(), self.host.config().state_dir.display());
        AgentError::Failed(format!(
            "VM {name} was ended: it cannot be written down in {folder}: {why}{killed}"
        ))
    }

    /// Where a VM that is started begins to count: beyond every try of a VM of that name before, here (by the record) and
    /// elsewhere (by the clock), so that no old record speaks of it.
    fn first_generation(&self, name: &str) -> u64 {
        use sterna_engine::handoff::Journal as _;
        let known = self.host.journal().load(name).ok().flatten().map_or(0, |record| record.generation.0);
        generation_after(known, jiff::Timestamp::now().as_second())
    }

    /// All VMs of this host, with what memory each uses.
    pub fn vms_with_memory(&self) -> Vec<VmView> {
        let mut views = self.vms();
        for view in &mut views {
            let process = self.host.registry().find(&view.name).and_then(|vm| self.host.process_of(&vm).ok());
            view.memory = process.as_ref().and_then(crate::room::view_of);
        }
        views
    }

    /// All VMs of this host.
    pub fn vms(&self) -> Vec<VmView> {
        self.host.registry().all().iter().map(|vm| vm.view()).collect()
    }

    /// One VM.
    ///
    /// # Errors
    /// [`AgentError::NotFound`].
    pub fn vm(&self, name: &str) -> Result<VmView, AgentError> {
        Ok(self.find(name)?.view())
    }

    pub(crate) fn find(&self, name: &str) -> Result<Arc<Vm>, AgentError> {
        use sterna_engine::handoff::{Journal as _, Step};
        let found = self.host.registry().find(name);
        found.ok_or_else(|| {
            let record = self.host.journal().load(name).ok().flatten();
            if let Some(record) = record.filter(|record| record.step == Step::Gone) {
                let (us, peer) = (self.name(), record.peer);
                return AgentError::NotFound(format!(
                    "host {us} has no VM named {name}: it moved to host {peer}"
                ));
            }
            AgentError::NotFound(format!("host {} has no VM named {name}; see sterna ps", self.name()))
        })
    }

    /// Ends a VM (its QEMU quits; the guest is not asked) and forgets it.
    ///
    /// # Errors
    /// [`AgentError::Conflict`] while it is being moved, [`AgentError::Failed`] when its QEMU does not end.
    pub fn stop(&self, name: &str) -> Result<(), AgentError> {
        let vm = self.find(name)?;
        if vm.record().incoming && vm.doubtful().is_none() {
            return Err(AgentError::Conflict(format!(
                "VM {name} is on its way here; abort its migration at its source"
            )));
        }
        vm.reserve("stop").map_err(|job| {
            if vm.is_serving() {
                return AgentError::Conflict(format!(
                    "VM {name} runs at another host, which needs pages of it from here (sterna status {name}): what is left of it \
                     here ends by itself when they have come"
                ));
            }
            AgentError::Conflict(format!(
                "VM {name} is in migration {job}; abort that first (sterna abort {name})"
            ))
        })?;
        let qemu = vm.qemu().take();
        let ended = match qemu {
            Some(mut qemu) if vm.is_alive() => match qemu.quit(QUIT_WITHIN) {
                // It may wait for a page that never comes.
                Err(_) if vm.fetching().is_some() => self.kill(&vm),
                ended => ended.map_err(|why| explain(&why)),
            },
            _ if vm.is_alive() => self.kill(&vm),
            _ => Ok(()),
        };
        vm.free();
        ended.map_err(|why| AgentError::Failed(format!("VM {name} does not end: {why}")))?;
        self.host.registry().remove(&vm);
        tracing::info!(vm = name, "the VM was ended");
        Ok(())
    }

    fn kill(&self, vm: &Vm) -> Result<(), String> {
        let process = self.host.process_of(vm)?;
        process.kill().map_err(|why| explain(&why))?;
        if process.wait_exit(QUIT_WITHIN) {
            Ok(())
        } else {
            Err("its QEMU was killed and does not end".into())
        }
    }

    /// Hosts.
    pub fn hosts(&self) -> Vec<HostView> {
        let config = self.host.config();
        let us = HostView { name: config.name.clone(), address: config.listen.clone(), local: true };
        let others = config.hosts.iter().filter(|(name, _)| **name != config.name);
        let others = others.map(|(name, host)| HostView {
            name: name.clone(),
            address: host.address.clone(),
            local: false,
        });
        std::iter::once(us).chain(others).collect()
    }

    /// Begins a migration. `key` makes a repeated request return the first one's migration.
    ///
    /// # Errors
    /// [`AgentError::Invalid`], [`AgentError::NotFound`] or [`AgentError::Conflict`]; what the pre-check finds is told
    /// by the migration itself, which ends at once with its reasons.
    pub fn migrate(
        self: &Arc<Self>,
        request: MigrateRequest,
        key: Option<String>,
    ) -> Result<MigrationView, AgentError> {
        // Held to the end: the same key twice at once is one migration.
        let mut jobs = lock(&self.jobs);
        if let Some(known) = key.as_ref().and_then(|key| jobs.by_key(key)) {
            return Ok(known);
        }
        self.check(&request)?;
        let seat = self.seats(&request.host, request.max_bandwidth, 1)?.pop();
        self.begin(&mut jobs, &request, key, seat)
    }

    /// Begins several migrations. Those to the same host leave together: what they have in common travels once.
    ///
    /// # Errors
    /// None for one VM: what keeps it from moving is told beside those that move.
    pub fn migrate_together(
        self: &Arc<Self>,
        request: GangRequest,
        key: Option<String>,
    ) -> Result<GangView, AgentError> {
        let mut jobs = lock(&self.jobs);
        let (mut migrations, mut refused) = (Vec::new(), Vec::new());
        let mut begun: Vec<(MigrateRequest, Option<String>)> = Vec::new();
        let mut refuse = |request: &MigrateRequest, why: &AgentError| {
            let (vm, code, text) = (request.vm.clone(), why.code().to_owned(), why.to_string());
            refused.push(GangRefusal { vm, code, text });
        };
        for request in request.migrations {
            let key = key.as_ref().map(|key| format!("{key}/{}", request.vm));
            if let Some(known) = key.as_ref().and_then(|key| jobs.by_key(key)) {
                migrations.push(known);
                continue;
            }
            match self.check(&request) {
                Ok(()) => begun.push((request, key)),
                Err(why) => refuse(&request, &why),
            }
        }
        let mut seats: BTreeMap<String, Vec<Seat>> = BTreeMap::new();
        for (request, _) in &begun {
            if !seats.contains_key(&request.host) {
                let of_host = begun.iter().filter(|(other, _)| other.host == request.host);
                // Each has its limit; what they have in common is sent while none of them sends.
                let limits: Vec<Option<u64>> = of_host.map(|(other, _)| other.max_bandwidth).collect();
                let limit = limits.iter().try_fold(0u64, |sum, limit| Some(sum.saturating_add((*limit)?)));
                seats.insert(request.host.clone(), self.seats(&request.host, limit, limits.len())?);
            }
        }
        for (request, key) in begun {
            let seat = seats.get_mut(&request.host).and_then(Vec::pop);
            match self.begin(&mut jobs, &request, key, seat) {
                Ok(view) => migrations.push(view),
                Err(why) => refuse(&request, &why),
            }
        }
        Ok(GangView { migrations, refused })
    }

    /// Places for VMs that leave for a host together.
    fn seats(&self, host: &str, limit: Option<u64>, count: usize) -> Result<Vec<Seat>, AgentError> {
        let address = self.host.address_of(host).map_err(AgentError::NotFound)?;
        Ok(Gang::seats(&self.host, (host, &address), limit, count))
    }

    fn begin(
        self: &Arc<Self>,
        jobs: &mut Jobs,
        request: &MigrateRequest,
        key: Option<String>,
        seat: Option<Seat>,
    ) -> Result<MigrationView, AgentError> {
        let Some(seat) = seat else {
            return Err(AgentError::Failed("it has no place among the others".into()));
        };
        let vm = self.find(&request.vm)?;
        if let Some(word) = vm.fetching() {
            return Err(AgentError::Conflict(format!(
                "VM {} runs here and pages of it are still at the host that it came from ({word}): it can move on once they have come",
                request.vm
            )));
        }
        let id = MigrationId(random()?);
        vm.reserve(&id.to_string()).map_err(|job| {
            AgentError::Conflict(format!(
                "VM {} is in migration {job} already (sterna status {0})",
                request.vm
            ))
        })?;
        let leaving =
            Leaving { id: id.to_string(), to: request.host.clone(), max_bandwidth: request.max_bandwidth };
        let begun = self.host.registry().update(&vm, |record| {
            record.generation += 1;
            record.leaving = Some(leaving);
        });
        if let Err(why) = begun {
            vm.free();
            let (vm, folder) = (&request.vm, self.host.config().state_dir.display());
            return Err(AgentError::Failed(format!(
                "VM {vm} is not moved and runs on: it cannot be written down in {folder}: {why}; mend that folder (is its \
                 disk full, or read-only?) and try again"
            )));
        }
        let handle = source::start(&self.host, &vm, request, (id, seat), ending(&self.host, &vm));
        let view = handle.view.borrow().clone();
        tracing::info!(vm = request.vm, to = request.host, migration = %id, "a migration begins");
        jobs.add(id.to_string(), key, handle);
        Ok(view)
    }

    /// Measures what a VM writes. Dropping the receiver ends it, and so does a migration of the VM.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], [`AgentError::Invalid`], [`AgentError::Conflict`] while the VM is moved or measured, and
    /// [`AgentError::Failed`] when its memory cannot be tracked.
    pub fn measure(
        &self,
        name: &str,
        request: WorkingSetRequest,
    ) -> Result<tokio::sync::mpsc::Receiver<WorkingSetEvent>, AgentError> {
        working_set::start(&self.host, &self.find(name)?, request)
    }

    fn check(&self, request: &MigrateRequest) -> Result<(), AgentError> {
        let vm = self.find(&request.vm)?;
        if request.host == self.name() {
            return Err(AgentError::Invalid(format!(
                "VM {} is on host {} already",
                request.vm, request.host
            )));
        }
        self.host.address_of(&request.host).map_err(AgentError::NotFound)?;
        if !vm.is_alive() {
            return Err(AgentError::Conflict(format!("VM {} does not run: its QEMU has ended", request.vm)));
        }
        if let Some(why) = vm.doubtful() {
            return Err(AgentError::Conflict(format!("VM {} cannot be moved: {why}", request.vm)));
        }
        if request.parallel_connections.is_some_and(|count| !(1..=STREAMS_MAX).contains(&count)) {
            return Err(AgentError::Invalid(format!("parallel-connections is 1 to {STREAMS_MAX}")));
        }
        if request.downtime_limit > DOWNTIME_LIMIT_MS_MAX {
            return Err(AgentError::Invalid(format!("downtime-limit is at most {DOWNTIME_LIMIT_MS_MAX} ms")));
        }
        in_order(request.min_bandwidth, request.max_bandwidth)?;
        let sane = |seconds: f64| seconds.is_finite() && (0.0..1e9).contains(&seconds);
        if request.timeout.is_some_and(|seconds| !sane(seconds)) {
            return Err(AgentError::Invalid("timeout is a number of seconds".into()));
        }
        postcopy::check(request)
    }

    /// Decides where a VM runs whose owner the other host does not tell.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], [`AgentError::Invalid`] when it is not unresolved, [`AgentError::Conflict`] when the
    /// other host answers after all and says something else, or the VM cannot be resumed here.
    pub fn recover(&self, name: &str, request: RecoverRequest) -> Result<RecoverView, AgentError> {
        use sterna_engine::handoff::{Choice, Journal as _};
        let vm = self.find(name)?;
        let record = self.host.journal().load(name).map_err(|why| AgentError::Failed(why.to_string()))?;
        let peer = record.map_or_else(String::new, |record| record.peer);
        let choice = if request.runs == Side::Here { Choice::Here } else { Choice::There };
        let (reply, answer) = mpsc::channel();
        match (vm.decisions(), vm.migration().and_then(|id| self.job(&id).ok())) {
            (Some(decisions), _) => drop(decisions.send(Decision { choice, reply })),
            (None, Some(job)) if vm.is_released() => job.order(Order::Recover(choice, reply)),
            _ => return Err(not_unresolved(&vm, &peer)),
        }
        match answer.recv_timeout(RECOVER_WITHIN) {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return Err(AgentError::Conflict(format!("VM {name}: {why}"))),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(not_unresolved(&vm, &peer)),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let text = format!("VM {name}: it is still being worked on; see sterna ps");
                return Err(AgentError::Failed(text));
            }
        }
        let runs_at = if choice == Choice::Here { self.name().to_owned() } else { peer };
        tracing::warn!(vm = name, runs_at, "an operator has decided where the VM runs");
        Ok(RecoverView { vm: name.into(), runs_at })
    }

    /// Migrations of this agent's life as a source, the newest first.
    pub fn migrations(&self) -> Vec<MigrationView> {
        let jobs = lock(&self.jobs);
        jobs.order.iter().rev().filter_map(|id| Some(jobs.by_id.get(id)?.view.borrow().clone())).collect()
    }

    /// Figures of a migration as they change; the last one is final.
    ///
    /// # Errors
    /// [`AgentError::NotFound`].
    pub fn watch(&self, id: &str) -> Result<watch::Receiver<MigrationView>, AgentError> {
        Ok(self.job(id)?.view)
    }

    fn job(&self, id: &str) -> Result<Handle, AgentError> {
        let found = lock(&self.jobs).by_id.get(id).cloned();
        found.ok_or_else(|| AgentError::NotFound(format!("host {} knows no migration {id}", self.name())))
    }

    /// Cancels a migration.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], or [`AgentError::Conflict`] when it is over, or the VM runs at the target and misses pages.
    pub fn cancel(&self, id: &str) -> Result<(), AgentError> {
        let job = self.job(id)?;
        let view = job.view.borrow().clone();
        if matches!(view.status.as_str(), "completed" | "failed" | "cancelled") {
            return Err(AgentError::Conflict(format!(
                "migration {id} of VM {} is over: {}",
                view.vm, view.status
            )));
        }
        if let Some(why) = postcopy::against_cancel(&view) {
            return Err(AgentError::Conflict(why));
        }
        job.order(Order::Cancel);
        Ok(())
    }

    /// Lets the VM of a migration run at its target as soon as that can be; what is missing there follows.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], or [`AgentError::Conflict`] when it is over, the VM is stopped already or runs at the target, or the
    /// target has said that it cannot. Where it says so later, the migration goes on as it is and has a notice.
    pub fn postcopy(&self, id: &str) -> Result<(), AgentError> {
        let job = self.job(id)?;
        if let Some(why) = postcopy::against_switch(&job.view.borrow()) {
            return Err(AgentError::Conflict(why));
        }
        job.order(Order::Postcopy);
        Ok(())
    }

    /// Changes a migration that goes on.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], [`AgentError::Invalid`], or [`AgentError::Conflict`] for what counts before the hand-over alone.
    pub fn set(&self, id: &str, request: SetRequest) -> Result<(), AgentError> {
        let job = self.job(id)?;
        if request.downtime_limit.is_some_and(|limit| limit > DOWNTIME_LIMIT_MS_MAX) {
            return Err(AgentError::Invalid(format!("downtime-limit is at most {DOWNTIME_LIMIT_MS_MAX} ms")));
        }
        let (min, max) = {
            let view = job.view.borrow();
            (request.min_bandwidth.or(view.min_bandwidth), request.max_bandwidth.or(view.max_bandwidth))
        };
        in_order(min, max)?;
        let gone = [
            (request.min_bandwidth.is_some(), "min-bandwidth"),
            (request.auto_converge.is_some(), "auto-converge"),
            (request.downtime_limit.is_some(), "downtime-limit"),
        ];
        if let Some(why) = postcopy::against_change(&job.view.borrow(), &gone) {
            return Err(AgentError::Conflict(why));
        }
        job.order(Order::Set(request));
        Ok(())
    }
}

/// Limits of bandwidth in bytes per second, 0 for none.
fn in_order(min: Option<u64>, max: Option<u64>) -> Result<(), AgentError> {
    match (min, max.filter(|max| *max > 0)) {
        (Some(min), Some(max)) if min > max => Err(AgentError::Invalid(format!(
            "min-bandwidth ({min} bytes per second) is more than max-bandwidth ({max}): give both in order"
        ))),
        _ => Ok(()),
    }
}

fn not_unresolved(vm: &Vm, peer: &str) -> AgentError {
    let (name, state) = (vm.name(), vm.view().state);
    if vm.is_released() && !vm.is_alive() {
        return AgentError::Invalid(format!(
            "VM {name} was handed to host {peer}, and its QEMU here has ended: there is nothing to resume. See whether it runs \
             at {peer}; sterna stop {name} forgets it here"
        ));
    }
    AgentError::Invalid(format!("VM {name} is not unresolved, it is {state}: there is nothing to decide"))
}

impl Jobs {
    fn add(&mut self, id: String, key: Option<String>, handle: Handle) {
        if self.order.len() >= HISTORY_MAX {
            let oldest = self.order.remove(0);
            self.by_id.remove(&oldest);
            self.keys.retain(|_, id| *id != oldest);
        }
        if let Some(key) = key {
            self.keys.insert(key, id.clone());
        }
        self.order.push(id.clone());
        self.by_id.insert(id, handle);
    }

    fn by_key(&self, key: &str) -> Option<MigrationView> {
        Some(self.by_id.get(self.keys.get(key)?)?.view.borrow().clone())
    }
}

/// Beyond what is known here, whatever the clock says: it may have been set back by years.
fn generation_after(known: u64, clock_seconds: i64) -> u64 {
    u64::try_from(clock_seconds).unwrap_or_default().max(known.saturating_add(1))
}

/// What is done when a migration has ended: its VM may be moved again, and is no longer said to be leaving.
fn ending(host: &Arc<Host>, vm: &Arc<Vm>) -> impl FnOnce() + Send + use<> {
    use sterna_engine::handoff::{Journal as _, Step};
    let (host, vm) = (host.clone(), vm.clone());
    move || {
        let record = host.journal().load(&vm.name());
        if record.is_ok_and(|record| record.is_none_or(|record| record.step != Step::Released)) {
            host.registry().stayed(&vm);
        }
        vm.free();
    }
}

pub(crate) fn random() -> Result<[u8; 16], AgentError> {
    let mut bytes = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|why| AgentError::Failed(format!("no random numbers: {why}")))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::generation_after;

    #[test]
    fn a_clock_that_jumps_by_years_never_makes_a_new_vm_older_than_an_old_record() {
        let today = 1_800_000_000;
        let first = generation_after(0, today);
        for clock in [today - 900_000_000, -1, 0, today, today + 900_000_000] {
            assert!(generation_after(first, clock) > first, "the clock says {clock}");
        }
    }
}
