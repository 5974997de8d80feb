//! Real QEMUs, each with its firmware's guest only.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use sterna_memory::{Footprint, Process, Region, footprint};

use super::wait_until;

/// RAM of the machines here.
pub const RAM: u64 = 256 << 20;

/// A running QEMU and its QMP connection; killed when dropped.
pub struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
    pub process: Process,
    _dir: tempfile::TempDir,
}

/// The executables to test with: what the two variables name, else what is on the PATH.
pub fn executables() -> Vec<PathBuf> {
    let named =
        ["STERNA_QEMU_72", "STERNA_QEMU_10"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let mut found: Vec<PathBuf> = named.filter(|p| p.is_file()).collect();
    if found.is_empty() {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let candidates = std::env::split_paths(&path).map(|dir| dir.join("qemu-system-x86_64"));
        found.extend(candidates.filter(|p| p.is_file()).take(1));
    }
    assert!(
        !found.is_empty(),
        "no QEMU: set STERNA_QEMU_72 and STERNA_QEMU_10 to executables, or install qemu-system-x86; `cargo xtask test` does it"
    );
    found
}

impl Qemu {
    /// With RAM of a kind: an option of `-object`, or none for plain `-m`.
    pub fn start(executable: &PathBuf, object: Option<&str>) -> Qemu {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let mut command = Command::new(executable);
        command.args(["-accel", "tcg", "-nodefaults", "-display", "none", "-m", "256"]);
        match object {
            Some(object) => command.args([
                "-object",
                &format!("{object},id=mem,size=256M"),
                "-machine",
                "q35,memory-backend=mem",
            ]),
            None => command.args(["-machine", "q35"]),
        };
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        wait_until("QMP", || {
            assert!(child.try_wait().unwrap().is_none(), "{} has ended", executable.display());
            UnixStream::connect(&socket).is_ok()
        });
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
        let mut qemu = Qemu { child, qmp: BufReader::new(stream), process, _dir: dir };
        let mut greeting = String::new();
        qemu.qmp.read_line(&mut greeting).unwrap();
        qemu.command(r#"{"execute":"qmp_capabilities"}"#);
        qemu
    }

    /// Sends a command, waits for its answer.
    pub fn command(&mut self, line: &str) -> serde_json::Value {
        self.qmp.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        loop {
            let mut answer = String::new();
            self.qmp.read_line(&mut answer).unwrap();
            let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
            assert!(answer.get("error").is_none(), "{answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }

    /// Its footprint without the heap's end, which QEMU moves by itself even when its guest is stopped.
    pub fn footprint(&self) -> Footprint {
        let mut footprint = footprint(&self.process).unwrap();
        for mapping in footprint.mappings.iter_mut().filter(|m| m.line.ends_with("[heap]")) {
            let start = mapping.line.split('-').next().unwrap_or_default();
            mapping.line = format!("{start} [heap]");
        }
        footprint
    }

    /// Where guest RAM is in the process.
    pub fn ram(&mut self) -> Region {
        let hmp = r#"{"execute":"human-monitor-command","arguments":{"command-line":"gpa2hva 0"}}"#;
        let answer = self.command(hmp);
        let words = answer.as_str().unwrap().trim().rsplit_once("0x").unwrap().1.to_owned();
        Region { base: u64::from_str_radix(&words, 16).unwrap(), bytes: RAM }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
