//! Slowing threads of the target by CPU bandwidth control, and undoing it whatever happens to the one who asked.
//!
//! The threads get a control group of their own below the process's, with a quota of processor time. Version 1 of control groups
//! allows that anywhere; version 2 in a *threaded* group (the kernel's Documentation/admin-guide/cgroup-v2.rst, "Threads"). The
//! group lasts as long as the conversation: when the asker's end of the socket closes, for whatever reason, the threads go back
//! to where they were and the group is removed.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use procfs::process::MountInfo;

use crate::attach::protocol::{Failure, KEEP_ALL};

/// Least length of a period in microseconds: short enough that a guest feels slow and not stuck.
const PERIOD_US_MIN: u64 = 20_000;
/// The least quota that the kernel takes (`min_cfs_quota_period` of kernel/sched/core.c): a small part of the time needs a longer period. The
/// smallest part that can be asked for makes it a second, which is the most that the kernel takes.
const QUOTA_US_MIN: u64 = 1_000;

/// How often the threads are moved back before the group is given up: one that is being made at that moment is missed.
const TRIES: u32 = 50;
/// Pause between these.
const PAUSE: Duration = Duration::from_millis(10);

/// Interface of control groups.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The group of slowed threads.
pub(super) struct Group {
    dir: PathBuf,
    parent: PathBuf,
    version: Version,
    threads: u64,
    /// That processor time is handed out below the process's group was our doing.
    enabled: bool,
}

impl Group {
    /// Makes the group, or takes over what a helper that was killed has left, and moves the threads into it. They have all of
    /// their time until [`Group::keep`] says otherwise.
    pub(super) fn make(pid: i32, threads: &[i32]) -> Result<Group, Failure> {
        let (mut parent, version) = parent(pid).map_err(|why| Failure::Other { detail: why })?;
        let name = format!("sterna-throttle-{pid}");
        // The process's first thread is in the group already where an earlier helper was killed.
        if parent.ends_with(&name) {
            parent.pop();
        }
        let dir = parent.join(name);
        let mut group = Group { dir, parent, version, threads: threads.len() as u64, enabled: false };
        let filled = group.fill(threads);
        filled.map(|()| group).map_err(|why| Failure::Other {
            detail: format!("its threads cannot get a control group for processor time: {why}"),
        })
    }

    fn fill(&mut self, threads: &[i32]) -> io::Result<()> {
        match fs::create_dir(&self.dir) {
            Err(why) if why.kind() != io::ErrorKind::AlreadyExists => return Err(why),
            _ => {}
        }
        if self.version == Version::Two {
            fs::write(self.dir.join("cgroup.type"), "threaded")?;
            let control = self.parent.join("cgroup.subtree_control");
            if !fs::read_to_string(&control)?.split_whitespace().any(|name| name == "cpu") {
                fs::write(control, "+cpu")?;
                self.enabled = true;
            }
        }
        self.keep(KEEP_ALL)?;
        threads.iter().try_for_each(|thread| fs::write(self.members(&self.dir), thread.to_string()))
    }

    /// Lets the threads have this part of their time, in thousandths.
    pub(super) fn keep(&self, part: u32) -> io::Result<()> {
        let (part, all) = (u64::from(part), u64::from(KEEP_ALL));
        // Rounded up: one less would be a quota that is too short.
        let period = (QUOTA_US_MIN * all).div_ceil(part.max(1)).max(PERIOD_US_MIN);
        let quota = period * part / all * self.threads;
        match (self.version, part < all) {
            (Version::One, true) => {
                // Two files: in between it has more, and never less than the kernel takes.
                fs::write(self.dir.join("cpu.cfs_quota_us"), "-1")?;
                fs::write(self.dir.join("cpu.cfs_period_us"), period.to_string())?;
                fs::write(self.dir.join("cpu.cfs_quota_us"), quota.to_string())
            }
            (Version::One, false) => fs::write(self.dir.join("cpu.cfs_quota_us"), "-1"),
            (Version::Two, true) => fs::write(self.dir.join("cpu.max"), format!("{quota} {period}")),
            (Version::Two, false) => fs::write(self.dir.join("cpu.max"), "max"),
        }
    }

    /// The file that lists a group's threads and takes new ones.
    fn members(&self, dir: &Path) -> PathBuf {
        dir.join(if self.version == Version::One { "tasks" } else { "cgroup.threads" })
    }

    /// Moves back whoever is in the group; a thread that a slowed one has made is there too.
    fn empty(&self) -> io::Result<()> {
        let home = self.members(&self.parent);
        for thread in fs::read_to_string(self.members(&self.dir))?.lines() {
            // One that has ended meanwhile is where it should be.
            let _ = fs::write(&home, thread);
        }
        fs::remove_dir(&self.dir)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = self.keep(KEEP_ALL);
        for _ in 0..TRIES {
            match self.empty() {
                Ok(()) => break,
                Err(why) if why.kind() == io::ErrorKind::NotFound => break,
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
        if self.enabled {
            let _ = fs::write(self.parent.join("cgroup.subtree_control"), "-cpu");
        }
    }
}

/// Obeys until the asker goes away: a line with a number of thousandths each, answered by `ok` or by what went wrong.
pub(super) fn obey(stream: &UnixStream, group: &Group) {
    if stream.set_read_timeout(None).is_err() {
        return;
    }
    for line in BufReader::new(stream).lines() {
        let Some(part) = line.ok().and_then(|line| line.parse::<u32>().ok()) else { return };
        let answer = match group.keep(part.clamp(1, KEEP_ALL)) {
            Ok(()) => "ok\n".to_owned(),
            Err(why) => format!("{why}\n"),
        };
        if (&*stream).write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// The control group of a process that hands out processor time.
fn parent(pid: i32) -> Result<(PathBuf, Version), String> {
    let unreadable = |why: procfs::ProcError| format!("its control groups cannot be read: {why}");
    let groups =
        procfs::process::Process::new(pid).and_then(|process| process.cgroups()).map_err(unreadable)?;
    let mounts = procfs::process::Process::myself().and_then(|me| me.mountinfo()).map_err(unreadable)?;
    let mounts: Vec<MountInfo> = mounts.into_iter().collect();
    let of = |version: Version| {
        let group = groups.0.iter().find(|group| match version {
            Version::One => group.controllers.iter().any(|name| name == "cpu"),
            Version::Two => group.hierarchy == 0,
        })?;
        let mount = mounts.iter().find(|mount| match version {
            Version::One => mount.fs_type == "cgroup" && mount.super_options.contains_key("cpu"),
            Version::Two => mount.fs_type == "cgroup2",
        })?;
        Some((place(mount, &group.pathname), version)).filter(|(dir, version)| hands_out_time(dir, *version))
    };
    of(Version::One)
        .or_else(|| of(Version::Two))
        .ok_or_else(|| "no control group of it hands out processor time (controller cpu)".to_owned())
}

fn hands_out_time(dir: &Path, version: Version) -> bool {
    match version {
        Version::One => dir.is_dir(),
        Version::Two => fs::read_to_string(dir.join("cgroup.controllers"))
            .is_ok_and(|names| names.split_whitespace().any(|name| name == "cpu")),
    }
}

/// Where a group is, below a mount that may show only a part of the tree.
fn place(mount: &MountInfo, group: &str) -> PathBuf {
    let inside = group.strip_prefix(mount.root.trim_end_matches('/')).unwrap_or(group);
    mount.mount_point.join(inside.trim_start_matches('/'))
}
