//! Memory that is short: a cgroup with a limit, and a file to swap to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::scene::{AT_REST, until};

/// In how many steps memory is taken.
const STEPS: u64 = 10;

/// A cgroup with a limit of memory.
pub(crate) struct Cage {
    folder: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Cage {
    /// Without a limit.
    pub(crate) fn new() -> Self {
        let (v1, v2) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let (root, limit, usage) = match v1.join("memory.limit_in_bytes").exists() {
            true => (v1, "memory.limit_in_bytes", "memory.usage_in_bytes"),
            false => (v2, "memory.max", "memory.current"),
        };
        drop(fs::write(v2.join("cgroup.subtree_control"), "+memory"));
        let folder = root.join(format!("sterna-test-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        Self { folder, limit, usage }
    }

    /// What is above the limit is killed, and not slow.
    pub(crate) fn without_swap(self) -> Self {
        for file in ["memory.swappiness", "memory.swap.max"] {
            drop(fs::write(self.folder.join(file), "0"));
        }
        self
    }

    pub(crate) fn limit(&self, bytes: u64) {
        self.try_limit(bytes).unwrap();
    }

    fn try_limit(&self, bytes: u64) -> std::io::Result<()> {
        fs::write(self.folder.join(self.limit), bytes.to_string())
    }

    /// Has the kernel take as much of this part of what is used, in percent, to the swap as it can, and leaves no limit.
    pub(crate) fn squeeze(&self, percent: u64) {
        let used = fs::read_to_string(self.folder.join(self.usage)).unwrap();
        let used: u64 = used.trim().parse().unwrap();
        for step in 1..=STEPS {
            // It is refused where guests touch what is taken as fast as it is.
            drop(self.try_limit(used / 100 * (100 - percent * step / STEPS)));
        }
        self.limit(1 << 40);
    }

    pub(crate) fn take_in(&self, pid: u32) {
        fs::write(self.folder.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        let outside = self.folder.parent().unwrap().join("cgroup.procs");
        drop(fs::write(outside, std::process::id().to_string()));
        until("the cgroup is empty", AT_REST, || fs::remove_dir(&self.folder).is_ok().then_some(()));
    }
}

/// A file that the machine swaps to.
pub(crate) struct Swap(tempfile::NamedTempFile);

impl Swap {
    pub(crate) fn on(mib: usize) -> Self {
        // Not in `/tmp`, which may be memory itself.
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        // Without holes, as the kernel wants it.
        for _ in 0..mib {
            std::io::Write::write_all(&mut file, &vec![0; 1 << 20]).unwrap();
        }
        file.as_file().sync_all().unwrap();
        let swap = Self(file);
        for program in ["mkswap", "swapon"] {
            swap.tell(program);
        }
        swap
    }

    fn tell(&self, program: &str) {
        let output = Command::new(program).arg(self.0.path()).output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        self.tell("swapoff");
    }
}

/// Bytes of a process that are swapped out.
pub(crate) fn swapped(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSwap:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}
