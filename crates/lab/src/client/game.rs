//! Playing the guest's game: for how long does a player wait for the world to move on, and does it ever move back?

use std::net::{SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::beacon::{BeaconReport, Ear, unix_ms};
use crate::LabError;

/// A player acts 20 times a second, as often as the world moves.
const INPUT: Duration = Duration::from_millis(50);
/// Shorter waits are the pace of the game, and the scheduler's doing.
const GAP: Duration = Duration::from_millis(75);
const INPUT_BYTES: usize = 16;
const UPDATE_BYTES: usize = 256;

/// What the players saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GameReport {
    /// Of each player: steps of the world in the place of a beacon's numbers, and waits above 75 ms.
    pub updates: Vec<BeaconReport>,
    /// Inputs that the world said it had taken, of all players.
    pub taken: u64,
    /// Inputs that it had taken and later knew nothing of.
    pub forgotten: u64,
}

/// Players at play.
pub(super) struct Game(Vec<JoinHandle<Player>>);

/// Has so many play until `stop` is set.
pub(super) fn play(server: SocketAddrV4, players: u8, stop: &Arc<AtomicBool>) -> Result<Game, LabError> {
    let start = |number: u8| {
        let socket = UdpSocket::bind("0.0.0.0:0").map_err(LabError::file("make", "a player's socket"))?;
        socket.connect(server).map_err(LabError::file("connect", "a player's socket"))?;
        let (stop, mut player) = (stop.clone(), Player::new(number));
        Ok(std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                player.turn(&socket);
            }
            player
        }))
    };
    (0..players).map(start).collect::<Result<Vec<_>, LabError>>().map(Game)
}

impl Game {
    pub(super) fn report(self) -> Result<GameReport, LabError> {
        let (mut report, ended) = (GameReport::default(), Instant::now());
        for thread in self.0 {
            let player = thread.join().map_err(|_| LabError::unexpected("a player", "panicked"))?;
            report.taken += player.taken;
            report.forgotten += player.forgotten;
            report.updates.push(player.ear.end(ended));
        }
        Ok(report)
    }
}

struct Player {
    number: u8,
    input: u64,
    taken: u64,
    forgotten: u64,
    ear: Ear,
}

impl Player {
    fn new(number: u8) -> Player {
        Player { number, input: 0, taken: 0, forgotten: 0, ear: Ear::of(GAP) }
    }

    /// Acts once, and hears what comes until the next time.
    fn turn(&mut self, socket: &UdpSocket) {
        let next = Instant::now() + INPUT;
        self.input += 1;
        let mut datagram = [0; INPUT_BYTES];
        datagram[..8].copy_from_slice(&u64::from(self.number).to_le_bytes());
        datagram[8..].copy_from_slice(&self.input.to_le_bytes());
        // The guest may not be there right now: that is what is looked for.
        let _ = socket.send(&datagram);
        let mut update = [0; UPDATE_BYTES];
        while let Some(left) = next.checked_duration_since(Instant::now()).filter(|l| !l.is_zero()) {
            // Without the deadline it would act late once.
            let _ = socket.set_read_timeout(Some(left));
            match socket.recv(&mut update) {
                Ok(UPDATE_BYTES) => self.hear(&update, Instant::now(), unix_ms()),
                Ok(_) => {}
                // Refused at once where nobody listens: not to be asked again before the time.
                Err(_) => std::thread::sleep(next.saturating_duration_since(Instant::now())),
            }
        }
    }

    fn hear(&mut self, update: &[u8], now: Instant, unix_ms: f64) {
        let word = |at: usize| update[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let (step, taken) = (word(0), word(8));
        self.ear.hear(step, now, unix_ms);
        self.forgotten += self.taken.saturating_sub(taken);
        self.taken = taken;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(step: u64, taken: u64) -> Vec<u8> {
        [step.to_le_bytes(), taken.to_le_bytes()].concat()
    }

    #[test]
    fn a_long_wait_and_a_world_that_was_set_back_show() {
        let (mut player, start) = (Player::new(0), Instant::now());
        for (step, taken, at) in [(1, 1, 0), (2, 2, 50), (3, 3, 200), (2, 1, 250)] {
            player.hear(&update(step, taken), start + Duration::from_millis(at), at as f64);
        }
        let (taken, forgotten) = (player.taken, player.forgotten);
        let report = player.ear.end(start + Duration::from_millis(260));
        assert_eq!((report.received, report.backwards, report.gaps.len()), (4, 1, 1));
        assert_eq!((report.max_gap_ms, taken, forgotten), (150.0, 1, 2));
    }

    #[test]
    fn players_act_until_they_are_stopped() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let std::net::SocketAddr::V4(address) = server.local_addr().unwrap() else { unreachable!() };
        let stop = Arc::new(AtomicBool::new(false));
        let game = play(address, 2, &stop).unwrap();
        let mut heard = std::collections::BTreeSet::new();
        while heard.len() < 2 {
            let mut input = [0; 64];
            let (length, from) = server.recv_from(&mut input).unwrap();
            assert_eq!(length, INPUT_BYTES);
            heard.insert(input[0]);
            let mut answer = update(7, 1);
            answer.resize(UPDATE_BYTES, 0);
            server.send_to(&answer, from).unwrap();
        }
        std::thread::sleep(2 * INPUT);
        stop.store(true, Ordering::Release);
        let report = game.report().unwrap();
        assert_eq!((report.updates.len(), report.forgotten), (2, 0));
        assert!(report.taken >= 1, "{report:?}");
    }
}
