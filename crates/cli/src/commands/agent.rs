//! `sterna agent`: the daemon of this host, in the foreground, as service managers want it.

use crate::args::Agent as AgentArgs;
use crate::exit::{Exit, Failure};
use crate::interrupt::Interrupts;
use sd_notify::NotifyState;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use sterna_agent::{Agent, Config, api};
use tracing_subscriber::EnvFilter;

/// What is logged when `STERNA_LOG` says nothing.
const LOG_DEFAULT: &str = "info";

/// How long what the agent is at may take to end: less than a service manager waits before it kills.
const END_WITHIN: Duration = Duration::from_secs(3);

/// `sterna agent`
pub(crate) fn run(args: &AgentArgs, socket: Option<PathBuf>) -> Result<Exit, Failure> {
    start_log()?;
    let mut config = Config::load(&args.config).map_err(|why| Failure::new(Exit::Usage, why))?;
    config.socket = socket.or(config.socket);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|why| Failure::new(Exit::Failed, format!("no runtime: {why}")))?;
    let result = runtime.block_on(serve(config));
    // Threads that wait for QEMU or a peer do not hold the process: VMs outlive it, and its records are made for that.
    runtime.shutdown_background();
    result
}

fn start_log() -> Result<(), Failure> {
    let filter = match std::env::var("STERNA_LOG") {
        Ok(filter) => EnvFilter::try_new(filter),
        Err(_) => EnvFilter::try_new(LOG_DEFAULT),
    };
    let filter = filter.map_err(|why| Failure::new(Exit::Usage, format!("STERNA_LOG: {why}")))?;
    let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    Ok(())
}

async fn serve(config: Config) -> Result<Exit, Failure> {
    let mut interrupts = Interrupts::listen()?;
    let socket = config.socket();
    let agent = tokio::select! {
        agent = start(config) => agent?,
        () = interrupts.next() => return Ok(Exit::Done),
    };
    let held = agent.clone();
    let server = api::serve(agent, &socket, async move { interrupts.next().await });
    tokio::pin!(server);
    // The first poll binds the socket and only then waits: from here on clients are answered.
    let ended = match tokio::time::timeout(Duration::ZERO, &mut server).await {
        Ok(ended) => ended,
        Err(_) => {
            tracing::info!(socket = %socket.display(), "ready");
            tell_manager(NotifyState::Ready);
            server.await
        }
    };
    ended.map_err(|why| Failure::new(Exit::Failed, format!("the API's socket: {why}")))?;
    tell_manager(NotifyState::Stopping);
    // Migrations that can end do. One that waits for the pages of a host that is away never would: the next agent goes on with it.
    let ending = tokio::task::spawn_blocking(move || drop(held));
    if tokio::time::timeout(END_WITHIN, ending).await.is_err() {
        tracing::info!("a migration goes on when the agent is started again");
    }
    tracing::info!("ended; VMs go on running");
    Ok(Exit::Done)
}

async fn start(config: Config) -> Result<Arc<Agent>, Failure> {
    let started = tokio::task::spawn_blocking(move || Agent::start(config)).await;
    match started {
        Ok(agent) => agent.map_err(|why| Failure::new(Exit::Failed, why.to_string())),
        Err(why) => Err(Failure::new(Exit::Failed, format!("the agent could not start: {why}"))),
    }
}

/// Does nothing without `NOTIFY_SOCKET`.
fn tell_manager(state: NotifyState<'_>) {
    if let Err(why) = sd_notify::notify(&[state]) {
        tracing::warn!(%why, "the service manager could not be told");
    }
}
