//! A measurement of what a VM writes, as a stream: it lasts as long as its client listens.

use super::events::JSON_LINES;
use super::problem::Failure;
use super::request::JsonBody;
use super::routes::blocking;
use super::{Context, IDLE_BEAT, closed};
use crate::model::{Problem, WorkingSetEvent, WorkingSetRequest};
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use std::convert::Infallible;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Events on their way to the client: more wait with whoever measures.
const IN_FLIGHT: usize = 1;

/// What goes to the client next; nothing says that it goes on.
type Beat = Option<WorkingSetEvent>;

#[utoipa::path(post, path = "/v1/vms/{name}/working-set", params(("name" = String, Path,)),
    request_body = WorkingSetRequest, responses(
    (status = 200, content((WorkingSetEvent = "text/event-stream"), (WorkingSetEvent = "application/jsonl")),
        description = "each data field (or line) is an interval; the last one is the result. Hanging up ends the measurement"),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// Measures what a VM writes, as server-sent events; as JSON lines with `Accept: application/jsonl`.
pub(crate) async fn measure(
    State(context): State<Context>,
    Path(name): Path<String>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<WorkingSetRequest>,
) -> Result<Response, Failure> {
    let closing = context.closing.clone();
    let events = blocking(context, move |agent| agent.measure(&name, request)).await?;
    let (sender, receiver) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(pump(events, sender, closing));
    let beats = ReceiverStream::new(receiver);
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    Ok(match accepted.contains(JSON_LINES) {
        true => {
            let lines = beats.map(|beat| Ok::<_, Infallible>(line(beat)));
            ([(header::CONTENT_TYPE, JSON_LINES)], Body::from_stream(lines)).into_response()
        }
        false => Sse::new(beats.map(|beat| Ok::<_, Infallible>(event(beat)))).into_response(),
    })
}

/// Sends events until the last one, the end of the agent, or the client's leaving. Its own end ends the measurement.
async fn pump(
    mut events: mpsc::Receiver<WorkingSetEvent>,
    client: mpsc::Sender<Beat>,
    closing: watch::Receiver<bool>,
) {
    let end = closed(closing);
    tokio::pin!(end);
    loop {
        let beat = tokio::select! {
            next = tokio::time::timeout(IDLE_BEAT, events.recv()) => match next {
                Ok(None) => return,
                Ok(event) => event,
                Err(_) => None,
            },
            () = client.closed() => return,
            () = &mut end => return,
        };
        if client.send(beat).await.is_err() {
            return;
        }
    }
}

fn event(beat: Beat) -> Event {
    let name = match &beat {
        None => return Event::default().comment("idle"),
        Some(WorkingSetEvent::Interval(_)) => "interval",
        Some(WorkingSetEvent::End(_)) => "end",
    };
    let event = Event::default().event(name);
    event.json_data(&beat).unwrap_or_else(|_| Event::default().comment("an event that is no JSON"))
}

fn line(beat: Beat) -> Bytes {
    let mut line = beat.and_then(|event| serde_json::to_vec(&event).ok()).unwrap_or_default();
    line.push(b'\n');
    line.into()
}
