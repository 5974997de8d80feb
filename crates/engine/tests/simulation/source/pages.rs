//! What the source does with pages: reads them while the guest writes on, and sends them as batches of rounds.

use super::STREAMS;
use crate::agent::pack;
use crate::clock::MS;
use crate::host::{Life, place_of};
use crate::network::Frame;
use crate::world::World;
use std::collections::BTreeMap;
use sterna_engine::source::SourceInput;
use sterna_engine::units::{Bytes, PAGE_BYTES, Pages};
use sterna_engine::wire::Message;
use sterna_engine::wire::batch::{BatchHeader, Content, Descriptor, encode_batch};
use sterna_engine::wire::message::StateEnd;

/// Neighbouring pages that share a stream; 256 on real hosts.
const STREAM_GRAIN: u32 = 4;
/// Pages that are read and sent at once.
const CHUNK: usize = 9;

/// Which round it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Round {
    /// The VM runs.
    Live,
    /// It is stopped: the device state follows, and a peek.
    Last,
}

impl World {
    /// Sends the send-set as a round, in the background; as the last one with the device state and a peek.
    pub(super) fn send_pages(&mut self, host: usize, round: u32, kind: Round) {
        let task = self.hosts[host].source.as_mut().expect("it just acted");
        let pages = std::mem::take(&mut task.send_set).into_iter().collect::<Vec<_>>();
        let serial = task.serial;
        self.send_chunk(host, serial, round, pages, kind);
    }

    fn send_chunk(&mut self, host: usize, serial: u64, round: u32, mut pages: Vec<usize>, kind: Round) {
        let pause = self.chance.between(100, MS);
        self.later(host, pause, move |world| {
            let task = world.hosts[host].source.as_ref();
            let Some(qemu) = world
                .qemu_on(host)
                .filter(|_| task.is_some_and(|task| task.serial == serial && !task.closed))
            else {
                return;
            };
            world.live(qemu);
            let rest = pages.split_off(pages.len().min(CHUNK));
            world.send_batches(host, qemu, round, &pages);
            let sent = world.hosts[host].source.as_ref().map_or(0, |task| task.sent_bytes);
            if !rest.is_empty() {
                world.send_chunk(host, serial, round, rest, kind);
                return world.source_input(host, SourceInput::Sent(Bytes(sent)));
            }
            world.end_round(host, round);
            if kind == Round::Last {
                world.send_state(host, round);
                world.later(host, pause, move |world| world.peek(host, serial, qemu));
            }
            world.source_input(host, SourceInput::Sent(Bytes(sent)));
        });
    }

    fn send_batches(&mut self, host: usize, qemu: usize, round: u32, pages: &[usize]) {
        let memory = self.qemus[qemu].memory;
        let task = self.hosts[host].source.as_mut().expect("the caller looked");
        let mut batches: BTreeMap<(usize, u16), (Vec<Descriptor>, Vec<u64>)> = BTreeMap::new();
        for page in pages {
            let (block, first) = place_of(*page);
            let value = memory[*page];
            let stream = (u32::from(block) + first / STREAM_GRAIN) % STREAMS;
            let content = match (value, task.sent[*page]) {
                (0, false) => continue,
                (0, true) => Content::Discard,
                _ => Content::Bytes,
            };
            task.sent[*page] = value != 0;
            let (runs, payload) = batches.entry((stream as usize, block)).or_default();
            match runs.last_mut() {
                Some(run) if run.content == content && run.first + u32::from(run.pages) == first => {
                    run.pages += 1
                }
                _ => runs.push(Descriptor { first, pages: 1, content }),
            }
            payload.extend((content == Content::Bytes).then_some(value));
        }
        for ((stream, block), (runs, payload)) in batches {
            let mut bytes = Vec::new();
            encode_batch(block, round, &runs, &mut bytes);
            let task = self.hosts[host].source.as_mut().expect("the caller looked");
            task.sent_bytes += bytes.len() as u64 + payload.len() as u64 * PAGE_BYTES;
            if let Some(connection) = task.streams.get(stream).copied() {
                self.transmit(connection, host, Frame::Batch(bytes, payload));
            }
        }
    }

    fn end_round(&mut self, host: usize, round: u32) {
        let streams = self.hosts[host].source.as_ref().map(|task| task.streams.clone()).unwrap_or_default();
        for stream in streams {
            let end = BatchHeader::round_end(round).encode().to_vec();
            self.transmit(stream, host, Frame::RoundEnd(end));
        }
    }

    fn send_state(&mut self, host: usize, last_round: u32) {
        let task = self.hosts[host].source.as_ref().expect("the caller looked");
        let device = task.device;
        let Some(control) = task.control else { return };
        self.transmit(control, host, Frame::State(device));
        let end = StateEnd { bytes: 8, last_round, ..StateEnd::default() };
        self.transmit(control, host, pack(&Message::StateEnd(end)));
    }

    /// Nothing may have been written since the last scan; sometimes something was, from outside the VM.
    fn peek(&mut self, host: usize, serial: u64, qemu: usize) {
        if self.hosts[host].source.as_ref().is_none_or(|task| task.serial != serial) {
            return;
        }
        let mut found = self.qemus[qemu].written.iter().filter(|written| **written).count() as u64;
        if self.qemus[qemu].life == Life::Paused && self.fails() {
            self.qemus[qemu].memory[7] = self.chance.any();
            found += 1;
        }
        let input = match self.fails() {
            true => SourceInput::Failed("the peek failed".into()),
            false => SourceInput::Finished(Pages(found)),
        };
        self.source_input(host, input);
    }
}
