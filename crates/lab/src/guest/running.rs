//! A guest that runs in one of the lab's hosts.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use super::spec::{Arrival, GuestSpec, HostSide, Serial};
use crate::process::ProcessId;
use crate::qmp::Qmp;
use crate::{Host, Lab, LabError, run};

/// An emulated guest boots in 3 to 5 s alone, and much slower beside a test run.
const BOOT: Duration = Duration::from_secs(120);
/// QEMU opens its socket within 0.2 s.
const LAUNCH: Duration = Duration::from_secs(30);

/// How long the guest gets to read what was typed.
const TYPING: Duration = Duration::from_millis(500);

/// A QEMU process of the lab. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    id: ProcessId,
    /// A connection to its QMP socket.
    pub qmp: Qmp,
    serial: Serial,
    output: PathBuf,
}

impl Running {
    /// Starts `qemu` for a guest in a host, with the host's tap of number `tap`.
    pub fn start(
        lab: &Lab,
        host: &Host,
        qemu: &Path,
        spec: &GuestSpec,
        tap: u8,
        arrival: Arrival,
    ) -> Result<Running, LabError> {
        let file = |end: &str| lab.dir().join(format!("{}-{}.{end}", spec.name, host.name));
        let (qmp, output) = (file("qmp"), file("log"));
        let serial = Serial::Socket { socket: file("console"), log: file("serial") };
        let side =
            HostSide { tap: Some(host.tap(tap)), serial: serial.clone(), qmp: Some(qmp.clone()), arrival };
        let log = File::create(&output).map_err(LabError::file("make", &output))?;
        let second = log.try_clone().map_err(LabError::file("duplicate", &output))?;
        let mut command = lab.command(&host.namespace, qemu);
        command.args(spec.arguments(&side)).stdin(Stdio::null()).stdout(log).stderr(second);
        let child =
            command.spawn().map_err(|source| LabError::Start { command: run::text(&command), source })?;
        Running::connect(child, &qmp, serial, output)
    }

    fn connect(mut child: Child, qmp: &Path, serial: Serial, output: PathBuf) -> Result<Running, LabError> {
        let id = ProcessId::of(child.id()).ok_or_else(|| LabError::unexpected("QEMU", "ended at once"));
        match id.and_then(|id| Ok((id, Qmp::connect(qmp, LAUNCH)?))) {
            Ok((id, qmp)) => Ok(Running { child, id, qmp, serial, output }),
            Err(error) => {
                // Nobody else knows of it.
                let _ = child.kill();
                let _ = child.wait();
                let said = run::tail(&std::fs::read(&output).unwrap_or_default());
                Err(LabError::unexpected(format!("QEMU did not start ({error})"), said))
            }
        }
    }

    /// The QEMU process.
    #[must_use]
    pub fn process(&self) -> ProcessId {
        self.id
    }

    /// Everything that the guest printed on its console here.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.serial.log()).unwrap_or_default()).into_owned()
    }

    /// Types a line at the guest's console: `poweroff`, `reboot`, or a shell command.
    pub fn say(&self, line: &str) -> Result<(), LabError> {
        let Serial::Socket { socket, .. } = &self.serial else {
            return Err(LabError::Refused(
                "this guest's console is a file: it cannot be typed at".to_owned(),
            ));
        };
        let typed = UnixStream::connect(socket).and_then(|mut s| {
            writeln!(s, "{line}")?;
            // QEMU takes a byte at a time while the guest's serial port has room; closing would throw the rest away.
            std::thread::sleep(TYPING);
            Ok(())
        });
        typed.map_err(LabError::file("type at", socket))
    }

    /// Waits until the guest has ended QEMU by itself.
    pub fn wait_ended(&self, limit: Duration) -> Result<(), LabError> {
        run::until("the end of QEMU", limit, || !self.id.is_alive())
    }

    /// Waits until the guest has started everything that it was asked to run.
    pub fn wait_ready(&self) -> Result<(), LabError> {
        self.wait_for("READY ", BOOT)
    }

    /// Waits for a word on the console.
    pub fn wait_for(&self, word: &str, limit: Duration) -> Result<(), LabError> {
        let mut ended = false;
        let waited = run::until(&format!("`{word}` on the guest's console"), limit, || {
            std::thread::sleep(Duration::from_millis(10));
            ended = !self.id.is_alive();
            ended || self.console().contains(word)
        });
        match waited {
            Ok(()) if !ended => Ok(()),
            Ok(()) => Err(LabError::unexpected("QEMU ended", self.output())),
            Err(error) => Err(LabError::unexpected(error.to_string(), run::tail(self.console().as_bytes()))),
        }
    }

    /// What QEMU itself printed.
    #[must_use]
    pub fn output(&self) -> String {
        run::tail(&std::fs::read(&self.output).unwrap_or_default())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
