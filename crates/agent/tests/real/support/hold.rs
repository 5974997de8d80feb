//! Holds an agent exactly before an action (`src/hold.rs` has the other side), and freezes processes.

use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process};

use super::daemon::Daemon;
use super::scene::until;
use super::{MOVE, World};

/// What an agent that can be held says when it starts.
const CAN_BE_HELD: &str = "this program is built for tests";

/// A point at which an agent waits, from [`Hold::arm`] until it is dropped.
pub(crate) struct Hold {
    file: PathBuf,
}

impl Hold {
    pub(crate) fn arm(world: &World, agent: &Daemon, point: &str) -> Self {
        assert!(
            agent.log().contains(CAN_BE_HELD),
            "target/debug/sterna has no hold points: build it with `cargo build -p sterna --features sterna-agent/holds`"
        );
        let folder = world.path(&agent.name).join("run/hold");
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join(point);
        std::fs::write(&file, "").unwrap();
        Self { file }
    }

    /// Waits until the agent is there.
    pub(crate) fn reached(&self) {
        let reached = self.reached_file();
        until(&format!("{} is reached", self.file.display()), MOVE, || reached.exists().then_some(()));
    }

    fn reached_file(&self) -> PathBuf {
        let name = self.file.file_name().unwrap().to_str().unwrap();
        self.file.with_file_name(format!("{name}.reached"))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        drop(std::fs::remove_file(self.reached_file()));
        drop(std::fs::remove_file(&self.file));
    }
}

/// Processes that stand still until this is dropped.
pub(crate) struct Frozen(Vec<i32>);

impl Frozen {
    pub(crate) fn freeze(pids: Vec<i32>) -> Self {
        pids.iter().for_each(|pid| signal(*pid, Signal::STOP));
        Self(pids)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.iter().for_each(|pid| signal(*pid, Signal::CONT));
    }
}

/// A process that has ended meanwhile needs no signal.
fn signal(pid: i32, signal: Signal) {
    let pid = Pid::from_raw(pid).unwrap();
    let _ = kill_process(pid, signal);
}
