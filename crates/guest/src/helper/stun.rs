//! Slows the processes that write most memory: they are stopped and let go, many times a second.
//!
//! It ends by itself: at the deadline, or when it is dropped. While it goes on, those that begin to write are found too.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::line::PERCENT_MAX;
use super::victims::{Chooser, Usage, look};
use super::watchdog::{Held, Watchdog};

/// Stopped and running once: short enough that a person hardly sees it, long enough that 5 % of it is more than the way
/// through the scheduler of an emulated processor.
const PERIOD: Duration = Duration::from_millis(40);
/// Between the two looks that tell who writes: twenty of the kernel's ticks.
const FIRST_LOOK: Duration = Duration::from_millis(200);
/// Between two later looks: a look reads a file for each process.
const NEXT_LOOK: Duration = Duration::from_secs(1);

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// So many processes are slowed, by so much.
    Slowed(usize, u32),
    /// All run.
    Over,
}

/// What was asked for.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    percent: u32,
    until: Instant,
}

/// Slows processes.
#[derive(Debug)]
pub struct Stunner {
    chooser: Chooser,
    watchdog: Option<Watchdog>,
    wanted: Option<Wanted>,
    victims: BTreeMap<(i32, u64), Held>,
    before: Vec<Usage>,
    next_look: Instant,
    looked: bool,
    stopped: bool,
    edge: Instant,
}

impl Stunner {
    /// One that slows nobody yet.
    #[must_use]
    pub fn new(chooser: Chooser, now: Instant) -> Self {
        Self {
            chooser,
            watchdog: None,
            wanted: None,
            victims: BTreeMap::new(),
            before: Vec::new(),
            next_look: now,
            looked: false,
            stopped: false,
            edge: now,
        }
    }

    /// Begins, or goes on until a later time, perhaps with another share. Returns false when it cannot be undone for sure,
    /// and nobody is slowed.
    pub fn stun(&mut self, percent: u32, for_ms: u32, now: Instant) -> bool {
        if !self.is_guarded() {
            self.unstun();
            return false;
        }
        if self.wanted.is_none() {
            self.before = look();
            self.next_look = now + FIRST_LOOK;
            self.looked = false;
            self.edge = now;
        }
        let until = now + Duration::from_millis(for_ms.into());
        self.wanted = Some(Wanted { percent: percent.min(PERCENT_MAX), until });
        true
    }

    /// Makes sure that there is a watchdog.
    pub fn is_guarded(&mut self) -> bool {
        if self.watchdog.as_mut().is_none_or(|dog| !dog.is_alive()) {
            self.unstun();
            self.watchdog = Watchdog::start().ok();
        }
        self.watchdog.is_some()
    }

    /// Lets all of them run, at once. Returns whether anybody was to be slowed.
    pub fn unstun(&mut self) -> bool {
        self.victims.values().for_each(Held::go_on);
        self.victims.clear();
        self.stopped = false;
        if let Some(dog) = self.watchdog.as_mut().filter(|_| self.wanted.is_some()) {
            dog.clear();
        }
        self.wanted.take().is_some()
    }

    /// How many are slowed, and by how much.
    #[must_use]
    pub fn state(&self) -> Option<(usize, u32)> {
        self.wanted.map(|wanted| (self.victims.len(), wanted.percent))
    }

    /// When there is something to do next.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        let wanted = self.wanted?;
        let edge = if self.victims.is_empty() { wanted.until } else { self.edge };
        Some(wanted.until.min(edge).min(self.next_look))
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) -> Option<Change> {
        let wanted = self.wanted?;
        if now >= wanted.until {
            self.unstun();
            return Some(Change::Over);
        }
        if now >= self.edge && !self.victims.is_empty() {
            self.turn(wanted.percent, now);
            if self.wanted.is_none() {
                return Some(Change::Over);
            }
        }
        if now < self.next_look {
            return None;
        }
        let known = self.victims.len();
        self.find_more();
        self.next_look = now + NEXT_LOOK;
        // The first look is answered even if it finds nobody.
        let first = !std::mem::replace(&mut self.looked, true);
        (first || self.victims.len() != known).then_some(Change::Slowed(self.victims.len(), wanted.percent))
    }

    /// From running to stopped, or back.
    fn turn(&mut self, percent: u32, now: Instant) {
        let taken = PERIOD * percent / 100;
        if self.stopped || taken.is_zero() {
            self.victims.values().for_each(Held::go_on);
            self.stopped = false;
            self.edge = now + (PERIOD - taken);
        } else if self.watchdog.as_mut().is_some_and(Watchdog::is_alive) {
            self.victims.retain(|_, process| process.stop());
            self.stopped = true;
            self.edge = now + taken;
        } else {
            // Nobody would undo it if we were killed now.
            self.unstun();
        }
    }

    fn find_more(&mut self) {
        let now = look();
        let (dog, chosen) = (self.watchdog.as_mut(), self.chooser.choose(&self.before, &now));
        let Some(dog) = dog else { return };
        let guard = dog.pid().cast_signed();
        for usage in chosen.into_iter().filter(|usage| usage.pid != guard) {
            let place = (usage.pid, usage.start);
            if self.victims.len() >= super::victims::VICTIMS_MAX || self.victims.contains_key(&place) {
                continue;
            }
            let Some(process) = Held::open(usage.pid, usage.start) else { continue };
            if dog.add(&usage).is_ok() {
                self.victims.insert(place, process);
            }
        }
        self.before = now;
    }
}

impl Drop for Stunner {
    fn drop(&mut self) {
        self.unstun();
    }
}
