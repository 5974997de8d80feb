//! Stores at the target: pages that VMs of one peer have in common, each content once.

use crate::control::{self, explain};
use crate::host::Host;
use crate::registry::lock;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use sterna_engine::wire::Message;
use sterna_engine::wire::message::{Store, Text};
use sterna_memory::{PAGE, SealedMemory, common_store};
use sterna_transport::Connection;

/// How long the source may take for a piece.
const PIECE_WITHIN: Duration = Duration::from_secs(60);
/// How long a complete store is kept for VMs that are still to be prepared; the source closes it when they are.
const KEPT_WITHIN: Duration = Duration::from_secs(600);
/// Stores of one peer at a time: each is one evacuation, or one VM that has pages in common with itself.
const STORES_MAX: usize = 64;

/// A peer, and the identity of a store of its.
type Key = (String, Vec<u8>);

/// The stores of a host that may be referred to: they are mapped while they are filled.
#[derive(Debug, Default)]
pub(crate) struct Stores {
    /// By peer and identity.
    open: Mutex<HashMap<Key, Arc<Opened>>>,
}

/// A store. It is sealed once all of it has come.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) memory: SealedMemory,
    /// How many pages it has.
    pub(crate) pages: u64,
    /// How many of them have come.
    come: AtomicU64,
}

impl Opened {
    /// What is still to come, in bytes.
    fn lacking(&self) -> u64 {
        self.pages.saturating_sub(self.come.load(Ordering::Relaxed)) * PAGE
    }
}

impl Stores {
    /// A store of this peer's.
    pub(crate) fn find(&self, peer: &str, id: &[u8]) -> Option<Arc<Opened>> {
        lock(&self.open).get(&(peer.to_owned(), id.to_vec())).cloned()
    }
}

/// Takes a store from a peer, and keeps it as long as the peer keeps the connection. VMs that map it keep its memory.
pub(crate) fn receive(host: &Arc<Host>, peer: &str, offered: &Store, mut connection: Connection) {
    let key = (peer.to_owned(), offered.id.clone());
    let answer = |connection: &mut Connection, text: String| {
        control::send(connection, &Message::StoreState(Text { text }))
    };
    let refused = |why: &str, connection: &mut Connection| {
        tracing::warn!(peer, why, "pages that VMs have in common did not come");
        drop(answer(connection, format!("host {}: {why}", host.name())));
    };
    let store = match open(host, &key, offered) {
        Ok(store) => store,
        Err(why) => return refused(&why, &mut connection),
    };
    match fill(&store, &mut connection) {
        Err(why) => refused(&why, &mut connection),
        Ok(()) => {
            tracing::info!(peer, pages = store.pages, "pages that VMs have in common have come");
            if answer(&mut connection, String::new()).is_ok() {
                // Nothing more comes but its end.
                drop(control::receive(&mut connection, KEPT_WITHIN));
            }
        }
    }
    lock(&host.stores().open).remove(&key);
}

/// A new store, empty.
fn open(host: &Host, key: &Key, offered: &Store) -> Result<Arc<Opened>, String> {
    if offered.id.len() != 16 || offered.pages == 0 || offered.pages > u64::from(u32::MAX) {
        return Err("its store is none".into());
    }
    let bytes = offered.pages * PAGE;
    let available = sterna_vmm::qemu::available_bytes().unwrap_or(0);
    let memory = common_store(offered.pages).map_err(|why| explain(&why))?;
    let mut open = lock(&host.stores().open);
    let promised: u64 = open.values().map(|store| store.lacking()).sum();
    if bytes > available.saturating_sub(promised) {
        return Err(format!(
            "there is no memory for {bytes} bytes that VMs have in common: {available} are available, {promised} of them \
             promised to others"
        ));
    }
    let of_peer = open.keys().filter(|(peer, _)| *peer == key.0).count();
    if open.contains_key(key) || of_peer >= STORES_MAX {
        return Err("it has that store already, or too many of them here".into());
    }
    let store = Arc::new(Opened { memory, pages: offered.pages, come: AtomicU64::new(0) });
    open.insert(key.clone(), store.clone());
    Ok(store)
}

/// Takes its pages, and seals it.
fn fill(store: &Opened, connection: &mut Connection) -> Result<(), String> {
    control::send(connection, &Message::StoreState(Text::default()))?;
    let mut pages = 0;
    loop {
        let piece = control::receive_piece(connection, PIECE_WITHIN)?;
        if piece.is_empty() {
            break;
        }
        let more = piece.len() as u64 / PAGE;
        if !piece.len().is_multiple_of(PAGE as usize) || pages + more > store.pages {
            return Err("it sent other pages than it said".into());
        }
        store.memory.write(&piece, pages * PAGE).map_err(|why| explain(&why))?;
        pages += more;
        store.come.store(pages, Ordering::Relaxed);
    }
    store.memory.seal().map_err(|why| explain(&why))
}
