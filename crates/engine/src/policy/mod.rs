//! Policies: pure decisions of a migration, one file each, tested alone.

mod compression;
mod convergence;
mod working_set;

pub use compression::Compression;
pub use convergence::{Convergence, Observation, Verdict};
pub use working_set::{
    Curve, Ending, FIRST_WRITE, Glimpse, GrowthPoint, HotRegion, INTERVALS_MAX, Pace, Path, Prediction, Run,
    WorkingSet, cost_share, predict,
};
