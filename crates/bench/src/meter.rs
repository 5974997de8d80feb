//! CPU time of processes that may end while they are watched.

use std::time::Duration;

use sterna_lab::process::ProcessId;

/// Sums up CPU time of processes. One that ends counts with what was last read: look often.
#[derive(Debug, Default)]
pub struct Meter {
    watched: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    process: ProcessId,
    before: Duration,
    last: Duration,
}

impl Meter {
    /// Watches a process from now on.
    pub fn watch(&mut self, process: ProcessId) {
        let now = process.cpu_time().unwrap_or_default();
        self.watched.push(Watched { process, before: now, last: now });
    }

    /// Watches a process of which all that it ever used counts: it was started for what is measured.
    pub fn watch_whole(&mut self, process: ProcessId) {
        let last = process.cpu_time().unwrap_or_default();
        self.watched.push(Watched { process, before: Duration::ZERO, last });
    }

    /// Reads all of them.
    pub fn sample(&mut self) {
        for watched in &mut self.watched {
            watched.last = watched.process.cpu_time().unwrap_or(watched.last);
        }
    }

    /// What they used, as far as it was read, in seconds.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.watched.iter().map(|w| w.last.saturating_sub(w.before).as_secs_f64()).sum()
    }
}

/// Memory of a process in MB, with what it shares counted by its part; NaN of one that is gone.
#[must_use]
pub fn pss_mb(process: ProcessId) -> f64 {
    process.pss_kib().map_or(f64::NAN, |kib| kib as f64 * 1024.0 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn burn() -> std::process::Child {
        // `read` ends it together with this test, whatever becomes of it.
        let script = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; read -r _";
        Command::new("sh").args(["-c", script]).stdin(std::process::Stdio::piped()).spawn().unwrap()
    }

    #[test]
    fn what_an_ended_process_used_is_kept() {
        let mut child = burn();
        let process = ProcessId::of(child.id()).unwrap();
        let mut meter = Meter::default();
        meter.watch_whole(process);
        while meter.seconds() == 0.0 {
            std::thread::sleep(Duration::from_millis(5));
            meter.sample();
        }
        let used = meter.seconds();
        child.kill().unwrap();
        child.wait().unwrap();
        meter.sample();
        assert!(meter.seconds() >= used);
    }

    #[test]
    fn only_what_is_used_from_now_on_counts() {
        let own = ProcessId::of(std::process::id()).unwrap();
        let (mut part, mut whole) = (Meter::default(), Meter::default());
        let mut sum = 0u64;
        while own.cpu_time().unwrap() < Duration::from_millis(50) {
            sum = std::hint::black_box(sum + 1);
        }
        part.watch(own);
        whole.watch_whole(own);
        assert!(whole.seconds() - part.seconds() >= 0.05);
    }
}
