//! Writing numbered keys to Redis, and finding every one that is lost.
//!
//! Write number `n` sets key `k:<n mod keys>` to `n`, a checksum and filling. What Redis acknowledged must be there at the
//! end, or something newer: `lost_writes` counts keys of which that is not so. One connection lives through it all; a
//! second one is an error of its own, since a TCP connection survives a migration.

use std::io::{BufReader, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::ClientOptions;
use super::resp::{self, Reply};
use crate::LabError;

/// Commands sent before their answers are read: enough to keep an emulated server busy, few enough to show a stall.
const PIPELINE: u32 = 16;
/// Reading back needs no pace.
const READ_PIPELINE: u32 = 256;
/// How long an answer may take: longer than any migration stops a guest, stock's with its worst settings included.
const ANSWER: Duration = Duration::from_secs(30);
/// The guest may still be booting, or away.
const CONNECT: Duration = Duration::from_secs(5);
/// How long reading back keeps trying.
const READ_BACK: Duration = Duration::from_secs(120);
/// Filling of a value, so that writes dirty pages.
const FILLING: usize = 64;

/// What the writer saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RedisReport {
    /// Writes that Redis acknowledged.
    pub acknowledged: u64,
    /// Keys whose last acknowledged write is neither there nor replaced by a newer one.
    pub lost_writes: u64,
    /// Keys whose value is not what anybody wrote (they count as lost as well).
    pub corrupt: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// Why connections ended, the first few.
    pub errors: Vec<String>,
    /// The longest time between two acknowledged batches.
    pub max_stall_ms: f64,
    /// Writes acknowledged in each second since the start.
    pub per_second: Vec<u64>,
}

/// Errors beyond this number say nothing new.
const ERRORS_MAX: usize = 10;

/// Writes until `stop` is set, then reads back.
pub(super) fn start(
    server: SocketAddrV4,
    options: &ClientOptions,
    stop: Arc<AtomicBool>,
) -> JoinHandle<Result<RedisReport, LabError>> {
    let mut writer = Writer::new(server, options);
    std::thread::spawn(move || {
        writer.write_until(&stop);
        writer.read_back();
        Ok(writer.report)
    })
}

struct Writer {
    server: SocketAddrV4,
    connection: Option<BufReader<TcpStream>>,
    connections: u64,
    /// The last acknowledged write of each key; 0: none.
    acknowledged: Vec<u64>,
    next: u64,
    pause: Duration,
    report: RedisReport,
}

impl Writer {
    fn new(server: SocketAddrV4, options: &ClientOptions) -> Writer {
        Writer {
            server,
            connection: None,
            connections: 0,
            acknowledged: vec![0; options.keys.max(1) as usize],
            next: 1,
            pause: Duration::from_secs(1) * PIPELINE / options.writes_per_second.max(1),
            report: RedisReport::default(),
        }
    }

    fn write_until(&mut self, stop: &AtomicBool) {
        let start = Instant::now();
        let mut last = start;
        while !stop.load(Ordering::Acquire) {
            let begun = Instant::now();
            if let Err(error) = self.write_batch() {
                self.failed(&error);
                continue;
            }
            if self.report.acknowledged > u64::from(PIPELINE) {
                self.report.max_stall_ms = self.report.max_stall_ms.max(last.elapsed().as_secs_f64() * 1e3);
            }
            last = Instant::now();
            self.count(start.elapsed());
            std::thread::sleep(self.pause.saturating_sub(begun.elapsed()));
        }
    }

    fn write_batch(&mut self) -> std::io::Result<()> {
        let first = self.next;
        // Whatever becomes of the connection, these numbers may have arrived and are not used again.
        self.next += u64::from(PIPELINE);
        let keys = self.acknowledged.len() as u64;
        let mut batch = Vec::new();
        for number in first..self.next {
            resp::command(&mut batch, &[b"SET", &key(number % keys), &value(number)]);
        }
        let connection = self.connected()?;
        connection.get_mut().write_all(&batch)?;
        for number in first..first + u64::from(PIPELINE) {
            match resp::reply(self.connected()?)? {
                Reply::Simple(text) if text == b"OK" => self.acknowledged[(number % keys) as usize] = number,
                other => return Err(std::io::Error::other(format!("SET was answered by {other:?}"))),
            }
            self.report.acknowledged += 1;
        }
        Ok(())
    }

    fn read_back(&mut self) {
        let end = Instant::now() + READ_BACK;
        let mut from = 0;
        while from < self.acknowledged.len() {
            let to = (from + READ_PIPELINE as usize).min(self.acknowledged.len());
            match self.read_batch(from, to) {
                Ok((lost, corrupt)) => {
                    self.report.lost_writes += lost;
                    self.report.corrupt += corrupt;
                    from = to;
                }
                Err(error) => {
                    self.failed(&error);
                    if Instant::now() >= end {
                        // What cannot be read is lost.
                        self.report.lost_writes +=
                            self.acknowledged[from..].iter().filter(|n| **n > 0).count() as u64;
                        return;
                    }
                }
            }
        }
    }

    fn read_batch(&mut self, from: usize, to: usize) -> std::io::Result<(u64, u64)> {
        let mut batch = Vec::new();
        (from..to).for_each(|k| resp::command(&mut batch, &[b"GET", &key(k as u64)]));
        self.connected()?.get_mut().write_all(&batch)?;
        let (mut lost, mut corrupt) = (0, 0);
        for index in from..to {
            let reply = resp::reply(self.connected()?)?;
            let verdict = judge(self.acknowledged[index], self.next, &reply);
            lost += u64::from(verdict != Verdict::Good);
            corrupt += u64::from(verdict == Verdict::Corrupt);
        }
        Ok((lost, corrupt))
    }

    fn connected(&mut self) -> std::io::Result<&mut BufReader<TcpStream>> {
        if self.connection.is_none() {
            let stream = TcpStream::connect_timeout(&self.server.into(), CONNECT)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.set_write_timeout(Some(ANSWER))?;
            self.connections += 1;
            self.report.reconnects = self.connections - 1;
            self.connection = Some(BufReader::new(stream));
        }
        self.connection.as_mut().ok_or_else(|| std::io::Error::other("no connection"))
    }

    fn failed(&mut self, error: &std::io::Error) {
        self.connection = None;
        if self.report.errors.len() < ERRORS_MAX {
            self.report.errors.push(error.to_string());
        }
        std::thread::sleep(super::STOP_POLL);
    }

    fn count(&mut self, since: Duration) {
        let second = since.as_secs() as usize;
        if self.report.per_second.len() <= second {
            self.report.per_second.resize(second + 1, 0);
        }
        self.report.per_second[second] += u64::from(PIPELINE);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Good,
    Lost,
    Corrupt,
}

/// `next` is the first number that was never sent.
fn judge(acknowledged: u64, next: u64, reply: &Reply) -> Verdict {
    match reply {
        Reply::Bulk(None) if acknowledged == 0 => Verdict::Good,
        Reply::Bulk(Some(bytes)) => match number_of(bytes) {
            // What a client before this one has left.
            Some(_) if acknowledged == 0 => Verdict::Good,
            Some(n) if n >= acknowledged && n < next => Verdict::Good,
            Some(_) => Verdict::Lost,
            None => Verdict::Corrupt,
        },
        _ => Verdict::Lost,
    }
}

fn key(index: u64) -> Vec<u8> {
    format!("k:{index}").into_bytes()
}

fn value(number: u64) -> Vec<u8> {
    let filling: String = (0..FILLING).map(|i| char::from(b'a' + ((number + i as u64) % 26) as u8)).collect();
    let body = format!("{number}:{filling}");
    format!("{:016x}:{body}", checksum(body.as_bytes())).into_bytes()
}

/// The number of a value that somebody wrote.
fn number_of(bytes: &[u8]) -> Option<u64> {
    let number = std::str::from_utf8(bytes).ok()?.split(':').nth(1)?.parse().ok()?;
    (value(number) == bytes).then_some(number)
}

/// FNV-1a: the values are our own, so no adversary has to be resisted, only damage found.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_missing_and_damaged_values_are_found() {
        let bulk = |v: Vec<u8>| Reply::Bulk(Some(v));
        assert_eq!(judge(7, 9, &bulk(value(7))), Verdict::Good);
        assert_eq!(judge(7, 9, &bulk(value(8))), Verdict::Good);
        assert_eq!(judge(0, 9, &Reply::Bulk(None)), Verdict::Good);
        assert_eq!(judge(0, 9, &bulk(value(5000))), Verdict::Good);
        assert_eq!(judge(7, 9, &bulk(value(6))), Verdict::Lost);
        assert_eq!(judge(7, 9, &bulk(value(9))), Verdict::Lost);
        assert_eq!(judge(7, 9, &Reply::Bulk(None)), Verdict::Lost);
        let mut damaged = value(7);
        damaged[30] ^= 1;
        assert_eq!(judge(7, 9, &bulk(damaged)), Verdict::Corrupt);
    }

    /// A real Redis on loopback: what it loses on purpose must be counted.
    #[test]
    fn a_deleted_key_counts_as_lost() {
        let dir = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // The package of the tools has the server's program under this name; what it does follows from how it is called.
        let mut command = std::process::Command::new("/usr/bin/redis-check-rdb");
        std::os::unix::process::CommandExt::arg0(&mut command, "redis-server")
            .args(["--port", &port.to_string(), "--save", "", "--daemonize", "no", "--dir"])
            .arg(dir.path());
        let mut server =
            command.stdout(std::process::Stdio::null()).spawn().expect("redis-tools: cargo xtask setup");
        let options = ClientOptions {
            redis: None,
            beacon: None,
            game: None,
            players: 0,
            limit: None,
            writes_per_second: 100_000,
            keys: 100,
        };
        let address = SocketAddrV4::new([127, 0, 0, 1].into(), port);
        crate::run::until("redis", CONNECT, || TcpStream::connect(address).is_ok()).unwrap();
        let mut writer = Writer::new(address, &options);
        (0..20).for_each(|_| writer.write_batch().unwrap());
        let delete = |w: &mut Writer| {
            let mut line = Vec::new();
            resp::command(&mut line, &[b"DEL", b"k:5"]);
            w.connected().unwrap().get_mut().write_all(&line).unwrap();
            resp::reply(w.connected().unwrap()).unwrap()
        };
        writer.read_back();
        assert_eq!((writer.report.acknowledged, writer.report.lost_writes), (320, 0));
        assert!(matches!(delete(&mut writer), Reply::Integer(1)));
        writer.read_back();
        assert_eq!((writer.report.lost_writes, writer.report.corrupt, writer.report.reconnects), (1, 0, 0));
        server.kill().unwrap();
        server.wait().unwrap();
    }
}
