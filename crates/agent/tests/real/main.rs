//! Agents, and real QEMUs with real guests under their care: one program, since each would have to be linked with all of it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod devices;
mod direct;
mod exhaustion;
mod faults;
mod guest;
mod hostile;
mod images;
mod kvm;
mod machines;
mod matrix;
mod memory;
mod moves;
mod postcopy;
mod precopy;
mod sharing;
mod soak;
mod states;
mod streams;
mod support;
mod templates;
mod trailing;
mod working_set;
