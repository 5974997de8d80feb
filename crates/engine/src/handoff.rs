//! The hand-off: who owns a VM, as written down.
//!
//! At every instant at most one QEMU may run the VM, and at least one can be resumed. Three rules give that:
//!
//! 1. The source *releases*: it stores [`Step::Released`], then says so. From then on it never resumes by itself.
//! 2. The target stores [`Step::Committed`] durably, then lets its QEMU run. That store is the commit.
//! 3. The source takes the VM back only if it never released it, or if the target proves that its QEMU is dead
//!    ([`Step::Dead`] is stored after the process was waited for, and a dead migration never commits).
//!
//! Both ends keep one [`Record`] per VM. After a crash the owner is found from these records alone: [`at_source`] and
//! [`at_target`] say what a restarted agent does, [`answer`] what a target says when it is asked.
//!
//! Where the target does not answer, for good, an operator decides ([`Choice`]). The source then *fences* the old try: it
//! stores a record of a higher generation before it resumes the VM, so that nothing of the old try counts any more. The
//! target may have committed to that try and not have run it yet. So a restarted target never runs a VM on its commit
//! alone: it asks the source first ([`answer_to_target`], [`may_continue`]), and waits for an answer as long as it takes.
//! A source that has let the target run does not fence after it. A target that *ran* the VM asks nobody: there the
//! operator was wrong, and only the lock of the image, which the source's QEMU must take first, stands in the way.

use thiserror::Error;

/// Identity of one try to migrate one VM: random, chosen by the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MigrationId(pub [u8; 16]);

impl std::fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::str::FromStr for MigrationId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut id = [0; 16];
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(());
        }
        for (at, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).map_err(|_| ())?;
        }
        Ok(Self(id))
    }
}

/// Counts the tries to migrate a VM over its whole life. It travels with the VM, so that an old message or record can
/// never be mistaken for a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation of the next try.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Which end of a migration wrote a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The host that ran the VM when the migration began.
    Source,
    /// The host that is to run it.
    Target,
}

/// How far an end has come, as far as ownership goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Source: the migration is under way and the VM is ours. It may be stopped for it.
    Sending,
    /// Source: the VM was handed out. It must not be resumed here without the target's proof.
    Released,
    /// Source, in post-copy: the target runs it and fetches pages from what is left of it here, which is kept stopped.
    Serving,
    /// Source: the target runs it. What is left of it here is to be ended.
    Gone,
    /// Source: the migration is over and the VM is ours.
    Kept,
    /// Source: an operator has decided that the VM is ours, and nothing of the try before counts any more.
    Fenced,
    /// Target: a QEMU waits for the VM and must not run it.
    Incoming,
    /// Target: the VM is ours; its QEMU may not have been told yet.
    Committed,
    /// Target, in post-copy: the VM is ours and runs, and pages of it are still at the source.
    Fetching,
    /// Target: the VM is ours, complete, and was seen running; or, if its user has paused it, seen with its disks.
    Running,
    /// Target: the QEMU that waited is dead; this migration never commits.
    Dead,
}

impl Step {
    /// The word used in records and messages to people.
    pub fn word(self) -> &'static str {
        match self {
            Self::Sending => "sending",
            Self::Released => "released",
            Self::Serving => "serving",
            Self::Gone => "gone",
            Self::Kept => "kept",
            Self::Fenced => "fenced",
            Self::Incoming => "incoming",
            Self::Committed => "committed",
            Self::Fetching => "fetching",
            Self::Running => "running",
            Self::Dead => "dead",
        }
    }

    /// The step with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        use Step::*;
        [Sending, Released, Serving, Gone, Kept, Fenced, Incoming, Committed, Fetching, Running, Dead]
            .into_iter()
            .find(|step| step.word() == word)
    }

    /// Which end writes this step.
    pub fn role(self) -> Role {
        match self {
            Self::Sending | Self::Released | Self::Serving | Self::Gone | Self::Kept | Self::Fenced => {
                Role::Source
            }
            Self::Incoming | Self::Committed | Self::Fetching | Self::Running | Self::Dead => Role::Target,
        }
    }

    /// Whether the record must have reached the disk before the migration goes on. In a migration only the target's are:
    /// a source that loses its host loses its QEMU with it, and cannot resume anything by mistake. A fence must outlive
    /// its host: the target that asks later must not run the VM as it was before it went on at the source.
    pub fn must_be_durable(self) -> bool {
        matches!(self, Self::Fenced | Self::Incoming | Self::Committed | Self::Dead)
    }
}

/// What a VM does, and goes on doing wherever it is owned: a VM that its user has paused stays paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Activity {
    /// Its processors run.
    #[default]
    Running,
    /// Its processors stand still, by the will of its user or because of an error, until somebody lets it run.
    Paused,
}

impl Activity {
    /// The word used in records.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
        }
    }

    /// The activity with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Running, Self::Paused].into_iter().find(|activity| activity.word() == word)
    }
}

/// What one end has written down about the latest migration of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which try this is.
    pub id: MigrationId,
    /// Its place in the VM's life.
    pub generation: Generation,
    /// Name of the VM.
    pub vm: String,
    /// Name of the host at the other end.
    pub peer: String,
    /// How far it has come.
    pub step: Step,
    /// What the VM does but for the migration's own stop: what it is made to do again by whoever owns it.
    pub activity: Activity,
}

/// Where records are kept. One record per VM and host: the latest try.
pub trait Journal {
    /// Replaces the VM's record. When [`Step::must_be_durable`], it has reached the disk on return.
    ///
    /// # Errors
    /// [`JournalError`] when it could not be stored; the earlier record may or may not be there still.
    fn store(&mut self, record: &Record) -> Result<(), JournalError>;

    /// The VM's record, if there is one.
    ///
    /// # Errors
    /// [`JournalError`] when there is one and it cannot be read.
    fn load(&self, vm: &str) -> Result<Option<Record>, JournalError>;
}

/// A record could not be stored or read.
#[derive(Debug, Error)]
#[error("the migration record of VM {vm} could not be {what}: {why}")]
pub struct JournalError {
    /// Name of the VM.
    pub vm: String,
    /// "stored" or "read".
    pub what: &'static str,
    /// The cause.
    pub why: String,
}

/// What a restarted source agent does about a VM that its record names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceRecovery {
    /// Make sure that the VM does here what it did before the migration ([`Record::activity`]).
    Resume,
    /// Keep it stopped and ask the target.
    Ask,
    /// End what is left of it here.
    End,
    /// Nothing: the migration was over.
    Nothing,
}

/// Reads a source's record after a crash of its agent.
pub fn at_source(step: Step) -> SourceRecovery {
    match step {
        Step::Sending | Step::Fenced => SourceRecovery::Resume,
        Step::Released | Step::Serving => SourceRecovery::Ask,
        Step::Gone => SourceRecovery::End,
        _ => SourceRecovery::Nothing,
    }
}

/// What a restarted target agent does about a VM that its record names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetRecovery {
    /// End the QEMU that waits, wait for its death, then store [`Step::Dead`].
    Kill,
    /// Ask the source ([`may_continue`]) unless the QEMU runs already. Then store the record again, let the QEMU run (or, if
    /// the VM is paused, take its disks), and store [`Step::Running`]. What a restarted agent reads may be in the page cache
    /// only, if the crash came before the sync: running on it, and losing the host, would leave a record that gives the VM
    /// back although it has run here.
    Continue,
    /// The VM is ours and runs: take its userfaultfd again, and wait for the source, which brings what is missing.
    Fetch,
    /// Nothing: the VM is ours like any other, or not at all.
    Nothing,
}

/// Reads a target's record after a crash of its agent.
pub fn at_target(step: Step) -> TargetRecovery {
    match step {
        Step::Incoming => TargetRecovery::Kill,
        Step::Committed => TargetRecovery::Continue,
        Step::Fetching => TargetRecovery::Fetch,
        _ => TargetRecovery::Nothing,
    }
}

/// What a target says when the source asks who owns a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// The target owns the VM and has run it: the source ends its own. Never taken back.
    Target,
    /// The target owns the VM and runs it, and needs pages that only the source has: the source keeps them. Never taken back.
    Fetching,
    /// The target owned the VM and ran it, and its QEMU has ended there before all of its pages had come: what is left of it at the source is
    /// from before, and of no use. Never taken back.
    Ended,
    /// The target's QEMU is dead and this migration never commits: the VM is the source's. Never taken back.
    Source,
    /// The target is still at it: ask again.
    Undecided,
    /// The target cannot prove either (no record of this try, or its QEMU died between the commit and the first sight
    /// of it running): an operator decides.
    Unknown,
}

/// Answers a source that asks about migration `id` of generation `generation`.
///
/// `record` is the target's record of that VM; `qemu_lives` whether the QEMU of that record is alive.
pub fn answer(
    id: MigrationId,
    generation: Generation,
    record: Option<&Record>,
    qemu_lives: bool,
) -> Ownership {
    let Some(record) = record.filter(|record| record.step.role() == Role::Target) else {
        // The VM came here and left again: a newer record of ours as its source proves that it was ours.
        return match record {
            Some(record) if record.generation > generation => Ownership::Target,
            _ => Ownership::Unknown,
        };
    };
    if record.id != id {
        return if record.generation > generation { Ownership::Target } else { Ownership::Unknown };
    }
    match record.step {
        Step::Running => Ownership::Target,
        Step::Fetching if qemu_lives => Ownership::Fetching,
        Step::Fetching => Ownership::Ended,
        // The start can still fail, which gives the VM back: a source that ended its own by then would have lost it.
        Step::Committed if qemu_lives => Ownership::Undecided,
        Step::Committed => Ownership::Unknown,
        Step::Dead => Ownership::Source,
        _ => Ownership::Undecided,
    }
}

/// What an operator decides about a VM whose owner the other host does not tell. Seen from the host that is asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// It does not run at the other host and never will: this host takes it.
    Here,
    /// It runs at the other host, or is to: what is left of it here is ended.
    There,
}

/// Answers a target that was restarted between its commit and the first sight of the VM running, and asks whether
/// migration `id` of generation `generation` is still what counts. `record` is the source's record of that VM.
///
/// Whoever gives [`Ownership::Target`] must not fence that try any more: the two exclude each other under one lock.
pub fn answer_to_target(id: MigrationId, generation: Generation, record: Option<&Record>) -> Ownership {
    let Some(record) = record else { return Ownership::Unknown };
    if record.generation > generation {
        // A commit that was never seen running has no successors but a fence, and what came after it.
        return Ownership::Source;
    }
    // Without a fence the commit counts. An earlier step, or an older try, says only that this host lost its records of
    // later ones, and its QEMU with them.
    if record.id == id { Ownership::Target } else { Ownership::Unknown }
}

/// What a restarted target does about a VM that it committed to and has not seen running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuation {
    /// Let it run.
    Run,
    /// The source has it back: end the QEMU, wait for its death, then store [`Step::Dead`].
    Kill,
    /// Keep it stopped, ask again, and tell an operator.
    Ask,
}

/// Reads the source's answer; `None` when there is none.
///
/// A source without any record of the try has not taken the VM back either: that leaves a record.
pub fn may_continue(answer: Option<Ownership>) -> Continuation {
    match answer {
        Some(Ownership::Target | Ownership::Fetching | Ownership::Ended | Ownership::Unknown) => {
            Continuation::Run
        }
        Some(Ownership::Source) => Continuation::Kill,
        Some(Ownership::Undecided) | None => Continuation::Ask,
    }
}
