//! QMP from a process that may be no QEMU: a socket that says anything and closes. Errors, no panic, no hang.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use sterna_vmm::qemu::Qmp;

/// Longest input: it must fit a socket's buffer, since nobody reads while it is written.
const BYTES_MAX: usize = 32 * 1024;
/// Far above what reading a closed socket takes.
const WITHIN: Duration = Duration::from_secs(5);
const GREETING: &[u8] =
    b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7, \"minor\": 2, \"micro\": 0}, \"package\": \"\"}, \
\"capabilities\": []}}\r\n";

fuzz_target!(|data: &[u8]| {
    let Some((first, data)) = data.split_first() else { return };
    let data = &data[..data.len().min(BYTES_MAX)];
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    if first & 1 == 0 {
        say(&theirs, data);
        return talk(ours);
    }
    std::thread::scope(|threads| {
        let answering = threads.spawn(move || answer(&theirs, data));
        talk(ours);
        // The end of a scope does not wait for a thread's own memory, and the leak checker would see it.
        answering.join().expect("it does not panic");
    });
});

/// What the agent does with a QEMU.
fn talk(socket: UnixStream) {
    let Ok(mut qmp) = Qmp::over(socket, WITHIN) else { return };
    let _ = qmp.execute("query-status", serde_json::Value::Null, WITHIN);
    let _ = qmp.next_event(&["STOP", "RESUME"], WITHIN);
}

/// Negotiates as QEMU does, then answers the first command with the input: a `#` in it becomes the command's number.
fn answer(socket: &UnixStream, data: &[u8]) {
    let mut lines = BufReader::new(socket);
    let _ = (&*socket).write_all(GREETING);
    let Some(id) = next_id(&mut lines) else { return };
    let _ = writeln!(&*socket, "{{\"return\": {{}}, \"id\": {id}}}");
    let Some(id) = next_id(&mut lines) else { return };
    let parts = data.split(|byte| *byte == b'#').collect::<Vec<_>>();
    say(socket, &parts.join(id.to_string().as_bytes()));
}

fn next_id(lines: &mut BufReader<&UnixStream>) -> Option<u64> {
    let mut line = String::new();
    lines.read_line(&mut line).ok()?;
    serde_json::from_str::<serde_json::Value>(&line).ok()?["id"].as_u64()
}

fn say(mut socket: &UnixStream, bytes: &[u8]) {
    let _ = socket.write_all(bytes);
    let _ = socket.shutdown(Shutdown::Write);
}
