//! What may be asked of post-copy, and when: the answers of the API before anything reaches the migration itself.

use crate::AgentError;
use crate::model::{MigrateRequest, MigrationView, SendTemplate};

/// QEMU's words for a VM that runs at its target with pages missing.
pub(crate) const WORDS: [&str; 3] = ["postcopy-active", "postcopy-paused", "postcopy-recover"];

/// Whether the VM of this migration runs at its target, with pages missing.
pub(crate) fn is_served(view: &MigrationView) -> bool {
    WORDS.contains(&view.status.as_str())
}

/// What a request wants of post-copy is one thing, and nothing of it stays without effect.
pub(crate) fn check(request: &MigrateRequest) -> Result<(), AgentError> {
    let ways = [
        (request.postcopy, "postcopy"),
        (request.postcopy_after_precopy, "postcopy-after-precopy"),
        (request.timeout_postcopy, "timeout-postcopy"),
    ];
    let named = named(&ways);
    if named.len() > 1 {
        return Err(AgentError::Invalid(format!(
            "{} exclude each other: give the one that says when the VM is to run at the target; without any it can still be \
             switched while it is moved",
            named.join(" and ")
        )));
    }
    if request.timeout_postcopy && request.timeout.is_none() {
        return Err(AgentError::Invalid("timeout-postcopy needs timeout: it says what is done then".into()));
    }
    if request.send_template == SendTemplate::After && !request.postcopy {
        return Err(AgentError::Invalid(
            "send-template after lets the VM run at the target before its template is there: that is post-copy at once, give \
             postcopy too"
                .into(),
        ));
    }
    let without_rounds = [
        (request.auto_converge, "auto-converge"),
        (request.min_bandwidth.is_some_and(|rate| rate > 0), "min-bandwidth"),
        (request.bandwidth_step.is_some(), "bandwidth-step"),
        (request.delta_cache.is_some_and(|bytes| bytes > 0), "delta-cache"),
        (request.timeout.is_some(), "timeout"),
    ];
    match (request.postcopy, request.postcopy_after_precopy) {
        (true, _) => {
            refuse(&without_rounds, "postcopy", "lets the VM run at the target before any page is sent")
        }
        (_, true) => refuse(
            &without_rounds[..1],
            "postcopy-after-precopy",
            "switches after a round that a guest is too fast for, before it would be slowed",
        ),
        _ => Ok(()),
    }
}

fn named(options: &[(bool, &'static str)]) -> Vec<&'static str> {
    options.iter().filter(|(given, _)| *given).map(|(_, name)| *name).collect()
}

fn refuse(options: &[(bool, &'static str)], way: &str, does: &str) -> Result<(), AgentError> {
    match named(options) {
        given if given.is_empty() => Ok(()),
        given => Err(AgentError::Invalid(format!(
            "{way} {does}: {} would have no effect, leave it out",
            given.join(", ")
        ))),
    }
}

/// Why this migration cannot be switched to post-copy now, if it cannot.
pub(crate) fn against_switch(view: &MigrationView) -> Option<String> {
    let MigrationView { id, vm, target, status, .. } = view;
    if let Some(why) = &view.postcopy_refusal {
        return Some(format!(
            "VM {vm} cannot run at host {target} before all of its pages are there: {why}; its migration goes on as it is"
        ));
    }
    match status.as_str() {
        "setup" | "active" => None,
        "completed" | "failed" | "cancelled" => Some(format!("migration {id} of VM {vm} is over: {status}")),
        "cancelling" => Some(format!("migration {id} of VM {vm} is being cancelled")),
        _ if is_served(view) => Some(format!(
            "VM {vm} is in post-copy already: it runs at host {target}, and its missing pages follow"
        )),
        "unresolved" => Some(format!(
            "VM {vm} was handed over, and host {target} does not say whether it runs it: see sterna status {vm}"
        )),
        _ => Some(format!("VM {vm} is stopped already to run at host {target}: there is nothing to switch")),
    }
}

/// Why this migration cannot be cancelled because of its post-copy, if it cannot.
pub(crate) fn against_cancel(view: &MigrationView) -> Option<String> {
    let MigrationView { vm, source, target, .. } = view;
    is_served(view).then(|| {
        format!(
            "VM {vm} cannot be taken back: it runs at host {target}, which has what it has written since, and host {source} has \
             what is missing there. The migration ends by itself when all pages have come"
        )
    })
}

/// Why nothing of this can be changed: it is about what comes before the hand-over.
pub(crate) fn against_change(view: &MigrationView, options: &[(bool, &'static str)]) -> Option<String> {
    let named = named(options);
    (is_served(view) && !named.is_empty()).then(|| {
        let MigrationView { vm, target, .. } = view;
        format!("VM {vm} runs at host {target} already: {} has no effect any more", named.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(status: &str) -> MigrationView {
        let ram = serde_json::json!({"transferred": 0, "remaining": 0, "total": 0, "duplicate": 0, "normal": 0, "normal-bytes": 0,
            "dirty-pages-rate": 0, "dirty-sync-count": 0, "mbps": 0.0, "page-size": 4096});
        let view = serde_json::json!({"id": "m1", "vm": "web", "source": "hosta", "target": "hostb", "status": status,
            "runs-at": "hosta", "began": "2026-01-01T00:00:00Z", "total-time": 0.0, "setup-time": 0.0,
            "downtime-limit": 300, "ram": ram, "device-state": 0, "wire-bytes": 0});
        serde_json::from_value(view).unwrap_or_else(|why| panic!("{why}"))
    }

    #[test]
    fn only_what_has_not_stopped_yet_is_switched() {
        for status in ["setup", "active"] {
            assert_eq!(against_switch(&view(status)), None, "{status}");
        }
        for (status, why) in [
            ("device", "is stopped already"),
            ("cancelling", "is being cancelled"),
            ("cancelled", "is over: cancelled"),
            ("completed", "is over: completed"),
            ("failed", "is over: failed"),
            ("unresolved", "does not say whether"),
            ("postcopy-active", "in post-copy already"),
            ("postcopy-paused", "in post-copy already"),
            ("postcopy-recover", "in post-copy already"),
        ] {
            let told = against_switch(&view(status));
            assert!(told.as_ref().is_some_and(|text| text.contains(why)), "{status}: {told:?}");
        }
        let refused = MigrationView { postcopy_refusal: Some("huge pages".into()), ..view("active") };
        assert!(
            against_switch(&refused)
                .is_some_and(|text| text.contains("hostb") && text.contains("huge pages"))
        );
    }

    #[test]
    fn a_vm_that_runs_at_its_target_is_not_taken_back() {
        for status in WORDS {
            let text = against_cancel(&view(status)).unwrap_or_default();
            assert!(text.contains("it runs at host hostb"), "{status}: {text}");
            let limit = against_change(&view(status), &[(true, "downtime-limit"), (false, "auto-converge")]);
            assert!(limit.is_some_and(|text| text.ends_with("downtime-limit has no effect any more")));
            assert_eq!(against_change(&view(status), &[(false, "downtime-limit")]), None);
        }
        for status in ["setup", "active", "device", "unresolved"] {
            assert_eq!(against_cancel(&view(status)), None, "{status}");
            assert_eq!(against_change(&view(status), &[(true, "downtime-limit")]), None, "{status}");
        }
    }

    #[test]
    fn a_request_wants_one_thing_and_nothing_without_effect() {
        let plain = || MigrateRequest::new("web", "hostb");
        let lazily = || MigrateRequest { postcopy: true, ..plain() };
        let hybrid = || MigrateRequest { postcopy_after_precopy: true, ..plain() };
        let timed = || MigrateRequest { timeout_postcopy: true, timeout: Some(5.0), ..plain() };
        for fine in [
            plain(),
            lazily(),
            hybrid(),
            timed(),
            MigrateRequest {
                verify: true,
                balloon: true,
                max_bandwidth: Some(1),
                delta_cache: Some(0),
                ..lazily()
            },
            MigrateRequest { timeout: Some(5.0), min_bandwidth: Some(1), delta_cache: Some(1), ..hybrid() },
            MigrateRequest { auto_converge: true, ..timed() },
            MigrateRequest { send_template: SendTemplate::Beside, ..hybrid() },
            MigrateRequest { send_template: SendTemplate::After, ..lazily() },
        ] {
            assert!(check(&fine).is_ok(), "{fine:?}");
        }
        for (wrong, word) in [
            (MigrateRequest { send_template: SendTemplate::After, ..hybrid() }, "give postcopy too"),
            (MigrateRequest { postcopy_after_precopy: true, ..lazily() }, "exclude"),
            (MigrateRequest { postcopy: true, ..timed() }, "exclude"),
            (MigrateRequest { postcopy_after_precopy: true, ..timed() }, "exclude"),
            (MigrateRequest { timeout: None, ..timed() }, "needs timeout"),
            (MigrateRequest { auto_converge: true, ..lazily() }, "auto-converge would"),
            (
                MigrateRequest { min_bandwidth: Some(1), bandwidth_step: Some(1), ..lazily() },
                "min-bandwidth, bandwidth-step",
            ),
            (MigrateRequest { delta_cache: Some(1), ..lazily() }, "delta-cache"),
            (MigrateRequest { timeout: Some(5.0), ..lazily() }, "timeout"),
            (MigrateRequest { auto_converge: true, ..hybrid() }, "auto-converge would"),
        ] {
            let told = check(&wrong).map_err(|why| why.to_string());
            assert!(told.as_ref().is_err_and(|text| text.contains(word)), "{wrong:?}: {told:?}");
        }
    }
}
