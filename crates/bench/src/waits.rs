//! How long a guest waited for pages that were not there yet, in a post-copy.
//!
//! Stock QEMU counts milliseconds that each virtual CPU was blocked, at the target, and pages that were asked for, at the source:
//! what is known of a single wait is a mean over requests. Ours times each wait; beside these times it gets the same mean, since
//! like is compared with like.

use serde_json::Value;

use crate::figures::{Figures, Metric};
use crate::ours::SaidOfPostcopy;

/// QEMU's list of milliseconds, by virtual CPU.
const BLOCKED: &str = "postcopy-vcpu-blocktime";

/// What the mean of stock QEMU is.
pub(crate) const NOTE: &str = "Blocked time is postcopy-vcpu-blocktime, of all virtual CPUs together; stock QEMU counts it by a clock of whole \
     milliseconds. Blocked for each fault is a mean: that time over the source's postcopy-requests for stock QEMU, which times no single \
     fault, and over the number of waits for ours. Mean and 99 of 100 of fault latency are of ours alone, which times each wait.";

/// Whether the target has said how long the guest waited.
pub(crate) fn are_told(target: &Value) -> bool {
    target.get(BLOCKED).is_some_and(Value::is_array)
}

/// Of ours.
pub(crate) fn of_ours(said: &SaidOfPostcopy, figures: &mut Figures) {
    let blocked_ms = sum(said.postcopy_vcpu_blocktime.iter().copied());
    let waits = said.faults.map_or(f64::NAN, |n| n as f64);
    means(blocked_ms, waits, said.postcopy_requests as f64, figures);
    if let Some(latency) = said.postcopy_latency.filter(|_| waits > 0.0) {
        figures.set(Metric::FaultMean, latency.mean);
        figures.set(Metric::FaultP99, latency.p99);
    }
}

/// Of what stock QEMU says at both ends.
pub(crate) fn of_stock(source: &Value, target: &Value, figures: &mut Figures) {
    let blocked = target.get(BLOCKED).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let blocked_ms = sum(blocked.iter().map(|ms| ms.as_f64().unwrap_or(f64::NAN)));
    let requests = source.pointer("/ram/postcopy-requests").and_then(Value::as_f64).unwrap_or(f64::NAN);
    means(blocked_ms, requests, requests, figures);
}

fn means(blocked_ms: f64, waits: f64, requests: f64, figures: &mut Figures) {
    figures.set(Metric::BlockedTime, blocked_ms);
    figures.set(Metric::PageRequests, requests);
    figures.set(Metric::BlockedPerFault, blocked_ms * 1e3 / waits);
}

/// Of nothing it is not known.
fn sum(values: impl Iterator<Item = f64>) -> f64 {
    values.reduce(|a, b| a + b).unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_have_the_same_mean_and_ours_has_its_own_beside_it() {
        let said = r#"{"postcopy-requests":900,"pushed-pages":7,"faults":1000,"postcopy-vcpu-blocktime":[150.0,50.0],
            "postcopy-latency":{"mean":190,"p50":150,"p99":800,"max":2000}}"#;
        let mut ours = Figures::default();
        of_ours(&serde_json::from_str(said).unwrap(), &mut ours);
        let all = [
            (Metric::BlockedTime, 200.0),
            (Metric::PageRequests, 900.0),
            (Metric::BlockedPerFault, 200.0),
            (Metric::FaultMean, 190.0),
            (Metric::FaultP99, 800.0),
        ];
        assert_eq!(all.map(|(metric, _)| (metric, ours.get(metric).unwrap())), all);

        let mut stock = Figures::default();
        let source = json!({ "ram": { "postcopy-requests": 500 } });
        of_stock(&source, &json!({ BLOCKED: [2000, 100] }), &mut stock);
        assert_eq!(stock.get(Metric::BlockedPerFault), Some(4200.0));
        assert_eq!(stock.get(Metric::FaultP99), None);
    }

    #[test]
    fn what_a_qemu_does_not_tell_was_not_measured() {
        let mut figures = Figures::default();
        of_stock(&json!({}), &json!({ "status": "completed" }), &mut figures);
        of_stock(&json!({}), &json!({ BLOCKED: [] }), &mut figures);
        of_ours(&SaidOfPostcopy::default(), &mut figures);
        assert_eq!(figures.metrics().collect::<Vec<_>>(), [Metric::PageRequests]);
        assert!(!are_told(&json!({ "status": "completed" })) && are_told(&json!({ BLOCKED: [0] })));
    }

    #[test]
    fn where_nobody_waited_there_is_no_mean() {
        let mut figures = Figures::default();
        of_stock(&json!({ "ram": { "postcopy-requests": 0 } }), &json!({ BLOCKED: [0] }), &mut figures);
        assert_eq!(
            (figures.get(Metric::BlockedTime), figures.get(Metric::BlockedPerFault)),
            (Some(0.0), None)
        );
    }
}
