//! What keeps a VM from becoming the template of others.

use serde_json::Value;

use super::Qemu;
use crate::types::{Code, Reason, VmmError};

impl Qemu {
    /// Every reason why no clones can be made of this VM, beside what keeps it from being moved. It may write the files in `own`: each clone
    /// has another in the place of those.
    ///
    /// # Errors
    /// As any question.
    pub fn template_reasons(&mut self, own: &[String]) -> Result<Vec<Reason>, VmmError> {
        let mut reasons = Vec::new();
        let disks = self.ask("query-block", Value::Null, "list its disks")?;
        for disk in disks.as_array().into_iter().flatten().filter(|disk| disk["inserted"]["ro"] == false) {
            let file = disk["inserted"]["file"].as_str().unwrap_or("a disk");
            if own.iter().any(|own| own == file) {
                continue;
            }
            reasons.push(Reason::new(
                Code::Disk,
                format!(
                    "it may write {file}, and its clones would write the same: have a VM booted for it (no --from) whose image is \
                     qcow2 and called after it ({{vm}} in its path), or give it that read-only (readonly=on), or no disk"
                ),
            ));
        }
        reasons.extend(self.balloon_reason()?);
        Ok(reasons)
    }

    /// What of [`Vmm::source_reasons`](crate::Vmm::source_reasons) and of [`Qemu::template_reasons`] does not depend on how far the guest is: a
    /// guest that boots has not set up its video memory yet.
    ///
    /// # Errors
    /// As any question.
    pub fn early_template_reasons(&mut self, own: &[String]) -> Result<Vec<Reason>, VmmError> {
        let mut reasons = super::precheck::lasting_reasons(self)?;
        reasons.extend(self.template_reasons(own)?);
        Ok(reasons)
    }

    /// Whether it could try to give back memory that is a template's.
    ///
    /// # Errors
    /// As any question.
    pub fn balloon_reason(&mut self) -> Result<Option<Reason>, VmmError> {
        let text = "it has a balloon, with which its clones would try to give back memory that is the template's: leave \
                    virtio-balloon away";
        Ok(self.balloon_size()?.map(|_| Reason::new(Code::Device, text)))
    }
}
