//! Peers that say nothing, and peers that say it slowly.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use sterna_engine::wire::Message;
use sterna_engine::wire::control::encode_message;
use sterna_engine::wire::message::{Hello, Offer};
use sterna_transport::{Connection, Endpoint, Identity};

use crate::support::scene::Scene;
use crate::support::{MOVE, World};

/// Connections that say nothing.
const SILENT: usize = 1000;
/// Pause between two bytes of a slow peer.
const BYTE_PAUSE: Duration = Duration::from_secs(1);
/// How long one step with an agent may take.
const STEP: Duration = Duration::from_secs(20);

/// Past 64 of them, whoever came next had to wait until they had run into their deadline of 5 s, 64 by 64.
#[test]
fn a_vm_moves_while_a_thousand_peers_say_nothing_and_others_say_it_slowly() {
    let mut scene = Scene::boot(World::new("7.2"));
    let slow: Vec<_> = slow_peers(&scene.world);
    let address = scene.world.address("b");
    let silent: Vec<TcpStream> = (0..SILENT).map(|_| TcpStream::connect(&address).unwrap()).collect();
    scene.move_verified("a");
    let address = scene.world.address("a");
    let more: Vec<TcpStream> = (0..SILENT).map(|_| TcpStream::connect(&address).unwrap()).collect();
    scene.move_verified("b");
    for mut stream in silent.into_iter().chain(more) {
        stream.set_read_timeout(Some(STEP)).unwrap();
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "a silent peer was told something");
    }
    for peer in slow {
        peer.join().expect("the agent hangs up on a slow peer");
    }
    scene.a.assert_healthy();
    scene.b.assert_healthy();
}

/// One for each state in which an agent waits for a peer's words.
fn slow_peers(world: &World) -> Vec<std::thread::JoinHandle<()>> {
    let hello = |id: u8| {
        Message::Hello(Hello { version_min: 1, version_max: 1, id: vec![id; 16], software: "slow".into() })
    };
    let offer = Message::Offer(Offer { vm: "slow".into(), argv: vec!["x".repeat(4000)], ..Offer::default() });
    let (hello_bytes, offer_bytes) = (encode_message(&hello(1)).unwrap(), encode_message(&offer).unwrap());
    let mut after_hello = connect(world);
    after_hello.write_all(&encode_message(&hello(2)).unwrap()).and_then(|()| after_hello.flush()).unwrap();
    let handshake = TcpStream::connect(world.address("b")).unwrap();
    vec![
        std::thread::spawn(move || trickle_handshake(handshake)),
        trickle(connect(world), hello_bytes),
        trickle(after_hello, offer_bytes),
        trickle(connect(world), Vec::new()),
    ]
}

fn connect(world: &World) -> Connection {
    let file = |name: &str| world.path("pki").join(name);
    let identity = Identity::load(&file("ca.crt"), &file("a.crt"), &file("a.key")).unwrap();
    Endpoint::new(&identity).unwrap().connect(&world.address("b"), "b", STEP).unwrap()
}

/// The beginning of a record of TLS, whose length is never reached.
fn trickle_handshake(mut stream: TcpStream) {
    let end = Instant::now() + MOVE;
    for byte in [22, 3, 1, 1, 0].into_iter().chain(std::iter::repeat(1)) {
        if stream.write_all(&[byte]).is_err() {
            return;
        }
        assert!(Instant::now() < end, "nobody hangs up");
        std::thread::sleep(BYTE_PAUSE);
    }
}

/// A byte now and then, until the agent hangs up.
fn trickle(mut connection: Connection, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let end = Instant::now() + MOVE;
        for byte in bytes.into_iter().map(Some).chain(std::iter::repeat(None)) {
            connection.set_write_deadline(Some(Instant::now() + STEP));
            let sent =
                byte.map_or(Ok(()), |byte| connection.write_all(&[byte]).and_then(|()| connection.flush()));
            connection.set_read_deadline(Some(Instant::now() + BYTE_PAUSE));
            match connection.read(&mut [0; 4096]) {
                Ok(0) => return,
                Err(why) if !why.is_timeout() => return,
                _ if sent.is_err() => return,
                _ => assert!(Instant::now() < end, "nobody hangs up"),
            }
        }
    })
}
