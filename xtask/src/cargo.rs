//! Cargo's own commands, in the order and with the options that the project wants.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

use crate::packages::Ready;

/// Formatting and lints of the whole workspace.
pub(crate) fn lint() -> anyhow::Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))
}

/// All tests. One binary after the other, and few at once in each: QEMUs under emulation need the cores themselves.
pub(crate) fn test(ready: &Ready, arguments: &[String]) -> anyhow::Result<()> {
    let mut command = cargo();
    ready.tell(&mut command);
    run(command.args(["test", "--workspace"]).args(arguments))
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    command
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}
