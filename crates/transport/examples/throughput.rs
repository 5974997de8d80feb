//! How fast the page path is without a network: one and two streams over loopback, one thread per end.
//!
//! `cargo run --release --example throughput -p sterna-transport [GIB]`

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use sterna_transport::{Connection, Endpoint, Identity, Limits, Listener, pki};

const WRITE_SIZE: usize = 1024 * 1024;
const WAIT: Duration = Duration::from_secs(10);

fn main() -> Result<(), Box<dyn Error>> {
    let gib = std::env::args().nth(1).map_or(Ok(4), |argument| argument.parse::<u64>())?;
    let endpoint = endpoint()?;
    let server = Listener::bind("127.0.0.1:0")?.serve(endpoint.clone(), Limits::default(), receive)?;
    let addr = server.local_addr().to_string();
    for streams in [1, 2] {
        let bytes_each = (gib << 30) / streams;
        let started = Instant::now();
        let senders = (0..streams)
            .map(|_| {
                let connection = endpoint.connect(&addr, "localhost", WAIT)?;
                Ok(thread::spawn(move || send(connection, bytes_each)))
            })
            .collect::<Result<Vec<_>, sterna_transport::TransportError>>()?;
        for sender in senders {
            sender.join().map_err(|_| "a sender panicked")??;
        }
        let seconds = started.elapsed().as_secs_f64();
        let total = (bytes_each * streams) as f64;
        println!(
            "{streams} stream(s): {:.2} GB/s ({total:.0} bytes in {seconds:.2} s)",
            total / seconds / 1e9
        );
    }
    server.stop();
    Ok(())
}

fn endpoint() -> Result<Endpoint, Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let authority = pki::init(dir.path(), "throughput")?;
    let host = pki::issue(dir.path(), "localhost", &[])?;
    Ok(Endpoint::new(&Identity::load(&authority.certificate, &host.certificate, &host.key)?)?)
}

/// Sends, then waits for the answer that everything arrived.
fn send(mut connection: Connection, bytes: u64) -> Result<(), sterna_transport::TransportError> {
    let page_batch = vec![0x5a; WRITE_SIZE];
    let mut left = bytes;
    connection.write_all(&left.to_le_bytes())?;
    while left > 0 {
        let part = left.min(WRITE_SIZE as u64) as usize;
        connection.write_all(&page_batch[..part])?;
        left -= part as u64;
    }
    connection.flush()?;
    connection.read_exact(&mut [0])
}

fn receive(mut connection: Connection) {
    let mut size = [0; 8];
    let mut buffer = vec![0; WRITE_SIZE];
    let result = (|| {
        connection.read_exact(&mut size)?;
        let mut left = u64::from_le_bytes(size);
        while left > 0 {
            let part = left.min(WRITE_SIZE as u64) as usize;
            left -= connection.read(&mut buffer[..part])? as u64;
        }
        connection.write_all(&[1])?;
        connection.flush()
    })();
    if let Err(error) = result {
        eprintln!("receiving failed: {error}");
    }
}
