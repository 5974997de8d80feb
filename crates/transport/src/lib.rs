//! Connections that carry migrations: TCP with TLS 1.3, a certificate on both sides, and a pacer.
//!
//! This crate moves bytes and interprets none of them. It exists so that everything above it can take for
//! granted that a peer is who it says it is (a target starts a QEMU for its peer), that every wait has a
//! deadline, and that nothing a peer sends can make us panic or allocate without bound.
//!
//! It is blocking on purpose: the data plane is one thread per stream, beside system calls that block anyway.
//!
//! - [`pki`] makes the authority and the certificates of the hosts.
//! - [`Identity`] is what a host shows to others, [`Endpoint`] connects and accepts with it.
//! - [`Listener`] turns arriving connections into threads, within limits.
//! - [`Connection`] is a verified peer; it splits into a [`Reader`] and a [`Writer`] for two threads.
//! - [`Pacer`] keeps all streams of one migration together at one rate.

#![forbid(unsafe_code)]

mod connection;
mod endpoint;
mod error;
mod identity;
mod listener;
mod pacer;
pub mod pki;
mod reader;
mod session;
mod writer;

pub use connection::{Connection, PeerName};
pub use endpoint::Endpoint;
pub use error::{Operation, Refusal, TransportError};
pub use identity::Identity;
pub use listener::{
    HANDSHAKE_DEADLINE, Limits, Listener, MAX_CONNECTIONS, MAX_HANDSHAKES, ServerHandle, ServerStats,
};
pub use pacer::{Pacer, Schedule, Ticket};
pub use reader::Reader;
pub use session::{Counters, KEEPALIVE_IDLE, Shutdown, UNANSWERED_MAX};
pub use writer::Writer;

/// What this crate's functions return.
pub type Result<T, E = TransportError> = std::result::Result<T, E>;
