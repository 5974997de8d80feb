//! One handler per route.

use super::problem::Failure;
use super::request::{JsonBody, idempotency_key};
use super::{Context, Control, events, metrics, openapi, templates, working_set};
use crate::AgentError;
use crate::model::{
    GangRequest, GangView, HostView, MigrateRequest, MigrationView, Problem, RecoverRequest, RecoverView,
    RunRequest, SetRequest, VmView,
};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use std::sync::Arc;

type Answer<T> = Result<T, Failure>;

/// All routes.
pub(crate) fn router(context: Context) -> Router {
    Router::new()
        .route("/v1/vms", get(vms).post(run))
        .route("/v1/vms/{name}", get(vm).delete(stop))
        .route("/v1/vms/{name}/recover", post(recover))
        .route("/v1/vms/{name}/working-set", post(working_set::measure))
        .route("/v1/templates", get(templates::templates).post(templates::make))
        .route("/v1/template-checks", post(templates::check))
        .route("/v1/templates/{name}", get(templates::template).delete(templates::remove))
        .route("/v1/templates/{name}/push", post(templates::push))
        .route("/v1/hosts", get(hosts))
        .route("/v1/migrations", get(migrations).post(migrate))
        .route("/v1/gangs", post(migrate_together))
        .route("/v1/migrations/{id}", get(migration).delete(cancel).patch(set))
        .route("/v1/migrations/{id}/postcopy", post(postcopy))
        .route("/v1/migrations/{id}/events", get(events::events))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(openapi::document))
        .fallback(unknown)
        .method_not_allowed_fallback(not_allowed)
        .with_state(context)
}

/// Runs a call of the agent on a thread of its own: it may wait for QEMU, a disk or a peer.
pub(crate) async fn blocking<T: Send + 'static>(
    context: Context,
    call: impl FnOnce(Arc<dyn Control>) -> Result<T, AgentError> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(move || call(context.control)).await {
        Ok(result) => result.map_err(Failure::from),
        Err(why) => {
            tracing::error!(%why, "a request ended the thread that worked on it");
            let text = "the agent failed while it worked on this request; its log says why";
            Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", text))
        }
    }
}

/// What is to be told of VMs.
#[derive(serde::Deserialize)]
pub(crate) struct Told {
    #[serde(default)]
    memory: bool,
}

#[utoipa::path(get, path = "/v1/vms",
    params(("memory" = Option<bool>, Query, description = "whether to look what memory each uses, which takes milliseconds for each gigabyte")),
    responses((status = 200, body = Vec<VmView>)))]
/// All VMs of this host.
pub(crate) async fn vms(
    State(context): State<Context>,
    Query(told): Query<Told>,
) -> Answer<Json<Vec<VmView>>> {
    let look =
        move |agent: Arc<dyn Control>| Ok(if told.memory { agent.vms_with_memory() } else { agent.vms() });
    blocking(context, look).await.map(Json)
}

#[utoipa::path(post, path = "/v1/vms", request_body = RunRequest, responses(
    (status = 201, body = VmView, headers(("Location" = String, description = "where the VM is"))),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Starts a VM from its user's own QEMU command line.
pub(crate) async fn run(
    State(context): State<Context>,
    JsonBody(request): JsonBody<RunRequest>,
) -> Answer<Response> {
    let view = blocking(context, move |agent| agent.run(request)).await?;
    let location = format!("/v1/vms/{}", view.name);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(view)).into_response())
}

#[utoipa::path(get, path = "/v1/vms/{name}", params(("name" = String, Path,)), responses(
    (status = 200, body = VmView),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// One VM.
pub(crate) async fn vm(State(context): State<Context>, Path(name): Path<String>) -> Answer<Json<VmView>> {
    blocking(context, move |agent| agent.vm(&name)).await.map(Json)
}

#[utoipa::path(delete, path = "/v1/vms/{name}", params(("name" = String, Path,)), responses(
    (status = 204, description = "its QEMU has ended"),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Ends a VM: its QEMU quits, the guest is not asked.
pub(crate) async fn stop(State(context): State<Context>, Path(name): Path<String>) -> Answer<StatusCode> {
    blocking(context, move |agent| agent.stop(&name)).await.map(|()| StatusCode::NO_CONTENT)
}

#[utoipa::path(post, path = "/v1/vms/{name}/recover", params(("name" = String, Path,)), request_body = RecoverRequest,
    responses(
        (status = 200, body = RecoverView),
        (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Decides where an unresolved VM runs. The other host is asked once more; its word goes before this one.
pub(crate) async fn recover(
    State(context): State<Context>,
    Path(name): Path<String>,
    JsonBody(request): JsonBody<RecoverRequest>,
) -> Answer<Json<RecoverView>> {
    blocking(context, move |agent| agent.recover(&name, request)).await.map(Json)
}

#[utoipa::path(get, path = "/v1/hosts", responses((status = 200, body = Vec<HostView>)))]
/// This host, and those that VMs may go to and come from.
pub(crate) async fn hosts(State(context): State<Context>) -> Answer<Json<Vec<HostView>>> {
    blocking(context, |agent| Ok(agent.hosts())).await.map(Json)
}

#[utoipa::path(get, path = "/v1/migrations", responses((status = 200, body = Vec<MigrationView>)))]
/// Migrations from this host, the newest first.
pub(crate) async fn migrations(State(context): State<Context>) -> Answer<Json<Vec<MigrationView>>> {
    blocking(context, |agent| Ok(agent.migrations())).await.map(Json)
}

#[utoipa::path(post, path = "/v1/migrations", request_body = MigrateRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "a repeated key returns the first request's migration")),
    responses(
        (status = 202, body = MigrationView, headers(("Location" = String, description = "where the migration is"))),
        (status = 422, body = Problem, content_type = "application/problem+json", description = "the pre-check's reasons"),
        (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Begins to move a VM.
pub(crate) async fn migrate(
    State(context): State<Context>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<MigrateRequest>,
) -> Answer<Response> {
    let key = idempotency_key(&headers)?;
    let view = blocking(context, move |agent| agent.migrate(request, key)).await?;
    let location = format!("/v1/migrations/{}", view.id);
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(view)).into_response())
}

#[utoipa::path(post, path = "/v1/gangs", request_body = GangRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "asked again with the same key, nothing begins twice")),
    responses(
        (status = 202, body = GangView),
        (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Begins to move several VMs together: what those to one host have in common travels once.
pub(crate) async fn migrate_together(
    State(context): State<Context>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<GangRequest>,
) -> Answer<Response> {
    let key = idempotency_key(&headers)?;
    let view: GangView = blocking(context, move |agent| agent.migrate_together(request, key)).await?;
    Ok((StatusCode::ACCEPTED, Json(view)).into_response())
}

#[utoipa::path(get, path = "/v1/migrations/{id}", params(("id" = String, Path,)), responses(
    (status = 200, body = MigrationView),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// One migration.
pub(crate) async fn migration(
    State(context): State<Context>,
    Path(id): Path<String>,
) -> Answer<Json<MigrationView>> {
    blocking(context, move |agent| current(&*agent, &id)).await.map(Json)
}

#[utoipa::path(delete, path = "/v1/migrations/{id}", params(("id" = String, Path,)), responses(
    (status = 202, body = MigrationView, description = "it is being cancelled"),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Cancels a migration: the VM stays where it runs. Refused once it runs at the target with pages missing.
pub(crate) async fn cancel(State(context): State<Context>, Path(id): Path<String>) -> Answer<Response> {
    let view = blocking(context, move |agent| agent.cancel(&id).and_then(|()| current(&*agent, &id))).await?;
    Ok((StatusCode::ACCEPTED, Json(view)).into_response())
}

#[utoipa::path(post, path = "/v1/migrations/{id}/postcopy", params(("id" = String, Path,)), responses(
    (status = 202, body = MigrationView, description = "it switches as soon as it can; its status tells when it has"),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Switches a migration to post-copy: the VM runs at the target, and the pages that are missing there follow.
pub(crate) async fn postcopy(State(context): State<Context>, Path(id): Path<String>) -> Answer<Response> {
    let call = move |agent: Arc<dyn Control>| agent.postcopy(&id).and_then(|()| current(&*agent, &id));
    Ok((StatusCode::ACCEPTED, Json(blocking(context, call).await?)).into_response())
}

#[utoipa::path(patch, path = "/v1/migrations/{id}", params(("id" = String, Path,)),
    request_body = SetRequest, responses(
    (status = 200, body = MigrationView),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Changes the limits of a migration that goes on.
pub(crate) async fn set(
    State(context): State<Context>,
    Path(id): Path<String>,
    JsonBody(request): JsonBody<SetRequest>,
) -> Answer<Json<MigrationView>> {
    let call = move |agent: Arc<dyn Control>| agent.set(&id, request).and_then(|()| current(&*agent, &id));
    blocking(context, call).await.map(Json)
}

fn current(agent: &dyn Control, id: &str) -> Result<MigrationView, AgentError> {
    agent.watch(id).map(|watch| watch.borrow().clone())
}

#[utoipa::path(get, path = "/healthz", responses((status = 200, description = "the agent answers")))]
/// Whether the process answers.
pub(crate) async fn healthz() -> &'static str {
    "ok\n"
}

#[utoipa::path(get, path = "/readyz", responses(
    (status = 200, description = "it takes requests"), (status = 503, description = "it ends")))]
/// Whether the agent takes requests: it serves nothing before it has found its VMs again.
pub(crate) async fn readyz(State(context): State<Context>) -> (StatusCode, &'static str) {
    match *context.closing.borrow() {
        true => (StatusCode::SERVICE_UNAVAILABLE, "the agent ends\n"),
        false => (StatusCode::OK, "ok\n"),
    }
}

async fn unknown() -> Failure {
    Failure::new(StatusCode::NOT_FOUND, "not-found", "there is nothing at this path: see /openapi.json")
}

async fn not_allowed() -> Failure {
    let text = "this path does not have that method: see /openapi.json";
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, "invalid", text)
}
