//! `sterna-guest migrate-me HOST`: asks for a migration of this guest, over the daemon where one runs, else over the port.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::line::{FromAgent, LINE_MAX, Lines, ToAgent};
use super::port;

/// How long the agent may take: a request is a file that is written.
const WITHIN: Duration = Duration::from_secs(15);
/// The daemon says by itself when that time is over; a little later it is taken for dead.
const DAEMON_WITHIN: Duration = Duration::from_secs(20);
/// Tries to find either the daemon or a free port: a daemon may have just begun, or ended.
const TRIES: u32 = 5;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(200);
/// Until it is looked again whether an agent has connected.
const ABSENCE: Duration = Duration::from_millis(100);

/// What was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The migration has begun, or did so before.
    Accepted {
        /// Its identity.
        migration: String,
        /// Where to.
        host: String,
    },
    /// Nothing was done.
    Refused(String),
}

/// Asks. `port` is where the port is, if the guest has one.
///
/// # Errors
/// A sentence, when nobody could be asked.
pub fn ask(socket: &Path, port: Option<&Path>, host: &str) -> Result<Answer, String> {
    for _ in 0..TRIES {
        if let Ok(stream) = UnixStream::connect(socket) {
            return over_daemon(stream, host).map_err(|why| format!("the daemon does not answer: {why}"));
        }
        let Some(port) = port else {
            return Err(format!(
                "no daemon answers at {}, and this guest has no port named {}",
                socket.display(),
                port::NAME
            ));
        };
        match port::open(port) {
            Ok(opened) => {
                return over_port(&opened, host).map_err(|why| format!("{}: {why}", port.display()));
            }
            Err(why) if port::is_taken(&why) => std::thread::sleep(PAUSE),
            Err(why) => return Err(format!("{} cannot be opened: {why}", port.display())),
        }
    }
    Err(format!("another program has the port, and no daemon answers at {}", socket.display()))
}

fn over_daemon(mut stream: UnixStream, host: &str) -> io::Result<Answer> {
    stream.set_read_timeout(Some(DAEMON_WITHIN))?;
    stream.write_all(format!("migrate {host}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(io::Read::take(stream, LINE_MAX as u64)).read_line(&mut line)?;
    let line = line.trim_end();
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    match (word, rest.split_once(' ')) {
        ("accepted", Some((migration, host))) => {
            Ok(Answer::Accepted { migration: migration.into(), host: host.into() })
        }
        ("refused", _) => Ok(Answer::Refused(rest.into())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("it said {line:?}"))),
    }
}

fn over_port(port: &OwnedFd, host: &str) -> io::Result<Answer> {
    const NUMBER: u64 = 1;
    let until = Instant::now() + WITHIN;
    let mut lines = Lines::default();
    let mut nonce = None;
    send(port, &ToAgent::Hello { nonce: None, capabilities: "migrate" }, until)?;
    while let Some(piece) = read(port, until)? {
        for order in lines.take(&piece).iter().filter_map(|line| FromAgent::parse(line)) {
            match order {
                FromAgent::Hello { nonce: new, .. } if nonce.as_ref() != Some(&new) => {
                    let request = ToAgent::Migrate { nonce: new.clone(), number: NUMBER, host: host.into() };
                    send(port, &ToAgent::Hello { nonce: Some(new.clone()), capabilities: "migrate" }, until)?;
                    send(port, &request, until)?;
                    nonce = Some(new);
                }
                FromAgent::Accepted { number: NUMBER, migration, host } => {
                    return Ok(Answer::Accepted { migration, host });
                }
                FromAgent::Refused { number: NUMBER, reason } => return Ok(Answer::Refused(reason)),
                _ => {}
            }
        }
    }
    let text = if nonce.is_some() {
        "the host's agent does not answer; it may have taken the request all the same"
    } else {
        "no agent answers at the host: is Sterna running there?"
    };
    Ok(Answer::Refused(text.into()))
}

/// Waits for some bytes; nothing when the time is over.
fn read(port: &OwnedFd, until: Instant) -> io::Result<Option<Vec<u8>>> {
    let mut piece = [0; LINE_MAX];
    while wait(port, PollFlags::IN, until)? {
        match rustix::io::read(port, &mut piece) {
            // Nobody is connected at the host's end.
            Ok(0) => std::thread::sleep(ABSENCE),
            Ok(count) => return Ok(Some(piece[..count].to_vec())),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(why) => return Err(why.into()),
        }
    }
    Ok(None)
}

fn send(port: &OwnedFd, message: &ToAgent, until: Instant) -> io::Result<()> {
    let text = message.to_string();
    let mut left = text.as_bytes();
    while !left.is_empty() && wait(port, PollFlags::OUT, until)? {
        match rustix::io::write(port, left) {
            Ok(count) => left = left.get(count..).unwrap_or_default(),
            Err(rustix::io::Errno::AGAIN) => std::thread::sleep(ABSENCE),
            Err(rustix::io::Errno::INTR) => {}
            Err(why) => return Err(why.into()),
        }
    }
    Ok(())
}

/// Whether the port is ready before the time is over.
fn wait(port: &OwnedFd, flags: PollFlags, until: Instant) -> io::Result<bool> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Ok(false);
    }
    let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
    match poll(&mut [PollFd::new(port, flags)], Some(&left)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(why) => Err(why.into()),
    }
}
