//! Who leaves together.

use super::find::{self, Groups};
use super::{Compared, Found, Word, send};
use crate::host::Host;
use crate::model::Dedup;
use crate::pages::SourceBlock;
use crate::registry::lock;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use sterna_memory::{PageRun, Process};

/// How long who is ready waits for those who are not: a target that starts a dozen QEMUs at once takes its time.
const WAIT: Duration = Duration::from_secs(60);

/// How many runs any target can map: the kernel lets a process have four times as many mappings unless it is told otherwise, and a run takes up
/// to two. One that can map less has the rest sent twice.
const SURE_ROOM: u32 = 16 << 10;

/// VMs that leave for the same host together.
pub(crate) struct Gang {
    host: Arc<Host>,
    peer: String,
    address: String,
    /// Most bytes per second for what they have in common.
    limit: Option<u64>,
    /// How many places there are.
    count: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Who has not said anything yet.
    awaited: usize,
    members: Vec<Member>,
    begun: bool,
}

/// One of them, ready to be looked at: its writes are tracked.
pub(crate) struct Member {
    pub(crate) vm: String,
    pub(crate) process: Process,
    pub(crate) blocks: Arc<Vec<SourceBlock>>,
    /// What is to be sent of each block.
    pub(crate) pages: Vec<Vec<PageRun>>,
    /// How many runs its target can map.
    pub(crate) room: Arc<Room>,
    pub(crate) dedup: Dedup,
    pub(crate) told: Told,
}

/// How many runs a target can map, which is known once it has a QEMU.
#[derive(Debug, Default)]
pub(crate) struct Room {
    runs: Mutex<Option<u32>>,
    known: Condvar,
}

impl Room {
    /// Now it is known; who says so first is right.
    pub(crate) fn is(&self, runs: u32) {
        lock(&self.runs).get_or_insert(runs);
        self.known.notify_all();
    }

    pub(crate) fn get(&self) -> Option<u32> {
        *lock(&self.runs)
    }

    /// Waits until it is known; none where that takes too long.
    fn wait(&self, until: Instant) -> u32 {
        let left = until.saturating_duration_since(Instant::now());
        let runs = self.known.wait_timeout_while(lock(&self.runs), left, |runs| runs.is_none());
        runs.unwrap_or_else(std::sync::PoisonError::into_inner).0.unwrap_or(0)
    }
}

/// What can be shared of members, by how much room there is for it. A target starts its QEMU for a while: what it can surely map is not held
/// up by that.
fn fit(groups: &Groups, members: &[Member]) -> find::Fit {
    let rooms: Vec<u32> = members.iter().map(|member| member.room.get().unwrap_or(SURE_ROOM)).collect();
    let fit = find::fit(groups, &rooms);
    if fit.is_all() {
        return fit;
    }
    let until = Instant::now() + WAIT;
    let rooms: Vec<u32> = members.iter().map(|member| member.room.wait(until)).collect();
    find::fit(groups, &rooms)
}

/// Hears of a VM what was found, and then what came of the comparison.
pub(crate) struct Told {
    tell: Box<dyn Fn(Result<Word, String>) + Send + Sync>,
    over: bool,
}

impl Told {
    pub(crate) fn by(tell: impl Fn(Result<Word, String>) + Send + Sync + 'static) -> Self {
        Self { tell: Box::new(tell), over: false }
    }

    /// Where the pages that may be in common will lie in a store.
    pub(super) fn found(&self, found: Found) {
        (self.tell)(Ok(Word::Found(found)));
    }

    /// The last word.
    pub(super) fn end(&mut self, compared: Result<Compared, String>) {
        self.over = true;
        (self.tell)(compared.map(Word::Compared));
    }
}

impl Drop for Told {
    /// Its migration waits for a word, whatever becomes of the thread that was to say it.
    fn drop(&mut self) {
        if !self.over {
            self.end(Err(
                "what VMs have in common could not be looked for: the agent's log may say why".into()
            ));
        }
    }
}

/// A place in a gang: who gives it up is waited for no more.
pub(crate) struct Seat {
    gang: Option<Arc<Gang>>,
}

impl Gang {
    /// Places for so many VMs.
    pub(crate) fn seats(
        host: &Arc<Host>,
        (peer, address): (&str, &str),
        limit: Option<u64>,
        count: usize,
    ) -> Vec<Seat> {
        let state = Mutex::new(State { awaited: count, ..State::default() });
        let (host, peer, address) = (host.clone(), peer.to_owned(), address.to_owned());
        let gang = Arc::new(Self { host, peer, address, limit, count, state, changed: Condvar::new() });
        (0..count).map(|_| Seat { gang: Some(gang.clone()) }).collect()
    }

    /// Waits for all, or as long as that may take, and looks at what they have in common.
    fn run(&self) {
        let until = Instant::now() + WAIT;
        let mut state = lock(&self.state);
        while state.awaited > 0 && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        state.begun = true;
        let members = std::mem::take(&mut state.members);
        drop(state);
        let began = Instant::now();
        let groups = find::find(&members);
        let fit = fit(&groups, &members);
        #[cfg(feature = "holds")]
        crate::hold::before(&self.host.config().run_dir, "source-compare");
        tracing::debug!(members = members.len(), groups = groups.len(), took = ?began.elapsed(), "pages that may be the same");
        let groups = groups.retain(|place| fit.has(place));
        let sent =
            send::send(&self.host, (&self.peer, &self.address), self.limit, &groups, &members, |found| {
                for (at, (mut found, member)) in found.into_iter().zip(&members).enumerate() {
                    found.fallbacks += fit.fallbacks(at);
                    member.told.found(found);
                }
            });
        match sent {
            Ok(compared) => {
                members
                    .into_iter()
                    .zip(compared)
                    .for_each(|(mut member, compared)| member.told.end(Ok(compared)));
            }
            Err(why) => members.into_iter().for_each(|mut member| member.told.end(Err(why.clone()))),
        }
    }
}

impl Seat {
    /// Whether nobody else leaves with it.
    pub(crate) fn is_alone(&self) -> bool {
        self.count() == 1
    }

    /// How many leave together.
    pub(crate) fn count(&self) -> usize {
        self.gang.as_ref().map_or(1, |gang| gang.count)
    }

    /// This one is ready. It hears what was found, once all are.
    pub(crate) fn arrive(mut self, mut member: Member) -> Result<(), String> {
        let Some(gang) = self.gang.take() else { return Err("it has left already".into()) };
        let mut state = lock(&gang.state);
        state.awaited -= 1;
        if state.begun {
            drop(state);
            member.told.end(Err(format!(
                "those that leave with it could not wait longer than {} s",
                WAIT.as_secs()
            )));
            return Ok(());
        }
        state.members.push(member);
        let first = state.members.len() == 1;
        drop(state);
        gang.changed.notify_all();
        if first {
            let named = std::thread::Builder::new().name("common-out".into());
            let looking = gang.clone();
            let started = named.spawn(move || looking.run());
            if let Err(why) = started {
                tracing::warn!(%why, "no thread can be started: nothing is shared");
                let mut state = lock(&gang.state);
                state.begun = true;
                let waiting = std::mem::take(&mut state.members);
                drop((state, waiting));
            }
        }
        Ok(())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(gang) = self.gang.take() {
            lock(&gang.state).awaited -= 1;
            gang.changed.notify_all();
        }
    }
}
