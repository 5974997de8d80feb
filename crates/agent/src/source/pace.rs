//! How fast pages go, how they are packed, and how much of its time the guest keeps: what the user asked for, and what the machine makes
//! of it.

use super::Outgoing;
use crate::balloon;
use crate::config::Mechanism;
use crate::control::explain;
use crate::host::Host;
use crate::model::{CompressionMode, MigrateRequest, SetRequest};
use crate::pages::{SendOptions, SourceBlock};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use sterna_engine::Source;
use sterna_engine::policy::{KEEP_ALL, Method, RateLimits, STEP, writers};
use sterna_engine::source::SourceInput;
use sterna_engine::units::{Pages, Rate};
use sterna_memory::{Throttle, first_writes};

/// The part of the VM's RAM that is kept of pages that are sent again, as a divisor, and the most of it.
const DELTA_PART: u64 = 4;
const DELTA_MAX: u64 = 512 << 20;

/// The limits that a request names; 0 is none.
pub(super) fn limits_of(request: &MigrateRequest) -> RateLimits {
    RateLimits {
        min: rate(request.min_bandwidth),
        max: rate(request.max_bandwidth),
        step: request.bandwidth_step.map_or(STEP, Rate),
    }
}

fn rate(bytes: Option<u64>) -> Option<Rate> {
    bytes.filter(|rate| *rate > 0).map(Rate)
}

/// How pages are sent, as a request wants it.
pub(super) fn options_of(request: &MigrateRequest, host: &Host, blocks: &[SourceBlock]) -> SendOptions {
    let ram: u64 = blocks.iter().map(|block| block.region.bytes).sum();
    SendOptions {
        methods: match request.compression {
            CompressionMode::Auto => &Method::ALL,
            CompressionMode::None => &[],
            CompressionMode::Lz4 => &[Method::Lz4],
            CompressionMode::Zstd => &[Method::Zstd],
        },
        delta_cache: request.delta_cache.unwrap_or((ram / DELTA_PART).min(DELTA_MAX)).min(ram),
        postpone: host.config().has(Mechanism::Postponing),
    }
}

/// How long after a scan it is looked how much was written since: long enough for a rate, short enough that a guest does not come back to
/// what it has written.
const SAMPLE_AFTER: Duration = Duration::from_millis(200);

/// How long the guest's helper slows what it was told to, unless it is told again, and when it is.
const STUN_MS: u32 = 3000;
const STUN_AGAIN: Duration = Duration::from_secs(1);
/// How long it may take to say that it does. A guest whose processors are slowed from outside before that never finds out whom to slow.
const STUN_WITHIN: Duration = Duration::from_secs(3);

/// The guest's processors that are slowed, and what is known of what they write.
#[derive(Default)]
pub(super) struct Slowed {
    /// Whether anybody wants to know who writes most.
    watched: bool,
    threads: Vec<i32>,
    /// First writes of each thread, at the last scan but one and at the last.
    before: Vec<u64>,
    now: Vec<u64>,
    throttle: Option<Throttle>,
    failed: bool,
    /// What the guest's own helper was told.
    asked: Option<Asked>,
}

/// How much a guest's helper is to take from the processes that write most, in percent, and when it was told that first and last.
#[derive(Clone, Copy)]
struct Asked {
    percent: u32,
    first: Instant,
    last: Instant,
}

impl Slowed {
    /// Whether what the processors write is to be looked at.
    pub(super) fn watch(&mut self, watched: bool) {
        self.watched = watched;
    }

    /// All threads have all of their time, and nothing of ours is left around them.
    pub(super) fn let_go(&mut self) {
        self.throttle = None;
    }

    /// Those that have written most since the last scan but one.
    fn writers(&self) -> Vec<i32> {
        let since = self.now.iter().zip(&self.before).map(|(now, before)| now.saturating_sub(*before));
        let most = writers(&since.collect::<Vec<_>>());
        if most.is_empty() {
            self.threads.clone()
        } else {
            most.into_iter().map(|at| self.threads[at]).collect()
        }
    }
}

impl Outgoing {
    /// Notes how much each of the guest's processors has written: who is to be slowed is known from that.
    pub(super) fn look_at_writers(&mut self) {
        if !self.slowed.watched || self.slowed.throttle.is_some() {
            return;
        }
        match self.qemu(|qemu| qemu.vcpu_threads()) {
            Ok(threads) => {
                let counts = first_writes(&self.process, &threads);
                let slowed = &mut self.slowed;
                slowed.before =
                    if slowed.threads == threads { std::mem::take(&mut slowed.now) } else { counts.clone() };
                (slowed.threads, slowed.now) = (threads, counts);
            }
            Err(why) => tracing::warn!(vm = self.vm.name(), why, "its processors' threads are not known"),
        }
    }

    /// Lets what writes most have this part of its time. The guest's own helper, where there is one, knows which process that is, and is
    /// asked first; a guest that writes on all the same is slowed from outside, by its processors. Where that cannot be done, the
    /// user is told once, and the migration goes on without.
    pub(super) fn stun(&mut self, keep: u32) -> Option<SourceInput> {
        if keep >= KEEP_ALL && self.slowed.asked.take().is_some() {
            self.vm.guest().unstun();
        }
        let first = keep < KEEP_ALL && self.slowed.asked.is_none() && self.slowed.throttle.is_none();
        if (first || self.helper_is_at_it()) && self.ask_helper(keep) {
            return None;
        }
        let done = self.try_stun(keep);
        if keep < KEEP_ALL && self.slowed.asked.is_some() && (done.is_err() || self.slowed.failed) {
            // What can be done inside of the guest is done.
            self.slowed.failed = true;
            self.ask_helper(keep);
            return None;
        }
        if let Err(why) = done
            && !std::mem::replace(&mut self.slowed.failed, true)
        {
            tracing::warn!(vm = self.vm.name(), why, "the guest cannot be slowed");
            self.view
                .notice(&format!("the guest of VM {} cannot be slowed on this host: {why}", self.vm.name()));
            // Nobody shall believe that it is.
            return Some(SourceInput::AutoConverge(false));
        }
        None
    }

    /// Helpers know whole percents.
    fn ask_helper(&mut self, keep: u32) -> bool {
        let percent = (KEEP_ALL - keep) * 100 / KEEP_ALL;
        let guest = self.vm.guest();
        // One that was heard of before: a guest that computes all the time may take long to say so again.
        let there = guest.helper().is_some_and(|helper| helper.can("stun"));
        let asked = there && guest.stun(percent, STUN_MS);
        let last = Instant::now();
        let first = self.slowed.asked.map_or(last, |asked| asked.first);
        self.slowed.asked = asked.then_some(Asked { percent, first, last });
        asked
    }

    /// It was asked, has not done it yet, and still may.
    fn helper_is_at_it(&self) -> bool {
        let lately = self.slowed.asked.is_some_and(|asked| asked.first.elapsed() < STUN_WITHIN);
        lately && self.vm.guest().stunned().is_none()
    }

    /// A guest's helper lets go when it is not told again.
    pub(super) fn keep_stunned(&mut self) {
        if let Some(asked) = &mut self.slowed.asked
            && asked.last.elapsed() >= STUN_AGAIN
        {
            self.vm.guest().stun(asked.percent, STUN_MS);
            asked.last = Instant::now();
        }
    }

    fn try_stun(&mut self, keep: u32) -> Result<(), String> {
        let slowed = &mut self.slowed;
        if slowed.throttle.is_none() && keep < KEEP_ALL && !slowed.failed {
            let attach = self.host.attach();
            let throttle = Throttle::start(&self.process, &slowed.writers(), &attach);
            slowed.throttle = Some(throttle.map_err(|why| explain(&why))?);
        }
        let Some(throttle) = &mut slowed.throttle else { return Ok(()) };
        throttle.keep(keep).map_err(|why| why.to_string())
    }

    /// How fast the guest writes, once after each scan of a round that lasts.
    pub(super) fn sample_writes(&mut self) -> Option<Rate> {
        let since = self.scanned.filter(|at| at.elapsed() >= SAMPLE_AFTER)?;
        self.scanned = None;
        let collector = self.collector.as_mut().filter(|_| !self.view.is_stopped())?;
        // Where it cannot be looked, the scan at the end of the round says why.
        let pages = collector.peek().ok()?;
        Rate::measured(Pages(pages).bytes(), since.elapsed())
    }

    /// Takes from the guest what it can do without, if that is wanted. Where it cannot be done the user is told, and it moves whole.
    pub(super) fn shrink(&mut self) {
        if self.balloon == 0 {
            return;
        }
        match balloon::take(&self.host, &self.vm, self.balloon) {
            Ok(bytes) => self.view.ballooned(bytes),
            Err(why) => {
                self.view.notice(&format!("the guest of VM {} gives no memory away: {why}", self.vm.name()));
            }
        }
    }

    /// What the senders have counted, for the machine.
    pub(super) fn counted(&self) -> SourceInput {
        let of = |counter: &std::sync::atomic::AtomicU64| Pages(counter.load(Ordering::Relaxed));
        SourceInput::Counted { normal: of(&self.counters.normal), postponed: of(&self.counters.postponed) }
    }

    /// The user changes limits while the migration goes on.
    pub(super) fn change(&mut self, machine: &mut Source, request: &SetRequest) {
        let now = self.now();
        if let Some(limit) = request.downtime_limit.map(Duration::from_millis) {
            self.view.set_downtime_limit(limit);
            machine.handle(SourceInput::DowntimeLimit(limit), now);
        }
        if let Some(allowed) = request.auto_converge {
            self.slowed.watch(allowed);
            self.slowed.failed &= !allowed;
            machine.handle(SourceInput::AutoConverge(allowed), now);
        }
        if request.max_bandwidth.is_some() || request.min_bandwidth.is_some() {
            let max = request.max_bandwidth.map_or(self.rate.max, |max| rate(Some(max)));
            let min = request.min_bandwidth.map_or(self.rate.min, |min| rate(Some(min)));
            self.rate = RateLimits { max, min, ..self.rate };
            // An agent that is restarted keeps to it.
            let kept = self.host.registry().update(&self.vm, |record| {
                record.leaving.iter_mut().for_each(|leaving| leaving.max_bandwidth = max.map(|rate| rate.0));
            });
            if let Err(why) = kept {
                tracing::warn!(vm = self.vm.name(), %why, "the new limit is not written down");
            }
            machine.handle(SourceInput::RateLimits(self.rate), now);
        }
    }
}
