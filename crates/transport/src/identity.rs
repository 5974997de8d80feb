//! What a host is to others: its certificate, its key, and the authority it trusts.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::pki::{self, Description};
use crate::{Result, TransportError};

/// Longest file read: a chain of certificates is a few kilobytes, and a wrong path may name anything.
const FILE_SIZE_MAX: u64 = 1 << 20;

/// Permission bits that let others than the owner at a file.
const OTHERS: u32 = 0o077;

/// A host's certificate and key with the authority that both sides of a connection must come from.
#[derive(Debug)]
pub struct Identity {
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) certificate_path: std::path::PathBuf,
    description: Description,
}

impl Identity {
    /// Loads the three PEM files. The key must be readable by its owner alone.
    ///
    /// An expired certificate loads, so that a running agent can say what is wrong: see [`Identity::certificate`].
    pub fn load(ca: &Path, certificate: &Path, key: &Path) -> Result<Self> {
        let chain = certificates(certificate)?;
        let first = chain.first().ok_or_else(|| bad_file(certificate, "certificate"))?;
        let description = pki::describe_der(first).ok_or_else(|| bad_file(certificate, "certificate"))?;
        if description.host().is_none() {
            return Err(bad_file(certificate, "certificate of a host (it has no DNS name)"));
        }
        let roots = Arc::new(roots(ca)?);
        let key = private_key(key)?;
        Ok(Self { roots, chain, key, certificate_path: certificate.to_owned(), description })
    }

    /// What our certificate says: its names and when it ends.
    pub fn certificate(&self) -> &Description {
        &self.description
    }
}

fn roots(path: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|_| bad_file(path, "certificate of an authority"))?;
    }
    if roots.is_empty() {
        return Err(bad_file(path, "certificate of an authority"));
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = read(path, &open(path)?)?;
    CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|_| bad_file(path, "certificate"))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let file = open(path)?;
    let metadata = file.metadata().map_err(|source| read_error(path, source))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & OTHERS != 0 {
        return Err(TransportError::KeyExposed { path: path.to_owned(), mode });
    }
    PrivateKeyDer::from_pem_slice(&read(path, &file)?).map_err(|_| bad_file(path, "private key"))
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|source| read_error(path, source))
}

fn read(path: &Path, file: &File) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(FILE_SIZE_MAX).read_to_end(&mut content).map_err(|source| read_error(path, source))?;
    Ok(content)
}

fn read_error(path: &Path, source: std::io::Error) -> TransportError {
    TransportError::ReadFile { path: path.to_owned(), source }
}

fn bad_file(path: &Path, expected: &'static str) -> TransportError {
    TransportError::BadFile { path: path.to_owned(), expected }
}
