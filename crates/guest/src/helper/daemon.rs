//! `sterna-guest daemon`: one loop, no threads. It answers the agent, passes on requests of clients, and slows processes.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::line::{FromAgent, Lines, ToAgent, is_name};
use super::stun::{Change, Stunner};
use super::victims::Chooser;
use super::watchdog::Held;

/// How often the port is looked at while no agent is connected: the kernel cannot wait for that without telling of its
/// absence all the time.
const ABSENCE: Duration = Duration::from_millis(500);
/// The longest sleep: nothing needs it, but no wait is without an end.
const IDLE: Duration = Duration::from_secs(60);
/// Clients at once: a person, and a script or two.
const CLIENTS_MAX: usize = 8;
/// How long a client may take to ask, and waits for the agent.
const CLIENT_WITHIN: Duration = Duration::from_secs(15);
/// What the port does not take at once is kept up to this; a host that reads nothing gets nothing.
const UNSENT_MAX: usize = 4096;
/// What one read takes.
const PIECE: usize = 1024;
/// With pidfds (Linux 5.3) processes can be slowed safely.
const ABLE: &str = "migrate,stun";
const NOT_ABLE: &str = "migrate";

/// What the daemon is given.
#[derive(Debug)]
pub struct Daemon {
    port: OwnedFd,
    present: bool,
    lines: Lines,
    unsent: VecDeque<u8>,
    nonce: Option<String>,
    number: u64,
    stunner: Stunner,
    clients: Vec<Client>,
    listener: Option<UnixListener>,
    socket: PathBuf,
    signals: SignalFd,
}

/// Somebody in the guest who asks for a migration.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    lines: Lines,
    /// The number of its request, once it has asked.
    number: Option<u64>,
    until: Instant,
    done: bool,
}

impl Daemon {
    /// Listens for clients at `socket`, and for signals. Without the socket only the agent is served.
    ///
    /// # Errors
    /// The system's, when signals cannot be had.
    pub fn new(port: OwnedFd, socket: &Path, chooser: Chooser) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|signal| mask.add(signal));
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let listener = listen(socket).inspect_err(|why| {
            eprintln!("sterna-guest: no requests are taken at {}: {why}", socket.display());
        });
        Ok(Self {
            port,
            present: false,
            lines: Lines::default(),
            unsent: VecDeque::new(),
            nonce: None,
            number: 0,
            stunner: Stunner::new(chooser, Instant::now()),
            clients: Vec::new(),
            listener: listener.ok(),
            socket: socket.to_owned(),
            signals,
        })
    }

    /// Runs until a signal ends it. Whoever is slowed runs again then.
    ///
    /// # Errors
    /// When the port is taken away.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            self.look_for_agent();
            let now = Instant::now();
            if let Some(change) = self.stunner.tick(now) {
                self.tell(change);
            }
            self.end_clients(now);
            let Ready { port, listener, signal, clients } = self.wait()?;
            if signal {
                return Ok(());
            }
            if port {
                self.exchange()?;
            }
            if listener {
                self.accept();
            }
            for at in clients {
                self.hear_client(at);
            }
        }
    }

    /// The kernel says that nobody is connected at the host's end as long as that is so.
    fn look_for_agent(&mut self) {
        let mut fds = [PollFd::new(&self.port, PollFlags::empty())];
        let asked = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        let present = asked.is_ok() && !fds[0].revents().contains(PollFlags::HUP);
        if present && !self.present {
            self.lines.clear();
            self.present = true;
            self.greet(None);
        } else if !present && self.present {
            self.lose();
        }
    }

    /// The agent is gone, or the VM has been moved: it asks anew, and whatever it wanted is over.
    fn lose(&mut self) {
        self.present = false;
        self.nonce = None;
        self.unsent.clear();
        self.stunner.unstun();
        for client in self.clients.iter_mut().filter(|client| client.number.is_some()) {
            client.answer(
                "refused",
                "the host's agent is gone, or this VM has moved meanwhile; ask again if it has not",
            );
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let now = Instant::now();
        let ends = self.clients.iter().map(|client| client.until);
        let next = self.stunner.next().into_iter().chain(ends).min();
        let longest = if self.present { IDLE } else { ABSENCE };
        let wait = next.map_or(longest, |next| next.saturating_duration_since(now).min(longest));
        let wait = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let write = if self.unsent.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
        let clients = fds.len() - 1;
        if let Some(listener) = &self.listener {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        // A port without an agent is always ready, for nothing.
        if self.present {
            fds.push(PollFd::new(&self.port, PollFlags::IN | write));
        }
        match poll(&mut fds, Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(why) => return Err(why.into()),
        }
        let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        let has = usize::from(self.listener.is_some());
        Ok(Ready {
            signal: ready(0),
            clients: (0..clients).filter(|at| ready(at + 1)).collect(),
            listener: self.listener.is_some() && ready(clients + 1),
            port: self.present && ready(clients + 1 + has),
        })
    }

    /// Reads what the agent says, and writes what is left to be written.
    fn exchange(&mut self) -> io::Result<()> {
        let mut piece = [0; PIECE];
        match rustix::io::read(&self.port, &mut piece) {
            Ok(0) => self.lose(),
            Ok(count) => {
                let lines = self.lines.take(&piece[..count]);
                lines.iter().filter_map(|line| FromAgent::parse(line)).for_each(|order| self.obey(order));
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(why) => return Err(why.into()),
        }
        self.flush();
        Ok(())
    }

    fn obey(&mut self, order: FromAgent) {
        match order {
            FromAgent::Hello { nonce, .. } => {
                self.nonce = Some(nonce.clone());
                self.greet(Some(nonce));
            }
            FromAgent::Stun { percent, ms } => {
                let known = self.stunner.state().is_some();
                if !self.stunner.stun(percent, ms, Instant::now()) {
                    self.tell(Change::Slowed(0, 0));
                } else if let Some((processes, percent)) = self.stunner.state().filter(|_| known) {
                    self.tell(Change::Slowed(processes, percent));
                }
            }
            FromAgent::Unstun => {
                self.stunner.unstun();
                self.tell(Change::Over);
            }
            FromAgent::Accepted { number, migration, host } => {
                self.answer(number, "accepted", &format!("{migration} {host}"));
            }
            FromAgent::Refused { number, reason } => self.answer(number, "refused", &reason),
        }
    }

    fn answer(&mut self, number: u64, word: &str, text: &str) {
        let asked = self.clients.iter_mut().filter(|client| client.number == Some(number));
        asked.for_each(|client| client.answer(word, text));
    }

    fn greet(&mut self, nonce: Option<String>) {
        let able = Held::is_possible() && self.stunner.is_guarded();
        self.send(&ToAgent::Hello { nonce, capabilities: if able { ABLE } else { NOT_ABLE } });
    }

    fn tell(&mut self, change: Change) {
        match change {
            Change::Slowed(processes, percent) => self.send(&ToAgent::Stunned { processes, percent }),
            Change::Over => self.send(&ToAgent::Running),
        }
    }

    fn send(&mut self, message: &ToAgent) {
        let text = message.to_string();
        if self.present && self.unsent.len() + text.len() <= UNSENT_MAX {
            self.unsent.extend(text.bytes());
            self.flush();
        }
    }

    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            let bytes = self.unsent.make_contiguous();
            match rustix::io::write(&self.port, bytes) {
                Ok(count) if count > 0 => drop(self.unsent.drain(..count)),
                // The loop sees what became of the port.
                _ => return,
            }
        }
    }

    fn accept(&mut self) {
        let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) else { return };
        if self.clients.len() < CLIENTS_MAX && stream.set_nonblocking(true).is_ok() {
            let until = Instant::now() + CLIENT_WITHIN;
            self.clients.push(Client { stream, lines: Lines::default(), number: None, until, done: false });
        }
    }

    fn hear_client(&mut self, at: usize) {
        let Some(client) = self.clients.get_mut(at) else { return };
        let mut piece = [0; PIECE];
        let lines = match client.stream.read(&mut piece) {
            Ok(0) => return client.done = true,
            Ok(count) => client.lines.take(&piece[..count]),
            Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            Err(_) => return client.done = true,
        };
        let Some(line) = lines.first() else { return };
        let host = line.strip_prefix("migrate ").filter(|host| is_name(host));
        let (Some(host), None) = (host, client.number) else {
            return client.answer("refused", "the request is not understood; give the name of one host");
        };
        let Some(nonce) = self.nonce.clone() else {
            return client.answer("refused", "no agent answers at the host: is Sterna running there?");
        };
        self.number += 1;
        client.number = Some(self.number);
        let request = ToAgent::Migrate { nonce, number: self.number, host: host.to_owned() };
        self.send(&request);
    }

    fn end_clients(&mut self, now: Instant) {
        for client in self.clients.iter_mut().filter(|client| !client.done && now >= client.until) {
            client.answer(
                "refused",
                "the host's agent does not answer; it may have taken the request all the same",
            );
        }
        self.clients.retain(|client| !client.done);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stunner.unstun();
        if self.listener.is_some() {
            drop(std::fs::remove_file(&self.socket));
        }
    }
}

struct Ready {
    port: bool,
    listener: bool,
    signal: bool,
    clients: Vec<usize>,
}

impl Client {
    fn answer(&mut self, word: &str, text: &str) {
        // A client that went away needs no answer.
        drop(self.stream.write_all(format!("{word} {text}\n").as_bytes()));
        self.done = true;
    }
}

/// Only root may ask for a migration of the whole guest.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(ErrorKind::AddrInUse, "another daemon answers there"));
    }
    match std::fs::remove_file(path) {
        Err(why) if why.kind() != ErrorKind::NotFound => return Err(why),
        _ => {}
    }
    // Made under another name and moved here with its mode.
    let hidden = path.with_extension("new");
    drop(std::fs::remove_file(&hidden));
    let listener = UnixListener::bind(&hidden)?;
    std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&hidden, path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
