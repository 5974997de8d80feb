//! What goes into the source's state machine, and what comes out of it.

use crate::handoff::{Activity, Choice, MigrationId, Ownership, Record};
use crate::policy::RateLimits;
use crate::units::{Bytes, Pages, Rate};
use crate::wire::Message;
use crate::wire::message::{Offer, Reason};
use std::time::Duration;

/// What a migration is asked to do.
#[derive(Clone, Debug)]
pub struct SourceParameters {
    /// Identity of this try.
    pub id: MigrationId,
    /// Name of the host the VM goes to.
    pub peer: String,
    /// The VM, as it is offered to the target.
    pub offer: Offer,
    /// Longest time the VM may be stopped.
    pub downtime_limit: Duration,
    /// When to stop the VM even if that limit cannot be kept.
    pub timeout: Option<Duration>,
    /// What the VM does as the migration begins.
    pub activity: Activity,
    /// How fast rounds are sent.
    pub rate: RateLimits,
    /// Whether a guest that writes faster than the link takes is slowed (QEMU's `auto-converge`).
    pub auto_converge: bool,
    /// Whether the VM runs at the target before all of its pages are there.
    pub postcopy: Postcopy,
    /// Something goes to the target beside the pages, and the VM does not stop before [`SourceInput::Arrived`].
    pub awaits: bool,
}

/// When a migration switches to post-copy (Hines, Gopalan, VEE 2009). `virsh`'s words for what they mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Postcopy {
    /// Only when its user says so ([`SourceInput::Switch`]).
    #[default]
    OnDemand,
    /// At once: no page travels before the VM runs at the target.
    AtOnce,
    /// After the first round, if what was written meanwhile does not fit the downtime limit (`--postcopy-after-precopy`).
    AfterPrecopy,
    /// When the timeout has passed (`--timeout-postcopy`).
    AtTimeout,
}

/// What happens to the source.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and it is taken apart at once")]
#[derive(Clone, Debug)]
pub enum SourceInput {
    /// A message of the target.
    Message(Message),
    /// The control connection or a stream is lost.
    Disconnected(String),
    /// [`SourceAction::Record`] is stored.
    Recorded,
    /// [`SourceAction::Record`] could not be stored.
    RecordFailed(String),
    /// [`SourceAction::OpenStreams`] is done.
    Opened,
    /// [`SourceAction::Track`] is done; the send-set holds these pages.
    Tracked(Pages),
    /// [`SourceAction::Share`] has come so far that the target was told what to map.
    Sharing,
    /// [`SourceAction::Share`] is done, or cannot be done; the send-set holds these pages.
    Shared(Pages),
    /// Figures have changed: bytes of page data and descriptors written to the streams so far.
    Sent(Bytes),
    /// Pages so far that were sent as bytes, whole or as what has changed of them, and pages that were to be sent and wait for the
    /// next round, because they had been written again.
    Counted {
        /// Sent.
        normal: Pages,
        /// Postponed.
        postponed: Pages,
    },
    /// How fast the guest writes, seen in a short moment after a scan: pages that it writes again and again count once in a round, which
    /// makes a long one look idle.
    Writes(Rate),
    /// What the VM does, as it was seen at a scan: its user may pause it and let it run again at any time.
    Activity(Activity),
    /// So many pages that were sent, and are not in the send-set, may have been changed unseen by disk I/O that was in
    /// flight at a scan. A stop has to compare them with what was sent; [`SourceAction::Settle`] makes it so that there are
    /// none.
    Unsettled(Pages),
    /// What goes to the target beside the pages is there.
    Arrived,
    /// [`SourceAction::Scan`] is done; the send-set holds these pages.
    Scanned(Pages),
    /// [`SourceAction::Settle`] is done; the send-set holds these pages.
    Settled(Pages),
    /// [`SourceAction::Stop`] is done: the VM is stopped, its device state saved, and the send-set, these pages, final.
    Stopped(Pages),
    /// [`SourceAction::Finish`] is done; a peek has found these pages written since the last scan.
    Finished(Pages),
    /// [`SourceAction::Resume`] is done: the VM is here as it was.
    Resumed,
    /// [`SourceAction::Resume`] failed.
    ResumeFailed(String),
    /// The target has answered [`SourceAction::Ask`].
    Answered(Ownership),
    /// [`SourceAction::Ask`] got no answer.
    AskFailed(String),
    /// [`SourceAction::End`] is done: the VM's QEMU here is dead.
    Ended,
    /// A local step failed.
    Failed(String),
    /// The user cancels.
    Cancel,
    /// The user changes the downtime limit.
    DowntimeLimit(Duration),
    /// The user changes how fast rounds are sent.
    RateLimits(RateLimits),
    /// The user wants the VM to run at the target as soon as it can.
    Switch,
    /// [`SourceAction::Reattach`] is done: control connection, demand connection and push streams are open again.
    Reattached,
    /// Post-copy: the QEMU that has the missing pages has ended; they are gone.
    PagesLost(String),
    /// The user allows a guest that does not converge to be slowed, or not any more; or it was found that it cannot be done.
    AutoConverge(bool),
    /// An operator decides who owns a VM that was released; answered by [`SourceAction::Reply`].
    Recover(Choice),
    /// Time has passed.
    Tick,
}

/// What the source wants done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceAction {
    /// Store a record.
    Record(Record),
    /// Send a message on the control connection.
    Send(Message),
    /// Open this many page streams. The target may be starting its QEMU still, and take little until [`Message::Accepted`].
    OpenStreams(u32),
    /// Open the connection for the demands of a post-copy, which the target can do. It is answered only if it fails.
    OpenDemand,
    /// Attach to the VM, arm write tracking, and put every page that may not be zero into the send-set.
    Track,
    /// Find out which pages of the send-set are in common with others, have each content travel once, and, once the target has a QEMU, have it
    /// map them ([`Message::Common`]). [`Message::Mapped`] goes by the machine.
    Share,
    /// From now on send at this rate; `None` is as fast as the link takes it. A migration begins at its maximum.
    Pace(Option<Rate>),
    /// Let the guest's processors that write most have this part of their time, in thousandths; `KEEP_ALL` is all, and needs no answer. Where it
    /// cannot be done the migration goes on without.
    Stun(u32),
    /// Move the send-set to the streams as this round, and end the round on each.
    SendRound(u32),
    /// Send nothing more of the round that is under way, but its end: what is left of the send-set waits for the next scan.
    Abandon,
    /// Scan: the send-set becomes what was written since the last scan.
    Scan,
    /// Scan, wait until no disk I/O of the guest is in flight, for which the VM stands still for a moment, and add every
    /// page that such I/O may have changed unseen to the send-set, to be compared with what was sent.
    Settle,
    /// Post-copy: tell in this round which pages of the send-set the target is to drop, and send none; the send-set stays.
    TellStale(u32),
    /// Stop the VM, save its device state, scan again, and add what was written to the send-set.
    Stop,
    /// Send the send-set as this last round, the device state and [`Message::StateEnd`]; then peek.
    Finish(u32),
    /// Post-copy: tell in this last round which pages are missing, those of the send-set, and send what must be there; send the device
    /// state and [`Message::StateEnd`]; answer demands from now on; then peek.
    FinishPostcopy(u32),
    /// Post-copy: open the push streams, and send what the target says is missing.
    Push,
    /// Post-copy: connect again, and go on as [`SourceAction::Push`] does.
    Reattach,
    /// Make the VM do here what it did before the stop.
    Resume,
    /// End tracking, and close the streams and the control connection.
    Release,
    /// Ask the target who owns the VM.
    Ask,
    /// End the VM's QEMU here and wait for its death.
    End,
    /// Tell the operator what became of the decision.
    Reply(Result<(), String>),
    /// The migration is over.
    Over(Outcome),
}

/// How a migration ended at the source.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The target runs the VM.
    Completed,
    /// The target refused; the VM runs here, untouched.
    Refused(Vec<Reason>),
    /// It failed; the VM runs here.
    Failed(String),
    /// It was cancelled; the VM runs here.
    Cancelled,
    /// It failed, and the VM could not be resumed here either.
    Stranded(String),
    /// The target ran the VM, which has ended there before all of its pages had come, or an operator says so: it runs nowhere.
    EndedThere(String),
    /// The target runs the VM, and pages that it still needed are gone: it waits for good where it touches one.
    PagesLost(String),
}
