//! Many peers at once, rude ones among them, and an end that leaves nothing behind.

use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use sterna_transport::{Connection, Limits, Listener, ServerHandle, TransportError};

use crate::support::{Authority, PATIENCE};

fn limits(handshakes: usize, connections: usize) -> Limits {
    Limits { handshakes, connections, handshake_deadline: PATIENCE }
}

fn serve(
    authority: &Authority,
    limits: Limits,
    handler: impl Fn(Connection) + Send + Sync + 'static,
) -> (ServerHandle, String) {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().to_string();
    (listener.serve(authority.endpoint("east"), limits, handler).unwrap(), addr)
}

/// Gives back each byte until the peer closes.
fn echo(mut connection: Connection) {
    let mut byte = [0];
    while let Ok(1) = connection.read(&mut byte) {
        if connection.write_all(&byte).and_then(|()| connection.flush()).is_err() {
            return;
        }
    }
}

fn ask(connection: &mut Connection) -> Result<(), TransportError> {
    connection.write_all(&[7])?;
    connection.flush()?;
    let mut answer = [0];
    connection.read_exact(&mut answer)?;
    assert_eq!(answer, [7]);
    Ok(())
}

#[test]
fn a_hundred_at_once_within_a_limit() {
    const PEERS: usize = 100;
    let authority = Authority::new();
    let (server, addr) = serve(&authority, limits(8, PEERS), echo);
    let west = authority.endpoint("west");
    let most = AtomicUsize::new(0);
    let done = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..PEERS {
            scope.spawn(|| {
                let mut connection = west.connect(&addr, "east", PATIENCE).unwrap();
                ask(&mut connection).unwrap();
                done.fetch_add(1, Ordering::SeqCst);
                connection.close(PATIENCE).unwrap();
            });
        }
        while done.load(Ordering::SeqCst) < PEERS {
            most.fetch_max(server.stats().handshakes, Ordering::SeqCst);
            thread::yield_now();
        }
    });
    assert!(most.load(Ordering::SeqCst) <= 8);
    assert_eq!((server.stats().accepted, server.stats().refused), (PEERS as u64, 0));
    server.stop();
}

/// Peers that connect and say nothing take the places for handshakes, and no more than those.
#[test]
fn silent_peers_fill_only_their_places() {
    let authority = Authority::new();
    let (server, addr) = serve(&authority, limits(3, 10), echo);
    let silent = (0..10).map(|_| TcpStream::connect(&addr).unwrap()).collect::<Vec<_>>();
    while server.stats().handshakes < 3 {
        thread::yield_now();
    }
    for _ in 0..1000 {
        assert!(server.stats().handshakes <= 3);
        thread::yield_now();
    }
    drop(silent);
    let mut connection = authority.endpoint("west").connect(&addr, "east", PATIENCE).unwrap();
    ask(&mut connection).unwrap();
    // The last silent ones may still be at their ends when the good one was served.
    let end = std::time::Instant::now() + PATIENCE;
    while server.stats().refused < 10 && std::time::Instant::now() < end {
        thread::yield_now();
    }
    assert_eq!((server.stats().accepted, server.stats().refused), (1, 10));
}

#[test]
fn verified_peers_are_limited_too() {
    let authority = Authority::new();
    let (server, addr) = serve(&authority, limits(8, 2), echo);
    let west = authority.endpoint("west");
    let mut kept = [(); 2].map(|()| west.connect(&addr, "east", PATIENCE).unwrap());
    kept.iter_mut().for_each(|connection| ask(connection).unwrap());
    let refused = west.connect(&addr, "east", PATIENCE).and_then(|mut connection| ask(&mut connection));
    assert!(refused.unwrap_err().is_disconnect());
    kept.iter_mut().for_each(|connection| ask(connection).unwrap());
    let [first, _second] = kept;
    first.close(PATIENCE).unwrap();
    while server.stats().connections == 2 {
        thread::yield_now();
    }
    ask(&mut west.connect(&addr, "east", PATIENCE).unwrap()).unwrap();
}

/// Handlers that wait for their peers, handshakes that wait for theirs: all of them end, and the port is free.
#[test]
fn stopping_ends_everything() {
    let authority = Authority::new();
    let (ended, ends) = mpsc::channel();
    let (server, addr) = serve(&authority, limits(8, 8), move |mut connection| {
        ended.send(connection.read(&mut [0; 1])).unwrap();
    });
    let west = authority.endpoint("west");
    let kept = [(); 3].map(|()| west.connect(&addr, "east", PATIENCE).unwrap());
    let _silent = TcpStream::connect(&addr).unwrap();
    while server.stats().connections < 3 || server.stats().handshakes < 1 {
        thread::yield_now();
    }
    server.stop();
    // The handler, and with it the channel, is gone once all threads are.
    let results = ends.iter().collect::<Vec<_>>();
    assert_eq!(results.len(), 3);
    for result in results {
        assert!(matches!(result, Err(TransportError::ShutDown { .. })), "{result:?}");
    }
    for mut connection in kept {
        assert!(connection.read(&mut [0; 1]).unwrap_err().is_disconnect());
    }
    Listener::bind(&addr).unwrap();
}

#[test]
fn dropping_the_handle_stops() {
    let authority = Authority::new();
    let (server, addr) = serve(&authority, Limits::default(), echo);
    let mut connection = authority.endpoint("west").connect(&addr, "east", PATIENCE).unwrap();
    ask(&mut connection).unwrap();
    drop(server);
    assert!(connection.read(&mut [0; 1]).unwrap_err().is_disconnect());
    assert!(TcpStream::connect(&addr).is_err());
}

#[test]
fn a_handler_that_panics_ends_only_its_connection() {
    let authority = Authority::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let (server, addr) = serve(&authority, limits(8, 1), move |connection| {
        if calls.fetch_add(1, Ordering::SeqCst) == 0 {
            panic!("on purpose: the first handler of this test fails");
        }
        echo(connection);
    });
    let west = authority.endpoint("west");
    let mut first = west.connect(&addr, "east", PATIENCE).unwrap();
    assert!(first.read(&mut [0; 1]).unwrap_err().is_disconnect());
    // Its place must be free again, or the only one is taken for ever.
    while server.stats().connections > 0 {
        thread::yield_now();
    }
    ask(&mut west.connect(&addr, "east", PATIENCE).unwrap()).unwrap();
}

#[test]
fn a_taken_port_is_named() {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().to_string();
    let error = Listener::bind(&addr).unwrap_err();
    assert!(matches!(error, TransportError::Bind { .. }) && error.to_string().contains(&addr), "{error:?}");
}
