//! The client as a process of its own in the lab's client namespace.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use super::{BEACON_PORT, ClientReport, GAME_PORT};
use crate::process::ProcessId;
use crate::{Lab, LabError, run};

/// Reading back 50,000 keys takes 3 s; the client itself gives up after two minutes.
const REPORT: Duration = Duration::from_secs(180);

/// A running client.
#[derive(Debug)]
pub struct Client {
    child: Child,
    output: File,
}

impl Client {
    /// Starts `program` (`sterna-lab`) as a client of the guest at `guest`.
    pub fn start(lab: &Lab, program: &Path, guest: Ipv4Addr) -> Result<Client, LabError> {
        Client::with(
            lab,
            program,
            &["--beacon", &BEACON_PORT.to_string(), "--redis", &format!("{guest}:6379")],
        )
    }

    /// The same at a pace of so many writes a second, where others use the guest too.
    pub fn start_paced(lab: &Lab, program: &Path, guest: Ipv4Addr, pace: u32) -> Result<Client, LabError> {
        let (redis, pace) = (format!("{guest}:6379"), pace.to_string());
        Client::with(
            lab,
            program,
            &["--beacon", &BEACON_PORT.to_string(), "--redis", &redis, "--writes-per-second", &pace],
        )
    }

    /// Starts a client that plays the guest's game.
    pub fn play(lab: &Lab, program: &Path, guest: Ipv4Addr) -> Result<Client, LabError> {
        Client::with(lab, program, &["--game", &format!("{guest}:{GAME_PORT}")])
    }

    /// Starts a client that only listens to the guest's beacon.
    pub fn listen(lab: &Lab, program: &Path) -> Result<Client, LabError> {
        Client::with(lab, program, &["--beacon", &BEACON_PORT.to_string()])
    }

    fn with(lab: &Lab, program: &Path, options: &[&str]) -> Result<Client, LabError> {
        let output = tempfile::tempfile().map_err(LabError::file("make", "a scratch file"))?;
        let copy = output.try_clone().map_err(LabError::file("duplicate", "a scratch file"))?;
        let mut command = lab.command(&lab.client(), program);
        command.arg("client").args(options);
        command.stdin(Stdio::piped()).stdout(copy);
        let child =
            command.spawn().map_err(|source| LabError::Start { command: run::text(&command), source })?;
        Ok(Client { child, output })
    }

    /// Has it stop writing and read everything back, and returns what it saw.
    pub fn finish(mut self) -> Result<ClientReport, LabError> {
        drop(self.child.stdin.take());
        let mut status = None;
        run::until("the client's report", REPORT, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        })?;
        let mut text = String::new();
        let read = self.output.seek(SeekFrom::Start(0)).and_then(|_| self.output.read_to_string(&mut text));
        read.map_err(LabError::file("read", "the client's report"))?;
        serde_json::from_str(&text)
            .map_err(|e| LabError::unexpected(format!("the client's report ({e})"), text))
    }

    /// The client's process.
    #[must_use]
    pub fn process(&self) -> Option<ProcessId> {
        ProcessId::of(self.child.id())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It ended by itself if it was asked for its report.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program `sterna-lab` that was built together with the running one (which may be a test in `deps/`).
pub fn lab_program() -> Result<PathBuf, LabError> {
    let own = std::env::current_exe().map_err(LabError::file("find", "/proc/self/exe"))?;
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join("sterna-lab"));
    let found = beside.into_iter().find(|p| p.is_file());
    found.ok_or_else(|| LabError::Refused("sterna-lab is not built: cargo build -p sterna-lab".to_owned()))
}
