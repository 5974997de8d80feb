//! The transport against real sockets: peers that are right, wrong, hostile, slow or gone.

#![allow(clippy::unwrap_used)]

mod handshake;
mod listener;
mod pacer;
mod pki;
mod stream;
mod support;
