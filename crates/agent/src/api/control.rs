//! What the API needs of an agent. A trait, so that the API and the command can be tested without a host.

use crate::model::{
    GangRequest, GangView, HostView, MigrateRequest, MigrationView, PushRequest, PushView, RecoverRequest,
    RecoverView, RunRequest, SetRequest, TemplateRequest, TemplateView, VmView, WorkingSetEvent,
    WorkingSetRequest,
};
use crate::{Agent, AgentError};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// An agent, as the API sees it. All methods may block.
pub trait Control: Send + Sync + 'static {
    /// Name of this host.
    fn name(&self) -> String;
    /// Starts a VM.
    fn run(&self, request: RunRequest) -> Result<VmView, AgentError>;
    /// All VMs.
    fn vms(&self) -> Vec<VmView>;
    /// The same, with what memory each uses: that takes milliseconds for each gigabyte.
    fn vms_with_memory(&self) -> Vec<VmView>;
    /// One VM.
    fn vm(&self, name: &str) -> Result<VmView, AgentError>;
    /// Ends a VM and forgets it.
    fn stop(&self, name: &str) -> Result<(), AgentError>;
    /// Decides where an unresolved VM runs.
    fn recover(&self, name: &str, request: RecoverRequest) -> Result<RecoverView, AgentError>;
    /// Measures what a VM writes, until the receiver is dropped or the last event was sent.
    fn measure(
        &self,
        name: &str,
        request: WorkingSetRequest,
    ) -> Result<mpsc::Receiver<WorkingSetEvent>, AgentError>;
    /// Hosts.
    fn hosts(&self) -> Vec<HostView>;
    /// Templates.
    fn templates(&self) -> Vec<TemplateView>;
    /// One template.
    fn template(&self, name: &str) -> Result<TemplateView, AgentError>;
    /// Makes a template of a VM.
    fn make_template(&self, request: TemplateRequest) -> Result<TemplateView, AgentError>;
    /// Looks whether a VM could become a template.
    fn check_template(&self, request: TemplateRequest) -> Result<(), AgentError>;
    /// Sends a template to another host.
    fn push_template(&self, name: &str, request: PushRequest) -> Result<PushView, AgentError>;
    /// Removes a template.
    fn remove_template(&self, name: &str) -> Result<(), AgentError>;
    /// Begins a migration; a repeated `key` returns the first one's.
    fn migrate(
        self: Arc<Self>,
        request: MigrateRequest,
        key: Option<String>,
    ) -> Result<MigrationView, AgentError>;
    /// Begins several that leave together.
    fn migrate_together(
        self: Arc<Self>,
        request: GangRequest,
        key: Option<String>,
    ) -> Result<GangView, AgentError>;
    /// Migrations, the newest first.
    fn migrations(&self) -> Vec<MigrationView>;
    /// Figures of a migration as they change; the last one is final.
    fn watch(&self, id: &str) -> Result<watch::Receiver<MigrationView>, AgentError>;
    /// Cancels a migration.
    fn cancel(&self, id: &str) -> Result<(), AgentError>;
    /// Switches a migration to post-copy.
    fn postcopy(&self, id: &str) -> Result<(), AgentError>;
    /// Changes a migration that goes on.
    fn set(&self, id: &str, request: SetRequest) -> Result<(), AgentError>;
}

impl Control for Agent {
    fn name(&self) -> String {
        self.name().to_owned()
    }
    fn run(&self, request: RunRequest) -> Result<VmView, AgentError> {
        self.run(request)
    }
    fn vms(&self) -> Vec<VmView> {
        self.vms()
    }
    fn vms_with_memory(&self) -> Vec<VmView> {
        self.vms_with_memory()
    }
    fn vm(&self, name: &str) -> Result<VmView, AgentError> {
        self.vm(name)
    }
    fn stop(&self, name: &str) -> Result<(), AgentError> {
        self.stop(name)
    }
    fn recover(&self, name: &str, request: RecoverRequest) -> Result<RecoverView, AgentError> {
        self.recover(name, request)
    }
    fn measure(
        &self,
        name: &str,
        request: WorkingSetRequest,
    ) -> Result<mpsc::Receiver<WorkingSetEvent>, AgentError> {
        self.measure(name, request)
    }
    fn hosts(&self) -> Vec<HostView> {
        self.hosts()
    }
    fn templates(&self) -> Vec<TemplateView> {
        self.templates()
    }
    fn template(&self, name: &str) -> Result<TemplateView, AgentError> {
        self.template(name)
    }
    fn make_template(&self, request: TemplateRequest) -> Result<TemplateView, AgentError> {
        self.make_template(&request)
    }
    fn check_template(&self, request: TemplateRequest) -> Result<(), AgentError> {
        self.check_template(&request)
    }
    fn push_template(&self, name: &str, request: PushRequest) -> Result<PushView, AgentError> {
        self.push_template(name, &request)
    }
    fn remove_template(&self, name: &str) -> Result<(), AgentError> {
        self.remove_template(name)
    }
    fn migrate(
        self: Arc<Self>,
        request: MigrateRequest,
        key: Option<String>,
    ) -> Result<MigrationView, AgentError> {
        Self::migrate(&self, request, key)
    }
    fn migrate_together(
        self: Arc<Self>,
        request: GangRequest,
        key: Option<String>,
    ) -> Result<GangView, AgentError> {
        Self::migrate_together(&self, request, key)
    }
    fn migrations(&self) -> Vec<MigrationView> {
        self.migrations()
    }
    fn watch(&self, id: &str) -> Result<watch::Receiver<MigrationView>, AgentError> {
        self.watch(id)
    }
    fn cancel(&self, id: &str) -> Result<(), AgentError> {
        self.cancel(id)
    }
    fn postcopy(&self, id: &str) -> Result<(), AgentError> {
        self.postcopy(id)
    }
    fn set(&self, id: &str, request: SetRequest) -> Result<(), AgentError> {
        self.set(id, request)
    }
}
