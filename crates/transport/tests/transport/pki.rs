//! The authority's directory: what is written, with which rights, and what is refused.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use sterna_transport::pki::{self, PkiError};
use sterna_transport::{Endpoint, Identity, TransportError};

use crate::support::{Authority, DAY};

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn keys_are_for_their_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("new/pki");
    let authority = pki::init(&dir, "ours").unwrap();
    let host = pki::issue(&dir, "east", &[]).unwrap();
    assert_eq!([mode(&dir), mode(&authority.key), mode(&host.key)], [0o700, 0o600, 0o600]);
    assert_eq!([authority.certificate, host.certificate], [dir.join("ca.crt"), dir.join("east.crt")]);
}

#[test]
fn nothing_is_overwritten() {
    let authority = Authority::new();
    authority.identity("east", &[]);
    let read = || {
        ["ca.crt", "ca.key", "east.crt", "east.key"]
            .map(|name| std::fs::read(authority.path().join(name)).unwrap())
    };
    let before = read();
    assert!(matches!(pki::init(authority.path(), "again"), Err(PkiError::Exists { .. })));
    assert!(matches!(pki::issue(authority.path(), "east", &[]), Err(PkiError::Exists { .. })));
    std::fs::remove_file(authority.path().join("east.crt")).unwrap();
    let error = pki::issue(authority.path(), "east", &[]).unwrap_err();
    assert!(error.to_string().contains("east.key"), "{error}");
    std::fs::write(authority.path().join("east.crt"), &before[2]).unwrap();
    assert!(before == read());
}

#[test]
fn a_directory_without_an_authority_says_how_to_make_one() {
    let dir = tempfile::tempdir().unwrap();
    let error = pki::issue(dir.path(), "east", &[]).unwrap_err();
    assert!(error.to_string().contains("sterna pki init"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn names_that_are_no_hosts_are_refused() {
    let authority = Authority::new();
    for name in [
        "../east",
        "/etc/passwd",
        "east/",
        "..",
        "",
        "two words",
        "east\0",
        "*",
        "127.0.0.1",
        &"a".repeat(300),
    ] {
        let result = pki::issue(authority.path(), name, &[]);
        assert!(matches!(result, Err(PkiError::BadName { .. })), "{name:?}: {result:?}");
        let result = pki::issue(authority.path(), "east", &[format!("{name} ")]);
        assert!(matches!(result, Err(PkiError::BadName { .. })), "{name:?}: {result:?}");
    }
    assert!(matches!(pki::issue(authority.path(), "CA", &[]), Err(PkiError::ReservedName { .. })));
    assert_eq!(std::fs::read_dir(authority.path()).unwrap().count(), 2);
}

#[test]
fn a_certificate_can_be_described() {
    let authority = Authority::new();
    let names = ["east.example", "10.0.0.2", "EAST"].map(str::to_owned);
    let issued = pki::issue(authority.path(), "East", &names).unwrap();
    let described = pki::describe(&issued.certificate).unwrap();
    assert_eq!(described.subject, "CN=east");
    assert_eq!(described.issuer, "CN=test authority");
    assert_eq!(described.dns_names, ["east", "east.example"]);
    assert_eq!(described.addresses, [Ipv4Addr::new(10, 0, 0, 2)]);
    assert_eq!((described.host(), described.is_authority), (Some("east"), false));
    let now = SystemTime::now();
    assert!(described.not_before <= now && !described.is_expired(now));
    assert!(described.not_after > now + 729 * DAY && described.not_after < now + 731 * DAY);
    assert!(described.is_expired(now + 731 * DAY));
    let authority = pki::describe(&authority.path().join("ca.crt")).unwrap();
    assert!(authority.is_authority && authority.host().is_none());
    assert!(authority.not_after > described.not_after);
}

#[test]
fn what_is_no_certificate_is_not_described() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("east.crt");
    assert!(matches!(pki::describe(&path), Err(PkiError::Read { .. })));
    for content in ["", "hello", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        std::fs::write(&path, content).unwrap();
        assert!(matches!(pki::describe(&path), Err(PkiError::BadFile { .. })), "{content:?}");
    }
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    let authority = Authority::new();
    let issued = pki::issue(authority.path(), "east", &[]).unwrap();
    let load = || Identity::load(&authority.path().join("ca.crt"), &issued.certificate, &issued.key);
    for exposed in [0o644, 0o640, 0o604, 0o620] {
        std::fs::set_permissions(&issued.key, std::fs::Permissions::from_mode(exposed)).unwrap();
        let error = load().unwrap_err();
        assert!(matches!(error, TransportError::KeyExposed { mode, .. } if mode == exposed), "{error:?}");
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
    std::fs::set_permissions(&issued.key, std::fs::Permissions::from_mode(0o400)).unwrap();
    load().unwrap();
}

#[test]
fn files_that_do_not_fit_are_named() {
    let authority = Authority::new();
    let [east, west] = ["east", "west"].map(|host| pki::issue(authority.path(), host, &[]).unwrap());
    let ca = authority.path().join("ca.crt");
    let identity = Identity::load(&ca, &east.certificate, &west.key).unwrap();
    let error = Endpoint::new(&identity).unwrap_err();
    assert!(
        matches!(&error, TransportError::Mismatch { path, .. } if *path == east.certificate),
        "{error:?}"
    );
    let error = Identity::load(&ca, &east.key, &east.key).unwrap_err();
    assert!(matches!(&error, TransportError::BadFile { path, .. } if *path == east.key), "{error:?}");
    let error = Identity::load(&east.key, &east.certificate, &east.key).unwrap_err();
    assert!(matches!(&error, TransportError::BadFile { path, .. } if *path == east.key), "{error:?}");
    let missing = authority.path().join("missing");
    let error = Identity::load(&ca, &east.certificate, &missing).unwrap_err();
    assert!(matches!(&error, TransportError::ReadFile { path, .. } if *path == missing), "{error:?}");
    std::fs::write(&west.key, "nothing").unwrap();
    let error = Identity::load(&ca, &east.certificate, &west.key).unwrap_err();
    assert!(matches!(&error, TransportError::BadFile { path, .. } if *path == west.key), "{error:?}");
}
