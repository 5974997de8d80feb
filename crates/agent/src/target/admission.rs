//! Whether there is memory for a VM that comes.

use super::{Arriving, reasons_against};
use crate::room;
use sterna_engine::target::TargetInput;
use sterna_engine::wire::message::{Offer, Reason};

impl Arriving<'_> {
    /// Looks what speaks against the VM, and claims its name and its memory if nothing does.
    pub(super) fn check(&mut self, offer: Offer) -> TargetInput {
        self.offer = offer;
        self.incoming.supersede(self.id, &self.offer);
        let (mut reasons, huge) = reasons_against(&self.host, &self.offer);
        self.head_room = room::head_room(&self.host, self.id, &self.offer, &huge);
        reasons.extend(room::admit(&self.host, self.id, &self.offer, &huge));
        self.huge = huge;
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

    /// A VM that was to share with others shares nothing here: there must be room for all of it.
    pub(super) fn admit_whole(&mut self) -> Option<Vec<Reason>> {
        if self.offer.expected_bytes == 0 || !self.offer.template.is_empty() {
            return None;
        }
        self.offer.expected_bytes = 0;
        Some(room::admit(&self.host, self.id, &self.offer, &self.huge)).filter(|reasons| !reasons.is_empty())
    }
}
