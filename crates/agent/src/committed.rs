//! A VM that this host committed to in an earlier life of its agent, and has not seen running.
//!
//! It is ours by its record, unless the source's operator took it back meanwhile: the source is asked before it runs, as
//! long as it takes. Where no answer is possible, an operator decides here as well ([`Decision`]).

use crate::control;
use crate::host::Host;
use crate::recovery::{go_on, go_on_fetching, kill, store};
use crate::registry::{Decision, Vm};
use crate::target::{self, Processors};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use sterna_engine::handoff::{Choice, Continuation, Journal, Ownership, Record, Step, may_continue};
use sterna_engine::wire::Message;
use sterna_engine::wire::message::Query;
use sterna_vmm::{RunState, Vmm};

/// First pause between questions to a source that does not answer; it doubles.
const ASK_PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause between questions.
const ASK_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Questions without an answer before an operator is told: a source that is restarted with us needs a moment.
const ASKED_IN_VAIN: u32 = 5;

/// Lets the VM run, now or when its source has answered.
pub(crate) fn settle(host: &Arc<Host>, vm: &Arc<Vm>, record: &Record) {
    // One with pages missing may not be able to say so: it is asked about like one that does not run.
    let runs = host.with_qemu(vm, |qemu| Ok(matches!(qemu.status()?, RunState::Running)));
    if matches!(runs, Ok(true)) {
        drop(run(host, vm, record));
        return;
    }
    if vm.reserve(&record.id.to_string()).is_err() {
        return tracing::error!(vm = vm.name(), "a VM that was just found is in use");
    }
    let (to, decisions) = mpsc::channel();
    vm.take_decisions(Some(to));
    let (host, vm, record) = (host.clone(), vm.clone(), record.clone());
    std::thread::spawn(move || {
        let (next, operator) = wait(&host, &vm, &record, &decisions);
        vm.take_decisions(None);
        vm.set_resolved();
        let done =
            if next == Continuation::Kill { end(&host, &vm, &record) } else { run(&host, &vm, &record) };
        vm.free();
        if let Some(Decision { choice, reply }) = operator {
            drop(reply.send(done.and_then(|()| agree(choice, next, &record.peer))));
        }
    });
}

/// Asks until it is known what to do; returns the operator who waits for it to be done, if one does.
fn wait(
    host: &Host,
    vm: &Vm,
    record: &Record,
    decisions: &mpsc::Receiver<Decision>,
) -> (Continuation, Option<Decision>) {
    let (mut pause, mut asked, mut operator) = (ASK_PAUSE_MIN, 0, None::<Decision>);
    loop {
        let answer = ask(host, record);
        let found = may_continue(answer.as_ref().ok().copied());
        let next = decide(found, operator.as_ref().map(|decision| decision.choice));
        if next != Continuation::Ask {
            return (next, operator);
        }
        asked += 1;
        if asked >= ASKED_IN_VAIN {
            vm.set_unresolved(notice(
                vm,
                record,
                &answer.map_or_else(|why| why, |_| "it is undecided".into()),
            ));
        }
        operator = decisions.recv_timeout(pause).ok();
        pause = (pause * 2).min(ASK_PAUSE_MAX);
    }
}

/// The source's word goes before the operator's.
fn decide(found: Continuation, choice: Option<Choice>) -> Continuation {
    match (found, choice) {
        (Continuation::Ask, Some(Choice::Here)) => Continuation::Run,
        (Continuation::Ask, Some(Choice::There)) => Continuation::Kill,
        (found, _) => found,
    }
}

fn agree(choice: Choice, next: Continuation, peer: &str) -> Result<(), String> {
    match (choice, next) {
        (Choice::Here, Continuation::Kill) => {
            Err(format!("host {peer} answers that it took the VM back: it is ended here"))
        }
        (Choice::There, Continuation::Run) => {
            Err(format!("host {peer} answers that it did not take the VM back: it runs here"))
        }
        _ => Ok(()),
    }
}

fn ask(host: &Host, record: &Record) -> Result<Ownership, String> {
    let address = host.address_of(&record.peer)?;
    let (id, generation) = (record.id.0.to_vec(), record.generation.0);
    let query = Message::Query(Query { id, vm: record.vm.clone(), generation, by_target: true });
    match control::ask(host.endpoint(), &address, &record.peer, &query)? {
        Message::Answer(answer) => Ok(answer.into()),
        _ => Err("it answered something else".into()),
    }
}

fn notice(vm: &Vm, record: &Record, why: &str) -> String {
    let (name, peer) = (vm.name(), &record.peer);
    format!(
        "it came from host {peer} and has not run here; {peer} does not say whether it took it back ({why}); it is kept \
         stopped. Start the agent of {peer} or mend the link: that settles it. If it does not run at {peer}: sterna recover \
         {name} --here"
    )
}

/// What was read may never have reached the disk: it does before the VM runs because of it.
fn run(host: &Arc<Host>, vm: &Arc<Vm>, record: &Record) -> Result<(), String> {
    let stored = host.journal().store(record).map_err(|why| why.to_string());
    if target::is_unfilled(&vm.record()) {
        stored?;
        // Told first: the source brings pages to who fetches them, and QEMU may need some to let the VM run.
        store(host, record, Step::Fetching);
        return go_on_fetching(host, vm, record, Processors::MayStand);
    }
    let resumed = stored.and_then(|()| host.with_qemu(vm, |qemu| go_on(qemu, record.activity)));
    match &resumed {
        Ok(()) => {
            store(host, record, Step::Running);
            target::let_go(host, vm);
            crate::balloon::give_back(host, vm);
        }
        Err(why) => {
            tracing::error!(vm = vm.name(), why, "the VM is ours and could not be resumed");
            vm.notify(Some(format!("it came from {} and could not be resumed: {why}", record.peer)));
        }
    }
    resumed.map_err(|why| format!("it could not be resumed here: {why}"))
}

/// The source has it: what waits here is ended, and this try never commits.
fn end(host: &Arc<Host>, vm: &Vm, record: &Record) -> Result<(), String> {
    tracing::warn!(vm = vm.name(), peer = record.peer, "the VM is its source's, and is ended here");
    *vm.qemu() = None;
    if !kill(&vm.record()) {
        return Err("its QEMU here was killed and does not end".into());
    }
    host.registry().remove(vm);
    store(host, record, Step::Dead);
    Ok(())
}
