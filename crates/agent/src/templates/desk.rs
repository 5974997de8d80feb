//! What can be asked of an agent about templates.

use super::{Entry, Template};
use crate::model::{PushRequest, PushView, RunRequest, TemplateRequest, TemplateView, VmView};
use crate::registry::Vm;
use crate::{Agent, AgentError, templates};

/// While no migration of a VM begins.
fn alone<T>(vm: &Vm, what: impl FnOnce() -> T) -> Result<T, AgentError> {
    vm.reserve("template").map_err(|job| {
        AgentError::Conflict(format!("VM {} is in migration {job}: wait for its end", vm.name()))
    })?;
    let done = what();
    vm.free();
    Ok(done)
}

impl Agent {
    /// The templates of this host, by name.
    pub fn templates(&self) -> Vec<TemplateView> {
        self.host().templates().list().iter().map(|entry| self.shown(entry)).collect()
    }

    /// One template.
    ///
    /// # Errors
    /// [`AgentError::NotFound`].
    pub fn template(&self, name: &str) -> Result<TemplateView, AgentError> {
        self.find_template(name).map(|entry| self.shown(&entry))
    }

    /// Makes a template of a VM, which stands still for as long as its memory is read, and runs on or is ended, as the request says.
    ///
    /// # Errors
    /// [`AgentError::NotFound`] for a VM that is not here, [`AgentError::Conflict`] for one that is being moved, and
    /// [`AgentError::Failed`] with every reason why it cannot become a template. The VM is as it was.
    pub fn make_template(&self, request: &TemplateRequest) -> Result<TemplateView, AgentError> {
        let vm = self.find(&request.vm)?;
        vm.measurement().give_way(&request.vm).map_err(AgentError::Conflict)?;
        let made = alone(&vm, || templates::make(self.host(), &vm, request))?;
        if request.end && !vm.is_alive() {
            self.host().registry().remove(&vm);
        }
        let entry = made.map_err(AgentError::Failed)?;
        tracing::info!(template = entry.name, digest = entry.digest, vm = request.vm, "a template was made");
        Ok(self.shown(&entry))
    }

    /// Looks whether a VM could become a template, as far as that can be told before its guest is ready.
    ///
    /// # Errors
    /// As [`Agent::make_template`].
    pub fn check_template(&self, request: &TemplateRequest) -> Result<(), AgentError> {
        let vm = self.find(&request.vm)?;
        let checked = alone(&vm, || templates::check(self.host(), &vm, request))?;
        checked.map_err(AgentError::Failed)
    }

    /// Sends a template to another host, unless it is there.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], or [`AgentError::Failed`] with the reason; what was sent is kept there for the next try.
    pub fn push_template(&self, name: &str, request: &PushRequest) -> Result<PushView, AgentError> {
        let entry = self.find_template(name)?;
        let address = self.host().address_of(&request.host).map_err(AgentError::NotFound)?;
        let target = (request.host.as_str(), address.as_str());
        let pushed = templates::push(self.host(), &entry, target, request.max_bandwidth);
        let (bytes, complete) = pushed.map_err(AgentError::Failed)?;
        Ok(PushView { name: entry.name, host: request.host.clone(), bytes, complete })
    }

    /// Removes a template that no VM of this host uses.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], or [`AgentError::Conflict`] with its clones.
    pub fn remove_template(&self, name: &str) -> Result<(), AgentError> {
        let entry = self.find_template(name)?;
        self.host().templates().remove(&entry, self.host().registry()).map_err(AgentError::Conflict)
    }

    /// Starts a clone.
    pub(crate) fn run_clone(&self, request: &RunRequest, template: &str) -> Result<VmView, AgentError> {
        if !request.argv.is_empty() {
            return Err(AgentError::Invalid("a clone has its template's command line: give none".into()));
        }
        let entry = self.find_template(template)?;
        // Held until it is listed: a template that is used cannot be removed.
        let template = self.host().templates().load(&entry.digest).map_err(AgentError::Failed)?;
        let started = templates::start(self.host(), &template, &request.name).map_err(AgentError::Failed)?;
        let vm = self.list_clone(&request.name, started, &template)?;
        tracing::info!(vm = request.name, template = template.base.name, "a clone was started");
        Ok(vm.view())
    }

    fn list_clone(
        &self,
        name: &str,
        started: templates::Started,
        template: &Template,
    ) -> Result<std::sync::Arc<Vm>, AgentError> {
        let templates::Started { qemu, argv, parts, disks } = started;
        let mut record = self.fresh_record(name, argv, &qemu);
        record.parts = parts;
        record.template = Some(template.base.used());
        let vm = Vm::new(record, Some(qemu));
        match self.host().registry().insert(&vm) {
            Ok(()) => {
                disks.keep();
                Ok(vm)
            }
            Err(why) => Err(self.abandon(&vm, &why)),
        }
    }

    fn find_template(&self, name: &str) -> Result<Entry, AgentError> {
        self.host().templates().find(name).ok_or_else(|| {
            let us = self.name();
            AgentError::NotFound(format!("host {us} has no template named {name}; see sterna template list"))
        })
    }

    fn shown(&self, entry: &Entry) -> TemplateView {
        let Entry { name, digest, manifest, created } = entry.clone();
        let used = |vm: &std::sync::Arc<Vm>| vm.record().template.is_some_and(|used| used.digest == digest);
        let clones = self.host().registry().all().iter().filter(|vm| used(vm)).map(|vm| vm.name()).collect();
        TemplateView {
            ram_bytes: manifest.main_block().bytes,
            bytes: manifest.bytes,
            qemu: manifest.qemu,
            machine: manifest.machine,
            argv: manifest.argv,
            disks: manifest.disks.into_iter().map(|disk| disk.base).collect(),
            name,
            digest,
            created,
            clones,
        }
    }
}
