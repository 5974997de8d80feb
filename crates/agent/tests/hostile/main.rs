//! Peers that authenticate themselves and speak nonsense, strangers, and users' mistakes. Each gets an error, and the agent
//! goes on: a good migration succeeds afterwards.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

#[path = "../support/mod.rs"]
mod support;

mod mistakes;
mod peer;
mod source;
mod strangers;
mod target;
