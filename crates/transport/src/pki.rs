//! The authority of a group of hosts, and the certificates it issues: what `sterna pki` does.
//!
//! One directory holds the authority (`ca.crt`, `ca.key`) and what it issued (`HOST.crt`, `HOST.key`). Whoever
//! can read `ca.key` can be any host, so the directory stays with the operator; a host gets its own two files
//! and `ca.crt`. Existing files are never overwritten: a lost authority would cut all hosts off.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, DnsName};
use thiserror::Error;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long an authority is valid: longer than hosts live, since replacing it touches all of them.
pub const AUTHORITY_VALIDITY: Duration = Duration::from_secs(10 * 365 * DAY.as_secs());

/// How long a host's certificate is valid: two years, so that renewing is rare but not forgotten.
pub const HOST_VALIDITY: Duration = Duration::from_secs(2 * 365 * DAY.as_secs());

/// How far certificates start in the past: the hosts' clocks may differ by this much.
pub const CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

/// File of the authority's certificate.
pub const AUTHORITY_CERTIFICATE: &str = "ca.crt";

/// File of the authority's key.
pub const AUTHORITY_KEY: &str = "ca.key";

/// A failure of the authority's directory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A file that would be written is there already.
    #[error("{} exists already: move it away first if it is to be replaced", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file or directory cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The directory holds no authority.
    #[error("{} holds no authority: make one with `sterna pki init`", dir.display())]
    NoAuthority {
        /// The directory.
        dir: PathBuf,
    },
    /// A file does not contain what it should.
    #[error("{} does not contain a usable {expected}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
    },
    /// The name cannot be a host's.
    #[error("{name:?} is not a DNS name: use letters, digits, dots and hyphens")]
    BadName {
        /// The name as it was given.
        name: String,
    },
    /// `ca` would be the authority's own files.
    #[error("a host cannot be called {name:?}: that is the authority's file name")]
    ReservedName {
        /// The name as it was given.
        name: String,
    },
    /// A certificate could not be made.
    #[error("cannot make the certificate")]
    Make(#[source] rcgen::Error),
}

/// Two files that were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key, readable by its owner alone.
    pub key: PathBuf,
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The subject, as `CN=name`.
    pub subject: String,
    /// Who signed it.
    pub issuer: String,
    /// Its DNS names in order, lower case; the first one is the host's.
    pub dns_names: Vec<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether it may sign others.
    pub is_authority: bool,
    /// When it starts.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
}

impl Description {
    /// The host's name, unless it is an authority or names none.
    pub fn host(&self) -> Option<&str> {
        self.dns_names.first().map(String::as_str)
    }

    /// True when it is over at `now`.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        now > self.not_after
    }
}

/// Makes an authority called `name` in `dir`, which is created when it is missing.
pub fn init(dir: &Path, name: &str) -> Result<Issued, PkiError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| PkiError::Write { path: dir.to_owned(), source })?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, AUTHORITY_VALIDITY);
    let key = generate_key()?;
    let certificate = params.self_signed(&key).map_err(PkiError::Make)?;
    let issued = Issued { certificate: dir.join(AUTHORITY_CERTIFICATE), key: dir.join(AUTHORITY_KEY) };
    write_pair(issued, &certificate.pem(), &key.serialize_pem())
}

/// Issues a certificate for `host`, valid for `alt_names` (DNS names or addresses) as well, for both directions.
pub fn issue(dir: &Path, host: &str, alt_names: &[String]) -> Result<Issued, PkiError> {
    let host = dns_name(host)?;
    if host == "ca" {
        return Err(PkiError::ReservedName { name: host });
    }
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, host.as_str());
    params.subject_alt_names = alternative_names(&host, alt_names)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, HOST_VALIDITY);
    let key = generate_key()?;
    let certificate = params.signed_by(&key, &authority(dir)?).map_err(PkiError::Make)?;
    let issued =
        Issued { certificate: dir.join(format!("{host}.crt")), key: dir.join(format!("{host}.key")) };
    write_pair(issued, &certificate.pem(), &key.serialize_pem())
}

/// Reads what the first certificate of a PEM file says.
pub fn describe(path: &Path) -> Result<Description, PkiError> {
    let pem = read(path)?;
    CertificateDer::from_pem_slice(pem.as_bytes())
        .ok()
        .and_then(|der| describe_der(&der))
        .ok_or_else(|| PkiError::BadFile { path: path.to_owned(), expected: "certificate" })
}

pub(crate) fn describe_der(der: &[u8]) -> Option<Description> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let mut dns_names = Vec::new();
    let mut addresses = Vec::new();
    if let Ok(Some(extension)) = certificate.subject_alternative_name() {
        for name in &extension.value.general_names {
            match name {
                GeneralName::DNSName(name) => dns_names.extend(dns_name(name)),
                GeneralName::IPAddress(octets) => addresses.extend(address(octets)),
                _ => {}
            }
        }
    }
    Some(Description {
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        dns_names,
        addresses,
        is_authority: certificate.is_ca(),
        not_before: time(certificate.validity().not_before),
        not_after: time(certificate.validity().not_after),
    })
}

/// The DNS names of a certificate that was verified already.
pub(crate) fn dns_names(der: &[u8]) -> Option<Vec<String>> {
    describe_der(der).map(|description| description.dns_names)
}

fn time(time: ASN1Time) -> SystemTime {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH)
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => <[u8; 4]>::try_from(octets).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(octets).ok().map(IpAddr::from),
        _ => None,
    }
}

/// A checked name, lower case. It becomes a file's name: a DNS name can hold no slash and is not `..`.
fn dns_name(name: &str) -> Result<String, PkiError> {
    match DnsName::try_from(name) {
        Ok(valid) => Ok(valid.as_ref().to_ascii_lowercase()),
        Err(_) => Err(PkiError::BadName { name: name.to_owned() }),
    }
}

fn alternative_names(host: &str, others: &[String]) -> Result<Vec<SanType>, PkiError> {
    let mut names = vec![dns_alternative(host)?];
    for other in others {
        let name = match other.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => dns_alternative(&dns_name(other)?)?,
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

fn dns_alternative(name: &str) -> Result<SanType, PkiError> {
    Ok(SanType::DnsName(name.try_into().map_err(PkiError::Make)?))
}

fn set_validity(params: &mut CertificateParams, validity: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + validity).into();
}

/// P-256: small, fast to check, and known to every TLS library that an operator may test with.
fn generate_key() -> Result<KeyPair, PkiError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(PkiError::Make)
}

fn authority(dir: &Path) -> Result<Issuer<'static, KeyPair>, PkiError> {
    let (certificate_path, key_path) = (dir.join(AUTHORITY_CERTIFICATE), dir.join(AUTHORITY_KEY));
    if !certificate_path.exists() || !key_path.exists() {
        return Err(PkiError::NoAuthority { dir: dir.to_owned() });
    }
    let key = KeyPair::from_pem(&read(&key_path)?)
        .map_err(|_| PkiError::BadFile { path: key_path, expected: "private key" })?;
    Issuer::from_ca_cert_pem(&read(&certificate_path)?, key)
        .map_err(|_| PkiError::BadFile { path: certificate_path, expected: "certificate of an authority" })
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::Read { path: path.to_owned(), source })
}

/// Writes both files or neither.
fn write_pair(issued: Issued, certificate: &str, key: &str) -> Result<Issued, PkiError> {
    if issued.certificate.exists() {
        return Err(PkiError::Exists { path: issued.certificate });
    }
    write_new(&issued.key, key, 0o600)?;
    if let Err(error) = write_new(&issued.certificate, certificate, 0o644) {
        let _ = fs::remove_file(&issued.key);
        return Err(error);
    }
    Ok(issued)
}

fn write_new(path: &Path, content: &str, mode: u32) -> Result<(), PkiError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists { path: path.to_owned() },
        _ => PkiError::Write { path: path.to_owned(), source },
    };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    file.write_all(content.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}
