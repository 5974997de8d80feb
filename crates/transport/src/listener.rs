//! Accepts peers: one thread each, within limits.
//!
//! Anyone can open a TCP connection, so what costs us something before the certificates are checked is bounded:
//! the number of handshakes at once, and the time each may take. Past the limit, new connections wait in the
//! kernel's backlog instead of in ours, and the oldest handshake makes room for them if it is slow: a thousand
//! connections that say nothing keep nobody out. Verified peers are bounded as well, since each holds a thread.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tracing::{debug, error, warn};

use crate::session::Session;
use crate::{Connection, Endpoint, Result, Shutdown, TransportError};

/// Handshakes at once: more than a group of hosts starts together, few enough that their threads cost nothing.
pub const MAX_HANDSHAKES: usize = 64;

/// Verified connections at once: some tens of migrations with their streams.
pub const MAX_CONNECTIONS: usize = 1024;

/// How long a peer may take to prove who it is: a handshake is two round trips.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// How long a handshake is let alone while others wait for its place: far more than its two round trips take, and so
/// little that a thousand silent connections are gone before a host that waits behind them gives up (5 s).
const HANDSHAKE_PATIENCE: Duration = Duration::from_millis(200);

/// How long to leave the kernel alone after it could not accept, mostly for want of descriptors (EMFILE).
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What a server bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Handshakes at once; more wait in the kernel's backlog.
    pub handshakes: usize,
    /// Verified connections at once; more are closed at once.
    pub connections: usize,
    /// How long one handshake may take, however slowly it comes.
    pub handshake_deadline: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshakes: MAX_HANDSHAKES,
            connections: MAX_CONNECTIONS,
            handshake_deadline: HANDSHAKE_DEADLINE,
        }
    }
}

/// A bound TCP port.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    local_addr: SocketAddr,
}

impl Listener {
    /// Listens on `host:port`; port 0 takes a free one.
    pub fn bind(addr: &str) -> Result<Self> {
        let failed = |source| TransportError::Bind { addr: addr.to_owned(), source };
        let addresses = addr.to_socket_addrs().map_err(failed)?.collect::<Vec<_>>();
        let socket = TcpListener::bind(addresses.as_slice()).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let local_addr = socket.local_addr().map_err(failed)?;
        Ok(Self { socket, local_addr })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Runs `handler` in a thread of its own for each verified peer, until the handle is stopped or dropped.
    ///
    /// A handler that panics ends its own connection only.
    pub fn serve<H>(self, endpoint: Endpoint, limits: Limits, handler: H) -> Result<ServerHandle>
    where
        H: Fn(Connection) + Send + Sync + 'static,
    {
        let failed = |source| TransportError::Local { what: "serve peers", source };
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
        let local_addr = self.local_addr;
        let server = Arc::new(Server {
            endpoint,
            limits,
            handler: Box::new(handler),
            wake,
            is_stopping: AtomicBool::new(false),
            peers: Mutex::default(),
            changed: Condvar::new(),
            stats: Stats::default(),
        });
        let running = Arc::clone(&server);
        let acceptor = thread::Builder::new()
            .name("accept".into())
            .spawn(move || running.accept_all(&self.socket))
            .map_err(failed)?;
        Ok(ServerHandle { server, acceptor: Some(acceptor), local_addr })
    }
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct ServerHandle {
    server: Arc<Server>,
    acceptor: Option<JoinHandle<()>>,
    local_addr: SocketAddr,
}

impl ServerHandle {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// What happened so far.
    pub fn stats(&self) -> ServerStats {
        let peers = self.server.lock();
        ServerStats {
            handshakes: peers.handshakes.len(),
            connections: peers.connections,
            accepted: self.server.stats.accepted.load(Ordering::Relaxed),
            refused: self.server.stats.refused.load(Ordering::Relaxed),
            accept_failures: self.server.stats.accept_failures.load(Ordering::Relaxed),
        }
    }

    /// Accepts no more, shuts all connections down and waits until every handler has returned.
    ///
    /// A handler must not call it for its own server: it would wait for itself.
    pub fn stop(mut self) {
        self.stop_and_join();
    }

    fn stop_and_join(&mut self) {
        let Some(acceptor) = self.acceptor.take() else { return };
        self.server.stop();
        if acceptor.join().is_err() {
            error!("the thread that accepts peers had panicked");
        }
        self.server.join_all();
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stop_and_join();
    }
}

/// What a server is doing and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerStats {
    /// Handshakes under way.
    pub handshakes: usize,
    /// Verified peers connected.
    pub connections: usize,
    /// Peers verified since the start.
    pub accepted: u64,
    /// Connections that failed the handshake or a limit since the start.
    pub refused: u64,
    /// How often the kernel could not accept, mostly for want of descriptors.
    pub accept_failures: u64,
}

type Handler = dyn Fn(Connection) + Send + Sync;

struct Server {
    endpoint: Endpoint,
    limits: Limits,
    handler: Box<Handler>,
    wake: OwnedFd,
    is_stopping: AtomicBool,
    peers: Mutex<Peers>,
    changed: Condvar,
    stats: Stats,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("limits", &self.limits).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Stats {
    accepted: AtomicU64,
    refused: AtomicU64,
    accept_failures: AtomicU64,
}

#[derive(Debug, Default)]
struct Peers {
    /// When each began, by id: the first one is the oldest.
    handshakes: BTreeMap<u64, Instant>,
    connections: usize,
    next_id: u64,
    /// What must be shut down and joined when the server stops.
    threads: HashMap<u64, Peer>,
    /// Threads that are about to end.
    ended: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Peer {
    shutdown: Shutdown,
    thread: Option<JoinHandle<()>>,
}

impl Peers {
    /// Counts a handshake, so that it can be shut down from now on.
    fn register(&mut self, shutdown: Shutdown) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.handshakes.insert(id, Instant::now());
        self.threads.insert(id, Peer { shutdown, thread: None });
        id
    }

    /// Ends the oldest handshake if it is slow. Returns when to look again.
    fn make_room(&self) -> Duration {
        let Some((id, began)) = self.handshakes.first_key_value() else { return HANDSHAKE_PATIENCE };
        match HANDSHAKE_PATIENCE.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
            Some(left) => left,
            None => {
                self.threads.get(id).into_iter().for_each(|peer| peer.shutdown.shutdown());
                HANDSHAKE_PATIENCE
            }
        }
    }

    /// Keeps a thread until it can be joined, which may be now.
    fn adopt(&mut self, id: u64, thread: JoinHandle<()>) {
        match self.threads.get_mut(&id) {
            Some(peer) => peer.thread = Some(thread),
            None => self.ended.push(thread),
        }
    }
}

impl Server {
    fn lock(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::SeqCst)
    }

    fn stop(&self) {
        self.is_stopping.store(true, Ordering::SeqCst);
        // It only fails when it is readable already, which is what is wanted.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        // Under the lock, or the acceptor could miss it between its check and its wait.
        let peers = self.lock();
        self.changed.notify_all();
        for peer in peers.threads.values() {
            peer.shutdown.shutdown();
        }
    }

    /// No thread is started any more when this runs.
    fn join_all(&self) {
        let mut peers = self.lock();
        for peer in peers.threads.values() {
            peer.shutdown.shutdown();
        }
        while !peers.threads.is_empty() {
            peers = self.changed.wait(peers).unwrap_or_else(PoisonError::into_inner);
        }
        let ended = std::mem::take(&mut peers.ended);
        drop(peers);
        join(ended);
    }

    fn accept_all(self: &Arc<Self>, socket: &TcpListener) {
        while self.wait_for_peer(socket) && self.wait_for_slot() {
            let ended = std::mem::take(&mut self.lock().ended);
            join(ended);
            match socket.accept() {
                Ok((stream, addr)) => self.start(stream, addr),
                Err(error) if is_about_that_peer(&error) => {}
                Err(error) => {
                    self.stats.accept_failures.fetch_add(1, Ordering::Relaxed);
                    warn!(%error, "cannot accept connections for the moment");
                    self.pause();
                }
            }
        }
    }

    /// Waits until another handshake is allowed, for a peer that waits. False when the server stops.
    fn wait_for_slot(&self) -> bool {
        let mut peers = self.lock();
        while peers.handshakes.len() >= self.limits.handshakes.max(1) && !self.is_stopping() {
            let wait = peers.make_room();
            peers = self.changed.wait_timeout(peers, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        !self.is_stopping()
    }

    fn wait_for_peer(&self, socket: &TcpListener) -> bool {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        if let Err(errno) = poll(&mut fds, None)
            && errno != rustix::io::Errno::INTR
        {
            warn!(error = %io::Error::from(errno), "cannot wait for connections for the moment");
            self.pause();
        }
        !self.is_stopping()
    }

    /// Sleeps, but not when the server stops.
    fn pause(&self) {
        let mut fds = [PollFd::new(&self.wake, PollFlags::IN)];
        if poll(&mut fds, Some(&ACCEPT_PAUSE)).is_err() {
            thread::yield_now();
        }
    }

    fn start(self: &Arc<Self>, stream: TcpStream, addr: SocketAddr) {
        let session = match self.endpoint.accept_session(stream) {
            Ok(session) => session,
            Err(error) => return self.refuse(addr, &error),
        };
        let id = self.lock().register(session.shutdown_handle());
        let place = Place { server: Arc::clone(self), id, stage: Stage::Handshake };
        match thread::Builder::new().name("peer".into()).spawn(move || place.run(session, addr)) {
            Ok(thread) => self.lock().adopt(id, thread),
            // The place was dropped with the closure, and so given back.
            Err(source) => {
                self.refuse(addr, &TransportError::Local { what: "start a thread", source });
                self.pause();
            }
        }
    }

    fn refuse(&self, addr: SocketAddr, error: &TransportError) {
        self.stats.refused.fetch_add(1, Ordering::Relaxed);
        if self.is_stopping() {
            return;
        }
        let cause = std::error::Error::source(error).map(ToString::to_string);
        warn!(%addr, %error, cause, "refused a connection");
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Handshake,
    Connected,
}

/// One peer's place within the limits; it is given back however the thread ends.
struct Place {
    server: Arc<Server>,
    id: u64,
    stage: Stage,
}

impl Place {
    fn run(mut self, session: Arc<Session>, addr: SocketAddr) {
        let deadline = Instant::now() + self.server.limits.handshake_deadline;
        let connection = match Connection::establish(session, deadline) {
            Ok(connection) => connection,
            Err(error) => return self.server.refuse(addr, &error),
        };
        if !self.promote() {
            warn!(%addr, peer = %connection.peer(), "refused a connection: too many are open");
            self.server.stats.refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
        debug!(%addr, peer = %connection.peer(), "connected");
        let server = Arc::clone(&self.server);
        // Caught here so that the place is given back in order; the hook has printed it.
        if catch_unwind(AssertUnwindSafe(|| (server.handler)(connection))).is_err() {
            error!(%addr, "the thread that served a peer panicked");
        }
    }

    /// From the handshakes to the connections, if there is room and the server still runs.
    fn promote(&mut self) -> bool {
        let server = Arc::clone(&self.server);
        let mut peers = server.lock();
        if peers.connections >= server.limits.connections || server.is_stopping() {
            return false;
        }
        peers.handshakes.remove(&self.id);
        peers.connections += 1;
        self.stage = Stage::Connected;
        server.stats.accepted.fetch_add(1, Ordering::Relaxed);
        server.changed.notify_all();
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut peers = self.server.lock();
        let Some(peer) = peers.threads.remove(&self.id) else { return };
        match self.stage {
            Stage::Handshake => drop(peers.handshakes.remove(&self.id)),
            Stage::Connected => peers.connections -= 1,
        }
        peers.ended.extend(peer.thread);
        self.server.changed.notify_all();
    }
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        // A panic was reported where it was caught.
        let _ = thread.join();
    }
}

/// Errors of accept(2) that the connection that was taken caused, not we.
fn is_about_that_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock
            | io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}
