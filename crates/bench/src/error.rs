//! What can go wrong in a measurement, in the words of the person who reads it.

use std::path::PathBuf;
use std::time::Duration;

use sterna_lab::LabError;

/// Why something was not measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The lab could not do it.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A program could not be started.
    #[error("{program} cannot be started: is it built?")]
    Start {
        /// Its path.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `sterna migrate` ended with an error.
    #[error("`{command}` ended with exit code {code}; it said: {said}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit code, or the signal that ended it.
        code: String,
        /// The end of its output and of the agents' logs.
        said: String,
    },
    /// Something took too long.
    #[error("{what} took longer than {limit:?}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// The limit.
        limit: Duration,
    },
    /// Something was not done when as much had been tried as was allowed.
    #[error("{what} had not ended after {rounds} rounds")]
    NoEnd {
        /// What was waited for.
        what: String,
        /// How many there were.
        rounds: u64,
    },
    /// A file could not be used.
    #[error("cannot {action} {path}")]
    File {
        /// `read`, `write`, ...
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Something came out other than it must be.
    #[error("{what}: {found}")]
    Unexpected {
        /// What was looked at.
        what: String,
        /// What was found.
        found: String,
    },
    /// A plot could not be drawn.
    #[error("a plot could not be drawn: {0}")]
    Plot(String),
}

impl BenchError {
    /// A move that does not get through in the time or the rounds that it has: that is a result.
    #[must_use]
    pub fn is_no_end(&self) -> bool {
        matches!(self, BenchError::Deadline { .. } | BenchError::NoEnd { .. })
    }

    /// For `map_err`: what was done to which file.
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> BenchError {
        let path = path.into();
        move |source| BenchError::File { action, path, source }
    }

    /// For `map_err`: which program did not start.
    pub(crate) fn start(program: impl AsRef<std::path::Path>) -> impl FnOnce(std::io::Error) -> BenchError {
        let program = program.as_ref().display().to_string();
        move |source| BenchError::Start { program, source }
    }

    /// Something came out other than it must be.
    pub(crate) fn unexpected(what: impl Into<String>, found: impl Into<String>) -> BenchError {
        BenchError::Unexpected { what: what.into(), found: found.into() }
    }
}
