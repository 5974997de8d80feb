//! On a terminal there is a bar, and nothing is left of it at the end.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

#[path = "../../agent/tests/fake/mod.rs"]
mod fake;

use fake::Server;
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

#[test]
fn a_terminal_sees_a_bar_and_stdout_the_result() {
    let server = Server::start();
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let terminal = open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    tcsetwinsize(&terminal, Winsize { ws_row: 24, ws_col: 160, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sterna"));
    command.env("STERNA_SOCKET", server.socket()).env("TERM", "xterm").args(["migrate", "web", "hostb"]);
    let child = command.stdout(Stdio::piped()).stderr(File::from(terminal)).spawn().unwrap();
    // It holds the terminal open, and the reader below would wait for ever.
    drop(command);

    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        // EIO is how a terminal without its other side ends.
        let _ = File::from(master).read_to_end(&mut seen);
        String::from_utf8_lossy(&seen).into_owned()
    });
    let output = child.wait_with_output().unwrap();
    let seen = reader.join().unwrap();
    assert_eq!(output.status.code(), Some(0), "{seen}");
    assert!(seen.contains("web active [") && seen.contains("round"), "{seen:?}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("Total downtime:"));
}
