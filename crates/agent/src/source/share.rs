//! What a VM has in common with others goes first ([`crate::sharing`]).

use super::{Event, Outgoing};
use crate::model::Dedup;
use crate::pages::subtract;
use crate::sharing::{Compared, Found, Member, Room, Seat, Told, Word};
use std::sync::Arc;
use std::time::{Duration, Instant};
use sterna_engine::Source;
use sterna_engine::source::{Postcopy, SourceInput};
use sterna_engine::units::Pages;
use sterna_engine::wire::Message;
use sterna_engine::wire::common;
use sterna_engine::wire::message::{Accepted, Common};
use sterna_memory::PageRun;
use sterna_vmm::Vmm as _;

/// How often the target hears that the source is at work: it waits a minute for something to come.
const TELL_EVERY: Duration = Duration::from_secs(15);

/// How far this migration is with what its VM has in common with others.
#[derive(Default)]
pub(super) struct Sharing {
    dedup: Dedup,
    seat: Option<Seat>,
    /// How many runs the target can map: known once it has a QEMU.
    room: Arc<Room>,
    /// Whether what is in common is looked for; decided when tracking begins.
    on: bool,
    /// What was found, until there is somebody to map it.
    found: Option<Found>,
    /// Since when the target has heard nothing, as long as it is not over.
    told: Option<Instant>,
    /// What the target is to map, from when it was asked to.
    asked: Option<Found>,
    /// How many runs it has mapped, once it says so.
    mapped: Option<u32>,
    /// Which pages are not what they were taken for, once that is known.
    compared: Option<Compared>,
    /// Where no page travels before the stop: what is missing at the target all the same, and not in common.
    held: Vec<Vec<PageRun>>,
}

impl Sharing {
    /// Of a VM that has this place among others.
    pub(super) fn at(seat: Seat, dedup: Dedup) -> Self {
        Self { dedup, seat: Some(seat).filter(|_| dedup != Dedup::None), ..Self::default() }
    }

    /// Decides whether what is in common is looked for. A target that has not answered yet may be able to map it.
    pub(super) fn decide(&mut self) {
        self.on = self.dedup != Dedup::None && self.room.get() != Some(0);
    }

    /// Whether what is in common will be, or was, looked for.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// What was kept for the time after the switch of a block.
    pub(super) fn held(&self, block: usize) -> &[PageRun] {
        self.held.get(block).map_or(&[], Vec::as_slice)
    }

    /// It waits for nobody any more, and nobody for it.
    pub(super) fn leave(&mut self) {
        (self.seat, self.told, self.asked, self.mapped, self.compared) = (None, None, None, None, None);
        self.found = None;
        self.room.is(0);
    }

    pub(super) fn accepted(&mut self, accepted: &Accepted) {
        self.room.is(accepted.room.min(common::RUNS_MAX as u32));
        if accepted.room == 0 {
            self.seat = None;
        }
    }
}

impl Outgoing {
    /// Takes its place among those that leave together; what is found comes as an event.
    pub(super) fn share(&mut self) -> Result<(), String> {
        self.sharing.told = Some(Instant::now());
        let seat = self.sharing.seat.take().ok_or("it leaves with nobody")?;
        let process = self.process.try_clone().map_err(|why| crate::control::explain(&why))?;
        let blocks = self.tracked();
        let pages = self.collector()?.set().pages.clone();
        let tell = self.tell.clone();
        let member = Member {
            vm: self.vm.name(),
            process,
            blocks,
            pages,
            room: self.sharing.room.clone(),
            dedup: self.sharing.dedup,
            told: Told::by(move |word| drop(tell.send(Event::Shared(word)))),
        };
        seat.arrive(member)
    }

    /// The target hears that this one is at work still.
    pub(super) fn keep_awaiting(&mut self) {
        if self.accepted && self.sharing.told.is_some_and(|told| told.elapsed() >= TELL_EVERY) {
            self.sharing.told = Some(Instant::now());
            let pending = Message::Common(Common { pending: true, ..Common::default() });
            // One that is lost is noticed by who reads.
            drop(self.message(&pending));
        }
    }

    /// What there is in common, or why that is not known: then everything travels.
    pub(super) fn shared(&mut self, machine: &mut Source, word: Result<Word, String>) {
        if self.sharing.told.is_none() {
            return;
        }
        match word {
            // It was decided already that nothing is mapped.
            Ok(_) if self.sharing.asked.is_some() && self.sharing.compared.is_some() => {}
            Ok(Word::Found(found)) => self.sharing.found = Some(found),
            Ok(Word::Compared(compared)) => self.sharing.compared = Some(compared),
            Err(why) => {
                self.view.notice(&format!("nothing is shared: {why}"));
                if self.sharing.asked.is_none() {
                    self.sharing.found = Some(Found::default());
                }
                // What was to be mapped may be mapped: nobody knows what lies there.
                let blocks = self.tracked();
                let all = self.sharing.asked.as_ref().map(|found| found.pages(&blocks, usize::MAX));
                let different = all.unwrap_or_default();
                self.sharing.compared = Some(Compared { different, held: None });
            }
        }
        self.go_on_sharing(machine);
    }

    /// Has the target map what was found, once it has a QEMU.
    pub(super) fn go_on_sharing(&mut self, machine: &mut Source) {
        if !self.accepted || self.sharing.told.is_none() {
            return;
        }
        if self.sharing.room.get() == Some(0) && self.sharing.asked.is_none() {
            // Nobody is waited for.
            self.sharing.found = Some(Found::default());
            self.sharing.compared = Some(Compared::default());
        }
        if let Some(mut found) = self.sharing.found.take() {
            found.limit(self.sharing.room.get().unwrap_or(0) as usize);
            self.view.fallbacks(found.fallbacks, found.bytes);
            let (store, runs) = (found.store.clone(), common::encode(&found.runs));
            self.sharing.asked = Some(found);
            if let Some(lost) = self.message(&Message::Common(Common { store, runs, pending: false })) {
                return self.feed(machine, lost);
            }
        }
        if self.sharing.asked.is_some() && self.sharing.compared.is_some() {
            // From now on only the target is waited for.
            self.feed(machine, SourceInput::Sharing);
            if let Some(done) = self.both_are_known() {
                self.feed(machine, done);
            }
        }
    }

    /// The target has mapped so many runs.
    pub(super) fn mapped(&mut self, runs: u32) -> Option<SourceInput> {
        if self.sharing.asked.is_none() || self.sharing.mapped.is_some() {
            let why = "the target has mapped what nobody asked for".to_owned();
            return Some(SourceInput::Disconnected(why));
        }
        self.sharing.mapped = Some(runs);
        self.both_are_known()
    }

    /// Once it is known what is mapped, and what it is: the rest is sent.
    fn both_are_known(&mut self) -> Option<SourceInput> {
        let Sharing { mapped: Some(runs), compared: Some(_), .. } = self.sharing else { return None };
        let (asked, compared) = (self.sharing.asked.take()?, self.sharing.compared.take()?);
        self.sharing.told = None;
        Some(match self.take_out(&asked, runs as usize, &compared) {
            Ok(pages) => SourceInput::Shared(pages),
            Err(why) => SourceInput::Failed(why),
        })
    }

    fn take_out(&mut self, found: &Found, runs: usize, compared: &Compared) -> Result<Pages, String> {
        let blocks = self.tracked();
        let mapped = found.pages(&blocks, runs);
        let count = |lists: &[Vec<PageRun>]| lists.iter().flatten().map(|run| run.pages).sum::<u64>();
        let none = Vec::new();
        let same = mapped.iter().enumerate();
        let same = same.map(|(at, pages)| subtract(pages, compared.different.get(at).unwrap_or(&none)));
        let same: Vec<Vec<PageRun>> = same.collect();
        let asked: u64 = found.runs.iter().map(|run| u64::from(run.pages)).sum();
        self.view.common(count(&same), asked - count(&mapped));
        let at_once = self.lazy.when == Postcopy::AtOnce;
        let eager: Vec<bool> = blocks.iter().map(|block| self.is_eager(block)).collect();
        let collector = self.collector()?;
        // What is different is covered, and what became zero is told: something lies there.
        mapped.iter().enumerate().for_each(|(at, pages)| collector.shows_something(at, pages));
        same.iter().enumerate().for_each(|(at, pages)| collector.is_there(at, pages));
        let mut held = vec![Vec::new(); blocks.len()];
        if at_once {
            for at in (0..blocks.len()).filter(|at| !eager[*at]) {
                held[at] = collector.hold_back(at);
            }
        }
        let pages = Pages(collector.page_count());
        self.sharing.held = held;
        if at_once && pages == Pages(0) {
            // No round hides it.
            self.qemu(|qemu| qemu.prepare_save())?;
        }
        Ok(pages)
    }
}
