//! What the guest runs and holds, and who watches it from outside.

use std::io::{Read, Seek, SeekFrom, Write};
use std::net::SocketAddrV4;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use memmap2::{Advice, MmapMut};
use serde::{Deserialize, Serialize};
use sterna_lab::client::{BEACON_PORT, BeaconReport, Client, ClientReport, GameReport, Gap};
use sterna_lab::guest::{Nic, Program};
use sterna_lab::{GuestSpec, Setting, run};

use crate::BenchError;
use crate::figures::Summary;
use crate::stage::Stage;

/// RAM of the guest.
pub const MEMORY_MIB: u32 = 1024;
/// Noise that the guest's Redis is filled with: most of what moves, so that no trick of compression decides the comparison.
/// Some 200 MB more are the kernel, its page cache and Redis itself, which compress as such memory does everywhere.
pub const BALLAST_MIB: u32 = 320;
/// Noise comes in values of this size: few enough that Redis' own bookkeeping is small.
const VALUE_BYTES: usize = 256 << 10;
/// An emulated guest boots in 3 to 5 s alone, and much slower beside a build.
const BOOT: Duration = Duration::from_secs(120);
/// Filling takes 2 to 4 s.
const FILL: Duration = Duration::from_secs(120);
/// Memory that is touched and given back before a move of the demo's guest, in MiB.
pub const WARM_MIB: u32 = 768;
/// How long the client writes before a move: its pace is steady after one second.
pub const BEFORE: Duration = Duration::from_secs(3);
/// How long it watches after a move.
pub const AFTER: Duration = Duration::from_secs(2);
/// A silence that begins this long after a move is still counted as the move's: a late announcement would show here.
const AFTERMATH_MS: f64 = 1000.0;
/// The beacon's listener lists silences from this length on; shorter ones are the scheduler's doing.
const GAP_MS: f64 = 10.0;
/// Likewise the players.
const UPDATE_GAP_MS: f64 = 75.0;

/// The demo's guest: one virtual CPU, plain RAM, a network card, Redis and a beacon.
#[must_use]
pub fn server(stage: &Stage, name: &str) -> GuestSpec {
    let programs = vec![Program::Redis, beacon(stage)];
    GuestSpec { nic: Some(nic(stage, 0)), programs, ..plain(stage, name, MEMORY_MIB) }
}

/// A guest of one virtual CPU and plain RAM, to be changed by struct update.
#[must_use]
pub fn plain(stage: &Stage, name: &str, memory_mib: u32) -> GuestSpec {
    GuestSpec::plain(name, memory_mib, &stage.kit.packages.kernel, &stage.kit.initramfs)
}

/// The network card of the guest at the tap of this number.
#[must_use]
pub fn nic(stage: &Stage, tap: u8) -> Nic {
    Nic::of_guest(tap, stage.lab.guest_address(tap))
}

/// A datagram to the client every millisecond.
#[must_use]
pub fn beacon(stage: &Stage) -> Program {
    Program::Beacon(SocketAddrV4::new(stage.lab.client_address(), BEACON_PORT))
}

/// The memory load with these options.
#[must_use]
pub fn memory(options: &[&str]) -> Program {
    Program::Load(options.iter().map(|o| (*o).to_owned()).collect())
}

/// What the guest's memory can be filled with, in MiB: its kernel, page cache and programs want the rest.
#[must_use]
pub fn fill_mib(memory_mib: u32) -> u32 {
    /// Less, and the guest ends its own load for want of memory; and a tenth, which the kernel keeps for itself.
    const REST_MIB: u32 = 88;
    memory_mib.saturating_sub(REST_MIB + memory_mib / 10).max(memory_mib / 4)
}

/// A guest full of noise that writes the first `working_set_mib` of it over and over at a rate, and has `more` options. Where these do
/// not say what of it is checked, all is.
#[must_use]
pub fn writer(
    stage: &Stage,
    name: &str,
    memory_mib: u32,
    (working_set_mib, rate_mb): (u32, u32),
    more: &[&str],
) -> GuestSpec {
    let fill = format!("--fill={}", fill_mib(memory_mib));
    let (dirty, rate) = (format!("--dirty={working_set_mib}"), format!("--rate={rate_mb}"));
    let check: &[&str] = if more.iter().any(|o| o.starts_with("--check")) { &[] } else { &["--check"] };
    let options = [&[fill.as_str(), &dirty, &rate], check, more].concat();
    GuestSpec { programs: vec![memory(&options)], ..plain(stage, name, memory_mib) }
}

/// What is in a console's file.
pub(crate) fn text_of(console: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(console).unwrap_or_default()).into_owned()
}

/// Waits until a guest says on its console that all its programs run, and its memory is filled if it has a load for that.
pub fn wait_ready(guest: &GuestSpec, console: impl Fn() -> String) -> Result<(), BenchError> {
    let filled = guest.programs.iter().any(|p| matches!(p, Program::Load(_)));
    let mut dead = false;
    let ready = run::until("the guest's start", BOOT, || {
        std::thread::sleep(Duration::from_millis(10));
        let text = console();
        dead = text.contains("Out of memory: Killed");
        dead || text.contains("READY ") && (!filled || text.contains("LOAD filled"))
    });
    match ready {
        Ok(()) if dead => {
            Err(BenchError::unexpected("the guest had too little memory for its programs", console()))
        }
        ready => ready.map_err(|why| BenchError::unexpected(why.to_string(), console())),
    }
}

/// Pages that a guest's load found lost, stale or torn, as it told them.
#[must_use]
pub fn bad_pages(console: &str) -> usize {
    console.matches("BAD ").count()
}

/// What a guest that writes at a rate did not get done, in seconds of its pace before: by those lines of its load that were not there
/// `before`. The guest's clock stands while it is stopped, so that its stop is not in it. NaN of a guest that told too little.
#[must_use]
pub fn work_lost_s(before: &str, console: &str) -> f64 {
    const PAGE_MBIT: f64 = 4096.0 * 8.0 / 1e6;
    let (lines, known) = (told(console), told(before).len());
    let Some(pace) = Summary::of(lines.iter().take(known).map(|l| l.mbps)).map(|s| s.median) else {
        return f64::NAN;
    };
    let lost = |two: &[Told]| {
        let megabits = (two[1].pages - two[0].pages) * PAGE_MBIT;
        // A line's rate is of the time since the one before, and so is known more exactly than by whole seconds.
        let seconds = if two[1].mbps > 0.0 { megabits / two[1].mbps } else { two[1].t - two[0].t };
        seconds - megabits / pace
    };
    let after = lines.windows(2).skip(known.saturating_sub(1));
    after.map(lost).reduce(|a, b| a + b).map_or(f64::NAN, |s| s.max(0.0))
}

/// A line of the load.
struct Told {
    t: f64,
    pages: f64,
    mbps: f64,
}

/// Those that are whole.
fn told(console: &str) -> Vec<Told> {
    let number = |line: &str, name: &str| -> Option<f64> {
        line.split_once(name)?.1.split_whitespace().next()?.parse().ok()
    };
    let line = |line: &str| {
        let whole = line.starts_with("LOAD t=") && line.contains(" bad=");
        let one =
            Told { t: number(line, "t=")?, pages: number(line, "pages=")?, mbps: number(line, "mbps=")? };
        whole.then_some(one)
    };
    console.lines().filter_map(line).collect()
}

/// What a guest's kernel said of its own end, if it did.
#[must_use]
pub fn kernel_died(console: &str) -> Option<&str> {
    const LAST_WORDS: [&str; 3] = ["BUG: ", "Oops: ", "Kernel panic"];
    console.lines().find(|line| LAST_WORDS.iter().any(|words| line.contains(words)))
}

/// Fills the guest's Redis with noise, by Redis' own loader.
pub fn fill(stage: &Stage, tap: u8) -> Result<(), BenchError> {
    const LOADER: &str = "redis-cli";
    let mut output = tempfile::tempfile().map_err(BenchError::file("make", "a scratch file"))?;
    let copy = output.try_clone().map_err(BenchError::file("duplicate", "a scratch file"))?;
    let mut command = stage.client_command(LOADER);
    command.args(["-h", &stage.lab.guest_address(tap).to_string(), "--pipe"]);
    let mut loader = command.stdin(Stdio::piped()).stdout(copy).spawn().map_err(BenchError::start(LOADER))?;
    let input = loader.stdin.take();
    // In a thread, so that a guest that does not take it meets the deadline below, and this ends with the loader.
    let feeder = std::thread::spawn(move || input.map_or(Ok(()), write_noise));
    let ended = wait(&mut loader);
    let fed = feeder.join().unwrap_or_else(|_| Err(std::io::Error::other("its thread panicked")));
    let mut text = String::new();
    output
        .seek(SeekFrom::Start(0))
        .and_then(|_| output.read_to_string(&mut text))
        .map_err(BenchError::file("read", "the loader's output"))?;
    ended?;
    match text.contains(&format!("errors: 0, replies: {}", values())) {
        true => Ok(fed.map_err(BenchError::file("write to", LOADER))?),
        false => Err(BenchError::unexpected(
            "the guest's Redis did not take everything",
            format!("{text} {fed:?}"),
        )),
    }
}

fn wait(loader: &mut Child) -> Result<(), BenchError> {
    let waited = run::until("filling Redis", FILL, || loader.try_wait().is_ok_and(|s| s.is_some()));
    if waited.is_err() {
        // It may end at this very moment.
        let _ = loader.kill();
        let _ = loader.wait();
    }
    Ok(waited?)
}

fn values() -> usize {
    ((BALLAST_MIB as usize) << 20) / VALUE_BYTES
}

/// Commands of Redis' protocol, each with a value of noise that no compression shortens.
fn write_noise(mut to: impl Write) -> std::io::Result<()> {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let mut value = vec![0; VALUE_BYTES];
    for number in 0..values() {
        value.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&noise.next().to_le_bytes()));
        let key = format!("ballast:{number}");
        write!(to, "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${VALUE_BYTES}\r\n", key.len())?;
        to.write_all(&value)?;
        to.write_all(b"\r\n")?;
    }
    Ok(())
}

/// Marsaglia's xorshift64: the same in each run, so that pairs carry the same.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Starts the client that writes to the guest and listens to it, and gives it time to get going.
pub fn watch(stage: &Stage, tap: u8) -> Result<Client, BenchError> {
    let client = Client::start(&stage.lab, &stage.kit.lab, stage.lab.guest_address(tap))?;
    std::thread::sleep(BEFORE);
    Ok(client)
}

/// The same with so few writes that others have the guest for themselves.
pub fn watch_gently(stage: &Stage, tap: u8) -> Result<Client, BenchError> {
    const WRITES_PER_SECOND: u32 = 100;
    let guest = stage.lab.guest_address(tap);
    let client = Client::start_paced(&stage.lab, &stage.kit.lab, guest, WRITES_PER_SECOND)?;
    std::thread::sleep(BEFORE);
    Ok(client)
}

/// Has players play the guest's game.
pub fn play(stage: &Stage, tap: u8) -> Result<Client, BenchError> {
    let client = Client::play(&stage.lab, &stage.kit.lab, stage.lab.guest_address(tap))?;
    std::thread::sleep(BEFORE);
    Ok(client)
}

/// The same for a guest without a server: the client only listens.
pub fn listen(stage: &Stage) -> Result<Client, BenchError> {
    let client = Client::listen(&stage.lab, &stage.kit.lab)?;
    std::thread::sleep(BEFORE);
    Ok(client)
}

/// From which order on free pages are reported to the machine's host, and what is more than any order (`MAX_PAGE_ORDER` of linux/mmzone.h).
const REPORTED_ORDER: &str = "/sys/module/page_reporting/parameters/page_reporting_order";
const NO_ORDER: u32 = 11;

/// Keeps the machine from giving free memory back to its own host as long as what is returned lives, where the kernel lets us.
///
/// A move takes seconds, and what a load touches at its end for the first time is cold by then, however warm it was at the beginning:
/// a single huge page of it costs 5 to 10 ms, the downtime of a whole move.
pub fn keep_memory() -> Option<Setting> {
    Setting::change(Path::new(REPORTED_ORDER), &NO_ORDER.to_string()).ok()
}

/// Whether free memory stays where it is.
pub(crate) fn is_memory_kept() -> bool {
    std::fs::read_to_string(REPORTED_ORDER)
        .is_ok_and(|order| order.trim().parse().is_ok_and(|order: u32| order >= NO_ORDER))
}

/// Touches memory and gives it back, right before a target starts: the first touch of a page that the machine has to get
/// from its own host costs 2 to 10 us, for us and for stock QEMU alike, and says nothing about either.
///
/// In huge pages, as QEMU asks for its guest's memory: small ones would leave the machine's huge ones cold. A machine that
/// reports free pages to its host (mm/page_reporting.c) does so every two seconds, if it could not be kept from that
/// ([`keep_memory`]): where it counts its passes, the memory is kept until one is over, so that the next is far.
pub fn warm_memory(memory_mib: u32) {
    /// What a move takes beside the guest's memory.
    const BESIDE_MIB: u32 = 256;
    /// After so long without a pass none is under way, and what is given back begins a new delay.
    const PASS_WITHIN: Duration = Duration::from_millis(2600);
    let Ok(mut memory) = MmapMut::map_anon(((memory_mib + BESIDE_MIB) as usize) << 20) else { return };
    // Without huge pages this is only slower.
    let _ = memory.advise(Advice::HugePage);
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = std::hint::black_box(1));
    let passes = || std::fs::read_to_string("/sys/module/page_reporting/parameters/passes").ok();
    if let Some(before) = passes().filter(|_| !is_memory_kept()) {
        // Not to see one is as good as to see its end.
        let _ = run::until("a pass", PASS_WITHIN, || passes().is_none_or(|now| now != before));
    }
}

/// A stretch of the client's time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// In milliseconds since 1970.
    pub start_unix_ms: f64,
    /// Likewise.
    pub end_unix_ms: f64,
}

impl Window {
    /// Begins now.
    #[must_use]
    pub fn open() -> Window {
        let now = unix_ms();
        Window { start_unix_ms: now, end_unix_ms: now }
    }

    /// Ends now.
    #[must_use]
    pub fn close(self) -> Window {
        Window { end_unix_ms: unix_ms(), ..self }
    }
}

pub(crate) fn unix_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64() * 1e3)
}

/// What a client saw, as far as results speak of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Seen {
    /// Writes that Redis acknowledged, through the whole life of the client.
    pub acknowledged: u64,
    /// Keys whose last acknowledged write was gone at the end.
    pub lost_writes: u64,
    /// Connections that broke.
    pub reconnects: u64,
    /// The longest time between two acknowledged batches.
    pub max_stall_ms: f64,
    /// Writes acknowledged in each second.
    pub per_second: Vec<u64>,
    /// Datagrams of the beacon that never came.
    pub beacons_missing: u64,
    /// The longest silence of the beacon around the move.
    pub blackout_ms: f64,
    /// All silences around the move that were long enough to be listed.
    pub silences: Vec<Silence>,
}

/// A silence of the beacon.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Silence {
    /// When it began, since the command; it may have begun before.
    pub ms: f64,
    /// How long it lasted.
    pub length_ms: f64,
}

impl Seen {
    /// Of a client's report, for a move in this window. A client that wrote or heard nothing proves nothing.
    pub fn of(report: ClientReport, window: Window) -> Result<Seen, BenchError> {
        if let Some(game) = report.game {
            return Seen::of_game(&game, window);
        }
        let Some(beacon) = report.beacon else {
            return Err(BenchError::unexpected("the client's report", "has no beacon"));
        };
        let served = report.redis.is_some();
        let redis = report.redis.unwrap_or_default();
        if (served && redis.acknowledged == 0) || beacon.received == 0 {
            let found =
                format!("{} writes, {} datagrams; {:?}", redis.acknowledged, beacon.received, redis.errors);
            return Err(BenchError::unexpected("the client did not reach the guest", found));
        }
        let silences = silences(&beacon.gaps, window);
        let listed = silences.iter().map(|s| s.length_ms).fold(0.0, f64::max);
        let unlisted = beacon.max_gap_ms.min(GAP_MS);
        Ok(Seen {
            acknowledged: redis.acknowledged,
            lost_writes: redis.lost_writes,
            reconnects: redis.reconnects,
            max_stall_ms: redis.max_stall_ms,
            per_second: redis.per_second,
            beacons_missing: beacon.missing,
            blackout_ms: listed.max(unlisted),
            silences,
        })
    }
}

impl Seen {
    /// Of players: an input that the world forgot, and a world that moved back, are writes that were lost.
    fn of_game(game: &GameReport, window: Window) -> Result<Seen, BenchError> {
        if game.taken == 0 || game.updates.iter().any(|u| u.received == 0) {
            return Err(BenchError::unexpected("the players did not reach the guest", format!("{game:?}")));
        }
        let all = |what: fn(&BeaconReport) -> u64| game.updates.iter().map(what).sum::<u64>();
        let silences: Vec<Silence> = game.updates.iter().flat_map(|u| silences(&u.gaps, window)).collect();
        let listed = silences.iter().map(|s| s.length_ms).fold(0.0, f64::max);
        let unlisted = game.updates.iter().map(|u| u.max_gap_ms).fold(0.0, f64::max).min(UPDATE_GAP_MS);
        Ok(Seen {
            acknowledged: game.taken,
            lost_writes: game.forgotten + all(|u| u.backwards),
            beacons_missing: all(|u| u.missing),
            blackout_ms: listed.max(unlisted),
            silences,
            ..Seen::default()
        })
    }
}

/// Those around a move.
fn silences(gaps: &[Gap], window: Window) -> Vec<Silence> {
    let end = window.end_unix_ms + AFTERMATH_MS;
    let around = |g: &&Gap| g.start_unix_ms < end && g.start_unix_ms + g.length_ms > window.start_unix_ms;
    let told = |g: &Gap| Silence { ms: g.start_unix_ms - window.start_unix_ms, length_ms: g.length_ms };
    gaps.iter().filter(around).map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sterna_lab::client::RedisReport;

    fn report(gaps: Vec<Gap>) -> ClientReport {
        let max_gap_ms = gaps.iter().map(|g| g.length_ms).fold(3.0, f64::max);
        ClientReport {
            redis: Some(RedisReport { acknowledged: 7, ..RedisReport::default() }),
            beacon: Some(BeaconReport { received: 9, missing: 0, backwards: 0, max_gap_ms, gaps }),
            game: None,
        }
    }

    fn gap(start_unix_ms: f64, length_ms: f64) -> Gap {
        Gap { start_unix_ms, length_ms }
    }

    const WINDOW: Window = Window { start_unix_ms: 1000.0, end_unix_ms: 5000.0 };

    #[test]
    fn silences_outside_of_the_move_do_not_count() {
        let gaps = vec![gap(100.0, 500.0), gap(4900.0, 20.0), gap(5500.0, 30.0), gap(9000.0, 400.0)];
        assert_eq!(Seen::of(report(gaps), WINDOW).unwrap().blackout_ms, 30.0);
    }

    #[test]
    fn a_silence_across_the_beginning_counts() {
        assert_eq!(Seen::of(report(vec![gap(990.0, 50.0)]), WINDOW).unwrap().blackout_ms, 50.0);
    }

    #[test]
    fn without_a_listed_silence_the_blackout_is_the_longest_unlisted_one() {
        assert_eq!(Seen::of(report(vec![]), WINDOW).unwrap().blackout_ms, 3.0);
        assert_eq!(Seen::of(report(vec![gap(9000.0, 40.0)]), WINDOW).unwrap().blackout_ms, GAP_MS);
    }

    #[test]
    fn a_client_that_heard_nothing_is_an_error() {
        let mut deaf = report(vec![]);
        deaf.beacon.as_mut().unwrap().received = 0;
        Seen::of(deaf, WINDOW).unwrap_err();
    }

    #[test]
    fn work_that_was_lost_is_counted_in_time_of_the_pace_before() {
        // 1000 pages a second are 32.768 Mbit/s. While half of a second and a half is lost, 750 of 1500 are written.
        let before = "LOAD filled pages=9\nLOAD t=1 pages=1000 mbps=32.8 loops=9 bad=0\nLOAD t=2 pages=2000 mbps=32.768 loops=9 bad=0\n";
        let move_and_after =
            "LOAD t=3 pages=2750 mbps=16.384 loops=4 bad=0\nLOAD t=4 pages=3750 mbps=32.768 loops=9 bad=0\n";
        let cut = "LOAD t=5 pages=4";
        let lost = work_lost_s(&format!("{before}LOAD t=3 pa"), &format!("{before}{move_and_after}{cut}"));
        assert!((lost - 0.75).abs() < 1e-2, "{lost}");
        let still = format!("{before}LOAD t=7 pages=2000 mbps=0.0 loops=0 bad=0\n");
        assert_eq!(work_lost_s(before, &still), 5.0);
        assert!(work_lost_s(before, before).is_nan() && work_lost_s("", before).is_nan());
    }

    #[test]
    fn a_dead_kernel_is_known_by_its_last_words() {
        let console =
            "READY 6.39\n[   21.2] BUG: unable to handle page fault for address: 0000000eb30fe692\nmore";
        assert!(kernel_died(console).unwrap().contains("BUG: unable"));
        assert_eq!(kernel_died("READY 6.39\nLOAD filled pages=1\n"), None);
    }

    #[test]
    fn players_count_the_longest_wait_of_any_and_what_the_world_forgot() {
        let player = |gaps: Vec<Gap>, backwards| BeaconReport {
            received: 9,
            backwards,
            max_gap_ms: 80.0,
            gaps,
            ..BeaconReport::default()
        };
        let game = GameReport {
            updates: vec![
                player(vec![gap(2000.0, 90.0)], 0),
                player(vec![gap(2010.0, 110.0), gap(9000.0, 500.0)], 1),
            ],
            taken: 40,
            forgotten: 2,
        };
        let report = ClientReport { redis: None, beacon: None, game: Some(game.clone()) };
        let seen = Seen::of(report, WINDOW).unwrap();
        assert_eq!((seen.blackout_ms, seen.lost_writes, seen.acknowledged), (110.0, 3, 40));
        Seen::of_game(&GameReport { taken: 0, ..game }, WINDOW).unwrap_err();
    }

    #[test]
    fn the_noise_is_what_the_loader_is_told() {
        let mut bytes = Vec::new();
        write_noise(&mut bytes).unwrap();
        let overhead = bytes.len() - ((BALLAST_MIB as usize) << 20);
        assert!(overhead < values() * 100, "{overhead}");
        assert_ne!(bytes[100..200], bytes[200..300]);
    }
}
