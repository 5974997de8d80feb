//! The host daemon: it drives engine, memory, vmm and transport, and is the one owner of each VM's migration.
//!
//! ```text
//! api          REST on a Unix socket           agent        VMs, migrations: what both ask of each other
//! peer         TLS port: who calls, and why    source/target   one thread owns one migration and performs what
//! journal      records of the hand-off                          the engine's state machine wants done
//! registry     VMs, found again after a restart   pages        the bulk path: send-sets, senders, receivers
//! sharing      what VMs that leave together have in common, sent once
//! templates    VMs that others start from and share their memory with
//! guest        the helper inside of a guest: asks for its own migration, slows what writes too much
//! ```
//!
//! Start reading at [`Agent`], then `source.rs` (a migration as a list of performed actions).
#![forbid(unsafe_code)]

mod agent;
pub mod api;
mod awake;
mod balloon;
mod committed;
pub mod config;
mod control;
mod doubt;
mod fit;
mod guest;
#[cfg(feature = "holds")]
mod hold;
mod host;
mod incoming;
mod journal;
pub mod model;
mod offer;
mod pages;
mod peer;
mod postcopy;
mod progress;
mod recovery;
mod registry;
mod room;
mod sharing;
mod source;
mod target;
mod templates;
mod working_set;

pub use agent::{Agent, AgentError};
pub use config::{Config, Mechanism};
