//! `/openapi.json`: the routes and shapes, derived from the code that serves them.

use super::{events, metrics, routes, templates, working_set};
use axum::Json;
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Sterna agent",
        description = "Moves running QEMU/KVM virtual machines. Served on the agent's Unix socket. \
            Keys of a migration are those of QEMU's query-migrate wherever the meaning is equal."
    ),
    paths(
        routes::vms,
        routes::run,
        routes::vm,
        routes::stop,
        routes::recover,
        working_set::measure,
        templates::templates,
        templates::make,
        templates::check,
        templates::template,
        templates::remove,
        templates::push,
        routes::hosts,
        routes::migrations,
        routes::migrate,
        routes::migrate_together,
        routes::migration,
        routes::cancel,
        routes::postcopy,
        routes::set,
        events::events,
        routes::healthz,
        routes::readyz,
        metrics::metrics,
        document
    )
)]
struct Document;

#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "this document")))]
/// This document.
pub(crate) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}
