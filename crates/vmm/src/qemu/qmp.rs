//! A client of QEMU's machine protocol, QMP: one line of JSON each way, see `docs/interop/qmp-spec` in QEMU.
//!
//! Answers are matched to commands by their ids, so that a command can run while something else is done; events
//! are kept with the time they came. What QEMU adds to the protocol in the future (events, keys) passes through.
//!
//! QMP talks to one client per socket and hangs while QEMU's main thread does. So every wait has a deadline, also
//! the wait for the greeting, which a socket that another client holds never sends.
//!
//! QEMU's monitor takes one byte at a time from its socket (`monitor_can_read` in QEMU's `monitor/monitor.c`), and makes seven
//! system calls for each: some 3 us a byte. What must be done at an instant is therefore typed ahead: [`Qmp::type_ahead`].
//! Out-of-band execution is asked for where QEMU offers it, although no command of ours is: its monitor then goes on reading
//! while a command runs.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with,
};
use serde_json::{Value, json};

/// The longest line taken from QEMU. The longest real ones (device trees, `info mtree`) are below a megabyte.
const LINE_BYTES_MAX: usize = 16 << 20;
/// How many events are kept for a reader; the oldest go first. QEMU itself limits the rate of the frequent ones.
const EVENTS_MAX: usize = 1024;
/// How many descriptors go with one command: QEMU's monitor takes no more than the kernel's own 253.
const FDS_MAX: usize = 16;
/// The pause between two tries to connect: QEMU needs tens of milliseconds to make its socket.
const CONNECT_PAUSE: Duration = Duration::from_millis(2);
/// How long after its deadline a wait goes on reading what came before.
const READ_ON: Duration = Duration::from_millis(100);
/// How much is read at once.
const READ_BYTES: usize = 64 << 10;
/// How much of an answer that is no JSON is shown.
const EXCERPT_CHARS: usize = 80;
/// How many ids there are after the first: far more than commands are under way.
const IDS: u64 = 9_999;
/// What ends a command that was typed ahead.
const END: &[u8] = b"}";
/// What ends one that is not wanted any more: QEMU refuses it for the member that no command has.
const WITHDRAWN: &[u8] = b",\"withdrawn\":true}\n";

/// What went wrong between us and QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody answers at the socket.
    #[error("QMP socket {} cannot be reached", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket takes us and stays silent.
    #[error(
        "no greeting from QMP socket {} within {within:?}: QMP talks to one client at a time, so another \
         program probably holds it; if not, QEMU hangs or is stopped",
        path.display()
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        within: Duration,
    },
    /// QEMU closed the connection.
    #[error("QEMU closed the QMP connection while {during} was waited for; it has probably exited")]
    Closed {
        /// The command, or what else was waited for.
        during: String,
    },
    /// QEMU did not answer in time. It may still do what it was told.
    #[error("QEMU did not answer {during} within {within:?}; it hangs, is stopped, or is overloaded")]
    TimedOut {
        /// The command, or what else was waited for.
        during: String,
        /// How long it was waited for.
        within: Duration,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of error.
        class: String,
        /// QEMU's own words.
        desc: String,
    },
    /// What came is not QMP.
    #[error("what came from the QMP socket is not QMP: {detail}")]
    Protocol {
        /// What came instead.
        detail: String,
    },
    /// The socket failed.
    #[error("the QMP connection failed while {during} was waited for")]
    Socket {
        /// The command, or what else was waited for.
        during: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An earlier failure has made this connection useless.
    #[error("this QMP connection is unusable since an earlier failure; connect again")]
    Broken,
}

/// QEMU's version, as its greeting tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 10 in 10.0.2.
    pub major: u32,
    /// 0 in 10.0.2.
    pub minor: u32,
    /// 2 in 10.0.2.
    pub micro: u32,
}

impl Version {
    /// The first micro version of a release.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor, micro: 0 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// An event from QEMU.
#[derive(Clone, Debug)]
pub struct Event {
    /// QEMU's name for it, such as `MIGRATION`.
    pub name: String,
    /// What it carries, or null.
    pub data: Value,
    /// When it came.
    pub at: Instant,
}

/// A command whose answer is still to come.
#[derive(Debug)]
pub struct Ticket {
    id: u64,
    command: String,
}

/// A command that QEMU has read but for its end.
#[derive(Debug)]
struct Typed {
    id: u64,
    command: String,
    args: Value,
}

/// A point in time by which a wait ends, with its length for the error's text.
#[derive(Clone, Copy)]
struct Deadline {
    at: Instant,
    within: Duration,
}

impl Deadline {
    fn after(within: Duration) -> Self {
        Self { at: Instant::now() + within, within }
    }

    /// What is there already may be read although the time is over, but not for ever.
    fn is_long_past(self) -> bool {
        self.at.elapsed() > READ_ON
    }

    fn left(self) -> Option<Timespec> {
        let left = self.at.checked_duration_since(Instant::now())?;
        Some(Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::from(u32::MAX), tv_nsec: 0 }))
    }
}

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    version: Version,
    input: Vec<u8>,
    /// How much of `input` holds no end of a line for sure.
    scanned: usize,
    typed: Option<Typed>,
    /// The next command's: short, for each digit takes QEMU a few microseconds.
    id: u64,
    waiting: BTreeSet<u64>,
    answers: HashMap<u64, Result<Value, (String, String)>>,
    events: VecDeque<Event>,
    broken: bool,
}

impl Qmp {
    /// Connects to the socket at `path`, waiting for it to appear, and leaves QMP's negotiation mode.
    pub fn connect(path: &Path, within: Duration) -> Result<Self, QmpError> {
        let deadline = Deadline::after(within);
        let socket = reach(path, deadline)?;
        Self::greet(socket, deadline).map_err(|error| match error {
            QmpError::TimedOut { within, .. } => QmpError::NoGreeting { path: path.into(), within },
            other => other,
        })
    }

    /// The same over a socket that is connected already.
    pub fn over(socket: UnixStream, within: Duration) -> Result<Self, QmpError> {
        Self::greet(socket, Deadline::after(within))
    }

    fn greet(socket: UnixStream, deadline: Deadline) -> Result<Self, QmpError> {
        let greeting = "the greeting";
        socket
            .set_nonblocking(true)
            .map_err(|source| QmpError::Socket { during: greeting.into(), source })?;
        let mut qmp = Self {
            socket,
            version: Version::new(0, 0),
            input: Vec::new(),
            scanned: 0,
            typed: None,
            id: first_id(),
            waiting: BTreeSet::new(),
            answers: HashMap::new(),
            events: VecDeque::new(),
            broken: false,
        };
        let line = qmp.next_line(greeting, deadline)?;
        let (version, out_of_band) = parse_greeting(&line)?;
        qmp.version = version;
        let enable = if out_of_band { json!({ "enable": ["oob"] }) } else { Value::Null };
        let ticket = qmp.send_by("qmp_capabilities", enable, &[], deadline)?;
        match qmp.wait_by(&ticket, deadline) {
            // A client that was here before us has sent the same, gone, and been obeyed only now.
            Err(QmpError::Refused { class, .. }) if class == "CommandNotFound" => Ok(qmp),
            done => done.map(|_| qmp),
        }
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The socket, to ask the kernel who is at its other end.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Ends the connection, so that QEMU takes another client.
    pub fn shutdown(&mut self) {
        self.broken = true;
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Sends a command and waits for its answer. `args` is an object, or null for none.
    pub fn execute(&mut self, command: &str, args: Value, within: Duration) -> Result<Value, QmpError> {
        self.execute_with_fds(command, args, &[], within)
    }

    /// The same, with descriptors sent along (`add-fd`, `getfd`).
    pub fn execute_with_fds(
        &mut self,
        command: &str,
        args: Value,
        fds: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<Value, QmpError> {
        let deadline = Deadline::after(within);
        let ticket = self.send_by(command, args, fds, deadline)?;
        self.wait_by(&ticket, deadline)
    }

    /// Sends a command and does not wait for its answer.
    pub fn send(&mut self, command: &str, args: Value, within: Duration) -> Result<Ticket, QmpError> {
        self.send_by(command, args, &[], Deadline::after(within))
    }

    /// Lets QEMU read all of a command but its end, so that [`Qmp::send`] of the same command costs it a single byte. Any other
    /// command withdraws this one, and so does the end of the connection: QEMU then begins with an empty line.
    pub fn type_ahead(&mut self, command: &str, args: Value, within: Duration) -> Result<(), QmpError> {
        let deadline = Deadline::after(within);
        self.withdraw(deadline)?;
        let id = self.next_id();
        let text = message(command, &args, id);
        let text = text.strip_suffix('}').unwrap_or(&text);
        self.write(text.as_bytes(), &[], command, deadline)?;
        self.typed = Some(Typed { id, command: command.to_owned(), args });
        Ok(())
    }

    /// Waits for the answer to a command that was sent. After a timeout it can be waited for again.
    pub fn wait(&mut self, ticket: &Ticket, within: Duration) -> Result<Value, QmpError> {
        self.wait_by(ticket, Deadline::after(within))
    }

    /// Forgets a command that was sent: its answer interests nobody any more.
    pub fn forget(&mut self, ticket: &Ticket) {
        self.waiting.remove(&ticket.id);
        self.answers.remove(&ticket.id);
    }

    /// The next event with one of these names; earlier events with other names stay for later.
    pub fn next_event(&mut self, names: &[&str], within: Duration) -> Result<Event, QmpError> {
        let deadline = Deadline::after(within);
        loop {
            let found = self.events.iter().position(|event| names.contains(&event.name.as_str()));
            if let Some(event) = found.and_then(|at| self.events.remove(at)) {
                return Ok(event);
            }
            self.take_line("an event", deadline)?;
        }
    }

    /// Whether an event with one of these names has come by now.
    pub fn has_event(&mut self, names: &[&str]) -> Result<bool, QmpError> {
        match self.next_event(names, Duration::ZERO) {
            Ok(_) => Ok(true),
            Err(QmpError::TimedOut { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Forgets the events that came so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Runs a command of the human monitor and returns what it prints.
    pub fn hmp(&mut self, line: &str, within: Duration) -> Result<String, QmpError> {
        let ticket = self.hmp_begin(line, within)?;
        self.hmp_finish(&ticket, within)
    }

    /// Sends one and does not wait for what it prints.
    pub fn hmp_begin(&mut self, line: &str, within: Duration) -> Result<Ticket, QmpError> {
        self.send("human-monitor-command", json!({ "command-line": line }), within)
    }

    /// Waits for what it prints.
    pub fn hmp_finish(&mut self, ticket: &Ticket, within: Duration) -> Result<String, QmpError> {
        match self.wait(ticket, within)? {
            Value::String(text) => Ok(text),
            _ => Err(protocol("the answer of the human monitor is no text".into())),
        }
    }

    /// Whether the answer to a command that was sent has been seen by now.
    pub(super) fn has_answered(&self, ticket: &Ticket) -> bool {
        !self.waiting.contains(&ticket.id)
    }

    fn send_by(
        &mut self,
        command: &str,
        args: Value,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<Ticket, QmpError> {
        let same = |typed: &mut Typed| fds.is_empty() && typed.command == command && typed.args == args;
        let id = match self.typed.take_if(same) {
            Some(typed) => {
                self.write(END, fds, command, deadline)?;
                typed.id
            }
            None => {
                self.withdraw(deadline)?;
                let id = self.next_id();
                self.write(format!("{}\n", message(command, &args, id)).as_bytes(), fds, command, deadline)?;
                id
            }
        };
        self.waiting.insert(id);
        Ok(Ticket { id, command: command.to_owned() })
    }

    /// One that nothing under way has. What nobody waits for any more is forgotten when its id comes again.
    fn next_id(&mut self) -> u64 {
        loop {
            let after = if self.id < IDS { self.id + 1 } else { 1 };
            let id = std::mem::replace(&mut self.id, after);
            if !self.waiting.contains(&id) {
                self.answers.remove(&id);
                return id;
            }
        }
    }

    /// Makes QEMU forget what was typed ahead. Its refusal is an answer to nothing that is waited for.
    fn withdraw(&mut self, deadline: Deadline) -> Result<(), QmpError> {
        self.typed.take().map_or(Ok(()), |typed| self.write(WITHDRAWN, &[], &typed.command, deadline))
    }

    /// What was begun cannot be ended after a failure: the connection is useless then.
    fn write(
        &mut self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        command: &str,
        deadline: Deadline,
    ) -> Result<(), QmpError> {
        if self.broken {
            return Err(QmpError::Broken);
        }
        self.write_all(bytes, fds, command, deadline).inspect_err(|_| self.broken = true)
    }

    fn write_all(
        &mut self,
        mut bytes: &[u8],
        mut fds: &[BorrowedFd<'_>],
        command: &str,
        deadline: Deadline,
    ) -> Result<(), QmpError> {
        while !bytes.is_empty() {
            match send_some(&self.socket, bytes, fds) {
                Ok(sent) => {
                    bytes = bytes.get(sent..).unwrap_or_default();
                    // The descriptors went with the first byte.
                    fds = &[];
                }
                Err(Errno::AGAIN) => self.ready(PollFlags::OUT, command, deadline)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    return Err(QmpError::Closed { during: command.into() });
                }
                Err(e) => return Err(QmpError::Socket { during: command.into(), source: e.into() }),
            }
        }
        Ok(())
    }

    fn wait_by(&mut self, ticket: &Ticket, deadline: Deadline) -> Result<Value, QmpError> {
        loop {
            if let Some(answer) = self.answers.remove(&ticket.id) {
                return answer.map_err(|(class, desc)| QmpError::Refused {
                    command: ticket.command.clone(),
                    class,
                    desc,
                });
            }
            self.take_line(&ticket.command, deadline)?;
        }
    }

    /// Reads one line and puts what it says where it belongs.
    fn take_line(&mut self, during: &str, deadline: Deadline) -> Result<(), QmpError> {
        if self.broken {
            return Err(QmpError::Broken);
        }
        // A flood of lines must not outlast the deadline.
        if deadline.is_long_past() {
            return Err(QmpError::TimedOut { during: during.into(), within: deadline.within });
        }
        let line = self.next_line(during, deadline)?;
        self.sort(&line).inspect_err(|_| self.broken = true)
    }

    fn sort(&mut self, line: &[u8]) -> Result<(), QmpError> {
        let mut message = parse(line)?;
        if let Some(name) = message["event"].as_str().map(str::to_owned) {
            if self.events.len() == EVENTS_MAX {
                self.events.pop_front();
            }
            self.events.push_back(Event { name, data: message["data"].take(), at: Instant::now() });
            return Ok(());
        }
        let outcome = if let Some(error) = message.get("error") {
            Err((text(&error["class"]), text(&error["desc"])))
        } else if let Some(value) = message.get_mut("return") {
            Ok(value.take())
        } else {
            tracing::debug!(line = excerpt(line), "a QMP message that is neither answer nor event");
            return Ok(());
        };
        match (message["id"].as_u64(), outcome) {
            (Some(id), outcome) if self.waiting.remove(&id) => drop(self.answers.insert(id, outcome)),
            (None, Err((_, desc))) if message.get("id").is_none() => {
                return Err(protocol(format!("QEMU could not read a command: {desc}")));
            }
            // QEMU answers whoever is connected, also what a client asked that has gone meanwhile.
            _ => tracing::debug!(line = excerpt(line), "an answer to nothing that was asked here"),
        }
        Ok(())
    }

    /// The next line. A timeout loses nothing: what came of a line is kept.
    fn next_line(&mut self, during: &str, deadline: Deadline) -> Result<Vec<u8>, QmpError> {
        loop {
            let end = self.input.iter().skip(self.scanned).position(|byte| *byte == b'\n');
            if let Some(end) = end.map(|at| at + self.scanned) {
                self.scanned = 0;
                let rest = self.input.split_off(end + 1);
                return Ok(std::mem::replace(&mut self.input, rest));
            }
            self.scanned = self.input.len();
            if self.scanned > LINE_BYTES_MAX {
                self.broken = true;
                return Err(protocol(format!("a line of more than {LINE_BYTES_MAX} bytes")));
            }
            self.fill(during, deadline)?;
        }
    }

    fn fill(&mut self, during: &str, deadline: Deadline) -> Result<(), QmpError> {
        let mut chunk = vec![0; READ_BYTES];
        match self.socket.read(&mut chunk) {
            Ok(0) => {
                self.broken = true;
                Err(QmpError::Closed { during: during.into() })
            }
            Ok(n) => {
                self.input.extend(chunk.iter().take(n));
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.ready(PollFlags::IN, during, deadline),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                self.broken = true;
                Err(QmpError::Closed { during: during.into() })
            }
            Err(source) => Err(QmpError::Socket { during: during.into(), source }),
        }
    }

    fn ready(&self, flags: PollFlags, during: &str, deadline: Deadline) -> Result<(), QmpError> {
        let timed_out = || QmpError::TimedOut { during: during.into(), within: deadline.within };
        let left = deadline.left().ok_or_else(timed_out)?;
        match poll(&mut [PollFd::new(&self.socket, flags)], Some(&left)) {
            Ok(0) => Err(timed_out()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(QmpError::Socket { during: during.into(), source: e.into() }),
        }
    }
}

/// A command as it is written, in one line.
fn message(command: &str, args: &Value, id: u64) -> String {
    let mut message = json!({ "execute": command, "id": id });
    if !args.is_null() {
        message["arguments"] = args.clone();
    }
    message.to_string()
}

/// An id that no other connection of ours has, nor one of an agent before us: an answer to those may still come while we are greeted. QEMU does
/// one command after the other, so that none comes later, and short ids will do.
fn first_id() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    (u64::from(std::process::id()) << 32) | (count & u64::from(u32::MAX))
}

/// Connects as soon as somebody listens, and greets later: [`Qmp::over`].
pub(super) fn reach_within(path: &Path, within: Duration) -> Result<UnixStream, QmpError> {
    reach(path, Deadline::after(within))
}

/// Connects as soon as somebody listens. Never waits inside connect(2), which has no deadline when QEMU's queue of
/// one connection is full.
fn reach(path: &Path, deadline: Deadline) -> Result<UnixStream, QmpError> {
    let failed = |e: Errno| QmpError::Connect { path: path.into(), source: e.into() };
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    loop {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket.into()),
            Err(Errno::AGAIN) if deadline.left().is_none() => {
                return Err(QmpError::NoGreeting { path: path.into(), within: deadline.within });
            }
            Err(Errno::AGAIN | Errno::NOENT | Errno::CONNREFUSED | Errno::INTR)
                if deadline.left().is_some() =>
            {
                std::thread::sleep(CONNECT_PAUSE);
            }
            Err(e) => return Err(failed(e)),
        }
    }
}

fn send_some(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

fn parse(line: &[u8]) -> Result<Value, QmpError> {
    match serde_json::from_slice(line) {
        Ok(message @ Value::Object(_)) => Ok(message),
        _ => Err(protocol(excerpt(line))),
    }
}

/// The version, and whether QEMU offers out-of-band execution.
fn parse_greeting(line: &[u8]) -> Result<(Version, bool), QmpError> {
    let message = parse(line)?;
    let mut offers = message["QMP"]["capabilities"].as_array().into_iter().flatten();
    let out_of_band = offers.any(|offer| offer == "oob");
    let version = &message["QMP"]["version"]["qemu"];
    let part = |name| version[name].as_u64().and_then(|n| u32::try_from(n).ok());
    match (part("major"), part("minor"), part("micro")) {
        (Some(major), Some(minor), Some(micro)) => Ok((Version { major, minor, micro }, out_of_band)),
        _ => Err(protocol(format!("no greeting of QEMU's: {}", excerpt(line)))),
    }
}

fn protocol(detail: String) -> QmpError {
    QmpError::Protocol { detail }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn excerpt(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .trim_end()
        .chars()
        .take(EXCERPT_CHARS)
        .flat_map(char::escape_default)
        .collect()
}
