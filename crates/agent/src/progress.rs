//! A migration's figures as the API shows them.

use crate::model::{LatencyView, MemoryReport, MigrateRequest, MigrationView, RamView, ReasonView, Span};
use crate::pages::SendCounters;
use crate::registry::Vm;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use sterna_engine::Source;
use sterna_engine::handoff::{Activity, MigrationId};
use sterna_engine::policy::RateLimits;
use sterna_engine::progress::Status;
use sterna_engine::source::Outcome;
use sterna_engine::units::{Bytes, PAGE_BYTES, Pages, Rate};
use sterna_engine::wire::message::Faults;
use tokio::sync::watch;

/// A stop that takes longer is shown while it lasts, by whatever happens then, and by the API's own look.
const QUIET: Duration = Duration::from_millis(20);

/// What a migration publishes about itself.
pub(crate) struct View {
    shown: Arc<watch::Sender<MigrationView>>,
    stopped: bool,
    /// While the VM stands still and is to stand still no longer than a moment, nobody is woken up.
    quiet_until: Option<Instant>,
    died: bool,
    split: Vec<Span>,
    sent: Duration,
    verified: Option<u32>,
}

impl View {
    pub(crate) fn new(
        source: &str,
        vm: &Vm,
        request: &MigrateRequest,
        id: MigrationId,
    ) -> (Self, watch::Receiver<MigrationView>) {
        let view = MigrationView {
            id: id.to_string(),
            vm: request.vm.clone(),
            source: source.into(),
            target: request.host.clone(),
            status: Status::Setup.word().into(),
            runs_at: source.into(),
            run_state: Activity::Running.word().into(),
            began: jiff::Timestamp::now(),
            total_time: 0.0,
            setup_time: 0.0,
            target_setup_time: None,
            downtime: None,
            expected_downtime: None,
            downtime_limit: request.downtime_limit,
            max_bandwidth: request.max_bandwidth,
            min_bandwidth: request.min_bandwidth,
            pace: request.min_bandwidth.or(request.max_bandwidth),
            cpu_throttle_percentage: 0,
            memory: MemoryReport::default(),
            notices: Vec::new(),
            ram: RamView { total: vm.record().ram_bytes, page_size: PAGE_BYTES, ..RamView::default() },
            device_state: 0,
            wire_bytes: 0,
            blocks_verified: None,
            downtime_split: Vec::new(),
            postcopy_refusal: None,
            postcopy: None,
            error_desc: None,
            reasons: Vec::new(),
        };
        let (shown, watch) = watch::channel(view);
        (Self::on(Arc::new(shown)), watch)
    }

    fn on(shown: Arc<watch::Sender<MigrationView>>) -> Self {
        Self {
            shown,
            stopped: false,
            quiet_until: None,
            died: false,
            split: Vec::new(),
            sent: Duration::ZERO,
            verified: None,
        }
    }

    /// The same publication, for the next stage of the migration.
    pub(crate) fn another(&self) -> Self {
        Self::on(self.shown.clone())
    }

    pub(crate) fn set_downtime_limit(&self, limit: Duration) {
        self.publish(|view| view.downtime_limit = limit.as_millis() as u64);
    }

    /// What the VM does, but for the migration's own stop.
    pub(crate) fn set_run_state(&self, word: &str) {
        if self.shown.borrow().run_state != word {
            self.publish(|view| view.run_state = word.into());
        }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Those who watch are woken up, unless that would take processors from the VM's stop: they see it with the next change.
    fn publish(&self, change: impl FnOnce(&mut MigrationView)) {
        let loud = self.quiet_until.is_none_or(|until| Instant::now() >= until);
        self.shown.send_if_modified(|view| {
            change(view);
            loud
        });
    }

    /// The VM is being stopped.
    pub(crate) fn stopping(&mut self) {
        self.stopped = true;
        self.quiet_until = Some(Instant::now() + QUIET);
        self.publish(|view| {
            view.status = Status::Device.word().into();
            view.runs_at = String::new();
        });
    }

    /// An earlier life of this agent has handed the VM over, with this limit.
    pub(crate) fn came_back(&self, serves: bool, max_bandwidth: Option<u64>) {
        self.publish(|view| {
            view.max_bandwidth = max_bandwidth;
            if serves {
                view.status = Status::PostcopyPaused.word().into();
                view.runs_at = view.target.clone();
            }
        });
    }

    /// Nobody knows whether the target runs the VM.
    pub(crate) fn unresolved(&self, why: &str) {
        self.publish(|view| view.error_desc = Some(why.to_owned()));
    }

    /// The guest has given so many bytes away for the move.
    pub(crate) fn ballooned(&self, bytes: u64) {
        self.publish(|view| view.ram.balloon_bytes = bytes);
    }

    /// So many bytes of its template were sent, of so many.
    pub(crate) fn template_sent(&self, sent: u64, of: u64) {
        self.publish(|view| (view.ram.template_bytes, view.ram.template_total) = (sent, of));
    }

    /// So much time has passed, of which nobody else knows yet.
    pub(crate) fn elapsed(&self, time: Duration) {
        self.publish(|view| view.total_time = time.as_secs_f64() * 1e3);
    }

    /// So many pages are at the target already, in its template.
    pub(crate) fn template_pages(&self, pages: u64) {
        self.publish(|view| view.ram.template_pages = pages);
    }

    /// So many pages are in common with others and not sent; so many could not be mapped at the target.
    pub(crate) fn common(&self, pages: u64, unmapped: u64) {
        self.publish(|view| {
            view.ram.common_pages = pages;
            view.ram.common_fallback_pages += unmapped;
        });
    }

    /// So many pages are in common with others, and would take more mappings than there are; for those that do not, so many bytes were sent.
    pub(crate) fn fallbacks(&self, pages: u64, bytes: u64) {
        self.publish(|view| {
            view.ram.common_fallback_pages = pages;
            view.ram.common_bytes = bytes;
        });
    }

    /// What memory its QEMU uses, and what there is.
    pub(crate) fn memory(&self, tell: impl FnOnce(&mut MemoryReport)) {
        self.publish(|view| tell(&mut view.memory));
    }

    /// Something that was asked for cannot be done.
    pub(crate) fn notice(&self, text: &str) {
        self.publish(|view| view.notices.push(text.to_owned()));
    }

    /// The VM's QEMU here has ended by itself: nobody runs it.
    pub(crate) fn died(&mut self) {
        self.died = true;
    }

    /// A part of the downtime.
    pub(crate) fn split(&mut self, name: &str, time: Duration) {
        self.split.push(Span { name: name.into(), ms: ms(time) });
    }

    /// A stream has finished the last round, this long after the scan.
    pub(crate) fn barrier(&mut self, since_scan: Duration) {
        self.sent = since_scan;
    }

    /// The target has loaded the VM, this long after the last scan.
    pub(crate) fn loaded(&mut self, since_scan: Duration, load: Duration) {
        // Its word that it had everything may have waited here for other things to be done.
        let sent = self.sent.min(since_scan.saturating_sub(load));
        self.split("send", sent);
        self.split("load", load);
        self.split("wait", since_scan.saturating_sub(sent + load));
    }

    pub(crate) fn verified(&mut self, blocks: u32, asked: bool) {
        self.verified = asked.then_some(blocks);
    }

    /// The target owns the VM, this long after it had loaded it.
    pub(crate) fn committed(&mut self, since_load: Duration, record: Duration, resume: Duration) {
        self.quiet_until = None;
        self.split("record", record);
        self.split("resume", resume);
        self.split("hand-off", since_load.saturating_sub(record + resume));
    }

    pub(crate) fn device_state(&self, bytes: u64) {
        self.publish(|view| view.device_state = bytes);
    }

    /// Copies the machine's figures.
    pub(crate) fn update(
        &self,
        machine: &Source,
        now: Duration,
        counters: &SendCounters,
        wire_bytes: u64,
        (limits, pace): (RateLimits, Option<u64>),
    ) {
        let progress = machine.progress();
        let (normal, status) = (counters.normal.load(Ordering::Relaxed), machine.status(now));
        self.publish(|view| {
            // The last word is said by `finish`, complete: who watches goes away with the first final status.
            if !status.is_final() {
                view.status = status.word().into();
            }
            if matches!(status, Status::PostcopyActive | Status::PostcopyPaused | Status::PostcopyRecover) {
                view.runs_at.clone_from(&view.target);
            }
            view.total_time = ms(now.max(progress.total_time));
            view.setup_time = ms(progress.setup_time);
            view.target_setup_time = progress.target_ready.map(|(at, _)| ms(at));
            view.ram.ahead_bytes = progress.target_ready.map_or(0, |(_, sent)| sent.0);
            view.downtime = progress.downtime.map(ms);
            view.expected_downtime = progress.expected_downtime.map(ms);
            view.max_bandwidth = limits.max.map(|rate| rate.0);
            view.min_bandwidth = limits.min.map(|rate| rate.0);
            view.pace = pace;
            view.cpu_throttle_percentage = progress.throttle;
            view.postcopy_refusal = machine.postcopy_refusal().map(str::to_owned);
            view.wire_bytes = wire_bytes;
            let transferred = counters.bytes.load(Ordering::Relaxed);
            view.ram.transferred = transferred;
            let unseen = transferred.saturating_sub(progress.transferred.0);
            // What is missing at a target that runs the VM is known by who serves it.
            if view.postcopy.is_none() {
                view.ram.remaining = progress.ram_remaining.0.saturating_sub(unseen);
            }
            view.ram.normal = normal;
            view.ram.normal_bytes = Pages(normal).bytes().0;
            view.ram.duplicate = counters.duplicate.load(Ordering::Relaxed);
            let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            view.ram.postponed_bytes = Pages(count(&counters.postponed)).bytes().0;
            view.ram.delta_pages = count(&counters.patched);
            view.ram.delta_saved_bytes = count(&counters.patched_saved);
            view.ram.compression_saved_bytes = count(&counters.packed_saved);
            view.ram.dirty_pages_rate = progress.dirty_pages_rate;
            view.ram.dirty_sync_count = progress.rounds;
            // The first round takes longest: until it is over, what it has moved so far tells.
            let so_far = || Rate::measured(Bytes(transferred), now.saturating_sub(progress.setup_time));
            view.ram.mbps = progress.bandwidth.or_else(so_far).map_or(0.0, |rate| rate.mbps());
        });
    }

    /// The VM runs at the target, and so much of it is still to go there.
    pub(crate) fn postcopy(&self, requests: u64, pushed: u64, remaining: u64) {
        self.publish(|view| {
            let known = view.postcopy.get_or_insert_default();
            (known.requests, known.pushed) = (requests, pushed);
            view.ram.remaining = remaining;
        });
    }

    /// How long the guest has waited for pages.
    pub(crate) fn faults(&self, faults: &Faults) {
        self.publish(|view| {
            let known = view.postcopy.get_or_insert_default();
            known.faults = Some(faults.count);
            let (mean, p50, p99, max) = (faults.mean_us, faults.p50_us, faults.p99_us, faults.max_us);
            known.latency = Some(LatencyView { mean, p50, p99, max });
            known.vcpu_blocktime = faults.vcpu_blocked_us.iter().map(|us| *us as f64 / 1e3).collect();
        });
    }

    /// The same in the log: migrations are remembered only as long as the agent lives.
    fn tell(&self) {
        let view = self.shown.borrow();
        let what = view.error_desc.as_deref().unwrap_or("the VM has moved");
        tracing::info!(vm = view.vm, to = view.target, migration = view.id, "{what}");
    }

    /// The last word.
    pub(crate) fn finish(&mut self, outcome: &Outcome) {
        let (split, verified, died) = (std::mem::take(&mut self.split), self.verified, self.died);
        self.shown.send_modify(|view| {
            view.downtime_split = split;
            view.blocks_verified = verified;
            let (status, runs_at) = match outcome {
                Outcome::Completed => (Status::Completed, view.target.clone()),
                Outcome::Cancelled => (Status::Cancelled, view.source.clone()),
                Outcome::Refused(_) | Outcome::Failed(_) => (Status::Failed, view.source.clone()),
                Outcome::Stranded(_) => (Status::Unresolved, String::new()),
                Outcome::EndedThere(_) => (Status::Failed, String::new()),
                Outcome::PagesLost(_) => (Status::Failed, view.target.clone()),
            };
            view.status = status.word().into();
            view.runs_at = runs_at;
            view.error_desc = describe(outcome, view);
            if died {
                view.status = Status::Failed.word().into();
                view.runs_at = String::new();
                view.error_desc = Some(format!(
                    "VM {} did not move to {}: its QEMU at {} has ended; see its log",
                    view.vm, view.target, view.source
                ));
            }
            if let Outcome::Refused(reasons) = outcome {
                let show = |reason: &sterna_engine::wire::message::Reason| ReasonView {
                    code: reason.code.clone(),
                    text: reason.text.clone(),
                };
                view.reasons = reasons.iter().map(show).collect();
            }
        });
        self.tell();
    }
}

fn describe(outcome: &Outcome, view: &MigrationView) -> Option<String> {
    let (vm, source, target) = (&view.vm, &view.source, &view.target);
    let does = match view.run_state.as_str() {
        "running" => "runs".to_owned(),
        state => format!("is {state}"),
    };
    Some(match outcome {
        Outcome::Completed => return None,
        Outcome::Cancelled => {
            format!("the migration of VM {vm} to {target} was cancelled; it {does} at {source} as before")
        }
        Outcome::Refused(_) => format!("VM {vm} cannot move to {target}; it {does} at {source}, untouched"),
        Outcome::Failed(why) => {
            format!("VM {vm} did not move to {target}: {why}; it {does} at {source} as before")
        }
        Outcome::EndedThere(why) => {
            format!(
                "VM {vm} was handed over to {target} and has ended there before all of its pages had come: {why}; it runs nowhere, and what \
                 was left of it at {source} was of no use any more: see its log at {target}"
            )
        }
        Outcome::PagesLost(why) => {
            format!(
                "VM {vm} runs at {target} without all of its pages, and those are lost: {why}; it waits for good where it touches one: end it \
                 there (sterna stop {vm})"
            )
        }
        Outcome::Stranded(why) => {
            format!(
                "VM {vm} did not move to {target}: {why}; it is stopped at {source}: look at its log, then resume or restart it"
            )
        }
    })
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
