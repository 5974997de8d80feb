//! Whether there is memory for a VM that comes.

use super::{Arriving, reasons_against};
use crate::room::{self, Promise};
use sterna_engine::target::TargetInput;
use sterna_engine::wire::message::{Offer, Reason};
use sterna_vmm::qemu::HugePages;

impl Arriving<'_> {
    /// Looks what speaks against the VM, and claims its name and its memory if nothing does.
    pub(super) fn check(&mut self, offer: Offer) -> TargetInput {
        self.offer = offer;
        self.incoming.supersede(self.id, &self.offer);
        let (mut reasons, huge) = reasons_against(&self.host, &self.offer);
        reasons.extend(self.admit(huge));
        if reasons.is_empty() {
            self.claim = self.host.registry().claim(&self.offer.vm);
            if self.claim.is_none() {
                let text =
                    format!("host {} has or awaits a VM named {} already", self.host.name(), self.offer.vm);
                reasons.push(Reason { code: "name-taken".into(), text });
            }
        }
        if reasons.is_empty() { TargetInput::Admitted } else { TargetInput::Refused(reasons) }
    }

    /// Promises the VM the memory that it needs, or tells why there is none.
    fn admit(&mut self, huge: Vec<HugePages>) -> Vec<Reason> {
        self.huge = huge;
        self.head_room = room::head_room(&self.host, self.id, &self.offer, &self.huge);
        let bytes = room::needed(&self.host, &self.offer, &self.huge);
        let reasons = || room::reasons(&self.host, Some(self.id), &self.offer, &self.huge);
        self.incoming.admit(self.id, Promise::of(bytes, !self.offer.template.is_empty()), reasons)
    }

    /// A VM that was to share with others shares nothing here: there must be room for all of it.
    pub(super) fn admit_whole(&mut self) -> Option<Vec<Reason>> {
        if self.offer.expected_bytes == 0 || !self.offer.template.is_empty() {
            return None;
        }
        self.offer.expected_bytes = 0;
        let bytes = room::needed(&self.host, &self.offer, &self.huge);
        let reasons = self.incoming.admit(self.id, Promise::of(bytes, false), || {
            room::reasons(&self.host, Some(self.id), &self.offer, &self.huge)
        });
        let process = self.qemu.as_ref().and_then(|qemu| super::process_of(qemu).ok());
        self.incoming.starts(self.id, process);
        (!reasons.is_empty()).then_some(reasons)
    }
}
