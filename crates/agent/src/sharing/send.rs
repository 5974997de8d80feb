//! Comparing bytes, and sending each content once.

use super::find::{Groups, Place, follows};
use super::gang::Member;
use super::{Compared, Found};
use crate::agent::random;
use crate::control::{self, CONNECT_WITHIN, explain};
use crate::host::Host;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use sterna_engine::wire::Message;
use sterna_engine::wire::common::Run;
use sterna_engine::wire::message::Store;
use sterna_memory::{PAGE, PageRun, Reader, Span, append_run, is_zero};
use sterna_transport::{Connection, Pacer};

/// Contents compared and sent at once: 1 MiB.
const PAGES_PER_PIECE: usize = 256;
/// Pieces that wait to be sent while others are compared.
const PIECES_AHEAD: usize = 8;
/// How long the target may take for a piece, or to say that it has all.
const PIECE_WITHIN: Duration = Duration::from_secs(30);

/// As long as it lives the target keeps a store.
pub(crate) struct Held {
    _connection: Mutex<Connection>,
}

/// Sends what members have in common into a store at the target, each content at the place of its group. `tell` hears where each member's
/// pages will lie, as soon as the target has agreed to the store: it maps them while they come. What came of the comparison is the result.
pub(super) fn send(
    host: &Host,
    (peer, address): (&str, &str),
    limit: Option<u64>,
    groups: &Groups,
    members: &[Member],
    tell: impl FnOnce(Vec<Found>),
) -> Result<Vec<Compared>, String> {
    if groups.len() == 0 {
        tell(members.iter().map(|_| Found::default()).collect());
        return Ok(members.iter().map(|_| Compared::default()).collect());
    }
    let failed = |why: String| format!("what the VMs have in common does not get to host {peer}: {why}");
    let connection = host.endpoint().connect(address, peer, CONNECT_WITHIN);
    let mut connection = connection.map_err(|why| failed(explain(&why)))?;
    let id = random().map_err(|why| failed(why.to_string()))?.to_vec();
    let store = Store { id: id.clone(), pages: groups.len() as u64 };
    control::send(&mut connection, &Message::Store(store)).map_err(failed)?;
    taken(&mut connection).map_err(failed)?;
    let found = found(groups, members, &id);
    let runs: Vec<usize> = found.iter().map(|found| found.runs.len()).collect();
    tell(found);
    let began = Instant::now();
    let mut different: Vec<Vec<Place>> = vec![Vec::new(); members.len()];
    let sent = std::thread::scope(|scope| {
        let (pieces, to_send) = sync_channel::<Vec<u8>>(PIECES_AHEAD);
        let connection = &mut connection;
        let sender = scope.spawn(move || {
            let pacer = Pacer::new(limit);
            for piece in to_send {
                pacer.acquire(piece.len());
                control::send_piece(connection, &piece, PIECE_WITHIN)?;
            }
            control::send_piece(connection, &[], PIECE_WITHIN)
        });
        let mut comparing = Comparing::new(members);
        for first in (0..groups.len()).step_by(PAGES_PER_PIECE) {
            let last = (first + PAGES_PER_PIECE).min(groups.len());
            comparing.compare((first..last).map(|group| groups.get(group)), |place| {
                different[usize::from(place.member)].push(place);
            });
            // Who cannot send any more says why.
            if pieces.send(comparing.firsts.clone()).is_err() {
                break;
            }
        }
        drop(pieces);
        sender.join().unwrap_or_else(|_| Err("the thread that sends it panicked".into()))
    });
    sent.and_then(|()| taken(&mut connection)).map_err(failed)?;
    let pages: usize = different.iter().map(Vec::len).sum();
    tracing::info!(peer, contents = groups.len(), ?runs, different = pages, took = ?began.elapsed(), "pages that VMs have in common were sent");
    let held = Arc::new(Held { _connection: Mutex::new(connection) });
    let of = |(mut places, member): (Vec<Place>, &Member)| {
        places.sort_unstable();
        let mut different = vec![Vec::new(); member.blocks.len()];
        for place in places {
            append_run(
                &mut different[usize::from(place.block)],
                PageRun { first: place.page.into(), pages: 1 },
            );
        }
        Compared { different, held: Some(held.clone()) }
    };
    Ok(different.into_iter().zip(members).map(of).collect())
}

/// Where each member's pages will lie.
fn found(groups: &Groups, members: &[Member], id: &[u8]) -> Vec<Found> {
    let mut placed: Vec<Vec<(Place, u32)>> = vec![Vec::new(); members.len()];
    let mut found: Vec<Found> = members.iter().map(|_| Found::default()).collect();
    for group in 0..groups.len() {
        found[usize::from(groups.get(group)[0].member)].bytes += PAGE;
        for place in groups.get(group) {
            placed[usize::from(place.member)].push((*place, group as u32));
        }
    }
    for ((found, mut places), member) in found.iter_mut().zip(placed).zip(members) {
        places.sort_unstable();
        found.runs = places
            .chunk_by(|one, next| follows(*one, *next))
            .map(|run| Run {
                block: member.blocks[usize::from(run[0].0.block)].index,
                first: run[0].0.page,
                pages: run.len() as u32,
                at: run[0].1,
            })
            .collect();
        if !found.runs.is_empty() {
            found.store = id.to_vec();
        }
    }
    found
}

/// What the target says of the store.
fn taken(connection: &mut Connection) -> Result<(), String> {
    match control::receive(connection, PIECE_WITHIN)? {
        Message::StoreState(state) if state.text.is_empty() => Ok(()),
        Message::StoreState(state) => Err(state.text),
        Message::Abort(text) => Err(text.text),
        _ => Err("it answered something else".into()),
    }
}

/// Reads pages of all members that may be the same, and tells which are.
struct Comparing<'a> {
    members: &'a [Member],
    /// None for one that cannot be read: a VM whose QEMU has ended shares nothing.
    readers: Vec<Option<Reader>>,
    /// The first page of each group, one after the other.
    firsts: Vec<u8>,
    others: Vec<u8>,
}

impl<'a> Comparing<'a> {
    fn new(members: &'a [Member]) -> Self {
        let readers = members.iter().map(|member| Reader::gentle(&member.process).ok()).collect();
        let (firsts, others) = (Vec::new(), vec![0; PAGES_PER_PIECE * PAGE as usize]);
        Self { members, readers, firsts, others }
    }

    /// Tells which of the pages of each group are not as its first one; those of a group whose first one is zero, or cannot be read, are all
    /// told: what is zero need not travel at all.
    fn compare<'b>(&mut self, groups: impl Iterator<Item = &'b [Place]>, mut tell: impl FnMut(Place)) {
        let (mut firsts, mut others) = (Vec::new(), Vec::new());
        for (group, places) in groups.enumerate() {
            firsts.push((places[0], group));
            others.extend(places[1..].iter().map(|place| (*place, group)));
        }
        let mut bytes = std::mem::take(&mut self.firsts);
        bytes.resize(firsts.len() * PAGE as usize, 0);
        // The groups are in the order of their first places.
        self.read(&firsts, &mut bytes);
        let pages = bytes.chunks_exact(PAGE as usize).zip(&firsts);
        let usable: Vec<bool> = pages
            .map(|(content, (place, _))| {
                self.readers[usize::from(place.member)].is_some() && !is_zero(content)
            })
            .collect();
        firsts.iter().filter(|(_, group)| !usable[*group]).for_each(|(place, _)| tell(*place));
        others.sort_unstable();
        let mut theirs = std::mem::take(&mut self.others);
        for part in others.chunks(PAGES_PER_PIECE) {
            let theirs = &mut theirs[..part.len() * PAGE as usize];
            self.read(part, theirs);
            for (content, (place, group)) in theirs.chunks_exact(PAGE as usize).zip(part) {
                let first = &bytes[group * PAGE as usize..][..PAGE as usize];
                let is_read = self.readers[usize::from(place.member)].is_some();
                if !usable[*group] || !is_read || content != first {
                    tell(*place);
                }
            }
        }
        (self.firsts, self.others) = (bytes, theirs);
    }

    /// Reads the pages of these places, which are in ascending order. What is read of a member that does not live then is of no use.
    fn read(&mut self, places: &[(Place, usize)], bytes: &mut [u8]) {
        let mut rest = bytes;
        for part in places.chunk_by(|one, next| one.0.member == next.0.member) {
            let member = usize::from(part[0].0.member);
            let (into, after) = rest.split_at_mut(part.len() * PAGE as usize);
            rest = after;
            let Some(reader) = &self.readers[member] else { continue };
            let mut spans: Vec<Span> = Vec::new();
            for (place, _) in part {
                let region = self.members[member].blocks[usize::from(place.block)].region;
                let span = region.span(PageRun { first: place.page.into(), pages: 1 });
                match spans.last_mut() {
                    Some(last) if last.end() == span.addr => last.len += span.len,
                    _ => spans.push(span),
                }
            }
            if let Err(why) = reader.read(&spans, into) {
                tracing::warn!(vm = self.members[member].vm, %why, "nothing more of the VM is shared");
                self.readers[member] = None;
            }
        }
    }
}
