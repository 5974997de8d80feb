//! The client that checks: it writes to the guest's Redis all the time and reads everything back, and listens to the
//! guest's beacon, or plays the guest's game. It runs in a process of its own inside the lab's client namespace and reports as JSON.

mod beacon;
mod child;
mod game;
mod redis;
mod resp;

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::LabError;
pub use beacon::{BeaconReport, Gap};
pub use child::{Client, lab_program};
pub use game::GameReport;
pub use redis::RedisReport;

/// The default pace: an emulated guest's Redis serves it with one core, and dirties some MB a second.
pub const WRITES_PER_SECOND: u32 = 2000;
/// The default number of keys: rewriting them bounds what Redis holds to some 15 MB, however long a run takes.
pub const KEYS: u32 = 50_000;
/// The port on which the client listens to the beacon.
pub const BEACON_PORT: u16 = 9000;
/// The port of the guest's game.
pub const GAME_PORT: u16 = 27960;
/// The default number of players: as many as played in Clark et al., NSDI 2005.
pub const PLAYERS: u8 = 6;
/// How often a waiting client looks whether it should stop.
const STOP_POLL: Duration = Duration::from_millis(20);

/// What a client does.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// The Redis to write to.
    pub redis: Option<SocketAddrV4>,
    /// The port to listen on for the beacon.
    pub beacon: Option<u16>,
    /// The game to play.
    pub game: Option<SocketAddrV4>,
    /// How many play it.
    pub players: u8,
    /// When to stop, if nobody says so before.
    pub limit: Option<Duration>,
    /// Pace.
    pub writes_per_second: u32,
    /// Different keys; each is written again and again with a growing number.
    pub keys: u32,
}

/// What a client saw.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClientReport {
    /// Of Redis.
    pub redis: Option<RedisReport>,
    /// Of the beacon.
    pub beacon: Option<BeaconReport>,
    /// Of the game.
    #[serde(default)]
    pub game: Option<GameReport>,
}

/// Whether the end of standard input ends a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// It does: the one who started us closes it when we should stop.
    Watched,
    /// It does not.
    Ignored,
}

/// Runs until the limit, SIGTERM, Ctrl-C or the end of standard input, then reads back and reports.
pub fn run(options: &ClientOptions) -> Result<ClientReport, LabError> {
    let stop = Arc::new(AtomicBool::new(false));
    // Signals are blocked before a thread starts: all threads inherit that, and only the waiting one takes them.
    block_signals()?;
    let beacon = options.beacon.map(|port| beacon::listen(port, stop.clone())).transpose()?;
    let redis = options.redis.map(|server| redis::start(server, options, stop.clone()));
    let game = options.game.map(|server| game::play(server, options.players, &stop)).transpose()?;
    let waited = wait_for_the_end(
        options.limit,
        if options.limit.is_some() { Input::Ignored } else { Input::Watched },
    );
    stop.store(true, Ordering::Release);
    waited?;
    Ok(ClientReport {
        redis: redis.map(joined).transpose()?,
        beacon: beacon.map(joined).transpose()?,
        game: game.map(|game| game.report()).transpose()?,
    })
}

/// Waits for the limit, SIGTERM, SIGINT or, if it is watched, the end of standard input.
pub fn wait_for_the_end(limit: Option<Duration>, input: Input) -> Result<(), LabError> {
    let signals = block_signals()?;
    let stop = Arc::new(AtomicBool::new(false));
    let from_signal = stop.clone();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            from_signal.store(true, Ordering::Release);
        }
    });
    if input == Input::Watched {
        let from_input = stop.clone();
        std::thread::spawn(move || {
            // What is written is of no interest, only that nobody will write any more.
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            from_input.store(true, Ordering::Release);
        });
    }
    let end = limit.map(|l| Instant::now() + l);
    while !stop.load(Ordering::Acquire) && end.is_none_or(|e| Instant::now() < e) {
        std::thread::sleep(STOP_POLL);
    }
    Ok(())
}

fn block_signals() -> Result<nix::sys::signal::SigSet, LabError> {
    use nix::sys::signal::{SigSet, Signal};
    let set: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    set.thread_block().map_err(|e| LabError::unexpected("blocking SIGTERM and SIGINT", e.to_string()))?;
    Ok(set)
}

fn joined<T>(thread: std::thread::JoinHandle<Result<T, LabError>>) -> Result<T, LabError> {
    thread.join().map_err(|_| LabError::unexpected("a thread of the client", "panicked"))?
}
