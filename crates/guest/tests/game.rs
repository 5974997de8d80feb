//! The game takes inputs and tells its players how the world moves on.

#![forbid(unsafe_code)]

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

#[test]
fn steps_rise_and_inputs_are_taken() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut game = Command::new(env!("CARGO_BIN_EXE_game")).spawn().unwrap();
    let (mut update, mut steps, mut taken) = ([0; 512], Vec::new(), 0);
    // It may not listen yet: an input that is refused is sent again.
    for input in 1..=200_u64 {
        let mut datagram = [0; 16];
        datagram[..8].copy_from_slice(&3_u64.to_le_bytes());
        datagram[8..].copy_from_slice(&input.to_le_bytes());
        let sent = socket.send_to(&datagram, "127.0.0.1:27960");
        let Ok((length, _)) = sent.and_then(|_| socket.recv_from(&mut update)) else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        assert_eq!(length, 256);
        steps.push(u64::from_le_bytes(*update.first_chunk().unwrap()));
        taken = u64::from_le_bytes(*update[8..].first_chunk().unwrap());
        assert!(taken <= input);
        if steps.len() == 20 {
            break;
        }
    }
    game.kill().unwrap();
    game.wait().unwrap();
    assert!(steps.len() == 20 && taken > 0, "{steps:?} {taken}");
    assert!(steps.windows(2).all(|s| s[0] < s[1]), "{steps:?}");
}
