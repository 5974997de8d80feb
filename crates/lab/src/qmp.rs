//! A few lines of QMP, for the lab's own QEMUs.
//!
//! The lab measures stock QEMU beside us and so shares no code with what it is compared to.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{LabError, run};

/// QEMU answers in milliseconds, also under emulation; a machine full of tests gets more.
const ANSWER: Duration = Duration::from_secs(30);
/// The longest line we have seen, of `query-qmp-schema`, has 200 kB.
const LINE_BYTES_MAX: u64 = 4 << 20;

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects as soon as the socket is there.
    pub fn connect(path: &Path, limit: Duration) -> Result<Qmp, LabError> {
        let mut stream = None;
        run::until(&format!("QEMU's socket {}", path.display()), limit, || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        })?;
        let stream = stream.ok_or_else(|| LabError::unexpected("QMP", "no connection"))?;
        let timeouts =
            stream.set_read_timeout(Some(ANSWER)).and_then(|()| stream.set_write_timeout(Some(ANSWER)));
        timeouts.map_err(LabError::file("set the deadline of", path))?;
        let mut qmp = Qmp { lines: BufReader::new(stream) };
        qmp.message("the greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returned. Events on the way are dropped.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, LabError> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.lines.get_mut().write_all(line.as_bytes()).map_err(LabError::file("send to QEMU:", command))?;
        let end = Instant::now() + ANSWER;
        while Instant::now() < end {
            let mut answer = self.message(command)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let reason =
                    error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").to_owned();
                return Err(LabError::Qmp { command: command.to_owned(), reason });
            }
        }
        Err(LabError::Deadline { what: format!("QEMU's answer to {command}"), limit: ANSWER })
    }

    /// What a command of the human monitor prints.
    pub fn monitor(&mut self, line: &str) -> Result<String, LabError> {
        let value = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(value.as_str().unwrap_or_default().to_owned())
    }

    fn message(&mut self, waiting_for: &str) -> Result<Value, LabError> {
        let mut line = String::new();
        let read = self.lines.by_ref().take(LINE_BYTES_MAX).read_line(&mut line);
        read.map_err(LabError::file("read QEMU's answer to", waiting_for))?;
        if line.is_empty() {
            return Err(LabError::unexpected(
                format!("QMP while waiting for {waiting_for}"),
                "QEMU closed it",
            ));
        }
        serde_json::from_str(&line).map_err(|e| LabError::unexpected("QMP", e.to_string()))
    }
}
