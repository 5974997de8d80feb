//! Policies: pure decisions of a migration, one file each, tested alone.

mod balloon;
mod compression;
mod convergence;
mod delta;
mod prepaging;
mod prepaging_set;
mod queue;
mod rate;
mod stun;
mod working_set;

pub use balloon::{GuestMemory, shrunk};
pub use compression::{Compression, Method};
pub use convergence::{Convergence, Observation, Verdict};
pub use delta::Delta;
pub use prepaging::{Chunk, Prepaging};
pub use queue::PushQueue;
pub use rate::{RESIDUAL_MIN, RateLimits, STEP};
pub use stun::{KEEP_ALL, KEEP_MIN, Seen, Stun, writers};
pub use working_set::{
    Curve, Ending, FIRST_WRITE, Glimpse, GrowthPoint, HotRegion, INTERVALS_MAX, Pace, Path, Prediction, Run,
    WorkingSet, cost_share, predict,
};
