//! What may be written on the command line. Help, man pages and completions all come from here.

use crate::{bandwidth, refused};
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Where the agent's API is when nobody says.
pub(crate) const DEFAULT_SOCKET: &str = "/run/sterna/agent.sock";

/// Longest downtime limit in milliseconds: QEMU's own.
pub(crate) const DOWNTIME_MS_MAX: u64 = 2_000_000;

/// Most page streams: QEMU's own limit for `multifd-channels`.
const CONNECTIONS_MAX: i64 = 64;

const AFTER: &str = "\
Example:
  sterna run web -- qemu-system-x86_64 -m 1G -drive file=/srv/web.img,if=virtio,format=raw -nographic
  sterna migrate web hostb --verify

Exit codes:
  0  done
  1  failed; the VM runs at the source
  2  wrong arguments, no such name, or no agent answers: nothing was changed
  3  cancelled; the VM runs at the source
  4  the VM needs attention: it runs nowhere, stands still without pages that are lost, or it is not known
     where it runs
  5  refused by the pre-check: nothing was touched, each reason has a line

Environment:
  STERNA_SOCKET  as --socket
  STERNA_LOG     what `sterna agent` logs, as `info` or `sterna_agent=debug`
  NO_COLOR       no colours";

/// Live migration of QEMU/KVM virtual machines, on unmodified QEMU.
#[derive(Parser)]
#[command(name = "sterna", version, about, long_about = None, after_help = AFTER, max_term_width = 100)]
#[command(propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Args {
    /// Socket of the agent's API [default: /run/sterna/agent.sock]
    #[arg(long, global = true, env = "STERNA_SOCKET", value_name = "PATH", hide_env_values = true)]
    pub(crate) socket: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Verbs.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run the agent of this host, in the foreground
    #[command(after_help = "Example:\n  sterna agent --config /etc/sterna/agent.toml")]
    Agent(Agent),
    /// Make keys and certificates that hosts know each other by
    #[command(subcommand)]
    Pki(Pki),
    /// Start a VM from its own QEMU command line
    #[command(after_help = "Example:\n  sterna run web -- qemu-system-x86_64 -m 1G \
        -drive file=/srv/web.img,if=virtio,format=raw -nographic\n  \
        sterna run web2 --template web")]
    Run(Run),
    /// Make VMs that others start from in a moment, and share their memory with
    #[command(subcommand)]
    Template(Template),
    /// List the VMs of this host
    #[command(visible_alias = "list", after_help = "Example:\n  sterna ps -o json | jq -r '.[].name'")]
    Ps(Output),
    /// List the hosts that VMs may go to and come from
    #[command(after_help = "Example:\n  sterna hosts")]
    Hosts(Output),
    /// Move a running VM to another host, and wait until it runs there
    ///
    /// Shows its progress on stderr and the result on stdout. Ctrl-C cancels and waits for the end; the VM then runs
    /// where it ran. A limit can be changed while it goes on: `sterna set VM ...`. Every migration can be switched to post-copy
    /// while it goes on: `sterna postcopy VM`. Then the VM runs at the target, which nothing takes back, and the command waits until
    /// all of its pages have come.
    ///
    /// Several VMs leave together: they move at once, and the memory that they share here travels once and is shared there too. Each has
    /// the limits that are given.
    #[command(after_help = "Examples:\n  sterna migrate web hostb\n  \
        sterna migrate web1 web2 web3 hostb\n  \
        sterna migrate web hostb --bandwidth 64MiB/s --max-downtime 50 --timeout 120\n  \
        sterna migrate web hostb --min-bandwidth 100Mbit/s --max-bandwidth 800Mbit/s --auto-converge\n  \
        sterna migrate web hostb --timeout 120 --timeout-postcopy\n  \
        id=$(sterna migrate web hostb --detach) && sterna status $id")]
    Migrate(Migrate),
    /// List the migrations from this host, the newest first
    #[command(after_help = "Example:\n  sterna migrations -o wide")]
    Migrations(Output),
    /// Show the figures of a VM's newest migration, with the labels of `virsh domjobinfo`
    #[command(after_help = "Example:\n  sterna status web -o json | jq .downtime")]
    Status(Which),
    /// Cancel a VM's migration, and wait until it has ended
    #[command(after_help = "Example:\n  sterna abort web")]
    Abort(Abort),
    /// Switch a VM's migration to post-copy: it runs at the target now, and its missing pages follow
    ///
    /// Any migration can be switched, until its VM is stopped; no flag of `sterna migrate` has to permit it. Like virsh's it returns at once,
    /// and the switch follows within moments: `sterna status` tells when it was made. It cannot be taken back then: the VM needs both
    /// hosts until all pages have come.
    #[command(visible_alias = "migrate-postcopy", after_help = "Example:\n  sterna postcopy web")]
    Postcopy(Which),
    /// Change the limits of a migration that goes on
    #[command(after_help = "Example:\n  sterna set web --bandwidth 0 --max-downtime 500")]
    Set(Set),
    /// End a VM: its QEMU quits, the guest is not asked
    #[command(after_help = "Example:\n  sterna stop web")]
    Stop(Stop),
    /// Decide where an unresolved VM runs: its target does not say whether it runs it
    ///
    /// The other host is asked once more, and its word goes before yours: what contradicts it is refused. Where it has
    /// none, --here lets the VM run at the host whose agent is asked, and what the other host knows of that migration
    /// counts no more; --there ends what is left of it here. Where a post-copy's target is lost for good, --there ends what was kept
    /// for it here; should that host come back, the pages that its VM still missed are gone. A VM that runs twice destroys its disks: be sure.
    #[command(after_help = "Example:\n  sterna recover web --here")]
    Recover(Recover),
    /// Measure what a running VM writes, and predict how it would move
    ///
    /// Shows how many pages are written, how the set of written pages grows with time (the writable working set), where the hot
    /// regions are, and what a migration would take over links of several bandwidths. Nothing is moved. It costs the guest some
    /// 2 us for each page that it writes first in an interval; intervals are stretched where that is more than --max-cost. A
    /// migration of the VM ends the measurement; so does Ctrl-C.
    #[command(after_help = "Examples:\n  sterna wws web\n  \
        sterna wws web --interval 500ms --duration 2m --bandwidth 1Gbit/s --bandwidth 25Gbit/s --plot web.svg\n  \
        sterna wws web --duration 10s -o json | jq '.predictions[] | {bandwidth, downtime}'")]
    Wws(crate::commands::Wws),
    /// Write completions for a shell to stdout
    #[command(after_help = "Example:\n  sterna completion bash > /etc/bash_completion.d/sterna")]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write man pages to a folder, or the first one to stdout
    #[command(after_help = "Example:\n  sterna man /usr/local/share/man/man1")]
    Man {
        /// Folder for all pages
        dir: Option<PathBuf>,
    },
}

#[derive(ClapArgs)]
pub(crate) struct Agent {
    /// The configuration, in TOML
    #[arg(long, value_name = "FILE", default_value = "/etc/sterna/agent.toml")]
    pub(crate) config: PathBuf,
}

#[derive(Subcommand)]
pub(crate) enum Pki {
    /// Make the authority of a group of hosts
    #[command(after_help = "Example:\n  sterna pki init /root/sterna-pki")]
    Init {
        /// Folder of the authority; stays with the operator
        dir: PathBuf,
        /// What the authority calls itself
        #[arg(long, default_value = "Sterna authority")]
        name: String,
    },
    /// Issue a host's certificate and key
    #[command(
        after_help = "Example:\n  sterna pki issue /root/sterna-pki hostb --name hostb.example.org --name 192.0.2.7"
    )]
    Issue {
        /// Folder of the authority
        dir: PathBuf,
        /// Name of the host, as in the agents' configurations
        host: String,
        /// Another DNS name or an address of the host; may be repeated
        #[arg(long = "name", value_name = "ALT")]
        names: Vec<String>,
    },
    /// Show what a certificate says
    #[command(after_help = "Example:\n  sterna pki show /root/sterna-pki/hostb.crt")]
    Show {
        /// A certificate in PEM
        file: PathBuf,
    },
}

#[derive(ClapArgs)]
pub(crate) struct Run {
    /// Name of the VM, unique on every host it will move to
    pub(crate) name: String,
    /// Start it as a clone of this template, whose command line it has
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "argv")]
    pub(crate) template: Option<String>,
    #[command(flatten)]
    pub(crate) output: Output,
    /// QEMU and its arguments, after `--`
    #[arg(last = true, required_unless_present = "template", value_name = "QEMU")]
    pub(crate) argv: Vec<String>,
}

#[derive(Subcommand)]
pub(crate) enum Template {
    /// Boot a VM, wait until it is ready, and make a template of it
    ///
    /// The VM ends when the template is made. Or make one of a VM that runs already (--from), which stands still for a moment and runs on.
    /// Clones have the VM's command line; `{vm}` in it becomes the name of a clone, so that each has a console or socket of its own. They
    /// have all that the VM had, its random state, machine id and MAC address included: give QEMU `-device vmgenid` so that guests notice.
    #[command(after_help = "Examples:\n  \
        sterna template create web --console /run/web.log --until-line ready -- \\\n    \
        qemu-system-x86_64 -m 1G -drive file=/srv/{vm}.qcow2,format=qcow2,if=virtio -display none \\\n    \
        -chardev file,id=console,path=/run/{vm}.log,append=on -serial chardev:console\n  \
        sterna template create web --until-command 'curl -sf http://192.0.2.9/' -- qemu-system-x86_64 ...\n  \
        sterna template create web --from vm7")]
    Create(TemplateCreate),
    /// List the templates of this host
    #[command(visible_alias = "ls", after_help = "Example:\n  sterna template list")]
    List(Output),
    /// Show all that is known of a template
    #[command(after_help = "Example:\n  sterna template inspect web -o json | jq .digest")]
    Inspect {
        /// Name of the template
        name: String,
        #[command(flatten)]
        output: Output,
    },
    /// Send a template to another host, where clones may then go without it
    ///
    /// A migration does the same by itself before it begins. What was sent before a failure is not sent again.
    #[command(after_help = "Example:\n  sterna template push web hostb --bandwidth 200Mbit/s")]
    Push {
        /// Name of the template
        name: String,
        /// Name of the host (see `sterna hosts`)
        host: String,
        /// Most bytes per second on the wire, as `64MiB/s` or `1Gbit/s`
        #[arg(long = "max-bandwidth", visible_alias = "bandwidth", value_name = "RATE", value_parser = bandwidth::parse)]
        bandwidth: Option<u64>,
        #[command(flatten)]
        output: Output,
    },
    /// Remove a template that no VM of this host uses
    #[command(visible_alias = "rm", after_help = "Example:\n  sterna template remove web")]
    Remove {
        /// Name of the template
        name: String,
    },
}

#[derive(ClapArgs)]
pub(crate) struct TemplateCreate {
    /// Name of the template, unique on every host
    pub(crate) name: String,
    /// Make it of this VM, which runs on, instead of booting one
    #[arg(long, value_name = "VM", conflicts_with_all = ["argv", "until_line", "until_command", "after"])]
    pub(crate) from: Option<String>,
    /// Ready once the guest has written this to its console
    #[arg(long, value_name = "TEXT", requires = "console")]
    pub(crate) until_line: Option<String>,
    /// The file that QEMU writes the guest's console to (`-serial file:...`)
    #[arg(long, value_name = "FILE")]
    pub(crate) console: Option<PathBuf>,
    /// Ready once this command succeeds; it is run again and again, by `sh -c`
    #[arg(long, value_name = "COMMAND")]
    pub(crate) until_command: Option<String>,
    /// Ready after so many seconds, counted from when the above are
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) after: Option<f64>,
    /// Seconds after which it is given up
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "300")]
    pub(crate) within: f64,
    #[command(flatten)]
    pub(crate) output: Output,
    /// QEMU and its arguments, after `--`
    #[arg(last = true, required_unless_present = "from", value_name = "QEMU")]
    pub(crate) argv: Vec<String>,
}

#[derive(ClapArgs)]
pub(crate) struct Migrate {
    /// Name of the VM, or of several that leave together
    #[arg(required = true, value_name = "VM")]
    pub(crate) vms: Vec<String>,
    /// Name of the host it goes to (see `sterna hosts`)
    pub(crate) host: String,
    #[command(flatten)]
    pub(crate) limits: Limits,
    /// Seconds after which the VM is stopped and moved, however long it will be down; or switched, with --timeout-postcopy
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<f64>,
    /// What `--timeout` does anyway; known from virsh
    #[arg(long, requires = "timeout", conflicts_with = "timeout_postcopy", hide = true)]
    pub(crate) timeout_suspend: bool,
    /// Post-copy at once: the VM runs at the target before any of its pages is there, and they follow (virsh's --postcopy only permits
    /// a switch, which needs no permission here)
    #[arg(long, conflicts_with_all = ["auto_converge", "min_bandwidth", "bandwidth_step", "delta_cache", "max_downtime"])]
    pub(crate) postcopy: bool,
    /// Post-copy after one round: the VM runs at the target then, and what it has written meanwhile follows, unless that fits
    /// --max-downtime
    #[arg(long, conflicts_with = "auto_converge")]
    pub(crate) postcopy_after_precopy: bool,
    /// Post-copy after --timeout: the VM runs at the target then, and what is missing follows, instead of standing still for it
    #[arg(long, requires = "timeout")]
    pub(crate) timeout_postcopy: bool,
    /// Slow a guest that writes faster than its pages can be sent: its processors that write most, as far as it takes
    #[arg(long)]
    pub(crate) auto_converge: bool,
    /// Take from the guest what it can do without, through its balloon, for the time of the move: its page cache does not travel then
    #[arg(long)]
    pub(crate) balloon: bool,
    /// With --min-bandwidth: how much faster than the guest writes a round is sent [50Mbit/s]
    #[arg(long, value_name = "RATE", value_parser = bandwidth::parse, requires = "min_bandwidth")]
    pub(crate) bandwidth_step: Option<u64>,
    /// How pages may be compressed, where it is measured that they arrive sooner
    #[arg(long, value_enum, default_value_t = Compression::Auto, value_name = "METHOD")]
    pub(crate) compression: Compression,
    /// What travels once and is shared at the target: pages that share a frame of memory here (KSM, a file that is mapped privately), of
    /// all VMs that are named; with `hash` all that have the same content, which lets VMs see by their own timing what others have
    #[arg(long, value_enum, default_value_t = Dedup::Frames, value_name = "WHAT")]
    pub(crate) dedup: Dedup,
    /// When a clone's template goes to a host that lacks it; `after` needs --postcopy
    #[arg(long, value_enum, default_value_t = SendTemplate::Before, value_name = "WHEN")]
    pub(crate) send_template: SendTemplate,
    /// Memory that the source keeps pages in, to send only what has changed of those that come again: 256MiB; 0 for none [a
    /// quarter of the VM's RAM, 512MiB at most]
    #[arg(long, value_name = "SIZE", value_parser = crate::bandwidth::parse_size)]
    pub(crate) delta_cache: Option<u64>,
    /// Prove, before it runs at the target, that its RAM is what it was at the source; what post-copy fetches, once all of it has come
    #[arg(long)]
    pub(crate) verify: bool,
    /// Page streams; the agent chooses when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=CONNECTIONS_MAX))]
    pub(crate) parallel_connections: Option<u32>,
    /// Do not wait: print the migration's id
    #[arg(long)]
    pub(crate) detach: bool,
    /// Show no progress
    #[arg(long, short, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Show progress, as is done anyway; known from virsh
    #[arg(long, hide = true)]
    pub(crate) verbose: bool,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) _refused: refused::Migrate,
}

/// Limits that may change while a migration goes on.
#[derive(ClapArgs)]
pub(crate) struct Limits {
    /// Most bytes per second on the wire: 64 (MiB/s), 64MiB/s, 1Gbit/s; 0 is no limit
    #[arg(long, visible_alias = "max-bandwidth", value_name = "RATE", value_parser = bandwidth::parse)]
    pub(crate) bandwidth: Option<u64>,
    /// Send the first round at this rate, and later ones only as much faster as the guest writes, so that its own traffic keeps the
    /// rest of the link; 0 sends all rounds at the most
    #[arg(long, value_name = "RATE", value_parser = bandwidth::parse)]
    pub(crate) min_bandwidth: Option<u64>,
    /// Longest time the VM may be stopped, in milliseconds [migrate: 300]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=DOWNTIME_MS_MAX))]
    pub(crate) max_downtime: Option<u64>,
}

#[derive(ClapArgs)]
pub(crate) struct Which {
    /// Name of the VM, or id of a migration
    #[arg(value_name = "VM|ID")]
    pub(crate) which: String,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(ClapArgs)]
pub(crate) struct Abort {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) _refused: refused::Abort,
}

#[derive(ClapArgs)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["bandwidth", "min_bandwidth", "max_downtime", "auto_converge"]))]
pub(crate) struct Set {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) limits: Limits,
    /// Slow the guest where it does not converge, or not any more
    #[arg(long, value_name = "on|off", value_parser = clap::builder::BoolishValueParser::new())]
    pub(crate) auto_converge: Option<bool>,
}

#[derive(ClapArgs)]
pub(crate) struct Stop {
    /// Name of the VM
    pub(crate) name: String,
}

#[derive(ClapArgs)]
#[command(group = clap::ArgGroup::new("side").required(true).args(["here", "there"]))]
pub(crate) struct Recover {
    /// Name of the VM
    pub(crate) vm: String,
    /// It does not run at the other host, and never will by this migration
    #[arg(long)]
    pub(crate) here: bool,
    /// It runs at the other host
    #[arg(long)]
    pub(crate) there: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(ClapArgs, Clone, Copy)]
pub(crate) struct Output {
    /// Shape of the result
    #[arg(long = "output", short = 'o', value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

/// What travels once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dedup {
    /// Every page for itself
    None,
    /// Pages that share a frame of memory here
    Frames,
    /// Pages that have the same content: all memory is read and hashed for that
    Hash,
}

impl From<Dedup> for sterna_agent::model::Dedup {
    fn from(dedup: Dedup) -> Self {
        match dedup {
            Dedup::None => Self::None,
            Dedup::Frames => Self::Frames,
            Dedup::Hash => Self::Hash,
        }
    }
}

/// When a clone's template goes to a host that does not have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SendTemplate {
    /// Before anything else
    Before,
    /// While the VM's own pages go
    Beside,
    /// After the VM has begun to run there, which asks for what it touches meanwhile
    After,
}

impl From<SendTemplate> for sterna_agent::model::SendTemplate {
    fn from(when: SendTemplate) -> Self {
        match when {
            SendTemplate::Before => Self::Before,
            SendTemplate::Beside => Self::Beside,
            SendTemplate::After => Self::After,
        }
    }
}

/// Ways to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compression {
    /// The best of all, batch by batch
    Auto,
    /// Not at all
    None,
    /// LZ4 alone
    Lz4,
    /// Zstandard alone
    Zstd,
}

impl From<Compression> for sterna_agent::model::CompressionMode {
    fn from(method: Compression) -> Self {
        match method {
            Compression::Auto => Self::Auto,
            Compression::None => Self::None,
            Compression::Lz4 => Self::Lz4,
            Compression::Zstd => Self::Zstd,
        }
    }
}

/// Shapes of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For people with a wide screen
    Wide,
    /// One JSON document
    Json,
    /// A JSON document per line; with `migrate`, one for each change
    Jsonl,
}

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("a number of seconds above 0".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_holds_together() {
        Args::command().debug_assert();
    }

    #[test]
    fn each_command_shows_an_example() {
        fn check(command: &clap::Command) {
            for child in command.get_subcommands().filter(|child| child.get_name() != "help") {
                let help = child.get_after_help().map(ToString::to_string).unwrap_or_default();
                let group = child.get_subcommands().next().is_some();
                assert!(group || help.contains("Example"), "{} teaches nothing", child.get_name());
                check(child);
            }
        }
        check(&Args::command());
    }
}
