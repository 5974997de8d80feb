//! What comes before the first action: the pre-check, and the connection.

use super::share::Sharing;
use super::{Event, Order, Outgoing, pace};
use crate::balloon;
use crate::control::{CONNECT_WITHIN, FIRST_MESSAGE_WITHIN, explain};
use crate::host::Host;
use crate::model::{Dedup, MigrateRequest};
use crate::offer::{self, Checked};
use crate::pages::SourceBlock;
use crate::progress::View;
use crate::registry::{UsedTemplate, Vm};
use crate::room;
use crate::sharing::Seat;
use crate::templates;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use sterna_engine::Source;
use sterna_engine::handoff::MigrationId;
use sterna_engine::source::{Outcome, Postcopy, SourceParameters};
use sterna_memory::{Process, may_merge};

/// When it switches to post-copy, as the request says.
fn postcopy_of(request: &MigrateRequest) -> Postcopy {
    match request {
        MigrateRequest { postcopy: true, .. } => Postcopy::AtOnce,
        MigrateRequest { postcopy_after_precopy: true, .. } => Postcopy::AfterPrecopy,
        MigrateRequest { timeout_postcopy: true, .. } => Postcopy::AtTimeout,
        _ => Postcopy::OnDemand,
    }
}

/// Whether to look for pages that it has in common with others. One that leaves alone can have them with itself only where the kernel merges
/// pages, or where an earlier move left them. And a guest that reports free pages counts on zeros where it gave one away: there it would see
/// again what is in common.
fn may_share(
    host: &Host,
    vm: &Arc<Vm>,
    dedup: Dedup,
    seat: &Seat,
    (process, blocks): (&Process, &[SourceBlock]),
) -> Result<bool, Outcome> {
    let likely = match dedup {
        Dedup::None => false,
        Dedup::Hash => true,
        Dedup::Frames => {
            !seat.is_alone() || may_merge(process) || blocks.iter().any(|block| !block.common.is_empty())
        }
    };
    Ok(likely && !host.with_qemu(vm, |qemu| qemu.reports_free_pages()).map_err(Outcome::Failed)?)
}

/// Says in the offer whether pages in common are looked for, and how much memory the VM needs as long as it shares them.
fn tell_sharing(
    host: &Host,
    vm: &Arc<Vm>,
    dedup: Dedup,
    seat: &Seat,
    (process, checked): (&Process, &mut Checked),
) -> Result<(), Outcome> {
    let common = may_share(host, vm, dedup, seat, (process, &checked.blocks))?;
    let is_clone = !checked.offer.template.is_empty();
    let leave = if common { seat.count() } else { 1 };
    let expected = room::expected(process, is_clone, leave, &checked.blocks);
    checked.offer.expected_bytes = expected.map_err(Outcome::Failed)?;
    checked.offer.common = common;
    Ok(())
}

/// A clone's template goes first, where the target does not have it.
fn send_template(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    request: &MigrateRequest,
    target: (&str, &str),
    (orders, view): (&mpsc::Receiver<Event>, &mut View),
) -> Result<(), Outcome> {
    let Some(used) = vm.record().template else { return Ok(()) };
    let entry = host.templates().entry(&used.digest).ok_or_else(|| {
        let (us, UsedTemplate { name, digest, .. }) = (host.name(), used);
        Outcome::Failed(format!(
            "host {us} does not have template {name} ({digest}) any more, which VM {} is a clone of",
            vm.name()
        ))
    })?;
    let mut cancelled = false;
    let sent = templates::ensure(host, &entry, target, request.max_bandwidth, |sent| {
        view.template_sent(sent);
        cancelled |= orders.try_iter().any(|event| matches!(event, Event::Order(Order::Cancel)));
        if cancelled { Err("it was cancelled".into()) } else { Ok(()) }
    });
    match sent {
        Ok(_) => Ok(()),
        Err(_) if cancelled => Err(Outcome::Cancelled),
        Err(why) => Err(Outcome::Failed(why)),
    }
}

impl Outgoing {
    /// The pre-check and the connection: nothing of the VM is touched, and every failure is a plain refusal.
    pub(super) fn prepare(
        host: &Arc<Host>,
        vm: &Arc<Vm>,
        request: &MigrateRequest,
        (id, seat): (MigrationId, Seat),
        (tell, orders): (mpsc::Sender<Event>, &mpsc::Receiver<Event>),
        view: &mut View,
    ) -> Result<(Self, Source), Outcome> {
        let began = Instant::now();
        let peer = request.host.clone();
        let address = host.address_of(&peer).map_err(Outcome::Failed)?;
        let process = host.process_of(vm).map_err(Outcome::Failed)?;
        let streams = request.parallel_connections.unwrap_or_else(|| host.default_streams());
        // Both take their time; a VM that may not move costs the target a handshake.
        let connecting = {
            let (host, address, peer) = (host.clone(), address.clone(), peer.clone());
            std::thread::spawn(move || host.endpoint().connect(&address, &peer, CONNECT_WITHIN))
        };
        let when = postcopy_of(request);
        send_template(host, vm, request, (&peer, &address), (orders, view))?;
        let mut checked = offer::check(host, vm, streams, request.verify, (&peer, &address))?;
        checked.offer.postcopy = when != Postcopy::OnDemand;
        tell_sharing(host, vm, request.dedup, &seat, (&process, &mut checked))?;
        if request.balloon {
            match balloon::size(host, vm) {
                Ok(bytes) => checked.offer.balloon = bytes,
                Err(why) => {
                    view.notice(&format!("the guest of VM {} gives no memory away: {why}", request.vm))
                }
            }
        }
        tracing::debug!(%id, phase = "pre-check", took = ?began.elapsed(), "source");
        let unreachable = |why: &str| Outcome::Failed(format!("host {peer} cannot be reached: {why}"));
        let is_late = began.elapsed() > FIRST_MESSAGE_WITHIN / 2;
        let mut connection = connecting.join().map_err(|_| unreachable("its thread panicked"))?;
        if is_late && connection.is_ok() {
            // The target does not wait for ever for us to say something: whoever hashes images has kept it waiting too long.
            connection = host.endpoint().connect(&address, &peer, CONNECT_WITHIN);
        }
        let connection = connection.map_err(|why| unreachable(&explain(&why)))?;
        tracing::debug!(%id, phase = "connect", took = ?began.elapsed(), "source");
        let mut outgoing = Self::new(
            host.clone(),
            vm.clone(),
            peer.clone(),
            address,
            id,
            pace::limits_of(request),
            tell,
            view.another(),
            process,
        );
        outgoing.began = began;
        outgoing.sharing = Sharing::at(seat, if checked.offer.common { request.dedup } else { Dedup::None });
        outgoing.lazy.when = when;
        outgoing.lazy.streams = streams;
        outgoing.lazy.bytes =
            checked.offer.blocks.iter().map(|block| if block.travels { block.bytes } else { 0 }).collect();
        outgoing.blocks = Arc::new(checked.blocks);
        outgoing.shape = Some(checked.shape);
        outgoing.writers = checked.writers;
        outgoing.activity = checked.activity;
        outgoing.images = checked.images;
        outgoing.verify = request.verify;
        outgoing.balloon = checked.offer.balloon;
        outgoing.options = pace::options_of(request, host, &outgoing.blocks);
        outgoing.slowed.watch(request.auto_converge);
        outgoing.attach_control(connection);
        let parameters = SourceParameters {
            id,
            peer,
            offer: checked.offer,
            downtime_limit: Duration::from_millis(request.downtime_limit),
            timeout: request.timeout.map(Duration::from_secs_f64),
            activity: checked.activity,
            rate: outgoing.rate,
            auto_converge: request.auto_converge,
            postcopy: when,
        };
        Ok((outgoing, Source::new(parameters, Duration::ZERO)))
    }
}
