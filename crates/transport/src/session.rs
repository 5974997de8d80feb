//! One socket and its TLS state, shared by a reader and a writer.
//!
//! The socket is non-blocking and every wait is a poll(2) with a deadline, outside the lock. The lock is held
//! only to turn bytes into bytes, or for a send that does not wait, so a reader that waits for its peer never
//! keeps a writer from sending. Ciphertext leaves through the TLS state's own queue under that lock, whoever
//! produced it: records reach the wire in the order of their sequence numbers.

use std::io::{self, IoSlice, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::{GetSockOpt, SetSockOpt};
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;
use socket2::{SockRef, TcpKeepalive};

use crate::{Operation, Result, TransportError};

/// How long data may stay unacknowledged before the kernel gives the connection up (TCP_USER_TIMEOUT, tcp(7)).
///
/// Well above any pause of a loaded host, well below the quarter of an hour of the kernel's default. It also
/// ends a connection whose peer reads nothing for that long while we have data for it.
pub const UNANSWERED_MAX: Duration = Duration::from_secs(20);

/// How long a connection may be silent before the kernel asks whether the peer is still there.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);

/// Time between two such questions: several fit into [`UNANSWERED_MAX`], so that one lost packet decides nothing.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);

/// Slices that one system call takes (`IOV_MAX`).
const SLICES_PER_CALL: usize = 1024;

/// One record's plaintext (RFC 8446 section 5.1).
pub(crate) const RECORD_SIZE_MAX: usize = 16 * 1024;

sockopt_impl!(
    /// TCP_INFO.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    libc::tcp_info
);

sockopt_impl!(
    /// SO_RCVLOWAT, which the libraries do not know.
    ReceiveLowWater,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    usize
);

/// Bytes on the wire, ciphertext and record headers included, readable from any thread.
#[derive(Clone, Debug, Default)]
pub struct Counters(Arc<Totals>);

#[derive(Debug, Default)]
struct Totals {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Counters {
    /// Bytes given to the kernel since the connection was made.
    pub fn bytes_sent(&self) -> u64 {
        self.0.sent.load(Ordering::Relaxed)
    }

    /// Bytes taken from the kernel since the connection was made.
    pub fn bytes_received(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }
}

/// Ends a connection from any thread: blocked readers and writers return at once with `ShutDown`.
///
/// It does not keep the connection alive, and does nothing when that is gone.
#[derive(Clone, Debug)]
pub struct Shutdown(Weak<Session>);

impl Shutdown {
    /// Shuts the connection down. Data not yet sent is lost; the peer sees a connection that was cut.
    pub fn shutdown(&self) {
        if let Some(session) = self.0.upgrade() {
            session.shut_down();
        }
    }

    /// How long data may stay unacknowledged, or unread by the peer, in the place of [`UNANSWERED_MAX`]. What the kernel refuses stays as it was.
    pub fn set_unanswered_max(&self, max: Duration) {
        if let Some(session) = self.0.upgrade() {
            drop(SockRef::from(&session.socket).set_tcp_user_timeout(Some(max)));
        }
    }
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct Session {
    socket: TcpStream,
    tls: Mutex<rustls::Connection>,
    counters: Counters,
    is_shut: AtomicBool,
    peer: String,
    peer_addr: SocketAddr,
    local_addr: SocketAddr,
}

/// Whether everything that was encrypted has reached the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transmitted {
    All,
    SocketFull,
}

impl Session {
    /// Prepares the socket; nothing is sent yet. `name` is the host name we expect, for error messages.
    pub(crate) fn new(socket: TcpStream, tls: rustls::Connection, name: Option<&str>) -> Result<Arc<Self>> {
        let failed = |source| TransportError::from_socket("a new connection", Operation::Connect, source);
        let peer_addr = socket.peer_addr().map_err(failed)?;
        let local_addr = socket.local_addr().map_err(failed)?;
        configure(&socket).map_err(failed)?;
        let peer = match name {
            Some(name) => format!("{name} ({peer_addr})"),
            None => peer_addr.to_string(),
        };
        Ok(Arc::new(Self {
            socket,
            tls: Mutex::new(tls),
            counters: Counters::default(),
            is_shut: AtomicBool::new(false),
            peer,
            peer_addr,
            local_addr,
        }))
    }

    pub(crate) fn shutdown_handle(self: &Arc<Self>) -> Shutdown {
        Shutdown(Arc::downgrade(self))
    }

    /// A panic under the lock cannot leave TLS half-changed in a way that its own checks would not find.
    pub(crate) fn lock(&self) -> MutexGuard<'_, rustls::Connection> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    pub(crate) fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn set_send_buffer(&self, bytes: usize) -> Result<()> {
        SockRef::from(&self.socket)
            .set_send_buffer_size(bytes)
            .map_err(|source| TransportError::from_socket(&self.peer, Operation::Write, source))
    }

    /// How long the kernel finds that data takes to be acknowledged, smoothed (TCP_INFO, tcp(7)).
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        let info = TcpInfo.get(&self.socket).ok()?;
        Some(Duration::from_micros(info.tcpi_rtt.into()))
    }

    /// The longest segment (TCP_INFO's `tcpi_snd_mss`, tcp(7)).
    pub(crate) fn segment_bytes(&self) -> Option<usize> {
        Some(TcpInfo.get(&self.socket).ok()?.tcpi_snd_mss as usize)
    }

    /// Wakes a waiting reader only when so many bytes are there (SO_RCVLOWAT, socket(7)), or the stream ends.
    pub(crate) fn set_receive_low_water(&self, bytes: usize) -> io::Result<()> {
        Ok(ReceiveLowWater.set(&self.socket, &bytes)?)
    }

    pub(crate) fn shut_down(&self) {
        self.is_shut.store(true, Ordering::SeqCst);
        // An error means that the connection is over already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Tells the peer that no more will come; the other direction stays open.
    pub(crate) fn end_sending(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
    }

    /// Waits until the socket is ready, the deadline passes or the connection is shut down.
    pub(crate) fn wait(
        &self,
        ready: PollFlags,
        deadline: Option<Instant>,
        operation: Operation,
    ) -> Result<()> {
        loop {
            self.check_shut()?;
            let timeout = self.remaining(deadline, operation)?;
            let mut fds = [PollFd::new(&self.socket, ready)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return self.check_shut(),
                Err(errno) => {
                    return Err(TransportError::from_socket(&self.peer, operation, errno.into()));
                }
            }
        }
    }

    fn remaining(&self, deadline: Option<Instant>, operation: Operation) -> Result<Option<Timespec>> {
        let Some(deadline) = deadline else { return Ok(None) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.timed_out(operation));
        }
        let seconds = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
        Ok(Some(Timespec { tv_sec: seconds, tv_nsec: left.subsec_nanos().into() }))
    }

    /// Fails when the deadline has passed, however much a peer sends meanwhile.
    pub(crate) fn check_deadline(&self, deadline: Option<Instant>, operation: Operation) -> Result<()> {
        self.remaining(deadline, operation).map(drop)
    }

    fn timed_out(&self, operation: Operation) -> TransportError {
        TransportError::TimedOut { peer: self.peer.clone(), operation }
    }

    pub(crate) fn check_shut(&self) -> Result<()> {
        if self.is_shut.load(Ordering::SeqCst) {
            return Err(TransportError::ShutDown { peer: self.peer.clone() });
        }
        Ok(())
    }

    /// Takes what the kernel has; `None` if that is nothing yet, `Some(0)` at the end of the stream.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        self.check_shut()?;
        loop {
            return match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((_, count)) => {
                    self.counters.0.received.fetch_add(count as u64, Ordering::Relaxed);
                    Ok(Some(count))
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => Ok(None),
                Err(errno) => Err(TransportError::from_socket(&self.peer, Operation::Read, errno.into())),
            };
        }
    }

    /// Gives TLS some ciphertext. Returns how much it took, and how much plaintext it has now.
    pub(crate) fn feed(&self, tls: &mut rustls::Connection, mut wire: &[u8]) -> Result<(usize, usize)> {
        let handshaking = tls.is_handshaking();
        let taken = tls.read_tls(&mut wire).map_err(|source| {
            let source = rustls::Error::General(source.to_string());
            TransportError::Tls { peer: self.peer.clone(), source }
        })?;
        let result = tls.process_new_packets();
        if tls.wants_write() {
            // Answers to key updates and alerts go out when they can; the next write takes what is left.
            let _ = self.transmit(tls);
        }
        match result {
            Ok(state) => Ok((taken, state.plaintext_bytes_to_read())),
            Err(source) => Err(TransportError::from_tls(&self.peer, source, handshaking)),
        }
    }

    /// Hands encrypted records to the kernel until none is left or it takes no more. Never waits.
    pub(crate) fn transmit(&self, tls: &mut rustls::Connection) -> Result<Transmitted> {
        while tls.wants_write() {
            match tls.write_tls(&mut Outlet(self)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Transmitted::SocketFull);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.check_shut()?;
                    return Err(TransportError::from_socket(&self.peer, Operation::Write, error));
                }
            }
        }
        Ok(Transmitted::All)
    }

    /// Transmits everything, waiting for room as long as the deadline allows.
    pub(crate) fn drain(&self, deadline: Option<Instant>, operation: Operation) -> Result<()> {
        loop {
            self.check_shut()?;
            if self.transmit(&mut self.lock())? == Transmitted::All {
                return Ok(());
            }
            self.wait(PollFlags::OUT, deadline, operation)?;
        }
    }
}

impl Session {
    /// Hands bytes to the kernel as they are, waiting for room as long as the deadline allows.
    pub(crate) fn send_in_clear(&self, slices: &[IoSlice<'_>], deadline: Option<Instant>) -> Result<()> {
        let mut outlet = Outlet(self);
        let mut all: Vec<IoSlice<'_>> = slices.iter().copied().filter(|s| !s.is_empty()).collect();
        let mut rest = &mut all[..];
        while !rest.is_empty() {
            let some = rest.len().min(SLICES_PER_CALL);
            match outlet.write_vectored(&rest[..some]) {
                Ok(count) => IoSlice::advance_slices(&mut rest, count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, deadline, Operation::Write)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.check_shut()?;
                    return Err(TransportError::from_socket(&self.peer, Operation::Write, error));
                }
            }
        }
        self.check_shut()
    }
}

/// The socket as TLS sees it: vectored sends that neither wait nor raise SIGPIPE.
struct Outlet<'a>(&'a Session);

impl Write for Outlet<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = (rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL).bits();
        let count = SockRef::from(&self.0.socket).send_vectored_with_flags(slices, flags.cast_signed())?;
        self.0.counters.0.sent.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn configure(socket: &TcpStream) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    let options = SockRef::from(socket);
    options.set_tcp_user_timeout(Some(UNANSWERED_MAX))?;
    options
        .set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL))
}
