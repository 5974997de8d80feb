//! The wire format, as PROTOCOL.md describes it.
//!
//! Three kinds of connection: one *control* connection carries [`Message`]s and the device state in [`control`] frames;
//! any number of *page streams* carry [`batch`] frames; after the hand-off of a VM that has pages missing, one *demand*
//! connection carries [`Request`]s to the source and [`batch`] frames back. Everything is little-endian, every length is bounded before
//! anything is allocated, and what does not fit is an error that names what was wrong.

pub mod batch;
pub mod common;
pub mod control;
pub mod message;
pub mod patch;
pub mod request;

pub use batch::{BatchHeader, Descriptor, Encoding, FrameKind, Layout};
pub use message::Message;
pub use request::Request;

use thiserror::Error;

/// First protocol version this build speaks.
pub const VERSION_MIN: u32 = 1;
/// Last protocol version this build speaks.
pub const VERSION_MAX: u32 = 1;

/// What a peer sent is not the protocol.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum WireError {
    /// A length or count is above its limit.
    #[error("the peer sent {what} of {got}, more than the limit of {limit}")]
    TooLarge {
        /// What was measured.
        what: &'static str,
        /// What the peer claimed.
        got: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Fewer bytes than the frame needs.
    #[error("the peer sent a short {what}")]
    Short {
        /// The frame or field.
        what: &'static str,
    },
    /// A field has a value that it must not have.
    #[error("the peer sent {what} {got}, which is not valid here")]
    Invalid {
        /// The field.
        what: &'static str,
        /// Its value.
        got: u64,
    },
    /// A control message that cannot be decoded.
    #[error("the peer sent a control message that cannot be read: {why}")]
    Message {
        /// What the decoder says.
        why: String,
    },
}
