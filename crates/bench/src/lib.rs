//! Named measurements of Sterna beside stock QEMU's own migration, on the same machine, link, guest and load.
//!
//! ```text
//! rows/     what is measured, a file each        contest   VMs like each other that move by turns
//! stage     the lab with an agent in each host   load      what guests run, and who watches them
//! agent     the `sterna` command, as a user has it         ours, stock   a VM of ours and one of QEMU's own, and its moves
//! crowd     VMs that leave together                pulse    what an application does, from quarter to quarter of a second
//! wishes    options of `sterna migrate`, and which there are              waits    how long a guest waited for its pages
//! figures   metrics and their units              results   what is written as JSON: raw samples, goals, limits
//! table     the same for people                  report    the same with plots
//! ```
//!
//! **Invariant:** nothing here knows how Sterna works inside. It is driven by its command and judged by what can be seen
//! from outside: the source's process, the link's counters, and a client of the guest.

#![forbid(unsafe_code)]

pub mod agent;
mod contest;
mod crowd;
pub mod error;
pub mod facts;
pub mod figures;
pub mod kit;
pub mod load;
pub mod meter;
pub mod ours;
pub mod pulse;
pub mod report;
pub mod results;
pub mod rows;
pub mod stage;
pub mod stock;
pub mod table;
mod waits;
pub mod wishes;

pub use error::BenchError;
pub use kit::Kit;
pub use results::Results;
pub use rows::{Extent, Row};
