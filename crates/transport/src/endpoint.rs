//! How connections are made: TLS 1.3 only, a certificate on both sides, nothing resumed.
//!
//! The cryptographic provider is named here and nowhere taken from the process: another crate of the same
//! binary may install its own default.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::ServerName;
use rustls::server::{StoresServerSessions, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};

use crate::session::Session;
use crate::{Connection, Identity, Operation, Result, TransportError};

/// Connects to peers and accepts them, as one host. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Endpoint {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Endpoint {
    /// Prepares both roles. Fails when certificate, key and authority do not fit each other.
    pub fn new(identity: &Identity) -> Result<Self> {
        let mismatch = |source| TransportError::Mismatch { path: identity.certificate_path.clone(), source };
        let provider = Arc::new(provider());
        Ok(Self {
            client: Arc::new(client_config(identity, &provider).map_err(mismatch)?),
            server: Arc::new(server_config(identity, &provider).map_err(mismatch)?),
        })
    }

    /// Connects to `host:port`; the peer's certificate must be for `expect_name`. All of it takes at most `within`.
    ///
    /// When this returns, the peer has accepted our certificate too.
    pub fn connect(&self, addr: &str, expect_name: &str, within: Duration) -> Result<Connection> {
        let deadline = Instant::now() + within;
        let name = ServerName::try_from(expect_name.to_owned())
            .map_err(|_| TransportError::BadName { name: expect_name.to_owned() })?;
        let socket = connect_any(addr, deadline)?;
        let tls = rustls::ClientConnection::new(Arc::clone(&self.client), name)
            .map_err(|source| TransportError::from_tls(addr, source, false))?;
        Connection::establish(Session::new(socket, unbounded(tls.into()), Some(expect_name))?, deadline)
    }

    /// Accepts a peer on a fresh TCP connection. The whole handshake takes at most `within`, however slowly it comes.
    pub fn accept(&self, socket: TcpStream, within: Duration) -> Result<Connection> {
        let deadline = Instant::now() + within;
        Connection::establish(self.accept_session(socket)?, deadline)
    }

    /// The part of `accept` that does not wait.
    pub(crate) fn accept_session(&self, socket: TcpStream) -> Result<Arc<Session>> {
        let tls = rustls::ServerConnection::new(Arc::clone(&self.server))
            .map_err(|source| TransportError::from_tls("a new connection", source, false))?;
        Session::new(socket, unbounded(tls.into()), None)
    }
}

/// The writer bounds what is queued by itself, by batches that TLS must take whole.
fn unbounded(mut tls: rustls::Connection) -> rustls::Connection {
    tls.set_buffer_limit(None);
    tls
}

fn provider() -> CryptoProvider {
    use aws_lc_rs::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    CryptoProvider {
        // The fastest first: a page stream is bound by it.
        cipher_suites: vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_AES_256_GCM_SHA384,
            TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    }
}

fn client_config(identity: &Identity, provider: &Arc<CryptoProvider>) -> Result<ClientConfig, rustls::Error> {
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::clone(&identity.roots), Arc::clone(provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn server_config(identity: &Identity, provider: &Arc<CryptoProvider>) -> Result<ServerConfig, rustls::Error> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&identity.roots), Arc::clone(provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.session_storage = Arc::new(Receipts);
    config.send_tls13_tickets = 1;
    Ok(config)
}

/// Lets the server send one ticket, which tells the client that its certificate was accepted, and resumes nothing:
/// every connection checks both certificates anew.
#[derive(Debug)]
struct Receipts;

impl StoresServerSessions for Receipts {
    fn put(&self, _key: Vec<u8>, _value: Vec<u8>) -> bool {
        true
    }

    fn get(&self, _key: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn take(&self, _key: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// Tries the addresses one after another, each with its share of the time that is left.
fn connect_any(addr: &str, deadline: Instant) -> Result<TcpStream> {
    let addresses = resolve(addr, deadline)?;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for (index, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let others = u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        let share = left / others;
        if share.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(address, share) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    if last.kind() == io::ErrorKind::TimedOut || Instant::now() >= deadline {
        return Err(timed_out(addr));
    }
    Err(TransportError::Connect { addr: addr.to_owned(), source: last })
}

/// The system's resolver knows no deadline, so a name is resolved by a thread that may outlive our interest in it.
fn resolve(addr: &str, deadline: Instant) -> Result<Vec<SocketAddr>> {
    if let Ok(address) = addr.parse() {
        return Ok(vec![address]);
    }
    let (sender, receiver) = mpsc::channel();
    let name = addr.to_owned();
    thread::Builder::new()
        .name("resolve".into())
        .spawn(move || {
            let found = name.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
            // Nobody listens any more when the deadline has passed.
            let _ = sender.send(found);
        })
        .map_err(|source| TransportError::Local { what: "resolve a name", source })?;
    let left = deadline.saturating_duration_since(Instant::now());
    let found = receiver.recv_timeout(left).map_err(|_| timed_out(addr))?;
    found.map_err(|source| TransportError::Resolve { addr: addr.to_owned(), source })
}

fn timed_out(addr: &str) -> TransportError {
    TransportError::TimedOut { peer: addr.to_owned(), operation: Operation::Connect }
}
