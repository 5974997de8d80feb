//! What arrives from a client, bounded and checked before anything else sees it.

use super::problem::Failure;
use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode};
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Longest body: a QEMU command line with hundreds of devices is tens of kilobytes.
const BODY_MAX: usize = 256 * 1024;

/// How long a body may take to arrive: it comes from this host.
const BODY_DEADLINE: Duration = Duration::from_secs(10);

/// Longest idempotency key: a UUID has 36 characters, and keys are kept.
const KEY_MAX: usize = 128;

/// A JSON body of a known shape.
pub(crate) struct JsonBody<T>(pub(crate) T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let bytes = read(request.into_body()).await?;
        serde_json::from_slice(&bytes).map(Self).map_err(|why| {
            Failure::new(StatusCode::BAD_REQUEST, "invalid", format!("the request's JSON is wrong: {why}"))
        })
    }
}

async fn read(body: Body) -> Result<axum::body::Bytes, Failure> {
    let late = |_| Failure::new(StatusCode::REQUEST_TIMEOUT, "invalid", "the request's body did not arrive");
    let long = |_| {
        let text = format!("the request's body was cut off, or is longer than {BODY_MAX} bytes");
        Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid", text)
    };
    tokio::time::timeout(BODY_DEADLINE, to_bytes(body, BODY_MAX)).await.map_err(late)?.map_err(long)
}

/// The `Idempotency-Key` header, when there is one.
pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    match value.to_str() {
        Ok(key) if (1..=KEY_MAX).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => {
            let text = format!("Idempotency-Key must be 1 to {KEY_MAX} visible ASCII characters");
            Err(Failure::new(StatusCode::BAD_REQUEST, "invalid", text))
        }
    }
}
