//! What is said of a VM that runs at its target before all of its pages are there.

use crate::human::short_bytes;
use sterna_agent::model::{LatencyView, MigrationView};

/// How a post-copy goes, for the line of progress; nothing where the VM does not run at its target with pages missing.
pub(crate) fn detail(view: &MigrationView) -> Option<String> {
    let target = &view.target;
    let missing = missing(view);
    Some(match view.status.as_str() {
        "postcopy-active" => match &view.postcopy {
            Some(known) => {
                let (asked, pushed) = (known.requests, known.pushed);
                format!("it runs at {target}, {missing} missing, {asked} pages asked for, {pushed} pushed")
            }
            None => format!("it runs at {target}, {missing} missing"),
        },
        "postcopy-paused" => format!(
            "it runs at {target} and waits where it touches one of the missing pages ({missing}): the connection is lost; it goes \
             on by itself once {target} is reached"
        ),
        "postcopy-recover" => format!(
            "it runs at {target}, {missing} missing; {target} is reached again and connections are made: it goes on by itself"
        ),
        _ => return None,
    })
}

/// An agent that was restarted does not know how much is missing until it is told.
fn missing(view: &MigrationView) -> String {
    match view.postcopy {
        Some(_) => short_bytes(view.ram.remaining),
        None => "an unknown part".to_owned(),
    }
}

/// Rows of a result or a status; none for a migration without post-copy.
pub(crate) fn rows(view: &MigrationView) -> Vec<(&'static str, String)> {
    let mut rows: Vec<(&'static str, String)> = Vec::new();
    rows.extend(detail(view).map(|text| ("Post-copy", text)));
    rows.extend(
        view.postcopy_refusal.iter().map(|why| ("Post-copy", format!("{} cannot: {why}", view.target))),
    );
    let Some(known) = &view.postcopy else { return rows };
    // As virsh calls them.
    rows.push(("Postcopy requests", format!("{} pages", known.requests)));
    rows.push(("Pushed", format!("{} pages before they were asked for", known.pushed)));
    if let Some(faults) = known.faults {
        rows.push(("Faults", format!("{faults}{}", known.latency.map(waited).unwrap_or_default())));
    }
    if !known.vcpu_blocktime.is_empty() {
        let waited = known.vcpu_blocktime.iter().enumerate().map(|(at, ms)| format!("{at} {ms:.1}"));
        rows.push(("Processors waited", waited.collect::<Vec<_>>().join(", ") + " ms"));
    }
    rows
}

fn waited(latency: LatencyView) -> String {
    let ms = |us: u64| us as f64 / 1e3;
    let (p50, p99, max) = (ms(latency.p50), ms(latency.p99), ms(latency.max));
    format!(", waited p50 {p50:.2}, p99 {p99:.2}, max {max:.2} ms")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(status: &str, served: bool) -> MigrationView {
        let ram = serde_json::json!({"transferred": 0, "remaining": 64 << 20, "total": 256 << 20, "duplicate": 0, "normal": 0,
            "normal-bytes": 0, "dirty-pages-rate": 0, "dirty-sync-count": 0, "mbps": 0.0, "page-size": 4096});
        let mut view = serde_json::json!({"id": "m1", "vm": "web", "source": "hosta", "target": "hostb", "status": status,
            "runs-at": "hostb", "began": "2026-01-01T00:00:00Z", "total-time": 0.0, "setup-time": 0.0,
            "downtime-limit": 300, "ram": ram, "device-state": 0, "wire-bytes": 0});
        if served {
            view["postcopy"] = serde_json::json!({"postcopy-requests": 120, "pushed-pages": 3000});
        }
        serde_json::from_value(view).unwrap_or_else(|why| panic!("{why}"))
    }

    #[test]
    fn a_vm_with_pages_missing_is_told_with_what_happens_next() {
        for (status, words) in [
            ("postcopy-active", ["it runs at hostb, 64.0 MiB missing", "120 pages asked for, 3000 pushed"]),
            (
                "postcopy-paused",
                ["it runs at hostb and waits where", "it goes on by itself once hostb is reached"],
            ),
            ("postcopy-recover", ["it runs at hostb, 64.0 MiB missing", "it goes on by itself"]),
        ] {
            let text = detail(&view(status, true)).unwrap_or_default();
            assert!(words.iter().all(|word| text.contains(word)), "{status}: {text}");
            assert_eq!(rows(&view(status, true))[0], ("Post-copy", text));
            let unknown = detail(&view(status, false)).unwrap_or_default();
            assert!(unknown.contains("an unknown part"), "after an agent's restart: {unknown}");
        }
        for status in ["setup", "active", "device", "completed", "failed", "cancelled", "unresolved"] {
            assert_eq!(detail(&view(status, true)), None);
            assert_eq!(rows(&view(status, false)), []);
        }
    }
}
