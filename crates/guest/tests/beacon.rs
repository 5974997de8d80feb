//! The beacon sends numbered datagrams and answers pings.

#![forbid(unsafe_code)]

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

#[test]
fn numbers_rise_and_pings_come_back() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let mut beacon = Command::new(env!("CARGO_BIN_EXE_beacon")).arg(address).spawn().unwrap();
    let mut datagram = [0; 64];
    let mut last = None;
    for _ in 0..50 {
        let (length, _) = socket.recv_from(&mut datagram).unwrap();
        assert_eq!(length, 16);
        let sequence = u64::from_le_bytes(*datagram.first_chunk().unwrap());
        assert!(last.is_none_or(|l| sequence > l), "{sequence} after {last:?}");
        last = Some(sequence);
    }
    let pinger = UdpSocket::bind("127.0.0.1:0").unwrap();
    pinger.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    pinger.send_to(b"are you there?", "127.0.0.1:9001").unwrap();
    let (length, _) = pinger.recv_from(&mut datagram).unwrap();
    assert_eq!(&datagram[..length], b"are you there?");
    beacon.kill().unwrap();
    beacon.wait().unwrap();
}
