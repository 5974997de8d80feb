//! Authorities, identities and pairs of connections for the tests.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use sterna_transport::{Connection, Endpoint, Identity, Result, pki};
use tempfile::TempDir;

/// Long enough for the slowest machine: passing it is a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// For waits that are meant to pass.
pub(crate) const SHORT: Duration = Duration::from_millis(200);

pub(crate) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// An authority in a directory of its own.
pub(crate) struct Authority {
    dir: TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::named("test authority")
    }

    pub(crate) fn named(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), name).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn identity(&self, host: &str, alt_names: &[&str]) -> Identity {
        let alt_names = alt_names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let issued = pki::issue(self.path(), host, &alt_names).unwrap();
        Identity::load(&self.path().join("ca.crt"), &issued.certificate, &issued.key).unwrap()
    }

    pub(crate) fn endpoint(&self, host: &str) -> Endpoint {
        Endpoint::new(&self.identity(host, &[])).unwrap()
    }

    /// A certificate that the library would not issue: any names, any time.
    pub(crate) fn odd_identity(
        &self,
        host: &str,
        names: Vec<SanType>,
        validity: Validity,
    ) -> Result<Identity> {
        let (certificate, key) = (self.path().join("odd.crt"), self.path().join("odd.key"));
        let ca_key =
            KeyPair::from_pem(&std::fs::read_to_string(self.path().join("ca.key")).unwrap()).unwrap();
        let ca_pem = std::fs::read_to_string(self.path().join("ca.crt")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = (validity.0.into(), validity.1.into());
        // Issued by the library first, for the key's file and its mode.
        let issued = pki::issue(self.path(), host, &[]).unwrap();
        let host_key = KeyPair::from_pem(&std::fs::read_to_string(&issued.key).unwrap()).unwrap();
        std::fs::rename(&issued.key, &key).unwrap();
        std::fs::write(&certificate, params.signed_by(&host_key, &issuer).unwrap().pem()).unwrap();
        Identity::load(&self.path().join("ca.crt"), &certificate, &key)
    }
}

pub(crate) struct Validity(pub(crate) SystemTime, pub(crate) SystemTime);

impl Validity {
    pub(crate) fn past() -> Self {
        Self(SystemTime::now() - 10 * DAY, SystemTime::now() - DAY)
    }

    pub(crate) fn future() -> Self {
        Self(SystemTime::now() + DAY, SystemTime::now() + 10 * DAY)
    }
}

pub(crate) fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

/// What both ends got from one handshake: the client's view, then the server's.
pub(crate) fn meet(
    client: &Endpoint,
    expect: &str,
    server: &Endpoint,
) -> (Result<Connection>, Result<Connection>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let server = server.clone();
    let accepting = thread::spawn(move || server.accept(listener.accept().unwrap().0, PATIENCE));
    let connected = client.connect(&addr, expect, PATIENCE);
    (connected, accepting.join().unwrap())
}

/// Two verified ends: `west`'s and `east`'s.
pub(crate) fn pair() -> (Connection, Connection) {
    let authority = Authority::new();
    let (west, east) = (authority.endpoint("west"), authority.endpoint("east"));
    let (client, server) = meet(&west, "east", &east);
    (client.unwrap(), server.unwrap())
}

/// What the server says to a client that does `act` on the bare TCP connection.
pub(crate) fn accept_from(
    server: &Endpoint,
    within: Duration,
    act: impl FnOnce(TcpStream),
) -> Result<Connection> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let server = server.clone();
    let accepting = thread::spawn(move || server.accept(listener.accept().unwrap().0, within));
    act(TcpStream::connect(addr).unwrap());
    accepting.join().unwrap()
}

/// A TLS client by the library alone, so that it can do what ours does not.
pub(crate) fn bare_client(
    authority: &Authority,
    host: Option<&str>,
    version: &'static SupportedProtocolVersion,
) -> Arc<ClientConfig> {
    let read = |name: &str| std::fs::read(authority.path().join(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&read("ca.crt")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match host {
        None => builder.with_no_client_auth(),
        Some(host) => {
            if !authority.path().join(format!("{host}.crt")).exists() {
                pki::issue(authority.path(), host, &[]).unwrap();
            }
            let chain = vec![CertificateDer::from_pem_slice(&read(&format!("{host}.crt"))).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(&read(&format!("{host}.key"))).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    })
}

pub(crate) fn bare_connection(config: &Arc<ClientConfig>, name: &str) -> rustls::ClientConnection {
    rustls::ClientConnection::new(Arc::clone(config), ServerName::try_from(name.to_owned()).unwrap()).unwrap()
}

/// Passes bytes both ways and changes the first one that the client sends after `spoil_after`.
pub(crate) fn spoiling_proxy(server: SocketAddr, spoil_after: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut client = listener.accept().unwrap().0;
        let mut onward = TcpStream::connect(server).unwrap();
        let (mut back_from, mut back_to) = (onward.try_clone().unwrap(), client.try_clone().unwrap());
        thread::spawn(move || {
            let _ = io::copy(&mut back_from, &mut back_to);
            let _ = back_to.shutdown(std::net::Shutdown::Write);
        });
        let (mut buffer, mut passed) = (vec![0; 65536], 0);
        while let Ok(count @ 1..) = client.read(&mut buffer) {
            if (passed..passed + count).contains(&spoil_after) {
                buffer[spoil_after - passed] ^= 1;
            }
            passed += count;
            if onward.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = onward.shutdown(std::net::Shutdown::Write);
    });
    addr
}

/// The byte at a position of a stream, different for each stream: lost, doubled and swapped pieces all show.
pub(crate) fn expected(stream: u64, position: u64) -> u8 {
    let mixed = (position / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ stream);
    mixed.rotate_left(29).to_le_bytes()[(position % 8) as usize]
}

pub(crate) fn fill(buffer: &mut [u8], stream: u64, position: u64) {
    for (offset, byte) in buffer.iter_mut().enumerate() {
        *byte = expected(stream, position + offset as u64);
    }
}

pub(crate) fn check(buffer: &[u8], stream: u64, position: u64) {
    for (offset, byte) in buffer.iter().enumerate() {
        let at = position + offset as u64;
        assert_eq!(*byte, expected(stream, at), "stream {stream} differs at byte {at}");
    }
}
