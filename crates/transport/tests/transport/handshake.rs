//! Who gets in, who does not, and whether both sides learn why.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use rustls::version::{TLS12, TLS13};
use rustls::{AlertDescription, HandshakeKind};
use sterna_transport::{Endpoint, Operation, Refusal, TransportError};

use crate::support::{
    Authority, PATIENCE, SHORT, Validity, accept_from, bare_client, bare_connection, dns, meet,
};

#[test]
fn both_ends_learn_the_other_name() {
    let authority = Authority::new();
    let west = Endpoint::new(&authority.identity("West", &["west.example", "127.0.0.1"])).unwrap();
    let (client, server) = meet(&west, "east", &authority.endpoint("east"));
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(client.peer(), &"east");
    assert_eq!(server.peer(), &"WEST");
    let names = server.peer_names().iter().map(|name| name.as_str()).collect::<Vec<_>>();
    assert_eq!(names, ["west", "west.example"]);
    assert_eq!(server.peer_addr(), client.local_addr());
}

#[test]
fn a_host_is_also_found_by_its_address_when_the_certificate_has_it() {
    let authority = Authority::new();
    let east = Endpoint::new(&authority.identity("east", &["127.0.0.1"])).unwrap();
    let (client, server) = meet(&authority.endpoint("west"), "127.0.0.1", &east);
    assert_eq!(client.unwrap().peer(), &"east");
    server.unwrap();
}

#[test]
fn a_server_of_another_authority_is_refused() {
    // An authority of the same name but with another key is noticed elsewhere than one of another name.
    for theirs in [Authority::new(), Authority::named("other")] {
        let (client, server) = meet(&Authority::new().endpoint("west"), "east", &theirs.endpoint("east"));
        let error = client.unwrap_err();
        assert!(matches!(error, TransportError::UnknownCa { .. }), "{error:?}");
        assert!(error.to_string().contains("sterna pki issue"), "{error}");
        let error = server.unwrap_err();
        let reason = Refusal::UnknownCa;
        assert!(
            matches!(error, TransportError::RefusedByPeer { reason: said, .. } if said == reason),
            "{error:?}"
        );
    }
}

#[test]
fn a_client_of_another_authority_is_refused_and_told_so_by_connect() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    // It trusts us, but its own certificate is from elsewhere.
    std::fs::rename(ours.path().join("ca.crt"), theirs.path().join("ours.crt")).unwrap();
    std::fs::copy(theirs.path().join("ours.crt"), ours.path().join("ca.crt")).unwrap();
    theirs.identity("west", &[]);
    let in_theirs = |name: &str| theirs.path().join(name);
    let identity = sterna_transport::Identity::load(
        &in_theirs("ours.crt"),
        &in_theirs("west.crt"),
        &in_theirs("west.key"),
    );
    let (client, server) = meet(&Endpoint::new(&identity.unwrap()).unwrap(), "east", &ours.endpoint("east"));
    let error = server.unwrap_err();
    assert!(matches!(error, TransportError::UnknownCa { .. }), "{error:?}");
    let error = client.unwrap_err();
    assert!(matches!(error, TransportError::RefusedByPeer { reason: Refusal::UnknownCa, .. }), "{error:?}");
}

#[test]
fn a_certificate_of_another_host_is_refused() {
    let authority = Authority::new();
    let (client, server) = meet(&authority.endpoint("west"), "north", &authority.endpoint("east"));
    let error = client.unwrap_err();
    assert!(matches!(&error, TransportError::WrongHost { expected, .. } if expected == "north"), "{error:?}");
    assert!(error.to_string().contains("east"), "{error}");
    let error = server.unwrap_err();
    assert!(
        matches!(error, TransportError::RefusedByPeer { reason: Refusal::BadCertificate, .. }),
        "{error:?}"
    );
}

#[test]
fn an_expired_server_is_refused() {
    let authority = Authority::new();
    let expired = authority.odd_identity("east", vec![dns("east")], Validity::past()).unwrap();
    assert!(expired.certificate().is_expired(std::time::SystemTime::now()));
    let (client, server) = meet(&authority.endpoint("west"), "east", &Endpoint::new(&expired).unwrap());
    let error = client.unwrap_err();
    assert!(matches!(error, TransportError::Expired { .. }), "{error:?}");
    let error = server.unwrap_err();
    assert!(matches!(error, TransportError::RefusedByPeer { reason: Refusal::Expired, .. }), "{error:?}");
}

#[test]
fn an_expired_client_is_refused_and_told_so_by_connect() {
    let authority = Authority::new();
    let expired = authority.odd_identity("west", vec![dns("west")], Validity::past()).unwrap();
    let (client, server) = meet(&Endpoint::new(&expired).unwrap(), "east", &authority.endpoint("east"));
    let error = server.unwrap_err();
    assert!(matches!(error, TransportError::Expired { .. }), "{error:?}");
    let error = client.unwrap_err();
    assert!(matches!(error, TransportError::RefusedByPeer { reason: Refusal::Expired, .. }), "{error:?}");
}

#[test]
fn a_certificate_from_the_future_is_refused() {
    let authority = Authority::new();
    let early = authority.odd_identity("east", vec![dns("east")], Validity::future()).unwrap();
    let (client, server) = meet(&authority.endpoint("west"), "east", &Endpoint::new(&early).unwrap());
    let error = client.unwrap_err();
    assert!(matches!(error, TransportError::NotYetValid { .. }), "{error:?}");
    server.unwrap_err();
}

#[test]
fn a_certificate_without_a_host_name_is_no_identity() {
    let authority = Authority::new();
    let validity = Validity(Validity::past().0, Validity::future().1);
    let address = rcgen::SanType::IpAddress(Ipv4Addr::LOCALHOST.into());
    let error = authority.odd_identity("west", vec![address], validity).unwrap_err();
    assert!(error.to_string().contains("no DNS name"), "{error}");
    // A peer that shows it all the same, signed by our authority, is nobody.
    let mut tls = bare_connection(&bare_client(&authority, Some("odd"), &TLS13), "east");
    let result = accept_from(&authority.endpoint("east"), PATIENCE, |mut socket| {
        while tls.complete_io(&mut socket).is_ok_and(|(read, _)| read > 0) {}
    });
    let error = result.unwrap_err();
    assert!(matches!(error, TransportError::NoPeerName { .. }), "{error:?}");
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let authority = Authority::new();
    let config = bare_client(&authority, None, &TLS13);
    let mut tls = bare_connection(&config, "east");
    let result =
        accept_from(
            &authority.endpoint("east"),
            PATIENCE,
            |mut socket| {
                while tls.complete_io(&mut socket).is_ok() {}
            },
        );
    let error = result.unwrap_err();
    assert!(matches!(error, TransportError::NoCertificate { .. }), "{error:?}");
    let told = tls.process_new_packets().unwrap_err();
    assert_eq!(told, rustls::Error::AlertReceived(AlertDescription::CertificateRequired));
}

#[test]
fn tls_1_2_is_refused() {
    let authority = Authority::new();
    let config = bare_client(&authority, Some("west"), &TLS12);
    let mut tls = bare_connection(&config, "east");
    let result =
        accept_from(
            &authority.endpoint("east"),
            PATIENCE,
            |mut socket| {
                while tls.complete_io(&mut socket).is_ok() {}
            },
        );
    let error = result.unwrap_err();
    assert!(matches!(error, TransportError::Version { .. }), "{error:?}");
    let told = tls.process_new_packets().unwrap_err();
    assert_eq!(told, rustls::Error::AlertReceived(AlertDescription::ProtocolVersion));
}

/// The ticket that tells a client that it is welcome must not let it in again without its certificate being checked.
#[test]
fn nothing_is_resumed() {
    let authority = Authority::new();
    let config = bare_client(&authority, Some("west"), &TLS13);
    let east = authority.endpoint("east");
    for _ in 0..2 {
        let mut tls = bare_connection(&config, "east");
        let result = accept_from(&east, PATIENCE, |mut socket| {
            while tls.tls13_tickets_received() == 0 {
                tls.complete_io(&mut socket).unwrap();
            }
        });
        result.unwrap();
        assert_eq!(tls.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[test]
fn garbage_is_not_tls() {
    let east = Authority::new().endpoint("east");
    for garbage in [&b"GET / HTTP/1.1\r\nHost: east\r\n\r\n"[..], &[0; 4096], &[0xff; 70_000]] {
        let result = accept_from(&east, PATIENCE, |mut socket| {
            // The server may have closed before everything is written.
            let _ = socket.write_all(garbage);
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let _ = socket.read_to_end(&mut Vec::new());
        });
        let error = result.unwrap_err();
        assert!(matches!(error, TransportError::NotTls { .. }), "{error:?}");
        assert!(error.source().is_some());
    }
}

/// A real first flight, cut at each of its bytes: the server never hangs, panics or accepts.
#[test]
fn a_handshake_cut_anywhere_fails() {
    let authority = Authority::new();
    let east = authority.endpoint("east");
    let config = bare_client(&authority, None, &TLS13);
    let mut hello = Vec::new();
    bare_connection(&config, "east").write_tls(&mut hello).unwrap();
    for cut in 0..hello.len() {
        let error = accept_from(&east, PATIENCE, |mut socket| {
            socket.write_all(&hello[..cut]).unwrap();
        })
        .unwrap_err();
        assert!(matches!(error, TransportError::Truncated { .. }), "cut at {cut}: {error:?}");
    }
}

/// Each byte of a real first flight changed: whatever it becomes, it is refused in order.
#[test]
fn a_changed_hello_never_gets_in() {
    let authority = Authority::new();
    let east = authority.endpoint("east");
    let config = bare_client(&authority, None, &TLS13);
    let mut hello = Vec::new();
    bare_connection(&config, "east").write_tls(&mut hello).unwrap();
    for position in 0..hello.len() {
        let mut changed = hello.clone();
        changed[position] ^= 0x81;
        let result = accept_from(&east, PATIENCE, |mut socket| {
            let _ = socket.write_all(&changed);
            let _ = socket.shutdown(std::net::Shutdown::Write);
        });
        assert!(result.is_err(), "changed at {position}");
    }
}

#[test]
fn a_silent_client_meets_the_deadline() {
    let mut silent = None;
    let result = accept_from(&Authority::new().endpoint("east"), SHORT, |socket| silent = Some(socket));
    let error = result.unwrap_err();
    assert!(matches!(error, TransportError::TimedOut { operation: Operation::Handshake, .. }), "{error:?}");
    drop(silent);
}

/// Each byte would restart a deadline that counts per read.
#[test]
fn a_dripping_client_meets_the_same_deadline() {
    let result = accept_from(&Authority::new().endpoint("east"), SHORT, |mut socket| {
        // A record header that promises 16 KiB, and then as little as possible.
        let _ = socket.write_all(&[22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc]);
        while socket.write_all(&[0]).is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
    });
    let error = result.unwrap_err();
    assert!(matches!(error, TransportError::TimedOut { operation: Operation::Handshake, .. }), "{error:?}");
}

#[test]
fn a_silent_server_meets_the_deadline() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = silent.local_addr().unwrap().to_string();
    let error = Authority::new().endpoint("west").connect(&addr, "east", SHORT).unwrap_err();
    assert!(matches!(error, TransportError::TimedOut { operation: Operation::Handshake, .. }), "{error:?}");
    assert!(error.to_string().contains("east"), "{error}");
}

#[test]
fn a_closed_port_says_so() {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let error = Authority::new().endpoint("west").connect(&addr, "east", PATIENCE).unwrap_err();
    assert!(matches!(error, TransportError::Connect { .. }), "{error:?}");
    assert!(error.to_string().contains("agent runs"), "{error}");
}

#[test]
fn names_that_cannot_be_are_said_to_be_so() {
    let west = Authority::new().endpoint("west");
    let error = west.connect("127.0.0.1:1", "no host", PATIENCE).unwrap_err();
    assert!(matches!(error, TransportError::BadName { .. }), "{error:?}");
    let error = west.connect("no port", "east", PATIENCE).unwrap_err();
    assert!(matches!(error, TransportError::Resolve { .. }), "{error:?}");
}

#[test]
fn localhost_is_resolved_and_every_address_tried() {
    let authority = Authority::new();
    let east = authority.endpoint("east");
    // Listens on IPv4 only, while the name may give ::1 first.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = format!("localhost:{}", listener.local_addr().unwrap().port());
    let accepting = thread::spawn(move || {
        let socket: TcpStream = listener.accept().unwrap().0;
        east.accept(socket, PATIENCE)
    });
    authority.endpoint("west").connect(&addr, "east", PATIENCE).unwrap();
    accepting.join().unwrap().unwrap();
}
