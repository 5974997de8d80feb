//! What can go wrong between two hosts, said so that the reader knows whose turn it is to act.
//!
//! TLS libraries report what the state machine saw; an operator wants to know which host, which file and
//! which command. This is where the one becomes the other.

use std::fmt;
use std::io;
use std::path::PathBuf;

use rustls::{AlertDescription, CertificateError};
use thiserror::Error;

/// A failure of a connection, or of the identity it is made with.
///
/// `peer` is the address, with the expected host name before it where we connected by name.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The address has no numeric form and did not resolve.
    #[error("{addr} is not an address that can be resolved: check the host list")]
    Resolve {
        /// The address as it was given.
        addr: String,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// No address of the peer took the TCP connection (refused, unreachable).
    #[error("cannot connect to {addr}: check that the agent runs there and that its port is open")]
    Connect {
        /// The address as it was given.
        addr: String,
        /// The error of the last address that was tried.
        #[source]
        source: io::Error,
    },
    /// The local address cannot be listened on.
    #[error("cannot listen on {addr}: check that the address is local and that no other agent uses it")]
    Bind {
        /// The address as it was given.
        addr: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A wait passed its deadline. For a read nothing was lost: it may be repeated.
    #[error("{operation} with {peer} passed its deadline")]
    TimedOut {
        /// Who did not answer.
        peer: String,
        /// What was waited for.
        operation: Operation,
    },
    /// The peer's certificate comes from another authority.
    #[error(
        "the certificate of {peer} was not signed by our authority: issue it from the same directory with `sterna pki issue`"
    )]
    UnknownCa {
        /// Who showed it.
        peer: String,
    },
    /// The peer's certificate is valid, but for another host.
    #[error(
        "{peer} shows a certificate that is not for {expected}{presented}: check the host list, or issue it"
    )]
    WrongHost {
        /// Who showed it.
        peer: String,
        /// The name that it should be for.
        expected: String,
        /// The names it is for, as ` but for a, b`, or empty.
        presented: String,
    },
    /// The peer's certificate is over.
    #[error("the certificate of {peer} has expired: issue a new one there, or check both clocks")]
    Expired {
        /// Who showed it.
        peer: String,
    },
    /// The peer's certificate starts in the future.
    #[error("the certificate of {peer} is not valid yet: check both clocks")]
    NotYetValid {
        /// Who showed it.
        peer: String,
    },
    /// The peer's certificate is unusable for another reason.
    #[error("the certificate of {peer} cannot be used: issue a new one there")]
    BadCertificate {
        /// Who showed it.
        peer: String,
        /// What is wrong with it.
        #[source]
        source: rustls::Error,
    },
    /// The client showed no certificate.
    #[error("{peer} showed no certificate: it is no agent of ours, or has no identity configured")]
    NoCertificate {
        /// Who connected.
        peer: String,
    },
    /// The peer's certificate is trusted but names no host, so nobody knows who it is.
    #[error("the certificate of {peer} names no host: issue it with `sterna pki issue`")]
    NoPeerName {
        /// Who showed it.
        peer: String,
    },
    /// The peer refused us, and said why.
    #[error("{peer} refused this host: {reason}")]
    RefusedByPeer {
        /// Who refused.
        peer: String,
        /// Its reason.
        reason: Refusal,
    },
    /// The peer does not speak TLS 1.3.
    #[error("{peer} does not speak TLS 1.3, which is the only version used here")]
    Version {
        /// Who it is.
        peer: String,
    },
    /// What came is no TLS at all.
    #[error("{peer} does not speak TLS: check the port")]
    NotTls {
        /// Who it is.
        peer: String,
        /// What was found instead.
        #[source]
        source: rustls::Error,
    },
    /// The peer broke the protocol, or bytes were changed on the way.
    #[error("the TLS connection with {peer} failed: connect again")]
    Tls {
        /// Who it is.
        peer: String,
        /// What was wrong.
        #[source]
        source: rustls::Error,
    },
    /// The connection ended without a close_notify: the peer died, or someone cut it.
    #[error("{peer} closed the connection without saying so: its agent died or the connection was cut")]
    Truncated {
        /// Who it was.
        peer: String,
    },
    /// The peer closed properly, in the middle of what was expected from it.
    #[error("{peer} closed the connection before it had sent everything")]
    Closed {
        /// Who it was.
        peer: String,
    },
    /// The network lost the peer: it acknowledged nothing for [`crate::UNANSWERED_MAX`].
    #[error("{peer} does not answer any more: check the network and the host")]
    Lost {
        /// Who it was.
        peer: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// This side shut the connection down from another thread.
    #[error("the connection with {peer} was shut down by this host")]
    ShutDown {
        /// Who it was with.
        peer: String,
    },
    /// An earlier deadline passed in the middle of data, so the stream has no known position any more.
    #[error("the connection with {peer} was given up in the middle of data: connect again")]
    Torn {
        /// Who it is with.
        peer: String,
    },
    /// Something was written after the peer had been told that nothing more comes.
    #[error("the connection with {peer} was finished by this host: nothing more can be sent")]
    Finished {
        /// Who it is with.
        peer: String,
    },
    /// A system call on the socket failed.
    #[error("{operation} with {peer} failed")]
    Socket {
        /// Who it was with.
        peer: String,
        /// What was tried.
        operation: Operation,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A thread could not be started or a local resource ran out.
    #[error("this host lacks the resources to {what}")]
    Local {
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The expected name of a peer is neither a DNS name nor an address.
    #[error("{name:?} is no host name: check the host list")]
    BadName {
        /// The name as it was given.
        name: String,
    },
    /// A file of the identity cannot be read.
    #[error("cannot read {}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// Others than the owner may read the private key.
    #[error("the key {} may be read by others (mode {mode:03o}): run `chmod 600` on it", path.display())]
    KeyExposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file of the identity does not contain what it should.
    #[error("{} does not contain a usable {expected}: make it with `sterna pki`", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
    },
    /// Certificate, key and authority do not fit each other.
    #[error("certificate {} cannot be used with its key: issue both again with `sterna pki issue`", path.display())]
    Mismatch {
        /// The certificate's file.
        path: PathBuf,
        /// What TLS says about it.
        #[source]
        source: rustls::Error,
    },
}

/// What was being done when a wait or a system call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Making the TCP connection.
    Connect,
    /// Agreeing on keys and checking certificates.
    Handshake,
    /// Receiving.
    Read,
    /// Sending.
    Write,
    /// Saying goodbye.
    Close,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connecting",
            Self::Handshake => "the TLS handshake",
            Self::Read => "reading",
            Self::Write => "writing",
            Self::Close => "closing",
        })
    }
}

/// Why a peer refused our certificate or our offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// It does not know the authority that signed our certificate.
    UnknownCa,
    /// It takes our certificate for expired, or not yet valid.
    Expired,
    /// It wants a certificate and got none.
    NoCertificate,
    /// It cannot use our certificate for another reason, such as the host it is for.
    BadCertificate,
    /// Anything else, by its TLS alert.
    Alert(AlertDescription),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownCa => f.write_str("our certificate is from an authority that it does not know"),
            Self::Expired => f.write_str("our certificate has expired, or the clocks differ"),
            Self::NoCertificate => f.write_str("it wants a certificate of ours"),
            Self::BadCertificate => {
                f.write_str("it cannot accept our certificate, or not for this host's name")
            }
            Self::Alert(alert) => write!(f, "TLS alert {alert:?}"),
        }
    }
}

impl TransportError {
    /// True for a passed deadline: a read may be repeated, nothing was lost.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::TimedOut { .. })
    }

    /// True when the connection is over because of the peer, the network or our own shutdown: a new one may work.
    pub fn is_disconnect(&self) -> bool {
        matches!(
            self,
            Self::Truncated { .. } | Self::Closed { .. } | Self::Lost { .. } | Self::ShutDown { .. }
        )
    }

    /// Translates what TLS found; `handshaking` tells whether the peer had already proved that it speaks TLS.
    pub(crate) fn from_tls(peer: &str, source: rustls::Error, handshaking: bool) -> Self {
        let peer = peer.to_owned();
        match source {
            rustls::Error::InvalidCertificate(reason) => Self::from_certificate(peer, reason),
            rustls::Error::NoCertificatesPresented => Self::NoCertificate { peer },
            rustls::Error::AlertReceived(AlertDescription::ProtocolVersion) => Self::Version { peer },
            rustls::Error::AlertReceived(alert) => {
                Self::RefusedByPeer { peer, reason: Refusal::from_alert(alert) }
            }
            rustls::Error::PeerIncompatible(_) => Self::Version { peer },
            source @ rustls::Error::InvalidMessage(_) if handshaking => Self::NotTls { peer, source },
            source => Self::Tls { peer, source },
        }
    }

    fn from_certificate(peer: String, reason: CertificateError) -> Self {
        match reason {
            CertificateError::UnknownIssuer => Self::UnknownCa { peer },
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired { peer },
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Self::NotYetValid { peer }
            }
            CertificateError::NotValidForNameContext { expected, presented } => Self::WrongHost {
                peer,
                expected: expected.to_str().into_owned(),
                presented: format!(" but for {}", presented.join(", ")),
            },
            // An authority of the same name but another key is another authority.
            CertificateError::BadSignature => Self::UnknownCa { peer },
            reason => Self::BadCertificate { peer, source: rustls::Error::InvalidCertificate(reason) },
        }
    }

    pub(crate) fn from_socket(peer: &str, operation: Operation, source: io::Error) -> Self {
        let peer = peer.to_owned();
        match source.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
                Self::Truncated { peer }
            }
            io::ErrorKind::TimedOut
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown => Self::Lost { peer, source },
            _ => Self::Socket { peer, operation, source },
        }
    }

    fn io_kind(&self) -> io::ErrorKind {
        match self {
            Self::TimedOut { .. } => io::ErrorKind::TimedOut,
            Self::Truncated { .. } | Self::Closed { .. } => io::ErrorKind::UnexpectedEof,
            Self::ShutDown { .. } => io::ErrorKind::ConnectionAborted,
            Self::Socket { source, .. } | Self::Lost { source, .. } => source.kind(),
            _ => io::ErrorKind::InvalidData,
        }
    }
}

impl Refusal {
    fn from_alert(alert: AlertDescription) -> Self {
        match alert {
            // The second is what an authority of the same name but with another key leads to.
            AlertDescription::UnknownCA | AlertDescription::DecryptError => Self::UnknownCa,
            AlertDescription::CertificateExpired => Self::Expired,
            AlertDescription::CertificateRequired => Self::NoCertificate,
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown => Self::BadCertificate,
            alert => Self::Alert(alert),
        }
    }
}

/// For [`std::io::Read`] and [`std::io::Write`]; the original is kept as the inner error.
impl From<TransportError> for io::Error {
    fn from(error: TransportError) -> Self {
        Self::new(error.io_kind(), error)
    }
}
