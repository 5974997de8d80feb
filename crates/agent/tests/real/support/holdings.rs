//! What agents, QEMUs and hosts hold, counted: before and after many migrations it must be the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sterna_memory::{Process, footprint};

use super::scene::{AT_REST, Scene, kinds};

/// What an agent's or a QEMU's memory may differ by, in KiB: allocators keep what they got, and a heap is never twice the
/// same. What must not be kept is far larger: the VM has 192 MiB, a sender's buffers are a MiB each.
const MEMORY_KIB_SLACK: u64 = 24 << 10;
/// Mappings that a QEMU or an agent may have more: stacks of threads and arenas of its allocator.
const MAPPINGS_SLACK: usize = 64;
/// Threads that may be more: QEMU's and the runtime's workers come and go.
const THREADS_SLACK: usize = 8;

/// One process.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// Descriptors by kind: sockets, pipes, eventfds, files by name.
    descriptors: BTreeMap<String, usize>,
    threads: usize,
    mappings: usize,
    /// Resident memory; without the guest's for a QEMU.
    memory_kib: u64,
    /// Its children that nobody has waited for.
    zombies: usize,
}

/// Both agents, the guest's QEMU, and what lies in both hosts' folders.
#[derive(Clone, Debug)]
pub(crate) struct Holdings {
    agents: [Held; 2],
    qemu: Held,
    files: Vec<PathBuf>,
}

impl Holdings {
    /// While the guest is at `a`.
    pub(crate) fn of(scene: &Scene) -> Self {
        let qemu = scene.a.vm("vm").unwrap().pid;
        let mut files: Vec<PathBuf> =
            ["a", "b"].iter().flat_map(|host| files_in(&scene.world.path(host))).collect();
        files.sort();
        Self { agents: [held(scene.a.pid()), held(scene.b.pid())], qemu: held(qemu), files }
    }

    /// Waits until nothing is held that was not before: QEMUs and runtimes give things back in their own time.
    pub(crate) fn assert_not_grown(&self, scene: &Scene) {
        let end = std::time::Instant::now() + AT_REST * 2;
        loop {
            let now = Self::of(scene);
            let grown = self.grown(&now);
            if grown.is_empty() {
                return println!("before {self:#?}\nafter {now:#?}");
            }
            assert!(std::time::Instant::now() < end, "{grown:#?}\n{}", scene.tell());
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    }

    fn grown(&self, now: &Self) -> Vec<String> {
        let names = ["agent a", "agent b", "QEMU"];
        let processes = self.agents.iter().chain([&self.qemu]).zip(now.agents.iter().chain([&now.qemu]));
        let mut grown: Vec<String> =
            processes.zip(names).flat_map(|((before, now), name)| before.grown(now, name)).collect();
        grown.extend(
            now.files.iter().filter(|file| !self.files.contains(file)).map(|file| format!("new: {file:?}")),
        );
        grown
    }
}

impl Held {
    fn grown(&self, now: &Self, name: &str) -> Vec<String> {
        let mut grown = Vec::new();
        for (kind, count) in &now.descriptors {
            let before = self.descriptors.get(kind).copied().unwrap_or_default();
            if *count > before {
                grown.push(format!("{name}: {count} descriptors of {kind} instead of {before}"));
            }
        }
        let mut compare = |what: &str, before: u64, now: u64, slack: u64| {
            if now > before + slack {
                grown.push(format!("{name}: {now} {what} instead of {before}"));
            }
        };
        compare("threads", self.threads as u64, now.threads as u64, THREADS_SLACK as u64);
        compare("mappings", self.mappings as u64, now.mappings as u64, MAPPINGS_SLACK as u64);
        compare("KiB", self.memory_kib, now.memory_kib, MEMORY_KIB_SLACK);
        compare("zombies", self.zombies as u64, now.zombies as u64, 0);
        grown
    }
}

fn held(pid: i32) -> Held {
    let footprint = footprint(&Process::open(pid).unwrap()).unwrap();
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    Held {
        descriptors: kinds(&footprint),
        threads: tasks.count(),
        mappings: footprint.mappings.len(),
        memory_kib: small_kib(&smaps),
        zombies: zombies_of(pid),
    }
}

/// Resident KiB of all mappings that are smaller than the guest's RAM.
fn small_kib(smaps: &str) -> u64 {
    const RAM_KIB: u64 = 192 << 10;
    let (mut size, mut sum) = (0, 0);
    for line in smaps.lines() {
        let number = |rest: &str| rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default();
        if let Some(rest) = line.strip_prefix("Size:") {
            size = number(rest);
        } else if let Some(rest) = line.strip_prefix("Rss:")
            && size < RAM_KIB
        {
            sum += number(rest);
        }
    }
    sum
}

fn zombies_of(parent: i32) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let stats = entries.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let zombie = |stat: &String| {
        let after = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect::<Vec<_>>());
        after.is_some_and(|fields| fields[0] == "Z" && fields[1] == parent.to_string())
    };
    stats.filter(zombie).count()
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let each = entries.flat_map(|entry| match entry.path() {
        path if path.is_dir() => files_in(&path),
        path => vec![path],
    });
    each.collect()
}

/// Scopes that were made for QEMUs that are gone.
pub(crate) fn scopes_of(pids: &[i32]) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let roots = mounts.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields[2] == "cgroup2").then(|| PathBuf::from(fields[1]).join("sterna"))
    });
    let entries = roots.flat_map(|root| std::fs::read_dir(root).into_iter().flatten().flatten());
    let ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        pids.iter().any(|pid| name.ends_with(&format!("-{pid}")))
    };
    entries.map(|entry| entry.path()).filter(ours).collect()
}
