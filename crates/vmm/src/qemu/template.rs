//! What keeps a VM from becoming the template of others.

use serde_json::Value;

use super::Qemu;
use crate::types::{Code, Reason, VmmError};

impl Qemu {
    /// Every reason why no clones can be made of this VM, beside what keeps it from being moved.
    ///
    /// # Errors
    /// As any question.
    pub fn template_reasons(&mut self) -> Result<Vec<Reason>, VmmError> {
        let mut reasons = Vec::new();
        let disks = self.ask("query-block", Value::Null, "list its disks")?;
        for disk in disks.as_array().into_iter().flatten().filter(|disk| disk["inserted"]["ro"] == false) {
            let file = disk["inserted"]["file"].as_str().unwrap_or("a disk");
            reasons.push(Reason::new(
                Code::Disk,
                format!(
                    "it may write {file}, and its clones would write the same: give it that read-only (readonly=on), or no disk"
                ),
            ));
        }
        if self.balloon_size()?.is_some() {
            reasons.push(Reason::new(
                Code::Device,
                "it has a balloon, with which its clones would try to give back memory that is the template's: leave \
                 virtio-balloon away",
            ));
        }
        Ok(reasons)
    }
}
