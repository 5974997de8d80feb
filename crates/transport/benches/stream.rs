//! A page stream without its pages: batches written to, and read from, a TLS connection over the loopback device.
//!
//! Each end's own processor time: the slower of the two bounds what a stream carries where each has a processor.

#![forbid(unsafe_code)]

#[path = "../../memory/benches/common/harness.rs"]
mod harness;

use std::net::TcpListener;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use criterion::Throughput;
use sterna_transport::{Connection, Endpoint, Identity, Shutdown, pki};

/// What is written at once: a full batch.
const BATCH: usize = 1 << 20;
/// Bytes that a socket may queue, as page streams set it.
const SEND_BUFFER: usize = 1 << 20;
/// How long the handshake may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() {
    let mut criterion = harness::criterion();
    let mut group = criterion.benchmark_group("stream");
    group.throughput(Throughput::Bytes(BATCH as u64));
    let mut buffer = vec![7; BATCH];
    let mut reader = None;
    group.bench_function("write", |bencher| {
        let (near, _) = reader.get_or_insert_with(|| {
            with_peer(|far| {
                let mut buffer = vec![0; BATCH];
                while far.read_exact(&mut buffer).is_ok() {}
            })
        });
        bencher.iter(|| near.write_all(&buffer).expect("the other end reads"));
    });
    let mut writer = None;
    group.bench_function("read", |bencher| {
        let (near, _) = writer.get_or_insert_with(|| {
            with_peer(|far| {
                let buffer = vec![7; BATCH];
                while far.write_all(&buffer).is_ok() {}
            })
        });
        bencher.iter(|| near.read_exact(&mut buffer).expect("the other end writes"));
    });
    group.finish();
    criterion.final_summary();
}

/// The thread at the other end; it ends when this is dropped.
struct Peer {
    shutdown: Shutdown,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shutdown.shutdown();
        self.thread.take().into_iter().for_each(|thread| drop(thread.join()));
    }
}

/// A connection, and a thread that does something at its other end.
fn with_peer(work: impl FnOnce(&mut Connection) + Send + 'static) -> (Connection, Peer) {
    let (near, mut far) = pair();
    let shutdown = far.shutdown_handle();
    let thread = Some(thread::spawn(move || work(&mut far)));
    (near, Peer { shutdown, thread })
}

fn pair() -> (Connection, Connection) {
    let dir = tempfile::tempdir().expect("there is room for files");
    pki::init(dir.path(), "bench").expect("an authority");
    let endpoint = |host| {
        let issued = pki::issue(dir.path(), host, &[]).expect("a certificate");
        let identity = Identity::load(&dir.path().join("ca.crt"), &issued.certificate, &issued.key);
        Endpoint::new(&identity.expect("it fits")).expect("it fits")
    };
    let (west, east) = (endpoint("west"), endpoint("east"));
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
    let addr = listener.local_addr().expect("bound").to_string();
    let accepting =
        thread::spawn(move || east.accept(listener.accept().expect("a peer").0, PATIENCE).expect("our peer"));
    let near = west.connect(&addr, "east", PATIENCE).expect("our peer");
    let far = accepting.join().expect("accepted");
    for end in [&near, &far] {
        end.set_send_buffer(SEND_BUFFER).expect("a socket");
    }
    (near, far)
}
