//! Routes of templates.

use super::Context;
use super::problem::Failure;
use super::request::JsonBody;
use super::routes::blocking;
use crate::model::{Problem, PushRequest, PushView, TemplateRequest, TemplateView};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

type Answer<T> = Result<T, Failure>;

#[utoipa::path(get, path = "/v1/templates", responses((status = 200, body = Vec<TemplateView>)))]
/// All templates of this host.
pub(crate) async fn templates(State(context): State<Context>) -> Answer<Json<Vec<TemplateView>>> {
    blocking(context, |agent| Ok(agent.templates())).await.map(Json)
}

#[utoipa::path(post, path = "/v1/templates", request_body = TemplateRequest, responses(
    (status = 201, body = TemplateView, headers(("Location" = String, description = "where the template is"))),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Makes a template of a VM, which stands still for a moment and runs on.
pub(crate) async fn make(
    State(context): State<Context>,
    JsonBody(request): JsonBody<TemplateRequest>,
) -> Answer<Response> {
    let view = blocking(context, move |agent| agent.make_template(request)).await?;
    let location = format!("/v1/templates/{}", view.name);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(view)).into_response())
}

#[utoipa::path(post, path = "/v1/template-checks", request_body = TemplateRequest, responses(
    (status = 204, description = "nothing keeps the VM from it, as far as that can be told before its guest is ready"),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Looks whether a template could be made of a VM, and makes none.
pub(crate) async fn check(
    State(context): State<Context>,
    JsonBody(request): JsonBody<TemplateRequest>,
) -> Answer<StatusCode> {
    blocking(context, move |agent| agent.check_template(request)).await.map(|()| StatusCode::NO_CONTENT)
}

#[utoipa::path(get, path = "/v1/templates/{name}", params(("name" = String, Path,)), responses(
    (status = 200, body = TemplateView),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// One template.
pub(crate) async fn template(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Answer<Json<TemplateView>> {
    blocking(context, move |agent| agent.template(&name)).await.map(Json)
}

#[utoipa::path(delete, path = "/v1/templates/{name}", params(("name" = String, Path,)), responses(
    (status = 204, description = "it is gone from this host"),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Removes a template that no VM of this host uses.
pub(crate) async fn remove(State(context): State<Context>, Path(name): Path<String>) -> Answer<StatusCode> {
    blocking(context, move |agent| agent.remove_template(&name)).await.map(|()| StatusCode::NO_CONTENT)
}

#[utoipa::path(post, path = "/v1/templates/{name}/push", params(("name" = String, Path,)),
    request_body = PushRequest, responses(
    (status = 200, body = PushView, description = "the other host has it"),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Sends a template to another host, unless it is there. What was sent before a failure is not sent again.
pub(crate) async fn push(
    State(context): State<Context>,
    Path(name): Path<String>,
    JsonBody(request): JsonBody<PushRequest>,
) -> Answer<Json<PushView>> {
    blocking(context, move |agent| agent.push_template(&name, request)).await.map(Json)
}
