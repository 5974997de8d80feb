//! A template to another host, once: before the first of its clones goes there, beside it, or after it. What was sent of it before a connection
//! was lost is not sent again.

use super::base::Coming;
use super::format::{Manifest, Pages};
use super::{Base, Entry, PAGES, unusable_name};
use crate::control::{self, CONNECT_WITHIN, explain};
use crate::host::Host;
use crate::pages::set_queue;
use crate::registry::{is_usable, lock};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError, mpsc};
use std::time::{Duration, Instant};
use sterna_engine::policy::PushQueue;
use sterna_engine::units::Bytes;
use sterna_engine::wire::Message;
use sterna_engine::wire::control::STATE_PIECE_BYTES_MAX;
use sterna_engine::wire::message::{Template as Offered, TemplateState};
use sterna_transport::{Connection, Pacer, TransportError};

/// How long the other host may take for a piece, or to say that it has one.
const PIECE_WITHIN: Duration = Duration::from_secs(30);
/// How long it may take to check all of it: it reads it once.
const CHECK_WITHIN: Duration = Duration::from_secs(300);
/// Why one is not sent to the end that all who wanted it have given up.
const NOBODY: &str = "nobody waits for it any more";
/// How long it is waited for another one that is on its way here, and the pause between two looks.
const BUSY_WITHIN: Duration = Duration::from_secs(3);
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// Bytes that are sent at once where little is to queue.
const SHORT_PIECE_BYTES: usize = 64 << 10;
/// How long one request sends a template: who asks shows how far it is, and asks again.
const PUSH_AT_MOST: Duration = Duration::from_secs(3);
/// How soon that must be: who does not ask again wants no more of it.
const LINGERS: Duration = Duration::from_secs(5);

/// How a template shares the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manners {
    /// As any connection does.
    Plain,
    /// Pages that a guest waits for go over the same link: little of it queues.
    Behind,
}

/// What of it may lie in the socket.
struct Queue {
    short: Option<PushQueue>,
    began: Instant,
}

impl Queue {
    fn of(manners: Manners, connection: &Connection) -> Result<Self, TransportError> {
        let began = Instant::now();
        if manners == Manners::Plain {
            return Ok(Self { short: None, began });
        }
        set_queue(connection, PushQueue::first())?;
        Ok(Self { short: Some(PushQueue::new(Duration::ZERO)), began })
    }

    fn piece_bytes(&self) -> usize {
        if self.short.is_some() { SHORT_PIECE_BYTES } else { STATE_PIECE_BYTES_MAX }
    }

    fn wrote(&mut self, bytes: usize, connection: &Connection) -> Result<(), TransportError> {
        let Some(queue) = &mut self.short else { return Ok(()) };
        let told = queue.wrote(Bytes(bytes as u64), self.began.elapsed(), || connection.round_trip());
        told.map_or(Ok(()), |bytes| set_queue(connection, bytes))
    }
}

/// What becomes of a template that is on its way to another host.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    /// That host has all of it, or lets clones map it while it comes.
    Agreed {
        complete: bool,
    },
    /// So many bytes went over the link; told to one of those who wait for it.
    Sent {
        bytes: u64,
        /// How many there are to send.
        of: u64,
    },
    Over(Result<(), String>),
}

type Tell = Box<dyn Fn(Told) + Send>;

/// One on its way to another host, for as long as somebody follows it.
#[derive(Default)]
pub(super) struct Sending {
    followers: Mutex<Followers>,
    changed: Condvar,
}

#[derive(Default)]
struct Followers {
    /// What the other host has answered.
    agreed: Option<bool>,
    /// Somebody wants it sent.
    wanted: bool,
    /// In the order in which they came; who only lingers hears nothing.
    tells: BTreeMap<u64, Option<Tell>>,
    next: u64,
    /// How many bytes have gone, and of how many it was told.
    sent: u64,
    told: Option<u64>,
}

impl Followers {
    fn add(&mut self, tell: Tell) -> u64 {
        if let Some(complete) = self.agreed {
            tell(Told::Agreed { complete });
        }
        let id = self.next;
        self.next += 1;
        self.tells.insert(id, Some(tell));
        id
    }
}

impl std::fmt::Debug for Sending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sending")
    }
}

impl Sending {
    fn agreed(&self, complete: bool) {
        let mut followers = lock(&self.followers);
        followers.agreed = Some(complete);
        followers.tells.values().flatten().for_each(|tell| tell(Told::Agreed { complete }));
    }

    /// Waits until somebody wants it sent; false when nobody follows it any more.
    fn is_wanted(&self) -> bool {
        let mut followers = lock(&self.followers);
        while !followers.wanted && !followers.tells.is_empty() {
            followers = self.changed.wait(followers).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        followers.wanted && !followers.tells.is_empty()
    }

    /// False once nobody follows it any more.
    fn sent(&self, bytes: u64, of: u64) -> bool {
        let mut followers = lock(&self.followers);
        followers.sent = bytes;
        let due =
            bytes == of || followers.told.is_none_or(|told| bytes >= told + STATE_PIECE_BYTES_MAX as u64);
        if due && let Some(tell) = followers.tells.values().flatten().next() {
            tell(Told::Sent { bytes, of });
            followers.told = Some(bytes);
        }
        !followers.tells.is_empty()
    }
}

/// Follows a template on its way: without followers it is not sent to the end.
#[derive(Debug)]
pub(crate) struct Follower {
    sending: Arc<Sending>,
    id: u64,
    /// How many bytes had gone when it came.
    from: u64,
}

impl Follower {
    /// Has it sent: until somebody says so the other host is only asked.
    pub(crate) fn wants(&self) {
        lock(&self.sending.followers).wanted = true;
        self.sending.changed.notify_all();
    }

    /// Hears nothing more, and keeps it going for a moment.
    fn linger(self) {
        if let Some(tell) = lock(&self.sending.followers).tells.get_mut(&self.id) {
            *tell = None;
        }
        // Where no thread can be had it ends now.
        drop(std::thread::Builder::new().name("template-wait".into()).spawn(move || {
            std::thread::sleep(LINGERS);
            drop(self);
        }));
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        lock(&self.sending.followers).tells.remove(&self.id);
        self.sending.changed.notify_all();
    }
}

/// Asks another host for a template, in a thread of its own, sends what it lacks once somebody wants that, and tells how it goes. What several want at
/// once goes once, at the pace of who came first.
pub(crate) fn follow(
    host: &Arc<Host>,
    entry: &Entry,
    (peer, address): (&str, &str),
    (pacer, manners): (Arc<Pacer>, Manners),
    tell: impl Fn(Told) + Send + 'static,
) -> Follower {
    let key = (peer.to_owned(), entry.digest.clone());
    let mut all = lock(&host.templates().sending);
    // One that everybody has left is about to end.
    let found = all.get(&key).filter(|sending| !lock(&sending.followers).tells.is_empty()).cloned();
    let is_new = found.is_none();
    let sending = found.unwrap_or_default();
    all.insert(key.clone(), sending.clone());
    let mut followers = lock(&sending.followers);
    let (from, id) = (followers.sent, followers.add(Box::new(tell)));
    drop((followers, all));
    let follower = Follower { sending: sending.clone(), id, from };
    if is_new {
        let over = Over { host: host.clone(), key, sending, how: Err("its thread has ended".into()) };
        let (entry, address) = (entry.clone(), address.to_owned());
        let work = move || {
            let mut over = over;
            let target = (over.key.0.as_str(), address.as_str());
            let sent = send(&over.host, &entry, target, (&pacer, manners), &over.sending);
            over.how = sent
                .map_err(|why| format!("template {} does not get to host {}: {why}", entry.name, over.key.0));
        };
        // Where no thread can be had the work is dropped, and that is told as its end.
        drop(std::thread::Builder::new().name("template-out".into()).spawn(work));
    }
    follower
}

/// Tells all who follow a template how it ended, when it is dropped.
struct Over {
    host: Arc<Host>,
    key: (String, String),
    sending: Arc<Sending>,
    how: Result<(), String>,
}

impl Drop for Over {
    fn drop(&mut self) {
        let mut all = lock(&self.host.templates().sending);
        if all.get(&self.key).is_some_and(|found| Arc::ptr_eq(found, &self.sending)) {
            all.remove(&self.key);
        }
        let tells = std::mem::take(&mut lock(&self.sending.followers).tells);
        drop(all);
        tells.into_values().flatten().for_each(|tell| tell(Told::Over(self.how.clone())));
    }
}

/// The same, on this thread, for a while: how many bytes of it went over the link, and whether it is there. Who asks again soon finds it under way.
///
/// # Errors
/// Why it is not there; what was sent stays there for the next time.
pub(super) fn push(
    host: &Arc<Host>,
    entry: &Entry,
    target: (&str, &str),
    limit: Option<u64>,
) -> Result<(u64, bool), String> {
    let until = Instant::now() + PUSH_AT_MOST;
    let (tell, hear) = mpsc::channel();
    let how = (Arc::new(Pacer::new(limit)), Manners::Plain);
    let follower = follow(host, entry, target, how, move |what| {
        // Who does not wait any more does not want to know.
        drop(tell.send(what));
    });
    follower.wants();
    let mut sent = 0;
    loop {
        match hear.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Told::Over(how)) => return how.map(|()| (sent, true)),
            Ok(Told::Sent { bytes, .. }) => sent = bytes - follower.from,
            Ok(Told::Agreed { .. }) => {}
            Err(mpsc::RecvTimeoutError::Timeout) => {
                follower.linger();
                return Ok((sent, false));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err("no thread sends it".into()),
        }
    }
}

fn send(
    host: &Host,
    entry: &Entry,
    (peer, address): (&str, &str),
    (pacer, manners): (&Pacer, Manners),
    sending: &Sending,
) -> Result<(), String> {
    let connection = host.endpoint().connect(address, peer, CONNECT_WITHIN);
    let mut connection = connection.map_err(|why| explain(&why))?;
    let (manifest, _) = entry.manifest.encode();
    let offered = Message::Template(Offered { name: entry.name.clone(), manifest });
    control::send(&mut connection, &offered)?;
    let there = state(&mut connection, PIECE_WITHIN)?;
    sending.agreed(there.complete);
    if there.complete {
        return Ok(());
    }
    if !sending.is_wanted() {
        return Err(NOBODY.into());
    }
    let total = entry.manifest.bytes;
    let from = there.bytes.min(total);
    let file = File::open(host.templates().dir.join(&entry.digest).join(PAGES));
    let file = file.map_err(|why| explain(&why))?;
    let mut piece = vec![0; STATE_PIECE_BYTES_MAX];
    let mut at = from;
    let mut queue = Queue::of(manners, &connection).map_err(|why| explain(&why))?;
    while at < total {
        if !sending.sent(at - from, total - from) {
            return Err(NOBODY.into());
        }
        let most = queue.piece_bytes().min(pacer.batch_limit().max(1));
        let piece = &mut piece[..most.min((total - at) as usize)];
        file.read_exact_at(piece, at).map_err(|why| explain(&why))?;
        pacer.acquire(piece.len());
        control::send_piece(&mut connection, piece, PIECE_WITHIN)?;
        queue.wrote(piece.len(), &connection).map_err(|why| explain(&why))?;
        at += piece.len() as u64;
    }
    sending.sent(at - from, total - from);
    let there = state(&mut connection, CHECK_WITHIN)?;
    if !there.complete {
        return Err("it was sent, and is not complete there".into());
    }
    tracing::info!(template = entry.name, peer, bytes = at - from, "a template was sent");
    Ok(())
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
    let Some(_alone) = alone(&templates.busy) else {
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
    let memory = manifest.memory().map_err(|why| explain(&why))?;
    let named = (offered.name.clone(), digest.clone());
    let coming = Coming::list(templates, named, manifest, memory);
    let taken = fill(host, (peer, offered), connection, (&file, have, &folder), &coming.base);
    match &taken {
        Ok(_) => coming.has_come(),
        Err(why) => {
            coming.will_not_come(why);
            if file.metadata().is_ok_and(|found| found.len() == 0) {
                // Its source only asked.
                drop(fs::remove_dir_all(&folder));
            }
        }
    }
    taken
}

/// Takes the rest of a template, checks all of it, and fills the memory that clones may have mapped already.
fn fill(
    host: &Host,
    (peer, offered): (&str, &Offered),
    connection: &mut Connection,
    (file, from, folder): (&File, u64, &Path),
    base: &Arc<Base>,
) -> Result<u64, String> {
    let (templates, manifest, mut have) = (host.templates(), &base.manifest, from);
    let state = TemplateState { bytes: from, complete: false, refusal: String::new() };
    control::send(connection, &Message::TemplateState(state))?;
    while have < manifest.bytes {
        let piece = control::receive_piece(connection, PIECE_WITHIN)?;
        if piece.is_empty() || have + piece.len() as u64 > manifest.bytes {
            return Err(format!("{peer} sent more of it than there is"));
        }
        file.write_all_at(&piece, have).map_err(|why| format!("it cannot be stored: {why}"))?;
        have += piece.len() as u64;
    }
    file.sync_all().map_err(|why| explain(&why))?;
    let checked = file
        .try_clone()
        .and_then(|file| Pages::open(file, manifest))
        .and_then(|pages| pages.load(manifest, &base.memory).map(|()| pages));
    let pages = checked.map_err(|why| {
        // What is wrong must not be added to.
        drop(fs::remove_dir_all(folder));
        format!("what came of it is not what it says: {}", explain(&why))
    })?;
    let stored = templates.adopt(folder, &offered.name, &offered.manifest, &base.digest, Some(peer));
    stored.map_err(|why| format!("it cannot be stored: {}", explain(&why)))?;
    let template = super::Template { base: base.clone(), origin: Some(peer.to_owned()), pages };
    lock(&templates.loaded).insert(base.digest.clone(), Arc::new(template));
    Ok(have - from)
}

/// One that is over, for nobody waits for it any more, may not have been noticed yet.
fn alone(busy: &Mutex<()>) -> Option<MutexGuard<'_, ()>> {
    let until = Instant::now() + BUSY_WITHIN;
    loop {
        match busy.try_lock() {
            Ok(alone) => return Some(alone),
            Err(TryLockError::Poisoned(alone)) => return Some(alone.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() > until => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(BUSY_PAUSE),
        }
    }
}

/// A disk that is full keeps more than templates from working.
fn has_room(folder: &Path, bytes: u64) -> Result<(), String> {
    let found =
        rustix::fs::statvfs(folder).map_err(|why| format!("its folder cannot be looked at: {why}"))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free > bytes {
        Ok(())
    } else {
        Err(format!("there is no room for it: it needs {bytes} bytes, {free} are free"))
    }
}
