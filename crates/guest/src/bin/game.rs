//! The server of a game, as far as a network sees it: a world that moves 20 times a second, and players who are told of it.
//!
//! `game`. A player sends datagrams of 16 bytes to port 27960, little-endian: who it is, and the number of its input. After
//! each step of the world, everybody who was heard of lately gets 256 bytes: the number of the step, the number of the last
//! input of this player that the world has taken, and words of the world. The pace is relative: after a pause no step is made
//! up for, so that a burst does not pass for liveliness.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use sterna_guest::pages::{Noise, PAGE_WORDS};

/// Where players reach it: Quake 3's port.
const PORT: u16 = 27960;
/// 20 steps a second.
const STEP: Duration = Duration::from_millis(50);
/// Who was silent for so long has left.
const LEFT: Duration = Duration::from_secs(10);
/// Pages of the world, and those of them that a step changes: some 5 MB are written each second.
const WORLD_PAGES: usize = 1024;
const CHANGED_PAGES: usize = 64;
/// More players than any scenario has: whoever comes later is not let in.
const PLAYERS_MAX: usize = 64;
const INPUT_BYTES: usize = 16;
const UPDATE_BYTES: usize = 256;

fn main() {
    match UdpSocket::bind(("0.0.0.0", PORT)) {
        Ok(socket) => Game::new(socket).run(),
        Err(error) => {
            println!("GAME cannot start: {error}");
            std::process::exit(2);
        }
    }
}

struct Player {
    input: u64,
    heard: Instant,
}

struct Game {
    socket: UdpSocket,
    players: HashMap<(u64, SocketAddr), Player>,
    world: Vec<u64>,
    noise: Noise,
    step: u64,
}

impl Game {
    fn new(socket: UdpSocket) -> Game {
        let mut noise = Noise::new(1);
        let world = (0..WORLD_PAGES * PAGE_WORDS).map(|_| noise.next()).collect();
        Game { socket, players: HashMap::new(), world, noise, step: 0 }
    }

    fn run(&mut self) {
        loop {
            let next = Instant::now() + STEP;
            while let Some(left) = next.checked_duration_since(Instant::now()).filter(|l| !l.is_zero()) {
                self.take_input(left);
            }
            self.move_on();
            self.tell();
        }
    }

    fn take_input(&mut self, within: Duration) {
        let mut datagram = [0; UPDATE_BYTES];
        // A socket without a deadline would only wait for somebody's next input.
        let _ = self.socket.set_read_timeout(Some(within));
        let Ok((INPUT_BYTES, from)) = self.socket.recv_from(&mut datagram) else { return };
        let word = |at: usize| datagram[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        let (who, input, heard) = ((word(0), from), word(8), Instant::now());
        if let Some(player) = self.players.get_mut(&who) {
            player.input = player.input.max(input);
            player.heard = heard;
        } else if self.players.len() < PLAYERS_MAX {
            self.players.insert(who, Player { input, heard });
        }
    }

    fn move_on(&mut self) {
        self.step += 1;
        let first = self.step as usize * CHANGED_PAGES;
        for page in (first..first + CHANGED_PAGES).map(|p| p % WORLD_PAGES) {
            let word = page * PAGE_WORDS + self.step as usize % PAGE_WORDS;
            self.world[word] = self.noise.next();
        }
        self.players.retain(|_, player| player.heard.elapsed() < LEFT);
    }

    fn tell(&self) {
        let mut update = [0; UPDATE_BYTES];
        update[..8].copy_from_slice(&self.step.to_le_bytes());
        let seen = self.world.iter().skip(self.step as usize % PAGE_WORDS).step_by(PAGE_WORDS);
        for (into, word) in update[16..].chunks_exact_mut(8).zip(seen) {
            into.copy_from_slice(&word.to_le_bytes());
        }
        for ((_, to), player) in &self.players {
            update[8..16].copy_from_slice(&player.input.to_le_bytes());
            // An update that cannot be sent is lost, as any datagram may be: the player will notice.
            let _ = self.socket.send_to(&update, to);
        }
    }
}
