//! Listening to the beacon: for how long was the guest away?

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::LabError;

/// Shorter silences are the scheduler's doing.
pub(super) const GAP: Duration = Duration::from_millis(10);
/// More gaps than this say that the machine is overloaded; the longest is kept in any case.
const GAPS_MAX: usize = 10_000;
/// How long one read waits, so that the listener sees that it should stop.
const READ: Duration = Duration::from_millis(100);

/// A silence of the beacon.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// When it began, in milliseconds since 1970.
    pub start_unix_ms: f64,
    /// How long it lasted.
    pub length_ms: f64,
}

/// What the listener heard.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BeaconReport {
    /// Datagrams.
    pub received: u64,
    /// Sequence numbers that never came: lost on the way.
    pub missing: u64,
    /// Datagrams whose number was not above the last one's. A guest that was set back in time would send such.
    pub backwards: u64,
    /// The longest silence between two datagrams.
    pub max_gap_ms: f64,
    /// All silences above 10 ms, or what else the listener calls one.
    pub gaps: Vec<Gap>,
}

/// Listens until `stop` is set.
pub(super) fn listen(
    port: u16,
    stop: Arc<AtomicBool>,
) -> Result<JoinHandle<Result<BeaconReport, LabError>>, LabError> {
    let name = || format!("the beacon's port {port}");
    let socket = UdpSocket::bind(("0.0.0.0", port)).map_err(LabError::file("listen on", name()))?;
    socket.set_read_timeout(Some(READ)).map_err(LabError::file("set the deadline of", name()))?;
    Ok(std::thread::spawn(move || {
        let mut ear = Ear::of(GAP);
        let mut datagram = [0; 16];
        while !stop.load(Ordering::Acquire) {
            if let Ok((16, _)) = socket.recv_from(&mut datagram) {
                let sequence = datagram.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
                ear.hear(sequence, Instant::now(), unix_ms());
            }
        }
        Ok(ear.end(Instant::now()))
    }))
}

/// Hears of numbers that rise.
pub(super) struct Ear {
    last: Option<(u64, Instant, f64)>,
    /// Silences longer than this are listed.
    gap: Duration,
    report: BeaconReport,
}

impl Ear {
    pub(super) fn of(gap: Duration) -> Ear {
        Ear { last: None, gap, report: BeaconReport::default() }
    }

    pub(super) fn hear(&mut self, sequence: u64, now: Instant, unix_ms: f64) {
        let report = &mut self.report;
        report.received += 1;
        if let Some((last, at, start_unix_ms)) = self.last {
            match sequence.checked_sub(last) {
                Some(0) | None => report.backwards += 1,
                Some(step) => report.missing += step - 1,
            }
            let length = now.duration_since(at);
            let length_ms = length.as_secs_f64() * 1e3;
            report.max_gap_ms = report.max_gap_ms.max(length_ms);
            if length > self.gap && report.gaps.len() < GAPS_MAX {
                report.gaps.push(Gap { start_unix_ms, length_ms });
            }
        }
        self.last = Some((sequence, now, unix_ms));
    }

    /// What was heard. A silence that goes on is a silence: whoever is not heard again must not look well.
    pub(super) fn end(mut self, now: Instant) -> BeaconReport {
        if let Some((_, at, start_unix_ms)) = self.last {
            let length = now.duration_since(at);
            let length_ms = length.as_secs_f64() * 1e3;
            self.report.max_gap_ms = self.report.max_gap_ms.max(length_ms);
            if length > self.gap && self.report.gaps.len() < GAPS_MAX {
                self.report.gaps.push(Gap { start_unix_ms, length_ms });
            }
        }
        self.report
    }
}

pub(super) fn unix_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_losses_and_steps_back_are_told_apart() {
        let (mut ear, start) = (Ear::of(GAP), Instant::now());
        for (sequence, at) in [(1, 0), (2, 1), (5, 2), (6, 52), (3, 53)] {
            ear.hear(sequence, start + Duration::from_millis(at), at as f64);
        }
        let report = ear.end(start + Duration::from_millis(55));
        assert_eq!((report.received, report.missing, report.backwards), (5, 2, 1));
        assert_eq!(report.gaps, [Gap { start_unix_ms: 2.0, length_ms: 50.0 }]);
        assert_eq!(report.max_gap_ms, 50.0);
    }

    #[test]
    fn whoever_is_not_heard_again_has_been_silent_to_the_end() {
        let (mut ear, start) = (Ear::of(GAP), Instant::now());
        ear.hear(1, start, 7.0);
        let report = ear.end(start + Duration::from_secs(4));
        assert_eq!(report.gaps, [Gap { start_unix_ms: 7.0, length_ms: 4000.0 }]);
        assert_eq!(report.max_gap_ms, 4000.0);
    }
}
