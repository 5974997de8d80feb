//! The network: connections that deliver in order after a latency, stall, and are cut with things in flight. Each end
//! learns of a cut at a time of its own, or only by its deadlines.

use crate::agent::unpack;
use crate::clock::{MS, Micros, SECOND};
use crate::world::{Fate, Mutation, World};
use sterna_engine::wire::Message;

/// Place of a connection in the world's list.
pub(crate) type ConnectionId = usize;

/// An end of a connection: 0 opened it, 1 accepted it.
pub(crate) type End = usize;

/// Longest that a stalled frame waits in the network.
const STALL_MAX: Micros = 3 * SECOND;
/// After this an end that still did not notice a cut has long met its deadlines.
const NEVER: Micros = 900 * SECOND;

/// How much later a message comes that comes too late: above the deadlines of the hand-off.
const LATE: Micros = 70 * SECOND;

/// What travels.
#[derive(Clone, Debug)]
pub(crate) enum Frame {
    /// A control frame of kind message, as it is on the wire.
    Message(Vec<u8>),
    /// The device state.
    State(u64),
    /// A batch's header and descriptors as on the wire, and a number for each page of its payload.
    Batch(Vec<u8>, Vec<u64>),
    /// The header that ends a round on a page stream.
    RoundEnd(Vec<u8>),
    /// The other end has closed.
    Close,
}

impl Frame {
    fn begins_something(&self) -> bool {
        let Frame::Message(bytes) = self else { return true };
        matches!(
            unpack(bytes),
            Ok(Message::Hello(_) | Message::Offer(_) | Message::Stream(_) | Message::Query(_))
        )
    }
}

/// A connection between the two hosts.
pub(crate) struct Connection {
    /// Host of each end.
    pub(crate) hosts: [usize; 2],
    /// Whether each end still uses it.
    pub(crate) open: [bool; 2],
    /// Agents' lives at both ends: a restarted agent does not inherit connections.
    lives: [u64; 2],
    /// When the last frame towards each end arrives: later ones do not overtake it.
    tail: [Micros; 2],
    /// Frames towards each end that would arrive later than this are lost.
    lost_after: [Micros; 2],
}

impl World {
    /// Opens a connection from `from` to `to`; none while the network or the other agent is down.
    pub(crate) fn connect(&mut self, from: usize, to: usize) -> Option<ConnectionId> {
        if self.partitioned || !self.hosts[to].up {
            return None;
        }
        let lives = [self.hosts[from].life, self.hosts[to].life];
        self.connections.push(Connection {
            hosts: [from, to],
            open: [true; 2],
            lives,
            tail: [0; 2],
            lost_after: [Micros::MAX; 2],
        });
        Some(self.connections.len() - 1)
    }

    /// Which end of a connection a host has.
    pub(crate) fn end_of(&self, id: ConnectionId, host: usize) -> End {
        usize::from(self.connections[id].hosts[0] != host)
    }

    /// Sends a frame from a host's end.
    pub(crate) fn transmit(&mut self, id: ConnectionId, host: usize, frame: Frame) {
        let (from, now) = (self.end_of(id, host), self.queue.now());
        if !self.connections[id].open[from] {
            return;
        }
        let fate = matches!(frame, Frame::Message(_)).then(|| self.draw_fate()).flatten();
        let latency = self.latency() + if fate == Some(Fate::Late) { LATE } else { 0 };
        let to = 1 - from;
        let connection = &mut self.connections[id];
        let mut at = connection.tail[to].max(now + latency);
        let late = self.mutation == Some(Mutation::StreamsReordered)
            && matches!(frame, Frame::Batch(..))
            && self.chance.permille(300);
        if late {
            at += self.chance.between(MS, 30 * MS);
        } else {
            connection.tail[to] = at;
        }
        match fate {
            Some(Fate::Lost) => return self.cut(id),
            Some(Fate::Twice) => self.deliver(at - now, id, to, frame.clone()),
            Some(Fate::Again) => {
                let copy = frame.clone();
                self.queue.after(at - now + LATE, Box::new(move |world| world.arrive_again(id, to, copy)));
            }
            _ => {}
        }
        self.deliver(at - now, id, to, frame);
    }

    fn deliver(&mut self, delay: Micros, id: ConnectionId, to: End, frame: Frame) {
        let host = self.connections[id].hosts[to];
        self.on_host(host, delay, move |world| world.arrive(id, to, frame));
    }

    /// A copy of what arrived long ago. Its connection may be closed by now, and its reader a newer life of the agent.
    fn arrive_again(&mut self, id: ConnectionId, to: End, frame: Frame) {
        let host = self.connections[id].hosts[to];
        // TLS keeps a connection's first words from being said again on another one.
        match frame.begins_something() {
            true => self.unless_frozen(host, move |world| world.arrive(id, to, frame)),
            false => self.unless_frozen(host, move |world| world.on_frame(host, id, frame)),
        }
    }

    fn latency(&mut self) -> Micros {
        match self.chaos && self.chance.permille(4) {
            true => self.chance.spread(MS, STALL_MAX),
            false => self.chance.between(50, 300),
        }
    }

    fn arrive(&mut self, id: ConnectionId, to: End, frame: Frame) {
        let connection = &self.connections[id];
        let host = connection.hosts[to];
        let lost = self.queue.now() > connection.lost_after[to];
        if lost || !connection.open[to] || self.hosts[host].life != connection.lives[to] {
            return;
        }
        if matches!(frame, Frame::Close) {
            self.connections[id].open[to] = false;
        }
        self.on_frame(host, id, frame);
    }

    /// Closes a host's end: what was sent before is still delivered.
    pub(crate) fn close(&mut self, id: ConnectionId, host: usize) {
        let end = self.end_of(id, host);
        self.transmit(id, host, Frame::Close);
        self.connections[id].open[end] = false;
    }

    /// Cuts a connection now; what is in flight is delivered or lost, and each end notices when it notices.
    pub(crate) fn cut(&mut self, id: ConnectionId) {
        let now = self.queue.now();
        for end in 0..2 {
            let grace = self.chance.below(2 * MS);
            let connection = &mut self.connections[id];
            connection.lost_after[end] = connection.lost_after[end].min(now + grace);
            let notice = match self.chance.below(4) {
                0 => NEVER,
                1 => self.chance.spread(MS, 20 * SECOND),
                _ => self.chance.between(grace, 50 * MS),
            };
            let host = self.connections[id].hosts[end];
            self.on_host(host, notice, move |world| world.notice(id, end));
        }
    }

    fn notice(&mut self, id: ConnectionId, end: End) {
        let connection = &mut self.connections[id];
        let host = connection.hosts[end];
        if connection.open[end] && self.hosts[host].life == connection.lives[end] {
            connection.open[end] = false;
            self.on_frame(host, id, Frame::Close);
        }
    }

    /// Cuts every connection that both ends still use.
    pub(crate) fn cut_all(&mut self) {
        for id in 0..self.connections.len() {
            if self.connections[id].open.contains(&true) {
                self.cut(id);
            }
        }
    }

    /// The kernel of a host whose agent died closes its connections; a host that died itself says nothing.
    pub(crate) fn close_all_of(&mut self, host: usize, says_so: bool) {
        for id in 0..self.connections.len() {
            let end = self.end_of(id, host);
            if !self.connections[id].open[end] {
                continue;
            }
            match says_so {
                true => self.close(id, host),
                false => self.cut(id),
            }
            self.connections[id].open[end] = false;
        }
    }
}
