//! Who may not talk to an agent at all.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use sterna_engine::wire::Message;
use sterna_engine::wire::message::Query;
use sterna_transport::{Endpoint, Identity, pki};

use super::peer::{Peer, STEP, endpoint, hello};
use crate::support::World;
use crate::support::daemon::Daemon;

#[test]
fn strangers_get_nothing_done_by_an_agent() {
    let world = World::new("7.2");
    let mut b = Daemon::start(&world, "b");
    no_tls(&world);
    another_authority(&world);
    not_in_the_list(&world);
    let mut known = Peer::connect(&world);
    known.send(&hello([1; 16]));
    assert!(matches!(known.receive(), Some(Message::Welcome(_))), "a host of the list is welcome afterwards");
    b.assert_healthy();
}

fn no_tls(world: &World) {
    let mut socket = TcpStream::connect(world.address("b")).unwrap();
    socket.set_read_timeout(Some(STEP)).unwrap();
    socket.write_all(b"GET /v1/vms HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    // An alert of TLS at most.
    drop(socket.read_to_end(&mut answer));
    assert!(answer.len() < 64, "{answer:?}");
}

fn another_authority(world: &World) {
    let folder = world.path("other-pki");
    pki::init(&folder, "another").unwrap();
    pki::issue(&folder, "a", &[]).unwrap();
    // It trusts our authority, and shows the other's certificate.
    let identity =
        Identity::load(&world.path("pki/ca.crt"), &folder.join("a.crt"), &folder.join("a.key")).unwrap();
    let refused = Endpoint::new(&identity).unwrap().connect(&world.address("b"), "b", STEP);
    assert!(refused.is_err());
}

/// Signed by our authority, and no host that `b` knows: whatever it says, it is told just that, and the connection ends.
fn not_in_the_list(world: &World) {
    pki::issue(&world.path("pki"), "mallory", &[]).unwrap();
    let query = Message::Query(Query { id: vec![1; 16], vm: "vm".into(), generation: 1, by_target: false });
    for message in [hello([1; 16]), query] {
        let connection = endpoint(world, "mallory").connect(&world.address("b"), "b", STEP).unwrap();
        let mut peer = Peer { connection };
        peer.send(&message);
        let Some(Message::Abort(answer)) = peer.receive() else {
            panic!("{message:?} was answered otherwise")
        };
        assert!(answer.text.contains("does not have mallory in its list of hosts"), "{}", answer.text);
        assert!(peer.receive().is_none(), "{message:?} was answered further");
    }
}
