//! Rounds: how fast they go, what follows them, and what a guest that outruns them keeps of its time.

use super::{LOCAL_WAIT, STALL_WAIT, STOPPED_STALL_WAIT, Source, SourceAction, SourceParameters, State};
use crate::policy::{KEEP_ALL, Observation, RateLimits, Seen, Verdict};
use crate::units::{Bytes, PAGE_BYTES, Pages, Rate};
use std::time::Duration;

/// Bytes that a round must have moved for its bandwidth to count: smaller ones measure latency.
const BANDWIDTH_SAMPLE_MIN: Bytes = Bytes(1 << 20);
/// The same of what the target has read ahead: what lies in sockets has not gone anywhere.
const AHEAD_SAMPLE_MIN: Bytes = Bytes(16 << 20);
/// A round that is shorter tells nothing about how fast the guest writes: it does so in bursts.
const RATE_SAMPLE_MIN: Duration = Duration::from_millis(100);
/// The least time between two rounds when most pages of the first were written again before they could go. Scans that follow each other
/// at once would only take the guest's time.
const ROUND_MIN: Duration = Duration::from_millis(250);
/// The time between two rounds when all has gone that can go: what is written again and again goes once in it.
const AWAIT_PAUSE: Duration = Duration::from_secs(2);
/// A round that reached this part of its pace, in percent, could have gone faster.
const PACED: u64 = 90;

/// What is known of the rounds so far.
#[derive(Debug)]
pub(super) struct Rounds {
    /// The pace that the driver was told last.
    pace: Option<Rate>,
    /// How fast the guest wrote during the last round.
    written: Option<Rate>,
    /// The same in a short moment of it.
    sampled: Option<Rate>,
    /// What the link takes, from a round that no pace held back.
    link: Option<Rate>,
    /// The fastest round so far.
    fastest: Option<Rate>,
    /// Pages that went by in the last round, and how fast, as if all had gone whole: faster than the link where they shrink on their way.
    throughput: Option<(Bytes, Rate)>,
    /// Pages that this round was to send.
    pages: Pages,
    normal: Pages,
    normal_before: Pages,
    postponed: Pages,
    postponed_before: Pages,
    stunned: bool,
    /// What the VM has waited for is there: what it wrote meanwhile goes before it stops.
    arrived: bool,
    /// When the target began to take pages in the middle of the first round, and how much had gone before.
    flows: Option<(Duration, Bytes)>,
    /// When something went last before that.
    ahead: Duration,
    /// The bandwidth is that of a round in which the target took nothing for most of the time.
    unsure: bool,
}

impl Rounds {
    pub(super) fn new(parameters: &SourceParameters) -> Self {
        Self {
            pace: parameters.rate.max,
            written: None,
            sampled: None,
            link: None,
            fastest: None,
            throughput: None,
            pages: Pages(0),
            normal: Pages(0),
            normal_before: Pages(0),
            postponed: Pages(0),
            postponed_before: Pages(0),
            stunned: false,
            arrived: false,
            flows: None,
            ahead: Duration::ZERO,
            unsure: false,
        }
    }

    fn was_mostly_postponed(&self) -> bool {
        (self.postponed.0 - self.postponed_before.0) * 2 > self.pages.0
    }
}

impl Source {
    pub(super) fn begin_round(&mut self, round: u32, pages: Pages, now: Duration) {
        self.progress.rounds = round;
        self.progress.ram_remaining = pages.bytes();
        let rounds = &mut self.rounds;
        rounds.pages = pages;
        (rounds.normal_before, rounds.postponed_before) = (rounds.normal, rounds.postponed);
        self.pace(self.parameters.rate.of_round(self.rounds.written));
        let state = State::Sending { round, began: now, sent_before: self.last_sent, barriers: 0 };
        self.enter(state, SourceAction::SendRound(round), now, STALL_WAIT);
    }

    pub(super) fn on_sent(&mut self, bytes: Bytes, now: Duration) {
        if bytes == self.last_sent {
            return;
        }
        let more = Bytes(bytes.0.saturating_sub(self.last_sent.0));
        self.last_sent = bytes;
        self.progress.transferred = bytes;
        self.progress.ram_remaining = Bytes(self.progress.ram_remaining.0.saturating_sub(more.0));
        match self.state {
            State::Sending { .. } if self.accepted => self.wait(now, STALL_WAIT),
            State::Sending { .. } => self.rounds.ahead = now,
            State::Finishing { .. } => self.wait(now, STOPPED_STALL_WAIT),
            _ => {}
        }
    }

    pub(super) fn on_barrier(&mut self, got: u32, stream: u32, now: Duration) {
        let all = self.all_barriers();
        let bit = 1u64.checked_shl(stream).unwrap_or(0) & all;
        let (State::Sending { round, barriers, .. }
        | State::Dropping { round, barriers }
        | State::Finishing { round, barriers, .. }) = &mut self.state
        else {
            return self.on_disconnected(format!("the target confirmed round {got} out of turn"), now);
        };
        if got != *round || bit == 0 || *barriers & bit != 0 || !self.accepted {
            let round = *round;
            return self.on_disconnected(
                format!("the target confirmed round {got} on stream {stream} during round {round}"),
                now,
            );
        }
        *barriers |= bit;
        if *barriers != all {
            return;
        }
        self.progress.ram_remaining = Bytes(0);
        match self.state {
            State::Sending { began, sent_before, .. } => self.on_round_over(began, sent_before, now),
            State::Dropping { .. } => self.switch(now),
            _ => self.wait(now, self.load_wait()),
        }
    }

    pub(super) fn on_counted(&mut self, normal: Pages, postponed: Pages) {
        self.rounds.normal = normal.max(self.rounds.normal);
        self.rounds.postponed = postponed.max(self.rounds.postponed);
    }

    pub(super) fn on_writes(&mut self, rate: Rate) {
        if matches!(self.state, State::Sending { .. } | State::Resting { .. }) {
            self.rounds.sampled = Some(rate);
            self.progress.dirty_pages_rate = rate.0 / PAGE_BYTES;
        }
    }

    pub(super) fn on_round_over(&mut self, began: Duration, sent_before: Bytes, now: Duration) {
        let round_time = now.saturating_sub(began);
        let since = |(began, before): (Duration, Bytes)| {
            (Bytes(self.last_sent.0.saturating_sub(before.0)), now.saturating_sub(began))
        };
        // What the link takes is seen while the target takes pages, and while it reads ahead as fast as they come.
        let flows = self.rounds.flows.take();
        let parts = flows.map(|flows| {
            let ahead = Bytes(flows.1.0.saturating_sub(sent_before.0));
            let ahead = (ahead, self.rounds.ahead.saturating_sub(began));
            [
                Some(since(flows)).filter(|part| part.0 >= BANDWIDTH_SAMPLE_MIN),
                Some(ahead).filter(|part| part.0 >= AHEAD_SAMPLE_MIN),
            ]
        });
        let fastest =
            parts.into_iter().flatten().flatten().max_by_key(|(sent, took)| Rate::measured(*sent, *took));
        self.rounds.unsure = flows.is_some() && fastest.is_none();
        let (sent, took) = fastest.unwrap_or_else(|| since((began, sent_before)));
        if sent >= BANDWIDTH_SAMPLE_MIN || self.progress.bandwidth.is_none() {
            // Figures that come late say that nothing was sent: no bandwidth that would ever fit a limit.
            let measured = Rate::measured(sent, took).filter(|rate| *rate > Rate(0));
            self.progress.bandwidth = measured.or(self.progress.bandwidth);
            if let Some(measured) = measured {
                self.learn_link(measured);
            }
        }
        self.enter(State::Scanning { round_time }, SourceAction::Scan, now, LOCAL_WAIT);
    }

    /// From now on the target takes pages, in the middle of the first round.
    pub(super) fn flows(&mut self, now: Duration) {
        self.rounds.flows = Some((now, self.last_sent));
    }

    fn learn_link(&mut self, measured: Rate) {
        let rounds = &mut self.rounds;
        rounds.fastest = rounds.fastest.max(Some(measured));
        let held_back = rounds.pace.is_some_and(|pace| measured.0 >= pace.0 / 100 * PACED);
        if !held_back {
            rounds.link = Some(measured);
        }
    }

    /// What the last round will go at, as far as it can be known: each round was at most that fast. So much as went by in the round
    /// before will shrink on its way as it did then; what is more is new, and may not.
    fn bandwidth_at_stop(&self, residual: Bytes) -> Rate {
        let rounds = &self.rounds;
        let seen = match self.parameters.rate.min {
            Some(_) => rounds.link.or(rounds.fastest),
            None => self.progress.bandwidth,
        };
        let link = seen.or(self.progress.bandwidth).unwrap_or(Rate(1));
        let Some((handled, rate)) = rounds.throughput.filter(|(_, rate)| *rate > link) else { return link };
        let alike = residual.min(handled);
        let time = rate.time_for(alike).saturating_add(link.time_for(Bytes(residual.0 - alike.0)));
        Rate::measured(residual, time).unwrap_or(rate).clamp(link, rate)
    }

    pub(super) fn on_scanned(&mut self, pages: Pages, now: Duration) {
        let State::Scanning { round_time } = self.state else { return };
        let residual = pages.bytes();
        let written = Rate::measured(residual, round_time.max(Duration::from_micros(1))).unwrap_or(Rate(0));
        self.rounds.written = Some(written);
        let writes = self.rounds.sampled.take().map_or(written, |sampled| sampled.max(written));
        let handled = Pages(self.rounds.normal.0 - self.rounds.normal_before.0).bytes();
        if handled >= BANDWIDTH_SAMPLE_MIN {
            self.rounds.throughput = Rate::measured(handled, round_time).map(|rate| (handled, rate));
        }
        let bandwidth = self.bandwidth_at_stop(residual);
        if round_time >= RATE_SAMPLE_MIN && !self.lazy.is_cut() {
            self.progress.dirty_pages_rate = writes.0 / PAGE_BYTES;
        }
        if !self.lazy.is_cut() {
            self.progress.expected_downtime = Some(bandwidth.time_for(residual));
        }
        self.progress.ram_remaining = residual;
        let elapsed = now.saturating_sub(self.began);
        let unsettled = self.unsettled.bytes();
        let exhausted = self.parameters.rate.is_exhausted(written, residual, self.rounds.link);
        let seen = Observation { residual, unsettled, bandwidth, elapsed, exhausted };
        let fits = bandwidth.time_for(residual) <= self.convergence.downtime_limit();
        if self.switch_is_due(fits, elapsed) {
            return if self.parameters.awaits { self.rest(pages, now) } else { self.prepare_switch(now) };
        }
        match self.convergence.decide(seen) {
            Verdict::Settle => self.enter(State::Settling, SourceAction::Settle, now, LOCAL_WAIT),
            Verdict::Round => {
                self.go_on(pages, Seen { written: writes, bandwidth, fits }, now, round_time);
            }
            Verdict::Stop if self.parameters.awaits => self.rest(pages, now),
            Verdict::Stop if pages > Pages(0) && std::mem::take(&mut self.rounds.arrived) => {
                self.begin_round(self.progress.rounds + 1, pages, now);
            }
            Verdict::Stop => self.stop(now),
        }
    }

    /// All has gone that can go, and the VM may not stop yet.
    pub(super) fn rest(&mut self, pages: Pages, now: Duration) {
        self.state = State::Resting { pages };
        self.wait(now, AWAIT_PAUSE);
    }

    /// From now on the VM may stop: it is looked at once whether it can.
    pub(super) fn on_arrived(&mut self, now: Duration) {
        if std::mem::take(&mut self.parameters.awaits) && matches!(self.state, State::Resting { .. }) {
            self.rounds.arrived = true;
            self.look_again(now);
        }
    }

    pub(super) fn look_again(&mut self, now: Duration) {
        let scanning = State::Scanning { round_time: Duration::ZERO };
        self.enter(scanning, SourceAction::Scan, now, LOCAL_WAIT);
    }

    pub(super) fn stop(&mut self, now: Duration) {
        self.stopped_at = Some(now);
        self.let_go();
        self.pace(self.parameters.rate.of_stop());
        self.enter(State::Stopping, SourceAction::Stop, now, LOCAL_WAIT);
    }

    /// Another round, at once or after a rest; a guest that outruns the link is slowed before it.
    fn go_on(&mut self, pages: Pages, seen: Seen, now: Duration, round_time: Duration) {
        if !self.rounds.unsure
            && let Some(keep) = self.stun.decide(seen)
        {
            self.progress.throttle = (KEEP_ALL - keep) * 100 / KEEP_ALL;
            self.rounds.stunned |= keep != KEEP_ALL;
            self.actions.push_back(SourceAction::Stun(keep));
        }
        if !seen.fits && round_time < ROUND_MIN && self.rounds.was_mostly_postponed() {
            self.state = State::Resting { pages };
            self.wait(now, ROUND_MIN - round_time);
        } else {
            self.begin_round(self.progress.rounds + 1, pages, now);
        }
    }

    /// Who takes the permission back wants his guest back, and not at the end of a round.
    pub(super) fn on_auto_converge(&mut self, allowed: bool) {
        self.stun.allow(allowed);
        if !allowed {
            self.let_go();
        }
    }

    /// The guest gets all of its time, if any was taken. Said again wherever a migration ends: what was said before may not have been
    /// done any more.
    pub(super) fn let_go(&mut self) {
        self.stun.end();
        self.progress.throttle = 0;
        if self.rounds.stunned {
            self.actions.push_back(SourceAction::Stun(KEEP_ALL));
        }
    }

    /// The user's new limits count at once, for the round that goes on as well.
    pub(super) fn on_rate_limits(&mut self, limits: RateLimits) {
        self.parameters.rate = limits;
        match self.state {
            State::Sending { .. } => self.pace(limits.of_round(self.rounds.written)),
            State::Stopping | State::Finishing { .. } => self.pace(limits.of_stop()),
            // What is served after the hand-over.
            State::Serving | State::Reattaching | State::Asking { .. } => self.pace(limits.of_stop()),
            _ => {}
        }
    }

    fn pace(&mut self, pace: Option<Rate>) {
        if self.rounds.pace != pace {
            self.rounds.pace = pace;
            self.actions.push_back(SourceAction::Pace(pace));
        }
    }
}
