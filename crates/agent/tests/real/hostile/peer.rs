//! One end of the protocol, spoken by hand.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use sterna_engine::wire::Message;
use sterna_engine::wire::control::{
    ControlHeader, ControlKind, HEADER_BYTES, decode_message, encode_message, state_header,
};
use sterna_engine::wire::message::{Hello, Offer, Stream};
use sterna_transport::{Connection, Endpoint, Identity, TransportError};

use crate::support::{BOOT, World};

/// How long one step with an agent may take.
pub(crate) const STEP: Duration = Duration::from_secs(10);

/// The keys of a host.
pub(crate) fn endpoint(world: &World, host: &str) -> Endpoint {
    let file = |name: String| world.path("pki").join(name);
    let identity =
        Identity::load(&file("ca.crt".into()), &file(format!("{host}.crt")), &file(format!("{host}.key")));
    Endpoint::new(&identity.unwrap()).unwrap()
}

/// A control connection, spoken by hand.
pub(crate) struct Peer {
    pub(crate) connection: Connection,
}

impl Peer {
    pub(crate) fn accept(listener: &TcpListener, endpoint: &Endpoint) -> Result<Self, TransportError> {
        let (socket, _) = listener.accept().unwrap();
        endpoint.accept(socket, STEP).map(|connection| Self { connection })
    }

    /// As host `a`, to the agent of `b`.
    pub(crate) fn connect(world: &World) -> Self {
        let connection = endpoint(world, "a").connect(&world.address("b"), "b", STEP).unwrap();
        Self { connection }
    }

    pub(crate) fn send(&mut self, message: &Message) {
        self.raw(&encode_message(message).unwrap());
    }

    pub(crate) fn state(&mut self, piece: &[u8]) {
        self.raw(&state_header(piece));
        self.raw(piece);
    }

    /// What the agent does not take any more is no failure of the test.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.connection.set_write_deadline(Some(Instant::now() + STEP));
        drop(self.connection.write_all(bytes).and_then(|()| self.connection.flush()));
    }

    /// The next message, or none when the agent has ended the connection.
    pub(crate) fn receive(&mut self) -> Option<Message> {
        self.connection.set_read_deadline(Some(Instant::now() + BOOT));
        let mut head = [0; HEADER_BYTES];
        match self.connection.read_exact(&mut head) {
            Err(why) if why.is_timeout() => panic!("the agent neither answers nor hangs up"),
            Err(_) => return None,
            Ok(()) => {}
        }
        let header = ControlHeader::decode(&head).unwrap();
        assert_eq!(header.kind, ControlKind::Message);
        let mut body = vec![0; header.bytes];
        self.connection.read_exact(&mut body).unwrap();
        Some(decode_message(&body).unwrap())
    }

    /// Whatever the agent still says, until it hangs up; fails if it never does.
    pub(crate) fn until_closed(&mut self) -> Vec<Message> {
        std::iter::from_fn(|| self.receive()).collect()
    }
}

pub(crate) fn hello(id: [u8; 16]) -> Message {
    Message::Hello(Hello { version_min: 1, version_max: 1, id: id.to_vec(), software: "a test".into() })
}

/// A hostile source: as host `a`, to the agent of `b`.
pub(crate) struct Source<'a> {
    pub(crate) world: &'a World,
    pub(crate) id: [u8; 16],
    pub(crate) control: Peer,
}

impl<'a> Source<'a> {
    pub(crate) fn greet(world: &'a World, id: [u8; 16]) -> Self {
        let mut control = Peer::connect(world);
        control.send(&hello(id));
        assert!(matches!(control.receive(), Some(Message::Welcome(_))));
        Self { world, id, control }
    }

    /// Offers; returns the answer.
    pub(crate) fn offer(&mut self, offer: &Offer) -> Option<Message> {
        self.control.send(&Message::Offer(offer.clone()));
        self.control.receive()
    }

    /// Opens a page stream.
    pub(crate) fn stream(&self, index: u32) -> Peer {
        let mut stream = Peer::connect(self.world);
        stream.send(&Message::Stream(Stream { id: self.id.to_vec(), index, purpose: 0 }));
        stream
    }
}
