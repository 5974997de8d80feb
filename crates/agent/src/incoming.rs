//! Incoming migrations that go on, so that page streams, questions and later tries find them.

use crate::pages::{Ahead, Budget, Gate};
use crate::registry::lock;
use crate::room::Promise;
use crate::target::Event;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use sterna_engine::handoff::MigrationId;
use sterna_engine::target::TargetInput;
use sterna_engine::wire::message::{Offer, Purpose};
use sterna_memory::Process;
use sterna_transport::Connection;

/// How long a new try waits for the end of an older one: what can take long is the start of a QEMU, or its death.
const SUPERSEDE_WITHIN: Duration = Duration::from_secs(30);
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Incoming migrations that go on.
#[derive(Default)]
pub(crate) struct Incoming {
    /// Held while it is looked whether there is room for one, until it has been promised.
    admission: Mutex<()>,
    by_id: Mutex<HashMap<MigrationId, Try>>,
    /// What page streams have read before there was a QEMU.
    ahead: Budget,
}

struct Try {
    peer: String,
    /// Empty until it was offered.
    vm: String,
    generation: u64,
    promise: Promise,
    /// Opens when there is a QEMU for its pages.
    gate: Arc<Gate>,
    tell: mpsc::Sender<Event>,
}

impl Incoming {
    /// Enters a migration. False when there is one with this identity.
    pub(crate) fn enter(&self, id: MigrationId, peer: &str, tell: mpsc::Sender<Event>) -> bool {
        let mut by_id = lock(&self.by_id);
        let fresh = !by_id.contains_key(&id);
        if fresh {
            by_id.insert(
                id,
                Try {
                    peer: peer.into(),
                    vm: String::new(),
                    generation: 0,
                    promise: Promise::default(),
                    gate: Arc::default(),
                    tell,
                },
            );
        }
        fresh
    }

    pub(crate) fn leave(&self, id: MigrationId) {
        if let Some(left) = lock(&self.by_id).remove(&id) {
            left.gate.close();
        }
    }

    /// There is a QEMU: what comes on page streams can be put into it.
    pub(crate) fn is_ready(&self, id: MigrationId) {
        if let Some(found) = lock(&self.by_id).get(&id) {
            found.gate.open();
        }
    }

    /// It has no rounds: the VM runs here.
    pub(crate) fn takes_no_rounds(&self, id: MigrationId) {
        if let Some(found) = lock(&self.by_id).get(&id) {
            found.gate.close();
        }
    }

    /// Looks whether there is room for a VM, and promises it if there is: one after the other, so that nothing is promised twice.
    pub(crate) fn admit<T>(
        &self,
        id: MigrationId,
        promise: (u64, bool),
        reasons: impl FnOnce() -> Vec<T>,
    ) -> Vec<T> {
        let _turn = lock(&self.admission);
        let reasons = reasons();
        if let Some(found) = lock(&self.by_id).get_mut(&id).filter(|_| reasons.is_empty()) {
            found.promise.is(promise);
        }
        reasons
    }

    /// From now on this process takes what was promised.
    pub(crate) fn starts(&self, id: MigrationId, process: Option<Process>) {
        if let Some(found) = lock(&self.by_id).get_mut(&id) {
            found.promise.starts(process);
        }
    }

    /// What is still to come of what was promised to these migrations.
    pub(crate) fn promises(&self, whose: impl Fn(MigrationId) -> bool) -> Vec<u64> {
        lock(&self.by_id)
            .iter()
            .filter(|(id, _)| whose(**id))
            .map(|(_, found)| found.promise.left())
            .collect()
    }

    /// Hands a page stream to its migration. It must come from the host that began it. What comes before there is a QEMU is read here, on the
    /// stream's own thread.
    pub(crate) fn stream(
        &self,
        id: MigrationId,
        peer: &str,
        (purpose, index): (Purpose, u32),
        connection: Connection,
    ) {
        let found = lock(&self.by_id)
            .get(&id)
            .filter(|found| found.peer == peer)
            .map(|found| (found.gate.clone(), found.tell.clone()));
        let Some((gate, tell)) = found else {
            return tracing::warn!(peer, %id, "a page stream for no migration was refused");
        };
        let event = match purpose {
            Purpose::Rounds if !gate.lets_in() => {
                return tracing::warn!(peer, %id, index, "more page streams than any migration has were refused");
            }
            Purpose::Rounds => match Ahead::read(connection.split().0, &gate, &self.ahead) {
                Some(reader) => Event::Rounds(index, reader),
                None => {
                    return tracing::debug!(peer, %id, index, "a page stream ended before there was a QEMU");
                }
            },
            Purpose::Demand => Event::Demand(connection),
            Purpose::Push => Event::Push(index, connection),
        };
        // Its migration may be over.
        drop(tell.send(event));
    }

    /// Hands a new control connection to a migration whose VM runs here with pages missing. Gives it back if there is none from that host.
    pub(crate) fn reattach(&self, id: MigrationId, peer: &str, connection: Connection) -> Option<Connection> {
        match lock(&self.by_id).get(&id) {
            Some(found) if found.peer == peer => match found.tell.send(Event::Reattach(connection)) {
                Err(mpsc::SendError(Event::Reattach(connection))) => Some(connection),
                _ => None,
            },
            _ => Some(connection),
        }
    }

    pub(crate) fn goes_on(&self, id: MigrationId) -> bool {
        lock(&self.by_id).contains_key(&id)
    }

    /// Notes what is offered, and ends older tries to bring the same VM from the same host: that host would not try again
    /// if they were not over, and we may not have noticed (a silent network), or be still clearing up. Waits for their ends.
    pub(crate) fn supersede(&self, id: MigrationId, offer: &Offer) {
        for older in self.offered(id, offer) {
            // One that owns the VM by now does not listen to this.
            drop(older.send(Event::Input(TargetInput::Cancel)));
        }
        let end = Instant::now() + SUPERSEDE_WITHIN;
        while !self.offered(id, offer).is_empty() && Instant::now() < end {
            std::thread::sleep(PAUSE);
        }
    }

    /// The older tries.
    fn offered(&self, id: MigrationId, offer: &Offer) -> Vec<mpsc::Sender<Event>> {
        let mut by_id = lock(&self.by_id);
        let Some(us) = by_id.get_mut(&id) else { return Vec::new() };
        us.vm.clone_from(&offer.vm);
        us.generation = offer.generation;
        let peer = us.peer.clone();
        let older =
            |found: &&Try| found.peer == peer && found.vm == offer.vm && found.generation < offer.generation;
        by_id.values().filter(older).map(|found| found.tell.clone()).collect()
    }
}
