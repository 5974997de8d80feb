//! One incoming migration: a thread that performs what the engine's target machine wants done.

use crate::awake::Awake;
use crate::config::PageStreams;
use crate::control::{Arrival, Control, explain};
use crate::fit::sinks;
use crate::host::{Host, fingerprint_of, ram_of};
use crate::incoming::Incoming;
use crate::pages::{Ahead, Fetched, Received, Receiver, Sinks};
use crate::registry::{Claim, NAME_RULE, Vm, VmRecord, is_usable};
use crate::templates::{Base, StoredBlock};
use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use sterna_engine::handoff::{Journal, MigrationId, Record, Role};
use sterna_engine::target::{TargetAction, TargetInput};
use sterna_engine::wire::Message;
use sterna_engine::wire::control::STATE_BYTES_MAX;
use sterna_engine::wire::message::{Block, Hello, Image, Offer, Reason};
use sterna_engine::{Generation, Target};
use sterna_memory::Process;
use sterna_transport::Connection;
use sterna_vmm::qemu::{CommandLine, HugePages, ImageProof, Qemu, is_upgrade, older_qemu};
use sterna_vmm::{Code, Vmm, VmmError, difference};

mod admission;
mod common;
mod load;
mod postcopy;
mod template;

use postcopy::Lazy;
pub(crate) use postcopy::{Processors, is_unfilled, let_go, resume};

/// How often the clock is looked at while nothing happens.
const REFRESH: Duration = Duration::from_millis(200);
/// How long a killed QEMU may take to end: freeing hundreds of gigabytes takes seconds.
const DEATH_WITHIN: Duration = Duration::from_secs(60);

/// How long a QEMU whose memory cannot be written any more may take to be seen dead.
const DYING: Duration = Duration::from_millis(500);

/// What arrives at the thread.
pub(crate) enum Event {
    Input(TargetInput),
    State(Vec<u8>),
    /// A page stream, once there is a QEMU.
    Rounds(u32, Ahead),
    Demand(Connection),
    Push(u32, Connection),
    /// The source of a post-copy is here again.
    Reattach(Connection),
    /// What becomes of the pages that are missing.
    Fetched(Fetched),
    /// Its template, which was on its way, is here, or is not and will not be.
    Template(Result<(), String>),
    /// A control connection is lost; which generation of connections it was of.
    Lost(u64, String),
    /// A stream tells; whether it counts depends on how far the migration is.
    Received(Received),
}

/// The thread's own.
struct Arriving<'a> {
    id: MigrationId,
    peer: String,
    host: Arc<Host>,
    incoming: &'a Incoming,
    tell: mpsc::Sender<Event>,
    control: Option<Control>,
    claim: Option<Claim>,
    vm: Option<Arc<Vm>>,
    qemu: Option<Qemu>,
    offer: Offer,
    sinks: Option<Arc<Sinks>>,
    receivers: BTreeMap<u32, Receiver>,
    /// Those that have done their work: they are ended when no VM waits for that.
    ended: BTreeMap<u32, Receiver>,
    state: Vec<u8>,
    /// When its QEMU's heap is to be touched once more.
    heap_due: Option<Instant>,
    /// From the first of it until the VM runs.
    awake: Awake,
    /// What the VM is a clone of.
    template: Option<Arc<Base>>,
    /// How many runs of pages in common are mapped.
    mapped: usize,
    /// Whether the VM stays paused once it is ours.
    paused: bool,
    /// The huge pages that the VM needs, and what memory is left if it shares nothing.
    huge: Vec<HugePages>,
    head_room: i64,
    lazy: Lazy,
    began: Instant,
}

/// Runs an incoming migration to its end, on this thread.
pub(crate) fn run(host: &Arc<Host>, peer: &str, hello: &Hello, connection: Connection) {
    let (tell, events) = mpsc::channel();
    let mut machine = Target::new(hello, peer, Duration::ZERO);
    let id = machine.id();
    let incoming = host.incoming();
    if !incoming.enter(id, peer, tell.clone()) {
        return tracing::warn!(peer, %id, "a second control connection for a migration was refused");
    }
    let mut arriving = Arriving::new((id, peer), host.clone(), incoming, tell);
    arriving.attach_control(connection);
    arriving.finish(&mut machine, &events, peer);
}

/// Every reason why this VM cannot come here, but for want of memory. Touches nothing. And the huge pages that it needs.
pub(crate) fn reasons_against(host: &Host, offer: &Offer) -> (Vec<Reason>, Vec<HugePages>) {
    let reason = |code: &str, text: String| Reason { code: code.into(), text };
    // First of all: the name becomes part of paths.
    if !is_usable(&offer.vm) {
        let why = format!("the name {:?} cannot be used: {NAME_RULE}", offer.vm);
        return (vec![reason("name", why)], Vec::new());
    }
    let mut reasons = Vec::new();
    if let Some(vm) = host.registry().find(&offer.vm)
        && vm.is_alive()
    {
        reasons
            .push(reason("name-taken", format!("host {} has a VM named {} already", host.name(), offer.vm)));
    }
    match host.journal().load(&offer.vm) {
        Ok(Some(record))
            if record.generation >= Generation(offer.generation) && record.step.role() == Role::Target =>
        {
            reasons.push(reason(
                "stale",
                format!(
                    "try {} of VM {} is older than try {}, the last that host {} knows of. If that was another VM of this name \
                     that is gone for good, or a host's clock was years ahead when it was started, move {1}.record away \
                     from {3}'s state-dir/records while its agent does not run",
                    offer.generation,
                    offer.vm,
                    record.generation.0,
                    host.name()
                ),
            ));
        }
        Ok(_) => {}
        Err(why) => reasons.push(reason("host", why.to_string())),
    }
    let huge = match command_line(host, offer) {
        Ok(argv) => sterna_vmm::qemu::huge_pages(&argv),
        Err(refusals) => {
            reasons.extend(refusals);
            Vec::new()
        }
    };
    reasons.extend(image_reasons(host, offer));
    reasons.extend(template_reason(host, offer));
    let wants = if offer.clear_pages { PageStreams::Clear } else { PageStreams::Encrypted };
    if wants != host.config().tls.page_streams {
        let word = |streams| if streams == PageStreams::Clear { "clear" } else { "encrypted" };
        reasons.push(reason(
            "host",
            format!(
                "the source's configuration says that page streams are {}, that of host {} says {}: give both the same \
                 `page-streams` in [tls]",
                word(wants),
                host.name(),
                word(host.config().tls.page_streams)
            ),
        ));
    }
    (reasons, huge)
}

/// The command line for this host, or everything in it that this host does not allow.
fn command_line(host: &Host, offer: &Offer) -> Result<Vec<String>, Vec<Reason>> {
    // Whoever reads it sits at the source.
    let reason = |code, text: String| Reason {
        code: crate::offer::word(&code),
        text: format!("on {}: {text}", host.name()),
    };
    let line = CommandLine::parse(offer.argv.clone())
        .map_err(|why| vec![reason(Code::CommandLine, explain(&why))])?;
    let cpu = Some(offer.cpu.as_str()).filter(|cpu| !cpu.is_empty());
    line.for_target(&host.run_dir(&offer.vm), &offer.machine, cpu, &host.config().map, &host.policy())
        .map_err(|refusals| {
            refusals.iter().map(|refusal| reason(refusal.code, refusal.to_string())).collect()
        })
}

/// A clone needs its template here, with a block as the VM has it.
fn template_reason(host: &Host, offer: &Offer) -> Option<Reason> {
    if offer.template.is_empty() {
        return None;
    }
    let text = match host.templates().manifest(&offer.template) {
        None => format!("host {} does not have its template, {}", host.name(), offer.template),
        Some(manifest) => {
            let main = manifest.main_block();
            let same = |block: &Block| block.name == main.name && block.bytes == main.bytes;
            if offer.blocks.iter().any(same) {
                return None;
            }
            format!("its memory is not as that of its template {} on host {}", offer.template, host.name())
        }
    };
    Some(Reason { code: "template".into(), text })
}

/// Every reason why the images that would be opened here are not the source's.
fn image_reasons(host: &Host, offer: &Offer) -> Vec<Reason> {
    // A line that cannot be read was refused already.
    let Ok(line) = CommandLine::parse(offer.argv.clone()) else { return Vec::new() };
    let proof = |image: &Image| {
        let Image { path, mark, held, digest } = image.clone();
        ImageProof { path, mark, held, digest }
    };
    let proofs: Vec<ImageProof> = offer.images.iter().map(proof).collect();
    let found = sterna_vmm::qemu::image_reasons(&line, &host.config().map, &host.policy(), &proofs);
    let reason = |reason: sterna_vmm::Reason| Reason {
        code: crate::offer::word(&reason.code),
        text: format!("on {}: {}", host.name(), reason.text),
    };
    found.into_iter().map(reason).collect()
}

impl<'a> Arriving<'a> {
    fn new(
        (id, peer): (MigrationId, &str),
        host: Arc<Host>,
        incoming: &'a Incoming,
        tell: mpsc::Sender<Event>,
    ) -> Self {
        Self {
            id,
            peer: peer.to_owned(),
            host,
            incoming,
            tell,
            control: None,
            claim: None,
            vm: None,
            qemu: None,
            offer: Offer::default(),
            sinks: None,
            receivers: BTreeMap::new(),
            ended: BTreeMap::new(),
            state: Vec::new(),
            heap_due: None,
            awake: Awake::default(),
            template: None,
            mapped: 0,
            paused: false,
            huge: Vec::new(),
            head_room: 0,
            lazy: Lazy::default(),
            began: Instant::now(),
        }
    }

    /// Runs it to its end.
    fn finish(mut self, machine: &mut Target, events: &mpsc::Receiver<Event>, peer: &str) {
        let result = self.drive(machine, events);
        // The name stays taken until the last record of this try is stored: a later try's must not be overwritten by it.
        self.claim = None;
        self.incoming.leave(self.id);
        match &result {
            Ok(()) => tracing::info!(vm = self.offer.vm, peer, "the VM has come from {peer} and runs here"),
            Err(why) => tracing::warn!(vm = self.offer.vm, peer, why, "a VM from {peer} did not come"),
        }
        if let Some(mut control) = self.control.take() {
            let vm = self.vm.as_ref().filter(|_| result.is_ok() && self.offer.account);
            let used = vm.and_then(|vm| crate::room::view_of(&self.host.process_of(vm).ok()?));
            if let Some(used) = used {
                // A source that is gone does not want to know.
                drop(control.send(&Message::Memory(used.into())));
            }
            control.finish();
        }
        self.collapse();
        self.touch_common();
    }
}

impl Arriving<'_> {
    fn attach_control(&mut self, connection: Connection) {
        let (tell, of) = (self.tell.clone(), self.lazy.connections);
        self.control = Some(Control::start(connection, move |arrival| {
            drop(tell.send(match arrival {
                Arrival::Message(message) => Event::Input(TargetInput::Message(message)),
                Arrival::State(piece) => Event::State(piece),
                Arrival::Lost(why) => Event::Lost(of, format!("the connection to the source is lost: {why}")),
            }));
        }));
    }

    fn drive(&mut self, machine: &mut Target, events: &mpsc::Receiver<Event>) -> Result<(), String> {
        loop {
            while let Some(action) = machine.poll() {
                if let TargetAction::Over(result) = action {
                    self.drop_streams();
                    match result {
                        Ok(()) => self.settle(),
                        // Whoever ran it is dead.
                        Err(_) if machine.owns() => self.bury(),
                        Err(_) => {}
                    }
                    return result;
                }
                if let Some(input) = self.perform(action) {
                    machine.handle(input, self.began.elapsed());
                }
            }
            self.look_at_pause();
            let wait =
                machine.deadline().map_or(REFRESH, |at| at.saturating_sub(self.began.elapsed())).min(REFRESH);
            let wait = wait.min(self.awake.left().unwrap_or(REFRESH));
            let input = match events.recv_timeout(wait) {
                Ok(event) => self.take(event),
                Err(_) => Some(TargetInput::Tick),
            };
            if let Some(input) = input {
                machine.handle(input, self.began.elapsed());
            }
        }
    }

    fn take(&mut self, event: Event) -> Option<TargetInput> {
        match event {
            Event::Input(input) => Some(input),
            Event::State(_) if self.sinks.is_none() => {
                Some(TargetInput::Disconnected("the source sent device state out of turn".into()))
            }
            Event::State(piece) => {
                if self.state.len() as u64 + piece.len() as u64 > STATE_BYTES_MAX {
                    return Some(TargetInput::Disconnected("the source sent too much device state".into()));
                }
                self.heap_due = None;
                self.awake.hold();
                self.state.extend_from_slice(&piece);
                Some(TargetInput::Received)
            }
            Event::Rounds(index, stream) => self.add_stream(index, stream),
            Event::Demand(connection) => self.add_demand(connection),
            Event::Push(index, connection) => self.add_push(index, connection),
            Event::Reattach(connection) => self.reattach(connection),
            Event::Fetched(fetched) => self.fetched(fetched),
            Event::Template(how) => self.template_known(how),
            Event::Lost(of, why) => self.lost_control(of, why),
            Event::Received(Received::Pages) => {
                self.touch_heap_again();
                Some(TargetInput::Received)
            }
            Event::Received(Received::RoundEnd { stream, round }) => {
                self.heap_due = None;
                self.awake.hold_ahead();
                Some(match self.drop_stale() {
                    Ok(()) => TargetInput::RoundEnd { stream, round },
                    Err(why) => TargetInput::Failed(self.explain_failure(why)),
                })
            }
            // Once the last round is in, the streams have done their work.
            Event::Received(Received::Lost(_)) if self.receivers.is_empty() => None,
            Event::Received(Received::Lost(why)) => Some(TargetInput::Disconnected(why)),
            Event::Received(Received::Failed(why)) => Some(TargetInput::Failed(self.explain_failure(why))),
        }
    }

    /// A QEMU that is dead explains every other failure.
    fn explain_failure(&self, why: String) -> String {
        let ended = self.vm.as_ref().is_some_and(|vm| vm.held().is_some_and(|held| held.wait_exit(DYING)));
        match ended {
            true => format!(
                "its QEMU at {} was killed or ended by itself ({why}): if that host's memory ran out, its kernel log says so",
                self.host.name()
            ),
            false => why,
        }
    }

    fn add_stream(&mut self, index: u32, stream: Ahead) -> Option<TargetInput> {
        let Some(sinks) = &self.sinks else {
            return Some(TargetInput::Disconnected("the source opened a page stream too early".into()));
        };
        // Streams are opened at once and may arrive in any order.
        if index >= self.offer.streams || self.receivers.contains_key(&index) {
            let why = format!("the source opened page stream {index}, which it may not");
            return Some(TargetInput::Disconnected(why));
        }
        let tell = self.tell.clone();
        let receiver = Receiver::start((index, 1), stream, sinks.clone(), 0, move |received| {
            drop(tell.send(Event::Received(received)));
        });
        match receiver {
            Ok(receiver) => self.receivers.insert(index, receiver),
            Err(why) => return Some(TargetInput::Failed(format!("no thread can be started: {why}"))),
        };
        Some(TargetInput::Received)
    }

    /// The one dispatcher: every phase begins and ends here, and is told with its time.
    fn perform(&mut self, action: TargetAction) -> Option<TargetInput> {
        let (phase, began) = (phase(&action), Instant::now());
        #[cfg(feature = "holds")]
        crate::hold::before(&self.host.config().run_dir, &crate::hold::of_target(&action));
        let input = self.act(action);
        tracing::debug!(vm = self.offer.vm, phase, at = ?self.began.elapsed(), took = ?began.elapsed(), "target");
        input
    }

    fn act(&mut self, action: TargetAction) -> Option<TargetInput> {
        match action {
            TargetAction::Send(message) => self.send(&message),
            TargetAction::Check(offer) => Some(self.check(offer)),
            TargetAction::Record(record) => Some(self.record(&record)),
            TargetAction::Prepare(_) => Some(self.prepare()),
            TargetAction::Map(common) => Some(self.map(&common)),
            TargetAction::Load(end) => Some(match self.load(&end) {
                Ok(verified) => TargetInput::Loaded(verified),
                Err(why) => TargetInput::Failed(why),
            }),
            TargetAction::Run => Some(self.resume()),
            TargetAction::Adopt => {
                if let Some(vm) = &self.vm {
                    vm.arrive(self.qemu.take());
                }
                if self.lazy.fetch.is_some() {
                    self.run_lazily();
                }
                None
            }
            TargetAction::Announce => {
                self.announce();
                self.drop_streams();
                None
            }
            TargetAction::Strand(why) => {
                self.strand(&why);
                None
            }
            TargetAction::Kill => Some(self.kill()),
            TargetAction::Over(_) => None,
        }
    }

    fn send(&mut self, message: &Message) -> Option<TargetInput> {
        let sent = self.control.as_mut()?.send(message);
        sent.err()
            .map(|why| TargetInput::Disconnected(format!("the connection to the source is lost: {why}")))
    }

    fn record(&mut self, record: &Record) -> TargetInput {
        let began = Instant::now();
        match self.host.journal().store(record) {
            Ok(()) => TargetInput::Recorded(began.elapsed()),
            Err(why) => TargetInput::RecordFailed(why.to_string()),
        }
    }

    fn prepare(&mut self) -> TargetInput {
        let reason = |code: &str, text: String| vec![Reason { code: code.into(), text }];
        match self.start_qemu() {
            Err(reasons) => return TargetInput::Refused(reasons),
            Ok(qemu) => self.qemu = Some(qemu),
        }
        let process = self.qemu.as_ref().and_then(|qemu| process_of(qemu).ok());
        self.incoming.starts(self.id, process);
        match self.fit() {
            Ok(reasons) if reasons.is_empty() => {
                let lazily = self.prepare_lazily();
                let room = if self.offer.common { self.room() } else { 0 };
                if room == 0
                    && let Some(reasons) = self.admit_whole()
                {
                    return TargetInput::Refused(reasons);
                }
                TargetInput::Prepared { lazily, room, head_room: self.head_room }
            }
            Ok(reasons) => TargetInput::Refused(reasons),
            Err(why) => TargetInput::Refused(reason("target-qemu", why)),
        }
    }

    fn start_qemu(&mut self) -> Result<Qemu, Vec<Reason>> {
        let failed = |text: String| vec![Reason { code: "target-qemu".into(), text }];
        let argv = command_line(&self.host, &self.offer)?;
        let (argv, memory) = self.on_template(argv).map_err(failed)?;
        let launched = self.host.launch(&self.offer.vm, argv, memory).map_err(|why| failed(explain(&why)))?;
        let qemu = launched.qemu;
        let vm = Vm::new(
            VmRecord {
                name: self.offer.vm.clone(),
                argv: self.offer.argv.clone(),
                process: qemu.process_id(),
                run_dir: self.host.run_dir(&self.offer.vm),
                log: self.host.log(&self.offer.vm),
                ram_bytes: ram_of(&self.offer.argv),
                generation: self.offer.generation,
                since: jiff::Timestamp::now(),
                incoming: true,
                leaving: None,
                parts: None,
                balloon: Some(self.offer.balloon).filter(|bytes| *bytes > 0),
                fetch: None,
                template: self.template.as_ref().map(|template| template.used()),
            },
            None,
        );
        self.vm = Some(vm.clone());
        let listed = self.host.registry().insert(&vm);
        listed.map_err(|why| failed(format!("the VM cannot be written down: {why}")))?;
        Ok(qemu)
    }

    /// Compares what was started with what was offered, and gets every block ready to be written.
    fn fit(&mut self) -> Result<Vec<Reason>, String> {
        let Some(qemu) = &mut self.qemu else { return Err("no QEMU was started".into()) };
        if let Some(older) = older_qemu(&self.offer.qemu, qemu.version()) {
            let text = format!("on {}: {}", self.host.name(), older.text);
            return Ok(vec![Reason { code: crate::offer::word(&older.code), text }]);
        }
        let looked =
            qemu.at_once(|qemu| Ok::<_, VmmError>((qemu.fingerprint()?, qemu.parts()?, qemu.layout()?)));
        let (mut fingerprint, parts, layout) = looked.map_err(|why| explain(&why))?;
        let mut offered = fingerprint_of(&self.offer.fingerprint);
        if is_upgrade(&self.offer.qemu, qemu.version()) {
            // Each version brings firmware of its own, which it reads for itself when the guest boots anew.
            offered.needs_firmware = false;
            fingerprint.needs_firmware = false;
        }
        let differences = difference(&offered, &fingerprint);
        if !differences.is_empty() {
            let reason = |text| Reason { code: "fingerprint".into(), text };
            return Ok(differences.into_iter().map(reason).collect());
        }
        if let Some(vm) = &self.vm {
            let written = self.host.registry().update(vm, |record| record.parts = Some(parts));
            written.map_err(|why| format!("the VM cannot be written down: {why}"))?;
        }
        let reasons = template::reasons(self.template.as_deref(), qemu)?;
        if !reasons.is_empty() {
            return Ok(reasons);
        }
        qemu.prepare_load().map_err(|why| explain(&why))?;
        let process = process_of(qemu)?;
        self.touch_heap();
        self.heap_due = Some(Instant::now() + load::HEAP_TRIMMED);
        let main = self.template.as_ref().map(|template| template.manifest.main_block());
        let shared = |main: &StoredBlock| self.offer.blocks.iter().position(|block| block.name == main.name);
        let shared = main.and_then(shared);
        self.sinks = Some(Arc::new(sinks(&self.host, &process, &self.offer, &layout, shared)?));
        self.incoming.is_ready(self.id);
        Ok(Vec::new())
    }

    fn drop_streams(&mut self) {
        // All of them before the first is waited for.
        self.ended.append(&mut self.receivers);
        self.ended.values().for_each(Receiver::cut);
        self.ended.clear();
    }

    /// On a thread of its own: a QEMU whose guest waits for a page may answer only when that has come, on connections that are taken here.
    fn announce(&self) {
        let Some(vm) = self.vm.clone() else { return };
        let host = self.host.clone();
        let announcing = std::thread::Builder::new().name("announce".into()).spawn(move || {
            if let Err(why) = host.with_qemu(&vm, |qemu| qemu.announce()) {
                tracing::warn!(vm = vm.name(), why, "the VM was not announced to the network");
            }
        });
        if let Err(why) = announcing {
            tracing::warn!(vm = self.offer.vm, %why, "the VM was not announced to the network: no thread can be started");
        }
    }

    /// Writes down what the lists say already, and gives the guest what was taken from it for the move.
    fn settle(&mut self) {
        self.end_fetch();
        let Some(vm) = &self.vm else { return };
        self.host.registry().arrived(vm);
        crate::balloon::give_back(&self.host, vm);
    }

    /// Its QEMU has ended before all of its pages had come.
    fn bury(&mut self) {
        self.lazy.fetch = None;
        if let Some(vm) = &self.vm {
            vm.set_fetching(None);
            vm.notify(Some("it ran here, and ended before all of its pages had come: see its log".into()));
            self.host.registry().arrived(vm);
        }
    }

    /// Ends the QEMU that waits, and says so only when it is dead.
    fn kill(&mut self) -> TargetInput {
        self.awake.let_go();
        self.drop_streams();
        self.lazy = Lazy::default();
        self.sinks = None;
        self.qemu = None;
        if let Some(vm) = self.vm.take() {
            // The handle of its start if there is one: a pid that cannot be opened for want of descriptors is not dead.
            let opened = self.host.process_of(&vm).ok();
            if let Some(process) = vm.held().or(opened.as_ref()) {
                while !process.wait_exit(Duration::ZERO) {
                    if let Err(why) = process.kill() {
                        tracing::error!(
                            vm = vm.name(),
                            why = explain(&why),
                            "the waiting QEMU cannot be killed"
                        );
                    }
                    process.wait_exit(DEATH_WITHIN);
                }
            }
            self.host.registry().remove(&vm);
        }
        TargetInput::Dead
    }
}

pub(crate) fn phase(action: &TargetAction) -> &'static str {
    match action {
        TargetAction::Send(_) => "message",
        TargetAction::Check(_) => "pre-check",
        TargetAction::Record(_) => "record",
        TargetAction::Prepare(_) => "prepare",
        TargetAction::Map(_) => "map",
        TargetAction::Load(_) => "load",
        TargetAction::Run => "resume",
        TargetAction::Adopt => "adopt",
        TargetAction::Announce => "announce",
        TargetAction::Strand(_) => "strand",
        TargetAction::Kill => "kill",
        TargetAction::Over(_) => "over",
    }
}

fn process_of(qemu: &Qemu) -> Result<Process, String> {
    let id = qemu.process_id();
    Process::open_as(id.pid, id.start_time).map_err(|why| explain(&why))
}
