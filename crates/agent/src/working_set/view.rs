//! The result of a measurement as the API shows it.

use super::{Ending, Measuring};
use crate::model::{GrowthView, PredictionView, RegionView, WorkingSetView};
use std::time::Duration;
use sterna_engine::policy::{self, Curve, GrowthPoint, HotRegion, Path, cost_share, predict};
use sterna_engine::units::{PAGE_BYTES, Pages, Rate};

/// Hot regions that are told: what does not fit on a screen is not read.
const REGIONS_MAX: usize = 10;
/// What a round takes besides sending: a scan, questions to QEMU, and a round trip.
const ROUND_OVERHEAD: Duration = Duration::from_millis(5);
/// What a stop takes besides sending: the median of a small VM (docs/performance.md, row 2). Many devices take longer.
const STOP_OVERHEAD: Duration = Duration::from_millis(20);

impl Measuring {
    pub(super) fn view(&self, ending: &Ending) -> WorkingSetView {
        let (vm, host) = (self.place.vm(), self.host.clone());
        let (status, error_desc) = match ending {
            Ending::Completed | Ending::Unheard => ("completed", None),
            Ending::GaveWay => {
                let text = "a migration of it began, which comes first; what was measured until then is told";
                ("cut-short", Some(format!("the measurement of VM {vm} at {host} was cut short: {text}")))
            }
            Ending::Failed(why) => {
                let text =
                    format!("the measurement of VM {vm} at {host} failed: {why}; see sterna ps and its log");
                ("failed", Some(text))
            }
        };
        let (set, request) = (&self.set, &self.request);
        let curve = set.curve();
        let first_round = Pages(self.populated.0.saturating_sub(self.zero.0)).bytes();
        let path = |bandwidth: u64| Path {
            bandwidth: Rate(bandwidth),
            downtime_limit: Duration::from_millis(request.downtime_limit),
            timeout: request.timeout.map(Duration::from_secs_f64),
            round_overhead: ROUND_OVERHEAD,
            stop_overhead: STOP_OVERHEAD,
        };
        let predicted = |curve: &Curve, bandwidth: u64| {
            prediction(bandwidth, &predict(first_round, curve, &path(bandwidth)))
        };
        let seconds = set.elapsed().as_secs_f64().max(1e-9);
        WorkingSetView {
            vm,
            host,
            status: status.into(),
            error_desc,
            began: self.began,
            duration: ms(set.elapsed()),
            interval: request.interval,
            stretched: self.intervals.iter().any(|interval| interval.stretched),
            cost: percent(cost_share(Pages(set.writes()), set.elapsed())),
            page_size: PAGE_BYTES,
            total_pages: set.total().0,
            populated_pages: self.populated.0,
            zero_pages: self.zero.0,
            dirty_pages_rate: (set.writes() as f64 / seconds * 10.0).round() / 10.0,
            unique_pages: set.unique().0,
            growth: set.growth().iter().map(growth).collect(),
            regions: set.hot_regions(REGIONS_MAX).iter().map(|region| self.region(region)).collect(),
            predictions: match set.intervals() {
                // Nothing was seen: nothing is promised.
                0 => Vec::new(),
                _ => request.bandwidths.iter().map(|bandwidth| predicted(&curve, *bandwidth)).collect(),
            },
            intervals: self.intervals.clone(),
        }
    }

    fn region(&self, region: &HotRegion) -> RegionView {
        RegionView {
            block: self.blocks[region.block].clone(),
            offset: Pages(region.first).bytes().0,
            bytes: Pages(region.pages).bytes().0,
            pages: region.written.0,
            share: percent(region.share),
        }
    }
}

fn growth(point: &GrowthPoint) -> GrowthView {
    let pages = (point.pages * 10.0).round() / 10.0;
    GrowthView { window: ms(point.window), pages, windows: point.windows }
}

fn prediction(bandwidth: u64, seen: &policy::Prediction) -> PredictionView {
    let ending = match seen.ending {
        policy::Ending::Converged => "converged",
        policy::Ending::TimedOut => "timeout",
        policy::Ending::Never => "never",
    };
    PredictionView {
        bandwidth,
        ending: ending.into(),
        rounds: seen.rounds,
        total_time: ms(seen.total_time),
        bytes: seen.bytes.0,
        residual_pages: seen.residual.0,
        downtime: ms(seen.downtime),
    }
}

pub(super) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

pub(super) fn percent(share: f64) -> f64 {
    (share * 1e5).round() / 1e3
}
