//! The load finds what a faulty migration does to memory: pages are damaged from outside while it runs.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};

const LOAD: &str = env!("CARGO_BIN_EXE_load");
const MIB: u64 = 1 << 20;

struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_mode_keeps_its_memory_right() {
    for mode in ["sequential", "random", "hot"] {
        for (write, check) in [("sparse", "--check"), ("dense", "--check"), ("sparse", "--check=written")] {
            let options = [format!("--mode={mode}"), format!("--write={write}"), check.to_owned()];
            let fixed = ["--fill=8", "--dirty=4", "--rate=30", "--for=2"];
            let output = Command::new(LOAD).args(options).args(fixed).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success() && !text.contains("BAD"), "{mode} {write} {check}: {text}");
            let last = text.lines().last().unwrap();
            assert!(last.ends_with("bad=0") && !last.contains("pages=0 "), "{last}");
        }
    }
}

#[test]
fn a_page_that_was_zeroed_from_outside_is_reported() {
    let mut command = Command::new(LOAD);
    command.args(["--fill=32", "--dirty=4", "--rate=5", "--check", "--for=60"]);
    let mut load = Load(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(load.0.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().starts_with("LOAD filled"));
    let memory = std::fs::OpenOptions::new().write(true).open(format!("/proc/{}/mem", load.0.id())).unwrap();
    // In the middle of the part that is filled and never written again.
    memory.write_all_at(&[0; 4096], largest_mapping(load.0.id()) + 16 * MIB).unwrap();
    let reported = lines.find(|l| l.starts_with("BAD page=") || l.starts_with("LOAD t=59"));
    assert!(reported.as_ref().is_some_and(|l| l.starts_with("BAD page=")), "{reported:?}");
}

#[test]
fn a_mistyped_option_is_named() {
    let output = Command::new(LOAD).arg("--fil=8").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stdout).unwrap().contains("--fil"));
}

fn largest_mapping(pid: u32) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let range = |line: &str| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    };
    maps.lines().filter_map(range).max_by_key(|(start, end)| end - start).unwrap().0
}
