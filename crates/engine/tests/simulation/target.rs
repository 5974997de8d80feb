//! The target's driver: carries out the engine's actions on a simulated host.

use crate::agent::{pack, unpack};
use crate::host::{Qemu, QemuId, page_at};
use crate::network::{ConnectionId, Frame};
use crate::world::{Mutation, World};
use std::time::Duration;
use sterna_engine::handoff::Record;
use sterna_engine::target::{Lazily, Target, TargetAction, TargetInput};
use sterna_engine::wire::batch::{BatchHeader, Content, FrameKind, HEADER_BYTES};
use sterna_engine::wire::message::{Hello, Offer, Reason, Stream};
use sterna_engine::wire::{Layout, Message, WireError};

/// One migration at its target.
pub(crate) struct TargetTask {
    serial: u64,
    machine: Target,
    busy: bool,
    control: ConnectionId,
    streams: Vec<(ConnectionId, u32)>,
    /// What came on streams before there was a QEMU.
    ahead: Option<Vec<(ConnectionId, Frame)>>,
    timer: Option<Duration>,
    layout: Layout,
    qemu: Option<QemuId>,
    device: Option<u64>,
    /// The load began: a page that comes now is against the protocol.
    loading: bool,
}

impl TargetTask {
    /// Whether a connection is this task's.
    pub(crate) fn uses(&self, id: ConnectionId) -> bool {
        self.control == id || self.streams.iter().any(|(stream, _)| *stream == id)
    }
}

impl World {
    /// A peer begins a migration.
    pub(crate) fn accept_migration(&mut self, host: usize, control: ConnectionId, hello: &Hello) {
        self.serial += 1;
        let machine = Target::new(hello, &format!("host{}", 1 - host), self.queue.instant());
        self.hosts[host].target = Some(TargetTask {
            serial: self.serial,
            machine,
            busy: false,
            control,
            streams: Vec::new(),
            ahead: Some(Vec::new()),
            timer: None,
            layout: Layout::default(),
            qemu: None,
            device: None,
            loading: false,
        });
        self.target_pump(host);
    }

    /// A peer opens a page stream.
    pub(crate) fn accept_stream(&mut self, host: usize, id: ConnectionId, stream: &Stream) {
        match self.hosts[host].target.as_mut().filter(|task| task.machine.id().0 == *stream.id) {
            Some(task) => task.streams.push((id, stream.index)),
            None => self.close(id, host),
        }
    }

    /// The user cancels here.
    pub(crate) fn cancel_target(&mut self, host: usize) {
        if self.hosts[host].up && self.hosts[host].target.is_some() {
            self.target_input(host, TargetInput::Cancel);
        }
    }

    /// A frame for this task.
    pub(crate) fn target_frame(&mut self, host: usize, id: ConnectionId, frame: Frame) {
        let task = self.hosts[host].target.as_mut().expect("the caller looked");
        let stream = task.streams.iter().find(|(stream, _)| *stream == id).map(|(_, index)| *index);
        if let Some(ahead) = task.ahead.as_mut().filter(|_| stream.is_some()) {
            return ahead.push((id, frame));
        }
        let input = match (frame, stream) {
            (Frame::Message(bytes), None) => match unpack(&bytes) {
                Ok(message) => TargetInput::Message(message),
                Err(error) => TargetInput::Disconnected(error.to_string()),
            },
            (Frame::State(device), None) => {
                task.device = Some(device);
                return;
            }
            (Frame::Batch(bytes, payload), Some(_)) => match self.install(host, &bytes, &payload) {
                Ok(()) => TargetInput::Received,
                Err(error) => TargetInput::Disconnected(error.to_string()),
            },
            (Frame::RoundEnd(bytes), Some(stream)) => match bytes.first_chunk().map(BatchHeader::decode) {
                Some(Ok(header)) if header.kind == FrameKind::RoundEnd => {
                    TargetInput::RoundEnd { stream, round: header.round }
                }
                _ => TargetInput::Disconnected("no end of a round".into()),
            },
            _ => TargetInput::Disconnected("the connection is lost".into()),
        };
        self.target_input(host, input);
    }

    fn install(&mut self, host: usize, bytes: &[u8], payload: &[u64]) -> Result<(), WireError> {
        let reordered = self.mutation == Some(Mutation::StreamsReordered);
        let task = self.hosts[host].target.as_ref().expect("the caller looked");
        let header = bytes.first_chunk::<HEADER_BYTES>().ok_or(WireError::Short { what: "batch header" })?;
        let header = BatchHeader::decode(header)?;
        let mut runs = Vec::new();
        task.layout.decode_runs(&header, &bytes[HEADER_BYTES..], &mut runs)?;
        let Some(qemu) = task.qemu.filter(|_| !task.loading || reordered) else {
            return Err(WireError::Invalid { what: "page of round", got: header.round.into() });
        };
        let mut payload = payload.iter();
        for run in runs {
            for index in run.first..run.first + u32::from(run.pages) {
                let value = match run.content {
                    Content::Bytes => *payload.next().expect("the runs add up to the payload"),
                    Content::Discard | Content::Missing => 0,
                };
                self.qemus[qemu].memory[page_at(header.block, index)] = value;
            }
        }
        Ok(())
    }

    fn target_input(&mut self, host: usize, input: TargetInput) {
        if self.hosts[host].target.is_none() || self.point(host) {
            return;
        }
        if !matches!(input, TargetInput::Received | TargetInput::Tick) {
            self.note(|| format!("target {host} <- {}", short(&input)));
        }
        let now = self.queue.instant();
        if let Some(task) = &mut self.hosts[host].target {
            task.machine.handle(input, now);
        }
        if !self.point(host) {
            self.target_pump(host);
        }
    }

    fn target_pump(&mut self, host: usize) {
        loop {
            let Some(task) = self.hosts[host].target.as_mut().filter(|task| !task.busy) else { return };
            let Some(action) = task.machine.poll() else { break };
            if self.point(host) {
                return;
            }
            self.note(|| format!("target {host} -> {}", short(&action)));
            self.target_act(host, action);
            if self.hosts[host].target.is_none() || self.point(host) {
                return;
            }
        }
        let Some(task) = &mut self.hosts[host].target else { return };
        let (deadline, serial) = (task.machine.deadline(), task.serial);
        if deadline != task.timer {
            task.timer = deadline;
            let Some(deadline) = deadline else { return };
            let wait = deadline.saturating_sub(self.queue.instant()).as_micros() as u64;
            self.later(host, wait, move |world| {
                if world.hosts[host].target.as_ref().is_some_and(|task| task.serial == serial) {
                    world.hosts[host].target.as_mut().expect("just seen").timer = None;
                    world.target_input(host, TargetInput::Tick);
                }
            });
        }
    }

    fn target_act(&mut self, host: usize, action: TargetAction) {
        match action {
            TargetAction::Send(message) => {
                let control = self.hosts[host].target.as_ref().expect("it just acted").control;
                let hasty = self.mutation == Some(Mutation::RunsOnLoaded);
                if let Some(qemu) = self.waiting_qemu(host).filter(|_| hasty && is_loaded(&message)) {
                    self.run_qemu(qemu);
                }
                self.transmit(control, host, pack(&message));
            }
            TargetAction::Check(_) => self.target_op(host, move |world| world.admit(host)),
            TargetAction::Record(record) => self.target_record(host, record),
            TargetAction::Prepare(offer) => self.target_op(host, move |world| world.prepare(host, &offer)),
            TargetAction::Map(_) => unreachable!("nothing is in common here"),
            TargetAction::Load(_) => {
                self.hosts[host].target.as_mut().expect("it just acted").loading = true;
                self.target_op(host, move |world| world.load(host));
            }
            TargetAction::Run => self.start_vm(host),
            TargetAction::Adopt | TargetAction::Announce | TargetAction::Strand(_) => {}
            TargetAction::Kill => {
                let (serial, qemu) = (self.begin_target_op(host), self.waiting_qemu(host));
                self.kill(host, qemu, move |world| world.end_target_op(host, serial, TargetInput::Dead));
            }
            TargetAction::Over(_) => {
                let task = self.hosts[host].target.take().expect("it just acted");
                self.close(task.control, host);
                for (stream, _) in task.streams {
                    self.close(stream, host);
                }
            }
        }
    }

    fn begin_target_op(&mut self, host: usize) -> u64 {
        let task = self.hosts[host].target.as_mut().expect("it just acted");
        task.busy = true;
        task.serial
    }

    fn end_target_op(&mut self, host: usize, serial: u64, input: TargetInput) {
        if let Some(task) = self.hosts[host].target.as_mut().filter(|task| task.serial == serial) {
            task.busy = false;
            let ahead = task.ahead.take_if(|_| matches!(input, TargetInput::Prepared { .. }));
            self.target_input(host, input);
            ahead.into_iter().flatten().for_each(|(id, frame)| self.on_frame(host, id, frame));
        }
    }

    fn target_op(&mut self, host: usize, step: impl FnOnce(&mut World) -> TargetInput + 'static) {
        let (serial, pause) = (self.begin_target_op(host), self.pause());
        self.later(host, pause, move |world| {
            let input = step(world);
            world.end_target_op(host, serial, input);
        });
    }

    fn target_record(&mut self, host: usize, record: Record) {
        let (serial, began) = (self.begin_target_op(host), self.queue.instant());
        self.store(host, record, move |world, stored| {
            let input = match stored {
                true => TargetInput::Recorded(world.queue.instant() - began),
                false => TargetInput::RecordFailed("the disk is full".into()),
            };
            world.end_target_op(host, serial, input);
        });
    }

    /// The QEMU of this task, while it lives.
    fn waiting_qemu(&self, host: usize) -> Option<QemuId> {
        let qemu = self.hosts[host].target.as_ref().and_then(|task| task.qemu);
        qemu.filter(|qemu| self.qemus[*qemu].alive())
    }

    fn admit(&mut self, host: usize) -> TargetInput {
        match self.qemu_on(host).is_some() || self.fails() {
            true => TargetInput::Refused(vec![Reason { code: "name-taken".into(), text: "taken".into() }]),
            false => TargetInput::Admitted,
        }
    }

    fn prepare(&mut self, host: usize, offer: &Offer) -> TargetInput {
        if self.fails() {
            return TargetInput::Refused(vec![Reason { code: "command-line".into(), text: "wrong".into() }]);
        }
        let task = self.hosts[host].target.as_mut().expect("its own operation");
        let id = task.machine.id();
        task.layout = Layout::new(offer.blocks.iter().map(|block| block.bytes));
        task.qemu = Some(self.qemus.len());
        self.qemus.push(Qemu::new(host, Some(id)));
        match self.fails() {
            true => TargetInput::Failed("QEMU does not answer".into()),
            false => TargetInput::Prepared {
                lazily: Lazily::No("it is not simulated here".into()),
                room: 0,
                head_room: 0,
            },
        }
    }

    fn load(&mut self, host: usize) -> TargetInput {
        let device = self.hosts[host].target.as_ref().and_then(|task| task.device);
        let (Some(qemu), Some(device)) = (self.waiting_qemu(host), device) else {
            return TargetInput::Failed("there is no QEMU or no device state".into());
        };
        if self.fails() {
            return TargetInput::Failed("QEMU refuses the device state".into());
        }
        self.qemus[qemu].device = device;
        TargetInput::Loaded(0)
    }

    /// `cont`: QEMU carries it out even if the agent that sent it dies.
    fn start_vm(&mut self, host: usize) {
        let (qemu, fails) = (self.waiting_qemu(host), self.fails());
        if let Some(qemu) = qemu.filter(|_| !fails) {
            let delay = self.chance.between(20, 1000);
            self.on_host(host, delay, move |world| {
                if world.qemus[qemu].obeys() {
                    world.run_qemu(qemu);
                }
                world.point(host);
            });
        }
        let (serial, began, pause) = (self.begin_target_op(host), self.queue.instant(), 1000 + self.pause());
        self.later(host, pause, move |world| {
            let input = match qemu.is_some_and(|qemu| !fails && world.qemus[qemu].obeys()) {
                true => TargetInput::Running(world.queue.instant() - began),
                false => TargetInput::RunFailed("QEMU is dead or refuses".into()),
            };
            world.end_target_op(host, serial, input);
        });
    }
}

fn is_loaded(message: &Message) -> bool {
    matches!(message, Message::Loaded(_))
}

fn short(what: &impl std::fmt::Debug) -> String {
    let text = format!("{what:?}");
    text.chars().take(90).collect()
}
