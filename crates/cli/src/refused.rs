//! Flags of `virsh migrate` and `virsh domjobabort` that cannot be honoured: known to the parser, so that the answer is
//! the reason and not "unexpected argument". A flag that was ignored would be a promise that nobody keeps.

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// What follows a flag.
#[derive(Clone, Copy)]
enum Takes {
    Nothing,
    Value,
}

struct Flag(&'static str, Takes, &'static str);

const POSTCOPY_RESUME: &str = "not needed: a post-copy whose connection was lost goes on by itself once the other host is reached; leave it out";
const POSTCOPY_BANDWIDTH: &str = "write `--bandwidth RATE` instead: it holds after the hand-over as well";
const POSTCOPY_ABORT: &str =
    "cannot be done: the VM runs at its target then and needs what is missing there; it goes on by itself";
const THROTTLE: &str =
    "not needed: `--auto-converge` slows a guest as far as what it writes asks for; leave it out";
const COMPRESSION: &str =
    "not needed; leave it out: pages are compressed by themselves where that makes them arrive sooner";
const METHODS: &str = "write `--compression auto|none|lz4|zstd` instead";
const CACHE: &str = "write `--delta-cache SIZE` instead";
const STORAGE: &str = "not supported yet: disks must be on storage that both hosts reach";
const CONFIGURATION: &str =
    "not supported yet: an agent keeps no VMs that do not run, so there is nothing to define or undefine";
const CHANNEL: &str = "not needed: agents talk to each other directly and always by TLS; leave it out";

const MIGRATE: &[Flag] = &[
    Flag("live", Takes::Nothing, "not needed: every migration is live; leave it out"),
    Flag("offline", Takes::Nothing, "not supported yet: only running VMs are moved"),
    Flag("postcopy-resume", Takes::Nothing, POSTCOPY_RESUME),
    Flag("postcopy-bandwidth", Takes::Value, POSTCOPY_BANDWIDTH),
    Flag("auto-converge-initial", Takes::Value, THROTTLE),
    Flag("auto-converge-increment", Takes::Value, THROTTLE),
    Flag("compressed", Takes::Nothing, COMPRESSION),
    Flag("comp-methods", Takes::Value, METHODS),
    Flag("comp-xbzrle-cache", Takes::Value, CACHE),
    Flag("copy-storage-all", Takes::Nothing, STORAGE),
    Flag("copy-storage-inc", Takes::Nothing, STORAGE),
    Flag("persistent", Takes::Nothing, CONFIGURATION),
    Flag("undefinesource", Takes::Nothing, CONFIGURATION),
    Flag(
        "xml",
        Takes::Value,
        "not supported yet: the target's own names are in its agent's configuration (`[map]`)",
    ),
    Flag("dname", Takes::Value, "not supported yet: a VM keeps its name"),
    Flag("suspend", Takes::Nothing, "not supported yet: the VM runs at the target"),
    Flag(
        "abort-on-error",
        Takes::Nothing,
        "not supported yet: disk errors of the guest do not end a migration",
    ),
    Flag("unsafe", Takes::Nothing, "not supported yet: the pre-check cannot be skipped"),
    Flag(
        "parallel",
        Takes::Nothing,
        "not needed: `--parallel-connections N` sets the number of page streams",
    ),
    Flag("p2p", Takes::Nothing, CHANNEL),
    Flag("direct", Takes::Nothing, CHANNEL),
    Flag("tunnelled", Takes::Nothing, CHANNEL),
    Flag("tls", Takes::Nothing, CHANNEL),
    Flag("rdma-pin-all", Takes::Nothing, "not supported yet: pages travel by TCP"),
    Flag("zerocopy", Takes::Nothing, "not supported yet: pages travel encrypted"),
];

const ABORT: &[Flag] = &[Flag("postcopy", Takes::Nothing, POSTCOPY_ABORT)];

/// `virsh migrate`'s flags, refused.
pub(crate) struct Migrate;

/// `virsh domjobabort`'s flags, refused.
pub(crate) struct Abort;

macro_rules! refuse {
    ($name:ident, $flags:expr) => {
        impl clap::FromArgMatches for $name {
            fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
                check($flags, matches).map(|()| Self)
            }
            fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
                check($flags, matches)
            }
        }
        impl clap::Args for $name {
            fn augment_args(command: Command) -> Command {
                command.args($flags.iter().map(argument))
            }
            fn augment_args_for_update(command: Command) -> Command {
                Self::augment_args(command)
            }
        }
    };
}
refuse!(Migrate, MIGRATE);
refuse!(Abort, ABORT);

fn argument(flag: &Flag) -> Arg {
    let action = match flag.1 {
        Takes::Nothing => ArgAction::SetTrue,
        Takes::Value => ArgAction::Set,
    };
    Arg::new(flag.0).long(flag.0).action(action).hide(true)
}

fn check(flags: &[Flag], matches: &ArgMatches) -> Result<(), clap::Error> {
    use clap::parser::ValueSource::CommandLine;
    match flags.iter().find(|flag| matches.value_source(flag.0) == Some(CommandLine)) {
        None => Ok(()),
        Some(Flag(name, _, why)) => {
            Err(clap::Error::raw(ErrorKind::ArgumentConflict, format!("--{name}: {why}\n")))
        }
    }
}
