//! Stores at the target: pages that VMs of one peer have in common, each content once.

use crate::control::{self, explain};
use crate::host::Host;
use crate::registry::lock;
use std::collections::HashMap;
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

/// The stores of a host that are complete and may be referred to.
#[derive(Debug, Default)]
pub(crate) struct Stores {
    /// By peer and identity.
    complete: Mutex<HashMap<Key, Arc<Complete>>>,
}

/// A store that is sealed.
#[derive(Debug)]
pub(crate) struct Complete {
    pub(crate) memory: SealedMemory,
    /// How many pages it has.
    pub(crate) pages: u64,
}

impl Stores {
    /// A store of this peer's.
    pub(crate) fn find(&self, peer: &str, id: &[u8]) -> Option<Arc<Complete>> {
        lock(&self.complete).get(&(peer.to_owned(), id.to_vec())).cloned()
    }
}

/// Takes a store from a peer, and keeps it as long as the peer keeps the connection. VMs that map it keep its memory.
pub(crate) fn receive(host: &Arc<Host>, peer: &str, offered: &Store, mut connection: Connection) {
    let key = (peer.to_owned(), offered.id.clone());
    let answer = |connection: &mut Connection, text: String| {
        control::send(connection, &Message::StoreState(Text { text }))
    };
    let store = match take(host, &key, offered, &mut connection) {
        Ok(store) => store,
        Err(why) => {
            tracing::warn!(peer, why, "pages that VMs have in common did not come");
            return drop(answer(&mut connection, format!("host {}: {why}", host.name())));
        }
    };
    tracing::info!(peer, pages = store.pages, "pages that VMs have in common have come");
    lock(&host.stores().complete).insert(key.clone(), Arc::new(store));
    if answer(&mut connection, String::new()).is_ok() {
        // Nothing more comes but its end.
        drop(control::receive(&mut connection, KEPT_WITHIN));
    }
    lock(&host.stores().complete).remove(&key);
}

fn take(host: &Host, key: &Key, offered: &Store, connection: &mut Connection) -> Result<Complete, String> {
    if offered.id.len() != 16 || offered.pages == 0 || offered.pages > u64::from(u32::MAX) {
        return Err("its store is none".into());
    }
    {
        let complete = lock(&host.stores().complete);
        let of_peer = complete.keys().filter(|(peer, _)| *peer == key.0).count();
        if complete.contains_key(key) || of_peer >= STORES_MAX {
            return Err("it has that store already, or too many of this host's".into());
        }
    }
    let bytes = offered.pages * PAGE;
    let available = sterna_vmm::qemu::available_bytes().unwrap_or(0);
    if bytes > available {
        return Err(format!(
            "there is no memory for {bytes} bytes that VMs have in common: {available} are available"
        ));
    }
    let memory = common_store(offered.pages).map_err(|why| explain(&why))?;
    control::send(connection, &Message::StoreState(Text::default()))?;
    let mut pages = 0;
    loop {
        let piece = control::receive_piece(connection, PIECE_WITHIN)?;
        if piece.is_empty() {
            break;
        }
        let more = piece.len() as u64 / PAGE;
        if !piece.len().is_multiple_of(PAGE as usize) || pages + more > offered.pages {
            return Err("it sent other pages than it said".into());
        }
        memory.write(&piece, pages * PAGE).map_err(|why| explain(&why))?;
        pages += more;
    }
    memory.seal().map_err(|why| explain(&why))?;
    Ok(Complete { memory, pages })
}
