//! Without descriptors the server waits instead of spinning or ending. Alone in its process, since it lowers the
//! limit for all of it.

use std::fs::File;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sterna_transport::{Endpoint, Identity, Limits, Listener, pki};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_server_without_descriptors_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let authority = pki::init(dir.path(), "test").unwrap();
    let host = pki::issue(dir.path(), "east", &[]).unwrap();
    let identity = Identity::load(&authority.certificate, &host.certificate, &host.key).unwrap();
    let endpoint = Endpoint::new(&identity).unwrap();
    let server = Listener::bind("127.0.0.1:0")
        .unwrap()
        .serve(endpoint.clone(), Limits::default(), |mut connection| {
            let _ = connection.write_all(b"!").and_then(|()| connection.flush());
            let _ = connection.read(&mut [0]);
        })
        .unwrap();

    let before = getrlimit(Resource::Nofile);
    let lowered = Rlimit { current: Some(64), maximum: before.maximum };
    setrlimit(Resource::Nofile, lowered).unwrap();
    // Everything but one: that one is the client's, and the server's accept(2) gets EMFILE.
    let mut files = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        files.push(file);
    }
    files.pop();
    let waiting = TcpStream::connect(server.local_addr()).unwrap();
    while server.stats().accept_failures == 0 {
        thread::yield_now();
    }
    // A server that spins fails some ten thousand times meanwhile, one that pauses a few times.
    thread::sleep(Duration::from_millis(300));
    assert!(server.stats().accept_failures < 100, "{:?}", server.stats());
    assert_eq!(server.stats().handshakes, 0);
    drop((files, waiting));
    setrlimit(Resource::Nofile, before).unwrap();

    let mut connection = endpoint.connect(&server.local_addr().to_string(), "east", PATIENCE).unwrap();
    let mut byte = [0];
    connection.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"!");
    drop(connection);
    server.stop();
}
