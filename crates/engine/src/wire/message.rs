//! Control messages. Protobuf fields evolve: an old build skips what it does not know, a new one sees defaults.
//!
//! Field numbers are frozen once released; PROTOCOL.md lists them.

/// What travels in a frame of kind *message*.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Envelope {
    #[prost(
        oneof = "Message",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26"
    )]
    pub(crate) body: Option<Message>,
}

/// A control message.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Message {
    /// First message on every connection, from the side that opened it.
    #[prost(message, tag = "1")]
    Hello(Hello),
    /// Target: the version that will be spoken.
    #[prost(message, tag = "2")]
    Welcome(Welcome),
    /// Source: the VM, and what it needs.
    #[prost(message, tag = "3")]
    Offer(Offer),
    /// Target: a QEMU waits for the VM.
    #[prost(message, tag = "4")]
    Accepted(Accepted),
    /// Target: every reason why this VM cannot come here.
    #[prost(message, tag = "5")]
    Refused(Refused),
    /// Target: everything up to the end of a round on a stream is installed.
    #[prost(message, tag = "6")]
    Barrier(Barrier),
    /// Source: the device state is complete, and this was the last round.
    #[prost(message, tag = "7")]
    StateEnd(StateEnd),
    /// Target: the device state is loaded and the VM is paused, complete.
    #[prost(message, tag = "8")]
    Loaded(Loaded),
    /// Source: the VM is yours.
    #[prost(message, tag = "9")]
    Release(Release),
    /// Target: the VM is mine and runs.
    #[prost(message, tag = "10")]
    Committed(Committed),
    /// Target: the VM did not start here and never will; its QEMU is dead.
    #[prost(message, tag = "11")]
    NotCommitted(Text),
    /// Either side, before the release: this try is over.
    #[prost(message, tag = "12")]
    Abort(Text),
    /// Source, on a connection of its own: who owns this VM?
    #[prost(message, tag = "13")]
    Query(Query),
    /// Target: the answer to a query.
    #[prost(message, tag = "14")]
    Answer(Answer),
    /// Source, on a connection of its own: a page stream begins.
    #[prost(message, tag = "15")]
    Stream(Stream),
    /// Source, on a connection of its own: would you take this VM? Answered by [`Message::Refused`] with every reason
    /// that speaks against it, or none; nothing is prepared.
    #[prost(message, tag = "16")]
    Check(Offer),
    /// Target, in post-copy: every page has come.
    #[prost(message, tag = "17")]
    Filled(Filled),
    /// Source, on a connection of its own that becomes the control connection: the pages that are still missing can be had again.
    #[prost(message, tag = "18")]
    Reattach(Reattach),
    /// Target: the answer to it; streams may be opened.
    #[prost(message, tag = "19")]
    Reattached(Reattached),
    /// Source, on a connection of its own: a template. Its pages follow where the answer asks for them.
    #[prost(message, tag = "20")]
    Template(Template),
    /// Target: how much of it is there.
    #[prost(message, tag = "21")]
    TemplateState(TemplateState),
    /// Source: which pages are in common with others, and where in a store; or that this is still being found out.
    #[prost(message, tag = "22")]
    Common(Common),
    /// Target: so many of these runs are mapped; the rest must come as bytes.
    #[prost(message, tag = "23")]
    Mapped(Mapped),
    /// Source, on a connection of its own: a store of pages in common. They follow.
    #[prost(message, tag = "24")]
    Store(Store),
    /// Target: whether it takes the store, and once more when all of it has come.
    #[prost(message, tag = "25")]
    StoreState(Text),
    /// Target, once all is over and if the offer asked for it: what memory the VM's QEMU uses there.
    #[prost(message, tag = "26")]
    Memory(Memory),
}

impl Message {
    /// What this message is, for errors.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "a hello",
            Self::Welcome(_) => "a welcome",
            Self::Offer(_) => "an offer",
            Self::Accepted(_) => "an acceptance",
            Self::Refused(_) => "a refusal",
            Self::Barrier(_) => "a barrier",
            Self::StateEnd(_) => "the end of the device state",
            Self::Loaded(_) => "that it has loaded the VM",
            Self::Release(_) => "a release",
            Self::Committed(_) => "that it owns the VM",
            Self::NotCommitted(_) => "that it does not own the VM",
            Self::Abort(_) => "an abort",
            Self::Query(_) => "a query",
            Self::Answer(_) => "an answer",
            Self::Stream(_) => "a stream",
            Self::Check(_) => "a check",
            Self::Filled(_) => "that every page has come",
            Self::Reattach(_) => "a reattachment",
            Self::Reattached(_) => "that it goes on",
            Self::Template(_) => "a template",
            Self::TemplateState(_) => "what it has of a template",
            Self::Common(_) => "pages in common",
            Self::Mapped(_) => "what it has mapped",
            Self::Store(_) => "a store",
            Self::StoreState(_) => "what it has of a store",
            Self::Memory(_) => "what memory it uses",
        }
    }
}

/// Opens a control connection.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hello {
    /// First version the sender speaks.
    #[prost(uint32, tag = "1")]
    pub version_min: u32,
    /// Last version the sender speaks.
    #[prost(uint32, tag = "2")]
    pub version_max: u32,
    /// The migration this connection is for: 16 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub id: Vec<u8>,
    /// Version of the software, for logs.
    #[prost(string, tag = "4")]
    pub software: String,
}

/// Settles the version.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Welcome {
    /// The version both speak.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Version of the software, for logs.
    #[prost(string, tag = "2")]
    pub software: String,
}

/// One block of RAM.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Block {
    /// QEMU's name of it.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its used length.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
    /// False when its bytes will not travel: the target rebuilds it.
    #[prost(bool, tag = "3")]
    pub travels: bool,
}

/// A VM that wants to come.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Offer {
    /// Name of the VM.
    #[prost(string, tag = "1")]
    pub vm: String,
    /// The try's place in the VM's life.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// The user's own QEMU command line.
    #[prost(string, repeated, tag = "3")]
    pub argv: Vec<String>,
    /// Resolved machine type.
    #[prost(string, tag = "4")]
    pub machine: String,
    /// Resolved CPU model.
    #[prost(string, tag = "5")]
    pub cpu: String,
    /// Blocks of RAM; descriptors name them by their place in this list.
    #[prost(message, repeated, tag = "6")]
    pub blocks: Vec<Block>,
    /// What both ends must agree on, a line each.
    #[prost(string, repeated, tag = "7")]
    pub fingerprint: Vec<String>,
    /// Page streams that will be opened.
    #[prost(uint32, tag = "8")]
    pub streams: u32,
    /// Whether RAM is to be proved equal before the VM runs.
    #[prost(bool, tag = "9")]
    pub verify: bool,
    /// Version of the source's QEMU.
    #[prost(string, tag = "10")]
    pub qemu: String,
    /// The images that the command line names, in its order, each followed by those below it.
    #[prost(message, repeated, tag = "11")]
    pub images: Vec<Image>,
    /// Whether page streams leave TLS once both ends know each other.
    #[prost(bool, tag = "12")]
    pub clear_pages: bool,
    /// Bytes that the guest is to have again at the target, since its balloon takes some for the move; 0 leaves it as it is.
    #[prost(uint64, tag = "13")]
    pub balloon: u64,
    /// Whether a switch to post-copy is likely, so that the target gets ready for it in time.
    #[prost(bool, tag = "14")]
    pub postcopy: bool,
    /// Digest of the template that the VM is a clone of, in hexadecimal; empty where it is none. Pages that it shares with that do not travel.
    #[prost(string, tag = "15")]
    pub template: String,
    /// Whether [`Message::Common`] comes before the first round, where the target has room for mappings.
    #[prost(bool, tag = "16")]
    pub common: bool,
    /// How much memory it needs at the target as long as it shares what it shares, in bytes; 0 is all of its RAM.
    #[prost(uint64, tag = "17")]
    pub expected_bytes: u64,
    /// Whether the source wants to know what memory the VM's QEMU uses in the end.
    #[prost(bool, tag = "18")]
    pub account: bool,
}

/// Pages of the VM that lie in a store, which is complete.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Common {
    /// Whose identity: 16 bytes; none where no page is in common.
    #[prost(bytes = "vec", tag = "1")]
    pub store: Vec<u8>,
    /// Runs of pages, 16 bytes each ([`crate::wire::common`]).
    #[prost(bytes = "vec", tag = "2")]
    pub runs: Vec<u8>,
    /// Only says that the source is still at work; what there is comes later.
    #[prost(bool, tag = "3")]
    pub pending: bool,
}

/// What came of [`Common`].
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Mapped {
    /// So many runs, from the first on.
    #[prost(uint32, tag = "1")]
    pub runs: u32,
}

/// A store of pages that several VMs, or one in several places, have in common.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Store {
    /// Its identity: 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    /// At most so many pages follow.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
}

/// A template that is offered.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Template {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What it is, as JSON; the digest of these bytes names it.
    #[prost(bytes = "vec", tag = "2")]
    pub manifest: Vec<u8>,
}

/// How much of a template a target has.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TemplateState {
    /// Bytes of its pages that are there: what follows is sent from here on.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
    /// All of it is there, and was checked.
    #[prost(bool, tag = "2")]
    pub complete: bool,
    /// Why it cannot be taken.
    #[prost(string, tag = "3")]
    pub refusal: String,
}

/// A disk image, as the source shows it to be the same file at both ends.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Image {
    /// What it is called at the source.
    #[prost(string, tag = "1")]
    pub path: String,
    /// The byte of it that the source keeps locked.
    #[prost(uint64, tag = "2")]
    pub mark: u64,
    /// Whether the source's QEMU has locked it.
    #[prost(bool, tag = "3")]
    pub held: bool,
    /// Digest of the content, 32 bytes, where an equal copy will do.
    #[prost(bytes = "vec", tag = "4")]
    pub digest: Vec<u8>,
}

/// The target is ready for pages.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Accepted {
    /// How long the target took to get ready, in microseconds.
    #[prost(uint64, tag = "1")]
    pub prepare_us: u64,
    /// Whether the VM may run here before all of its pages have come.
    #[prost(bool, tag = "2")]
    pub postcopy: bool,
    /// Why it may not.
    #[prost(string, tag = "3")]
    pub postcopy_refusal: String,
    /// Places in the offer of blocks that must be complete before the VM runs all the same, in ascending order.
    #[prost(uint32, repeated, tag = "4")]
    pub eager: Vec<u32>,
    /// How many runs of pages in common can be mapped; 0 where none can.
    #[prost(uint32, tag = "5")]
    pub room: u32,
    /// What would be left there, in bytes, if all that the VM shares with others were written; less than nothing where it could not be held.
    #[prost(sint64, tag = "6")]
    pub head_room: i64,
}

/// Memory of a VM's QEMU, in bytes, as proc(5) has it for `smaps_rollup`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Memory {
    /// What of it is in memory.
    #[prost(uint64, tag = "1")]
    pub rss: u64,
    /// The same, each page divided by how many share it.
    #[prost(uint64, tag = "2")]
    pub pss: u64,
    /// What others share.
    #[prost(uint64, tag = "3")]
    pub shared: u64,
    /// What is its own.
    #[prost(uint64, tag = "4")]
    pub own: u64,
}

/// Why something cannot be done.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reason {
    /// A word for scripts.
    #[prost(string, tag = "1")]
    pub code: String,
    /// A sentence for people.
    #[prost(string, tag = "2")]
    pub text: String,
}

/// All that speaks against the VM coming here.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Refused {
    /// The reasons, at least one.
    #[prost(message, repeated, tag = "1")]
    pub reasons: Vec<Reason>,
}

/// A round is complete on a stream.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Barrier {
    /// The round, from 1.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// The stream, from 0.
    #[prost(uint32, tag = "2")]
    pub stream: u32,
}

/// Digest of a block's content.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BlockDigest {
    /// Place of the block in the offer.
    #[prost(uint32, tag = "1")]
    pub block: u32,
    /// 32 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub digest: Vec<u8>,
}

/// The device state is complete.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StateEnd {
    /// Bytes of device state in all.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
    /// The last round; the state is loaded when it is complete on every stream.
    #[prost(uint32, tag = "2")]
    pub last_round: u32,
    /// Digests of the blocks when the offer asked to verify.
    #[prost(message, repeated, tag = "3")]
    pub digests: Vec<BlockDigest>,
    /// Whether the VM stood still before the migration stopped it: then it is left paused at the target too.
    #[prost(bool, tag = "4")]
    pub paused: bool,
    /// Post-copy: the pages that were told to be missing are fetched once the VM runs at the target. Digests are sums of the others then.
    #[prost(bool, tag = "5")]
    pub postcopy: bool,
}

/// The VM is complete at the target and paused.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Loaded {
    /// How long the load took, in microseconds.
    #[prost(uint64, tag = "1")]
    pub load_us: u64,
    /// Blocks whose digest was compared and was equal.
    #[prost(uint32, tag = "2")]
    pub blocks_verified: u32,
}

/// The VM changes hands.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Release {
    /// The offer's generation, again.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
}

/// The target owns the VM and runs it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Committed {
    /// The offer's generation, again.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// How long the durable record took, in microseconds.
    #[prost(uint64, tag = "2")]
    pub record_us: u64,
    /// How long the resume took, in microseconds.
    #[prost(uint64, tag = "3")]
    pub resume_us: u64,
}

/// A message to people.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Text {
    /// What happened.
    #[prost(string, tag = "1")]
    pub text: String,
}

/// Asks who owns a VM.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Query {
    /// The migration: 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    /// Name of the VM.
    #[prost(string, tag = "2")]
    pub vm: String,
    /// The try's place in the VM's life.
    #[prost(uint64, tag = "3")]
    pub generation: u64,
    /// The target asks the source, which it does before it runs a VM that it committed to in an earlier life. Absent: the
    /// source asks the target.
    #[prost(bool, tag = "4")]
    pub by_target: bool,
}

/// Who owns the VM, as far as who is asked can prove it.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Answer {
    /// 1 the target, 2 the source, 3 undecided, 4 unknown, 5 the target, which needs pages. Others count as unknown.
    #[prost(uint32, tag = "1")]
    pub owner: u32,
}

/// Every page has come: what is left of the VM at the source is of no use any more.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Filled {
    /// The offer's generation, again.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// Sums of the pages that were fetched, where the offer asked to verify.
    #[prost(message, repeated, tag = "2")]
    pub sums: Vec<BlockDigest>,
    /// How long the guest has waited for pages.
    #[prost(message, optional, tag = "3")]
    pub faults: Option<Faults>,
}

/// How long a guest has waited for pages of a post-copy, from the kernel's word that it does to the page's arrival. Microseconds.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Faults {
    /// How often.
    #[prost(uint64, tag = "1")]
    pub count: u64,
    /// On average.
    #[prost(uint64, tag = "2")]
    pub mean_us: u64,
    /// Half of them at most.
    #[prost(uint64, tag = "3")]
    pub p50_us: u64,
    /// 99 of 100 at most.
    #[prost(uint64, tag = "4")]
    pub p99_us: u64,
    /// The longest.
    #[prost(uint64, tag = "5")]
    pub max_us: u64,
    /// Each of the guest's processors in all, in QEMU's order of them.
    #[prost(uint64, repeated, tag = "6")]
    pub vcpu_blocked_us: Vec<u64>,
}

/// Goes on with a post-copy whose connections were lost, or whose agents were restarted.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reattach {
    /// The migration: 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    /// Name of the VM.
    #[prost(string, tag = "2")]
    pub vm: String,
    /// The try's place in the VM's life.
    #[prost(uint64, tag = "3")]
    pub generation: u64,
    /// Push streams that will be opened.
    #[prost(uint32, tag = "4")]
    pub streams: u32,
}

/// The target fetches again.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Reattached {
    /// Pages that are still missing.
    #[prost(uint64, tag = "1")]
    pub pages: u64,
}

/// What travels on a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Rounds, before the hand-off.
    Rounds,
    /// Post-copy: requests of the target, and the source's answers to faults.
    Demand,
    /// Post-copy: pages that nobody has asked for yet.
    Push,
}

impl Purpose {
    /// As [`Stream`] tells it.
    pub fn number(self) -> u32 {
        match self {
            Self::Rounds => 0,
            Self::Demand => 1,
            Self::Push => 2,
        }
    }

    /// The purpose of this number.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Rounds, Self::Demand, Self::Push].into_iter().find(|purpose| purpose.number() == number)
    }
}

/// Opens a page stream.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Stream {
    /// The migration: 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    /// Which stream of its purpose, from 0.
    #[prost(uint32, tag = "2")]
    pub index: u32,
    /// What travels on it: [`Purpose::number`].
    #[prost(uint32, tag = "3")]
    pub purpose: u32,
}

impl From<crate::handoff::Ownership> for Answer {
    fn from(ownership: crate::handoff::Ownership) -> Self {
        use crate::handoff::Ownership::*;
        let owner = match ownership {
            Target => 1,
            Source => 2,
            Undecided => 3,
            Unknown => 4,
            Fetching => 5,
            Ended => 6,
        };
        Self { owner }
    }
}

impl From<Answer> for crate::handoff::Ownership {
    fn from(answer: Answer) -> Self {
        match answer.owner {
            1 => Self::Target,
            2 => Self::Source,
            3 => Self::Undecided,
            5 => Self::Fetching,
            6 => Self::Ended,
            _ => Self::Unknown,
        }
    }
}
