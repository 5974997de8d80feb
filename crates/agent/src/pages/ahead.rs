//! What comes on a page stream before there is a QEMU to put it into: it is read all the same, so that a link does not stand idle while a
//! QEMU starts.

use crate::registry::lock;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use sterna_engine::source::STREAMS_MAX;
use sterna_transport::{Reader, Shutdown, TransportError};

/// Most bytes that one stream has read ahead: a QEMU starts while a link of 1 Gbit/s brings 30 MiB.
const STREAM_BYTES_MAX: usize = 32 << 20;
/// Most bytes that all streams of this host have read ahead. Who finds no room reads nothing until there is a QEMU.
const HOST_BYTES_MAX: u64 = 256 << 20;
/// Bytes that are read and kept in one piece.
const PIECE_BYTES: usize = 256 << 10;
/// How long a read may wait before it is looked whether there is a QEMU by now.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Tells streams when their pages can be put where they belong.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    ready: Mutex<Option<bool>>,
    changed: Condvar,
    /// How many streams have come here.
    streams: AtomicU32,
}

impl Gate {
    /// There is a QEMU.
    pub(crate) fn open(&self) {
        self.set(true);
    }

    /// There will be none, unless there is one.
    pub(crate) fn close(&self) {
        self.set(false);
    }

    /// Whether one more stream may wait here.
    pub(crate) fn lets_in(&self) -> bool {
        self.streams.fetch_add(1, Ordering::Relaxed) < STREAMS_MAX
    }

    fn set(&self, ready: bool) {
        lock(&self.ready).get_or_insert(ready);
        self.changed.notify_all();
    }

    /// Whether there is a QEMU; `None` as long as there may be one.
    fn get(&self) -> Option<bool> {
        *lock(&self.ready)
    }

    fn wait(&self) -> bool {
        let ready = lock(&self.ready);
        let ready = self.changed.wait_while(ready, |ready| ready.is_none());
        ready.unwrap_or_else(PoisonError::into_inner).unwrap_or(false)
    }
}

/// Bytes that were read ahead on this host, and not used yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Budget(Arc<AtomicU64>);

impl Budget {
    fn take(&self) -> bool {
        let more = |taken: u64| Some(taken + PIECE_BYTES as u64).filter(|bytes| *bytes <= HOST_BYTES_MAX);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn give(&self) {
        self.0.fetch_sub(PIECE_BYTES as u64, Ordering::Relaxed);
    }
}

/// A stream's reader, and what was read ahead of it.
#[derive(Debug)]
pub(crate) struct Ahead {
    pieces: VecDeque<Vec<u8>>,
    /// How much of the first was used.
    used: usize,
    budget: Budget,
    reader: Reader,
}

impl From<Reader> for Ahead {
    /// Nothing was read ahead.
    fn from(reader: Reader) -> Self {
        Self { pieces: VecDeque::new(), used: 0, budget: Budget::default(), reader }
    }
}

impl Ahead {
    /// Reads what comes until there is a QEMU. `None` when there will be none.
    pub(crate) fn read(reader: Reader, gate: &Gate, budget: &Budget) -> Option<Self> {
        let mut ahead = Self::from(reader);
        ahead.budget = budget.clone();
        while ahead.pieces.len() * PIECE_BYTES < STREAM_BYTES_MAX {
            match gate.get() {
                Some(true) => return Some(ahead),
                Some(false) => return None,
                None if ahead.piece(gate) => {}
                None => break,
            }
        }
        gate.wait().then_some(ahead)
    }

    /// Reads a piece, or what of it comes before there is a QEMU. False where there is no room, or the stream is lost: who reads on sees that.
    fn piece(&mut self, gate: &Gate) -> bool {
        if !self.budget.take() {
            return false;
        }
        let (mut piece, mut filled) = (vec![0; PIECE_BYTES], 0);
        let read = loop {
            self.reader.set_deadline(Some(Instant::now() + LOOK_EVERY));
            match self.reader.read_resumable(&mut piece, &mut filled) {
                Ok(()) => break true,
                Err(why) if !why.is_timeout() => break false,
                Err(_) if gate.get().is_some() => break true,
                Err(_) => {}
            }
        };
        self.reader.set_deadline(None);
        piece.truncate(filled);
        self.pieces.push_back(piece);
        read
    }

    /// See [`Reader::read_exact`].
    pub(crate) fn read_exact(&mut self, mut buffer: &mut [u8]) -> Result<(), TransportError> {
        while let Some(piece) = self.pieces.front() {
            if self.used == piece.len() {
                self.pieces.pop_front();
                self.budget.give();
                self.used = 0;
                continue;
            }
            if buffer.is_empty() {
                return Ok(());
            }
            let take = (piece.len() - self.used).min(buffer.len());
            buffer[..take].copy_from_slice(&piece[self.used..][..take]);
            self.used += take;
            buffer = &mut buffer[take..];
        }
        if buffer.is_empty() { Ok(()) } else { self.reader.read_exact(buffer) }
    }

    /// See [`Reader::set_deadline`].
    pub(crate) fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.reader.set_deadline(deadline);
    }

    /// See [`Reader::shutdown_handle`].
    pub(crate) fn shutdown_handle(&self) -> Shutdown {
        self.reader.shutdown_handle()
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.pieces.iter().for_each(|_| self.budget.give());
    }
}
