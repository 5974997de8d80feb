//! Measurements of fake VMs: `web` completes, `stuck` goes on until nobody listens, `late` gives way to a migration, `broken` fails,
//! `lost` cannot be measured.

use std::sync::atomic::Ordering;
use std::time::Duration;

use sterna_agent::AgentError;
use sterna_agent::model::*;
use tokio::sync::mpsc;

use super::{Fake, RAM};

/// Intervals of a fake measurement that ends.
const INTERVALS: usize = 3;
/// Time between two of them.
const STEP: Duration = Duration::from_millis(10);

impl Fake {
    pub(super) fn measured(
        &self,
        name: &str,
        request: WorkingSetRequest,
    ) -> Result<mpsc::Receiver<WorkingSetEvent>, AgentError> {
        if name == "lost" {
            return Err(AgentError::Conflict(format!("VM {name} at host hosta is in migration m1")));
        }
        if self.measuring.swap(true, Ordering::SeqCst) {
            return Err(AgentError::Conflict(format!("VM {name} at host hosta is being measured already")));
        }
        self.measures.lock().unwrap().push(request.clone());
        let (sender, receiver) = mpsc::channel(64);
        let (name, measuring) = (name.to_owned(), self.measuring.clone());
        std::thread::spawn(move || {
            let mut intervals = Vec::new();
            for n in 1.. {
                std::thread::sleep(STEP);
                if sender.is_closed() || n > INTERVALS && name != "stuck" {
                    break;
                }
                intervals.push(interval(n));
                drop(sender.try_send(WorkingSetEvent::Interval(interval(n))));
            }
            measuring.store(false, Ordering::SeqCst);
            let view = result(&name, &request, intervals);
            drop(sender.try_send(WorkingSetEvent::End(Box::new(view))));
        });
        Ok(receiver)
    }
}

fn interval(n: usize) -> IntervalView {
    let at = n as f64 * 1000.0;
    IntervalView {
        at,
        length: 1000.0,
        pages: 100 * n as u64,
        unique_pages: 120 * n as u64,
        cost: 0.02,
        stretched: false,
    }
}

fn result(vm: &str, request: &WorkingSetRequest, intervals: Vec<IntervalView>) -> WorkingSetView {
    let (status, error_desc) = match vm {
        "late" => ("cut-short", Some("the measurement of VM late at hosta was cut short".to_owned())),
        "broken" => {
            ("failed", Some("the measurement of VM broken at hosta failed: its QEMU ended".to_owned()))
        }
        _ => ("completed", None),
    };
    let prediction = |bandwidth: &u64| PredictionView {
        bandwidth: *bandwidth,
        ending: if *bandwidth < 20_000_000 { "never" } else { "converged" }.into(),
        rounds: 5,
        total_time: 4000.0,
        bytes: RAM,
        residual_pages: 30,
        downtime: 21.5,
    };
    let region =
        RegionView { block: "pc.ram".into(), offset: 0x40_0000, bytes: 16 << 20, pages: 300, share: 98.5 };
    WorkingSetView {
        vm: vm.into(),
        host: "hosta".into(),
        status: status.into(),
        error_desc,
        began: jiff::Timestamp::now(),
        duration: intervals.len() as f64 * 1000.0,
        interval: request.interval,
        stretched: false,
        cost: 0.02,
        page_size: 4096,
        total_pages: RAM / 4096,
        populated_pages: 20_000,
        zero_pages: 100,
        dirty_pages_rate: 200.0,
        unique_pages: 360,
        growth: vec![
            GrowthView { window: 62.5, pages: 14.0, windows: 3 },
            GrowthView { window: 1000.0, pages: 200.0, windows: 3 },
        ],
        regions: vec![region],
        predictions: request.bandwidths.iter().map(prediction).collect(),
        intervals,
    }
}
