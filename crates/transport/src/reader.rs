//! The receiving half of a connection.
//!
//! Ciphertext is taken from the socket in large pieces without the lock, then decrypted under it straight into
//! the caller's buffer as far as that reaches.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;

use crate::session::{RECORD_SIZE_MAX, Session};
use crate::writer::Cover;
use crate::{Counters, Operation, Result, Shutdown, TransportError};

/// How much one receive asks for: sixteen full records, so that the system call does not weigh.
const WIRE_BUFFER_SIZE: usize = 256 * 1024;

/// For how much of what is known to come a reader is not woken before it is there: a link that is slower than we are brings
/// a few kilobytes at a time, and each waking costs more than copying them.
const LOW_WATER_MAX: usize = 256 * 1024;

/// Receives. One thread may read while another writes.
#[derive(Debug)]
pub struct Reader {
    session: Arc<Session>,
    wire: Box<[u8]>,
    start: usize,
    end: usize,
    deadline: Option<Instant>,
    /// An error found behind plaintext that had to be delivered first.
    deferred: Option<TransportError>,
    is_torn: bool,
    cover: Cover,
    /// How much must still come for what is being read.
    wanted: usize,
    /// What the socket knows of it.
    low_water: usize,
}

/// What TLS has for the caller.
enum Plaintext {
    Some(usize),
    NoneYet,
    End,
}

impl Reader {
    pub(crate) fn new(session: Arc<Session>) -> Self {
        let wire = vec![0; WIRE_BUFFER_SIZE].into_boxed_slice();
        Self {
            session,
            wire,
            start: 0,
            end: 0,
            deadline: None,
            deferred: None,
            is_torn: false,
            cover: Cover::Encrypted,
            wanted: 0,
            low_water: 1,
        }
    }

    /// Bounds every later read. `None` waits for as long as the peer is there.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Reads at least one byte, and as much as is there; 0 after the peer closed properly.
    ///
    /// After `TimedOut` nothing is lost: read again.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.check()?;
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.cover == Cover::Clear {
            return self.receive_into(buffer);
        }
        if let Some(count) = self.decrypt_into(buffer)? {
            return Ok(count);
        }
        loop {
            self.fill()?;
            if let Some(count) = self.decrypt_into(buffer)? {
                return Ok(count);
            }
            // Records without content must not keep us here beyond the deadline.
            self.session.check_deadline(self.deadline, Operation::Read)?;
        }
    }

    /// Fills the whole buffer. A peer that closes before that gives `Closed`.
    ///
    /// `TimedOut` is given only when nothing was taken; after a part it is `Torn`, and the reader is spent: use
    /// [`Reader::read_resumable`] where a deadline may pass in the middle.
    pub fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        match self.read_resumable(buffer, &mut filled) {
            Err(error) if error.is_timeout() && filled > 0 => {
                self.is_torn = true;
                Err(self.torn())
            }
            result => result,
        }
    }

    /// Fills the buffer from `filled` on, and moves `filled` along: after `TimedOut` call it again with both.
    pub fn read_resumable(&mut self, buffer: &mut [u8], filled: &mut usize) -> Result<()> {
        while let Some(rest) = buffer.get_mut(*filled..).filter(|rest| !rest.is_empty()) {
            self.wanted = rest.len();
            let read = self.read(rest);
            self.wanted = 0;
            match read? {
                0 => return Err(TransportError::Closed { peer: self.session.peer().to_owned() }),
                count => *filled += count,
            }
        }
        Ok(())
    }

    /// From now on bytes come as they are. The peer must have been silent since the last that was read.
    pub(crate) fn uncover(&mut self) -> Result<()> {
        let pending = self.session.lock().process_new_packets().map_or(1, |s| s.plaintext_bytes_to_read());
        if self.start != self.end || pending > 0 {
            return Err(TransportError::Torn { peer: self.session.peer().to_owned() });
        }
        self.cover = Cover::Clear;
        Ok(())
    }

    /// Straight into the caller's buffer. Without TLS nobody says goodbye: the end of the stream is a cut.
    fn receive_into(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            match self.session.receive(buffer)? {
                Some(0) => {
                    self.session.check_shut()?;
                    return Err(TransportError::Truncated { peer: self.session.peer().to_owned() });
                }
                Some(count) => return Ok(count),
                None => self.wait(self.wanted, Operation::Read)?,
            }
        }
    }

    /// Waits until so much can be taken, or there is something to be told. It must be sure to come.
    fn wait(&mut self, wanted: usize, operation: Operation) -> Result<()> {
        let low_water = wanted.clamp(1, LOW_WATER_MAX);
        // Where the kernel refuses, we are woken more often.
        if low_water != self.low_water && self.session.set_receive_low_water(low_water).is_ok() {
            self.low_water = low_water;
        }
        self.session.wait(PollFlags::IN, self.deadline, operation)
    }

    /// Ends the connection from any thread.
    pub fn shutdown_handle(&self) -> Shutdown {
        self.session.shutdown_handle()
    }

    /// Bytes on the wire, readable from any thread.
    pub fn counters(&self) -> Counters {
        self.session.counters().clone()
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// Runs the handshake: until `is_settled`, everything that TLS wants to say is said, and its answers are fed to it.
    pub(crate) fn handshake(
        &mut self,
        deadline: Instant,
        is_settled: impl Fn(&rustls::Connection, usize) -> bool,
    ) -> Result<()> {
        self.deadline = Some(deadline);
        let mut plaintext = 0;
        loop {
            while self.start < self.end && !is_settled(&self.session.lock(), plaintext) {
                plaintext = self.feed()?;
            }
            self.session.drain(Some(deadline), Operation::Handshake)?;
            if is_settled(&self.session.lock(), plaintext) {
                self.deadline = None;
                return Ok(());
            }
            self.session.check_deadline(Some(deadline), Operation::Handshake)?;
            self.receive(Operation::Handshake)?;
            if self.start == self.end {
                return Err(TransportError::Truncated { peer: self.session.peer().to_owned() });
            }
        }
    }

    /// Throws away what comes until the peer closes or the deadline passes, so that closing resets nothing.
    pub(crate) fn discard_until(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
        while self.session.check_deadline(self.deadline, Operation::Close).is_ok() {
            if self.receive(Operation::Close).is_err() || self.end == 0 {
                return;
            }
        }
    }

    fn check(&mut self) -> Result<()> {
        self.session.check_shut()?;
        if self.is_torn {
            return Err(self.torn());
        }
        self.deferred.take().map_or(Ok(()), Err)
    }

    fn torn(&self) -> TransportError {
        TransportError::Torn { peer: self.session.peer().to_owned() }
    }

    /// Decrypts what is there into the buffer; `None` when more ciphertext is needed before there is any.
    fn decrypt_into(&mut self, buffer: &mut [u8]) -> Result<Option<usize>> {
        let session = Arc::clone(&self.session);
        let mut tls = session.lock();
        let mut filled = 0;
        while filled < buffer.len() {
            let step = take_plaintext(&mut tls, &mut buffer[filled..], session.peer());
            match step {
                Ok(Plaintext::Some(count)) => filled += count,
                Ok(Plaintext::End) => return Ok(Some(filled)),
                Ok(Plaintext::NoneYet) if self.start == self.end => break,
                Ok(Plaintext::NoneYet) => match session.feed(&mut tls, &self.wire[self.start..self.end]) {
                    // TLS takes nothing more after a close_notify.
                    Ok((0, _)) => self.start = self.end,
                    Ok((taken, _)) => self.start += taken,
                    Err(error) => return self.deliver_first(filled, error),
                },
                Err(error) => return self.deliver_first(filled, error),
            }
        }
        Ok((filled > 0).then_some(filled))
    }

    fn deliver_first(&mut self, filled: usize, error: TransportError) -> Result<Option<usize>> {
        self.start = self.end;
        if filled == 0 {
            return Err(error);
        }
        self.deferred = Some(error);
        Ok(Some(filled))
    }

    fn feed(&mut self) -> Result<usize> {
        let (taken, plaintext) =
            self.session.feed(&mut self.session.lock(), &self.wire[self.start..self.end])?;
        self.start = if taken == 0 { self.end } else { self.start + taken };
        Ok(plaintext)
    }

    /// Gets more ciphertext, or tells TLS that there is no more.
    fn fill(&mut self) -> Result<()> {
        self.receive(Operation::Read)?;
        if self.end == 0 {
            // Reading nothing is how TLS learns of the end; it knows whether that was announced.
            let _ = self.session.lock().read_tls(&mut io::empty());
        }
        Ok(())
    }

    fn receive(&mut self, operation: Operation) -> Result<()> {
        (self.start, self.end) = (0, 0);
        loop {
            if let Some(count) = self.session.receive(&mut self.wire)? {
                // A shutdown of our own also looks like the end of the stream.
                self.session.check_shut()?;
                self.end = count;
                return Ok(());
            }
            // A part of it may wait in a record of which TLS has the beginning already.
            self.wait(self.wanted.saturating_sub(2 * RECORD_SIZE_MAX), operation)?;
        }
    }
}

fn take_plaintext(tls: &mut rustls::Connection, buffer: &mut [u8], peer: &str) -> Result<Plaintext> {
    match tls.reader().read(buffer) {
        Ok(0) => Ok(Plaintext::End),
        Ok(count) => Ok(Plaintext::Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Plaintext::NoneYet),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(TransportError::Truncated { peer: peer.to_owned() })
        }
        Err(error) => Err(TransportError::from_socket(peer, Operation::Read, error)),
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(Self::read(self, buffer)?)
    }
}
