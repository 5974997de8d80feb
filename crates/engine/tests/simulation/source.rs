//! The source's driver: carries out the engine's actions on a simulated host.

mod pages;

use crate::agent::{pack, unpack};
use crate::clock::{MS, SECOND};
use crate::host::{BLOCK_PAGES, Life, PAGES};
use crate::network::{ConnectionId, Frame};
use crate::world::{Mutation, World};
use pages::Round;
use std::collections::BTreeSet;
use std::time::Duration;
use sterna_engine::handoff::{Activity, Generation, MigrationId, Ownership, Record, Step};
use sterna_engine::policy::RateLimits;
use sterna_engine::source::{Postcopy, Source, SourceAction, SourceInput, SourceParameters};
use sterna_engine::units::{PAGE_BYTES, Pages};
use sterna_engine::wire::Message;
use sterna_engine::wire::message::{Block, Offer, Query, Stream};

/// Page streams of a migration.
const STREAMS: u32 = 3;
/// How long an answer is waited for.
const ASK_WAIT: u64 = 3 * SECOND;

/// One migration at its source.
pub(crate) struct SourceTask {
    serial: u64,
    id: MigrationId,
    machine: Source,
    /// An action that the next one has to wait for is under way.
    busy: bool,
    control: Option<ConnectionId>,
    streams: Vec<ConnectionId>,
    asking: Option<ConnectionId>,
    asked: u32,
    timer: Option<Duration>,
    send_set: BTreeSet<usize>,
    sent: [bool; PAGES],
    sent_bytes: u64,
    device: u64,
    /// [`SourceAction::Release`] was carried out: page work stops.
    closed: bool,
}

impl SourceTask {
    fn new(serial: u64, id: MigrationId, machine: Source, control: Option<ConnectionId>) -> Self {
        Self {
            serial,
            id,
            machine,
            busy: false,
            control,
            streams: Vec::new(),
            asking: None,
            asked: 0,
            timer: None,
            send_set: BTreeSet::new(),
            sent: [false; PAGES],
            sent_bytes: 0,
            device: 0,
            closed: false,
        }
    }

    /// Whether a connection is this task's.
    pub(crate) fn uses(&self, id: ConnectionId) -> bool {
        self.control == Some(id) || self.asking == Some(id) || self.streams.contains(&id)
    }

    /// Whether an operator is told that the owner is unknown.
    pub(crate) fn needs_attention(&self, now: Duration) -> bool {
        self.machine.needs_attention(now)
    }
}

impl World {
    /// The user migrates the VM from this host to the other.
    pub(crate) fn start_migration(&mut self, host: usize) {
        let Some(control) = self.connect(host, 1 - host) else { return };
        let generation =
            self.hosts[host].disk.read().map_or(Generation(1), |record| record.generation.next());
        self.truth.tries += 1;
        self.serial += 1;
        let id = MigrationId(((u128::from(self.chance.any()) << 64) | u128::from(self.serial)).to_le_bytes());
        let block = |(n, pages): (usize, &usize)| Block {
            name: format!("block{n}"),
            bytes: *pages as u64 * PAGE_BYTES,
            travels: true,
        };
        let offer = Offer {
            vm: "vm".into(),
            generation: generation.0,
            blocks: BLOCK_PAGES.iter().enumerate().map(block).collect(),
            streams: STREAMS,
            ..Offer::default()
        };
        let parameters = SourceParameters {
            id,
            peer: format!("host{}", 1 - host),
            offer,
            downtime_limit: Duration::from_millis(300),
            timeout: Some(Duration::from_secs(30)),
            activity: Activity::Running,
            rate: RateLimits::default(),
            auto_converge: true,
            postcopy: Postcopy::OnDemand,
            awaits: false,
        };
        self.note(|| format!("host {host} migrates the VM, {generation:?}"));
        let machine = Source::new(parameters, self.queue.instant());
        self.hosts[host].source = Some(SourceTask::new(self.serial, id, machine, Some(control)));
        self.source_pump(host);
    }

    /// A restarted agent looks for the owner of a VM it had released.
    pub(crate) fn recover_by_asking(&mut self, host: usize, record: &Record) {
        self.serial += 1;
        let machine = Source::recover(record, self.queue.instant());
        self.hosts[host].source = Some(SourceTask::new(self.serial, record.id, machine, None));
        self.source_pump(host);
    }

    /// The user cancels.
    pub(crate) fn cancel_source(&mut self, host: usize) {
        if self.hosts[host].up && self.hosts[host].source.is_some() {
            self.source_input(host, SourceInput::Cancel);
        }
    }

    /// A frame for this task.
    pub(crate) fn source_frame(&mut self, host: usize, id: ConnectionId, frame: Frame) {
        let task = self.hosts[host].source.as_mut().expect("the caller looked");
        if task.asking == Some(id) {
            task.asking = None;
            let input = match frame {
                Frame::Message(bytes) => match unpack(&bytes) {
                    Ok(Message::Answer(answer)) => SourceInput::Answered(answer.into()),
                    _ => SourceInput::AskFailed("no answer".into()),
                },
                _ => SourceInput::AskFailed("closed".into()),
            };
            return self.source_input(host, input);
        }
        let input = match frame {
            Frame::Message(bytes) => match unpack(&bytes) {
                Ok(message) => SourceInput::Message(message),
                Err(error) => SourceInput::Disconnected(error.to_string()),
            },
            _ => SourceInput::Disconnected("the connection is lost".into()),
        };
        self.source_input(host, input);
    }

    fn source_input(&mut self, host: usize, input: SourceInput) {
        if self.hosts[host].source.is_none() || self.point(host) {
            return;
        }
        if !matches!(input, SourceInput::Sent(_) | SourceInput::Tick) {
            self.note(|| format!("source {host} <- {}", short(&input)));
        }
        let now = self.queue.instant();
        if let Some(task) = &mut self.hosts[host].source {
            task.machine.handle(input, now);
        }
        if !self.point(host) {
            self.source_pump(host);
        }
    }

    /// Carries out what the machine wants, one action after the other.
    fn source_pump(&mut self, host: usize) {
        loop {
            let Some(task) = self.hosts[host].source.as_mut().filter(|task| !task.busy) else { return };
            let Some(action) = task.machine.poll() else { break };
            if self.point(host) {
                return;
            }
            self.note(|| format!("source {host} -> {}", short(&action)));
            self.source_act(host, action);
            if self.hosts[host].source.is_none() || self.point(host) {
                return;
            }
        }
        let Some(task) = &mut self.hosts[host].source else { return };
        let (deadline, serial) = (task.machine.deadline(), task.serial);
        if deadline != task.timer {
            task.timer = deadline;
            let Some(deadline) = deadline else { return };
            let wait = deadline.saturating_sub(self.queue.instant()).as_micros() as u64;
            self.later(host, wait, move |world| {
                if world.hosts[host].source.as_ref().is_some_and(|task| task.serial == serial) {
                    world.hosts[host].source.as_mut().expect("just seen").timer = None;
                    world.source_input(host, SourceInput::Tick);
                }
            });
        }
    }

    fn source_act(&mut self, host: usize, action: SourceAction) {
        match action {
            SourceAction::Record(record) => self.source_record(host, record),
            SourceAction::Send(message) => self.source_send(host, message),
            SourceAction::OpenStreams(streams) => {
                self.source_op(host, move |world| world.open_streams(host, streams))
            }
            SourceAction::Share => unreachable!("nothing is in common here"),
            SourceAction::Track => self.source_op(host, move |world| world.track(host)),
            // The simulation has no rates, and a guest that is slowed is only slower.
            SourceAction::Pace(_) | SourceAction::Stun(_) => {}
            // Its targets refuse post-copy.
            SourceAction::OpenDemand
            | SourceAction::Abandon
            | SourceAction::TellStale(_)
            | SourceAction::FinishPostcopy(_)
            | SourceAction::Push
            | SourceAction::Reattach => unreachable!("{action:?}"),
            SourceAction::SendRound(round) => self.send_pages(host, round, Round::Live),
            SourceAction::Scan => self.source_op(host, move |world| {
                world.scan(host);
                if world.chance.below(8) == 0 {
                    world.source_input(host, SourceInput::Unsettled(Pages(5000)));
                }
                SourceInput::Scanned(world.send_set_pages(host))
            }),
            SourceAction::Settle => self.source_op(host, move |world| {
                world.scan(host);
                world.source_input(host, SourceInput::Unsettled(Pages(0)));
                SourceInput::Settled(world.send_set_pages(host))
            }),
            SourceAction::Stop => self.stop(host),
            SourceAction::Finish(round) => self.send_pages(host, round, Round::Last),
            SourceAction::Resume => self.source_op(host, move |world| world.resume(host)),
            SourceAction::Release => self.close_source(host),
            SourceAction::Ask => self.ask(host),
            SourceAction::Reply(result) => self.note(|| format!("host {host} tells its operator {result:?}")),
            SourceAction::End => {
                let (qemu, serial) = (self.qemu_on(host), self.begin_source_op(host));
                self.kill(host, qemu, move |world| world.end_source_op(host, serial, SourceInput::Ended));
            }
            SourceAction::Over(outcome) => {
                let task = self.hosts[host].source.take().expect("it just acted");
                self.check_outcome(host, task.id, &outcome);
            }
        }
    }

    fn begin_source_op(&mut self, host: usize) -> u64 {
        let task = self.hosts[host].source.as_mut().expect("it just acted");
        task.busy = true;
        task.serial
    }

    fn end_source_op(&mut self, host: usize, serial: u64, input: SourceInput) {
        if let Some(task) = self.hosts[host].source.as_mut().filter(|task| task.serial == serial) {
            task.busy = false;
            self.source_input(host, input);
        }
    }

    /// A step that takes a while, and that the next action waits for.
    fn source_op(&mut self, host: usize, step: impl FnOnce(&mut World) -> SourceInput + 'static) {
        let (serial, pause) = (self.begin_source_op(host), self.pause());
        self.later(host, pause, move |world| {
            let input = step(world);
            world.end_source_op(host, serial, input);
        });
    }

    fn source_record(&mut self, host: usize, record: Record) {
        if self.mutation == Some(Mutation::ReleaseBeforeRecord) && record.step == Step::Released {
            let release = sterna_engine::wire::message::Release { generation: record.generation.0 };
            self.source_send(host, Message::Release(release));
        }
        let serial = self.begin_source_op(host);
        self.store(host, record, move |world, stored| {
            let input = match stored {
                true => SourceInput::Recorded,
                false => SourceInput::RecordFailed("the disk is full".into()),
            };
            world.end_source_op(host, serial, input);
        });
    }

    fn source_send(&mut self, host: usize, message: Message) {
        let task = self.hosts[host].source.as_ref().expect("it just acted");
        let (id, control) = (task.id, task.control);
        if matches!(message, Message::Release(_)) && !self.truth.released.insert(id) {
            return;
        }
        if let Some(control) = control {
            self.transmit(control, host, pack(&message));
        }
    }

    fn open_streams(&mut self, host: usize, streams: u32) -> SourceInput {
        let id = self.hosts[host].source.as_ref().expect("its own operation").id.0.to_vec();
        for index in 0..streams {
            let connection = self.connect(host, 1 - host).filter(|_| !self.fails());
            let Some(connection) = connection else {
                return SourceInput::Failed("a page stream could not be opened".into());
            };
            self.hosts[host].source.as_mut().expect("its own operation").streams.push(connection);
            self.transmit(
                connection,
                host,
                pack(&Message::Stream(Stream { id: id.clone(), index, purpose: 0 })),
            );
        }
        SourceInput::Opened
    }

    fn track(&mut self, host: usize) -> SourceInput {
        let Some(qemu) = self.qemu_on(host).filter(|_| !self.fails()) else {
            return SourceInput::Failed("tracking failed".into());
        };
        self.live(qemu);
        self.qemus[qemu].scan();
        let memory = self.qemus[qemu].memory;
        let task = self.hosts[host].source.as_mut().expect("its own operation");
        task.send_set = (0..PAGES).filter(|page| memory[*page] != 0).collect();
        SourceInput::Tracked(self.send_set_pages(host))
    }

    fn send_set_pages(&self, host: usize) -> Pages {
        Pages(self.hosts[host].source.as_ref().map_or(0, |task| task.send_set.len() as u64))
    }

    /// Adds what was written or given back since the last scan to the send-set.
    fn scan(&mut self, host: usize) {
        let Some(qemu) = self.qemu_on(host) else { return };
        self.live(qemu);
        let written = self.qemus[qemu].scan();
        let memory = self.qemus[qemu].memory;
        let forgetful = self.mutation == Some(Mutation::DiscardsForgotten);
        let Some(task) = &mut self.hosts[host].source else { return };
        task.send_set.extend(written);
        let holes = (0..PAGES).filter(|page| memory[*page] == 0 && task.sent[*page] && !forgetful);
        task.send_set.extend(holes);
    }

    /// The VM stops in QEMU's own time, whether or not the agent lives to see it.
    fn stop(&mut self, host: usize) {
        self.handoff_begins();
        let fails = self.fails();
        let (qemu, reaches) = (self.qemu_on(host), !fails || self.chance.permille(500));
        if let Some(qemu) = qemu.filter(|_| reaches) {
            let delay = self.chance.between(50, MS);
            self.on_host(host, delay, move |world| {
                world.live(qemu);
                if world.qemus[qemu].life == Life::Running {
                    world.qemus[qemu].life = Life::Paused;
                }
                world.point(host);
            });
        }
        let (serial, pause) = (self.begin_source_op(host), MS + self.pause());
        self.later(host, pause, move |world| {
            let input = match qemu.filter(|qemu| !fails && world.qemus[*qemu].alive()) {
                Some(qemu) => world.stopped(host, qemu),
                None => SourceInput::Failed("the VM could not be stopped".into()),
            };
            world.end_source_op(host, serial, input);
        });
    }

    fn stopped(&mut self, host: usize, qemu: usize) -> SourceInput {
        // Saving the devices may write to RAM: the last scan comes after it.
        let page = self.chance.below(PAGES as u64) as usize;
        self.qemus[qemu].memory[page] = self.chance.any();
        self.qemus[qemu].written[page] = true;
        let device = self.qemus[qemu].device;
        let before = self.hosts[host].source.as_ref().map(|task| task.send_set.clone());
        self.scan(host);
        let forgets = self.mutation == Some(Mutation::LastScanSkipped);
        if let Some(task) = &mut self.hosts[host].source {
            task.device = device;
            if forgets {
                task.send_set = before.unwrap_or_default();
            }
        }
        SourceInput::Stopped(self.send_set_pages(host))
    }

    fn resume(&mut self, host: usize) -> SourceInput {
        let qemu = self.qemu_on(host);
        let Some(qemu) = qemu.filter(|qemu| !self.fails() && self.qemus[*qemu].obeys()) else {
            return SourceInput::ResumeFailed("QEMU does not answer".into());
        };
        let id = self.hosts[host].source.as_ref().expect("its own operation").id;
        self.check_take_back(id);
        self.run_qemu(qemu);
        SourceInput::Resumed
    }

    fn close_source(&mut self, host: usize) {
        let task = self.hosts[host].source.as_mut().expect("it just acted");
        task.closed = true;
        let connections = task.control.take().into_iter().chain(task.streams.drain(..)).collect::<Vec<_>>();
        for connection in connections {
            self.close(connection, host);
        }
    }

    fn ask(&mut self, host: usize) {
        let task = self.hosts[host].source.as_mut().expect("it just acted");
        task.asked += 1;
        let (serial, impatient) = (task.serial, task.asked > 3);
        let pause = self.pause();
        self.later(host, pause, move |world| {
            let Some(task) = world.hosts[host].source.as_ref().filter(|task| task.serial == serial) else {
                return;
            };
            if impatient && world.mutation == Some(Mutation::SourceResumesAlone) {
                return world.source_input(host, SourceInput::Answered(Ownership::Source));
            }
            let id = task.id.0.to_vec();
            let generation = world.hosts[host].disk.read().map_or(0, |record| record.generation.0);
            let connection = world.connect(host, 1 - host).filter(|_| !world.fails());
            let Some(connection) = connection else {
                return world.source_input(host, SourceInput::AskFailed("no connection".into()));
            };
            world.hosts[host].source.as_mut().expect("just seen").asking = Some(connection);
            let query = Query { id, vm: "vm".into(), generation, by_target: false };
            world.transmit(connection, host, pack(&Message::Query(query)));
            world.later(host, ASK_WAIT, move |world| world.give_up_asking(host, serial, connection));
        });
    }

    fn give_up_asking(&mut self, host: usize, serial: u64, connection: ConnectionId) {
        let task = self.hosts[host].source.as_mut().filter(|task| task.serial == serial);
        if let Some(task) = task.filter(|task| task.asking == Some(connection)) {
            task.asking = None;
            self.close(connection, host);
            self.source_input(host, SourceInput::AskFailed("no answer in time".into()));
        }
    }
}

fn short(what: &impl std::fmt::Debug) -> String {
    let text = format!("{what:?}");
    text.chars().take(90).collect()
}
