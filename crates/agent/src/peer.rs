//! The TLS port: who calls, and what for.

use crate::config::PageStreams;
use crate::control::{self, FIRST_MESSAGE_WITHIN, explain};
use crate::host::Host;
use crate::registry::is_usable;
use crate::sharing;
use crate::target;
use crate::templates;
use std::sync::Arc;
use std::time::Instant;
use sterna_engine::handoff::{
    Generation, Journal, MigrationId, Ownership, Record, Step, answer, answer_to_target,
};
use sterna_engine::wire::Message;
use sterna_engine::wire::message::{Answer, Purpose, Query, Refused, Stream, Text};
use sterna_transport::{Connection, PeerName};

/// Handles one connection of a verified peer, on a thread of its own.
pub(crate) fn handle(host: &Arc<Host>, mut connection: Connection) {
    let incoming = host.incoming();
    let Some(peer) = host.known_peer(connection.peer_names().iter().map(PeerName::as_str)) else {
        tracing::warn!(peer = %connection.peer(), "a host that is not in the list of hosts was refused");
        // It has a certificate of our authority: it may know why, and whoever runs it should.
        let text = format!(
            "host {} does not have {} in its list of hosts ([hosts])",
            host.name(),
            connection.peer()
        );
        drop(control::receive(&mut connection, FIRST_MESSAGE_WITHIN));
        return reply(&mut connection, &Message::Abort(Text { text }));
    };
    match control::receive(&mut connection, FIRST_MESSAGE_WITHIN) {
        Ok(Message::Hello(hello)) => target::run(host, &peer, &hello, connection),
        Ok(Message::Reattach(reattach)) => {
            let id = identity(&reattach.id).unwrap_or_default();
            if let Some(mut connection) = incoming.reattach(id, &peer, connection) {
                let text =
                    format!("host {} fetches no pages of VM {} by this migration", host.name(), reattach.vm);
                reply(&mut connection, &Message::Abort(Text { text }));
            }
        }
        Ok(Message::Stream(stream)) => match page_stream(host, &stream, connection) {
            Ok((id, purpose, connection)) => incoming.stream(id, &peer, (purpose, stream.index), connection),
            Err(why) => tracing::warn!(peer, why, "a page stream was refused"),
        },
        Ok(Message::Query(query)) if query.by_target => {
            reply(&mut connection, &Message::Answer(owner_as_source(host, &query, &peer)))
        }
        Ok(Message::Query(query)) => reply(&mut connection, &Message::Answer(owner(host, &query, &peer))),
        Ok(Message::Check(offer)) => {
            let (mut reasons, huge) = target::reasons_against(host, &offer);
            reasons.extend(crate::room::reasons(host, &offer, &huge));
            reply(&mut connection, &Message::Refused(Refused { reasons }));
        }
        Ok(Message::Template(offered)) => templates::receive(host, &peer, &offered, connection),
        Ok(Message::Store(offered)) => sharing::receive(host, &peer, &offered, connection),
        Ok(_) => tracing::warn!(peer, "a connection that began with the wrong message was closed"),
        Err(why) => tracing::warn!(peer, why, "a connection that said nothing useful was closed"),
    }
}

/// What a stream is for; it leaves TLS where both hosts say so.
fn page_stream(
    host: &Host,
    stream: &Stream,
    mut connection: Connection,
) -> Result<(MigrationId, Purpose, Connection), String> {
    let what = identity(&stream.id).zip(Purpose::from_number(stream.purpose));
    let (id, purpose) = what.ok_or("it does not say whose it is")?;
    if host.config().tls.page_streams == PageStreams::Clear {
        connection.set_deadline(Some(Instant::now() + FIRST_MESSAGE_WITHIN));
        connection.receive_in_clear().map_err(|why| explain(&why))?;
        connection.set_deadline(None);
    }
    Ok((id, purpose, connection))
}

fn reply(connection: &mut Connection, message: &Message) {
    if let Err(why) = control::send(connection, message) {
        tracing::warn!(peer = %connection.peer(), why, "an answer could not be sent");
    }
}

/// Who owns the VM, from our records. Only the host that handed it to us may ask.
fn owner(host: &Host, query: &Query, peer: &str) -> Answer {
    let Some(id) = identity(&query.id) else { return Ownership::Unknown.into() };
    let fetches = |record: &Record| record.id == id && record.step == Step::Fetching;
    let known = is_usable(&query.vm).then(|| host.journal().load(&query.vm).ok().flatten()).flatten();
    // One that owns the VM goes on until all of its pages have come.
    if host.incoming().goes_on(id) && !known.as_ref().is_some_and(fetches) {
        return Ownership::Undecided.into();
    }
    if !is_usable(&query.vm) {
        return Ownership::Unknown.into();
    }
    let found = host.registry().find(&query.vm);
    if found.as_ref().is_some_and(|vm| vm.doubtful().is_some()) {
        return Ownership::Unknown.into();
    }
    let record = known;
    if record.as_ref().is_some_and(|record| record.id == id && record.peer != peer) {
        return Ownership::Unknown.into();
    }
    let lives = found.is_some_and(|vm| vm.is_alive());
    if record.as_ref().is_some_and(|record| record.id == id && record.step == Step::Incoming && !lives) {
        // Nobody works on it and nothing waits for it: an agent's death left it half done, and recovery has run.
        return Ownership::Undecided.into();
    }
    answer(id, Generation(query.generation), record.as_ref(), lives).into()
}

/// Whether a target that was restarted may run what it committed to.
fn owner_as_source(host: &Host, query: &Query, peer: &str) -> Answer {
    let Some(id) = identity(&query.id).filter(|_| is_usable(&query.vm)) else {
        return Ownership::Unknown.into();
    };
    // Held until it is promised: a fence does not come in between.
    let journal = host.journal();
    let Ok(record) = journal.load(&query.vm) else { return Ownership::Undecided.into() };
    let ours = record.as_ref().filter(|record| record.id != id || record.peer == peer);
    let ownership = answer_to_target(id, Generation(query.generation), ours);
    if ownership == Ownership::Target
        && let Some(vm) = host.registry().find(&query.vm)
    {
        vm.promise(id);
    }
    tracing::info!(vm = query.vm, peer, %id, ?ownership, "a target asks before it runs a VM");
    ownership.into()
}

pub(crate) fn identity(bytes: &[u8]) -> Option<MigrationId> {
    bytes.try_into().ok().map(MigrationId)
}
