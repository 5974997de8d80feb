//! Policies: pure decisions of a migration, one file each, tested alone.

mod compression;
mod convergence;

pub use compression::Compression;
pub use convergence::{Convergence, Observation, Verdict};
