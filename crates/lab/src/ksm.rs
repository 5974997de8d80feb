//! The kernel's same-page merging, switched on for a test or a benchmark and put back.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::{LabError, Setting};

/// What it is told by (Documentation/admin-guide/mm/ksm.rst).
const FOLDER: &str = "/sys/kernel/mm/ksm";
/// Who holds this file locked is the one who merges.
const TURN: &str = "sterna-lab-ksm.lock";
/// What is set while it runs: it looks at whatever there is, over and over.
const SETTINGS: [(&str, &str); 3] =
    [("pages_to_scan", "20000"), ("sleep_millisecs", "10"), ("smart_scan", "0")];

/// Merges pages as fast as it can as long as this lives. There is one such thing in a machine: the second waits for the first.
#[derive(Debug)]
pub struct Ksm {
    _changed: Vec<Setting>,
    _turn: File,
}

impl Ksm {
    /// Switches it on.
    ///
    /// # Errors
    /// The kernel cannot merge, or we may not tell it to.
    pub fn run() -> Result<Self, LabError> {
        Self::with("1")
    }

    fn with(run: &str) -> Result<Self, LabError> {
        let path = std::env::temp_dir().join(TURN);
        let locked = File::create(&path).and_then(|file| file.lock().map(|()| file));
        let turn = locked.map_err(|source| LabError::File { action: "lock", path, source })?;
        let changed: Result<_, LabError> = [("run", run)]
            .iter()
            .chain(&SETTINGS)
            .map(|(name, value)| Setting::change(&file(name), value))
            .collect();
        Ok(Self { _changed: changed?, _turn: turn })
    }

    /// Has nobody merge anything as long as this lives.
    ///
    /// # Errors
    /// As [`Ksm::run`].
    pub fn none() -> Result<Self, LabError> {
        Self::with("0")
    }

    /// Waits until it has gone over all memory so many times: what does not change is merged after two.
    ///
    /// # Errors
    /// It does not come so far in this time.
    pub fn wait_for_scans(&self, scans: u64, within: Duration) -> Result<(), LabError> {
        let seen = || read("full_scans").map(|text| text.parse::<u64>().unwrap_or(0));
        let (first, until) = (seen()?, Instant::now() + within);
        while seen()? < first + scans {
            if Instant::now() > until {
                let source = std::io::ErrorKind::TimedOut.into();
                return Err(LabError::File { action: "wait for", path: file("full_scans"), source });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// How many pages of a process are merged with others.
    pub fn merged_pages(pid: impl std::fmt::Display) -> u64 {
        let text = fs::read_to_string(format!("/proc/{pid}/ksm_merging_pages")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }
}

fn file(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

fn read(name: &str) -> Result<String, LabError> {
    let text = fs::read_to_string(file(name));
    let text = text.map_err(|source| LabError::File { action: "read", path: file(name), source })?;
    Ok(text.trim().to_owned())
}
