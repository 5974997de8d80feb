//! One outgoing migration: a thread that performs what the engine's source machine wants done.
//!
//! The machine decides, this file acts: each [`SourceAction`] is one method here, and each outcome goes back as an input.
//! Messages, failures of senders and the user's requests arrive through one channel.

use crate::awake::Awake;
use crate::balloon;
use crate::config::PageStreams;
use crate::control::{self, Arrival, CONNECT_WITHIN, Control, explain};
use crate::host::Host;
use crate::model::{MemoryView, MigrateRequest, MigrationView, SetRequest};
use crate::pages::{Collector, SendCounters, SendOptions, Senders, SourceBlock, Writers};
use crate::progress::View;
use crate::recovery::undo_stop;
use crate::registry::Vm;
use crate::sharing::{Seat, Word};
use crate::templates::Told;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use sterna_engine::handoff::{Activity, Choice, MigrationId, Record};
use sterna_engine::policy::RateLimits;
use sterna_engine::source::{Outcome, SourceAction, SourceInput};
use sterna_engine::units::{Bytes, Pages};
use sterna_engine::wire::Message;
use sterna_engine::wire::message::{Purpose, Stream};
use sterna_engine::{Source, Step};
use sterna_memory::Process;
use sterna_transport::{Connection, Counters, Pacer};
use sterna_vmm::qemu::MarkedImages;
use sterna_vmm::{Shape, Vmm};
use tokio::sync::watch;

mod account;
mod pace;
mod phase;
mod postcopy;
mod prepare;
mod share;
mod steps;
mod template;
mod unresolved;

use pace::Slowed;
use postcopy::Lazily;
use share::Sharing;

pub(crate) use phase::phase;
pub(crate) use unresolved::resolve;

/// How often figures are refreshed while nothing else happens.
const REFRESH: Duration = Duration::from_millis(100);
/// How long the source's QEMU may take to end after its VM has gone.
const QUIT_WITHIN: Duration = Duration::from_secs(5);
/// How long a QEMU that does not answer may take to be seen dead: its memory is freed before.
const DYING: Duration = Duration::from_secs(2);

/// How long a target that closes a page stream may take to say why, on the control connection; the VM runs meanwhile.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// The same while the VM is stopped.
const LAST_WORDS_STOPPED: Duration = Duration::from_millis(300);

/// What can be said to a migration while it runs.
#[derive(Clone, Debug)]
pub(crate) enum Order {
    Cancel,
    Set(SetRequest),
    /// Let the VM run at the target as soon as that can be.
    Postcopy,
    Recover(Choice, mpsc::Sender<Result<(), String>>),
}

/// What arrives at the thread.
enum Event {
    Input(SourceInput),
    Order(Order),
    /// A sender of pages failed.
    Broken(String),
    /// What the VM has in common with others.
    Shared(Result<Word, String>),
    /// What becomes of the template that is sent.
    Template(Told),
    /// A connection is lost; which generation of connections it was of.
    Lost(u64, String),
    /// The same of one that carries pages of a post-copy: the target closes those first when all have come, and says so then.
    Faded(u64, String),
}

/// A migration from the outside: its figures, and a way to speak to it.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(crate) view: watch::Receiver<MigrationView>,
    orders: mpsc::Sender<Event>,
}

impl Handle {
    pub(crate) fn order(&self, order: Order) {
        // A migration that is over needs no orders.
        drop(self.orders.send(Event::Order(order)));
    }
}

/// The thread's own.
struct Outgoing {
    host: Arc<Host>,
    vm: Arc<Vm>,
    peer: String,
    address: String,
    id: MigrationId,
    began: Instant,
    pacer: Arc<Pacer>,
    rate: RateLimits,
    options: SendOptions,
    slowed: Slowed,
    /// What the guest has and is to have again; 0 where nothing is taken from it.
    balloon: u64,
    tell: mpsc::Sender<Event>,
    view: View,
    control: Option<Control>,
    streams: Vec<Connection>,
    wire: Vec<Counters>,
    senders: Option<Senders>,
    lazy: Lazily,
    sharing: Sharing,
    /// Its template, while that is still on its way.
    template: Option<template::Trailing>,
    collector: Option<Collector>,
    writers: Writers,
    activity: Activity,
    /// Whether it was this life of the agent that stopped the VM: then QEMU's side knows how to undo it.
    stop_tried: bool,
    awake: Awake,
    process: Process,
    blocks: Arc<Vec<SourceBlock>>,
    shape: Option<Shape>,
    /// Kept locked until the migration is over, so that the target sees them.
    images: MarkedImages,
    counters: Arc<SendCounters>,
    state: Vec<u8>,
    verify: bool,
    round: u32,
    /// Why a sender failed, and until when the target may say it better.
    broken: Option<(String, Instant)>,
    updated: Instant,
    /// When the last scan was, until it was looked how much has been written since.
    scanned: Option<Instant>,
    lap: Instant,
    /// Why the target's last answer did not come.
    no_answer: String,
    /// A QEMU waits at the target.
    accepted: bool,
    /// The target has heard that this try is over.
    told_loss: bool,
    /// It was looked what memory the VM takes here.
    accounted: bool,
    /// The target will say what memory the VM takes there.
    accounts: bool,
    /// The operator who waits for what becomes of a decision.
    operator: Option<mpsc::Sender<Result<(), String>>>,
}

/// Begins a migration of `vm` to `peer` and returns at once.
pub(crate) fn start(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    request: &MigrateRequest,
    (id, seat): (MigrationId, Seat),
    done: impl FnOnce() + Send + 'static,
) -> Handle {
    let (tell, events) = mpsc::channel();
    let (view, watch) = View::new(host.name(), vm, request, id);
    let handle = Handle { view: watch, orders: tell.clone() };
    let (host, vm, request) = (host.clone(), vm.clone(), request.clone());
    std::thread::spawn(move || {
        let mut view = view;
        // The VM is free before anybody is told that it is over: who was told may begin the next migration at once.
        match Outgoing::prepare(&host, &vm, &request, (id, seat), (tell, &events), &mut view) {
            Err(outcome) => {
                done();
                view.finish(&outcome);
            }
            Ok((mut outgoing, machine)) => {
                std::mem::swap(&mut outgoing.view, &mut view);
                let outcome = outgoing.drive(machine, &events);
                done();
                outgoing.view.finish(&outcome);
            }
        }
    });
    handle
}

impl Outgoing {
    #[expect(clippy::too_many_arguments, reason = "called twice, by name of what each is")]
    fn new(
        host: Arc<Host>,
        vm: Arc<Vm>,
        peer: String,
        address: String,
        id: MigrationId,
        rate: RateLimits,
        tell: mpsc::Sender<Event>,
        view: View,
        process: Process,
    ) -> Self {
        let lazy = Lazily::with_streams(host.default_streams());
        Self {
            host,
            vm,
            peer,
            address,
            id,
            began: Instant::now(),
            pacer: Arc::new(Pacer::new(rate.max.map(|rate| rate.0))),
            rate,
            options: SendOptions::default(),
            slowed: Slowed::default(),
            balloon: 0,
            tell,
            view,
            control: None,
            streams: Vec::new(),
            wire: Vec::new(),
            senders: None,
            lazy,
            sharing: Sharing::default(),
            template: None,
            collector: None,
            writers: Writers::Processors,
            activity: Activity::Running,
            stop_tried: false,
            awake: Awake::default(),
            process,
            blocks: Arc::default(),
            shape: None,
            images: MarkedImages::default(),
            counters: Arc::default(),
            state: Vec::new(),
            verify: false,
            round: 0,
            broken: None,
            updated: Instant::now(),
            scanned: None,
            lap: Instant::now(),
            no_answer: String::new(),
            accepted: false,
            told_loss: false,
            accounted: false,
            accounts: false,
            operator: None,
        }
    }

    fn attach_control(&mut self, connection: Connection) {
        let (tell, of) = (self.tell.clone(), self.lazy.connections);
        let control = Control::start(connection, move |arrival| {
            let input = match arrival {
                Arrival::Message(message) => SourceInput::Message(message),
                Arrival::State(_) => SourceInput::Disconnected("the target sent device state".into()),
                Arrival::Lost(why) => {
                    let why = format!("the connection to the target is lost: {why}");
                    return drop(tell.send(Event::Lost(of, why)));
                }
            };
            drop(tell.send(Event::Input(input)));
        });
        self.wire.push(control.counters());
        self.control = Some(control);
    }

    /// Runs the machine to its end.
    fn drive(&mut self, mut machine: Source, events: &mpsc::Receiver<Event>) -> Outcome {
        loop {
            while let Some(action) = machine.poll() {
                if let SourceAction::Over(outcome) = action {
                    self.show(&machine);
                    self.wait_for_account(&outcome, events);
                    self.over(&outcome);
                    return outcome;
                }
                if action == SourceAction::Stop {
                    self.lazy.switched = machine.is_postcopy();
                }
                let asked = action == SourceAction::Ask;
                if let Some(input) = self.perform(action) {
                    if asked {
                        // What the target said meanwhile counts before the lack of an answer does.
                        self.catch_up(&mut machine, events);
                    }
                    self.feed(&mut machine, input);
                }
            }
            self.look_at_pages(&mut machine);
            if let Some((of, why)) = self.lazy.faded() {
                self.lost(&mut machine, of, why);
            }
            self.update(&mut machine);
            let now = self.now();
            let wait = machine.deadline().map_or(REFRESH, |at| at.saturating_sub(now)).min(REFRESH);
            if let Some((why, _)) = self.broken.take_if(|(_, until)| Instant::now() >= *until) {
                self.feed(&mut machine, SourceInput::Failed(why));
                continue;
            }
            let wait = wait.min(self.lazy.fades_in()).min(self.awake.left().unwrap_or(REFRESH));
            match events.recv_timeout(wait) {
                Ok(event) => self.take(&mut machine, event),
                Err(_) => self.feed(&mut machine, SourceInput::Tick),
            }
        }
    }

    /// A target that gives up closes its page streams first, and says why a moment later.
    fn wait_for_last_words(&mut self, why: String) {
        let wait = if self.view.is_stopped() { LAST_WORDS_STOPPED } else { LAST_WORDS };
        self.broken.get_or_insert((why, Instant::now() + wait));
    }

    fn catch_up(&mut self, machine: &mut Source, events: &mpsc::Receiver<Event>) {
        while let Ok(event) = events.try_recv() {
            self.take(machine, event);
        }
    }

    fn take(&mut self, machine: &mut Source, event: Event) {
        match event {
            Event::Input(input) => self.feed(machine, input),
            Event::Order(order) => self.obey(machine, order),
            Event::Broken(why) => self.wait_for_last_words(why),
            Event::Shared(found) => self.shared(machine, found),
            Event::Template(told) => self.on_template(machine, told),
            Event::Lost(of, why) => self.lost(machine, of, why),
            Event::Faded(of, why) => self.lazy.fade(of, why),
        }
    }

    /// The QEMU that has the missing pages, if it has ended.
    fn look_at_pages(&mut self, machine: &mut Source) {
        if machine.is_postcopy() && !self.vm.is_alive() {
            let why = format!("its QEMU at {} has ended, which had them", self.host.name());
            self.feed(machine, SourceInput::PagesLost(why));
        }
    }

    /// What is heard of connections that have been made anew means nothing.
    fn lost(&mut self, machine: &mut Source, of: u64, why: String) {
        if of == self.lazy.connections {
            self.feed(machine, SourceInput::Disconnected(why));
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn feed(&mut self, machine: &mut Source, mut input: SourceInput) {
        self.note(&input);
        if matches!(input, SourceInput::Message(Message::Memory(_))) {
            return;
        }
        if let SourceInput::Message(Message::Mapped(mapped)) = &input {
            let Some(known) = self.mapped(mapped.runs) else { return };
            input = known;
        }
        if let Some(why) = self.unproved(&input) {
            input = SourceInput::Failed(why);
        }
        machine.handle(SourceInput::Sent(Bytes(self.counters.bytes.load(Ordering::Relaxed))), self.now());
        if let (SourceInput::Scanned(_), Some(collector)) = (&input, &self.collector) {
            machine.handle(SourceInput::Activity(self.activity), self.now());
            machine.handle(SourceInput::Unsettled(Pages(collector.unsettled_count())), self.now());
            machine.handle(self.counted(), self.now());
        }
        let ready = matches!(input, SourceInput::Message(Message::Accepted(_)));
        machine.handle(input, self.now());
        if ready {
            self.go_on_sharing(machine);
        }
    }

    /// A target that was asked to prove RAM equal, says that it has the VM, and has not proved it.
    fn unproved(&self, input: &SourceInput) -> Option<String> {
        let SourceInput::Message(Message::Loaded(loaded)) = input else { return None };
        if self.lazy.switched {
            // What is not there yet is proved once it is.
            return None;
        }
        let asked = self.blocks.iter().filter(|block| self.verify && block.provable).count();
        let proved = loaded.blocks_verified as usize;
        (proved < asked)
            .then(|| format!("the target proved {proved} blocks of RAM equal, {asked} were to be proved"))
    }

    fn obey(&mut self, machine: &mut Source, order: Order) {
        match order {
            Order::Postcopy => {
                self.lazy.asked = true;
                machine.handle(SourceInput::Switch, self.now());
            }
            Order::Cancel => machine.handle(SourceInput::Cancel, self.now()),
            Order::Set(request) => self.change(machine, &request),
            Order::Recover(_, operator) if self.operator.is_some() => {
                drop(operator.send(Err("somebody else is deciding about the VM at this moment".into())));
            }
            Order::Recover(choice, operator) => {
                self.operator = Some(operator);
                machine.handle(SourceInput::Recover(choice), self.now());
            }
        }
    }

    /// Notes how the downtime is spent, from what the target tells.
    fn note(&mut self, input: &SourceInput) {
        let SourceInput::Message(message) = input else { return };
        match message {
            Message::Accepted(accepted) => {
                self.accepted = true;
                self.senders.iter().for_each(Senders::are_taken);
                self.lazy.eager.clone_from(&accepted.eager);
                self.sharing.accepted(accepted);
                self.has_room(accepted.head_room);
            }
            Message::Filled(filled) => {
                self.accounts = true;
                self.filled(filled);
            }
            Message::Barrier(_) if self.view.is_stopped() => self.view.barrier(self.lap.elapsed()),
            Message::Loaded(loaded) => {
                self.view.loaded(self.lap.elapsed(), Duration::from_micros(loaded.load_us));
                self.view.verified(loaded.blocks_verified, self.verify);
                self.lap = Instant::now();
            }
            Message::Memory(memory) => {
                let memory = MemoryView::from(*memory);
                self.view.memory(|report| report.target = Some(memory));
            }
            Message::Committed(committed) => {
                self.awake.let_go();
                self.accounts = !self.lazy.switched;
                let record = Duration::from_micros(committed.record_us);
                let resume = Duration::from_micros(committed.resume_us);
                self.view.committed(self.lap.elapsed(), record, resume);
            }
            _ => {}
        }
    }

    /// The one dispatcher: every phase begins and ends here, and is told with its time.
    fn perform(&mut self, action: SourceAction) -> Option<SourceInput> {
        let (phase, began) = (phase(&action), Instant::now());
        #[cfg(feature = "holds")]
        crate::hold::before(&self.host.config().run_dir, &crate::hold::of_source(&action));
        let input = self.act(action);
        tracing::debug!(id = %self.id, phase, at = ?self.now(), took = ?began.elapsed(), "source");
        input
    }

    fn act(&mut self, action: SourceAction) -> Option<SourceInput> {
        match action {
            SourceAction::Record(record) => Some(self.record(&record)),
            SourceAction::Send(message) => self.message(&message),
            SourceAction::OpenStreams(count) => match self.open(count, Purpose::Rounds) {
                Ok(streams) => {
                    self.streams = streams;
                    Some(SourceInput::Opened)
                }
                Err(why) => {
                    // A target that refuses has said so already, or is about to.
                    self.wait_for_last_words(why);
                    None
                }
            },
            SourceAction::OpenDemand => self.open_demand().err().map(SourceInput::Failed),
            SourceAction::Pace(rate) => {
                self.pacer.set_rate(rate.map(|rate| rate.0));
                None
            }
            SourceAction::Stun(keep) => self.stun(keep),
            SourceAction::Track => Some(settle(self.track(), SourceInput::Tracked)),
            SourceAction::Share => self.share().err().map(SourceInput::Failed),
            SourceAction::SendRound(round) => self.send_round(round),
            SourceAction::Scan => Some(settle(self.scan(), SourceInput::Scanned)),
            SourceAction::Settle => Some(settle(self.settle(), SourceInput::Settled)),
            SourceAction::TellStale(round) => self.tell_stale(round).err().map(SourceInput::Failed),
            SourceAction::Stop => Some(settle(self.stop(), SourceInput::Stopped)),
            SourceAction::Finish(round) => Some(settle(self.finish(round), SourceInput::Finished)),
            SourceAction::FinishPostcopy(round) => {
                Some(settle(self.finish_postcopy(round), SourceInput::Finished))
            }
            SourceAction::Abandon => {
                self.senders.iter().for_each(Senders::abandon);
                None
            }
            SourceAction::Push => self.push().err().map(SourceInput::Failed),
            SourceAction::Reattach => Some(match self.reattach() {
                Ok(()) => SourceInput::Reattached,
                Err(why) => SourceInput::Disconnected(why),
            }),
            SourceAction::Resume => Some(match self.resume() {
                Ok(()) => SourceInput::Resumed,
                Err(why) => SourceInput::ResumeFailed(why),
            }),
            SourceAction::Release => {
                self.release();
                None
            }
            SourceAction::Ask => Some(self.ask()),
            SourceAction::End => Some(settle(self.end(), |()| SourceInput::Ended)),
            SourceAction::Reply(result) => {
                // An operator who went away learns it from the VM's state.
                self.operator.take().into_iter().for_each(|operator| drop(operator.send(result.clone())));
                None
            }
            SourceAction::Over(_) => None,
        }
    }

    fn record(&mut self, record: &Record) -> SourceInput {
        match self.store(record) {
            Ok(()) => {
                self.vm.set_released(matches!(record.step, Step::Released | Step::Serving));
                self.vm.set_serving(record.step == Step::Serving);
                SourceInput::Recorded
            }
            Err(why) => SourceInput::RecordFailed(why),
        }
    }

    fn message(&mut self, message: &Message) -> Option<SourceInput> {
        let control = self.control.as_mut()?;
        let lost = |why| SourceInput::Disconnected(format!("the connection to the target is lost: {why}"));
        let sent = control.send(message);
        self.told_loss |= sent.is_ok() && matches!(message, Message::Abort(_));
        sent.err().map(lost)
    }

    fn open_demand(&mut self) -> Result<(), String> {
        self.lazy.demand = self.open(1, Purpose::Demand)?.pop();
        self.look_ahead();
        Ok(())
    }

    /// Opens streams of the target's, all of them before the first is waited for.
    fn open(&mut self, count: u32, purpose: Purpose) -> Result<Vec<Connection>, String> {
        let mut streams = Vec::new();
        for index in 0..count {
            let connection = self.host.endpoint().connect(&self.address, &self.peer, CONNECT_WITHIN);
            let mut connection = connection.map_err(|why| explain(&why))?;
            let stream = Stream { id: self.id.0.to_vec(), index, purpose: purpose.number() };
            control::send(&mut connection, &Message::Stream(stream))?;
            self.wire.push(connection.counters());
            streams.push(connection);
        }
        if self.host.config().tls.page_streams == PageStreams::Clear {
            for stream in &mut streams {
                stream.set_deadline(Some(Instant::now() + CONNECT_WITHIN));
                stream.send_in_clear().map_err(|why| explain(&why))?;
            }
        }
        Ok(streams)
    }

    fn resume(&mut self) -> Result<(), String> {
        self.awake.let_go();
        let (here, activity) = (self.stop_tried, self.activity);
        self.qemu(|qemu| if here { qemu.restore() } else { undo_stop(qemu, activity) })
    }

    /// Ends everything of this migration but the VM: threads first, so that nothing reads it any more.
    fn release(&mut self) {
        self.slowed.let_go();
        self.senders = None;
        self.sharing.leave();
        self.lazy.disconnect();
        self.streams.clear();
        if let Some(collector) = self.collector.take()
            && self.vm.is_alive()
            && let Err(why) = collector.stop()
        {
            tracing::warn!(vm = self.vm.name(), why, "tracking did not end cleanly");
        }
        // Its last word comes when all is over.
        if let Some(control) = self.control.take_if(|_| !self.accounts) {
            control.finish();
        }
    }

    fn end(&mut self) -> Result<(), String> {
        if let Some(mut qemu) = self.vm.qemu().take()
            && self.vm.is_alive()
        {
            qemu.quit(QUIT_WITHIN).map_err(|why| explain(&why))?;
        } else if self.vm.is_alive() {
            self.process.kill().map_err(|why| explain(&why))?;
            self.process.wait_exit(QUIT_WITHIN);
        }
        self.host.registry().remove(&self.vm);
        Ok(())
    }

    fn qemu<T>(
        &self,
        call: impl FnOnce(&mut sterna_vmm::qemu::Qemu) -> Result<T, sterna_vmm::VmmError>,
    ) -> Result<T, String> {
        self.host.with_qemu(&self.vm, call)
    }

    fn update(&mut self, machine: &mut Source) {
        self.keep_awaiting();
        self.keep_stunned();
        if let Some(rate) = self.sample_writes() {
            machine.handle(SourceInput::Writes(rate), self.now());
        }
        // Whoever watches is woken by each update: not in the middle of the stop, where it would take the VM's time.
        if self.view.is_stopped() && self.updated.elapsed() < REFRESH {
            return;
        }
        self.show(machine);
    }

    fn show(&mut self, machine: &Source) {
        self.updated = Instant::now();
        self.show_postcopy();
        self.tell_refusal(machine);
        let wire = self.wire.iter().map(Counters::bytes_sent).sum();
        self.view.set_run_state(self.activity.word());
        let pace = self.pacer.rate();
        self.view.update(machine, self.now(), &self.counters, wire, (self.rate, pace));
        if machine.needs_attention(self.now()) {
            self.tell_unresolved();
        }
    }

    /// Looks what became of the VM here. What was lent to QEMU for a save that never came is closed by the next resume; where
    /// it runs, that changes nothing for it.
    fn look_back(&self) -> Result<(), String> {
        let state = self.qemu(|qemu| {
            let state = qemu.status()?;
            if state.runs() { qemu.resume().map(|()| state) } else { Ok(state) }
        })?;
        self.view.set_run_state(&state.to_string());
        Ok(())
    }

    fn over(&mut self, outcome: &Outcome) {
        self.release();
        if let Outcome::PagesLost(why) = outcome {
            if !self.told_loss {
                self.tell_loss(why);
            }
            self.host.registry().remove(&self.vm);
        } else if !matches!(outcome, Outcome::Completed | Outcome::EndedThere(_)) {
            self.vm.set_released(false);
            self.vm.notify(None);
            balloon::give_back(&self.host, &self.vm);
            // A QEMU that is dying loses its connections first.
            if let Err(why) = self.look_back() {
                tracing::warn!(vm = self.vm.name(), why, "its QEMU does not answer");
                if self.process.wait_exit(DYING) {
                    self.view.died();
                }
            }
        }
    }
}

fn settle<T>(result: Result<T, String>, done: impl FnOnce(T) -> SourceInput) -> SourceInput {
    result.map_or_else(SourceInput::Failed, done)
}
