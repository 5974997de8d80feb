//! A [`Vmm`] in memory, for tests of whatever drives one: it keeps QEMU's rules, and fails where a test says so.
//!
//! A [`FakeHandle`] stays with the test while the VM is driven elsewhere. Two fakes can share a [`FakeDisk`], whose
//! lock shows who owns the VM: two owners at once panic, as no test must go on after that.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Vmm;
use crate::process::ProcessId;
use crate::types::{Fingerprint, Glance, Layout, LentFd, Reason, RunState, SaveTicket, Shape, VmmError};

/// What a fake VM is and has been through.
#[derive(Debug)]
pub struct FakeState {
    /// What it does.
    pub run_state: RunState,
    /// Its process: a test may name a real one, whose memory is then moved.
    pub process_id: ProcessId,
    /// Its RAM blocks.
    pub layout: Layout,
    /// What it has in common with its twin.
    pub fingerprint: Fingerprint,
    /// Why it cannot move.
    pub reasons: Vec<Reason>,
    /// What a save returns.
    pub device_state: Vec<u8>,
    /// What was loaded, at a target.
    pub loaded: Option<Vec<u8>>,
    /// Every call in order, by its name.
    pub calls: Vec<&'static str>,
    /// Whether its process is there.
    pub alive: bool,
    /// Who may write its disk.
    pub disk: FakeDisk,
    failures: VecDeque<(&'static str, When)>,
    may_save: bool,
    stopped: bool,
    save_prepared: bool,
    load_prepared: bool,
    lent: i64,
    saves: u64,
}

/// When a scripted failure strikes: the two differ in whether the call took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The call fails and has done nothing.
    Before,
    /// The call has done its work, and only its answer is lost.
    After,
}

/// The lock on a disk that both ends see: the name of who holds it.
#[derive(Clone, Debug, Default)]
pub struct FakeDisk(Arc<Mutex<Option<u64>>>);

/// A VM in memory.
#[derive(Debug)]
pub struct FakeVmm {
    state: Arc<Mutex<FakeState>>,
}

/// The test's hold on a [`FakeVmm`] that is driven elsewhere.
#[derive(Clone, Debug)]
pub struct FakeHandle {
    state: Arc<Mutex<FakeState>>,
}

impl FakeHandle {
    /// What the VM is now; others wait meanwhile.
    pub fn state(&self) -> MutexGuard<'_, FakeState> {
        lock(&self.state)
    }

    /// Makes the next call of this name fail, once. The names are those of [`Vmm`]'s methods.
    pub fn fail(&self, operation: &'static str, when: When) {
        self.state().failures.push_back((operation, when));
    }

    /// Lets the process die, whatever it does.
    pub fn die(&self) {
        let mut state = self.state();
        state.alive = false;
        state.release_disk();
    }

    /// Whether the VM runs.
    pub fn is_running(&self) -> bool {
        let state = self.state();
        state.alive && state.run_state == RunState::Running
    }
}

impl FakeVmm {
    /// A VM that runs, on its own disk.
    pub fn running(process_id: ProcessId, layout: Layout) -> (Self, FakeHandle) {
        let (vmm, handle) = Self::new(process_id, layout, RunState::Running, FakeDisk::default());
        handle.state().may_save = true;
        handle.state().take_disk();
        (vmm, handle)
    }

    /// A target that waits for its state, on the source's disk.
    pub fn waiting(process_id: ProcessId, layout: Layout, disk: FakeDisk) -> (Self, FakeHandle) {
        Self::new(process_id, layout, RunState::Inmigrate, disk)
    }

    fn new(process_id: ProcessId, layout: Layout, run_state: RunState, disk: FakeDisk) -> (Self, FakeHandle) {
        let lines =
            layout.blocks.iter().map(|block| format!("ram {} bytes {}", block.name, block.bytes)).collect();
        let state = FakeState {
            run_state,
            process_id,
            layout,
            fingerprint: Fingerprint { lines, ..Fingerprint::default() },
            reasons: Vec::new(),
            device_state: b"the state of every device".to_vec(),
            loaded: None,
            calls: Vec::new(),
            alive: true,
            disk,
            failures: VecDeque::new(),
            may_save: false,
            stopped: false,
            save_prepared: false,
            load_prepared: false,
            lent: 0,
            saves: 0,
        };
        let state = Arc::new(Mutex::new(state));
        (Self { state: Arc::clone(&state) }, FakeHandle { state })
    }

    /// Runs `work` on the state unless the call is scripted to fail, or the process is dead.
    fn call<T>(
        &mut self,
        operation: &'static str,
        work: impl FnOnce(&mut FakeState) -> Result<T, VmmError>,
    ) -> Result<T, VmmError> {
        let mut state = lock(&self.state);
        state.calls.push(operation);
        if !state.alive {
            return Err(VmmError::Exited { operation, log: "(a fake has no log)".to_owned() });
        }
        let scripted = state.failures.iter().position(|(name, _)| *name == operation);
        let failure = scripted.and_then(|at| state.failures.remove(at)).map(|(_, when)| when);
        if failure == Some(When::Before) {
            return Err(VmmError::Scripted { operation });
        }
        let done = work(&mut state)?;
        if failure == Some(When::After) { Err(VmmError::Scripted { operation }) } else { Ok(done) }
    }
}

impl FakeState {
    fn take_disk(&mut self) {
        let me = self.identity();
        let mut owner = lock(&self.disk.0);
        assert!(owner.is_none_or(|owner| owner == me), "two VMs write one disk");
        *owner = Some(me);
    }

    fn release_disk(&mut self) {
        let me = self.identity();
        let mut owner = lock(&self.disk.0);
        if *owner == Some(me) {
            *owner = None;
        }
    }

    fn disk_is_free(&self) -> bool {
        let me = self.identity();
        lock(&self.disk.0).is_none_or(|owner| owner == me)
    }

    /// What names this fake as an owner: its address, as two fakes may share one real process.
    fn identity(&self) -> u64 {
        std::ptr::from_ref(self).addr() as u64
    }

    fn require(
        &self,
        state: RunState,
        operation: &'static str,
        detail: &'static str,
    ) -> Result<(), VmmError> {
        if self.run_state == state {
            return Ok(());
        }
        Err(VmmError::WrongState { operation, state: self.run_state.clone(), detail })
    }

    fn begin_save(&mut self) -> Result<SaveTicket, VmmError> {
        self.require(RunState::Paused, "save", "pause it first")?;
        if !self.may_save || !self.save_prepared {
            let detail = "it has not run since the last save, or the save is not prepared";
            return Err(VmmError::Order { operation: "save", detail });
        }
        self.may_save = false;
        self.release_disk();
        self.saves += 1;
        Ok(SaveTicket(self.saves))
    }

    fn take_free_disk(&mut self) -> Result<(), VmmError> {
        if !self.disk_is_free() {
            return Err(VmmError::Order {
                operation: "take the disk",
                detail: "the disk is locked by the other end",
            });
        }
        self.take_disk();
        Ok(())
    }

    fn start(&mut self) -> Result<(), VmmError> {
        if self.run_state == RunState::Inmigrate {
            let detail = "it would run by itself later; load its state first";
            return Err(VmmError::WrongState { operation: "resume", state: RunState::Inmigrate, detail });
        }
        self.take_free_disk()?;
        self.run_state = RunState::Running;
        self.stopped = false;
        self.may_save = true;
        self.save_prepared = false;
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vmm for FakeVmm {
    fn process_id(&self) -> ProcessId {
        lock(&self.state).process_id
    }

    fn status(&mut self) -> Result<RunState, VmmError> {
        self.call("status", |state| Ok(state.run_state.clone()))
    }

    fn source_reasons(&mut self) -> Result<Vec<Reason>, VmmError> {
        self.call("source_reasons", |state| Ok(state.reasons.clone()))
    }

    fn layout(&mut self) -> Result<Layout, VmmError> {
        self.call("layout", |state| Ok(state.layout.clone()))
    }

    fn fingerprint(&mut self) -> Result<Fingerprint, VmmError> {
        self.call("fingerprint", |state| Ok(state.fingerprint.clone()))
    }

    fn shape(&mut self) -> Result<Shape, VmmError> {
        let glance = self.glance()?;
        self.call("shape", |state| {
            let lasting = *blake3::hash(format!("{:?}", state.layout).as_bytes()).as_bytes();
            Ok(Shape { lasting, glance })
        })
    }

    fn glance(&mut self) -> Result<Glance, VmmError> {
        self.call("glance", |state| {
            let text = format!("{:?}", state.fingerprint);
            Ok(Glance(*blake3::hash(text.as_bytes()).as_bytes()))
        })
    }

    fn lend_fd(&mut self, _fd: BorrowedFd<'_>) -> Result<LentFd, VmmError> {
        self.call("lend_fd", |state| {
            state.lent += 1;
            Ok(LentFd { set: state.lent, number: 100 })
        })
    }

    fn take_back_fd(&mut self, _lent: LentFd) -> Result<(), VmmError> {
        self.call("take_back_fd", |state| {
            state.lent -= 1;
            Ok(())
        })
    }

    fn prepare_save(&mut self) -> Result<(), VmmError> {
        self.call("prepare_save", |state| {
            state.save_prepared = true;
            Ok(())
        })
    }

    fn reads_directly(&mut self) -> Result<bool, VmmError> {
        self.call("reads_directly", |_| Ok(false))
    }

    fn pause(&mut self) -> Result<RunState, VmmError> {
        self.call("pause", |state| {
            let before = state.run_state.clone();
            if !before.stands() {
                state.require(RunState::Running, "pause", "it neither runs nor can go on later")?;
                state.run_state = RunState::Paused;
                state.stopped = true;
            }
            state.may_save = true;
            Ok(before)
        })
    }

    fn drain(&mut self) -> Result<(), VmmError> {
        self.call("drain", |_| Ok(()))
    }

    fn restore(&mut self) -> Result<(), VmmError> {
        self.call("restore", |state| if state.stopped { state.start() } else { state.take_free_disk() })
    }

    fn take_disks(&mut self) -> Result<(), VmmError> {
        self.call("take_disks", FakeState::take_free_disk)
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.call("resume", FakeState::start)
    }

    fn save_begin(&mut self) -> Result<SaveTicket, VmmError> {
        self.call("save_begin", FakeState::begin_save)
    }

    fn save_finish(&mut self, ticket: SaveTicket) -> Result<Vec<u8>, VmmError> {
        self.call("save_finish", |state| {
            if ticket.0 != state.saves {
                let detail = "this save is not the one that goes on";
                return Err(VmmError::Order { operation: "finish a save", detail });
            }
            Ok(state.device_state.clone())
        })
    }

    fn prepare_load(&mut self) -> Result<(), VmmError> {
        self.call("prepare_load", |state| {
            state.require(RunState::Inmigrate, "prepare_load", "only a waiting QEMU can be loaded")?;
            state.load_prepared = true;
            Ok(())
        })
    }

    fn load(&mut self, device_state: &[u8]) -> Result<(), VmmError> {
        self.call("load", |state| {
            if !std::mem::take(&mut state.load_prepared) {
                return Err(VmmError::Order { operation: "load", detail: "prepare the load first" });
            }
            state.loaded = Some(device_state.to_vec());
            state.run_state = RunState::Paused;
            Ok(())
        })
    }

    fn announce(&mut self) -> Result<(), VmmError> {
        self.call("announce", |_| Ok(()))
    }

    fn quit(&mut self, _within: Duration) -> Result<(), VmmError> {
        self.call("quit", |state| {
            state.alive = false;
            state.release_disk();
            Ok(())
        })
    }
}
