//! An application in a guest, used from the client's namespace, and what it does in each quarter of a second.

use std::io::{BufReader, Read};
use std::net::Ipv4Addr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::BenchError;
use crate::figures::{Figures, Metric, Summary};
use crate::load::{self, Window};
use crate::stage::Stage;

/// Every program is asked for what it did as often as this; redis-benchmark does it unasked.
const SLOT_MS: f64 = 250.0;
/// Longer than any case: the program is ended when the case is.
const DURATION_S: &str = "600";
/// The client's interface to the guests.
const INTERFACE: &str = "eth0:";
/// By then a program that was started in a namespace is in it.
const ENTERED: Duration = Duration::from_millis(500);
/// How long an application runs before a move: its pace is steady after a second or two.
const WARM_UP: Duration = Duration::from_secs(5);
/// What it did so long before the move is what it does undisturbed.
const BEFORE_MS: f64 = 3000.0;
/// When an application has got over a move.
const AFTERMATH_MS: f64 = 1000.0;
/// Counts responses in wrk.
const COUNTER: &str = include_str!("pulse.lua");

/// What runs in the client's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum App {
    /// redis-benchmark, which sets keys.
    Redis,
    /// wrk, which fetches a file of 64 KiB over and over.
    Web,
    /// wrk, which fetches a file of 512 KiB for 100 clients: the web server of Clark et al., NSDI 2005. In what comes over the link.
    WebCrowd,
    /// iperf3 from the client to the guest.
    ToGuest,
    /// iperf3 from the guest to the client.
    FromGuest,
    /// The same at this rate, in Mbit/s: a client that wants so much and no more.
    Steady(u32),
}

/// What an application did in a quarter of a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Beat {
    /// The middle of it, in milliseconds since 1970.
    pub unix_ms: f64,
    /// Operations a second, or Mbit/s.
    pub value: f64,
}

/// A running application.
#[derive(Debug)]
pub struct Pulse {
    child: Child,
    reader: Option<JoinHandle<Vec<Beat>>>,
    stop: Arc<AtomicBool>,
}

impl App {
    /// In which figure its pace is.
    #[must_use]
    pub fn metric(self) -> Metric {
        match self {
            App::Redis | App::Web => Metric::OpsBefore,
            App::WebCrowd | App::ToGuest | App::FromGuest | App::Steady(_) => Metric::FlowBefore,
        }
    }

    /// What is told of it is read from the client's interface.
    fn is_weighed(self) -> bool {
        self == App::WebCrowd
    }

    fn command(self, stage: &Stage, guest: Ipv4Addr) -> Result<Command, BenchError> {
        let (guest, words) =
            (guest.to_string(), |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let mut command = match self {
            App::Redis => stage.client_command("redis-benchmark"),
            App::Web | App::WebCrowd => stage.client_command("wrk"),
            App::ToGuest | App::FromGuest | App::Steady(_) => stage.client_command("iperf3"),
        };
        match self {
            // For good, 8 connections, values of 256 bytes, more keys than caches hold.
            App::Redis => command.args(["-h", &guest]).args(words("-l -t set -c 8 -d 256 -r 100000")),
            App::Web => {
                let script = stage.lab.dir().join("pulse.lua");
                std::fs::write(&script, COUNTER).map_err(BenchError::file("write", &script))?;
                command.args(words("-t 1 -c 16 --timeout 60s -d")).arg(DURATION_S).arg("-s").arg(script);
                command.arg(format!("http://{guest}/file"))
            }
            App::WebCrowd => {
                command.args(words("-t 1 -c 100 --timeout 60s -d")).arg(DURATION_S);
                command.arg(format!("http://{guest}/large"))
            }
            App::ToGuest | App::FromGuest | App::Steady(_) => {
                command.args(["-c", &guest, "-t", DURATION_S]).args(words("-i 0.25 -f m --forceflush"));
                match self {
                    App::ToGuest => &mut command,
                    App::Steady(rate) => command.args(["-R", "-b", &format!("{rate}M")]),
                    _ => command.arg("-R"),
                }
            }
        };
        Ok(command)
    }

    /// What a line of its output tells, which came at this time.
    fn beat(self, line: &str, unix_ms: f64) -> Option<Beat> {
        if self == App::Web {
            let mut numbers = line.strip_prefix("SLOT ")?.split(' ').filter_map(|n| n.parse::<f64>().ok());
            let (slot, count) = (numbers.next()?, numbers.next()?);
            return Some(Beat { unix_ms: (slot + 0.5) * SLOT_MS, value: count * 1000.0 / SLOT_MS });
        }
        let value = match self {
            App::Redis => line.split_once("rps=")?.1.split([' ', '(']).next()?.parse().ok()?,
            _ => {
                let mut words = line.split_whitespace();
                let value = words.by_ref().take_while(|w| *w != "Mbits/sec").last()?;
                (!line.contains("sender") && !line.contains("receiver") && line.contains("Mbits/sec"))
                    .then(|| value.parse().ok())??
            }
        };
        Some(Beat { unix_ms: unix_ms - SLOT_MS / 2.0, value })
    }
}

impl Pulse {
    /// Starts to use the guest, and gives it time to get going.
    pub fn start(stage: &Stage, app: App, guest: Ipv4Addr) -> Result<Pulse, BenchError> {
        let mut command = app.command(stage, guest)?;
        let output = if app.is_weighed() { Stdio::null() } else { Stdio::piped() };
        command.stdin(Stdio::null()).stdout(output).stderr(Stdio::null());
        let mut child = command.spawn().map_err(BenchError::start(command.get_program()))?;
        let (output, pid, stop) = (child.stdout.take(), child.id(), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let reader = std::thread::spawn(move || match output {
            Some(output) => beats(app, output),
            None => flow(pid, &stopped),
        });
        std::thread::sleep(WARM_UP);
        Ok(Pulse { child, reader: Some(reader), stop })
    }

    /// Ends it, and returns what it did.
    pub fn finish(mut self) -> Vec<Beat> {
        self.end();
        self.reader.take().and_then(|reader| reader.join().ok()).unwrap_or_default()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        // It may have ended by itself: then its silence is in the figures.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.end();
    }
}

/// What comes to the client's interface, as a process beside it sees it.
fn flow(pid: u32, stop: &AtomicBool) -> Vec<Beat> {
    let (mut beats, mut last) = (Vec::new(), None);
    std::thread::sleep(ENTERED);
    while let (false, Some(bytes)) = (stop.load(Ordering::Acquire), received(pid)) {
        let now = load::unix_ms();
        if let Some((at, before)) = last {
            let value = bytes.saturating_sub(before) as f64 * 8.0 / 1e3 / (now - at);
            beats.push(Beat { unix_ms: f64::midpoint(at, now), value });
        }
        last = Some((now, bytes));
        std::thread::sleep(Duration::from_millis(SLOT_MS as u64));
    }
    beats
}

fn received(pid: u32) -> Option<u64> {
    received_of(&std::fs::read_to_string(format!("/proc/{pid}/net/dev")).ok()?)
}

/// proc(5): an interface a line, and what it received first.
fn received_of(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.trim_start().strip_prefix(INTERFACE))?;
    line.split_whitespace().next()?.parse().ok()
}

/// redis-benchmark writes over its last line: a carriage return ends a line too.
fn beats(app: App, output: ChildStdout) -> Vec<Beat> {
    let mut beats = Vec::new();
    let mut line = Vec::new();
    for byte in BufReader::new(output).bytes().map_while(Result::ok) {
        match byte {
            b'\r' | b'\n' => {
                beats.extend(app.beat(&String::from_utf8_lossy(&line), load::unix_ms()));
                line.clear();
            }
            _ => line.push(byte),
        }
    }
    beats
}

/// A pace before a move, and what became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Course {
    /// Seconds since the move began, and what was done then, in the application's unit.
    pub points: Vec<(f64, f64)>,
    /// Figures of it.
    pub figures: Figures,
}

impl Course {
    /// Of what an application did around a move. It has to have done something before.
    pub fn of(app: App, beats: &[Beat], window: Window) -> Result<Course, BenchError> {
        // What is weighed is never silent.
        let beats = if app.is_weighed() { beats.to_vec() } else { filled(beats) };
        let (start, end) = (window.start_unix_ms, window.end_unix_ms);
        let within = |from: f64, to: f64| {
            beats.iter().filter(move |b| (from..to).contains(&b.unix_ms)).map(|b| b.value)
        };
        let median = |from, to| Summary::of(within(from, to)).map_or(f64::NAN, |s| s.median);
        let before = median(start - BEFORE_MS, start);
        if before.is_nan() || before <= 0.0 {
            let found = format!("{before} in the {BEFORE_MS} ms before the move, of {} samples", beats.len());
            return Err(BenchError::unexpected(format!("what {app:?} did"), found));
        }
        let (mut sum, mut count, mut lowest, mut lost) = (0.0, 0.0, f64::INFINITY, 0.0);
        for value in within(start, end) {
            (sum, count) = (sum + value, count + 1.0);
        }
        for value in within(start, end + AFTERMATH_MS) {
            lowest = value.min(lowest);
            lost += (1.0 - value / before) * SLOT_MS / 1e3;
        }
        let after = median(end + AFTERMATH_MS, f64::INFINITY);
        let figures = Figures::default()
            .with(app.metric(), before)
            .with(Metric::AppDuring, sum / count / before * 100.0)
            .with(Metric::AppLowest, lowest / before * 100.0)
            .with(Metric::AppAfter, after / before * 100.0)
            .with(Metric::AppLost, lost);
        let shown = beats.iter().filter(|b| b.unix_ms >= start - BEFORE_MS);
        let points = shown.map(|b| ((b.unix_ms - start) / 1e3, b.value)).collect();
        Ok(Course { points, figures })
    }

    /// With what was done while memory was sent for the first time, beside the same time before. That time is in milliseconds
    /// since the move began.
    #[must_use]
    pub fn in_round_one(mut self, round: Option<(f64, f64)>) -> Course {
        let mean = |from_ms: f64, to_ms: f64| {
            let within = self.points.iter().filter(|p| (from_ms..to_ms).contains(&(p.0 * 1e3)));
            let (sum, count) = within.fold((0.0, 0.0), |(sum, count), p| (sum + p.1, count + 1.0));
            sum / count
        };
        if let Some((from, to)) = round {
            let kept = mean(from, to) / mean(-BEFORE_MS, 0.0) * 100.0;
            self.figures.set(Metric::AppRoundOne, kept);
        }
        self
    }
}

/// With a beat of nothing for each quarter of a second of which nothing was told.
fn filled(beats: &[Beat]) -> Vec<Beat> {
    let mut all: Vec<Beat> = Vec::new();
    for beat in beats {
        while let Some(last) = all.last()
            && beat.unix_ms - last.unix_ms > 1.5 * SLOT_MS
        {
            all.push(Beat { unix_ms: last.unix_ms + SLOT_MS, value: 0.0 });
        }
        all.push(*beat);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(app: App, line: &str) -> Option<f64> {
        app.beat(line, 1000.0).map(|b| b.value)
    }

    #[test]
    fn each_program_is_understood() {
        let redis = "SET: rps=5152.0 (overall: 5003.4) avg_msec=1.500 (overall: 1.550)";
        assert_eq!(value(App::Redis, redis), Some(5152.0));
        assert_eq!(value(App::Redis, "====== SET ======"), None);
        let iperf = "[  5]   0.25-0.50   sec  5.25 MBytes   176 Mbits/sec    0    204 KBytes";
        assert_eq!(value(App::ToGuest, iperf), Some(176.0));
        assert_eq!(
            value(App::FromGuest, "[  5]   0.25-0.50   sec  5.25 MBytes   17.6 Mbits/sec"),
            Some(17.6)
        );
        assert_eq!(
            value(App::FromGuest, "[  5]   0.00-9.50   sec  52 MBytes   17 Mbits/sec   receiver"),
            None
        );
        assert_eq!(value(App::FromGuest, "[ ID] Interval           Transfer     Bitrate"), None);
        assert_eq!(App::Web.beat("SLOT 8 30", 0.0), Some(Beat { unix_ms: 2125.0, value: 120.0 }));
        assert_eq!(App::Web.beat("Running 10m test @ http://10.77.0.10/file", 0.0), None);
    }

    #[test]
    fn what_an_interface_received_is_read_from_its_line() {
        let text = "Inter-|   Receive\n face |bytes    packets\n    lo:     100       1 0\n  eth0: 123456     789 0 0\n";
        assert_eq!(received_of(text), Some(123_456));
        assert_eq!(received_of("    lo: 1 2 3\n"), None);
    }

    #[test]
    fn round_one_is_compared_with_the_time_before() {
        let mut values = vec![100.0; 24];
        values[16..20].fill(90.0);
        values[20..].fill(10.0);
        let window = Window { start_unix_ms: 4000.0, end_unix_ms: 6000.0 };
        let course = Course::of(App::WebCrowd, &beats(&values), window).unwrap();
        let kept = |round| course.clone().in_round_one(round).figures.get(Metric::AppRoundOne);
        assert_eq!(kept(Some((0.0, 1000.0))), Some(90.0));
        assert_eq!((kept(None), kept(Some((0.0, 0.0)))), (None, None));
    }

    fn beats(values: &[f64]) -> Vec<Beat> {
        let beat = |(n, value): (usize, &f64)| Beat { unix_ms: n as f64 * SLOT_MS, value: *value };
        values.iter().enumerate().map(beat).collect()
    }

    #[test]
    fn what_a_move_costs_is_counted_in_time_of_undisturbed_work() {
        // Half the pace for a second, nothing for half a second, then as before.
        let mut values = vec![100.0; 20];
        values[8..12].fill(50.0);
        values[12..14].fill(0.0);
        let window = Window { start_unix_ms: 2000.0, end_unix_ms: 3500.0 };
        let course = Course::of(App::Web, &beats(&values), window).unwrap();
        let figure = |m| course.figures.get(m).unwrap();
        assert_eq!(
            (figure(Metric::OpsBefore), figure(Metric::AppLowest), figure(Metric::AppAfter)),
            (100.0, 0.0, 100.0)
        );
        assert!((figure(Metric::AppLost) - 1.0).abs() < 1e-9, "{course:?}");
        assert!((figure(Metric::AppDuring) - 200.0 / 6.0).abs() < 1e-9, "{course:?}");
    }

    #[test]
    fn silence_is_a_pace_of_nothing() {
        let mut gap = beats(&[10.0; 8]);
        gap.drain(3..6);
        let values: Vec<f64> = filled(&gap).iter().map(|b| b.value).collect();
        assert_eq!(values, [10.0, 10.0, 10.0, 0.0, 0.0, 0.0, 10.0, 10.0]);
    }

    #[test]
    fn an_application_that_did_nothing_proves_nothing() {
        let window = Window { start_unix_ms: 2000.0, end_unix_ms: 3000.0 };
        Course::of(App::Redis, &[], window).unwrap_err();
        Course::of(App::Redis, &beats(&[0.0; 30]), window).unwrap_err();
    }
}
