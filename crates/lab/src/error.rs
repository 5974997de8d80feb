//! What can go wrong in the lab, in the words of the person who reads it.

use std::path::PathBuf;
use std::time::Duration;

/// Why something in the lab did not work.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A program could not be started.
    #[error("cannot start `{command}`: is it installed?")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A program ended with an error.
    #[error("`{command}` failed ({status}): {output}")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        output: String,
    },
    /// A program or a condition took too long.
    #[error("{what} took longer than {limit:?}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// The limit.
        limit: Duration,
    },
    /// A file could not be used.
    #[error("cannot {action} {path}")]
    File {
        /// `read`, `write`, `make`, ...
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The machine's memory is in pieces.
    #[error("the kernel finds {found} huge pages of {wanted}: its memory is in pieces, or full")]
    TooFewHugePages {
        /// How many were asked for.
        wanted: u64,
        /// How many could be reserved.
        found: u64,
    },
    /// Debian packages are missing and only root can install them.
    #[error("these Debian packages are missing: {}\nrun as root: apt-get install --no-install-recommends {}",
        .packages.join(" "), .packages.join(" "))]
    MissingPackages {
        /// Their names.
        packages: Vec<String>,
    },
    /// This machine's package sources do not offer what is needed.
    #[error(
        "no {what} in this machine's package sources: add Debian 12 (suite bookworm, component main) to them"
    )]
    NoSource {
        /// Package and version.
        what: String,
    },
    /// Something came out other than it must be.
    #[error("{what}: {found}")]
    Unexpected {
        /// What was looked at.
        what: String,
        /// What was found.
        found: String,
    },
    /// A lab with this name belongs to a living process.
    #[error(
        "the lab {name} belongs to the running process {pid}: end that process, and the lab goes with it"
    )]
    InUse {
        /// The lab.
        name: String,
        /// Its owner.
        pid: u32,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {reason}")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's description.
        reason: String,
    },
    /// The request cannot be met.
    #[error("{0}")]
    Refused(String),
}

impl LabError {
    /// For `map_err`: what was done to which file.
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> LabError {
        let path = path.into();
        move |source| LabError::File { action, path, source }
    }

    /// Something came out other than it must be.
    pub(crate) fn unexpected(what: impl Into<String>, found: impl Into<String>) -> LabError {
        LabError::Unexpected { what: what.into(), found: found.into() }
    }
}
