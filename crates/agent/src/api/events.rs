//! A migration's figures as they change, until it ends.
//!
//! The same stream has two shapes: server-sent events for browsers, and JSON lines for programs that would rather split
//! at newlines. A client that does not keep up misses figures and never the last one: only the newest view is held.

use super::problem::Failure;
use super::routes::blocking;
use super::{Context, closed};
use crate::model::{MigrationView, Problem};
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// A silent stream says at least this often that it lives, so that a client can tell a quiet migration from a dead agent.
pub const IDLE_BEAT: Duration = Duration::from_secs(5);
/// How soon it is seen that a VM stands still for longer than a moment.
const LOOK: Duration = Duration::from_millis(250);

/// Views on their way to one client: the next one waits in the watch, where it is overwritten by newer ones.
const IN_FLIGHT: usize = 1;

/// Media type of JSON lines.
pub(super) const JSON_LINES: &str = "application/jsonl";

/// What goes to the client next.
enum Beat {
    View(Box<MigrationView>),
    Idle,
}

#[utoipa::path(get, path = "/v1/migrations/{id}/events", params(("id" = String, Path,)), responses(
    (status = 200, content((MigrationView = "text/event-stream"), (MigrationView = "application/jsonl")),
        description = "each data field (or line) is a view; the stream ends after the final one"),
    (status = "default", body = Problem, content_type = "application/problem+json")))]
/// A migration's figures until it ends, as server-sent events; as JSON lines with `Accept: application/jsonl`.
pub(crate) async fn events(
    State(context): State<Context>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let closing = context.closing.clone();
    let views = blocking(context, move |agent| agent.watch(&id)).await?;
    let (sender, receiver) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(pump(views, sender, closing));
    let beats = ReceiverStream::new(receiver);
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    Ok(match accepted.contains(JSON_LINES) {
        true => lines(beats),
        false => Sse::new(beats.map(|beat| Ok::<_, Infallible>(event(beat)))).into_response(),
    })
}

/// Sends views until the final one, the end of the agent, or the client's leaving.
async fn pump(
    mut views: watch::Receiver<MigrationView>,
    client: mpsc::Sender<Beat>,
    closing: watch::Receiver<bool>,
) {
    let end = closed(closing);
    tokio::pin!(end);
    let mut beat = Beat::View(Box::new(views.borrow_and_update().clone()));
    let mut shown = String::new();
    loop {
        let done = matches!(&beat, Beat::View(view) if is_final(view));
        if let Beat::View(view) = &beat {
            shown.clone_from(&view.status);
        }
        if client.send(beat).await.is_err() || done {
            return;
        }
        beat = tokio::select! {
            next = next(&mut views, &shown) => match next {
                Some(beat) => beat,
                None => return,
            },
            () = client.closed() => return,
            () = &mut end => return,
        };
    }
}

/// What is sent next; nothing when no more comes. Nobody is woken up at a stop, so it is looked for now and then.
async fn next(views: &mut watch::Receiver<MigrationView>, shown: &str) -> Option<Beat> {
    let idle = tokio::time::Instant::now() + IDLE_BEAT;
    loop {
        match tokio::time::timeout(LOOK, views.changed()).await {
            Ok(changed) => changed.ok()?,
            Err(_) if views.borrow().status != shown => {}
            Err(_) if tokio::time::Instant::now() >= idle => return Some(Beat::Idle),
            Err(_) => continue,
        }
        return Some(Beat::View(Box::new(views.borrow_and_update().clone())));
    }
}

/// `unresolved` is not final: the agent goes on asking the target.
fn is_final(view: &MigrationView) -> bool {
    matches!(view.status.as_str(), "completed" | "failed" | "cancelled")
}

fn event(beat: Beat) -> Event {
    let Beat::View(view) = beat else { return Event::default().comment("idle") };
    let name = if is_final(&view) { "end" } else { "progress" };
    let event = Event::default().event(name);
    event.json_data(&view).unwrap_or_else(|_| Event::default().comment("a view that is no JSON"))
}

fn lines(beats: ReceiverStream<Beat>) -> Response {
    let lines = beats.map(|beat| Ok::<_, Infallible>(line(beat)));
    ([(header::CONTENT_TYPE, JSON_LINES)], Body::from_stream(lines)).into_response()
}

fn line(beat: Beat) -> Bytes {
    let mut line = match beat {
        Beat::View(view) => serde_json::to_vec(&view).unwrap_or_default(),
        Beat::Idle => Vec::new(),
    };
    line.push(b'\n');
    line.into()
}
