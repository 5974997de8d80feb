//! The REST API, on a Unix socket that only its owner may open.
//!
//! One API serves the `sterna` command, scripts and a browser, so it is plain HTTP with JSON. It decides nothing: each
//! request becomes one call of [`Control`], on a thread of its own because those calls block, and each
//! [`AgentError`](crate::AgentError) becomes a problem of RFC 9457.
//!
//! ```text
//! GET    /v1/vms                     all VMs                    GET   /healthz        the process answers
//! POST   /v1/vms                     run a VM                   GET   /readyz         it takes requests (503: it ends)
//! GET    /v1/vms/NAME                one VM                     GET   /metrics        Prometheus text
//! DELETE /v1/vms/NAME                stop it                    GET   /openapi.json   this table, for machines
//! POST   /v1/vms/NAME/working-set    measure what it writes: a stream, as below; hanging up ends it
//! GET    /v1/hosts                   hosts
//! GET    /v1/migrations              migrations, newest first
//! POST   /v1/migrations              migrate; `Idempotency-Key` makes a repeat harmless
//! GET    /v1/migrations/ID           one migration
//! DELETE /v1/migrations/ID           cancel it
//! PATCH  /v1/migrations/ID           change its limits
//! POST   /v1/migrations/ID/postcopy  switch it to post-copy
//! GET    /v1/migrations/ID/events    its figures until it ends: server-sent events, or `Accept: application/jsonl`
//! ```

mod control;
mod events;
mod metrics;
mod openapi;
mod problem;
mod request;
mod routes;
mod socket;
mod templates;
mod working_set;

pub use control::Control;
pub use events::IDLE_BEAT;

use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long requests may go on after the shutdown was asked for: a service manager must not wait for a client.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// What every handler gets.
#[derive(Clone)]
pub(crate) struct Context {
    control: Arc<dyn Control>,
    /// True once the agent ends; streams end with it.
    closing: watch::Receiver<bool>,
}

/// Serves the API on `socket` until `shutdown` is ready, and removes the socket again.
///
/// A socket that an agent left behind when it died is replaced.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] when another agent answers there; otherwise what the kernel said about the socket.
pub async fn serve<C: Control>(
    control: Arc<C>,
    socket: &Path,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let socket = socket::Bound::bind(socket)?;
    let listener = tokio::net::UnixListener::from_std(socket.listener()?)?;
    let (close, closing) = watch::channel(false);
    let context = Context { control, closing: closing.clone() };
    let server = axum::serve(listener, routes::router(context)).with_graceful_shutdown(closed(closing));
    let server = server.into_future();
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => return ended,
        () = shutdown => {}
    }
    close.send_replace(true);
    tokio::time::timeout(SHUTDOWN_GRACE, server).await.unwrap_or(Ok(()))
}

/// Ready when the agent ends.
async fn closed(mut closing: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is an end as well.
    let _ = closing.wait_for(|closing| *closing).await;
}
