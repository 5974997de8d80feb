//! A template to another host: once, before the first of its clones goes there. What was sent of it before a connection was lost is not
//! sent again.

use super::format::{Manifest, Pages};
use super::{Entry, PAGES, unusable_name};
use crate::control::{self, CONNECT_WITHIN, explain};
use crate::host::Host;
use crate::registry::{is_usable, lock};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::{Duration, Instant};
use sterna_engine::wire::Message;
use sterna_engine::wire::control::STATE_PIECE_BYTES_MAX;
use sterna_engine::wire::message::{Template as Offered, TemplateState};
use sterna_transport::{Connection, Pacer};

/// How long the other host may take for a piece, or to say that it has one.
const PIECE_WITHIN: Duration = Duration::from_secs(30);
/// How long it may take to check all of it: it reads it once.
const CHECK_WITHIN: Duration = Duration::from_secs(300);

/// Sees to it that another host has a template; how many bytes of it went over the link for that. `told` hears how many were sent, and may end it.
///
/// # Errors
/// Why it is not there; what was sent stays there for the next time.
pub(crate) fn ensure(
    host: &Host,
    entry: &Entry,
    (peer, address): (&str, &str),
    limit: Option<u64>,
    mut told: impl FnMut(u64) -> Result<(), String>,
) -> Result<u64, String> {
    // One at a time: who comes second finds it there.
    let _alone = lock(&host.templates().sending);
    let failed = |why: String| format!("template {} does not get to host {peer}: {why}", entry.name);
    let connection = host.endpoint().connect(address, peer, CONNECT_WITHIN);
    let mut connection = connection.map_err(|why| failed(explain(&why)))?;
    let (manifest, _) = entry.manifest.encode();
    let offered = Message::Template(Offered { name: entry.name.clone(), manifest });
    control::send(&mut connection, &offered).map_err(failed)?;
    let there = state(&mut connection, PIECE_WITHIN).map_err(failed)?;
    if there.complete {
        return Ok(0);
    }
    let total = entry.manifest.bytes;
    let mut at = there.bytes.min(total);
    let file = File::open(host.templates().dir.join(&entry.digest).join(PAGES));
    let file = file.map_err(|why| failed(explain(&why)))?;
    let pacer = Pacer::new(limit);
    let mut piece = vec![0; STATE_PIECE_BYTES_MAX];
    let mut sent = 0;
    while at < total {
        told(sent)?;
        let most = STATE_PIECE_BYTES_MAX.min(pacer.batch_limit().max(1));
        let piece = &mut piece[..most.min((total - at) as usize)];
        file.read_exact_at(piece, at).map_err(|why| failed(explain(&why)))?;
        pacer.acquire(piece.len());
        control::send_piece(&mut connection, piece, PIECE_WITHIN).map_err(failed)?;
        at += piece.len() as u64;
        sent += piece.len() as u64;
    }
    told(sent)?;
    let there = state(&mut connection, CHECK_WITHIN).map_err(failed)?;
    if !there.complete {
        return Err(failed("it was sent, and is not complete there".into()));
    }
    tracing::info!(template = entry.name, peer, bytes = sent, "a template was sent");
    Ok(sent)
}

fn state(connection: &mut Connection, within: Duration) -> Result<TemplateState, String> {
    match control::receive(connection, within)? {
        Message::TemplateState(state) if state.refusal.is_empty() => Ok(state),
        Message::TemplateState(state) => Err(state.refusal),
        Message::Abort(text) => Err(text.text),
        _ => Err("it answered something else".into()),
    }
}

/// Takes a template from a peer.
pub(crate) fn receive(host: &Arc<Host>, peer: &str, offered: &Offered, mut connection: Connection) {
    let began = Instant::now();
    let answer = match take(host, peer, offered, &mut connection) {
        Ok(bytes) => {
            if bytes > 0 {
                tracing::info!(template = offered.name, peer, bytes, took = ?began.elapsed(), "a template has come");
            }
            TemplateState { bytes: 0, complete: true, refusal: String::new() }
        }
        Err(why) => {
            tracing::warn!(template = offered.name, peer, why, "a template did not come");
            TemplateState { bytes: 0, complete: false, refusal: format!("host {}: {why}", host.name()) }
        }
    };
    drop(control::send(&mut connection, &Message::TemplateState(answer)));
}

/// How many bytes of it have come.
fn take(host: &Arc<Host>, peer: &str, offered: &Offered, connection: &mut Connection) -> Result<u64, String> {
    let templates = host.templates();
    if !is_usable(&offered.name) {
        return Err(unusable_name(&offered.name));
    }
    let manifest =
        Manifest::decode(&offered.manifest).map_err(|why| format!("its manifest is wrong: {why}"))?;
    let digest = blake3::hash(&offered.manifest).to_hex().to_string();
    if templates.entry(&digest).is_some() {
        return Ok(0);
    }
    if let Some(other) = templates.find(&offered.name) {
        return Err(format!(
            "it has another template of the name {}, with digest {}: remove that first, or make this one under another name",
            offered.name, other.digest
        ));
    }
    let Ok(_alone) = templates.busy.try_lock() else {
        return Err("another template is made, sent or received there just now: try again".into());
    };
    let folder = templates.unfinished(&digest).map_err(|why| explain(&why))?;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).clone();
    let file = file.open(folder.join(PAGES)).map_err(|why| explain(&why))?;
    let mut have = file.metadata().map_err(|why| explain(&why))?.len();
    if have > manifest.bytes {
        file.set_len(0).map_err(|why| explain(&why))?;
        have = 0;
    }
    has_room(&folder, manifest.bytes - have)?;
    control::send(
        connection,
        &Message::TemplateState(TemplateState { bytes: have, complete: false, refusal: String::new() }),
    )?;
    let from = have;
    while have < manifest.bytes {
        let piece = control::receive_piece(connection, PIECE_WITHIN)?;
        if piece.is_empty() || have + piece.len() as u64 > manifest.bytes {
            return Err(format!("{peer} sent more of it than there is"));
        }
        file.write_all_at(&piece, have).map_err(|why| format!("it cannot be stored: {why}"))?;
        have += piece.len() as u64;
    }
    file.sync_all().map_err(|why| explain(&why))?;
    let checked =
        Pages::open(file, &manifest).and_then(|pages| pages.load(&manifest).map(|memory| (pages, memory)));
    let (pages, memory) = checked.map_err(|why| {
        // What is wrong must not be added to.
        drop(fs::remove_dir_all(&folder));
        format!("what came of it is not what it says: {}", explain(&why))
    })?;
    let stored = templates.adopt(&folder, &offered.name, &offered.manifest, &digest, Some(peer));
    stored.map_err(|why| format!("it cannot be stored: {}", explain(&why)))?;
    let name = offered.name.clone();
    let template = super::Template {
        name,
        digest: digest.clone(),
        manifest,
        memory: Arc::new(memory),
        origin: Some(peer.to_owned()),
        pages,
    };
    lock(&templates.loaded).insert(digest, Arc::new(template));
    Ok(have - from)
}

/// A disk that is full keeps more than templates from working.
fn has_room(folder: &std::path::Path, bytes: u64) -> Result<(), String> {
    let found =
        rustix::fs::statvfs(folder).map_err(|why| format!("its folder cannot be looked at: {why}"))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free > bytes {
        Ok(())
    } else {
        Err(format!("there is no room for it: it needs {bytes} bytes, {free} are free"))
    }
}
