//! The control connection: headers and messages. What decodes also encodes, and comes back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna_engine::wire::control::{
    ControlHeader, ControlKind, HEADER_BYTES, MESSAGE_BYTES_MAX, decode_message, encode_message,
};

fuzz_target!(|data: &[u8]| {
    let _ = decode_message(data);
    let Some((raw, body)) = data.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = ControlHeader::decode(raw) else { return };
    assert_eq!(&header.encode(), raw, "a header has one form");
    assert!(header.bytes <= MESSAGE_BYTES_MAX);
    // The length is taken from what is there, so that mutations reach the messages behind a wrong one.
    if header.kind == ControlKind::Message
        && let Ok(message) = decode_message(&body[..body.len().min(MESSAGE_BYTES_MAX)])
        && let Ok(frame) = encode_message(&message)
    {
        assert_eq!(decode_message(&frame[HEADER_BYTES..]).as_ref(), Ok(&message));
    }
});
