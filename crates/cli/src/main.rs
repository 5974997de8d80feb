//! `sterna`: moves running virtual machines, over the agent's API.
//!
//! Results go to stdout, progress and errors to stderr, and the exit code tells what became of the VM (see [`exit`]).
//!
//! ```text
//! args        what may be written on the command line      client    HTTP on the agent's Unix socket
//! refused     virsh's flags that cannot be honoured yet    follow    a migration until it ends, whatever breaks
//! commands    one file per group of commands               progress  what is shown meanwhile
//! exit        exit codes and errors                        show      tables and JSON
//! chart       figures drawn with block characters          plot      the same as SVG
//! ```
#![forbid(unsafe_code)]

mod args;
mod bandwidth;
mod chart;
mod client;
mod commands;
mod exit;
mod follow;
mod human;
mod interrupt;
mod plot;
mod postcopy;
mod progress;
mod refused;
mod show;

use clap::Parser;
use exit::Exit;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = match args::Args::try_parse() {
        Ok(args) => args,
        Err(error) => return usage(&error).into(),
    };
    match commands::run(args) {
        Ok(exit) => exit.into(),
        Err(failure) => failure.report().into(),
    }
}

/// Help and version go to stdout as clap wrote them; errors are said as all of ours are.
fn usage(error: &clap::Error) -> Exit {
    if !error.use_stderr() {
        // Whoever asked for help and closed the pipe has read enough.
        let _ = error.print();
        return Exit::Done;
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    exit::complain(text.trim_end());
    Exit::Usage
}
