//! Verified connections: every byte arrives once and in order, or the reader is told.

use std::io::IoSlice;
use std::net::TcpListener;
use std::thread;
use std::time::Instant;

use rustls::version::TLS13;
use sterna_transport::{Connection, Operation, Reader, Result, TransportError, Writer};

use crate::support::{
    Authority, PATIENCE, SHORT, accept_from, bare_client, bare_connection, check, fill, pair, spoiling_proxy,
};

const MIB: usize = 1 << 20;

fn send_stream(writer: &mut Writer, stream: u64, bytes: u64, mut piece: usize) {
    let mut buffer = vec![0; 3 * MIB];
    let mut position = 0;
    while position < bytes {
        let count = piece.min((bytes - position) as usize);
        fill(&mut buffer[..count], stream, position);
        writer.write_all(&buffer[..count]).unwrap();
        position += count as u64;
        // Sizes of all kinds: below, at and beyond records and batches.
        piece = (piece * 7 + 13) % buffer.len() + 1;
    }
    writer.flush().unwrap();
}

fn receive_stream(reader: &mut Reader, stream: u64, bytes: u64, mut piece: usize) {
    let mut buffer = vec![0; 3 * MIB];
    let mut position = 0;
    while position < bytes {
        let count = piece.min((bytes - position) as usize);
        let count = reader.read(&mut buffer[..count]).unwrap();
        assert_ne!(count, 0, "the stream ended at {position}");
        check(&buffer[..count], stream, position);
        position += count as u64;
        piece = (piece * 5 + 17) % buffer.len() + 1;
    }
}

fn past_deadline() -> Option<Instant> {
    Some(Instant::now() + SHORT)
}

/// One byte is enough to tell that the other side is where we think.
fn echo_works(west: &mut Connection, east: &mut Connection) {
    west.write_all(b"?").unwrap();
    west.flush().unwrap();
    let mut byte = [0];
    east.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"?");
}

/// Both directions of one connection at once, both full: a reader that kept the lock while it waits would never end.
#[test]
fn full_duplex_64_mib_each_way() {
    const BYTES: u64 = 64 << 20;
    let (west, east) = pair();
    let counters = west.counters();
    thread::scope(|scope| {
        for (connection, out, back) in [(west, 1, 2), (east, 2, 1)] {
            let (mut reader, mut writer) = connection.split();
            scope.spawn(move || send_stream(&mut writer, out, BYTES, 1));
            scope.spawn(move || receive_stream(&mut reader, back, BYTES, 40_000));
        }
    });
    for on_wire in [counters.bytes_sent(), counters.bytes_received()] {
        assert!(on_wire > BYTES && on_wire < BYTES + BYTES / 50, "{on_wire}");
    }
}

/// Both ends leave TLS in one direction: all arrives, nothing of it is encrypted, and the other direction stays as it was.
#[test]
fn one_direction_in_clear() {
    const BYTES: u64 = 16 << 20;
    let (mut west, mut east) = pair();
    echo_works(&mut west, &mut east);
    thread::scope(|scope| {
        scope.spawn(|| east.receive_in_clear().unwrap());
        west.send_in_clear().unwrap();
    });
    let before = west.bytes_sent();
    let counters = west.counters();
    thread::scope(|scope| {
        let ((mut west_reader, mut west_writer), (mut east_reader, mut east_writer)) =
            (west.split(), east.split());
        scope.spawn(move || {
            send_stream(&mut west_writer, 1, BYTES, 1);
            west_writer.finish().unwrap();
        });
        scope.spawn(move || send_stream(&mut east_writer, 2, 100_000, 1000));
        scope.spawn(move || receive_stream(&mut west_reader, 2, 100_000, 1000));
        scope.spawn(move || {
            receive_stream(&mut east_reader, 1, BYTES, 40_000);
            // Nobody says goodbye in the clear: an end is a cut.
            let end = east_reader.read(&mut [0]).unwrap_err();
            assert!(matches!(end, TransportError::Truncated { .. }), "{end}");
        });
    });
    assert_eq!(counters.bytes_sent() - before, BYTES);
}

/// What was sent before the receiver asked for it cannot be told from ciphertext, and is refused.
#[test]
fn clear_bytes_that_come_too_early_are_refused() {
    let (mut west, mut east) = pair();
    west.write_all(b"too early").unwrap();
    west.flush().unwrap();
    let mut byte = [0];
    east.read_exact(&mut byte).unwrap();
    assert!(matches!(east.receive_in_clear(), Err(TransportError::Torn { .. })));
}

#[test]
fn slices_arrive_in_order() {
    let (west, east) = pair();
    let mut data = vec![0; 2 * MIB];
    fill(&mut data, 3, 0);
    let (mut reader, mut writer) = (east.split().0, west.split().1);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut slices, mut rest, mut size) = (Vec::new(), &data[..], 0);
            while !rest.is_empty() {
                let (slice, others) = rest.split_at(size.min(rest.len()));
                slices.push(IoSlice::new(slice));
                rest = others;
                // Empty ones, single bytes and pages, more than one batch may hold.
                size = (size * 31 + 7) % 4099 * (slices.len() % 3);
                size += usize::from(slices.len() % 50 == 49);
            }
            assert!(slices.len() > 1000);
            for some in slices.chunks(400) {
                writer.write_vectored(some).unwrap();
            }
            writer.flush().unwrap();
        });
        receive_stream(&mut reader, 3, data.len() as u64, 100);
    });
}

#[test]
fn small_writes_share_records() {
    let (mut west, mut east) = pair();
    let before = west.bytes_sent();
    for position in 0..10_000 {
        let mut piece = [0; 10];
        fill(&mut piece, 4, position * 10);
        west.write_all(&piece).unwrap();
    }
    west.flush().unwrap();
    let on_wire = west.bytes_sent() - before;
    assert!(on_wire < 100_000 + 8 * 22, "{on_wire}");
    let mut all = vec![0; 100_000];
    east.read_exact(&mut all).unwrap();
    check(&all, 4, 0);
}

#[test]
fn a_read_deadline_loses_nothing() {
    let (mut west, mut east) = pair();
    let mut buffer = [0; 100];
    for _ in 0..2 {
        east.set_read_deadline(past_deadline());
        let error = east.read(&mut buffer).unwrap_err();
        assert!(matches!(error, TransportError::TimedOut { operation: Operation::Read, .. }), "{error:?}");
    }
    let mut data = [0; 100];
    fill(&mut data, 5, 0);
    west.write_all(&data[..60]).unwrap();
    west.flush().unwrap();
    let mut filled = 0;
    east.set_read_deadline(past_deadline());
    assert!(east.read_resumable(&mut buffer, &mut filled).unwrap_err().is_timeout());
    assert_eq!(filled, 60);
    west.write_all(&data[60..]).unwrap();
    west.flush().unwrap();
    east.set_read_deadline(None);
    east.read_resumable(&mut buffer, &mut filled).unwrap();
    assert_eq!(filled, 100);
    check(&buffer, 5, 0);
}

/// After a part was thrown away nobody knows what the next byte means.
#[test]
fn a_deadline_in_the_middle_of_read_exact_ends_the_reader() {
    let (mut west, mut east) = pair();
    east.set_read_deadline(past_deadline());
    assert!(east.read_exact(&mut [0; 10]).unwrap_err().is_timeout());
    east.set_read_deadline(None);
    echo_works(&mut west, &mut east);
    west.write_all(b"part").unwrap();
    west.flush().unwrap();
    east.set_read_deadline(past_deadline());
    assert!(matches!(east.read_exact(&mut [0; 10]), Err(TransportError::Torn { .. })));
    east.set_read_deadline(None);
    west.write_all(b"enough").unwrap();
    west.flush().unwrap();
    assert!(matches!(east.read(&mut [0; 10]), Err(TransportError::Torn { .. })));
}

#[test]
fn a_write_deadline_ends_the_writer_but_not_the_reader() {
    let (mut west, mut east) = pair();
    let data = vec![0; MIB];
    west.set_write_deadline(past_deadline());
    // The peer reads nothing, so that the buffers of both kernels fill up.
    let error = (0..1000).find_map(|_| west.write_all(&data).err()).expect("a kernel takes no gigabyte");
    assert!(matches!(error, TransportError::TimedOut { operation: Operation::Write, .. }), "{error:?}");
    west.set_write_deadline(None);
    assert!(matches!(west.write_all(b"more"), Err(TransportError::Torn { .. })));
    assert!(matches!(west.flush(), Err(TransportError::Torn { .. })));
    echo_works(&mut east, &mut west);
}

#[test]
fn a_shutdown_wakes_a_reader() {
    let (west, east) = pair();
    let shutdown = west.shutdown_handle();
    let (mut reader, mut writer) = west.split();
    let reading = thread::spawn(move || reader.read(&mut [0; 10]));
    shutdown.clone().shutdown();
    assert!(matches!(reading.join().unwrap(), Err(TransportError::ShutDown { .. })));
    assert!(matches!(writer.write_all(b"more"), Err(TransportError::ShutDown { .. })));
    drop(east);
}

#[test]
fn a_shutdown_wakes_a_writer() {
    let (west, mut east) = pair();
    let shutdown = west.shutdown_handle();
    let counters = west.counters();
    let (_reader, mut writer) = west.split();
    let writing = thread::spawn(move || {
        let data = vec![0; MIB];
        loop {
            if let Err(error) = writer.write_all(&data) {
                return error;
            }
        }
    });
    // Wait until it has begun, so that it is in a write or about to be.
    while counters.bytes_sent() < MIB as u64 {
        thread::yield_now();
    }
    shutdown.shutdown();
    let error = writing.join().unwrap();
    assert!(matches!(error, TransportError::ShutDown { .. }), "{error:?}");
    let error = read_to_end(&mut east).unwrap_err();
    assert!(matches!(error, TransportError::Truncated { .. }), "{error:?}");
}

/// A handle that outlives its connection neither keeps the socket open nor harms whoever got its number.
#[test]
fn a_shutdown_handle_does_not_keep_the_connection() {
    let (west, mut east) = pair();
    let shutdown = west.shutdown_handle();
    drop(west);
    assert!(matches!(read_to_end(&mut east), Err(TransportError::Truncated { .. })));
    shutdown.shutdown();
}

fn read_to_end(connection: &mut Connection) -> Result<usize> {
    let mut buffer = vec![0; MIB];
    let mut total = 0;
    loop {
        match connection.read(&mut buffer)? {
            0 => return Ok(total),
            count => total += count,
        }
    }
}

#[test]
fn a_proper_end_is_told_from_a_cut() {
    let (mut west, mut east) = pair();
    west.write_all(b"last words").unwrap();
    let closing = thread::spawn(move || west.close(PATIENCE));
    assert_eq!(read_to_end(&mut east).unwrap(), 10);
    assert_eq!(east.read(&mut [0; 1]).unwrap(), 0);
    assert!(matches!(east.read_exact(&mut [0; 1]), Err(TransportError::Closed { .. })));
    east.close(PATIENCE).unwrap();
    closing.join().unwrap().unwrap();

    let (mut west, mut east) = pair();
    west.write_all(b"last words").unwrap();
    west.flush().unwrap();
    drop(west);
    let mut buffer = [0; 100];
    assert_eq!(east.read(&mut buffer).unwrap(), 10);
    for _ in 0..2 {
        let error = east.read(&mut buffer).unwrap_err();
        assert!(matches!(error, TransportError::Truncated { .. }) && error.is_disconnect(), "{error:?}");
    }
}

#[test]
fn a_finished_direction_leaves_the_other() {
    let (west, mut east) = pair();
    let (mut west_reader, mut west_writer) = west.split();
    west_writer.finish().unwrap();
    assert!(matches!(west_writer.write_all(b"more"), Err(TransportError::Finished { .. })));
    assert_eq!(east.read(&mut [0; 1]).unwrap(), 0);
    let mut data = vec![0; MIB];
    fill(&mut data, 6, 0);
    let sending = thread::spawn(move || {
        east.write_all(&data).unwrap();
        east.close(PATIENCE).unwrap();
    });
    receive_stream(&mut west_reader, 6, MIB as u64, 1000);
    assert_eq!(west_reader.read(&mut [0; 1]).unwrap(), 0);
    drop((west_reader, west_writer));
    sending.join().unwrap();
}

/// One changed bit on the way: everything before it is right, nothing after it is delivered.
#[test]
fn a_changed_byte_is_found() {
    let authority = Authority::new();
    let (west, east) = (authority.endpoint("west"), authority.endpoint("east"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = spoiling_proxy(listener.local_addr().unwrap(), 500_000);
    let accepting = thread::spawn(move || east.accept(listener.accept().unwrap().0, PATIENCE).unwrap());
    let mut west = west.connect(&proxy.to_string(), "east", PATIENCE).unwrap();
    let mut east = accepting.join().unwrap();
    let mut data = vec![0; MIB];
    fill(&mut data, 7, 0);
    let sending = thread::spawn(move || {
        // It may learn of the end before it has sent everything.
        let _ = west.write_all(&data).and_then(|()| west.flush());
        west.read(&mut [0; 1]).unwrap_err()
    });
    let (mut buffer, mut position) = (vec![0; 300_000], 0);
    let error = loop {
        match east.read(&mut buffer) {
            Ok(count) => {
                check(&buffer[..count], 7, position as u64);
                position += count;
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(error, TransportError::Tls { .. }), "{error:?}");
    assert!(position < 500_000, "{position}");
    drop(east);
    sending.join().unwrap();
}

/// A peer may change its keys whenever it likes; the reader answers, the writer goes on with the new ones.
#[test]
fn key_updates_disturb_nothing() {
    let authority = Authority::new();
    let mut tls = bare_connection(&bare_client(&authority, Some("west"), &TLS13), "east");
    let mut bare = None;
    let east = accept_from(&authority.endpoint("east"), PATIENCE, |mut socket| {
        while tls.tls13_tickets_received() == 0 {
            tls.complete_io(&mut socket).unwrap();
        }
        bare = Some(socket);
    });
    let (mut east, mut bare) = (east.unwrap(), bare.unwrap());
    let mut peer = rustls::Stream::new(&mut tls, &mut bare);
    for round in 0..20 {
        peer.conn.refresh_traffic_keys().unwrap();
        std::io::Write::write_all(&mut peer, &[round; 100]).unwrap();
        let mut buffer = [0; 100];
        east.read_exact(&mut buffer).unwrap();
        assert_eq!(buffer, [round; 100]);
        east.write_all(&buffer).unwrap();
        east.flush().unwrap();
        std::io::Read::read_exact(&mut peer, &mut buffer).unwrap();
        assert_eq!(buffer, [round; 100]);
    }
}

/// A peer that only ever asks for new keys and sends nothing is thrown out, not served for ever.
#[test]
fn a_flood_of_key_updates_ends() {
    let authority = Authority::new();
    let mut tls = bare_connection(&bare_client(&authority, Some("west"), &TLS13), "east");
    let mut bare = None;
    let east = accept_from(&authority.endpoint("east"), PATIENCE, |mut socket| {
        while tls.tls13_tickets_received() == 0 {
            tls.complete_io(&mut socket).unwrap();
        }
        bare = Some(socket);
    });
    let (mut east, mut bare) = (east.unwrap(), bare.unwrap());
    for _ in 0..1000 {
        if tls.refresh_traffic_keys().is_err() || tls.write_tls(&mut bare).is_err() {
            break;
        }
    }
    let error = east.read(&mut [0; 1]).unwrap_err();
    assert!(matches!(error, TransportError::Tls { .. }), "{error:?}");
}

#[test]
fn a_send_buffer_can_be_set() {
    let (mut west, mut east) = pair();
    west.set_send_buffer(64 * 1024).unwrap();
    echo_works(&mut west, &mut east);
}
