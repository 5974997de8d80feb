//! Hosts as network namespaces.
//!
//! ```text
//!   namespace a         namespace sw              namespace b          namespace client
//!   mig0 10.76.0.1 ---- m-a  brm  m-b ----------- mig0 10.76.0.2
//!        (shaped both ends)
//!   tap - brg - guest0 - g-a  brg  g-b - guest0 - brg - tap            eth0 10.77.0.1
//!                              g-client -------------------------------'
//! ```
//!
//! Where wiring is shared, `brg` is the only bridge of the switch, and what is shaped is the cable between it and a host's `brg`;
//! `mig0` ends in the latter.
//!
//! Migration traffic and guests' traffic have a network each, unless the wiring is shared. `brm` and `brg` stand in a namespace of their own, so the
//! machine itself sees no interface, only the namespaces' names, which carry the lab's. Addresses are the same in every
//! lab; several run at once and do not see each other.

use std::ffi::OsStr;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::process::ProcessId;
use crate::state::{self, Owner, State};
use crate::{LabError, run};

/// Hosts are named by letters; no scenario needs more, and the machine would not carry them.
const HOSTS_MAX: u8 = 16;
/// The queue of `tbf`, as in the project's benchmark rules: 957 Mbit/s for TCP at 1gbit.
const SHAPE: &str = "burst 256k latency 5ms";

/// What a lab is to have.
#[derive(Debug, Clone)]
pub struct LabSpec {
    /// Number of hosts, named `a`, `b`, ...
    pub hosts: u8,
    /// The rate of each host's migration link in `tc`'s words (`1gbit`), or none for an unshaped one.
    pub rate: Option<String>,
    /// Taps on each host, one for each guest that may run there.
    pub taps: u8,
    /// What migrations and guests have to do with each other on their way.
    pub wiring: Wiring,
    /// The user whose QEMU may open the taps; root's may always.
    pub tap_user: Option<u32>,
}

/// What carries migrations, and what guests' traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiring {
    /// A cable each: only the one of migrations is shaped.
    Apart,
    /// One cable for both, as in a host with one network card: it is shaped.
    Shared,
}

impl Default for LabSpec {
    fn default() -> Self {
        LabSpec { hosts: 2, rate: Some("1gbit".to_owned()), taps: 2, wiring: Wiring::Apart, tap_user: None }
    }
}

/// One host.
#[derive(Debug, Clone)]
pub struct Host {
    /// `a`, `b`, ...
    pub name: String,
    /// Its network namespace.
    pub namespace: String,
    /// Its address on the migration network.
    pub address: Ipv4Addr,
}

impl Host {
    /// The name of its tap for a guest. Hosts name them differently, as real ones do: a command line cannot just be copied.
    #[must_use]
    pub fn tap(&self, guest: u8) -> String {
        format!("{}tap{guest}", self.name)
    }
}

/// Bytes that crossed a host's migration link, headers included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkBytes {
    /// From the host.
    pub sent: u64,
    /// To the host.
    pub received: u64,
}

impl LinkBytes {
    /// What crossed between this look and a later one.
    #[must_use]
    pub fn until(self, later: LinkBytes) -> LinkBytes {
        LinkBytes { sent: later.sent - self.sent, received: later.received - self.received }
    }
}

/// A running lab. When it is dropped, or its process dies in whatever way, all that it made goes.
#[derive(Debug)]
pub struct Lab {
    state: State,
    hosts: Vec<Host>,
    /// Removes the lab when this process dies; none after it was told not to.
    reaper: Option<Child>,
}

impl Lab {
    /// Makes namespaces, links and taps. Needs root. Labs of dead owners are removed first.
    pub fn up(spec: &LabSpec) -> Result<Lab, LabError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LabError::Refused(
                "the lab makes network namespaces and needs root for it".to_owned(),
            ));
        }
        if spec.hosts > HOSTS_MAX {
            return Err(LabError::Refused(format!(
                "a lab has at most {HOSTS_MAX} hosts, {} were asked for",
                spec.hosts
            )));
        }
        state::sweep()?;
        let mut lab = Lab::named(&fresh_name(), spec.hosts)?;
        lab.start_reaper()?;
        lab.make_switch()?;
        for host in lab.hosts.clone() {
            lab.make_host(&host, spec)?;
        }
        lab.make_client()?;
        Ok(lab)
    }

    /// The lab's name, which all its namespaces begin with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.state.name
    }

    /// A directory for logs and sockets that goes with the lab.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        state::dir_of(&self.state.name)
    }

    /// A directory for one host's own files, made if it is missing; it goes with the lab.
    pub fn host_dir(&self, host: &Host) -> Result<PathBuf, LabError> {
        let path = self.dir().join(&host.name);
        std::fs::create_dir_all(&path).map_err(LabError::file("make", &path))?;
        Ok(path)
    }

    /// The hosts.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// A host by number; a scenario that asks for more than it specified has a mistake that it must hear of.
    pub fn host(&self, index: usize) -> Result<&Host, LabError> {
        let missing =
            || LabError::Refused(format!("host {index} was asked for, the lab has {}", self.hosts.len()));
        self.hosts.get(index).ok_or_else(missing)
    }

    /// The namespace in which clients of the guests run.
    #[must_use]
    pub fn client(&self) -> String {
        self.namespace("client")
    }

    /// The client's address in the guests' network.
    #[must_use]
    pub fn client_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 1)
    }

    /// The address that a guest should take.
    #[must_use]
    pub fn guest_address(&self, guest: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, guest.saturating_add(10))
    }

    /// A command that will run in one of the lab's namespaces, under the pid that it is spawned with.
    #[must_use]
    pub fn command(&self, namespace: &str, program: impl AsRef<OsStr>) -> Command {
        command_in(namespace, program)
    }

    /// Bytes over a host's migration link since the lab came up.
    pub fn link_bytes(&self, host: &Host) -> Result<LinkBytes, LabError> {
        let text = run::line(&format!("ip -n {} -s -j link show dev mig0", host.namespace), run::QUICK)?;
        let links: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| LabError::unexpected("`ip -j`", e.to_string()))?;
        let bytes = |way: &str| links.pointer(&format!("/0/stats64/{way}/bytes"))?.as_u64();
        match (bytes("tx"), bytes("rx")) {
            (Some(sent), Some(received)) => Ok(LinkBytes { sent, received }),
            _ => Err(LabError::unexpected("the counters of mig0", text)),
        }
    }

    /// Cuts a host's migration link, or joins it again. Where the wiring is shared there is no such link.
    pub fn set_link(&self, host: &Host, link: Cable) -> Result<(), LabError> {
        let word = match link {
            Cable::Plugged => "up",
            Cable::Unplugged => "down",
        };
        self.ip(&self.namespace("sw"), &format!("link set m-{} {word}", host.name))
    }

    /// Leaves the lab to whoever takes it down by name: it outlives this process.
    pub fn detach(mut self) -> Result<String, LabError> {
        self.state.owner = Owner::Detached;
        self.state.processes.clear();
        self.state.save()?;
        self.dismiss_reaper();
        let name = self.state.name.clone();
        // All that is left to do on drop is the removal, which must not happen.
        self.state.namespaces.clear();
        self.state.name.clear();
        Ok(name)
    }

    /// Removes everything. Dropping does the same but cannot report an error.
    pub fn down(mut self) -> Result<(), LabError> {
        self.remove()
    }

    fn named(name: &str, hosts: u8) -> Result<Lab, LabError> {
        let own = ProcessId::of(std::process::id())
            .ok_or_else(|| LabError::unexpected("/proc/self/stat", "not readable"))?;
        let hosts: Vec<Host> = (0..hosts).map(|i| host(name, i)).collect();
        let others = ["sw", "client"].map(|n| format!("{name}-{n}"));
        let namespaces = hosts.iter().map(|h| h.namespace.clone()).chain(others).collect();
        let state =
            State { name: name.to_owned(), owner: Owner::Process(own), namespaces, processes: Vec::new() };
        state.save()?;
        let lab = Lab { state, hosts, reaper: None };
        std::fs::create_dir_all(lab.dir()).map_err(LabError::file("make", lab.dir()))?;
        Ok(lab)
    }

    /// A shell that waits for the end of its input, which is the end of this process, and then removes the lab: that works
    /// for Ctrl-C, for panics and for SIGKILL alike, and needs no signal handler in whoever uses the lab.
    fn start_reaper(&mut self) -> Result<(), LabError> {
        let mut command = Command::new("sh");
        command
            .args(["-c", REAPER, "lab-reaper"])
            .arg(state::dir_of(self.name()))
            .arg(state::file_of(self.name()));
        command
            .args(&self.state.namespaces)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // In a process group of its own, so that Ctrl-C does not end it together with its owner.
        command.process_group(0).current_dir("/");
        let child = command.spawn().map_err(|source| LabError::Start { command: "sh".to_owned(), source })?;
        self.state.processes = ProcessId::of(child.id()).into_iter().collect();
        self.reaper = Some(child);
        self.state.save()
    }

    fn dismiss_reaper(&mut self) {
        let Some(mut reaper) = self.reaper.take() else { return };
        if let Some(mut input) = reaper.stdin.take() {
            // If it was killed, nobody listens, and nobody needs to be told.
            let _ = input.write_all(b"done\n");
        }
        let _ = reaper.wait();
    }

    fn make_switch(&self) -> Result<(), LabError> {
        let switch = self.namespace("sw");
        add_namespace(&switch)?;
        for bridge in ["brm", "brg"] {
            self.add_bridge(&switch, bridge)?;
        }
        Ok(())
    }

    fn make_host(&self, host: &Host, spec: &LabSpec) -> Result<(), LabError> {
        let (switch, here) = (self.namespace("sw"), &host.namespace);
        add_namespace(here)?;
        self.add_bridge(here, "brg")?;
        let (migrations, guests) = (format!("m-{}", host.name), format!("g-{}", host.name));
        self.add_cable(&guests, "brg", here, "guest0")?;
        self.ip(here, "link set guest0 master brg")?;
        let (near, far) = match spec.wiring {
            Wiring::Apart => {
                self.add_cable(&migrations, "brm", here, "mig0")?;
                ("mig0", migrations)
            }
            Wiring::Shared => {
                // A cable from the host to its own bridge: its counters are those of migrations alone.
                self.ip(here, &format!("link add mig0 type veth peer name {migrations}"))?;
                self.ip(here, &format!("link set {migrations} master brg up"))?;
                self.ip(here, "link set mig0 up")?;
                ("guest0", guests)
            }
        };
        self.ip(here, &format!("addr add {}/24 dev mig0", host.address))?;
        if let Some(rate) = &spec.rate {
            shape(here, near, rate)?;
            shape(&switch, &far, rate)?;
        }
        (0..spec.taps).try_for_each(|guest| self.add_tap(host, guest, spec.tap_user))
    }

    fn make_client(&self) -> Result<(), LabError> {
        let client = self.client();
        add_namespace(&client)?;
        self.add_cable("g-client", "brg", &client, "eth0")?;
        self.ip(&client, &format!("addr add {}/24 dev eth0", self.client_address()))
    }

    /// A pair of interfaces: one end in a bridge of the switch, the other in a namespace.
    fn add_cable(&self, port: &str, bridge: &str, namespace: &str, name: &str) -> Result<(), LabError> {
        let switch = self.namespace("sw");
        self.ip(&switch, &format!("link add {port} type veth peer name {name} netns {namespace}"))?;
        self.ip(&switch, &format!("link set {port} master {bridge} up"))?;
        self.ip(namespace, &format!("link set {name} up"))
    }

    /// Without spanning tree and its delay, so that a port forwards from its first moment.
    fn add_bridge(&self, namespace: &str, name: &str) -> Result<(), LabError> {
        self.ip(
            namespace,
            &format!("link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"),
        )?;
        self.ip(namespace, &format!("link set {name} up"))
    }

    fn add_tap(&self, host: &Host, guest: u8, user: Option<u32>) -> Result<(), LabError> {
        let (tap, user) = (host.tap(guest), user.map_or(String::new(), |u| format!("user {u}")));
        self.ip(&host.namespace, &format!("tuntap add dev {tap} mode tap {user}"))?;
        self.ip(&host.namespace, &format!("link set {tap} master brg up"))
    }

    fn ip(&self, namespace: &str, words: &str) -> Result<(), LabError> {
        run::line(&format!("ip -n {namespace} {words}"), run::QUICK).map(drop)
    }

    fn namespace(&self, part: &str) -> String {
        format!("{}-{part}", self.state.name)
    }

    fn remove(&mut self) -> Result<(), LabError> {
        if self.state.name.is_empty() {
            return Ok(());
        }
        self.dismiss_reaper();
        self.state.processes.clear();
        self.state.remove()?;
        self.state.name.clear();
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("the lab could not be removed ({error}): run `sterna-lab down`");
        }
    }
}

/// The state of a host's migration link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cable {
    /// As it was made.
    Plugged,
    /// Nothing passes, and neither end is told.
    Unplugged,
}

/// A command that will run in a network namespace. `nsenter` and not `ip netns exec`: the latter mounts a new /sys over the
/// old one, and with it hides the cgroups in which an agent keeps its virtual machines. Both replace themselves by the
/// program, so that the pid is the program's.
#[must_use]
pub fn command_in(namespace: &str, program: impl AsRef<OsStr>) -> Command {
    let mut net = std::ffi::OsString::from("--net=");
    net.push(state::namespace_path(namespace));
    let mut command = Command::new("nsenter");
    command.arg(net).arg("--").arg(program);
    command
}

/// Removes a lab by name, or all whose owner is gone; returns their names. Refuses one whose owner lives.
pub fn down(name: Option<&str>) -> Result<Vec<String>, LabError> {
    let Some(name) = name else { return state::sweep() };
    let lab = state::all()?.into_iter().find(|l| l.name == name);
    let lab = lab.ok_or_else(|| LabError::Refused(format!("there is no lab {name}")))?;
    if let Some(owner) = lab.living_owner() {
        return Err(LabError::InUse { name: lab.name, pid: owner.pid });
    }
    lab.remove()?;
    Ok(vec![lab.name])
}

/// Arguments: directory, state file, namespaces. A last word `done` means that the owner removed everything itself.
const REAPER: &str = r#"
read -r word
[ "$word" = done ] && exit 0
dir=$1; file=$2; shift 2
for namespace in "$@"; do
    for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        pids=$(ip netns pids "$namespace" 2>/dev/null)
        [ -z "$pids" ] && break
        kill -9 $pids 2>/dev/null
        sleep 0.1
    done
    ip netns delete "$namespace" 2>/dev/null
done
rm -rf "$dir" "$file"
"#;

fn host(lab: &str, index: u8) -> Host {
    let name = char::from(b'a' + index).to_string();
    Host { namespace: format!("{lab}-{name}"), name, address: Ipv4Addr::new(10, 76, 0, index + 1) }
}

/// No two labs of one process or of two have the same.
fn fresh_name() -> String {
    static LABS: AtomicU32 = AtomicU32::new(0);
    match LABS.fetch_add(1, Ordering::Relaxed) {
        0 => format!("st{}", std::process::id()),
        n => format!("st{}x{n}", std::process::id()),
    }
}

fn add_namespace(name: &str) -> Result<(), LabError> {
    run::line(&format!("ip netns add {name}"), run::QUICK)?;
    run::line(&format!("ip -n {name} link set lo up"), run::QUICK)?;
    // The lab speaks IPv4; IPv6's own chatter would show in the counters.
    let quiet =
        "for i in all default; do echo 1 > /proc/sys/net/ipv6/conf/$i/disable_ipv6; done 2>/dev/null; true";
    run::output(command_in(name, "sh").args(["-c", quiet]), run::QUICK).map(drop)
}

fn shape(namespace: &str, device: &str, rate: &str) -> Result<(), LabError> {
    if !Path::new("/sbin/tc").exists() && !Path::new("/usr/sbin/tc").exists() {
        return Err(LabError::MissingPackages { packages: vec!["iproute2".to_owned()] });
    }
    run::line(&format!("tc -n {namespace} qdisc add dev {device} root tbf rate {rate} {SHAPE}"), run::QUICK)
        .map(drop)
}
