//! Running other programs to their end, each with a deadline and an error that shows what they printed.

use std::io::{Read, Seek, SeekFrom, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::LabError;

/// `ip`, `tc` and their like answer in milliseconds; a loaded machine gets a generous factor.
pub const QUICK: Duration = Duration::from_secs(30);
/// Downloads and installations depend on somebody else's server.
pub const DOWNLOAD: Duration = Duration::from_secs(900);
/// How much of a failed program's output an error carries.
const OUTPUT_BYTES_SHOWN: usize = 4000;
/// How often a waiting loop looks again: short beside anything that a person or a test waits for.
pub(crate) const POLL: Duration = Duration::from_millis(2);

/// Runs a command to its end and returns what it printed on stdout.
pub fn output(command: &mut Command, limit: Duration) -> Result<String, LabError> {
    let bytes = output_bytes(command, limit)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `output` for `program` and arguments separated by blanks in `line`.
pub fn line(line: &str, limit: Duration) -> Result<String, LabError> {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    output(command.args(words), limit)
}

/// Feeds `input` to the command and returns what it prints.
pub fn fed(command: &mut Command, input: &str, limit: Duration) -> Result<String, LabError> {
    let mut file = scratch()?;
    file.write_all(input.as_bytes())
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .map_err(LabError::file("write", "a scratch file"))?;
    command.stdin(file);
    let bytes = capture(command, limit)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Runs a command to its end and returns the bytes that it printed on stdout.
pub fn output_bytes(command: &mut Command, limit: Duration) -> Result<Vec<u8>, LabError> {
    command.stdin(Stdio::null());
    capture(command, limit)
}

/// Waits for a condition, looking again and again.
pub fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Result<(), LabError> {
    let end = Instant::now() + limit;
    while !holds() {
        if Instant::now() >= end {
            return Err(LabError::Deadline { what: what.to_owned(), limit });
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Output goes to files and not to pipes: no thread is needed to drain it, and a grandchild that keeps it open blocks nobody.
fn capture(command: &mut Command, limit: Duration) -> Result<Vec<u8>, LabError> {
    let text = text(command);
    let (mut out, mut err) = (scratch()?, scratch()?);
    command.stdout(duplicate(&out)?).stderr(duplicate(&err)?);
    let status = wait(command, &text, limit)?;
    let stdout = read_back(&mut out)?;
    if status.success() {
        return Ok(stdout);
    }
    let mut shown = read_back(&mut err)?;
    shown.extend_from_slice(&stdout);
    Err(LabError::Failed { command: text, status: status.to_string(), output: tail(&shown) })
}

fn wait(command: &mut Command, text: &str, limit: Duration) -> Result<ExitStatus, LabError> {
    let start_error = |source| LabError::Start { command: text.to_owned(), source };
    let mut child = command.spawn().map_err(start_error)?;
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().map_err(LabError::file("wait for", text))? {
            return Ok(status);
        }
        if Instant::now() >= end {
            // It may be gone already: then there is nothing to kill.
            let _ = child.kill();
            let _ = child.wait();
            return Err(LabError::Deadline { what: format!("`{text}`"), limit });
        }
        std::thread::sleep(POLL);
    }
}

/// The command line as a person would type it.
pub(crate) fn text(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The end of what a program printed.
pub(crate) fn tail(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(OUTPUT_BYTES_SHOWN);
    String::from_utf8_lossy(&bytes[from..]).trim().to_owned()
}

fn scratch() -> Result<std::fs::File, LabError> {
    tempfile::tempfile().map_err(LabError::file("make", "a scratch file"))
}

fn duplicate(file: &std::fs::File) -> Result<std::fs::File, LabError> {
    file.try_clone().map_err(LabError::file("duplicate", "a scratch file"))
}

fn read_back(file: &mut std::fs::File) -> Result<Vec<u8>, LabError> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_end(&mut bytes))
        .map_err(LabError::file("read", "a scratch file"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_what_was_printed() {
        let error = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"]), QUICK).unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }

    #[test]
    fn a_deadline_ends_the_program() {
        let limit = Duration::from_millis(50);
        let error = output(Command::new("sleep").arg("600"), limit).unwrap_err();
        assert!(matches!(error, LabError::Deadline { .. }), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = line("sterna-no-such-program x", QUICK).unwrap_err();
        assert!(error.to_string().contains("sterna-no-such-program x"), "{error}");
    }

    #[test]
    fn input_reaches_the_program() {
        assert_eq!(fed(&mut Command::new("cat"), "hello", QUICK).unwrap(), "hello");
    }
}
