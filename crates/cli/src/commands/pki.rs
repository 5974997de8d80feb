//! `sterna pki`: keys and certificates for a group of hosts.

use crate::args::Pki;
use crate::exit::{Exit, Failure};
use crate::show;
use std::error::Error;
use std::path::Path;
use std::time::SystemTime;
use sterna_transport::pki::{self, Description, PkiError};

/// `sterna pki`
pub(crate) fn run(args: &Pki) -> Result<Exit, Failure> {
    match args {
        Pki::Init { dir, name } => init(dir, name),
        Pki::Issue { dir, host, names } => issue(dir, host, names),
        Pki::Show { file } => show::pairs(&described(&pki::describe(file).map_err(failure)?)),
    }?;
    Ok(Exit::Done)
}

fn init(dir: &Path, name: &str) -> Result<(), Failure> {
    let made = pki::init(dir, name).map_err(failure)?;
    show::pairs(&[
        ("Certificate", format!("{}  for every host", made.certificate.display())),
        ("Key", format!("{}  stays here: whoever has it can be any host", made.key.display())),
        ("Next", format!("sterna pki issue {} HOST", dir.display())),
    ])
}

fn issue(dir: &Path, host: &str, names: &[String]) -> Result<(), Failure> {
    let made = pki::issue(dir, host, names).map_err(failure)?;
    show::pairs(&[
        ("Certificate", format!("{}  for {host}", made.certificate.display())),
        ("Key", format!("{}  for {host} alone", made.key.display())),
        (
            "Next",
            "put both and the authority's certificate on the host, and name them in its [tls]".to_owned(),
        ),
    ])
}

fn described(certificate: &Description) -> Vec<(&'static str, String)> {
    let expired = if certificate.is_expired(SystemTime::now()) { " (it is over)" } else { "" };
    let addresses: Vec<String> = certificate.addresses.iter().map(ToString::to_string).collect();
    vec![
        ("Subject", certificate.subject.clone()),
        ("Issuer", certificate.issuer.clone()),
        ("Host", certificate.host().unwrap_or("-").to_owned()),
        ("DNS names", or_dash(certificate.dns_names.join(", "))),
        ("Addresses", or_dash(addresses.join(", "))),
        ("Authority", if certificate.is_authority { "yes" } else { "no" }.to_owned()),
        ("Valid from", time(certificate.not_before)),
        ("Valid until", time(certificate.not_after) + expired),
    ]
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

fn time(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time)
        .map_or_else(|_| "beyond all calendars".to_owned(), |time| time.to_string())
}

/// What can be mended by other arguments is usage; a disk that refuses is a failure.
fn failure(error: PkiError) -> Failure {
    let exit =
        if matches!(error, PkiError::Write { .. } | PkiError::Make(_)) { Exit::Failed } else { Exit::Usage };
    let text = match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    Failure::new(exit, text)
}
