//! The memory balloon: how much memory the guest has, and what it says of it (QEMU docs/interop/virtio-balloon-stats.rst).

use super::Qemu;
use super::qmp::QmpError;
use crate::VmmError;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long a guest may take to tell its figures the first time: it is asked every second.
const STATS_WITHIN: Duration = Duration::from_secs(3);
/// How often it is looked whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What a guest says that does not know.
const UNKNOWN: u64 = u64::MAX;

impl Qemu {
    /// Bytes that the guest has; none where it has no balloon.
    ///
    /// # Errors
    /// As any question.
    pub fn balloon_size(&mut self) -> Result<Option<u64>, VmmError> {
        match self.command("query-balloon", Value::Null, "tell the size of its balloon") {
            Ok(answer) => Ok(answer["actual"].as_u64()),
            Err(VmmError::Qmp { source: QmpError::Refused { .. }, .. }) => Ok(None),
            Err(why) => Err(why),
        }
    }

    /// Asks the guest to keep so many bytes and give the rest away. It does so in its own time.
    ///
    /// # Errors
    /// As any command.
    pub fn set_balloon(&mut self, bytes: u64) -> Result<(), VmmError> {
        self.ask("balloon", json!({ "value": bytes }), "change the size of its balloon").map(drop)
    }

    /// Bytes that the guest could give away without swapping, by its own figures; none where it tells none.
    ///
    /// # Errors
    /// As any question.
    pub fn balloon_available(&mut self) -> Result<Option<u64>, VmmError> {
        let Some(path) = self.balloon_path()? else { return Ok(None) };
        let operation = "tell what its guest says of its memory";
        // What it said when it booted, or was looked at last, may be far from what holds now: a guest from which too much is taken kills
        // its own programs.
        let updated = |answer: &Value| answer["last-update"].as_u64().unwrap_or(0);
        let before = updated(&self.qom(&path, "guest-stats", operation)?);
        let interval = json!({ "path": path, "property": "guest-stats-polling-interval", "value": 1 });
        self.ask("qom-set", interval, operation)?;
        let end = Instant::now() + STATS_WITHIN;
        let found = loop {
            let answer = self.qom(&path, "guest-stats", operation)?;
            let stat = |name: &str| answer["stats"][name].as_u64().filter(|bytes| *bytes != UNKNOWN);
            let known = updated(&answer) > before;
            match stat("stat-available-memory").or_else(|| stat("stat-free-memory")) {
                Some(bytes) if known => break Some(bytes),
                _ if Instant::now() >= end => break None,
                _ => std::thread::sleep(LOOK_EVERY),
            }
        };
        let interval = json!({ "path": path, "property": "guest-stats-polling-interval", "value": 0 });
        self.ask("qom-set", interval, operation)?;
        Ok(found)
    }

    /// Whether its guest reports pages that are free, and takes them for zero when it uses them again (virtio 1.2, 5.5.6.7).
    ///
    /// # Errors
    /// As any question.
    pub fn reports_free_pages(&mut self) -> Result<bool, VmmError> {
        let Some(path) = self.balloon_path()? else { return Ok(false) };
        Ok(self.qom(&path, "free-page-reporting", "tell how its guest gives memory back")? == true)
    }

    fn balloon_path(&mut self) -> Result<Option<String>, VmmError> {
        for folder in ["/machine/peripheral", "/machine/peripheral-anon"] {
            let children = self.ask("qom-list", json!({ "path": folder }), "list its devices")?;
            let is_balloon = |child: &&Value| {
                child["type"].as_str().is_some_and(|kind| kind.starts_with("child<virtio-balloon"))
            };
            let found = children.as_array().into_iter().flatten().find(is_balloon);
            if let Some(name) = found.and_then(|child| child["name"].as_str()) {
                return Ok(Some(format!("{folder}/{name}")));
            }
        }
        Ok(None)
    }
}
