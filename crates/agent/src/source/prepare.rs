//! What comes before the first action: the pre-check, and the connection.

use super::share::Sharing;
use super::{Event, Outgoing, pace, template};
use crate::balloon;
use crate::control::{CONNECT_WITHIN, FIRST_MESSAGE_WITHIN, explain};
use crate::host::Host;
use crate::model::{Dedup, MigrateRequest};
use crate::offer::{self, Checked};
use crate::pages::SourceBlock;
use crate::progress::View;
use crate::registry::Vm;
use crate::room;
use crate::sharing::Seat;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use sterna_engine::Source;
use sterna_engine::handoff::MigrationId;
use sterna_engine::source::{Outcome, Postcopy, SourceParameters};
use sterna_memory::{Process, may_merge};
use sterna_transport::{Connection, Pacer, TransportError};

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

/// A connection that is made while the VM is looked at: both take their time, and a VM that may not move costs the target a handshake.
struct Connecting {
    host: Arc<Host>,
    peer: String,
    address: String,
    thread: JoinHandle<Result<Connection, TransportError>>,
}

impl Connecting {
    fn begin(host: &Arc<Host>, peer: &str, address: &str) -> Self {
        let (host, peer, address) = (host.clone(), peer.to_owned(), address.to_owned());
        let thread = {
            let (host, address, peer) = (host.clone(), address.clone(), peer.clone());
            std::thread::spawn(move || host.endpoint().connect(&address, &peer, CONNECT_WITHIN))
        };
        Self { host, peer, address, thread }
    }

    /// The connection, after so much time; another one if that was long.
    fn end(self, took: Duration) -> Result<Connection, Outcome> {
        let Self { host, peer, address, thread } = self;
        let unreachable = |why: &str| Outcome::Failed(format!("host {peer} cannot be reached: {why}"));
        let mut connection = thread.join().map_err(|_| unreachable("its thread panicked"))?;
        if took > FIRST_MESSAGE_WITHIN / 2 && connection.is_ok() {
            // The target does not wait for ever for us to say something: whoever hashes images has kept it waiting too long.
            connection = host.endpoint().connect(&address, &peer, CONNECT_WITHIN);
        }
        connection.map_err(|why| unreachable(&explain(&why)))
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
        let connecting = Connecting::begin(host, &peer, &address);
        let when = postcopy_of(request);
        let rate = pace::limits_of(request);
        let pacer = Arc::new(Pacer::new(rate.max.map(|rate| rate.0)));
        let target = (peer.as_str(), address.as_str());
        let trailing = template::send(host, vm, request, target, &pacer, (&tell, orders, view))?;
        let mut checked = offer::check(host, vm, streams, request.verify, (&peer, &address))?;
        checked.offer.postcopy = when != Postcopy::OnDemand;
        let dedup = template::dedup(trailing.as_ref(), request.dedup);
        tell_sharing(host, vm, dedup, &seat, (&process, &mut checked))?;
        if request.balloon {
            match balloon::size(host, vm) {
                Ok(bytes) => checked.offer.balloon = bytes,
                Err(why) => {
                    view.notice(&format!("the guest of VM {} gives no memory away: {why}", request.vm))
                }
            }
        }
        tracing::debug!(%id, phase = "pre-check", took = ?began.elapsed(), "source");
        let connection = connecting.end(began.elapsed())?;
        tracing::debug!(%id, phase = "connect", took = ?began.elapsed(), "source");
        let mut outgoing = Self::new(
            host.clone(),
            vm.clone(),
            peer.clone(),
            address,
            id,
            rate,
            tell,
            view.another(),
            process,
        );
        outgoing.began = began;
        outgoing.sharing = Sharing::at(seat, if checked.offer.common { dedup } else { Dedup::None });
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
        outgoing.pacer = pacer;
        let awaits = template::awaits(trailing.as_ref());
        outgoing.template = trailing;
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
            awaits,
        };
        Ok((outgoing, Source::new(parameters, Duration::ZERO)))
    }
}
