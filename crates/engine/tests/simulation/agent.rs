//! What both roles of an agent share: its records, its death and second life, and whom a frame is for.

use crate::clock::{MS, Micros, SECOND};
use crate::host::{Life, QemuId};
use crate::network::{ConnectionId, Frame};
use crate::world::{Crash, Mutation, World};
use sterna_engine::handoff::{
    self, Generation, MigrationId, Ownership, Record, SourceRecovery, Step, TargetRecovery,
};
use sterna_engine::wire::control::{ControlHeader, HEADER_BYTES, decode_message, encode_message};
use sterna_engine::wire::message::Query;
use sterna_engine::wire::{Message, WireError};

/// How long the kernel may leave what was written in the page cache.
const WRITE_BACK_MAX: Micros = 40 * SECOND;
/// How long a restarted agent waits before it tries a failed step of its recovery again.
const RECOVERY_PAUSE: Micros = SECOND;

/// A message as the wire has it.
pub(crate) fn pack(message: &Message) -> Frame {
    Frame::Message(encode_message(message).expect("messages of the simulation are small"))
}

/// The message in a frame's bytes.
pub(crate) fn unpack(bytes: &[u8]) -> Result<Message, WireError> {
    let header = bytes.first_chunk::<HEADER_BYTES>().ok_or(WireError::Short { what: "control header" })?;
    let header = ControlHeader::decode(header)?;
    assert_eq!(header.bytes, bytes.len() - HEADER_BYTES);
    decode_message(&bytes[HEADER_BYTES..])
}

impl World {
    /// Stores a record; `done` learns whether it worked. A store that failed may have been written all the same.
    pub(crate) fn store(
        &mut self,
        host: usize,
        record: Record,
        done: impl FnOnce(&mut World, bool) + 'static,
    ) {
        let (fails, written) = (self.fails(), self.chance.permille(500));
        let (write, sync) = (self.chance.between(10, 500), self.chance.between(100, 3 * MS));
        let durable = record.step.must_be_durable()
            && !(self.mutation == Some(Mutation::CommitNotDurable) && record.step == Step::Committed);
        self.later(host, write, move |world| {
            if fails && !written {
                return done(world, false);
            }
            world.note(|| format!("host {host} writes {} {:?}", record.step.word(), record.generation));
            world.hosts[host].disk.write(record);
            let back = world.chance.spread(100 * MS, WRITE_BACK_MAX);
            world.queue.after(back, Box::new(move |world| world.hosts[host].disk.sync()));
            if world.point(host) {
                return;
            }
            if fails || !durable {
                return done(world, !fails);
            }
            world.later(host, sync, move |world| {
                world.hosts[host].disk.sync();
                done(world, true);
            });
        });
    }

    /// Sends a QEMU the signal that ends it, and lets `done` know: of its death, unless a mutation does not wait.
    pub(crate) fn kill(&mut self, host: usize, id: Option<QemuId>, done: impl FnOnce(&mut World) + 'static) {
        let hasty = self.mutation == Some(Mutation::DeadWithoutWaiting);
        let dying = match hasty {
            true => self.chance.spread(MS, 5 * SECOND),
            false => self.chance.spread(MS, 200 * MS),
        };
        if let Some(id) = id {
            self.qemus[id].doomed = true;
            self.on_host(host, dying, move |world| {
                if world.qemus[id].alive() {
                    world.note(|| format!("QEMU {id} is dead"));
                    world.qemus[id].life = Life::Dead;
                }
            });
        }
        self.later(host, if hasty { 1 } else { dying + 10 }, done);
    }

    /// An agent or a host dies, and comes back after a while.
    pub(crate) fn die(&mut self, host: usize, crash: Crash) {
        self.note(|| format!("host {host}: its {crash:?} crashes"));
        self.close_all_of(host, crash != Crash::Host);
        if crash == Crash::AgentThenHost {
            let soon = self.chance.spread(50 * MS, 20 * SECOND);
            self.queue.after(soon, Box::new(move |world| world.die(host, Crash::Host)));
        }
        let dead = &mut self.hosts[host];
        dead.up = false;
        dead.life += 1;
        dead.source = None;
        dead.target = None;
        dead.recovering = false;
        if crash == Crash::Host {
            dead.disk.power_cut();
            self.frozen[host] = 0;
            for qemu in self.qemus.iter_mut().filter(|qemu| qemu.host == host && qemu.alive()) {
                qemu.life = Life::Dead;
                qemu.lost_with_host = true;
            }
        }
        let (life, away) = (self.hosts[host].life, self.away(crash));
        self.on_host(host, away, move |world| {
            if world.hosts[host].life == life {
                world.recover(host);
            }
        });
    }

    fn away(&mut self, crash: Crash) -> Micros {
        match crash {
            Crash::Agent | Crash::Connections | Crash::Freeze => self.chance.spread(50 * MS, 40 * SECOND),
            Crash::AgentThenHost => self.chance.spread(50 * MS, SECOND),
            Crash::Host => self.chance.between(5 * SECOND, 60 * SECOND),
        }
    }

    /// An operator restarts an agent.
    pub(crate) fn restart_agent(&mut self, host: usize) {
        self.die(host, Crash::Agent);
    }

    /// A new life begins with what the record says.
    fn recover(&mut self, host: usize) {
        self.hosts[host].up = true;
        let Some(record) = self.hosts[host].disk.read().cloned() else { return };
        self.note(|| format!("host {host}: the agent is back and reads {}", record.step.word()));
        match record.step.role() {
            handoff::Role::Source => match handoff::at_source(record.step) {
                SourceRecovery::Resume => self.recover_by_resuming(host, record),
                SourceRecovery::Ask => self.recover_by_asking(host, &record),
                SourceRecovery::End => {
                    let id = self.qemu_on(host);
                    self.hosts[host].recovering = true;
                    self.kill(host, id, move |world| world.hosts[host].recovering = false);
                }
                SourceRecovery::Nothing => {}
            },
            handoff::Role::Target => match handoff::at_target(record.step) {
                TargetRecovery::Kill => self.recover_by_killing(host, record),
                TargetRecovery::Continue => self.recover_by_continuing(host, record),
                TargetRecovery::Fetch | TargetRecovery::Nothing => {}
            },
        }
    }

    fn recover_by_resuming(&mut self, host: usize, record: Record) {
        // A VM that died with its host is not booted anew: nobody but the target knows whether it went on there.
        let Some(id) = self.qemu_on(host) else { return };
        self.hosts[host].recovering = true;
        let pause = self.pause();
        self.later(host, pause, move |world| {
            if world.fails() || !world.qemus[id].obeys() {
                return world
                    .later(host, RECOVERY_PAUSE, move |world| world.recover_by_resuming(host, record));
            }
            world.check_take_back(record.id);
            world.run_qemu(id);
            world.store(host, Record { step: Step::Kept, ..record }, move |world, _| {
                world.hosts[host].recovering = false;
            });
        });
    }

    fn recover_by_killing(&mut self, host: usize, record: Record) {
        self.hosts[host].recovering = true;
        let id = self.qemu_on(host);
        self.kill(host, id, move |world| {
            let dead = Record { step: Step::Dead, ..record.clone() };
            world.store(host, dead, move |world, stored| match stored {
                true => world.hosts[host].recovering = false,
                false => {
                    world.later(host, RECOVERY_PAUSE, move |world| world.recover_by_killing(host, record));
                }
            });
        });
    }

    /// What can be read need not be on the disk: it is stored again before the QEMU runs.
    fn recover_by_continuing(&mut self, host: usize, record: Record) {
        let Some(id) = self.qemu_on(host) else { return };
        self.hosts[host].recovering = true;
        // An agent asks the source first. Whatever records that host has lost, without an operator it says go on.
        let source = self.hosts[1 - host].disk.read();
        let said = handoff::answer_to_target(record.id, record.generation, source);
        assert_eq!(handoff::may_continue(Some(said)), handoff::Continuation::Run, "{record:?} {source:?}");
        if self.mutation == Some(Mutation::RecoveryTrustsPageCache) {
            return self.recover_by_running(host, id, record);
        }
        self.store(host, record.clone(), move |world, stored| match stored {
            true => world.recover_by_running(host, id, record),
            false => {
                world.later(host, RECOVERY_PAUSE, move |world| world.recover_by_continuing(host, record));
            }
        });
    }

    fn recover_by_running(&mut self, host: usize, id: QemuId, record: Record) {
        let pause = self.pause();
        self.later(host, pause, move |world| {
            let again = record.clone();
            if world.fails() || !world.qemus[id].obeys() {
                return world
                    .later(host, RECOVERY_PAUSE, move |world| world.recover_by_continuing(host, again));
            }
            world.run_qemu(id);
            world.store(host, Record { step: Step::Running, ..record }, move |world, stored| match stored {
                true => world.hosts[host].recovering = false,
                false => {
                    world.later(host, RECOVERY_PAUSE, move |world| world.recover_by_continuing(host, again));
                }
            });
        });
    }

    /// A frame has arrived at a host whose agent lives.
    pub(crate) fn on_frame(&mut self, host: usize, id: ConnectionId, frame: Frame) {
        if !self.hosts[host].up {
            return;
        }
        if self.hosts[host].source.as_ref().is_some_and(|task| task.uses(id)) {
            return self.source_frame(host, id, frame);
        }
        if self.hosts[host].target.as_ref().is_some_and(|task| task.uses(id)) {
            return self.target_frame(host, id, frame);
        }
        let Frame::Message(bytes) = frame else { return };
        match unpack(&bytes) {
            Ok(Message::Hello(hello)) if self.hosts[host].idle() => self.accept_migration(host, id, &hello),
            Ok(Message::Stream(stream)) => self.accept_stream(host, id, &stream),
            Ok(Message::Query(query)) => self.answer_query(host, id, &query),
            _ => self.close(id, host),
        }
    }

    fn answer_query(&mut self, host: usize, id: ConnectionId, query: &Query) {
        let record = self.hosts[host].disk.read();
        let lives = record.is_some_and(|record| {
            self.qemus.iter().any(|qemu| qemu.host == host && qemu.alive() && qemu.came_by == Some(record.id))
        });
        let migration = MigrationId(query.id.as_slice().try_into().expect("the source sends 16 bytes"));
        let mut ownership = handoff::answer(migration, Generation(query.generation), record, lives);
        if self.mutation == Some(Mutation::CommitAnsweredAsOwnership)
            && lives
            && record.is_some_and(|record| record.step == Step::Committed)
        {
            ownership = Ownership::Target;
        }
        let again = self.hosts[host].asked.replace(migration) == Some(migration);
        if self.mutation == Some(Mutation::GivesInWhenAskedAgain)
            && again
            && ownership == Ownership::Undecided
        {
            ownership = Ownership::Source;
        }
        self.note(|| format!("host {host} answers {ownership:?}"));
        self.transmit(id, host, pack(&Message::Answer(ownership.into())));
    }
}
