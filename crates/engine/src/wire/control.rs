//! Frames of the control connection: an eight-byte header, then a [`Message`] or a piece of device state.

use super::{Message, WireError};
use prost::Message as _;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a control frame's header.
pub const HEADER_BYTES: usize = 8;
/// Longest message. The largest is the offer: command line, fingerprint and block list of a big VM are some 100 kB.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Longest piece of device state in a frame; longer states travel in several.
pub const STATE_PIECE_BYTES_MAX: usize = 1 << 20;
/// Longest device state. QEMU's are tens to hundreds of kilobytes; emulated GPUs and many queues stay far below this.
pub const STATE_BYTES_MAX: u64 = 256 << 20;

/// What a control frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlKind {
    /// A [`Message`].
    Message,
    /// The next piece of the device state.
    State,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    bytes: U32,
    kind: u8,
    zero: [u8; 3],
}

/// Header of a control frame, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlHeader {
    /// What follows.
    pub kind: ControlKind,
    /// How many bytes follow.
    pub bytes: usize,
}

impl ControlHeader {
    /// Reads a header and bounds the length it announces.
    ///
    /// # Errors
    /// [`WireError`] when the kind is unknown, a reserved byte is set or the length is above the kind's limit.
    pub fn decode(raw: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let raw = RawHeader::ref_from_bytes(raw).map_err(|_| WireError::Short { what: "control header" })?;
        let (kind, limit) = match raw.kind {
            1 => (ControlKind::Message, MESSAGE_BYTES_MAX),
            2 => (ControlKind::State, STATE_PIECE_BYTES_MAX),
            other => return Err(WireError::Invalid { what: "control frame kind", got: other.into() }),
        };
        if raw.zero != [0; 3] {
            return Err(WireError::Invalid {
                what: "reserved bytes of a control header",
                got: raw.zero[0].into(),
            });
        }
        let bytes = raw.bytes.get() as usize;
        if bytes > limit {
            return Err(WireError::TooLarge {
                what: "control frame bytes",
                got: bytes as u64,
                limit: limit as u64,
            });
        }
        Ok(Self { kind, bytes })
    }

    /// The header's bytes.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let kind = match self.kind {
            ControlKind::Message => 1,
            ControlKind::State => 2,
        };
        let raw =
            RawHeader { bytes: U32::new(u32::try_from(self.bytes).unwrap_or(u32::MAX)), kind, zero: [0; 3] };
        let mut out = [0; HEADER_BYTES];
        out.copy_from_slice(raw.as_bytes());
        out
    }
}

/// A message as one frame.
///
/// # Errors
/// [`WireError::TooLarge`] when the message is above [`MESSAGE_BYTES_MAX`], which the peer would refuse.
pub fn encode_message(message: &Message) -> Result<Vec<u8>, WireError> {
    let envelope = super::message::Envelope { body: Some(message.clone()) };
    let bytes = envelope.encoded_len();
    if bytes > MESSAGE_BYTES_MAX {
        let (got, limit) = (bytes as u64, MESSAGE_BYTES_MAX as u64);
        return Err(WireError::TooLarge { what: "control message bytes", got, limit });
    }
    let mut out = Vec::with_capacity(HEADER_BYTES + bytes);
    out.extend_from_slice(&ControlHeader { kind: ControlKind::Message, bytes }.encode());
    out.extend_from_slice(&envelope.encode_to_vec());
    Ok(out)
}

/// Reads the body of a frame of kind [`ControlKind::Message`].
///
/// # Errors
/// [`WireError::Message`] when it is no message, or one that this version does not know.
pub fn decode_message(body: &[u8]) -> Result<Message, WireError> {
    let envelope =
        super::message::Envelope::decode(body).map_err(|e| WireError::Message { why: e.to_string() })?;
    envelope.body.ok_or_else(|| WireError::Message { why: "its kind is unknown to this version".into() })
}

/// A piece of device state as one frame's header; the piece follows.
pub fn state_header(piece: &[u8]) -> [u8; HEADER_BYTES] {
    debug_assert!(piece.len() <= STATE_PIECE_BYTES_MAX);
    ControlHeader { kind: ControlKind::State, bytes: piece.len() }.encode()
}

#[cfg(test)]
mod tests {
    use super::super::message::{Barrier, Text};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_come_back() {
        let message = Message::Barrier(Barrier { round: 7, stream: 1 });
        let frame = encode_message(&message).unwrap();
        let header = ControlHeader::decode(frame[..8].try_into().unwrap()).unwrap();
        assert_eq!(header, ControlHeader { kind: ControlKind::Message, bytes: frame.len() - 8 });
        assert_eq!(decode_message(&frame[8..]).unwrap(), message);
    }

    #[test]
    fn a_length_is_bounded_before_anything_is_read() {
        let raw = [0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0];
        assert!(matches!(ControlHeader::decode(&raw), Err(WireError::TooLarge { .. })));
        assert!(matches!(ControlHeader::decode(&[1, 0, 0, 0, 0, 0, 0, 0]), Err(WireError::Invalid { .. })));
        assert!(matches!(ControlHeader::decode(&[1, 0, 0, 0, 1, 0, 9, 0]), Err(WireError::Invalid { .. })));
    }

    #[test]
    fn an_oversized_message_is_not_sent() {
        let message = Message::Abort(Text { text: "x".repeat(MESSAGE_BYTES_MAX + 1) });
        assert!(matches!(encode_message(&message), Err(WireError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_no_panic(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode_message(&body);
            if let Ok(header) = <&[u8; 8]>::try_from(&body[..body.len().min(8)]) {
                let _ = ControlHeader::decode(header);
            }
        }
    }
}
