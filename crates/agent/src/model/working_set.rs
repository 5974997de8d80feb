//! The writable working set of a VM: what is asked for, and what is told.

use serde::{Deserialize, Serialize};

/// Measures the writable working set of a VM that runs.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WorkingSetRequest {
    /// Length of an interval in milliseconds, from 100 on. It is stretched where it would cost the guest too much.
    #[serde(default = "default_interval")]
    pub interval: u64,
    /// Length of the measurement in milliseconds.
    #[serde(default = "default_duration")]
    pub duration: u64,
    /// What it may cost the guest, in percent of one processor.
    #[serde(rename = "max-cost", default = "default_max_cost")]
    pub max_cost: f64,
    /// Links for which a migration is predicted, in bytes per second.
    #[serde(default = "default_bandwidths")]
    pub bandwidths: Vec<u64>,
    /// The `downtime-limit` of the predicted migrations, in milliseconds.
    #[serde(rename = "downtime-limit", default = "super::default_downtime_limit")]
    pub downtime_limit: u64,
    /// Their `timeout`, in seconds; none when absent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub timeout: Option<f64>,
}

fn default_interval() -> u64 {
    1000
}

fn default_duration() -> u64 {
    60_000
}

fn default_max_cost() -> f64 {
    3.0
}

/// Bytes per second of 100 Mbit/s, 400 Mbit/s, 1 Gbit/s and 10 Gbit/s.
pub fn default_bandwidths() -> Vec<u64> {
    vec![12_500_000, 50_000_000, 125_000_000, 1_250_000_000]
}

impl Default for WorkingSetRequest {
    fn default() -> Self {
        Self {
            interval: default_interval(),
            duration: default_duration(),
            max_cost: default_max_cost(),
            bandwidths: default_bandwidths(),
            downtime_limit: super::default_downtime_limit(),
            timeout: None,
        }
    }
}

/// What a measurement tells: each interval, then the result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum WorkingSetEvent {
    /// An interval is over. A client that does not keep up misses some: the result has all.
    Interval(IntervalView),
    /// The measurement is over; nothing comes after it.
    End(Box<WorkingSetView>),
}

/// What was written in one interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct IntervalView {
    /// Milliseconds from the begin of the measurement to the end of the interval.
    pub at: f64,
    /// Its length in milliseconds.
    pub length: f64,
    /// Pages written in it.
    pub pages: u64,
    /// Pages written at least once since the measurement began.
    #[serde(rename = "unique-pages")]
    pub unique_pages: u64,
    /// What it cost the guest, in percent of one processor: an estimate.
    pub cost: f64,
    /// Whether it was made longer than asked for, because shorter ones would have cost the guest too much.
    pub stretched: bool,
}

/// The writable working set of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WorkingSetView {
    /// Name of the VM.
    pub vm: String,
    /// The host it runs at.
    pub host: String,
    /// `completed`; `cut-short`, when a migration of the VM began; or `failed`.
    pub status: String,
    /// Why it is not completed, and what to do.
    #[serde(rename = "error-desc", skip_serializing_if = "Option::is_none", default)]
    pub error_desc: Option<String>,
    /// When it began.
    #[schema(value_type = String, format = DateTime)]
    pub began: jiff::Timestamp,
    /// Milliseconds that were measured.
    pub duration: f64,
    /// Milliseconds of an interval as asked for.
    pub interval: u64,
    /// Whether intervals were stretched, because shorter ones would have cost the guest too much.
    pub stretched: bool,
    /// What the measurement cost the guest, in percent of one processor: an estimate, for each first write to a page.
    pub cost: f64,
    /// Bytes in a page.
    #[serde(rename = "page-size")]
    pub page_size: u64,
    /// Pages of the VM's RAM.
    #[serde(rename = "total-pages")]
    pub total_pages: u64,
    /// Pages that held something when it began: the first round of a migration.
    #[serde(rename = "populated-pages")]
    pub populated_pages: u64,
    /// Those of them that are all zero, by a sample: they need no bytes.
    #[serde(rename = "zero-pages")]
    pub zero_pages: u64,
    /// Pages written per second: in each interval a page counts once.
    #[serde(rename = "dirty-pages-rate")]
    pub dirty_pages_rate: f64,
    /// Pages written at least once.
    #[serde(rename = "unique-pages")]
    pub unique_pages: u64,
    /// How the set of written pages grows with the window.
    pub growth: Vec<GrowthView>,
    /// The parts of memory that are written most, the hottest first.
    pub regions: Vec<RegionView>,
    /// What a migration would do, link by link.
    pub predictions: Vec<PredictionView>,
    /// All intervals.
    pub intervals: Vec<IntervalView>,
}

/// How many different pages are written in a window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GrowthView {
    /// Its length in milliseconds, on average.
    pub window: f64,
    /// Pages written at least once in it, on average.
    pub pages: f64,
    /// How many windows there were.
    pub windows: u32,
}

/// A part of memory that is written more than others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RegionView {
    /// QEMU's name of the block of RAM.
    pub block: String,
    /// Bytes from the begin of the block.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Pages of it that were written at least once.
    pub pages: u64,
    /// Its part of all writes, in percent. A page counts once in each interval in which it was written.
    pub share: f64,
}

/// What a migration over a link would do, by the rule that migrations follow. Bytes are those of pages, before compression.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PredictionView {
    /// Bytes per second.
    pub bandwidth: u64,
    /// `converged`; `timeout`, when the timeout stops the VM with more left than the limit permits; or `never`: then the other
    /// figures are those of a stop once its rounds shrink no more.
    pub ending: String,
    /// Rounds, that of the stop included (`dirty-sync-count`).
    pub rounds: u32,
    /// Milliseconds from the first page to the end.
    #[serde(rename = "total-time")]
    pub total_time: f64,
    /// Bytes of pages.
    pub bytes: u64,
    /// Pages that are sent while the VM is stopped.
    #[serde(rename = "residual-pages")]
    pub residual_pages: u64,
    /// Milliseconds that the VM is stopped, devices included.
    pub downtime: f64,
}
