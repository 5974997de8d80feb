//! A host's agent, run and asked as a user does it: by the `sterna` command.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde::Deserialize;
use sterna_lab::process::ProcessId;
use sterna_lab::{Host, Lab, LabDir, run};

use crate::stage::PageStreams;
use crate::{BenchError, Kit};

/// Where agents listen for each other.
const PORT: u16 = 7470;
/// An agent listens within 0.1 s.
const START: Duration = Duration::from_secs(20);
/// An agent ends within 0.1 s; whoever does not is killed.
const END: Duration = Duration::from_secs(5);
/// `sterna run` waits for QEMU, everything else answers at once.
const ANSWER: Duration = Duration::from_secs(60);
/// How much of an agent's log an error shows.
const LOG_BYTES_SHOWN: usize = 2000;

/// An agent in a host of the lab. Dropping it ends it; its VMs go with the lab.
#[derive(Debug)]
pub struct HostAgent {
    child: Child,
    process: ProcessId,
    program: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    host: String,
}

/// What `sterna ps -o json` says of a VM, as far as it matters here.
#[derive(Debug, Clone, Deserialize)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// QEMU's word for its state.
    pub state: String,
    /// Its QEMU.
    pub pid: u32,
}

/// Makes an authority and a certificate for each host, as the README tells it.
pub fn issue_keys(lab: &Lab, kit: &Kit) -> Result<(), BenchError> {
    let dir = pki(lab);
    let sterna = || Command::new(&kit.sterna);
    run::output(sterna().args(["pki", "init"]).arg(&dir), ANSWER)?;
    for host in lab.hosts() {
        run::output(sterna().args(["pki", "issue"]).arg(&dir).arg(&host.name), ANSWER)?;
    }
    Ok(())
}

impl HostAgent {
    /// Starts the agent of a host, which has a tap for each guest, and waits until its API answers.
    pub fn start(
        lab: &Lab,
        host: &Host,
        kit: &Kit,
        streams: PageStreams,
        guests: u8,
    ) -> Result<HostAgent, BenchError> {
        let own = lab.dir().join(&host.name);
        std::fs::create_dir_all(&own).map_err(BenchError::file("make", &own))?;
        let (config, log) = (own.join("agent.toml"), own.join("agent.log"));
        let text = configuration(lab, host, kit, streams, guests)?;
        std::fs::write(&config, text).map_err(BenchError::file("write", &config))?;
        let output = File::create(&log).map_err(BenchError::file("make", &log))?;
        let errors = output.try_clone().map_err(BenchError::file("duplicate", &log))?;
        let mut command = lab.command(&host.namespace, &kit.sterna);
        command.args(["agent", "--config"]).arg(&config);
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let mut child = command.spawn().map_err(BenchError::start(&kit.sterna))?;
        let socket = own.join("agent.sock");
        let id = ProcessId::of(child.id());
        let up = run::until("the start of an agent", START, || {
            UnixStream::connect(&socket).is_ok() || !id.is_some_and(ProcessId::is_alive)
        });
        match id.filter(|id| up.is_ok() && id.is_alive()) {
            Some(process) => {
                let (program, host) = (kit.sterna.clone(), host.name.clone());
                Ok(HostAgent { child, process, program, socket, log, host })
            }
            None => {
                // It may have ended by itself: then there is nothing to kill.
                let _ = child.kill();
                let _ = child.wait();
                Err(BenchError::unexpected(
                    format!("the agent of host {} did not start", host.name),
                    tail(&log),
                ))
            }
        }
    }

    /// The host's name.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The agent's process.
    #[must_use]
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// The `sterna` command, to be completed: it will ask this agent.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--socket").arg(&self.socket);
        command
    }

    /// Starts a VM.
    pub fn run(&self, name: &str, qemu: &Path, arguments: &[String]) -> Result<(), BenchError> {
        let mut command = self.command();
        command.args(["run", name, "--"]).arg(qemu).args(arguments);
        self.said(run::output(&mut command, ANSWER)).map(drop)
    }

    /// A VM of this host.
    pub fn vm(&self, name: &str) -> Result<Vm, BenchError> {
        let text = self.said(run::output(self.command().args(["ps", "-o", "json"]), ANSWER))?;
        let vms: Vec<Vm> = serde_json::from_str(&text)
            .map_err(|e| BenchError::unexpected(format!("`sterna ps` ({e})"), &text))?;
        let missing = || BenchError::unexpected(format!("no VM {name} on host {}", self.host), &text);
        vms.into_iter().find(|vm| vm.name == name).ok_or_else(missing)
    }

    /// The process of a VM's QEMU.
    pub fn qemu(&self, name: &str) -> Result<ProcessId, BenchError> {
        let vm = self.vm(name)?;
        let gone =
            || BenchError::unexpected(format!("the QEMU of VM {name} on host {}", self.host), "is gone");
        ProcessId::of(vm.pid).ok_or_else(gone)
    }

    /// The last word on a migration, as JSON.
    pub fn status(&self, migration: &str) -> Result<String, BenchError> {
        self.said(run::output(self.command().args(["status", migration, "-o", "json"]), ANSWER))
    }

    /// Ends a VM.
    pub fn stop(&self, name: &str) -> Result<(), BenchError> {
        self.said(run::output(self.command().args(["stop", name]), ANSWER)).map(drop)
    }

    /// The end of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    fn said<T>(&self, result: Result<T, sterna_lab::LabError>) -> Result<T, BenchError> {
        result.map_err(|why| {
            BenchError::unexpected(why.to_string(), format!("its agent said: {}", self.log_tail()))
        })
    }
}

impl Drop for HostAgent {
    fn drop(&mut self) {
        self.process.signal(Signal::TERM);
        let child = &mut self.child;
        let ended = run::until("the end of an agent", END, || child.try_wait().is_ok_and(|s| s.is_some()));
        if ended.is_err() {
            // It did not obey; the lab would kill it a moment later.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Every host calls its taps by names of its own; a VM that comes back has the names of the host it was born on.
fn configuration(
    lab: &Lab,
    host: &Host,
    kit: &Kit,
    streams: PageStreams,
    guests: u8,
) -> Result<String, BenchError> {
    let (own, pki, name) = (lab.dir().join(&host.name), pki(lab), &host.name);
    let material = LabDir::open()?.join("");
    let peers =
        lab.hosts().iter().map(|h| format!("[hosts.{}]\naddress = \"{}:{PORT}\"\n", h.name, h.address));
    let pairs = lab.hosts().iter().flat_map(|h| (0..guests).map(move |g| (h.tap(g), host.tap(g))));
    let taps = pairs.map(|(theirs, ours)| format!("{theirs:?} = {ours:?}\n"));
    Ok(format!(
        "name = {name:?}\nstate-dir = {state:?}\nrun-dir = {run:?}\nlisten = \"{address}:{PORT}\"\nsocket = {socket:?}\n\
         [tls]\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\npage-streams = {streams:?}\n{peers}\
         [qemu]\nbinaries = [{old:?}, {new:?}]\npath-roots = [{lab_dir:?}, {material:?}]\n[map.taps]\n{taps}",
        state = own.join("state"),
        run = own.join("run"),
        address = host.address,
        socket = own.join("agent.sock"),
        ca = pki.join("ca.crt"),
        cert = pki.join(format!("{name}.crt")),
        key = pki.join(format!("{name}.key")),
        peers = peers.collect::<String>(),
        old = kit.packages.qemu_72,
        new = kit.packages.qemu_10,
        streams = if streams == PageStreams::Clear { "clear" } else { "encrypted" },
        lab_dir = lab.dir(),
        taps = taps.collect::<String>(),
    ))
}

fn pki(lab: &Lab) -> PathBuf {
    lab.dir().join("pki")
}

fn tail(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let from = bytes.len().saturating_sub(LOG_BYTES_SHOWN);
    String::from_utf8_lossy(&bytes[from..]).trim().to_owned()
}
