//! A connection whose peer has proved who it is.
//!
//! There is no other kind: a value of this type exists only after both certificates were checked. Where both ends want it, bulk
//! data in one direction then leaves TLS ([`Connection::send_in_clear`]): who the peer is stays proved, what it sends is
//! neither secret nor protected any more.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustls::pki_types::CertificateDer;

use crate::session::Session;
use crate::{Counters, Operation, Reader, Result, Shutdown, TransportError, Writer, pki};

/// How long a refused peer gets to fetch our reason before the socket closes: closing with unread data resets
/// the connection, and a reset overtakes the alert that says why.
const REFUSAL_LINGER: Duration = Duration::from_millis(250);

/// A host's DNS name, lower case, from a certificate that our authority signed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerName(String);

impl PeerName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for PeerName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl PartialEq<str> for PeerName {
    fn eq(&self, other: &str) -> bool {
        self.0.eq_ignore_ascii_case(other)
    }
}

impl PartialEq<&str> for PeerName {
    fn eq(&self, other: &&str) -> bool {
        self == *other
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The receiver's word that it reads the clear from now on.
const CLEAR: u8 = 0xc1;

/// An authenticated, encrypted stream in both directions.
///
/// Dropping it cuts it, which the peer sees as `Truncated`; [`Connection::close`] ends it properly.
#[derive(Debug)]
pub struct Connection {
    reader: Reader,
    writer: Writer,
    names: Vec<PeerName>,
}

impl Connection {
    /// Runs the handshake and learns who the peer is.
    pub(crate) fn establish(session: Arc<Session>, deadline: Instant) -> Result<Self> {
        let mut reader = Reader::new(Arc::clone(&session));
        if let Err(error) = reader.handshake(deadline, is_settled) {
            refuse(&mut reader, &error, deadline);
            return Err(error);
        }
        let names = peer_names(&session)?;
        Ok(Self { reader, writer: Writer::new(session), names })
    }

    /// The peer's host name: the first DNS name of its certificate.
    pub fn peer(&self) -> &PeerName {
        // `peer_names` refuses certificates without a name.
        &self.names[0]
    }

    /// All DNS names of the peer's certificate.
    pub fn peer_names(&self) -> &[PeerName] {
        &self.names
    }

    /// Where the peer connected from or was found.
    pub fn peer_addr(&self) -> SocketAddr {
        self.reader.session().peer_addr()
    }

    /// Our end.
    pub fn local_addr(&self) -> SocketAddr {
        self.reader.session().local_addr()
    }

    /// Ends the connection from any thread: blocked reads and writes return at once.
    pub fn shutdown_handle(&self) -> Shutdown {
        self.reader.shutdown_handle()
    }

    /// Bytes on the wire, readable from any thread.
    pub fn counters(&self) -> Counters {
        self.reader.counters()
    }

    /// Bytes given to the kernel, handshake included.
    pub fn bytes_sent(&self) -> u64 {
        self.reader.session().counters().bytes_sent()
    }

    /// Bytes taken from the kernel, handshake included.
    pub fn bytes_received(&self) -> u64 {
        self.reader.session().counters().bytes_received()
    }

    /// Sets the kernel's send buffer. Small ones keep control over what is under way; without a call the kernel tunes it.
    pub fn set_send_buffer(&self, bytes: usize) -> Result<()> {
        self.reader.session().set_send_buffer(bytes)
    }

    /// How long what is sent takes to be acknowledged, as the kernel finds it just now: what queues on the way is part of it.
    pub fn round_trip(&self) -> Option<Duration> {
        self.reader.session().round_trip()
    }

    /// How many bytes the kernel sends in one segment at most, as it finds just now.
    pub fn segment_bytes(&self) -> Option<usize> {
        self.reader.session().segment_bytes()
    }

    /// Waits until the kernel takes more to send.
    pub fn wait_for_room(&self, deadline: Option<Instant>) -> Result<()> {
        self.reader.session().wait(PollFlags::OUT, deadline, Operation::Write)
    }

    /// Bounds every later read, write and flush. `None` waits for as long as the peer is there.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.reader.set_deadline(deadline);
        self.writer.set_deadline(deadline);
    }

    /// Bounds every later read.
    pub fn set_read_deadline(&mut self, deadline: Option<Instant>) {
        self.reader.set_deadline(deadline);
    }

    /// Bounds every later write and flush.
    pub fn set_write_deadline(&mut self, deadline: Option<Instant>) {
        self.writer.set_deadline(deadline);
    }

    /// See [`Reader::read`].
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.reader.read(buffer)
    }

    /// See [`Reader::read_exact`].
    pub fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.reader.read_exact(buffer)
    }

    /// See [`Reader::read_resumable`].
    pub fn read_resumable(&mut self, buffer: &mut [u8], filled: &mut usize) -> Result<()> {
        self.reader.read_resumable(buffer, filled)
    }

    /// See [`Writer::write_all`].
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes)
    }

    /// See [`Writer::write_vectored`].
    pub fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> Result<()> {
        self.writer.write_vectored(slices)
    }

    /// See [`Writer::flush`].
    pub fn flush(&mut self) -> Result<()> {
        self.writer.flush()
    }

    /// Leaves TLS for what we send, once the peer has said ([`Connection::receive_in_clear`]) that it expects that.
    ///
    /// Whoever can read the network sees all that follows, and whoever can write to it can change it. Reading stays encrypted.
    pub fn send_in_clear(&mut self) -> Result<()> {
        self.flush()?;
        let mut word = [0];
        self.read_exact(&mut word)?;
        match word {
            [CLEAR] => self.writer.uncover(),
            _ => Err(TransportError::Torn { peer: self.reader.session().peer().to_owned() }),
        }
    }

    /// Leaves TLS for what we receive, and tells the peer so, which has waited for it ([`Connection::send_in_clear`]) since its
    /// last byte that was read here.
    pub fn receive_in_clear(&mut self) -> Result<()> {
        self.reader.uncover()?;
        self.write_all(&[CLEAR])?;
        self.flush()
    }

    /// Both halves, for two threads. Deadlines set so far stay.
    pub fn split(self) -> (Reader, Writer) {
        (self.reader, self.writer)
    }

    /// Sends what was written, says goodbye and waits until the peer has closed too, or for `within`.
    ///
    /// What the peer still sends is thrown away. Fails only if our own data could not be sent.
    pub fn close(mut self, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        self.writer.set_deadline(Some(deadline));
        self.writer.finish()?;
        self.reader.discard_until(deadline);
        Ok(())
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(self.reader.read(buffer)?)
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(self.writer.flush()?)
    }
}

/// In TLS 1.3 a client is done before the server has looked at its certificate. Our servers send a session ticket
/// right after they have accepted it, so a client that waits for the ticket (or for data) knows that it is welcome.
fn is_settled(tls: &rustls::Connection, plaintext: usize) -> bool {
    match tls {
        _ if tls.is_handshaking() => false,
        rustls::Connection::Client(client) => client.tls13_tickets_received() > 0 || plaintext > 0,
        rustls::Connection::Server(_) => true,
    }
}

/// Lets the peer read the alert that TLS has sent it, if that is why we end.
fn refuse(reader: &mut Reader, error: &TransportError, deadline: Instant) {
    if error.is_timeout() || error.is_disconnect() {
        return;
    }
    reader.session().end_sending();
    reader.discard_until(deadline.min(Instant::now() + REFUSAL_LINGER));
}

fn peer_names(session: &Session) -> Result<Vec<PeerName>> {
    let tls = session.lock();
    let certificate = tls.peer_certificates().and_then(<[CertificateDer<'_>]>::first);
    let names = certificate.and_then(|der| pki::dns_names(der)).unwrap_or_default();
    if names.is_empty() {
        return Err(TransportError::NoPeerName { peer: session.peer().to_owned() });
    }
    Ok(names.into_iter().map(PeerName).collect())
}
