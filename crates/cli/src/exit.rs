//! Exit codes, and errors as a person and a script see them.

use crate::human::plain;
use std::io::Write;
use std::process::ExitCode;
use sterna_agent::model::ReasonView;

/// What became of the VM, as a script can test it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It was done.
    Done = 0,
    /// It failed, and the VM runs at the source.
    Failed = 1,
    /// Wrong arguments, an unknown name, or no agent: nothing was changed.
    Usage = 2,
    /// The migration was cancelled, and the VM runs at the source.
    Cancelled = 3,
    /// Where the VM runs is not known: a person has to look.
    Attention = 4,
    /// The pre-check speaks against it: nothing was touched.
    Refused = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what it should.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) exit: Exit,
    /// What happened and what to do.
    pub(crate) text: String,
    /// Every reason, where there are several.
    pub(crate) reasons: Vec<ReasonView>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, text: impl Into<String>) -> Self {
        Self { exit, text: text.into(), reasons: Vec::new() }
    }

    /// Says it on stderr; each reason has a line.
    pub(crate) fn report(&self) -> Exit {
        if self.text.is_empty() {
            return self.exit;
        }
        complain(&self.text);
        for reason in &self.reasons {
            tell(&format!("  {}: {}", reason.code, reason.text));
        }
        self.exit
    }
}

/// An error or a note on stderr, with our name.
pub(crate) fn complain(text: &str) {
    tell(&format!("sterna: {text}"));
}

/// A line on stderr. Nothing is done when stderr is closed: there is nobody to tell.
pub(crate) fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", plain(text));
}
