//! Memory: what a VM that comes needs, what is promised to others, and what its QEMU uses where it was and where it is.
//!
//! What shares pages needs less than all of its RAM, as long as the sharing lasts: such a VM is let in when there is room for what it has of
//! its own, and whoever moves it is told when there would be none for the rest.

use crate::control::explain;
use crate::host::Host;
use crate::incoming::Incoming;
use crate::model::MemoryView;
use crate::pages::SourceBlock;
use sterna_engine::handoff::MigrationId;
use sterna_engine::wire::message::{self, Offer, Reason};
use sterna_memory::{Process, Usage};
use sterna_vmm::qemu::{HugePages, Room, available_bytes, target_reasons};

/// What a VM will need at its target, in bytes: what is not its template's where it is a clone, and its part of what is shared where so many leave
/// together (PSS says too little: others that share may stay). 0 is all of its RAM.
pub(crate) fn expected(
    process: &Process,
    is_clone: bool,
    leave: usize,
    blocks: &[SourceBlock],
) -> Result<u64, String> {
    if !is_clone && leave < 2 {
        return Ok(0);
    }
    let Usage { own, shared, anonymous, swapped, .. } = process.usage().map_err(|why| explain(&why))?;
    let common: u64 = blocks.iter().flat_map(|block| &block.common).map(|run| run.bytes()).sum();
    let there = if is_clone { anonymous + common } else { own + shared.div_ceil(leave as u64) };
    Ok(there + swapped)
}

/// What there is for a VM that is offered.
fn room(host: &Host, id: Option<MigrationId>) -> Room {
    Room { available: available_bytes(), promised: host.incoming().promised_but(id) }
}

/// All of a VM's RAM, without what is in huge pages: these are counted for themselves.
fn all(offer: &Offer, huge: &[HugePages]) -> u64 {
    let ram = offer.blocks.iter().fold(0u64, |sum, block| sum.saturating_add(block.bytes));
    ram.saturating_sub(huge.iter().fold(0, |sum, pages| sum.saturating_add(pages.bytes)))
}

/// What of it will be needed as far as is known. Only what shares may need less than all.
fn needed(host: &Host, offer: &Offer, huge: &[HugePages]) -> u64 {
    expected_of(offer, huge).saturating_add(host.templates().unloaded_bytes(&offer.template))
}

fn expected_of(offer: &Offer, huge: &[HugePages]) -> u64 {
    let (all, shares) = (all(offer, huge), offer.common || !offer.template.is_empty());
    if offer.expected_bytes == 0 || !shares { all } else { offer.expected_bytes.min(all) }
}

/// Promises a VM the memory that it needs, or tells why there is none.
pub(crate) fn admit(host: &Host, id: MigrationId, offer: &Offer, huge: &[HugePages]) -> Vec<Reason> {
    let bytes = needed(host, offer, huge);
    let reasons = || reasons_for(host, Some(id), bytes, huge);
    host.incoming().admit(id, (bytes, !offer.template.is_empty()), reasons)
}

/// Why there is no room for a VM of which nobody knows yet whether it comes.
pub(crate) fn reasons(host: &Host, offer: &Offer, huge: &[HugePages]) -> Vec<Reason> {
    reasons_for(host, None, needed(host, offer, huge), huge)
}

fn reasons_for(host: &Host, id: Option<MigrationId>, bytes: u64, huge: &[HugePages]) -> Vec<Reason> {
    let found = target_reasons(bytes, room(host, id), huge).into_iter();
    found.map(|found| Reason { code: crate::offer::word(&found.code), text: found.text }).collect()
}

/// What is left here, in bytes, if all that this VM shares were written: less than nothing where it could not be held. Asked before its QEMU is
/// started.
pub(crate) fn head_room(host: &Host, id: MigrationId, offer: &Offer, huge: &[HugePages]) -> i64 {
    let Room { available, promised } = room(host, Some(id));
    let left = i128::from(available.unwrap_or(0)) - i128::from(promised) - i128::from(all(offer, huge));
    i64::try_from(left).unwrap_or(i64::MIN)
}

/// What a process uses, if the kernel tells.
pub(crate) fn view_of(process: &Process) -> Option<MemoryView> {
    let Usage { rss, pss, shared, own, .. } = process.usage().ok()?;
    Some(MemoryView { rss, pss, shared, own })
}

impl From<MemoryView> for message::Memory {
    fn from(MemoryView { rss, pss, shared, own }: MemoryView) -> Self {
        Self { rss, pss, shared, own }
    }
}

impl From<message::Memory> for MemoryView {
    fn from(message::Memory { rss, pss, shared, own }: message::Memory) -> Self {
        Self { rss, pss, shared, own }
    }
}

/// What migrations that come were promised and have not taken yet.
#[derive(Debug, Default)]
pub(crate) struct Promise {
    bytes: u64,
    is_clone: bool,
    /// Its QEMU, once it waits.
    process: Option<Process>,
}

impl Promise {
    /// From now on so much is promised, to whoever takes it.
    pub(crate) fn is(&mut self, (bytes, is_clone): (u64, bool)) {
        (self.bytes, self.is_clone) = (bytes, is_clone);
    }

    pub(crate) fn starts(&mut self, process: Option<Process>) {
        self.process = process;
    }

    /// What is still to come.
    pub(crate) fn left(&self) -> u64 {
        let taken = self.process.as_ref().and_then(|process| process.resident().ok());
        let taken = taken.map_or(0, |resident| if self.is_clone { resident.private } else { resident.all });
        self.bytes.saturating_sub(taken)
    }
}

impl Incoming {
    /// What other migrations than this one, if it is one, were promised and have not taken yet, in bytes.
    fn promised_but(&self, id: Option<MigrationId>) -> u64 {
        self.promises(|of| Some(of) != id).iter().fold(0, |sum, left| sum.saturating_add(*left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sterna_engine::wire::message::Block;

    fn offer(expected_bytes: u64) -> Offer {
        let block = |bytes| Block { name: "ram".into(), bytes, travels: true };
        let blocks = vec![block(3 << 30), block(1 << 30)];
        Offer { blocks, expected_bytes, common: true, ..Offer::default() }
    }

    #[test]
    fn what_shares_needs_what_it_has_of_its_own() {
        assert_eq!(expected_of(&offer(0), &[]), 4 << 30);
        assert_eq!(expected_of(&offer(1 << 20), &[]), 1 << 20);
        assert_eq!(expected_of(&offer(u64::MAX), &[]), 4 << 30, "no more than all of it");
        let alone = Offer { common: false, ..offer(1 << 20) };
        assert_eq!(expected_of(&alone, &[]), 4 << 30, "what shares nothing is not believed");
        let huge = HugePages { bytes: 3 << 30, page_bytes: 2 << 20 };
        assert_eq!(expected_of(&offer(0), &[huge]), 1 << 30);
    }

    #[test]
    fn what_was_taken_is_promised_no_more() {
        let mut promise = Promise::default();
        assert_eq!(promise.left(), 0);
        promise.is((1 << 40, false));
        assert_eq!(promise.left(), 1 << 40);
        let us = Process::open(i32::try_from(std::process::id()).unwrap()).unwrap();
        promise.starts(Some(us));
        let all = promise.left();
        assert!(all < 1 << 40);
        promise.is((1 << 40, true));
        assert!(promise.left() > all, "a template was there before, and who takes it is known still");
    }
}
