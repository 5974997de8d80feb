//! A hostile source against an agent: what it offers, and what it sends once it was accepted.

use std::net::TcpListener;

use sterna_engine::wire::Message;
use sterna_engine::wire::batch::{BatchHeader, Content, Descriptor, encode_batch};
use sterna_engine::wire::message::{
    Block, BlockDigest, Offer, Query, Reason, Refused, Release, StateEnd, Stream, Text, Welcome,
};

use super::peer::{Peer, STEP, Source, endpoint, hello};
use crate::support::scene::{AT_REST, Scene, to_the_other, until};
use crate::support::{BOOT, World, daemon::Daemon, pids_naming};

/// The offer of a real VM at `a`: what its agent says to a target that is us.
fn real_offer(a: &Daemon, world: &World) -> Offer {
    let listener = TcpListener::bind(world.address("b")).unwrap();
    let id = a.migrate(&to_the_other("a")).unwrap();
    let mut peer = Peer::accept(&listener, &endpoint(world, "b")).unwrap();
    assert!(matches!(peer.receive(), Some(Message::Hello(_))));
    peer.send(&Message::Welcome(Welcome { version: 1, software: "a test".into() }));
    let Some(Message::Offer(offer)) = peer.receive() else { panic!("no offer") };
    drop(peer);
    a.wait(&id);
    offer
}

/// Everything that a bad source does to `b`, each on its own connection.
struct Bad<'a> {
    world: &'a World,
    b: &'a Daemon,
    good: Offer,
    tries: u8,
}

impl Bad<'_> {
    fn id(&mut self) -> [u8; 16] {
        self.tries += 1;
        [self.tries; 16]
    }

    /// The agent refuses this offer; returns the reasons.
    fn refused(&mut self, change: impl FnOnce(&mut Offer)) -> String {
        let mut offer = self.next();
        change(&mut offer);
        let mut source = Source::greet(self.world, self.id());
        let answer = source.offer(&offer);
        let Some(Message::Refused(Refused { reasons })) = answer else {
            panic!("{answer:?}\n{}", self.b.log())
        };
        self.at_rest();
        let text = |reason: &Reason| format!("{}: {}", reason.code, reason.text);
        reasons.iter().map(text).collect::<Vec<_>>().join("\n")
    }

    /// A try of its own, newer than all before.
    fn next(&mut self) -> Offer {
        self.good.generation += 1;
        self.good.clone()
    }

    /// An offer that the agent accepts, so that a QEMU waits for us.
    fn accepted(&mut self) -> Source<'_> {
        let (id, offer) = (self.id(), self.next());
        let mut source = Source::greet(self.world, id);
        let answer = source.offer(&offer);
        assert!(matches!(answer, Some(Message::Accepted(_))), "{answer:?}\n{}", self.b.log());
        source
    }

    /// Does this with a QEMU that waits: the agent ends it, and hangs up. Returns what it said last.
    fn trick(&mut self, what: &str, play: impl FnOnce(&mut Source<'_>) -> Vec<Peer>) -> String {
        let mut source = self.accepted();
        let streams = play(&mut source);
        let said = source.control.until_closed();
        drop(streams);
        let (world, b) = (self.world, self.b);
        until(&format!("{what}: nothing waits any more\n{}", b.log()), AT_REST, || at_rest(world, b));
        match said.last() {
            Some(Message::Abort(Text { text })) => text.clone(),
            _ => String::new(),
        }
    }

    fn at_rest(&self) {
        until("nothing waits any more", AT_REST, || at_rest(self.world, self.b));
    }
}

fn at_rest(world: &World, b: &Daemon) -> Option<()> {
    let folder = world.path("b");
    let empty = |name: &str| std::fs::read_dir(folder.join(name)).unwrap().next().is_none();
    let none = pids_naming(&format!("{}/run/vms/", folder.display())).is_empty();
    (none && b.vms().unwrap().is_empty() && empty("run/vms") && empty("state/vms")).then_some(())
}

fn pages(block: u16, round: u32, first: u32, pages: u16) -> Vec<u8> {
    let mut frame = Vec::new();
    encode_batch(block, round, &[Descriptor { first, pages, content: Content::Bytes }], &mut frame);
    frame.extend(vec![7; usize::from(pages) * 4096]);
    frame
}

#[test]
fn a_source_that_does_not_keep_to_the_protocol() {
    let world = World::new("7.2");
    let a = Daemon::start(&world, "a");
    a.run("vm", world.argv(&crate::support::scene::guest(&world))).unwrap();
    world.wait_for("vm", "LOAD t=", BOOT);
    let good = real_offer(&a, &world);
    let b = Daemon::start(&world, "b");
    let mut bad = Bad { world: &world, b: &b, good, tries: 0 };
    first_words(&mut bad);
    offers(&mut bad);
    names(&mut bad);
    controls(&mut bad);
    streams(&mut bad);
    let generation = bad.good.generation;
    replayed(&mut bad);
    let mut scene = Scene { a, b, world };
    catch_up(&scene, generation);
    scene.move_verified("a");
    scene.b.assert_healthy();
}

/// The real source has to be ahead of the tries that were made in its name.
fn catch_up(scene: &Scene, generation: u64) {
    while scene.a.vm("vm").unwrap().generation < generation {
        let mut request = to_the_other("a");
        request.max_bandwidth = Some(1_000_000);
        let id = scene.a.migrate(&request).unwrap();
        // Those that are older than what the target knows are refused before they can be cancelled.
        drop(scene.a.cancel(&id));
        assert_ne!(scene.a.wait(&id).status, "completed");
    }
}

/// Connections that do not even begin as they should.
fn first_words(bad: &mut Bad<'_>) {
    let id = bad.id();
    let nonsense: [&[u8]; 5] = [
        &[0xa5; 300],
        &[0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0],
        &[0, 0, 0, 0, 1, 0, 0, 0],
        &[4, 0, 0, 0, 2, 0, 0, 0, 1, 2, 3, 4],
        &[5, 0, 0, 0, 1, 0, 0, 0, 1],
    ];
    for bytes in nonsense {
        let mut peer = Peer::connect(bad.world);
        peer.raw(bytes);
        assert!(peer.receive().is_none(), "{bytes:?}");
    }
    let wrong = [
        Message::Release(Release { generation: 1 }),
        Message::Stream(Stream { id: vec![9; 16], index: 0, purpose: 0 }),
        Message::Stream(Stream { id: vec![9; 3], index: 0, purpose: 0 }),
        Message::Abort(Text { text: "x".into() }),
    ];
    for message in wrong {
        let mut peer = Peer::connect(bad.world);
        peer.send(&message);
        assert!(peer.receive().is_none(), "{message:?}");
    }
    let mut first = Source::greet(bad.world, id);
    let mut second = Peer::connect(bad.world);
    second.send(&hello(id));
    assert!(second.receive().is_none(), "two connections control one migration");
    first.control.send(&hello(id));
    first.control.until_closed();
    bad.at_rest();
}

fn offers(bad: &mut Bad<'_>) {
    assert!(bad.refused(|offer| offer.streams = 0).contains("page streams"));
    assert!(bad.refused(|offer| offer.streams = u32::MAX).contains("page streams"));
    let many = vec![Block { name: "ram".into(), bytes: u64::MAX, travels: true }; 1025];
    assert!(bad.refused(|offer| offer.blocks = many).contains("blocks"));
    let huge = |offer: &mut Offer| offer.blocks.iter_mut().for_each(|block| block.bytes = u64::MAX / 2);
    assert!(!bad.refused(huge).is_empty());
    assert!(bad.refused(|offer| offer.blocks[0].bytes += 4096).contains("block"));
    assert!(bad.refused(|offer| offer.blocks[0].name = "nothing".into()).contains("nothing"));
    assert!(bad.refused(|offer| offer.fingerprint.clear()).contains("fingerprint"));
    assert!(!bad.refused(|offer| offer.argv.clear()).is_empty());
    let lines: [(&[&str], &str); 8] = [
        (&["-incoming", "exec:touch /tmp/sterna-was-here"], "-incoming"),
        (&["-netdev", "tap,id=n,ifname=t0,script=/bin/sh"], "script"),
        (&["-drive", "file=/etc/shadow,format=raw,if=virtio"], "/etc/shadow"),
        (&["-chardev", "file,id=x,path=/etc/cron.d/evil"], "/etc/cron.d"),
        (&["-S"], "-S"),
        (&["-daemonize"], "-daemonize"),
        (&["-no-such-option", "x"], "-no-such-option"),
        (&["-readconfig", "/etc/passwd"], "-readconfig"),
    ];
    for (words, named) in lines {
        let why = bad.refused(|offer| offer.argv.extend(words.iter().map(|word| (*word).to_owned())));
        assert!(why.contains(named), "{words:?}: {why}");
    }
    let why = bad.refused(|offer| offer.argv[0] = "/bin/sh".into());
    assert!(why.contains("may not be started"), "{why}");
    // Allowed by its line, and QEMU itself finds that it cannot be: its own words come back.
    let why = bad.refused(|offer| offer.machine = "no-such-machine".into());
    assert!(why.contains("unsupported machine type"), "{why}");
}

/// A name that leads somewhere was believed: the target kept its record there.
fn names(bad: &mut Bad<'_>) {
    let outside = bad.world.path("escaped");
    for name in
        ["", ".", "..", "../../../escaped", "a/b", "a\nb", "-x", &"x".repeat(65), &"x".repeat(100_000)]
    {
        let why = bad.refused(|offer| offer.vm = name.to_owned());
        assert!(why.contains("name"), "{why}");
        let mut peer = Peer::connect(bad.world);
        peer.send(&Message::Query(Query {
            id: vec![1; 16],
            vm: name.into(),
            generation: 1,
            by_target: false,
        }));
        let Some(Message::Answer(answer)) = peer.receive() else { panic!("no answer") };
        assert_eq!(answer.owner, 4, "nobody knows {name:?}");
    }
    assert!(!outside.with_extension("record").exists());
    assert!(!bad.world.path("b/state/escaped.record").exists());
}

/// Device state, and messages in any order but the right one.
fn controls(bad: &mut Bad<'_>) {
    let mut early = Source::greet(bad.world, bad.id());
    // State that nobody waits for was kept, up to its limit, for each connection.
    early.control.state(&[0; 4096]);
    early.control.until_closed();
    bad.trick("a release before the load", |source| {
        source.control.send(&Message::Release(Release { generation: 1 }));
        Vec::new()
    });
    bad.trick("an offer twice", |source| {
        source.control.send(&Message::Offer(Offer::default()));
        Vec::new()
    });
    bad.trick("the end of the state twice", |source| {
        let end = StateEnd { last_round: 9, ..StateEnd::default() };
        source.control.send(&Message::StateEnd(end.clone()));
        source.control.send(&Message::StateEnd(end));
        Vec::new()
    });
    bad.trick("too much device state", |source| {
        (0..257).for_each(|_| source.control.state(&[0; 1 << 20]));
        Vec::new()
    });
    bad.trick("a state of another length", |source| end_with(source, b"short", 99, Vec::new()));
    let why = bad.trick("a state that is none", |source| end_with(source, &[0xa5; 5000], 5000, Vec::new()));
    assert!(why.contains("device state"), "{why}");
    // A digest reads a whole block, and there was no limit to how often: a short message held the target up for hours.
    let digests = vec![BlockDigest { block: 0, digest: vec![0; 32] }; 20_000];
    let why = bad.trick("a digest again and again", |source| end_with(source, &[0; 8], 8, digests));
    assert!(why.contains("digests twice"), "{why}");
    bad.trick("garbage on the control connection", |source| {
        source.control.raw(&[0xa5; 100]);
        Vec::new()
    });
    bad.trick("half a message", |source| {
        source.control.raw(&[50, 0, 0, 0, 1, 0, 0, 0, 1]);
        let peer = Peer::connect(source.world);
        drop(std::mem::replace(&mut source.control, peer));
        // Takes the place of the closed one, and is closed for its silence.
        source.control.raw(&[0xa5; 8]);
        Vec::new()
    });
}

/// Both streams end round 1, the state follows. The streams come in the wrong order: they are connections of their own, and
/// a good migration was given up when one overtook the other on its way.
fn end_with(source: &mut Source<'_>, state: &[u8], bytes: u64, digests: Vec<BlockDigest>) -> Vec<Peer> {
    let streams: Vec<Peer> = [1, 0]
        .into_iter()
        .map(|index| {
            let mut stream = source.stream(index);
            stream.raw(&BatchHeader::round_end(1).encode());
            stream
        })
        .collect();
    for _ in 0..2 {
        assert!(matches!(source.control.receive(), Some(Message::Barrier(_))));
    }
    source.control.state(state);
    source.control.send(&Message::StateEnd(StateEnd {
        bytes,
        last_round: 1,
        digests,
        paused: false,
        postcopy: false,
    }));
    streams
}

fn streams(bad: &mut Bad<'_>) {
    let on_stream = |what: &'static str, bytes: Vec<u8>, bad: &mut Bad<'_>| {
        bad.trick(what, |source| {
            let mut stream = source.stream(0);
            stream.raw(&bytes);
            vec![stream]
        });
    };
    on_stream("garbage on a stream", vec![0xa5; 4096], bad);
    on_stream("pages outside of a block", pages(0, 1, u32::MAX - 1, 1), bad);
    on_stream("pages of no block", pages(999, 1, 0, 1), bad);
    on_stream("pages of another round", pages(0, 2, 0, 1), bad);
    on_stream("a round that ends twice", BatchHeader::round_end(1).encode().repeat(2), bad);
    on_stream("the end of another round", BatchHeader::round_end(7).encode().to_vec(), bad);
    let mut oversized = pages(0, 1, 0, 1);
    oversized[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    on_stream("an oversized batch", oversized, bad);
    bad.trick("half a batch", |source| {
        let mut stream = source.stream(0);
        stream.raw(&pages(0, 1, 0, 4)[..3000]);
        drop(stream);
        Vec::new()
    });
    bad.trick("a stream that is not there", |source| vec![source.stream(2)]);
    bad.trick("a stream beyond all numbers", |source| vec![source.stream(u32::MAX)]);
    bad.trick("a stream twice", |source| vec![source.stream(0), source.stream(0)]);
}

/// A try that is not newer than what the target knows is refused, whoever replays it.
fn replayed(bad: &mut Bad<'_>) {
    let old = bad.good.clone();
    let why = bad.refused(|offer| *offer = old);
    assert!(why.contains("stale") || why.contains("older"), "{why}");
    assert!(endpoint(bad.world, "a").connect(&bad.world.address("b"), "b", STEP).is_ok());
}
