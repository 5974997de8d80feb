//! The sending half of a connection.
//!
//! Large writes go from the caller's memory into records without a stop between; what does not fill a record
//! waits in a small stage, so that many small writes do not become many small records. `flush` sends it.

use std::io::{self, IoSlice, Write};
use std::sync::Arc;
use std::time::Instant;

use crate::session::{RECORD_SIZE_MAX, Session};
use crate::{Counters, Operation, Result, Shutdown, TransportError};

/// How much is encrypted at once, and so the most that waits for the kernel: sixteen records, whose encryption
/// holds the lock for some tens of microseconds.
const BATCH_SIZE_MAX: usize = 16 * RECORD_SIZE_MAX;

/// Slices per batch: TLS walks over all of them for each record, so this bounds that work.
const BATCH_SLICES_MAX: usize = 128;

/// Sends. One thread may write while another reads.
#[derive(Debug)]
pub struct Writer {
    session: Arc<Session>,
    stage: Vec<u8>,
    deadline: Option<Instant>,
    state: State,
    cover: Cover,
}

/// What protects the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cover {
    /// TLS.
    Encrypted,
    /// Nothing: see [`Connection::send_in_clear`](crate::Connection::send_in_clear).
    Clear,
}

/// Whether more may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// A write ended in the middle: what would follow has no known position.
    Torn,
    /// The peer was told that nothing more comes.
    Finished,
}

impl Writer {
    pub(crate) fn new(session: Arc<Session>) -> Self {
        Self {
            session,
            stage: Vec::with_capacity(RECORD_SIZE_MAX),
            deadline: None,
            state: State::Open,
            cover: Cover::Encrypted,
        }
    }

    /// Bounds every later write and flush. `None` waits for as long as the peer is there.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Writes everything; the last part of it may wait for [`Writer::flush`].
    ///
    /// When the deadline passes, an unknown part was sent, and every later write gives `Torn`.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    /// Writes all slices, one after another, like [`Writer::write_all`].
    pub fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> Result<()> {
        self.check()?;
        if self.cover == Cover::Clear {
            self.state = State::Torn;
            self.session.send_in_clear(slices, self.deadline)?;
            self.state = State::Open;
            return Ok(());
        }
        let total = slices.iter().map(|slice| slice.len()).sum::<usize>();
        let whole = (self.stage.len() + total) / RECORD_SIZE_MAX * RECORD_SIZE_MAX;
        let mut rest = Cursor { slices, offset: 0 };
        if whole > 0 {
            self.state = State::Torn;
            self.send(&mut rest, whole)?;
            self.state = State::Open;
        }
        rest.copy_into(&mut self.stage);
        Ok(())
    }

    /// Sends what was written so far. After `TimedOut` it may be repeated.
    pub fn flush(&mut self) -> Result<()> {
        self.check()?;
        if !self.stage.is_empty() {
            let stage = std::mem::take(&mut self.stage);
            let result = self.encrypt(&mut [IoSlice::new(&stage)]);
            self.stage = stage;
            self.stage.clear();
            result?;
        }
        self.session.drain(self.deadline, Operation::Write)
    }

    /// Sends what was written and tells the peer that this was all; reading goes on.
    pub fn finish(&mut self) -> Result<()> {
        self.flush()?;
        if self.cover == Cover::Encrypted {
            self.session.lock().send_close_notify();
            self.session.drain(self.deadline, Operation::Close)?;
        }
        self.session.end_sending();
        self.state = State::Finished;
        Ok(())
    }

    /// From now on bytes go as they are.
    pub(crate) fn uncover(&mut self) -> Result<()> {
        self.flush()?;
        self.cover = Cover::Clear;
        Ok(())
    }

    /// Ends the connection from any thread.
    pub fn shutdown_handle(&self) -> Shutdown {
        self.session.shutdown_handle()
    }

    /// Bytes on the wire, readable from any thread.
    pub fn counters(&self) -> Counters {
        self.session.counters().clone()
    }

    fn check(&self) -> Result<()> {
        self.session.check_shut()?;
        let peer = || self.session.peer().to_owned();
        match self.state {
            State::Open => Ok(()),
            State::Torn => Err(TransportError::Torn { peer: peer() }),
            State::Finished => Err(TransportError::Finished { peer: peer() }),
        }
    }

    /// Sends the stage and then `rest`, together `whole` bytes.
    fn send(&mut self, rest: &mut Cursor<'_, '_>, whole: usize) -> Result<()> {
        let stage = std::mem::take(&mut self.stage);
        let mut left = whole;
        let mut batch = Vec::with_capacity(BATCH_SLICES_MAX.min(rest.slices.len() + 1));
        if !stage.is_empty() {
            batch.push(IoSlice::new(&stage));
            left -= stage.len();
        }
        while left > 0 || !batch.is_empty() {
            let room = BATCH_SIZE_MAX - batch.iter().map(|slice| slice.len()).sum::<usize>();
            left -= rest.gather(room.min(left), &mut batch);
            self.encrypt(&mut batch)?;
            self.session.drain(self.deadline, Operation::Write)?;
            batch.clear();
        }
        self.stage = stage;
        self.stage.clear();
        Ok(())
    }

    fn encrypt(&self, mut batch: &mut [IoSlice<'_>]) -> Result<()> {
        let mut tls = self.session.lock();
        while !batch.is_empty() {
            let taken = tls.writer().write_vectored(batch).map_err(|source| {
                TransportError::from_socket(self.session.peer(), Operation::Write, source)
            })?;
            if taken == 0 {
                return Err(TransportError::Torn { peer: self.session.peer().to_owned() });
            }
            IoSlice::advance_slices(&mut batch, taken);
        }
        Ok(())
    }
}

/// A position in a list of slices.
struct Cursor<'a, 'b> {
    slices: &'b [IoSlice<'a>],
    offset: usize,
}

impl<'b> Cursor<'_, 'b> {
    /// Appends up to `limit` bytes' worth of slices to the batch and moves on. Takes something unless it is at its end.
    fn gather<'v>(&mut self, limit: usize, batch: &mut Vec<IoSlice<'v>>) -> usize
    where
        'b: 'v,
    {
        let mut taken = 0;
        while taken < limit && batch.len() < BATCH_SLICES_MAX {
            let Some((first, others)) = self.slices.split_first() else { break };
            let available = &first[self.offset..];
            let part = &available[..available.len().min(limit - taken)];
            if !part.is_empty() {
                batch.push(IoSlice::new(part));
            }
            taken += part.len();
            self.offset += part.len();
            if self.offset == first.len() {
                (self.slices, self.offset) = (others, 0);
            }
        }
        taken
    }

    fn copy_into(mut self, stage: &mut Vec<u8>) {
        while let Some((first, others)) = self.slices.split_first() {
            stage.extend_from_slice(&first[self.offset..]);
            (self.slices, self.offset) = (others, 0);
        }
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::write_all(self, bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(Self::flush(self)?)
    }
}
