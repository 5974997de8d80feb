//! `sterna-attach`: runs system calls inside another process, and outlives whoever asked for it.
//!
//! Not for people: it reads one request from a socket on its standard input, answers and exits. See `helper` in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    sterna_memory::helper_main()
}
