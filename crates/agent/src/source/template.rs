//! A clone's template, where the target does not have it: it goes before the VM, beside it or after it.

use super::{Event, Order, Outgoing};
use crate::host::Host;
use crate::model::{Dedup, MigrateRequest, SendTemplate};
use crate::offer;
use crate::progress::View;
use crate::registry::{UsedTemplate, Vm};
use crate::templates::{self, Follower, Manners, Told};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use sterna_engine::Source;
use sterna_engine::source::{Outcome, SourceInput};
use sterna_engine::wire::message::Reason;
use sterna_transport::Pacer;

/// How often the time that passes is shown.
const LOOK: Duration = Duration::from_millis(100);

/// A template that is still on its way.
pub(super) struct Trailing {
    when: SendTemplate,
    _follower: Follower,
}

/// Whether the VM does not stop before its template is there.
pub(super) fn awaits(trailing: Option<&Trailing>) -> bool {
    trailing.is_some_and(|trailing| trailing.when != SendTemplate::After)
}

/// What is shared with others. What is in common lies over a template's pages, which are not to be missed there.
pub(super) fn dedup(trailing: Option<&Trailing>, asked: Dedup) -> Dedup {
    if trailing.is_some_and(|trailing| trailing.when == SendTemplate::After) { Dedup::None } else { asked }
}

/// Has a clone's template sent. Returns when all of it is there, or, where that is wanted, as soon as the target knows of it.
pub(super) fn send(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    request: &MigrateRequest,
    target: (&str, &str),
    pacer: &Arc<Pacer>,
    (tell, orders, view): (&mpsc::Sender<Event>, &mpsc::Receiver<Event>, &mut View),
) -> Result<Option<Trailing>, Outcome> {
    let began = Instant::now();
    let Some(used) = vm.record().template else { return Ok(None) };
    let entry = host.templates().entry(&used.digest).ok_or_else(|| {
        let (us, UsedTemplate { name, digest, .. }) = (host.name(), used);
        let text = format!(
            "host {us} does not have template {name} ({digest}), which VM {} is a clone of; on a host that has it: sterna template push \
             {name} {us}",
            vm.name()
        );
        Outcome::Refused(vec![Reason { code: "template".into(), text }])
    })?;
    let (tell, when) = (tell.clone(), request.send_template);
    let manners = if when == SendTemplate::After { Manners::Behind } else { Manners::Plain };
    let follower = templates::follow(host, &entry, target, (pacer.clone(), manners), move |told| {
        // Who hears nothing any more needs nothing.
        drop(tell.send(Event::Template(told)));
    });
    // What is not taken here the migration takes later, from the same channel.
    loop {
        match orders.recv_timeout(LOOK) {
            Ok(Event::Template(Told::Over(how))) => return how.map(|()| None).map_err(Outcome::Failed),
            Ok(Event::Template(Told::Sent { bytes, of })) => view.template_sent(bytes, of),
            Ok(Event::Template(Told::Agreed { complete: false })) => {
                // Whatever else speaks against the move is told before a byte of it goes.
                offer::check_there(host, vm, request.verify, target)?;
                follower.wants();
                if when != SendTemplate::Before {
                    return Ok(Some(Trailing { when, _follower: follower }));
                }
            }
            Ok(Event::Order(Order::Cancel)) => return Err(Outcome::Cancelled),
            Ok(_) | Err(_) => {}
        }
        view.elapsed(began.elapsed());
    }
}

impl Outgoing {
    /// What becomes of the template that is still on its way.
    pub(super) fn on_template(&mut self, machine: &mut Source, told: Told) {
        let lost = match told {
            Told::Agreed { .. } => return,
            Told::Sent { bytes, of } => return self.view.template_sent(bytes, of),
            Told::Over(how) => how.err(),
        };
        self.template = None;
        match lost {
            None => self.feed(machine, SourceInput::Arrived),
            Some(why) if machine.is_postcopy() => self.view.notice(&format!(
                "{why}: the pages that it lacks go with the VM's own, and it cannot move on from there before the template is there: on \
                 host {}: sterna template push {} {}",
                self.host.name(),
                self.vm.record().template.map(|used| used.name).unwrap_or_default(),
                self.peer
            )),
            Some(why) => self.feed(machine, SourceInput::Failed(why)),
        }
    }
}
