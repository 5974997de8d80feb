//! Policies: pure decisions of a migration, one file each, tested alone.

mod convergence;

pub use convergence::{Convergence, Observation, Verdict};
