//! A datagram to a client every millisecond, so that the client sees for how long the guest was away.
//!
//! `beacon ADDRESS:PORT`. Each datagram is 16 bytes, little-endian: a sequence number and the guest's clock in nanoseconds
//! since the start. Datagrams that come to the beacon's own port are sent back as they are. The pace is relative: after a
//! pause nothing is made up for, so that a burst does not pass for liveliness.

#![forbid(unsafe_code)]

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(1);
/// Pings are answered here.
const PING_PORT: u16 = 9001;
/// No ping that we answer is longer.
const PING_BYTES_MAX: usize = 2048;

fn main() {
    let Some(client) = std::env::args().nth(1).and_then(|a| a.parse::<SocketAddr>().ok()) else {
        println!("BEACON cannot start: beacon ADDRESS:PORT");
        std::process::exit(2);
    };
    std::thread::spawn(answer_pings);
    match UdpSocket::bind("0.0.0.0:0") {
        Ok(socket) => send_for_good(&socket, client),
        Err(error) => println!("BEACON cannot start: {error}"),
    }
}

fn send_for_good(socket: &UdpSocket, client: SocketAddr) {
    let start = Instant::now();
    for sequence in 0_u64.. {
        let mut datagram = [0; 16];
        let clock = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        datagram[..8].copy_from_slice(&sequence.to_le_bytes());
        datagram[8..].copy_from_slice(&clock.to_le_bytes());
        // A full queue or a client that does not listen yet: the next one is due in a millisecond.
        let _ = socket.send_to(&datagram, client);
        std::thread::sleep(INTERVAL);
    }
}

fn answer_pings() {
    let Ok(socket) = UdpSocket::bind(("0.0.0.0", PING_PORT)) else {
        println!("BEACON answers no pings: port {PING_PORT} is taken");
        return;
    };
    let mut buffer = [0; PING_BYTES_MAX];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // A lost answer is the sender's to notice.
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}
