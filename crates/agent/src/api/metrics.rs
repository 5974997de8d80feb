//! `/metrics`: Prometheus text, with KubeVirt's names for a migration's figures under our prefix.
//!
//! The registry is built anew for each scrape from the agent's own views. There is no second copy of any figure that
//! could go stale, and the series of a VM that left are gone with it.

use super::problem::Failure;
use super::routes::blocking;
use super::{Context, Control};
use crate::model::{MigrationView, VmView};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use sterna_engine::Reference;

/// Media type of the OpenMetrics text that prometheus-client writes.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Downtimes in seconds: from the floor of a VM without dirty pages to what a user calls an outage.
const DOWNTIME_BUCKETS: [f64; 11] = [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 5.0];

/// Total times in seconds: from a small idle VM to a night's evacuation.
const TOTAL_BUCKETS: [f64; 9] = [1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 7200.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Which {
    vm: String,
    source: String,
    target: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct As {
    vm: String,
    source: String,
    target: String,
    reference: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InState {
    state: String,
}

#[utoipa::path(get, path = "/metrics", responses((status = 200, description = "Prometheus text")))]
/// Figures for Prometheus.
pub(crate) async fn metrics(State(context): State<Context>) -> Result<Response, Failure> {
    let registry = blocking(context, |agent| Ok(registry(&*agent))).await?;
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|_| {
        Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the metrics could not be written")
    })?;
    Ok(([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response())
}

fn registry(agent: &dyn Control) -> Registry {
    let mut registry = Registry::with_prefix("sterna");
    let info = Info::new([("host", agent.name()), ("version", env!("CARGO_PKG_VERSION").to_owned())]);
    registry.register("agent", "The agent that answers", info);
    states(&mut registry, &agent.vms());
    let migrations = agent.migrations();
    let of_migrations = registry.sub_registry_with_prefix("migration");
    progress(of_migrations, &migrations);
    outcomes(of_migrations, &migrations);
    durations(of_migrations, &migrations);
    registry
}

fn states(registry: &mut Registry, vms: &[VmView]) {
    let family = Family::<InState, Gauge>::default();
    for vm in vms {
        family.get_or_create(&InState { state: vm.state.clone() }).inc();
    }
    registry.register("vms", "VMs of this host by state", family);
}

/// A figure of a migration that goes on.
type Figure = (&'static str, &'static str, Option<Unit>, fn(&MigrationView) -> u64);

/// Gauges of a migration that goes on; the unit becomes the end of the name.
const FIGURES: [Figure; 8] = [
    ("data_total", "RAM of the VM", Some(Unit::Bytes), |view| view.ram.total),
    ("data_processed", "Page data and descriptors sent", Some(Unit::Bytes), |view| view.ram.transferred),
    ("data_remaining", "RAM known to be unsent", Some(Unit::Bytes), |view| view.ram.remaining),
    ("dirty_memory_rate", "RAM written per second in the last round", Some(Unit::Bytes), |view| {
        view.ram.dirty_pages_rate.saturating_mul(view.ram.page_size)
    }),
    ("memory_transfer_rate", "RAM sent per second in the last round", Some(Unit::Bytes), |view| {
        // A float cast saturates, and makes zero of what is no number.
        (view.ram.mbps * 1e6 / 8.0) as u64
    }),
    ("template_sent", "Bytes of the VM's template sent", Some(Unit::Bytes), |view| view.ram.template_bytes),
    ("template_total", "Bytes of it that the target lacked", Some(Unit::Bytes), |view| {
        view.ram.template_total
    }),
    ("round", "Round that is being sent", None, |view| u64::from(view.ram.dirty_sync_count)),
];

fn progress(registry: &mut Registry, migrations: &[MigrationView]) {
    gauges(registry, &FIGURES, migrations.iter().filter(|view| goes_on(view)));
    let served = |view: &&MigrationView| goes_on(view) && view.postcopy.is_some();
    gauges(registry, &SERVED, migrations.iter().filter(served));
    references(registry, migrations.iter().filter(|view| goes_on(view)));
}

/// What pages of migrations that go on travelled as.
fn references<'a>(registry: &mut Registry, views: impl Iterator<Item = &'a MigrationView>) {
    let (pages, saved) = (Family::<As, Gauge>::default(), Family::<As, Gauge>::default());
    for view in views {
        let Which { vm, source, target } = which(view);
        for reference in Reference::ALL {
            let (vm, source, target) = (vm.clone(), source.clone(), target.clone());
            let as_it = As { vm, source, target, reference: reference.word().into() };
            let (count, bytes) = view.ram.references(reference);
            pages.get_or_create(&as_it).set(i64::try_from(count).unwrap_or(i64::MAX));
            saved.get_or_create(&as_it).set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }
    registry.register("pages", "Pages by what they travelled as", pages);
    registry.register_with_unit("saved", "What that saved beside sending them whole", Unit::Bytes, saved);
}

fn gauges<'a>(
    registry: &mut Registry,
    figures: &[Figure],
    views: impl Iterator<Item = &'a MigrationView> + Clone,
) {
    for (name, help, unit, figure) in figures.iter().cloned() {
        let family = Family::<Which, Gauge>::default();
        for view in views.clone() {
            let value = i64::try_from(figure(view)).unwrap_or(i64::MAX);
            family.get_or_create(&which(view)).set(value);
        }
        match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, family),
            None => registry.register(name, help, family),
        }
    }
}

/// Gauges of a migration whose VM runs at its target with pages missing.
const SERVED: [Figure; 2] = [
    ("postcopy_requested_pages", "Pages that the target asked for", None, |view| {
        view.postcopy.as_ref().map_or(0, |known| known.requests)
    }),
    ("postcopy_pushed_pages", "Pages sent before they were asked for", None, |view| {
        view.postcopy.as_ref().map_or(0, |known| known.pushed)
    }),
];

fn outcomes(registry: &mut Registry, migrations: &[MigrationView]) {
    for (statuses, name, help) in [
        (&["completed"][..], "succeeded", "Migrations that ended with the VM at its target"),
        (&["failed"], "failed", "Migrations that failed"),
        (&["cancelled"], "cancelled", "Migrations that were cancelled"),
        (&["unresolved"], "unresolved", "Migrations whose VM was released and that no target says it runs"),
        (
            &["postcopy-active"],
            "postcopy_active",
            "Migrations whose VM runs at its target and gets its missing pages",
        ),
        (
            &["postcopy-paused", "postcopy-recover"],
            "postcopy_paused",
            "Migrations whose VM runs at its target with pages missing and no connection",
        ),
    ] {
        let family = Family::<Which, Gauge>::default();
        for view in migrations.iter().filter(|view| statuses.contains(&view.status.as_str())) {
            family.get_or_create(&which(view)).inc();
        }
        registry.register(name, help, family);
    }
}

fn durations(registry: &mut Registry, migrations: &[MigrationView]) {
    let downtime = Histogram::new(DOWNTIME_BUCKETS);
    let total = Histogram::new(TOTAL_BUCKETS);
    let longest = Histogram::new(DOWNTIME_BUCKETS);
    for view in migrations.iter().filter(|view| view.status == "completed") {
        total.observe(view.total_time / 1e3);
        if let Some(ms) = view.downtime {
            downtime.observe(ms / 1e3);
        }
        if let Some(latency) = view.postcopy.as_ref().and_then(|known| known.latency) {
            longest.observe(latency.max as f64 / 1e6);
        }
    }
    registry.register_with_unit(
        "downtime",
        "Time that VMs were stopped to be moved",
        Unit::Seconds,
        downtime,
    );
    registry.register_with_unit(
        "total_time",
        "Time from the request until the source was free",
        Unit::Seconds,
        total,
    );
    registry.register_with_unit(
        "postcopy_longest_wait",
        "Longest time that a guest waited for a page after its hand-over",
        Unit::Seconds,
        longest,
    );
}

fn goes_on(view: &MigrationView) -> bool {
    !matches!(view.status.as_str(), "completed" | "failed" | "cancelled")
}

fn which(view: &MigrationView) -> Which {
    Which { vm: view.vm.clone(), source: view.source.clone(), target: view.target.clone() }
}
