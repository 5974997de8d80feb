//! What the API speaks: requests and views as JSON, shared with the `sterna` command.
//!
//! Keys of a migration are those of QEMU's `query-migrate` wherever the meaning is equal. Times are in milliseconds in
//! QEMU-named fields; instants are RFC 3339.

use serde::{Deserialize, Serialize};
use sterna_engine::Reference;

mod working_set;

pub use working_set::{
    GrowthView, IntervalView, PredictionView, RegionView, WorkingSetEvent, WorkingSetRequest, WorkingSetView,
    default_bandwidths,
};

/// Starts a VM under the agent's care.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RunRequest {
    /// Name of the VM, unique on this host and on every host it moves to.
    pub name: String,
    /// The user's own QEMU command line, the binary first; none for a clone, which has its template's.
    #[serde(default)]
    pub argv: Vec<String>,
    /// The template that it is started from.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub template: Option<String>,
}

/// Makes a template of a VM.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TemplateRequest {
    /// Name of the template, unique on every host.
    pub name: String,
    /// The VM that it is made of: it stands still for a moment.
    pub vm: String,
    /// Ends it then, in the place of letting it run on: disks that it could write stay as its memory has them, and clones may lie over them.
    #[serde(default)]
    pub end: bool,
    /// That VM's command line with `{vm}` in the places where a clone's name belongs; as it was started when absent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub argv: Option<Vec<String>>,
}

/// Sends a template to another host.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PushRequest {
    /// Name of the host.
    pub host: String,
    /// Most bytes per second on the wire; no limit when absent.
    #[serde(rename = "max-bandwidth", skip_serializing_if = "Option::is_none", default)]
    pub max_bandwidth: Option<u64>,
}

/// What was sent of a template.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PushView {
    /// Name of the template.
    pub name: String,
    /// The host that has it now.
    pub host: String,
    /// Bytes that were sent now: 0 where it was there already.
    pub bytes: u64,
    /// Whether all of it is there. One request sends for a few seconds: repeat it, and it goes on.
    pub complete: bool,
}

/// A template of this host.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TemplateView {
    /// Its name.
    pub name: String,
    /// BLAKE3 of what it is, in hexadecimal: equal on every host that has it.
    pub digest: String,
    /// When it was made, or came here.
    #[schema(value_type = String, format = DateTime)]
    pub created: jiff::Timestamp,
    /// Bytes of RAM of a clone.
    #[serde(rename = "ram-bytes")]
    pub ram_bytes: u64,
    /// Bytes that are not zero: as many lie on the disk.
    pub bytes: u64,
    /// Version of the QEMU that it was made with.
    pub qemu: String,
    /// Resolved machine type.
    pub machine: String,
    /// The command line of its clones; `{vm}` in it is the name of a clone.
    pub argv: Vec<String>,
    /// Images that its VM has left, over which each clone has one of its own.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Clones of it on this host.
    pub clones: Vec<String>,
}

/// A VM as the agent knows it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// `running`, `paused`, `stopped` (its QEMU has ended), `incoming`, `migrating`, `released` (handed out, and the
    /// target has not said that it runs it), `unresolved` (the same for long: see the notice), `serving` (it runs at its target, which
    /// needs pages of it from here), `postcopy-active` (it runs here, and pages of it are on their way), `postcopy-paused` (the same, and
    /// the host that has them is not connected), or another of QEMU's words.
    pub state: String,
    /// Process id of its QEMU.
    pub pid: i32,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// When it came to this host.
    #[schema(value_type = String, format = DateTime)]
    pub since: jiff::Timestamp,
    /// How often its migration was tried, over its whole life.
    pub generation: u64,
    /// The user's command line.
    pub argv: Vec<String>,
    /// Where QEMU's output goes.
    pub log: String,
    /// The template that it is a clone of.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub template: Option<String>,
    /// What memory its QEMU uses, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub memory: Option<MemoryView>,
    /// The migration that goes on, if one does.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub migration: Option<String>,
    /// What a person should know: why it is where it is, and what to do.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub notice: Option<String>,
    /// The helper that answers inside of the guest, if one does. The guest says this of itself.
    #[serde(rename = "guest-helper", skip_serializing_if = "Option::is_none", default)]
    pub guest_helper: Option<GuestHelperView>,
}

/// Memory of a VM's QEMU at both hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MemoryReport {
    /// At the source, while it was moved.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub source: Option<MemoryView>,
    /// At the target, once it ran there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub target: Option<MemoryView>,
    /// What the target would have left, in bytes, if all that the VM shares with others were written: less than nothing where it could
    /// not be held then.
    #[serde(rename = "head-room", skip_serializing_if = "Option::is_none", default)]
    pub head_room: Option<i64>,
}

/// Memory of a VM's QEMU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MemoryView {
    /// What of it is in memory.
    pub rss: u64,
    /// The same, each page divided by how many processes share it.
    pub pss: u64,
    /// What others share: a template, pages in common with other VMs, what the kernel has merged, QEMU's program.
    pub shared: u64,
    /// What is its own. It may grow to all of the RAM: what is shared is copied when it is written.
    pub own: u64,
}

/// `sterna-guest`, as it presents itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GuestHelperView {
    /// Version of the port's protocol that it speaks.
    pub version: u32,
    /// What it can do: `migrate` (ask for a migration), `stun` (slow processes that write much memory).
    pub capabilities: Vec<String>,
    /// Its name and version.
    pub software: String,
}

/// Decides where a VM runs that is unresolved.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RecoverRequest {
    /// At this host or at the other one.
    pub runs: Side,
}

/// A side of a migration, as seen from the host that is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// It does not run at the other host: this one lets it run.
    Here,
    /// It runs at the other host: what is left of it here is ended.
    There,
}

/// What was decided.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RecoverView {
    /// Name of the VM.
    pub vm: String,
    /// The host that it runs at now.
    #[serde(rename = "runs-at")]
    pub runs_at: String,
}

/// A host that this agent may send VMs to and take them from.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostView {
    /// Its name, as in its certificate.
    pub name: String,
    /// Where its agent listens for peers.
    pub address: String,
    /// True for the host that answers.
    pub local: bool,
}

/// Moves a VM.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrateRequest {
    /// Name of the VM.
    pub vm: String,
    /// Name of the host it goes to.
    pub host: String,
    /// Most bytes per second on the wire (QEMU's `max-bandwidth`); no limit when absent.
    #[serde(rename = "max-bandwidth", skip_serializing_if = "Option::is_none", default)]
    pub max_bandwidth: Option<u64>,
    /// Bytes per second of the first round; later ones go faster only as far as the guest writes faster. Without it all rounds go at
    /// the maximum.
    #[serde(rename = "min-bandwidth", skip_serializing_if = "Option::is_none", default)]
    pub min_bandwidth: Option<u64>,
    /// How much faster than the guest writes a round is sent, in bytes per second; 50 Mbit/s when absent.
    #[serde(rename = "bandwidth-step", skip_serializing_if = "Option::is_none", default)]
    pub bandwidth_step: Option<u64>,
    /// Slows the guest's processors that write most where it would not converge (QEMU's `auto-converge`).
    #[serde(rename = "auto-converge", default)]
    pub auto_converge: bool,
    /// Takes from the guest what it can do without, through its balloon, for the time of the move: its page cache does not travel then.
    #[serde(default)]
    pub balloon: bool,
    /// How pages may be compressed.
    #[serde(default)]
    pub compression: CompressionMode,
    /// Bytes of pages that the source keeps, to send of those that come again only what has changed; a quarter of the VM's RAM, but at most
    /// 512 MiB, when absent, and 0 for none.
    #[serde(rename = "delta-cache", skip_serializing_if = "Option::is_none", default)]
    pub delta_cache: Option<u64>,
    /// Longest time the VM may be stopped, in milliseconds (QEMU's `downtime-limit`).
    #[serde(rename = "downtime-limit", default = "default_downtime_limit")]
    pub downtime_limit: u64,
    /// What travels once, where the VM has it in several places or in common with others that leave with it.
    #[serde(default)]
    pub dedup: Dedup,
    /// When a clone's template goes to a target that lacks it.
    #[serde(rename = "send-template", default)]
    pub send_template: SendTemplate,
    /// Post-copy at once: the VM runs at the target before any of its pages is there, and they follow. Excludes the other two ways of
    /// post-copy, and what only rounds heed; `downtime-limit` has no meaning then.
    #[serde(default)]
    pub postcopy: bool,
    /// Post-copy after the first round, unless what is left fits the downtime limit.
    #[serde(rename = "postcopy-after-precopy", default)]
    pub postcopy_after_precopy: bool,
    /// Post-copy when the timeout has passed, instead of a stop for as long as it takes. Needs `timeout`.
    #[serde(rename = "timeout-postcopy", default)]
    pub timeout_postcopy: bool,
    /// Seconds after which the VM is stopped and moved whatever its downtime will be, or switched with `timeout-postcopy`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub timeout: Option<f64>,
    /// Proves before the VM runs at the target that its RAM is what it was at the source.
    #[serde(default)]
    pub verify: bool,
    /// Page streams; the agent chooses when absent.
    #[serde(rename = "parallel-connections", skip_serializing_if = "Option::is_none", default)]
    pub parallel_connections: Option<u32>,
}

impl MigrateRequest {
    /// Moves this VM to this host, in the way of those who ask for nothing in particular.
    pub fn new(vm: impl Into<String>, host: impl Into<String>) -> Self {
        Self {
            vm: vm.into(),
            host: host.into(),
            max_bandwidth: None,
            min_bandwidth: None,
            bandwidth_step: None,
            auto_converge: false,
            balloon: false,
            compression: CompressionMode::Auto,
            delta_cache: None,
            downtime_limit: default_downtime_limit(),
            dedup: Dedup::default(),
            send_template: SendTemplate::default(),
            postcopy: false,
            postcopy_after_precopy: false,
            timeout_postcopy: false,
            timeout: None,
            verify: false,
            parallel_connections: None,
        }
    }
}

/// When a clone's template goes to a target that does not have it. It goes once in each case, and what came of it is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SendTemplate {
    /// Before anything else is done.
    #[default]
    Before,
    /// While the VM's own pages go; it stops when all of the template is there.
    Beside,
    /// With post-copy at once: the VM runs at the target before its template is there, and asks for the pages that it touches meanwhile.
    After,
}

/// How pages may be compressed. Whichever is allowed is used only where it is measured that pages arrive sooner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CompressionMode {
    /// The best of all, batch by batch.
    #[default]
    Auto,
    /// Not at all.
    None,
    /// LZ4.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// Which pages travel once, and are shared at the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dedup {
    /// None.
    None,
    /// Those that share a frame of memory at the source (KSM, a file that is mapped privately, an earlier migration).
    #[default]
    Frames,
    /// Those that have the same content, wherever it is: all memory is read and hashed for that. VMs share then what they did not share
    /// before, which tells each of them whether another has the same page (by how long a write takes, CVE-2015-2877).
    Hash,
}

/// Moves several VMs together: what those of one host have in common travels once.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GangRequest {
    /// Their moves.
    pub migrations: Vec<MigrateRequest>,
}

/// What became of that.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GangView {
    /// The migrations that have begun, in the order of the request.
    pub migrations: Vec<MigrationView>,
    /// Those that could not be.
    pub refused: Vec<GangRefusal>,
}

/// A move that could not begin.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GangRefusal {
    /// Name of the VM.
    pub vm: String,
    /// A word for scripts.
    pub code: String,
    /// Why, and what to do.
    pub text: String,
}

/// QEMU's default `downtime-limit`, in milliseconds.
pub fn default_downtime_limit() -> u64 {
    300
}

/// Changes a migration that goes on. Absent fields stay as they are.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SetRequest {
    /// Most bytes per second on the wire; 0 takes the limit away.
    #[serde(rename = "max-bandwidth", skip_serializing_if = "Option::is_none", default)]
    pub max_bandwidth: Option<u64>,
    /// Bytes per second of rounds whose guest writes little; 0 sends all rounds at the maximum.
    #[serde(rename = "min-bandwidth", skip_serializing_if = "Option::is_none", default)]
    pub min_bandwidth: Option<u64>,
    /// Whether the guest may be slowed where it does not converge.
    #[serde(rename = "auto-converge", skip_serializing_if = "Option::is_none", default)]
    pub auto_converge: Option<bool>,
    /// Longest time the VM may be stopped, in milliseconds.
    #[serde(rename = "downtime-limit", skip_serializing_if = "Option::is_none", default)]
    pub downtime_limit: Option<u64>,
}

/// A migration, as its source sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MigrationView {
    /// Its identity.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// The host it leaves.
    pub source: String,
    /// The host it goes to.
    pub target: String,
    /// QEMU's status words, and `unresolved`: released, and the target does not say whether it runs the VM. `postcopy-active`,
    /// `postcopy-paused` (the connection is lost, and made anew by itself) and `postcopy-recover` (it is being made): the VM runs at the
    /// target, and pages of it are still at the source.
    pub status: String,
    /// Where the VM runs now, as far as it can be known: the name of a host, or empty while it is stopped.
    #[serde(rename = "runs-at")]
    pub runs_at: String,
    /// What it does there, in QEMU's words: a paused VM is moved too, and stays paused.
    #[serde(rename = "run-state", default = "running")]
    pub run_state: String,
    /// When it began.
    #[schema(value_type = String, format = DateTime)]
    pub began: jiff::Timestamp,
    /// Milliseconds from the request until now or until the source was free.
    #[serde(rename = "total-time")]
    pub total_time: f64,
    /// Milliseconds until the first page was sent.
    #[serde(rename = "setup-time")]
    pub setup_time: f64,
    /// Milliseconds until a QEMU waited at the target; the first round may begin before.
    #[serde(rename = "target-setup-time", skip_serializing_if = "Option::is_none", default)]
    pub target_setup_time: Option<f64>,
    /// Milliseconds the VM was stopped.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub downtime: Option<f64>,
    /// Milliseconds the VM would be stopped if it were now.
    #[serde(rename = "expected-downtime", skip_serializing_if = "Option::is_none", default)]
    pub expected_downtime: Option<f64>,
    /// The limit in force, in milliseconds.
    #[serde(rename = "downtime-limit")]
    pub downtime_limit: u64,
    /// The bandwidth limit in force, in bytes per second.
    #[serde(rename = "max-bandwidth", skip_serializing_if = "Option::is_none", default)]
    pub max_bandwidth: Option<u64>,
    /// The least bandwidth in force, in bytes per second.
    #[serde(rename = "min-bandwidth", skip_serializing_if = "Option::is_none", default)]
    pub min_bandwidth: Option<u64>,
    /// Bytes per second that this round is sent at, where something limits it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pace: Option<u64>,
    /// The part of their time that is taken from the guest's processors that write most, in percent.
    #[serde(rename = "cpu-throttle-percentage", default)]
    pub cpu_throttle_percentage: u32,
    /// What a person should know of how it goes: what was asked for and cannot be done.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub notices: Vec<String>,
    /// RAM figures.
    pub ram: RamView,
    /// What memory it takes.
    #[serde(default)]
    pub memory: MemoryReport,
    /// Bytes of device state.
    #[serde(rename = "device-state")]
    pub device_state: u64,
    /// Bytes that this migration wrote to its sockets, TLS and control included.
    #[serde(rename = "wire-bytes")]
    pub wire_bytes: u64,
    /// Blocks of RAM whose digests were compared and equal, when it was asked to verify.
    #[serde(rename = "blocks-verified", skip_serializing_if = "Option::is_none", default)]
    pub blocks_verified: Option<u32>,
    /// How the downtime was spent, in order.
    #[serde(rename = "downtime-split", default)]
    pub downtime_split: Vec<Span>,
    /// Why it cannot switch to post-copy, if its target has said so.
    #[serde(rename = "postcopy-refusal", skip_serializing_if = "Option::is_none", default)]
    pub postcopy_refusal: Option<String>,
    /// What is known of its post-copy, if it switched to that.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub postcopy: Option<PostcopyView>,
    /// What went wrong, and what state the VM is in now.
    #[serde(rename = "error-desc", skip_serializing_if = "Option::is_none", default)]
    pub error_desc: Option<String>,
    /// Every reason why the VM could not be moved, when it was refused before anything was touched.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub reasons: Vec<ReasonView>,
}

fn running() -> String {
    "running".into()
}

/// Figures of a post-copy, with QEMU's names where the meaning is equal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PostcopyView {
    /// Pages that the target has asked for, and that were sent at once.
    #[serde(rename = "postcopy-requests")]
    pub requests: u64,
    /// Pages that were sent before they were asked for.
    #[serde(rename = "pushed-pages")]
    pub pushed: u64,
    /// How often the guest waited for a page. Known at the end, as what follows is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub faults: Option<u64>,
    /// How long it waited, in microseconds.
    #[serde(rename = "postcopy-latency", skip_serializing_if = "Option::is_none", default)]
    pub latency: Option<LatencyView>,
    /// Milliseconds that each of the guest's processors waited in all.
    #[serde(rename = "postcopy-vcpu-blocktime", skip_serializing_if = "Vec::is_empty", default)]
    pub vcpu_blocktime: Vec<f64>,
}

/// How long something took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LatencyView {
    /// On average.
    pub mean: u64,
    /// Half of the times at most.
    pub p50: u64,
    /// 99 of 100 times at most.
    pub p99: u64,
    /// The longest time.
    pub max: u64,
}

/// QEMU's `ram` object.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RamView {
    /// Bytes of page data and descriptors sent.
    pub transferred: u64,
    /// Bytes known to be unsent.
    pub remaining: u64,
    /// Bytes of RAM.
    pub total: u64,
    /// Pages that needed no bytes: zero pages, holes, and those that the target has as they are.
    pub duplicate: u64,
    /// Pages sent as bytes.
    pub normal: u64,
    /// Those pages in bytes.
    #[serde(rename = "normal-bytes")]
    pub normal_bytes: u64,
    /// Bytes that did not travel because their pages were written again before they could go.
    #[serde(rename = "postponed-bytes", default)]
    pub postponed_bytes: u64,
    /// Bytes that the guest gave away for the move.
    #[serde(rename = "balloon-bytes", default)]
    pub balloon_bytes: u64,
    /// Pages of which only what has changed was sent (QEMU's `xbzrle-cache.pages`).
    #[serde(rename = "delta-pages", default)]
    pub delta_pages: u64,
    /// Bytes that this saved.
    #[serde(rename = "delta-saved-bytes", default)]
    pub delta_saved_bytes: u64,
    /// Pages that did not travel because the target has them in the VM's template.
    #[serde(rename = "template-pages", default)]
    pub template_pages: u64,
    /// Bytes of the template itself that were sent, since the target did not have it. They are in no other figure.
    #[serde(rename = "template-bytes", default)]
    pub template_bytes: u64,
    /// Bytes of it that are to be sent in all.
    #[serde(rename = "template-total", default)]
    pub template_total: u64,
    /// Pages that the VM has in common with others that left with it, or in several places, and that did not travel with it.
    #[serde(rename = "common-pages", default)]
    pub common_pages: u64,
    /// Bytes that were sent so that it and others can share them. They are in no other figure.
    #[serde(rename = "common-bytes", default)]
    pub common_bytes: u64,
    /// Pages in common that travelled as bytes all the same, since the target had no room for more mappings.
    #[serde(rename = "common-fallback-pages", default)]
    pub common_fallback_pages: u64,
    /// Bytes that compression saved.
    #[serde(rename = "compression-saved-bytes", default)]
    pub compression_saved_bytes: u64,
    /// Pages written per second in the last round.
    #[serde(rename = "dirty-pages-rate")]
    pub dirty_pages_rate: u64,
    /// Rounds begun.
    #[serde(rename = "dirty-sync-count")]
    pub dirty_sync_count: u32,
    /// Megabits per second in the last round that was long enough to tell.
    pub mbps: f64,
    /// Bytes of `transferred` that went before a QEMU waited at the target.
    #[serde(rename = "ahead-bytes", default)]
    pub ahead_bytes: u64,
    /// Bytes in a page.
    #[serde(rename = "page-size")]
    pub page_size: u64,
}

impl RamView {
    /// How many pages travelled as such a reference, and how many bytes that saved beside sending them whole. A page that came again counts
    /// each time.
    pub fn references(&self, reference: Reference) -> (u64, u64) {
        let whole = |pages: u64| (pages, pages.saturating_mul(self.page_size));
        match reference {
            Reference::Zero => whole(self.duplicate),
            Reference::Template => whole(self.template_pages),
            Reference::Common => {
                let (pages, bytes) = whole(self.common_pages);
                (pages, bytes.saturating_sub(self.common_bytes))
            }
            Reference::Patch => (self.delta_pages, self.delta_saved_bytes),
            Reference::Bytes => (self.normal.saturating_sub(self.delta_pages), self.compression_saved_bytes),
        }
    }
}

/// A named stretch of time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Span {
    /// What was done.
    pub name: String,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

/// Why something cannot be done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReasonView {
    /// A word for scripts.
    pub code: String,
    /// A sentence for people.
    pub text: String,
}

/// An error, as RFC 9457 has it (`application/problem+json`).
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Problem {
    /// A word for scripts, as a relative URI reference.
    #[serde(rename = "type")]
    pub kind: String,
    /// The same for people, in a few words.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What happened, to which VM and host, what state it is in, and what to do.
    pub detail: String,
    /// Every reason, where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub reasons: Vec<ReasonView>,
}
