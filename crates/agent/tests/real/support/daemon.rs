//! An agent as a process of its own, so that it can be killed at any moment.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::Value;
use sterna_agent::model::{MigrateRequest, MigrationView, Problem, RunRequest, VmView};

use super::{World, helper, scene::until, tail};

/// How long an answer of the API may take: a check of a QEMU that hangs is the longest.
const ANSWER: Duration = Duration::from_secs(60);

/// How long an agent may take to find its VMs again.
const READY: Duration = Duration::from_secs(30);

/// `sterna agent`, and its API.
pub(crate) struct Daemon {
    pub(crate) name: String,
    config: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    /// Starts the agent of this host and waits until it answers.
    pub(crate) fn start(world: &World, name: &str) -> Self {
        let config = world.path(&format!("{name}.toml"));
        std::fs::write(&config, world.config(name)).unwrap();
        let socket = world.path(name).join("run/agent.sock");
        let log = world.path(&format!("{name}.log"));
        let mut daemon = Self { name: name.into(), config, socket, log, child: None };
        daemon.launch();
        daemon
    }

    /// Starts it again after it was killed.
    pub(crate) fn launch(&mut self) {
        assert!(self.child.is_none(), "the agent of {} runs already", self.name);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log).unwrap();
        let mut command = Command::new(sterna());
        command.arg("agent").arg("--config").arg(&self.config).env("STERNA_LOG", "sterna_agent=debug,info");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().unwrap());
        let end = Instant::now() + READY;
        while let Err(why) = self.call::<Value>("GET", "/healthz", "") {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the agent of {} ended: {}", self.name, tail(&self.log()));
            assert!(
                Instant::now() < end,
                "the agent of {} does not answer: {why}\n{}",
                self.name,
                tail(&self.log())
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts it where it must end by itself; returns what it says.
    pub(crate) fn fails_to_launch(&self) -> String {
        let mut command = Command::new("timeout");
        command
            .arg(ANSWER.as_secs().to_string())
            .arg(sterna())
            .arg("agent")
            .arg("--config")
            .arg(&self.config);
        let output = command.output().unwrap();
        assert!(!output.status.success(), "the agent of {} started", self.name);
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Its process.
    pub(crate) fn pid(&self) -> i32 {
        self.child.as_ref().expect("it runs").id().cast_signed()
    }

    /// Changes a migration that goes on: `{"max-bandwidth": 0}`.
    pub(crate) fn set(&self, id: &str, change: &Value) -> Result<MigrationView, String> {
        self.call("PATCH", &format!("/v1/migrations/{id}"), &change.to_string())
    }

    /// SIGKILL, waited for.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// What it logged so far.
    /// Asks it to end, as a service manager does, which kills it when it takes too long.
    pub(crate) fn terminate(&mut self) {
        /// `TimeoutStopSec` of the unit that we ship.
        const WITHIN: Duration = Duration::from_secs(10);
        let mut child = self.child.take().expect("it runs");
        let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let end = Instant::now() + WITHIN;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() >= end {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("the agent of {} does not end: {}", self.name, tail(&self.log()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Asks the API. An error is the problem's text, with its reasons.
    pub(crate) fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &str,
    ) -> Result<T, String> {
        let (status, text) = self.exchange(method, path, body).map_err(|why| why.to_string())?;
        if (200..300).contains(&status) {
            let text = if text.is_empty() { "null" } else { &text };
            return serde_json::from_str(text)
                .or_else(|_| serde_json::from_value(Value::String(text.to_owned())))
                .map_err(|why| format!("{why}: {text}"));
        }
        let problem: Problem = serde_json::from_str(&text).map_err(|why| format!("{why}: {text}"))?;
        let reasons = problem.reasons.iter().map(|reason| format!("; {}", reason.text));
        Err(std::iter::once(problem.detail.clone()).chain(reasons).collect())
    }

    fn exchange(&self, method: &str, path: &str, body: &str) -> std::io::Result<(u16, String)> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n");
        write!(stream, "{head}content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let cut = || std::io::Error::other("a short answer");
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(cut)?;
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).ok_or_else(cut)?;
        Ok((status, body.to_owned()))
    }

    pub(crate) fn run(&self, name: &str, argv: Vec<String>) -> Result<VmView, String> {
        let request = RunRequest { name: name.into(), argv, template: None };
        self.call("POST", "/v1/vms", &serde_json::to_string(&request).unwrap())
    }

    pub(crate) fn vm(&self, name: &str) -> Result<VmView, String> {
        self.call("GET", &format!("/v1/vms/{name}"), "")
    }

    pub(crate) fn vms(&self) -> Result<Vec<VmView>, String> {
        self.call("GET", "/v1/vms", "")
    }

    pub(crate) fn stop(&self, name: &str) -> Result<(), String> {
        self.call("DELETE", &format!("/v1/vms/{name}"), "")
    }

    /// Begins a migration and returns its id.
    pub(crate) fn migrate(&self, request: &MigrateRequest) -> Result<String, String> {
        let body = serde_json::to_string(request).unwrap();
        self.call::<MigrationView>("POST", "/v1/migrations", &body).map(|view| view.id)
    }

    pub(crate) fn migration(&self, id: &str) -> Result<MigrationView, String> {
        self.call("GET", &format!("/v1/migrations/{id}"), "")
    }

    pub(crate) fn cancel(&self, id: &str) -> Result<MigrationView, String> {
        self.call("DELETE", &format!("/v1/migrations/{id}"), "")
    }

    /// Waits for the end of a migration.
    pub(crate) fn wait(&self, id: &str) -> MigrationView {
        until("the migration ends", super::MOVE, || {
            let view = self.migration(id).unwrap();
            let over = matches!(view.status.as_str(), "completed" | "failed" | "cancelled");
            (over && self.vm(&view.vm).map_or(true, |vm| vm.migration.is_none())).then_some(view)
        })
    }

    /// Runs the `sterna` command against this agent: (exit code, stdout, stderr).
    pub(crate) fn command(&self, arguments: &[&str]) -> (i32, String, String) {
        let output =
            Command::new(sterna()).arg("--socket").arg(&self.socket).args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    /// The agent lives, and none of its threads has panicked.
    pub(crate) fn assert_healthy(&mut self) {
        self.call::<Value>("GET", "/healthz", "").unwrap();
        assert!(!self.log().contains("panicked"), "{}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

fn sterna() -> PathBuf {
    let path = helper().with_file_name("sterna");
    assert!(
        path.is_file(),
        "sterna is not built; run `cargo build -p sterna` first (`cargo xtask test` does)"
    );
    path
}
