//! Two agents as processes and a guest that watches its own memory, and what must hold after every fault.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;
use sterna_agent::model::{MigrateRequest, MigrationView};
use sterna_lab::guest::{Disk, GuestSpec, Program};
use sterna_lab::qmp::Qmp;
use sterna_memory::{Footprint, Process, footprint};

use super::daemon::Daemon;
use super::{BOOT, World, pids_naming, request, tail};

/// How soon after a fault, and the restart of who died of it, everything must be at rest.
pub(crate) const AT_REST: Duration = Duration::from_secs(20);
/// Mappings of this size are RAM or code, and must stay as they were; smaller ones are QEMU's own heap and stacks.
const MAPPING_BYTES_MIN: u64 = 16 << 20;
/// How `VmFlags` names a mapping that a userfaultfd is registered on (Documentation/filesystems/proc.rst).
const UFFD_FLAGS: [&str; 3] = ["um", "uw", "ui"];

/// Waits until `look` sees something.
pub(crate) fn until<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + within;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < end, "not in {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether the target has a QEMU, and more than so many bytes have gone.
pub(crate) fn taken(view: &MigrationView, bytes: u64) -> bool {
    view.target_setup_time.is_some() && view.ram.transferred > bytes
}

/// A guest named `vm` somewhere on hosts `a` and `b`.
pub(crate) struct Scene {
    pub(crate) a: Daemon,
    pub(crate) b: Daemon,
    pub(crate) world: World,
}

impl Scene {
    /// Boots the guest at `a`.
    pub(crate) fn boot(world: World) -> Self {
        let spec = guest(&world);
        Self::boot_with(world, spec.programs)
    }

    /// The same with a guest that runs these programs.
    pub(crate) fn boot_with(world: World, programs: Vec<Program>) -> Self {
        let (a, b) = (Daemon::start(&world, "a"), Daemon::start(&world, "b"));
        let scene = Self { a, b, world };
        scene.boot_at_a_with(programs);
        scene
    }

    /// The same with a guest that has a balloon.
    pub(crate) fn boot_with_balloon(world: World) -> Self {
        let (a, b) = (Daemon::start(&world, "a"), Daemon::start(&world, "b"));
        let extra = ["-device", "virtio-balloon-pci"].map(str::to_owned).to_vec();
        let argv = world.argv(&GuestSpec { extra, memory_mib: 384, ..guest(&world) });
        a.run("vm", argv).unwrap();
        world.wait_for("vm", "LOAD t=", BOOT);
        Self { a, b, world }
    }

    /// Boots it at `a` when it is nowhere.
    pub(crate) fn boot_at_a(&self) {
        self.boot_at_a_with(guest(&self.world).programs);
    }

    fn boot_at_a_with(&self, programs: Vec<Program>) {
        drop(std::fs::remove_file(self.world.serial("vm")));
        let spec = GuestSpec { programs, ..guest(&self.world) };
        self.a.run("vm", self.world.argv(&spec)).unwrap();
        self.world.wait_for("vm", "LOAD t=", BOOT);
    }

    pub(crate) fn host(&self, name: &str) -> &Daemon {
        if name == "a" { &self.a } else { &self.b }
    }

    pub(crate) fn host_mut(&mut self, name: &str) -> &mut Daemon {
        if name == "a" { &mut self.a } else { &mut self.b }
    }

    /// Moves the guest and proves that its RAM came over as it was.
    pub(crate) fn move_verified(&self, from: &str) -> MigrationView {
        let id = self.host(from).migrate(&to_the_other(from)).unwrap();
        let view = self.host(from).wait(&id);
        assert_eq!(view.status, "completed", "{view:?}\n{}", self.tell());
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
        assert_eq!(self.settle(), other(from), "{}", self.tell());
        self.assert_guest_goes_on();
        view
    }

    /// Waits until exactly one host has the guest, running, and nothing of it is left at the other. Returns that host.
    pub(crate) fn settle(&self) -> &'static str {
        let end = Instant::now() + AT_REST;
        loop {
            let found = self.at_rest();
            match found {
                Ok(host) => {
                    self.assert_no_helper_stays();
                    return host;
                }
                Err(why) => assert!(Instant::now() < end, "not at rest: {why}\n{}", self.tell()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn at_rest(&self) -> Result<&'static str, String> {
        let (at_a, at_b) = (self.a.vms()?, self.b.vms()?);
        let host = match (at_a.as_slice(), at_b.as_slice()) {
            ([vm], []) if vm.state == "running" && vm.migration.is_none() => "a",
            ([], [vm]) if vm.state == "running" && vm.migration.is_none() => "b",
            _ => return Err(format!("a has {at_a:?}, b has {at_b:?}")),
        };
        let (here, there) = (self.qemus(host), self.qemus(other(host)));
        if here.len() != 1 || !there.is_empty() {
            return Err(format!("it runs at {host}; QEMUs there {here:?}, at the other host {there:?}"));
        }
        let left = self.left_at(other(host));
        if !left.is_empty() {
            return Err(format!("it runs at {host}; left at the other host: {left:?}"));
        }
        Ok(host)
    }

    /// QEMUs that a host has started.
    pub(crate) fn qemus(&self, host: &str) -> Vec<i32> {
        pids_naming(&format!("{}/run/vms/", self.world.path(host).display()))
    }

    /// SIGKILLs the only QEMU of a host.
    pub(crate) fn kill_qemu(&self, host: &str) {
        let pids = self.qemus(host);
        assert_eq!(pids.len(), 1, "host {host} has QEMUs {pids:?}");
        let process = Process::open(pids[0]).unwrap();
        process.kill().unwrap();
        assert!(process.wait_exit(AT_REST), "QEMU {pids:?} does not end");
    }

    /// What a VM that is not there has left in a host's folders.
    pub(crate) fn left_at(&self, host: &str) -> Vec<std::path::PathBuf> {
        let folders = ["run/vms", "state/vms"].map(|folder| self.world.path(host).join(folder));
        let entries = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap().flatten());
        entries.map(|entry| entry.path()).collect()
    }

    /// Other tests attach as well: a helper that was seen may run for a moment, and not for good.
    fn assert_no_helper_stays(&self) {
        let helpers = pids_of("sterna-attach");
        let gone = |pid: &i32| Process::open(*pid).is_err();
        until("no attach helper stays", AT_REST, || helpers.iter().all(gone).then_some(()));
    }

    /// The guest's own checker says that it lives, that no page was lost, and that no second never ran twice.
    pub(crate) fn assert_guest_goes_on(&self) {
        self.world.wait_for_more("vm", "LOAD", BOOT);
        self.assert_guest_is_well();
    }

    pub(crate) fn assert_guest_is_well(&self) {
        let console = self.world.console("vm");
        assert!(!console.contains("BAD"), "{console}");
        let seconds = console.lines().filter_map(|line| {
            let (time, rest) = line.strip_prefix("LOAD t=")?.split_once(' ')?;
            // A line that is not complete yet may show half a number.
            rest.contains("bad=").then(|| time.parse::<u64>().ok())?
        });
        let seconds: Vec<u64> = seconds.collect();
        assert!(seconds.is_sorted_by(|a, b| a < b), "a second passed twice: {seconds:?}\n{}", self.tell());
    }

    /// Descriptors and mappings of the guest's QEMU.
    pub(crate) fn footprint(&self, host: &str) -> Footprint {
        let pid = self.host(host).vm("vm").unwrap().pid;
        footprint(&Process::open(pid).unwrap()).unwrap()
    }

    pub(crate) fn tell(&self) -> String {
        let (console, a, b) = (self.world.console("vm"), self.a.log(), self.b.log());
        format!("console: {}\n\nlog of a: {}\n\nlog of b: {}", tail(&console), tail(&a), tail(&b))
    }
}

/// A small guest that writes all the time and checks each page.
pub(crate) fn guest(world: &World) -> GuestSpec {
    let load = ["--fill=32", "--dirty=8", "--rate=10", "--check"].map(str::to_owned).to_vec();
    let disk = world.image.clone().map(|path| Disk { path, format: "raw".into() });
    GuestSpec { programs: vec![Program::Load(load)], disk, ..world.parts.guest("vm") }
}

pub(crate) fn other(host: &str) -> &'static str {
    if host == "a" { "b" } else { "a" }
}

pub(crate) fn to_the_other(from: &str) -> MigrateRequest {
    request("vm", other(from))
}

/// What a try that came to nothing has left in QEMU; empty when nothing.
pub(crate) fn left_in_qemu(before: &Footprint, after: &Footprint) -> Vec<String> {
    let (old, new) = (kinds(before), kinds(after));
    let mut left: Vec<String> = new
        .iter()
        .filter(|(kind, count)| old.get(*kind).unwrap_or(&0) < *count)
        .map(|(kind, count)| format!("{count} descriptors of {kind} instead of {:?}", old.get(kind)))
        .collect();
    let tracked = |flags: &str| flags.split(' ').any(|flag| UFFD_FLAGS.contains(&flag));
    let large = |of: &Footprint| -> Vec<String> {
        // What nobody may touch is address space that the allocator keeps for later; the heap's end is where it says.
        let own = [" ---p ", "[heap]"];
        let lines = of.mappings.iter().filter(|m| !own.iter().any(|word| m.line.contains(word)));
        let lines = lines.filter(|m| bytes_of(&m.line) >= MAPPING_BYTES_MIN);
        lines.map(|m| format!("{} [{}]", m.line, m.flags)).collect()
    };
    left.extend(after.mappings.iter().filter(|m| tracked(&m.flags)).map(|m| format!("still tracked: {m:?}")));
    let (old, new) = (large(before), large(after));
    left.extend(new.iter().filter(|line| !old.contains(line)).map(|line| format!("new or changed: {line}")));
    left.extend(old.iter().filter(|line| !new.contains(line)).map(|line| format!("gone or changed: {line}")));
    left
}

/// Descriptors by kind: the numbers of sockets and pipes change with each connection.
pub(crate) fn kinds(of: &Footprint) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for target in of.descriptors.values() {
        let kind = target.split(":[").next().unwrap_or_default().to_owned();
        *kinds.entry(kind).or_insert(0) += 1;
    }
    kinds
}

fn bytes_of(line: &str) -> u64 {
    let range = line.split(' ').next().and_then(|range| range.split_once('-'));
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap_or_default();
    range.map_or(0, |(from, to)| number(to).saturating_sub(number(from)))
}

/// Processes whose program has this name (as the kernel keeps it: 15 characters).
fn pids_of(name: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let named = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
    };
    pids.filter(named).collect()
}

/// Asks both QEMUs all the time whether they run, and knows when they ever did at once.
pub(crate) struct Watcher {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<u32>>,
}

impl Watcher {
    pub(crate) fn start(world: &World) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let sockets = ["a", "b"].map(|host| world.path(&format!("sockets-{host}/vm.qmp")));
        let stop = over.clone();
        let thread = std::thread::spawn(move || {
            let (mut connections, mut looks) = ([None, None], 0);
            while !stop.load(Ordering::SeqCst) {
                let mut runs = |host: usize| runs(&mut connections[host], &sockets[host]);
                // `a` runs before and after `b` was seen running: then it ran meanwhile as well, or again, which is as bad.
                assert!(!(runs(0) && runs(1) && runs(0)), "both QEMUs ran");
                looks += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            looks
        });
        Self { over, thread: Some(thread) }
    }

    /// Ends it; fails when two were seen running.
    pub(crate) fn finish(mut self) {
        self.over.store(true, Ordering::SeqCst);
        let looks = self.thread.take().unwrap().join().expect("at most one QEMU runs the VM");
        assert!(looks > 0);
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

fn runs(connection: &mut Option<Qmp>, socket: &std::path::Path) -> bool {
    if connection.is_none() && socket.exists() {
        *connection = Qmp::connect(socket, Duration::from_millis(20)).ok();
    }
    let Some(qmp) = connection else { return false };
    match qmp.execute("query-status", json!({})) {
        Ok(status) => status["running"] == true,
        Err(_) => {
            *connection = None;
            false
        }
    }
}
