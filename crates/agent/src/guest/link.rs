//! The agent's end of one guest's port.

use super::line::{Helper, ToGuest};
use super::session::{Flood, Heard, Session};
use crate::agent::random;
use crate::registry::lock;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::net::{connect, recv, send, socket_with, sockopt::socket_peercred};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use sterna_engine::handoff::MigrationId;

/// The name of the port.
pub(crate) const PORT: &str = "org.sterna.guest.0";
/// How long a guest may take to say that its helper is there.
const THERE_WITHIN: Duration = Duration::from_millis(500);
/// A helper that has said something within this time is there.
const FRESH: Duration = Duration::from_secs(5);
/// How often a helper that says nothing is asked whether it is still there.
const ASK_EVERY: Duration = Duration::from_secs(30);
/// Questions that may be unanswered: the next ones would only wait in a buffer for a guest that does not read.
const UNANSWERED_MAX: u32 = 8;
/// What the socket does not take at once is kept up to this; a guest that reads nothing is cut off.
const UNSENT_MAX: usize = 2048;
/// What is read at once.
const PIECE: usize = 4096;
/// Between two tries to connect.
const RETRY: Duration = Duration::from_secs(1);
/// How long a guest is cut off that says too much or reads nothing.
pub(super) const CUT_OFF: Duration = Duration::from_secs(30);

/// The helper inside of a VM's guest, if there is one. It is always there to be asked; where no helper is, nothing is done.
///
/// Nothing here waits for a guest, but [`GuestLink::is_there`] for half a second. What the guest says of itself is its own word:
/// a hostile one says that it has slowed its processes and has not. So it is used as a hint, and judged by what the memory does.
#[derive(Default)]
pub(crate) struct GuestLink {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The VM is stopped, or about to be: see [`GuestLink::hush`].
    hushed: bool,
    /// Where the port's socket is: looked up once for each QEMU.
    path: Option<Option<PathBuf>>,
    open: Option<Open>,
    helper: Option<Helper>,
    stunned: Option<(u32, u32)>,
    heard: Option<Instant>,
    asked: Option<Instant>,
    unanswered: u32,
    not_before: Option<Instant>,
    told: bool,
    /// When it was last allowed to begin a migration.
    began: Option<Instant>,
}

struct Open {
    socket: Arc<OwnedFd>,
    session: Session,
    unsent: VecDeque<u8>,
}

/// A guest's request to be moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) number: u64,
    pub(super) host: String,
}

impl GuestLink {
    /// The helper, if one answers: at once when it was heard of lately, else within half a second. Without a port on the
    /// VM's command line, or with nobody behind it, there is none. One of an older version is returned, and can nothing.
    pub(crate) fn is_there(&self) -> Option<Helper> {
        let (asked, end) = (Instant::now(), Instant::now() + THERE_WITHIN);
        let mut state = self.lock();
        state.open.as_ref()?;
        if state.hushed || state.heard.is_some_and(|heard| heard.elapsed() < FRESH) {
            return state.helper.clone();
        }
        // The answer to an earlier question will do.
        if state.unanswered == 0 || state.asked.is_none_or(|asked| asked.elapsed() > FRESH) {
            state.ask_who();
        }
        while state.heard.is_none_or(|heard| heard < asked) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || state.open.is_none() {
                state.helper = None;
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(|poison| poison.into_inner()).0;
        }
        state.helper.clone()
    }

    /// The helper that was heard of last. Asks nobody.
    pub(crate) fn helper(&self) -> Option<Helper> {
        self.lock().helper.clone()
    }

    /// Asks the guest to take `percent` of their time from the processes that write most memory (QEMU's
    /// `cpu-throttle-percentage`; the guest takes 95 at most), for `for_ms` (10 s at most). Has to be said again before that is
    /// over; the guest lets its processes go by itself otherwise. Returns at once: false when there is no helper that can do it,
    /// or it does not answer any more. The guest takes 200 ms to find out whom to slow.
    pub(crate) fn stun(&self, percent: u32, for_ms: u32) -> bool {
        let mut state = self.lock();
        let able = state.helper.as_ref().is_some_and(|helper| helper.can("stun"));
        able && state.question(&ToGuest::Stun { percent, ms: for_ms })
    }

    /// Lets the guest's processes run. To be said as soon as slowing them is of no more use; it may be said without need.
    pub(crate) fn unstun(&self) {
        let mut state = self.lock();
        if state.helper.as_ref().is_some_and(|helper| helper.can("stun")) {
            state.question(&ToGuest::Unstun);
        }
    }

    /// What the guest said last: how many processes it slows, and by how much (of 100). Nothing when it slows none.
    pub(crate) fn stunned(&self) -> Option<(u32, u32)> {
        self.lock().stunned
    }

    /// Nothing is said, read, opened or closed from now on. QEMU puts what comes from the socket into the guest's memory even
    /// while the VM stands still, and then the memory would change after its last page was copied.
    pub(crate) fn hush(&self) {
        self.lock().hushed = true;
    }

    /// The VM runs here, or is gone.
    pub(crate) fn speak(&self) {
        self.lock().hushed = false;
    }

    /// Connects if it is time to, and asks a helper that was silent for long whether it is there.
    pub(super) fn keep(&self, qemu: i32, find: impl FnOnce() -> Option<PathBuf>, now: Instant) {
        let mut state = self.lock();
        if state.hushed || state.not_before.is_some_and(|at| now < at) {
            return;
        }
        if state.open.is_some() {
            return state.check(now);
        }
        let Some(path) = state.path.get_or_insert_with(find).clone() else { return };
        state.not_before = Some(now + RETRY);
        let Ok(socket) = reach(&path, qemu) else { return };
        let Ok(random) = random() else { return };
        let session = Session::new(MigrationId(random).to_string(), now);
        state.open = Some(Open { socket: Arc::new(socket), session, unsent: VecDeque::new() });
        state.unanswered = 0;
        state.ask_who();
    }

    /// The socket to wait for, and whether something is to be written.
    pub(super) fn socket(&self) -> Option<(Arc<OwnedFd>, bool)> {
        let state = self.lock();
        let open = state.open.as_ref().filter(|_| !state.hushed)?;
        Some((open.socket.clone(), !open.unsent.is_empty()))
    }

    /// Takes what the guest has said, and returns what it asks for.
    pub(super) fn receive(&self, vm: &str, now: Instant) -> Vec<Request> {
        let mut state = self.lock();
        if state.hushed {
            return Vec::new();
        }
        state.flush(now);
        let Some(open) = &mut state.open else { return Vec::new() };
        let mut piece = [0; PIECE];
        let said = match recv(&open.socket, &mut piece[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return state.close(now + RETRY),
            Ok((count, _)) => open.session.hear(&piece[..count], now),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Vec::new(),
            Err(_) => return state.close(now + RETRY),
        };
        let requests = match said {
            Ok(heard) => heard.into_iter().filter_map(|heard| state.note(vm, heard, now)).collect(),
            Err(flood) => state.cut_off(vm, flood, now),
        };
        self.changed.notify_all();
        requests
    }

    pub(super) fn accept(&self, number: u64, migration: &str, host: &str) {
        self.lock().say(&ToGuest::Accepted { number, migration, host });
    }

    pub(super) fn refuse(&self, number: u64, reason: &str) {
        self.lock().say(&ToGuest::Refused { number, reason });
    }

    /// It begins a migration.
    pub(super) fn begins(&self) {
        self.lock().began = Some(Instant::now());
    }

    /// Since it began one.
    pub(super) fn began(&self) -> Option<Duration> {
        self.lock().began.map(|began| began.elapsed())
    }

    /// The VM is not ours any more.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        if !state.hushed {
            *state =
                State { path: state.path.take(), began: state.began, told: state.told, ..State::default() };
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// Says something that will be answered, unless too much was not.
    fn question(&mut self, message: &ToGuest<'_>) -> bool {
        if self.hushed || self.unanswered >= UNANSWERED_MAX {
            return false;
        }
        let Some(open) = &mut self.open else { return false };
        open.session.asked();
        self.unanswered += 1;
        self.asked = Some(Instant::now());
        self.say(message)
    }

    fn ask_who(&mut self) -> bool {
        let Some(nonce) = self.open.as_ref().map(|open| open.session.nonce().to_owned()) else {
            return false;
        };
        self.question(&ToGuest::Hello { nonce: &nonce })
    }

    fn say(&mut self, message: &ToGuest<'_>) -> bool {
        let (text, now) = (message.to_string(), Instant::now());
        let Some(open) = self.open.as_mut().filter(|_| !self.hushed) else { return false };
        if open.unsent.len() + text.len() > UNSENT_MAX {
            self.close(now + CUT_OFF);
            return false;
        }
        open.unsent.extend(text.bytes());
        self.flush(now);
        self.open.is_some()
    }

    fn flush(&mut self, now: Instant) {
        let Some(open) = &mut self.open else { return };
        while !open.unsent.is_empty() {
            let bytes = open.unsent.make_contiguous();
            match send(&open.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => drop(open.unsent.drain(..count)),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                Err(_) => return drop(self.close(now + RETRY)),
            }
        }
    }

    /// A helper that was there and does not answer is gone.
    fn check(&mut self, now: Instant) {
        let silent = |at: Option<Instant>, long: Duration| at.is_none_or(|at| now.duration_since(at) > long);
        if self.helper.is_none() {
            return;
        }
        if self.unanswered > 0 && silent(self.asked, FRESH) && self.heard < self.asked {
            self.helper = None;
            self.stunned = None;
        } else if silent(self.heard, ASK_EVERY) && silent(self.asked, ASK_EVERY) {
            self.ask_who();
        }
    }

    fn note(&mut self, vm: &str, heard: Heard, now: Instant) -> Option<Request> {
        match heard {
            Heard::Stranger => {
                // A new one: the old one's processes run, whatever it said.
                (self.helper, self.stunned, self.unanswered) = (None, None, 0);
                self.ask_who();
                return None;
            }
            Heard::Helper(helper) => {
                if self.helper.as_ref() != Some(&helper) {
                    tracing::debug!(vm, ?helper, "the guest's helper is there");
                }
                self.helper = Some(helper);
            }
            Heard::Request { number, host } => return Some(Request { number, host }),
            Heard::Stunned(stunned) => self.stunned = stunned,
        }
        (self.heard, self.unanswered) = (Some(now), 0);
        None
    }

    fn cut_off(&mut self, vm: &str, flood: Flood, now: Instant) -> Vec<Request> {
        if !std::mem::replace(&mut self.told, true) {
            tracing::warn!(
                vm,
                ?flood,
                "the guest floods its port and is not heard for a while; this is told once"
            );
        }
        self.close(now + CUT_OFF)
    }

    fn close(&mut self, not_before: Instant) -> Vec<Request> {
        (self.open, self.helper, self.stunned) = (None, None, None);
        self.not_before = Some(not_before);
        Vec::new()
    }
}

/// Connects to the socket, if it is this QEMU that serves it: the path is in its command line, and what a QEMU that a guest has
/// taken over says of itself must not lead us to somebody else.
fn reach(path: &Path, qemu: i32) -> std::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let server = socket_peercred(&socket)?.pid.as_raw_nonzero().get();
    if server != qemu {
        return Err(std::io::Error::other(format!("process {server} serves it, not the VM's QEMU")));
    }
    Ok(socket)
}

#[cfg(test)]
mod tests;
