//! Migration protocol and decisions.
//!
//! What a migration *is*, without what it runs on: units, the wire format ([`wire`]), the source and the target as
//! sans-IO state machines ([`source`], [`target`]), the hand-off of ownership with its records ([`handoff`]) and the
//! policies that decide when to stop ([`policy`]). There is no clock, socket, thread, file or QEMU in here: time comes
//! in as an argument, everything else as inputs, and what is to be done goes out as actions. That is why every failure
//! can be tested without a host (`tests/simulation/`).
#![forbid(unsafe_code)]

pub mod handoff;
pub mod policy;
pub mod progress;
pub mod reference;
pub mod source;
pub mod target;
pub mod units;
pub mod wire;

pub use handoff::{Generation, Journal, MigrationId, Record, Role, Step};
pub use progress::{Progress, Status};
pub use reference::Reference;
pub use source::{Outcome, Postcopy, Source, SourceAction, SourceInput, SourceParameters};
pub use target::{Lazily, Target, TargetAction, TargetInput};
