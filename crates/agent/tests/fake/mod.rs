//! An agent without a host: VMs whose names say what becomes of their migration. Shared with the tests of the command.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod measure;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use sterna_agent::AgentError;
use sterna_agent::api::{Control, serve};
use sterna_agent::model::*;
use tokio::sync::{mpsc, oneshot, watch};

/// Bytes of RAM of every fake VM.
pub(crate) const RAM: u64 = 256 << 20;

/// Time between two changes of a fake migration.
const STEP: Duration = Duration::from_millis(20);

/// What the fake was asked, for tests to look at.
#[derive(Default)]
pub(crate) struct Fake {
    pub(crate) vms: Mutex<BTreeMap<String, VmView>>,
    pub(crate) migrations: Mutex<Vec<(String, watch::Sender<MigrationView>)>>,
    pub(crate) keys: Mutex<BTreeMap<String, String>>,
    pub(crate) requests: Mutex<Vec<MigrateRequest>>,
    pub(crate) cancels: Mutex<Vec<String>>,
    pub(crate) switches: Mutex<Vec<String>>,
    pub(crate) sets: Mutex<Vec<SetRequest>>,
    pub(crate) measures: Mutex<Vec<WorkingSetRequest>>,
    pub(crate) measuring: Arc<AtomicBool>,
    pub(crate) templates: Mutex<BTreeMap<String, TemplateView>>,
}

impl Fake {
    /// One VM of each fate: `web` moves, `stuck` goes on until it is cancelled, `late` moves once somebody tried to
    /// cancel it,
    /// `slowly` is in post-copy until somebody tried to cancel it, `broken` fails, `torn` runs at its target and its missing pages are lost, `lost` is released and never heard of, `stranded` is stopped and cannot be resumed, `refused` and `refused-later` do not pass the pre-check,
    /// `panics` ends the thread that asks.
    pub(crate) fn new() -> Arc<Self> {
        let fake = Self::default();
        for name in [
            "web",
            "stuck",
            "late",
            "slowly",
            "broken",
            "torn",
            "lost",
            "stranded",
            "refused",
            "refused-later",
            "panics",
            "idle",
        ] {
            fake.vms.lock().unwrap().insert(name.to_owned(), vm(name));
        }
        Arc::new(fake)
    }

    fn sender(&self, id: &str) -> Result<watch::Sender<MigrationView>, AgentError> {
        let found = self.migrations.lock().unwrap().iter().find(|(known, _)| known == id).cloned();
        found
            .map(|(_, sender)| sender)
            .ok_or_else(|| AgentError::NotFound(format!("there is no migration {id}")))
    }
}

pub(crate) fn vm(name: &str) -> VmView {
    VmView {
        name: name.to_owned(),
        state: "running".to_owned(),
        pid: 4242,
        ram_bytes: RAM,
        since: jiff::Timestamp::now(),
        generation: 1,
        argv: vec!["qemu-system-x86_64".to_owned()],
        log: format!("/run/sterna/vms/{name}/qemu.log"),
        template: None,
        memory: None,
        migration: None,
        notice: (name == "lost").then(|| "look at hostb".to_owned()),
        guest_helper: None,
    }
}

pub(crate) fn view(id: &str, vm: &str, target: &str) -> MigrationView {
    let ram = RamView { remaining: RAM, total: RAM, page_size: 4096, ..RamView::default() };
    MigrationView {
        id: id.to_owned(),
        vm: vm.to_owned(),
        source: "hosta".to_owned(),
        target: target.to_owned(),
        status: "setup".to_owned(),
        runs_at: "hosta".to_owned(),
        run_state: "running".into(),
        began: jiff::Timestamp::now(),
        total_time: 1.0,
        setup_time: 0.5,
        target_setup_time: None,
        downtime: None,
        expected_downtime: None,
        downtime_limit: 300,
        max_bandwidth: None,
        min_bandwidth: None,
        pace: None,
        cpu_throttle_percentage: 0,
        memory: Default::default(),
        notices: Vec::new(),
        ram,
        device_state: 0,
        wire_bytes: 0,
        blocks_verified: None,
        downtime_split: Vec::new(),
        postcopy_refusal: None,
        postcopy: None,
        error_desc: None,
        reasons: Vec::new(),
    }
}

fn reasons() -> Vec<ReasonView> {
    [
        ("vfio", "a device of the host is passed through: hostpci0"),
        ("memory", "hostb has 1 GiB free, 2 GiB are needed"),
    ]
    .map(|(code, text)| ReasonView { code: code.to_owned(), text: text.to_owned() })
    .into()
}

impl Fake {
    /// What becomes of the migration, one change after the other.
    fn play(&self, id: &str, request: &MigrateRequest, sender: &watch::Sender<MigrationView>) {
        let step = |change: &dyn Fn(&mut MigrationView)| {
            std::thread::sleep(STEP);
            sender.send_modify(change);
        };
        for number in 1..=3 {
            step(&|view| round(view, number));
        }
        // Waits as long as the agent of a test lives, and no longer.
        let waits = |vms: &[&str]| {
            while vms.contains(&request.vm.as_str()) && !self.was_cancelled(id) && !self.was_switched(id) {
                if sender.is_closed() && self.sender(id).is_err() {
                    return false;
                }
                std::thread::sleep(STEP);
            }
            true
        };
        if !waits(&["stuck", "late"]) {
            return;
        }
        if request.postcopy || self.was_switched(id) {
            step(&|view| run_lazily(view, "device"));
            step(&|view| run_lazily(view, "postcopy-active"));
            if !waits(&["slowly"]) {
                return;
            }
            return step(&|view| filled(request.verify, view));
        }
        step(&|view| end(&request.vm, request.verify, view));
    }

    fn was_cancelled(&self, id: &str) -> bool {
        self.cancels.lock().unwrap().iter().any(|known| known == id)
    }

    fn was_switched(&self, id: &str) -> bool {
        self.switches.lock().unwrap().iter().any(|known| known == id)
    }
}

/// The VM runs at its target, and a quarter of it is missing there.
fn run_lazily(view: &mut MigrationView, status: &str) {
    view.status = status.to_owned();
    view.runs_at.clear();
    if status != "device" {
        view.runs_at = view.target.clone();
        view.downtime = Some(9.5);
        view.ram.remaining = RAM / 4;
        view.postcopy = Some(PostcopyView { requests: 120, pushed: 3000, ..PostcopyView::default() });
    }
}

fn filled(verify: bool, view: &mut MigrationView) {
    end("web", verify, view);
    let known = view.postcopy.get_or_insert_default();
    known.faults = Some(100);
    known.latency = Some(LatencyView { mean: 500, p50: 400, p99: 2500, max: 8200 });
    known.vcpu_blocktime = vec![12.5, 40.0];
}

fn round(view: &mut MigrationView, number: u32) {
    if view.status == "setup" {
        view.status = "active".to_owned();
    }
    view.total_time += 20.0;
    view.expected_downtime = Some(12.0);
    view.ram.transferred += 40 << 20;
    view.ram.remaining = RAM >> number;
    view.ram.dirty_sync_count = number;
    view.ram.mbps = 941.5;
    view.ram.dirty_pages_rate = 1000;
    view.wire_bytes = view.ram.transferred + 1000;
}

fn end(vm: &str, verify: bool, view: &mut MigrationView) {
    match vm {
        "stuck" => {
            view.status = "cancelled".to_owned();
            view.error_desc =
                Some("the migration of VM stuck to hostb was cancelled; it runs at hosta".to_owned());
        }
        "broken" => {
            view.status = "failed".to_owned();
            view.error_desc =
                Some("VM broken did not move to hostb: the link was cut; it runs at hosta".to_owned());
        }
        "torn" => {
            view.status = "failed".to_owned();
            view.error_desc = Some("VM torn runs at hostb without all of its pages: end it there".to_owned());
            view.runs_at = view.target.clone();
        }
        "lost" => {
            view.status = "unresolved".to_owned();
            view.runs_at.clear();
        }
        "stranded" => {
            view.status = "unresolved".to_owned();
            view.error_desc = Some("VM stranded is stopped at hosta: look at its log".to_owned());
            view.runs_at.clear();
        }
        "refused-later" => {
            view.status = "failed".to_owned();
            view.reasons = reasons();
        }
        _ => {
            view.status = "completed".to_owned();
            view.runs_at = view.target.clone();
            view.downtime = Some(9.5);
            view.ram.remaining = 0;
            view.blocks_verified = verify.then_some(9);
            view.downtime_split = vec![Span { name: "stop".to_owned(), ms: 0.6 }];
        }
    }
}

impl Control for Fake {
    fn name(&self) -> String {
        "hosta".to_owned()
    }
    fn run(&self, request: RunRequest) -> Result<VmView, AgentError> {
        let mut vms = self.vms.lock().unwrap();
        if let Some(name) = request.template {
            let template = self.template(&name)?;
            let vm = VmView { argv: template.argv, template: Some(name), ..vm(&request.name) };
            vms.insert(request.name, vm.clone());
            return Ok(vm);
        }
        if request.argv.first().is_none_or(|binary| !binary.contains("qemu")) {
            return Err(AgentError::Invalid("the command line does not begin with a QEMU".to_owned()));
        }
        if vms.contains_key(&request.name) {
            return Err(AgentError::Conflict(format!("VM {} runs here already", request.name)));
        }
        let vm = VmView { argv: request.argv, ..vm(&request.name) };
        vms.insert(request.name, vm.clone());
        Ok(vm)
    }
    fn vms_with_memory(&self) -> Vec<VmView> {
        let memory = MemoryView { rss: 3 << 30, pss: 2 << 30, shared: 1 << 30, own: 1 << 29 };
        self.vms().into_iter().map(|vm| VmView { memory: Some(memory), ..vm }).collect()
    }
    fn vms(&self) -> Vec<VmView> {
        self.vms.lock().unwrap().values().cloned().collect()
    }
    fn vm(&self, name: &str) -> Result<VmView, AgentError> {
        let found = self.vms.lock().unwrap().get(name).cloned();
        found.ok_or_else(|| AgentError::NotFound(format!("there is no VM {name} here")))
    }
    fn stop(&self, name: &str) -> Result<(), AgentError> {
        self.vm(name)?;
        self.vms.lock().unwrap().remove(name);
        Ok(())
    }
    fn recover(&self, name: &str, request: RecoverRequest) -> Result<RecoverView, AgentError> {
        let vm = self.vm(name)?;
        match (vm.state.as_str(), request.runs) {
            ("running", _) => Err(AgentError::Invalid(format!("VM {name} is not unresolved"))),
            ("released", _) => Err(AgentError::Conflict(format!("VM {name} could not be taken back"))),
            (_, Side::There) => {
                Err(AgentError::Conflict("host hostb answers that its QEMU is dead".to_owned()))
            }
            (_, Side::Here) => Ok(RecoverView { vm: name.to_owned(), runs_at: "hosta".to_owned() }),
        }
    }
    fn measure(
        &self,
        name: &str,
        request: WorkingSetRequest,
    ) -> Result<mpsc::Receiver<WorkingSetEvent>, AgentError> {
        self.vm(name)?;
        self.measured(name, request)
    }
    fn hosts(&self) -> Vec<HostView> {
        let host =
            |name: &str, local| HostView { name: name.into(), address: "192.0.2.1:7000".into(), local };
        vec![host("hosta", true), host("hostb", false)]
    }
    fn templates(&self) -> Vec<TemplateView> {
        self.templates.lock().unwrap().values().cloned().collect()
    }
    fn template(&self, name: &str) -> Result<TemplateView, AgentError> {
        let found = self.templates.lock().unwrap().get(name).cloned();
        found.ok_or_else(|| AgentError::NotFound(format!("there is no template {name} here")))
    }
    fn make_template(&self, request: TemplateRequest) -> Result<TemplateView, AgentError> {
        self.check_template(request.clone())?;
        let vm = self.vm(&request.vm)?;
        let template = TemplateView {
            name: request.name.clone(),
            digest: "ab".repeat(32),
            created: jiff::Timestamp::now(),
            ram_bytes: RAM,
            bytes: RAM / 4,
            qemu: "10.0.2".into(),
            machine: "pc-q35-10.0".into(),
            argv: request.argv.unwrap_or(vm.argv),
            disks: Vec::new(),
            clones: Vec::new(),
        };
        self.templates.lock().unwrap().insert(request.name, template.clone());
        if request.end {
            self.vms.lock().unwrap().remove(&request.vm);
        }
        Ok(template)
    }
    fn check_template(&self, request: TemplateRequest) -> Result<(), AgentError> {
        self.vm(&request.vm)?;
        if ["stuck", "unfit"].contains(&request.vm.as_str()) {
            return Err(AgentError::Failed("this VM cannot become a template: it may write a disk".into()));
        }
        Ok(())
    }
    fn push_template(&self, name: &str, request: PushRequest) -> Result<PushView, AgentError> {
        let template = self.template(name)?;
        let bytes = if request.host == "hostb" { template.bytes } else { 0 };
        Ok(PushView { name: name.into(), host: request.host, bytes, complete: true })
    }
    fn remove_template(&self, name: &str) -> Result<(), AgentError> {
        self.template(name)?;
        self.templates.lock().unwrap().remove(name);
        Ok(())
    }
    fn migrate(
        self: Arc<Self>,
        request: MigrateRequest,
        key: Option<String>,
    ) -> Result<MigrationView, AgentError> {
        self.vm(&request.vm)?;
        assert_ne!(request.vm, "panics", "as the test wants");
        if request.vm == "refused" {
            return Err(AgentError::Refused { vm: request.vm, host: request.host, reasons: reasons() });
        }
        if let Some(id) = key.as_ref().and_then(|key| self.keys.lock().unwrap().get(key).cloned()) {
            return Ok(self.sender(&id)?.borrow().clone());
        }
        let id = format!("m{}", self.migrations.lock().unwrap().len() + 1);
        let view = view(&id, &request.vm, &request.host);
        let sender = watch::Sender::new(view.clone());
        self.migrations.lock().unwrap().insert(0, (id.clone(), sender.clone()));
        key.into_iter().for_each(|key| drop(self.keys.lock().unwrap().insert(key, id.clone())));
        self.requests.lock().unwrap().push(request.clone());
        std::thread::spawn(move || self.play(&id, &request, &sender));
        Ok(view)
    }
    fn migrate_together(
        self: Arc<Self>,
        request: GangRequest,
        key: Option<String>,
    ) -> Result<GangView, AgentError> {
        let (mut migrations, mut refused) = (Vec::new(), Vec::new());
        for one in request.migrations {
            let (vm, key) = (one.vm.clone(), key.as_ref().map(|key| format!("{key}/{}", one.vm)));
            match Control::migrate(self.clone(), one, key) {
                Ok(view) => migrations.push(view),
                Err(why) => {
                    refused.push(GangRefusal { vm, code: "conflict".into(), text: why.to_string() });
                }
            }
        }
        Ok(GangView { migrations, refused })
    }
    fn migrations(&self) -> Vec<MigrationView> {
        self.migrations.lock().unwrap().iter().map(|(_, sender)| sender.borrow().clone()).collect()
    }
    fn watch(&self, id: &str) -> Result<watch::Receiver<MigrationView>, AgentError> {
        self.sender(id).map(|sender| sender.subscribe())
    }
    fn cancel(&self, id: &str) -> Result<(), AgentError> {
        let sender = self.sender(id)?;
        self.cancels.lock().unwrap().push(id.to_owned());
        if sender.borrow().vm == "late" {
            return Err(AgentError::Conflict("it is too late: the VM was handed over".to_owned()));
        }
        if sender.borrow().status.starts_with("postcopy") {
            return Err(AgentError::Conflict("the VM runs at host hostb".to_owned()));
        }
        sender.send_modify(|view| view.status = "cancelling".to_owned());
        Ok(())
    }
    fn postcopy(&self, id: &str) -> Result<(), AgentError> {
        let sender = self.sender(id)?;
        let status = sender.borrow().status.clone();
        if !matches!(status.as_str(), "setup" | "active") {
            return Err(AgentError::Conflict(format!("there is nothing to switch: {status}")));
        }
        if sender.borrow().vm == "late" {
            sender.send_modify(|view| view.postcopy_refusal = Some("its RAM is in huge pages".to_owned()));
            return Err(AgentError::Conflict("host hostb cannot: its RAM is in huge pages".to_owned()));
        }
        self.switches.lock().unwrap().push(id.to_owned());
        Ok(())
    }
    fn set(&self, id: &str, request: SetRequest) -> Result<(), AgentError> {
        let sender = self.sender(id)?;
        sender.send_modify(|view| {
            view.max_bandwidth = request.max_bandwidth.filter(|rate| *rate > 0);
            view.downtime_limit = request.downtime_limit.unwrap_or(view.downtime_limit);
        });
        self.sets.lock().unwrap().push(request);
        Ok(())
    }
}

/// The fake behind the real API, on a socket of its own.
pub(crate) struct Server {
    pub(crate) fake: Arc<Fake>,
    folder: tempfile::TempDir,
    running: Option<(oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Self { fake: Fake::new(), folder, running: None };
        server.begin();
        server
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// Begins to serve, and returns once it answers.
    pub(crate) fn begin(&mut self) {
        let (stop, stopped) = oneshot::channel();
        let (fake, socket) = (self.fake.clone(), self.socket());
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            runtime.block_on(serve(fake, &socket, async { drop(stopped.await) })).unwrap();
            runtime.shutdown_background();
        });
        self.running = Some((stop, thread));
        wait_until(|| std::os::unix::net::UnixStream::connect(self.socket()).is_ok());
    }

    /// Ends to serve, as an agent that is restarted; streams end with it.
    pub(crate) fn end(&mut self) {
        let Some((stop, thread)) = self.running.take() else { return };
        let _ = stop.send(());
        thread.join().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits for something that must come true soon.
pub(crate) fn wait_until(mut condition: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("it did not come true within 10 s");
}

/// The newest migration's id once there is one.
pub(crate) fn newest(fake: &Fake) -> String {
    wait_until(|| !fake.migrations.lock().unwrap().is_empty());
    fake.migrations.lock().unwrap()[0].0.clone()
}
