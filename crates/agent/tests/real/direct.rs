//! Disks that are read past the host's page cache: hardware writes the guest's memory at a time of its own, unseen by whoever
//! tracks what is written (`pages/collect.rs` tells how nothing of it is lost).
//!
//! A guest reads its disk all the time and keeps what it read. Its QEMU's disk is slowed by a cgroup, below the point at which
//! the kernel has pinned the pages: so reads are in flight at every scan.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::{BOOT, World, idle, migrate, request};
use sterna_agent::model::{MigrateRequest, MigrationView, RunRequest};
use sterna_agent::{Agent, Mechanism};
use sterna_lab::guest::GuestSpec;

/// What the guest reads in one go: it fits its page cache, and a slow disk takes seconds for it.
const DISK_BYTES: u64 = 48 << 20;
/// How fast the disk is then: a read of 1 MiB takes a tenth of a second.
const DISK_BYTES_PER_SECOND: u64 = 10 << 20;
/// How many tries the mechanism's absence has to show: each has dozens of reads in flight at some scan.
const TRIES: usize = 5;

struct Scene {
    world: World,
    a: Arc<Agent>,
    b: Arc<Agent>,
    slow: Slow,
}

impl Scene {
    fn boot(mut world: World, aio: &str, without: &[Mechanism]) -> Self {
        world.without = without.to_vec();
        let (a, b) = (world.agent("a"), world.agent("b"));
        let image = world.path("disk.raw");
        let noise: Vec<u8> = (0..DISK_BYTES / 8)
            .flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        std::fs::write(&image, noise).unwrap();
        let guest = GuestSpec { programs: vec![idle()], ..world.parts.guest("vm") };
        let mut argv = world.argv_with_orders(&guest);
        let drive = format!("if=virtio,format=raw,cache=none,aio={aio},file={}", image.display());
        argv.extend(["-drive".to_owned(), drive]);
        let vm = a.run(RunRequest { name: "vm".into(), argv, template: None }).unwrap();
        world.wait_for("vm", "READY", BOOT);
        let slow = Slow::the_disk_of(&image);
        slow.add(vm.pid);
        // The console takes short lines only.
        world.order("a", "vm", "echo 'while dd if=/dev/vda of=/dev/null bs=1M skip=$1 count=12' > /tmp/read");
        world.order("a", "vm", "echo 'do echo 3 > /proc/sys/vm/drop_caches; done' >> /tmp/read");
        world.order("a", "vm", "for at in 0 12 24 36; do sh /tmp/read $at 2> /dev/null & done");
        Self { world, a, b, slow }
    }

    /// Moves the VM to the other host, in several rounds.
    fn move_from(&self, host: &str) -> MigrationView {
        let (from, to) = if host == "a" { (&self.a, &self.b) } else { (&self.b, &self.a) };
        let request = MigrateRequest { max_bandwidth: Some(50_000_000), ..request("vm", to.name()) };
        let view = migrate(from, request);
        if view.status == "completed" {
            self.slow.add(to.vm("vm").unwrap().pid);
        }
        view
    }
}

fn nothing_is_lost(version: &str, aio: &str) {
    let scene = Scene::boot(World::new(version), aio, &[]);
    for host in ["a", "b", "a"] {
        let view = scene.move_from(host);
        assert_eq!(view.status, "completed", "{view:?}");
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
        println!(
            "{aio}: {} rounds, downtime {:?}, {:?}",
            view.ram.dirty_sync_count, view.downtime, view.downtime_split
        );
    }
    scene.world.wait_for_more("vm", "LOAD", BOOT);
    assert!(!scene.world.console("vm").contains("BAD"));
    scene.b.stop("vm").unwrap();
}

#[test]
fn nothing_that_a_disk_wrote_is_lost() {
    nothing_is_lost("7.2", "native");
}

#[test]
fn nothing_that_a_disk_wrote_is_lost_by_the_newer_interface_and_qemu() {
    nothing_is_lost("10.0", "io_uring");
}

/// Shows that the test above can fail: it does when what is at risk is not sent once more.
#[test]
fn pages_that_a_disk_wrote_are_stale_without_a_second_look() {
    let scene = Scene::boot(World::new("7.2"), "native", &[Mechanism::DirectIo]);
    let mut host = "a";
    for _ in 0..TRIES {
        let view = scene.move_from(host);
        if view.status == "failed" {
            let why = view.error_desc.unwrap();
            assert!(why.contains("is not what it was at the source"), "{why}");
            return;
        }
        host = if host == "a" { "b" } else { "a" };
    }
    panic!("{TRIES} moves lost nothing");
}

/// A cgroup (v1, `blkio`) whose direct reads of a disk are slow.
struct Slow(PathBuf);

impl Slow {
    fn the_disk_of(image: &Path) -> Self {
        let dir = Path::new("/sys/fs/cgroup/blkio").join(format!("sterna-test-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("this test needs cgroup v1's blkio controller to slow a disk");
        let slow = Self(dir);
        let limit =
            format!("{} {DISK_BYTES_PER_SECOND}", whole_disk(std::fs::metadata(image).unwrap().dev()));
        std::fs::write(slow.0.join("blkio.throttle.read_bps_device"), limit).unwrap();
        slow
    }

    fn add(&self, pid: i32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // Whatever still runs there goes back to the root; the kernel lets go of it in its own time.
        for pid in std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            drop(std::fs::write("/sys/fs/cgroup/blkio/cgroup.procs", pid));
        }
        let end = Instant::now() + Duration::from_secs(10);
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// `MAJOR:MINOR` of the disk that a file is on: a partition has no limits of its own.
fn whole_disk(dev: u64) -> String {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let parent = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/../dev"));
    parent.map_or_else(|_| format!("{major}:{minor}"), |parent| parent.trim().to_owned())
}
