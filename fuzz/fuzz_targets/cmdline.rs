//! QEMU's command line, which a peer offers: what is read is written back in a form that reads the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna_vmm::qemu::CommandLine;

fuzz_target!(|data: &[u8]| {
    let argv = String::from_utf8_lossy(data).split('\n').map(String::from).collect::<Vec<_>>();
    if let Ok(line) = CommandLine::parse(argv) {
        assert_eq!(CommandLine::parse(line.to_argv()).as_ref(), Ok(&line));
    }
});
