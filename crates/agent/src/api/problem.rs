//! Errors as the client sees them: `application/problem+json` of RFC 9457.

use crate::AgentError;
use crate::model::{Problem, ReasonView};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

/// Media type of RFC 9457.
pub(crate) const PROBLEM_JSON: &str = "application/problem+json";

/// A refusal of the API, as a response.
pub(crate) struct Failure(Problem);

impl Failure {
    /// A problem whose `kind` is a word for scripts.
    pub(crate) fn new(status: StatusCode, kind: &str, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error").to_owned();
        let (kind, status) = (kind.to_owned(), status.as_u16());
        Self(Problem { kind, title, status, detail: detail.into(), reasons: Vec::new() })
    }

    fn because(mut self, reasons: Vec<ReasonView>) -> Self {
        self.0.reasons = reasons;
        self
    }
}

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        let detail = error.to_string();
        let status = match &error {
            AgentError::Invalid(_) => StatusCode::BAD_REQUEST,
            AgentError::NotFound(_) => StatusCode::NOT_FOUND,
            AgentError::Conflict(_) => StatusCode::CONFLICT,
            AgentError::Refused { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            AgentError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let failure = Self::new(status, error.code(), detail);
        match error {
            AgentError::Refused { reasons, .. } => failure.because(reasons),
            _ => failure,
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_string(&self.0).unwrap_or_default();
        (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response()
    }
}
