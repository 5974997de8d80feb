//! What the programs inside guests share: pages whose content proves itself.
//!
//! The programs are linked statically and run in an initramfs without a libc: `load` (memory load that finds its own lost
//! and stale pages), `beacon` (a datagram every millisecond, by which a client sees how long the guest was away), `game` (a world
//! that moves 20 times a second, of which players are told), and `sterna-guest`, which users put into guests of their own: see
//! [`helper`].

#![forbid(unsafe_code)]

pub mod helper;
pub mod options;
pub mod pages;
