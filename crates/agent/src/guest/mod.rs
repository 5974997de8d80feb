//! The helper inside of a guest (`sterna-guest`), at the other end of a virtio-serial port of the VM.
//!
//! ```text
//! line       what is said, as text       session    one connection, without I/O: what counts, and what is too much
//! bucket     how often                   link       the socket; what a migration can ask of the guest
//! desk       who may go where            mod        one thread for the ports of all VMs
//! ```
//!
//! A guest is hostile until it proves useful: everything it can send is bounded, and nothing that it says can do more than
//! begin a migration to a host that the configuration lets it ask for. What is done for it is done as for the API's
//! clients, by the same function.
//!
//! QEMU's socket takes one client. The agent is it, as long as the VM is this host's own and runs: from the moment before the VM
//! is stopped until it runs again nothing is said, and its target connects when it has it.

mod bucket;
mod desk;
mod line;
mod link;
mod session;

pub(crate) use link::GuestLink;

use crate::Agent;
use crate::registry::{Registry, Vm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often it is looked which VMs there are.
const LOOK: Duration = Duration::from_millis(500);

/// The thread that serves all guests. It ends with this.
pub(crate) struct Guests {
    thread: Option<JoinHandle<()>>,
    stop: Option<UnixStream>,
}

impl Guests {
    /// Begins to hear the guests of an agent.
    pub(crate) fn serve(agent: &Arc<Agent>) -> std::io::Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        // The agent ends when its owner lets it go, not when this does.
        let (agent, registry) = (Arc::downgrade(agent), agent.host().registry().clone());
        let thread = std::thread::Builder::new().name("guests".into());
        let thread = thread.spawn(move || hear_all(&agent, &registry, &stopped))?;
        Ok(Self { thread: Some(thread), stop: Some(stop) })
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        drop(self.stop.take());
        // The last request may have been the last that held the agent.
        if let Some(thread) =
            self.thread.take().filter(|own| own.thread().id() != std::thread::current().id())
        {
            drop(thread.join());
        }
    }
}

/// For tests of guests: see [`GuestLink`].
#[doc(hidden)]
impl Agent {
    pub fn guest_is_there(&self, vm: &str) -> bool {
        self.host().registry().find(vm).is_some_and(|vm| vm.guest().is_there().is_some())
    }

    pub fn stun_guest(&self, vm: &str, percent: u32, for_ms: u32) -> bool {
        self.host().registry().find(vm).is_some_and(|vm| vm.guest().stun(percent, for_ms))
    }

    pub fn unstun_guest(&self, vm: &str) {
        self.host().registry().find(vm).into_iter().for_each(|vm| vm.guest().unstun());
    }

    pub fn guest_stunned(&self, vm: &str) -> Option<(u32, u32)> {
        self.host().registry().find(vm)?.guest().stunned()
    }
}

fn hear_all(agent: &Weak<Agent>, registry: &Registry, stopped: &UnixStream) {
    loop {
        let vms = registry.all();
        let now = Instant::now();
        vms.iter().for_each(|vm| keep(vm, now));
        let open: Vec<_> = vms.iter().filter_map(|vm| Some((vm, vm.guest().socket()?))).collect();
        let mut fds = vec![PollFd::new(stopped, PollFlags::IN)];
        fds.extend(open.iter().map(|(_, (socket, unsent))| {
            PollFd::new(socket, if *unsent { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN })
        }));
        let wait = Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
        if poll(&mut fds, Some(&wait)).is_err() {
            std::thread::sleep(LOOK);
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] && is_over(stopped) {
            return;
        }
        for ((vm, _), _) in open.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            for request in vm.guest().receive(&vm.name(), Instant::now()) {
                let Some(agent) = agent.upgrade() else { return };
                desk::answer(&agent, vm, &request);
            }
        }
    }
}

/// Guests of VMs that are this host's own are heard, and no others.
fn keep(vm: &Vm, now: Instant) {
    let record = vm.record();
    if record.incoming || vm.is_released() || vm.doubtful().is_some() || !vm.is_alive() {
        return vm.guest().leave();
    }
    vm.guest().keep(record.process.pid, || socket_of(record.process.pid), now);
}

/// As it was started: the path is this host's, not that of the host where the VM was born.
fn socket_of(qemu: i32) -> Option<PathBuf> {
    let line = std::fs::read(format!("/proc/{qemu}/cmdline")).ok()?;
    let argv = String::from_utf8(line).ok()?;
    let argv: Vec<String> = argv.trim_end_matches('\0').split('\0').map(str::to_owned).collect();
    sterna_vmm::qemu::port_socket(&argv, link::PORT)
}

fn is_over(mut stopped: &UnixStream) -> bool {
    stopped.read(&mut [0]).is_ok_and(|count| count == 0)
}
