//! Processors that do not fall asleep while a VM stands still.
//!
//! What a stop takes is a dozen threads that wake one another, each on a processor that was idle and sleeps, be it in
//! hardware or because a hypervisor took it: one question to a QEMU that had rested took 0.32 ms, and 0.18 where no processor slept. The kernel is asked
//! not to let them, for some milliseconds (Documentation/power/pm_qos_interface.rst). It forgets the wish when the file is closed, however that comes.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::time::{Duration, Instant};

/// Where wishes are told.
const DEVICE: &str = "/dev/cpu_dma_latency";

/// A wish that holds until it is let go, or for this long: the stop of a VM is over by then, or waits for something slower. It is looked at between two
/// steps: a save or load that takes longer keeps it until it is done.
const HOLD: Duration = Duration::from_secs(1);

/// How long a stop is awaited after a round: one that follows at once does within that.
const HOLD_AHEAD: Duration = Duration::from_millis(20);

/// The wish of one migration.
#[derive(Default)]
pub(crate) struct Awake(Option<(File, Instant)>);

impl Awake {
    /// The VM stands still. Nothing where the host does not allow it.
    pub(crate) fn hold(&mut self) {
        self.wish(HOLD);
    }

    /// The VM may stand still at once.
    pub(crate) fn hold_ahead(&mut self) {
        self.wish(HOLD_AHEAD);
    }

    fn wish(&mut self, duration: Duration) {
        let until = Instant::now() + duration;
        self.0 = match self.0.take() {
            Some((device, longest)) => Some((device, longest.max(until))),
            None => wish().map(|device| (device, until)),
        };
    }

    /// How long it holds still; lets go what is over.
    pub(crate) fn left(&mut self) -> Option<Duration> {
        let until = self.0.as_ref().map(|(_, until)| *until)?;
        let left = until.checked_duration_since(Instant::now());
        if left.is_none() {
            self.let_go();
        }
        left
    }

    pub(crate) fn let_go(&mut self) {
        self.0 = None;
    }
}

fn wish() -> Option<File> {
    let mut device = OpenOptions::new().write(true).open(DEVICE).ok()?;
    // No latency at all is bearable.
    device.write_all(&0_i32.to_ne_bytes()).ok().map(|()| device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_ends_by_itself() {
        let mut awake = Awake::default();
        assert_eq!(awake.left(), None);
        awake.hold_ahead();
        // A host may not allow it.
        if awake.0.is_some() {
            assert!(awake.left().is_some_and(|left| left <= HOLD_AHEAD));
            std::thread::sleep(HOLD_AHEAD);
            assert_eq!(awake.left(), None);
        }
        assert!(awake.0.is_none(), "the file is closed");
    }
}
