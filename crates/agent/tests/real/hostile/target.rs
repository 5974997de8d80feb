//! A hostile target against an agent whose VM wants to go there.

use std::net::TcpListener;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use sterna_engine::wire::Message;
use sterna_engine::wire::control::encode_message;
use sterna_engine::wire::message::{
    Accepted, Answer, Barrier, Committed, Loaded, Offer, Refused, Text, Welcome,
};

use super::peer::{Peer, endpoint};
use crate::support::daemon::Daemon;
use crate::support::scene::{Scene, to_the_other};
use crate::support::{World, load};

/// What a hostile target does once it was greeted.
type Trick = (&'static str, &'static str, fn(&mut Peer, &TcpListener, &World));

fn welcome(peer: &mut Peer) -> Option<Offer> {
    peer.send(&Message::Welcome(Welcome { version: 1, software: "a test".into() }));
    match peer.receive() {
        Some(Message::Offer(offer)) => Some(offer),
        _ => None,
    }
}

/// Accepts the offer and the streams; keeps them open for as long as what is returned lives.
fn accept(peer: &mut Peer, listener: &TcpListener, world: &World) -> Vec<Peer> {
    let offer = welcome(peer).unwrap();
    peer.send(&Message::Accepted(Accepted { prepare_us: 1, ..Accepted::default() }));
    let endpoint = endpoint(world, "b");
    (0..offer.streams).map(|_| Peer::accept(listener, &endpoint).unwrap()).collect()
}

/// What it does, and a part of the error that the user must see.
const TRICKS: &[Trick] = &[
    ("hangs up", "lost", |_, _, _| {}),
    ("garbage", "not valid", |peer, _, _| peer.raw(&[0xa5; 4096])),
    ("an oversized message", "limit", |peer, _, _| peer.raw(&[0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0])),
    ("half a message", "lost", |peer, _, _| {
        let frame = encode_message(&Message::Abort(Text { text: "x".repeat(100) })).unwrap();
        peer.raw(&frame[..50]);
    }),
    ("a message that cannot be read", "cannot be read", |peer, _, _| {
        peer.raw(&[3, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff]);
    }),
    ("device state", "device state", |peer, _, _| peer.state(b"state")),
    ("a version that nobody speaks", "version 9", |peer, _, _| {
        peer.send(&Message::Welcome(Welcome { version: 9, software: String::new() }));
    }),
    ("a welcome twice", "out of turn", |peer, _, _| {
        welcome(peer);
        peer.send(&Message::Welcome(Welcome { version: 1, software: String::new() }));
    }),
    ("an acceptance before the offer", "out of turn", |peer, _, _| {
        peer.send(&Message::Accepted(Accepted { prepare_us: 1, ..Accepted::default() }));
    }),
    ("a refusal without a reason", "cannot move", |peer, _, _| {
        welcome(peer);
        peer.send(&Message::Refused(Refused { reasons: Vec::new() }));
    }),
    ("a commit of what was not released", "out of turn", |peer, _, _| {
        let offer = welcome(peer).unwrap();
        let generation = offer.generation;
        peer.send(&Message::Committed(Committed { generation, record_us: 1, resume_us: 1 }));
    }),
    ("no connection for pages", "lost", |peer, listener, _| {
        welcome(peer);
        peer.send(&Message::Accepted(Accepted { prepare_us: 1, ..Accepted::default() }));
        drop(listener.accept());
    }),
    ("a barrier for a wrong round", "round 7", |peer, listener, world| {
        let _streams = accept(peer, listener, world);
        peer.send(&Message::Barrier(Barrier { round: 7, stream: 0 }));
        peer.until_closed();
    }),
    ("a barrier of a stream that is not there", "stream 63", |peer, listener, world| {
        let _streams = accept(peer, listener, world);
        peer.send(&Message::Barrier(Barrier { round: 1, stream: 63 }));
        peer.until_closed();
    }),
    ("a barrier of a stream beyond all numbers", "stream 4294967295", |peer, listener, world| {
        let _streams = accept(peer, listener, world);
        peer.send(&Message::Barrier(Barrier { round: 1, stream: u32::MAX }));
        peer.until_closed();
    }),
    ("a barrier twice", "round 1", |peer, listener, world| {
        let _streams = accept(peer, listener, world);
        peer.send(&Message::Barrier(Barrier { round: 1, stream: 0 }));
        peer.send(&Message::Barrier(Barrier { round: 1, stream: 0 }));
        peer.until_closed();
    }),
    ("a load of what was not sent", "out of turn", |peer, listener, world| {
        let _streams = accept(peer, listener, world);
        peer.send(&Message::Loaded(Loaded { load_us: u64::MAX, blocks_verified: u32::MAX }));
        peer.until_closed();
    }),
    ("a load that proves nothing", "were to be proved", |peer, listener, world| {
        let _streams = accept(peer, listener, world);
        peer.send(&Message::Loaded(Loaded { load_us: 1, blocks_verified: 0 }));
        peer.until_closed();
    }),
    ("an answer to no question", "out of turn", |peer, listener, world| {
        let _streams = accept(peer, listener, world);
        peer.send(&Message::Answer(Answer { owner: 1 }));
        peer.until_closed();
    }),
    ("no end of messages", "more than any migration needs", |peer, listener, world| {
        let _streams = accept(peer, listener, world);
        let empty = encode_message(&Message::Refused(Refused { reasons: Vec::new() })).unwrap();
        let many = empty.repeat(1 << 17);
        // The first is out of turn already; the rest must neither be kept nor hold anything up.
        (0..20).for_each(|_| peer.raw(&many));
        peer.until_closed();
    }),
];

/// Lets the VM of `a` meet a target that plays this trick; returns the error.
fn meet(scene_a: &Daemon, world: &World, listener: &TcpListener, trick: &Trick) -> String {
    let id = scene_a.migrate(&to_the_other("a")).unwrap();
    let mut peer = Peer::accept(listener, &endpoint(world, "b")).unwrap();
    assert!(matches!(peer.receive(), Some(Message::Hello(_))));
    trick.2(&mut peer, listener, world);
    drop(peer);
    // Page streams are opened while the target is believed to start a QEMU.
    let (over, ends) = std::sync::mpsc::channel::<()>();
    let view = std::thread::scope(|scope| {
        listener.set_nonblocking(true).unwrap();
        scope.spawn(move || {
            while ends.recv_timeout(Duration::from_millis(10)) == Err(RecvTimeoutError::Timeout) {
                drop(listener.accept());
            }
        });
        let view = scene_a.wait(&id);
        drop(over);
        view
    });
    listener.set_nonblocking(false).unwrap();
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{}: {view:?}", trick.0);
    view.error_desc.unwrap()
}

#[test]
fn a_target_that_does_not_keep_to_the_protocol() {
    let world = World::new("7.2");
    let mut a = Daemon::start(&world, "a");
    let mut guest = crate::support::scene::guest(&world);
    guest.programs = vec![load(10)];
    a.run("vm", world.argv(&guest)).unwrap();
    world.wait_for("vm", "LOAD t=", crate::support::BOOT);
    let listener = TcpListener::bind(world.address("b")).unwrap();
    for trick in TRICKS {
        let why = meet(&a, &world, &listener, trick);
        let expected = trick.1 == "lost" && why.contains("died or the connection was cut");
        // A flood is cut by whichever of its offences is seen first.
        let flood = trick.1.contains("more than") && why.contains("out of turn");
        assert!(why.contains(trick.1) || expected || flood, "{}: {why}", trick.0);
        assert!(why.contains("at a"), "{}: where does it run? {why}", trick.0);
        assert_eq!(a.vm("vm").unwrap().state, "running", "{}", trick.0);
        a.assert_healthy();
    }
    silent(&a, &world, &listener);
    drop(listener);
    let b = Daemon::start(&world, "b");
    let scene = Scene { a, b, world };
    scene.move_verified("a");
}

/// Who takes the connection and never says a word, before the handshake or after the greeting.
fn silent(a: &Daemon, world: &World, listener: &TcpListener) {
    let id = a.migrate(&to_the_other("a")).unwrap();
    let (_socket, _) = listener.accept().unwrap();
    let view = a.wait(&id);
    assert!(view.error_desc.as_ref().is_some_and(|why| why.contains("cannot be reached")), "{view:?}");
    let id = a.migrate(&to_the_other("a")).unwrap();
    let mut peer = Peer::accept(listener, &endpoint(world, "b")).unwrap();
    let view = a.wait(&id);
    assert!(view.error_desc.as_ref().is_some_and(|why| why.contains("first answer")), "{view:?}");
    assert_eq!(a.vm("vm").unwrap().state, "running");
    peer.until_closed();
    std::thread::sleep(Duration::from_millis(1));
}
