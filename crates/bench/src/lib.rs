//! Named measurements of Sterna beside stock QEMU's own migration, on the same machine, link, guest and load.
//!
//! ```text
//! demo      a VM under load moves by us, then one like it by stock QEMU, pair after pair     rate     a limit is kept
//! stage     the lab with an agent in each host          load      what the guest runs, and who watches it
//! agent     the `sterna` command, as a user has it      ours/stock   one timed move each
//! results   what is written as JSON, and its medians    table     the same for people      report   the same with plots
//! ```
//!
//! **Invariant:** nothing here knows how Sterna works inside. It is driven by its command and judged by what can be seen
//! from outside: the source's process, the link's counters, and a client of the guest.

#![forbid(unsafe_code)]

pub mod agent;
pub mod demo;
pub mod error;
pub mod facts;
pub mod kit;
pub mod load;
pub mod meter;
pub mod ours;
pub mod rate;
pub mod report;
pub mod results;
pub mod stage;
pub mod stock;
pub mod table;

pub use error::BenchError;
pub use kit::Kit;
pub use results::{Demo, Results};
