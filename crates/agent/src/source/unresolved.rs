//! A VM that was released and whose target has not said that it runs it: the question, the operator, the fence.

use super::{Handle, Outgoing};
use crate::control;
use crate::host::Host;
use crate::model::MigrateRequest;
use crate::progress::View;
use crate::registry::Vm;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use sterna_engine::handoff::{Journal, Record};
use sterna_engine::policy::RateLimits;
use sterna_engine::source::{Outcome, SourceInput};
use sterna_engine::units::Rate;
use sterna_engine::wire::Message;
use sterna_engine::wire::message::Query;
use sterna_engine::{Source, Step};

/// Finds the owner of a VM that an earlier life of this agent has released.
pub(crate) fn resolve(
    host: &Arc<Host>,
    vm: &Arc<Vm>,
    record: &Record,
    done: impl FnOnce() + Send + 'static,
) -> Handle {
    let (tell, events) = mpsc::channel();
    let request = MigrateRequest::new(&record.vm, &record.peer);
    let (view, watch) = View::new(host.name(), vm, &request, record.id);
    let handle = Handle { view: watch, orders: tell.clone() };
    let (host, vm, record) = (host.clone(), vm.clone(), record.clone());
    std::thread::spawn(move || {
        let machine = Source::recover(&record, Duration::ZERO);
        let mut view = view;
        // Released is not ours: it is stopped here, and may run there; served is there.
        view.stopping();
        let max = vm.record().leaving.and_then(|leaving| leaving.max_bandwidth);
        view.came_back(record.step == Step::Serving, max);
        let process = match host.process_of(&vm) {
            Ok(process) => process,
            Err(why) => {
                done();
                return view.finish(&Outcome::Stranded(why));
            }
        };
        let address = host.address_of(&record.peer).unwrap_or_default();
        let mut outgoing = Outgoing::new(
            host,
            vm,
            record.peer.clone(),
            address,
            record.id,
            RateLimits { max: max.map(Rate), ..RateLimits::default() },
            tell,
            view,
            process,
        );
        outgoing.activity = record.activity;
        if record.step == Step::Serving {
            let host = outgoing.host.name();
            outgoing.view.notice(&format!(
                "the agent of {host} was restarted in the middle: its figures are of what came after, its downtime is not known, and RAM is \
                 not proved equal, also if that was asked for"
            ));
        }
        let outcome = outgoing.drive(machine, &events);
        done();
        outgoing.view.finish(&outcome);
    });
    handle
}

impl Outgoing {
    /// A fence changes the VM's generation, and its failure changes it back. The lower number is never the only one that
    /// is written: a restarted agent believes a record of the VM's generation or a higher one.
    pub(super) fn store(&self, record: &Record) -> Result<(), String> {
        let (known, generation) = (self.vm.record().generation, record.generation.0);
        let count = || {
            let updated = self.host.registry().update(&self.vm, |vm| vm.generation = generation);
            updated.map_err(|why| format!("VM {} cannot be written down: {why}", record.vm))
        };
        if generation < known {
            count()?;
        }
        let mut journal = self.host.journal();
        if record.step == Step::Fenced && self.vm.take_promise(record.id) {
            let peer = &self.peer;
            return Err(format!(
                "host {peer} came back and was told that the VM is its own; see whether it runs there (sterna ps on {peer}), \
                 and repeat this if it does not and {peer} is dead"
            ));
        }
        journal.store(record).map_err(|why| why.to_string())?;
        drop(journal);
        if generation > known { count() } else { Ok(()) }
    }

    pub(super) fn ask(&mut self) -> SourceInput {
        let generation = self.vm.record().generation;
        let query = Query { id: self.id.0.to_vec(), vm: self.vm.name(), generation, by_target: false };
        self.no_answer.clear();
        let answer = self.ask_peer(&Message::Query(query));
        if let SourceInput::AskFailed(why) = &answer {
            self.no_answer = format!(" ({why})");
        }
        answer
    }

    fn ask_peer(&self, query: &Message) -> SourceInput {
        match control::ask(self.host.endpoint(), &self.address, &self.peer, query) {
            Ok(Message::Answer(answer)) => SourceInput::Answered(answer.into()),
            Ok(_) => SourceInput::AskFailed("the target answered something else".into()),
            Err(why) => SourceInput::AskFailed(why),
        }
    }

    /// What a person should know, and do.
    pub(super) fn tell_unresolved(&self) {
        let (name, peer, why) = (self.vm.name(), &self.peer, &self.no_answer);
        let notice = format!(
            "it was handed to host {peer}, which does not say whether it runs it{why}; it is kept stopped here. Start the \
             agent of {peer} or mend the link: that settles it. If {peer} is lost for good: sterna recover {name} --here"
        );
        self.view.unresolved(&notice);
        self.vm.set_unresolved(notice);
    }
}
