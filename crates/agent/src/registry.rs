//! The VMs of this host, kept in files so that a restarted agent finds them again by pid and start time.

use crate::guest::GuestLink;
use crate::model::VmView;
use crate::working_set::Slot;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};
use sterna_engine::handoff::{Choice, MigrationId};
use sterna_memory::Region;
use sterna_vmm::qemu::Qemu;
use sterna_vmm::{Process, ProcessId, RunState, Vmm};

/// Longest name of a VM: it becomes part of the names of files, units and cgroups.
const NAME_CHARS_MAX: usize = 64;
/// How the name of a file ends that is being written.
const UNFINISHED: &str = ".new";
/// How long a look at a VM waits for whoever speaks to its QEMU just now: a command takes milliseconds.
const LOOK_WAIT: Duration = Duration::from_millis(50);
/// How long between two tries of it.
const LOOK_PAUSE: Duration = Duration::from_millis(1);
/// What a VM may be called, for people.
pub(crate) const NAME_RULE: &str = "up to 64 letters, digits, and _ . - in between";

/// Whether a VM may have this name. Peers send names too, and a name is part of paths: it must not lead anywhere.
pub(crate) fn is_usable(name: &str) -> bool {
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    first && name.len() <= NAME_CHARS_MAX && name.chars().all(usable)
}

/// What is written down about a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    /// Its name.
    pub(crate) name: String,
    /// The user's own command line, as it was given on the first host: it travels with the VM.
    pub(crate) argv: Vec<String>,
    /// Its QEMU.
    pub(crate) process: ProcessId,
    /// Folder of its socket.
    pub(crate) run_dir: PathBuf,
    /// Where QEMU's output goes.
    pub(crate) log: PathBuf,
    /// Bytes of RAM.
    pub(crate) ram_bytes: u64,
    /// Tries to migrate it, over its life.
    pub(crate) generation: u64,
    /// When it came here.
    pub(crate) since: jiff::Timestamp,
    /// True until the hand-off makes it ours.
    pub(crate) incoming: bool,
    /// The try to move it away that began last, until it is known how it ended: a second witness, beside the record.
    #[serde(default)]
    pub(crate) leaving: Option<Leaving>,
    /// What was plugged in when its QEMU started; unknown where an older version has written this.
    #[serde(default)]
    pub(crate) parts: Option<BTreeSet<String>>,
    /// Bytes that its guest is to have again, where its balloon took some for a move.
    #[serde(default)]
    pub(crate) balloon: Option<u64>,
    /// What must be known to fetch its pages, while some may be missing.
    #[serde(default)]
    pub(crate) fetch: Option<FetchRecord>,
    /// The template that it is a clone of.
    #[serde(default)]
    pub(crate) template: Option<UsedTemplate>,
}

/// The template of a clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UsedTemplate {
    /// Its name where the clone was started.
    pub(crate) name: String,
    /// BLAKE3 of its manifest, in hexadecimal.
    pub(crate) digest: String,
    /// The name of the block that is shared.
    pub(crate) block: String,
}

/// How the pages of a VM are fetched that runs here before all of them have come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FetchRecord {
    /// The number of the userfaultfd in its QEMU.
    pub(crate) remote_fd: i32,
    /// Where its blocks of RAM are: its QEMU may not be able to tell, waiting for a page itself.
    pub(crate) regions: Vec<FetchRegion>,
}

/// A block of RAM in a QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FetchRegion {
    /// Its place in the offer.
    pub(crate) place: u16,
    /// Where it begins.
    pub(crate) base: u64,
    /// Its length.
    pub(crate) bytes: u64,
    /// It maps a template, whose pages are not missing.
    #[serde(default)]
    pub(crate) template: bool,
}

impl FetchRegion {
    pub(crate) fn region(&self) -> Region {
        Region { base: self.base, bytes: self.bytes }
    }
}

/// A try to move a VM away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leaving {
    /// The migration's identity.
    pub(crate) id: String,
    /// The host it goes to.
    pub(crate) to: String,
    /// Most bytes per second on the wire: an agent that is restarted in the middle of a post-copy keeps to it.
    #[serde(default)]
    pub(crate) max_bandwidth: Option<u64>,
}

/// A VM's file: also in which boot of the host it was written. Pids and start times begin anew in the next one.
#[derive(Serialize, Deserialize)]
struct Written<Record> {
    #[serde(default)]
    boot: String,
    #[serde(flatten)]
    record: Record,
}

/// Names no process: that of an earlier boot is gone for sure.
const NO_PROCESS: ProcessId = ProcessId { pid: 0, start_time: 0 };

/// A VM of this host.
pub(crate) struct Vm {
    record: Mutex<VmRecord>,
    qemu: Mutex<Option<Qemu>>,
    migration: Mutex<Option<String>>,
    notice: Mutex<Option<String>>,
    released: Mutex<bool>,
    doubtful: Mutex<bool>,
    unresolved: Mutex<bool>,
    /// It runs elsewhere, and pages of it are still needed from here.
    serving: Mutex<bool>,
    /// QEMU's word for how the fetch of its pages goes, while some are missing.
    fetching: Mutex<Option<&'static str>>,
    /// The migration that its target was told to run the VM by, after it had asked.
    promise: Mutex<Option<MigrationId>>,
    /// Takes an operator's decision about a VM that came here and has not run yet.
    decisions: Mutex<Option<mpsc::Sender<Decision>>>,
    held: Option<Process>,
    measurement: Slot,
    guest: Arc<GuestLink>,
}

/// What an operator decides, and where to say what became of it.
pub(crate) struct Decision {
    pub(crate) choice: Choice,
    pub(crate) reply: mpsc::Sender<Result<(), String>>,
}

impl Vm {
    pub(crate) fn new(record: VmRecord, qemu: Option<Qemu>) -> Arc<Self> {
        let held = Process::open_as(record.process.pid, record.process.start_time).ok();
        Arc::new(Self {
            record: Mutex::new(record),
            qemu: Mutex::new(qemu),
            migration: Mutex::default(),
            notice: Mutex::default(),
            released: Mutex::default(),
            doubtful: Mutex::default(),
            unresolved: Mutex::default(),
            serving: Mutex::default(),
            fetching: Mutex::default(),
            promise: Mutex::default(),
            decisions: Mutex::default(),
            held,
            measurement: Slot::default(),
            guest: Arc::default(),
        })
    }

    pub(crate) fn record(&self) -> VmRecord {
        lock(&self.record).clone()
    }

    pub(crate) fn name(&self) -> String {
        lock(&self.record).name.clone()
    }

    /// The QEMU. One user at a time: a migration holds it only for the length of a command.
    pub(crate) fn qemu(&self) -> MutexGuard<'_, Option<Qemu>> {
        lock(&self.qemu)
    }

    /// It has come here and runs: listed as such from now on, though not written down yet.
    pub(crate) fn arrive(&self, qemu: Option<Qemu>) {
        *self.qemu() = qemu;
        lock(&self.record).incoming = false;
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.held.as_ref().is_some_and(|process| !process.wait_exit(std::time::Duration::ZERO))
    }

    /// Its process, held since it was found.
    pub(crate) fn held(&self) -> Option<&Process> {
        self.held.as_ref()
    }

    /// Who measures what it writes.
    pub(crate) fn measurement(&self) -> &Slot {
        &self.measurement
    }

    /// The helper inside of the guest, if there is one.
    pub(crate) fn guest(&self) -> &Arc<GuestLink> {
        &self.guest
    }

    /// The migration that has this VM, if one does.
    pub(crate) fn migration(&self) -> Option<String> {
        lock(&self.migration).clone()
    }

    /// Takes the VM for a migration; one at a time.
    pub(crate) fn reserve(&self, migration: &str) -> Result<(), String> {
        let mut holder = lock(&self.migration);
        match &*holder {
            Some(other) => Err(other.clone()),
            None => {
                *holder = Some(migration.into());
                Ok(())
            }
        }
    }

    pub(crate) fn free(&self) {
        self.guest.speak();
        *lock(&self.migration) = None;
    }

    /// Says to people what they should know of this VM.
    pub(crate) fn notify(&self, notice: Option<String>) {
        *lock(&self.notice) = notice;
    }

    /// Nobody can tell whether it is ours: it is left as it is, and people are told.
    pub(crate) fn doubt(&self, notice: String) {
        *lock(&self.doubtful) = true;
        self.notify(Some(notice));
    }

    /// Why this VM is left as it is, if nobody can tell whether it is ours.
    pub(crate) fn doubtful(&self) -> Option<String> {
        lock(&self.doubtful).then(|| lock(&self.notice).clone().unwrap_or_default())
    }

    /// Handed out, or ours again.
    pub(crate) fn set_released(&self, released: bool) {
        *lock(&self.released) = released;
        *lock(&self.unresolved) &= released;
        *lock(&self.serving) &= released;
    }

    /// It runs at its target, which needs pages of it from here.
    pub(crate) fn set_serving(&self, serving: bool) {
        *lock(&self.serving) = serving;
    }

    pub(crate) fn is_serving(&self) -> bool {
        *lock(&self.serving)
    }

    pub(crate) fn is_released(&self) -> bool {
        *lock(&self.released)
    }

    /// Its owner is not known, and a person should know that.
    pub(crate) fn set_unresolved(&self, notice: String) {
        *lock(&self.unresolved) = true;
        self.notify(Some(notice));
    }

    pub(crate) fn set_resolved(&self) {
        *lock(&self.unresolved) = false;
        self.notify(None);
    }

    /// Its pages are being fetched, or are all here.
    pub(crate) fn set_fetching(&self, word: Option<&'static str>) {
        *lock(&self.fetching) = word;
    }

    /// QEMU's word for how the fetch of its pages goes, while some are missing.
    pub(crate) fn fetching(&self) -> Option<&'static str> {
        *lock(&self.fetching)
    }

    /// Tells the target of this migration that the VM is its own. The caller holds the journal, as a fence does.
    pub(crate) fn promise(&self, id: MigrationId) {
        *lock(&self.promise) = Some(id);
    }

    /// Whether that was promised. It stands in the way once: an operator who has read it may insist.
    pub(crate) fn take_promise(&self, id: MigrationId) -> bool {
        lock(&self.promise).take_if(|promised| *promised == id).is_some()
    }

    pub(crate) fn take_decisions(&self, to: Option<mpsc::Sender<Decision>>) {
        *lock(&self.decisions) = to;
    }

    pub(crate) fn decisions(&self) -> Option<mpsc::Sender<Decision>> {
        lock(&self.decisions).clone()
    }

    /// What its QEMU says it does; nothing while a migration keeps the connection busy.
    fn ask_state(&self) -> Option<RunState> {
        let end = Instant::now() + LOOK_WAIT;
        loop {
            match self.qemu.try_lock() {
                Ok(mut qemu) => return qemu.as_mut()?.status().ok(),
                Err(_) if Instant::now() < end => std::thread::sleep(LOOK_PAUSE),
                Err(_) => return None,
            }
        }
    }

    pub(crate) fn view(&self) -> VmView {
        let record = self.record();
        let released = *lock(&self.released);
        let state = if !self.is_alive() {
            "stopped".to_owned()
        } else if record.incoming {
            "incoming".to_owned()
        } else if let Some(word) = self.fetching() {
            word.to_owned()
        } else if self.is_serving() {
            "serving".to_owned()
        } else if *lock(&self.unresolved) {
            "unresolved".to_owned()
        } else if released {
            "released".to_owned()
        } else {
            self.ask_state().map_or_else(|| "migrating".to_owned(), |state| state.to_string())
        };
        VmView {
            name: record.name,
            state,
            pid: record.process.pid,
            ram_bytes: record.ram_bytes,
            since: record.since,
            generation: record.generation,
            argv: record.argv,
            log: record.log.display().to_string(),
            template: record.template.map(|template| template.name),
            memory: None,
            migration: self.migration(),
            notice: lock(&self.notice).clone(),
            guest_helper: self.guest.helper().map(|helper| helper.view()),
        }
    }
}

/// All VMs of this host, by name.
pub(crate) struct Registry {
    folder: PathBuf,
    vms: Mutex<BTreeMap<String, Arc<Vm>>>,
    /// Names that are being started, here or by a peer, and have no VM yet.
    coming: Mutex<Vec<String>>,
}

impl Registry {
    pub(crate) fn open(folder: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir_all(&folder)?;
        remove_unfinished(&folder, UNFINISHED);
        Ok(Self { folder, vms: Mutex::default(), coming: Mutex::default() })
    }

    /// What an earlier life of the agent wrote down. Files that cannot be read are named in the log and left alone.
    pub(crate) fn written(&self) -> Vec<VmRecord> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let files =
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "json"));
        files.filter_map(|path| read(&path)).collect()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Vm>> {
        lock(&self.vms).values().cloned().collect()
    }

    pub(crate) fn find(&self, name: &str) -> Option<Arc<Vm>> {
        lock(&self.vms).get(name).cloned()
    }

    /// Takes a name for a VM that is about to start. False when a living VM or another start has it.
    pub(crate) fn claim(self: &Arc<Self>, name: &str) -> Option<Claim> {
        let (vms, mut coming) = (lock(&self.vms), lock(&self.coming));
        let taken = vms.get(name).is_some_and(|vm| vm.is_alive() || vm.migration().is_some());
        if taken || coming.iter().any(|other| other == name) {
            return None;
        }
        coming.push(name.into());
        Some(Claim { registry: self.clone(), name: name.into() })
    }

    /// Writes a VM down and lists it.
    pub(crate) fn insert(&self, vm: &Arc<Vm>) -> std::io::Result<()> {
        let record = vm.record();
        self.write(&record)?;
        lock(&self.vms).insert(record.name, vm.clone());
        Ok(())
    }

    /// Lists a VM of which nothing is written down.
    pub(crate) fn show(&self, vm: &Arc<Vm>) {
        lock(&self.vms).insert(vm.name(), vm.clone());
    }

    /// Notes that the last try to move a VM away has ended, and the VM is here.
    pub(crate) fn stayed(&self, vm: &Arc<Vm>) {
        // The record tells the same: this only spares a question after a crash that damages it.
        self.note(vm, |record| record.leaving = None);
    }

    /// Notes that a VM has come here for good.
    pub(crate) fn arrived(&self, vm: &Arc<Vm>) {
        self.note(vm, |record| record.incoming = false);
    }

    /// Notes that nothing of a VM is missing any more.
    pub(crate) fn fetched(&self, vm: &Arc<Vm>) {
        self.note(vm, |record| record.fetch = None);
    }

    /// Writes down what another record says already, unless the VM has gone meanwhile.
    fn note(&self, vm: &Arc<Vm>, change: impl FnOnce(&mut VmRecord)) {
        let listed = self.find(&vm.name()).is_some_and(|found| Arc::ptr_eq(&found, vm));
        if listed && let Err(why) = self.update(vm, change) {
            tracing::warn!(vm = vm.name(), %why, "it cannot be written down");
        }
    }

    /// Changes what is written down about a VM.
    pub(crate) fn update(&self, vm: &Vm, change: impl FnOnce(&mut VmRecord)) -> std::io::Result<()> {
        let mut record = lock(&vm.record);
        change(&mut record);
        self.write(&record)
    }

    /// Forgets a VM, its folder and its file.
    pub(crate) fn remove(&self, vm: &Vm) {
        let record = vm.record();
        lock(&self.vms).remove(&record.name);
        self.forget(&record);
    }

    /// Removes what is written down about a VM that is not listed. Its file goes last: an agent that dies in between finds
    /// the VM by it, and does the rest.
    pub(crate) fn forget(&self, record: &VmRecord) {
        for gone in [std::fs::remove_dir_all(&record.run_dir), std::fs::remove_file(self.path(&record.name))]
        {
            if let Err(why) = gone
                && why.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(vm = record.name, %why, "what is left of the VM cannot be removed");
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.json"))
    }

    fn write(&self, record: &VmRecord) -> std::io::Result<()> {
        let text = serde_json::to_vec_pretty(&Written { boot: boot_id(), record })?;
        let (path, fresh) =
            (self.path(&record.name), self.folder.join(format!("{}{UNFINISHED}", record.name)));
        std::fs::write(&fresh, text)?;
        std::fs::File::open(&fresh)?.sync_data()?;
        std::fs::rename(fresh, path)
    }
}

/// Removes what an agent that died while it wrote has left.
pub(crate) fn remove_unfinished(folder: &Path, suffix: &str) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in entries.filter(|path| path.to_string_lossy().ends_with(suffix)) {
        if let Err(why) = std::fs::remove_file(&path) {
            tracing::warn!(file = %path.display(), %why, "an unfinished file cannot be removed");
        }
    }
}

fn read(path: &Path) -> Option<VmRecord> {
    let read = std::fs::read(path).map_err(|why| why.to_string());
    let written = read
        .and_then(|text| serde_json::from_slice::<Written<VmRecord>>(&text).map_err(|why| why.to_string()));
    let Written { boot, mut record } = written
        .inspect_err(|why| {
            tracing::error!(
                file = %path.display(),
                why,
                "a VM's file cannot be read and is left alone; if its QEMU runs, `sterna ps` shows it; else remove the file"
            );
        })
        .ok()?;
    if !boot.is_empty() && boot != boot_id() {
        record.process = NO_PROCESS;
    }
    let named = path.file_stem().is_some_and(|stem| stem == record.name.as_str());
    if !named || !is_usable(&record.name) {
        tracing::error!(file = %path.display(), vm = record.name, "a VM's file has another VM's name and is left alone");
        return None;
    }
    Some(record)
}

/// Which boot of the host this is; empty where the kernel does not tell.
fn boot_id() -> String {
    let read = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    read.map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// A name that is taken until this is dropped.
pub(crate) struct Claim {
    registry: Arc<Registry>,
    name: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.registry.coming).retain(|name| *name != self.name);
    }
}

/// A poisoned lock means that a thread died while it held plain data: the data is as good as before.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
