//! Copying memory of another process, in batches: `process_vm_readv(2)` and `process_vm_writev(2)`.

use std::io::{self, IoSlice, IoSliceMut};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use crate::page::Span;
use crate::process::Process;

/// Bytes per system call: large enough that its cost vanishes, small enough to stay in the cache on its way to the wire.
const BATCH: usize = 1 << 20;

/// Remote spans per system call (`IOV_MAX`, `UIO_MAXIOV` of linux/uio.h).
const SPANS_PER_CALL: usize = 1024;

/// Why bytes could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The process has ended.
    #[error("process {pid} has ended")]
    Gone {
        /// The process's pid.
        pid: i32,
    },
    /// An address could not be read or written.
    #[error("cannot copy at {addr:#x} of process {pid}; is its RAM layout still the same?")]
    Fault {
        /// The process's pid.
        pid: i32,
        /// The first address that was not copied.
        addr: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The buffer is not as long as the spans together.
    #[error("the buffer has {buffer} bytes, the spans {spans}; give a buffer of just that length")]
    Length {
        /// Bytes of the buffer.
        buffer: usize,
        /// Bytes of all spans.
        spans: u64,
    },
}

/// Reads another process's memory. Several threads may use one at once.
#[derive(Debug)]
pub struct Reader {
    process: Process,
}

impl Reader {
    /// For this process.
    pub fn new(process: &Process) -> Result<Reader, crate::ProcessError> {
        Ok(Reader { process: process.try_clone()? })
    }

    /// Fills the buffer with the bytes of the spans, one after the other.
    ///
    /// Give no holes: reading them allocates memory in the target, see [`crate::populated`].
    pub fn read(&self, runs: &[Span], buf: &mut [u8]) -> Result<(), CopyError> {
        let pid = Pid::from_raw(self.process.pid());
        transfer(&self.process, runs, buf.len(), |from, spans| {
            let part = &mut buf[from..from + total(spans)];
            process_vm_readv(pid, &mut [IoSliceMut::new(part)], spans)
        })?;
        // Alive after all: so the pid was its own all the time.
        check_alive(&self.process)
    }
}

/// Looks at the spans, whatever they hold.
pub(crate) fn touch(process: &Process, spans: &[Span]) -> Result<(), CopyError> {
    let reader = Process::try_clone(process).map(|process| Reader { process });
    let reader = reader.map_err(|_| CopyError::Gone { pid: process.pid() })?;
    let mut seen = vec![0; SPANS_PER_CALL];
    spans.chunks(SPANS_PER_CALL).try_for_each(|spans| {
        let bytes: u64 = spans.iter().map(|span| span.len).sum();
        seen.resize(bytes as usize, 0);
        reader.read(spans, &mut seen)
    })
}

/// Writes the bytes to the spans, one after the other.
pub(crate) fn write(process: &Process, spans: &[Span], bytes: &[u8]) -> Result<(), CopyError> {
    let pid = Pid::from_raw(process.pid());
    transfer(process, spans, bytes.len(), |from, spans| {
        check_alive(process).map_err(|_| Errno::ESRCH)?;
        process_vm_writev(pid, &[IoSlice::new(&bytes[from..from + total(spans)])], spans)
    })
}

fn check_alive(process: &Process) -> Result<(), CopyError> {
    if process.is_alive() { Ok(()) } else { Err(CopyError::Gone { pid: process.pid() }) }
}

fn total(spans: &[RemoteIoVec]) -> usize {
    spans.iter().map(|s| s.len).sum()
}

/// Cuts the spans into batches and goes on where a call stopped early. `call` gets the offset in the buffer and the spans.
fn transfer(
    process: &Process,
    spans: &[Span],
    buffer: usize,
    mut call: impl FnMut(usize, &[RemoteIoVec]) -> nix::Result<usize>,
) -> Result<(), CopyError> {
    let sum = spans.iter().fold(0u64, |sum, s| sum.saturating_add(s.len));
    if sum != buffer as u64 {
        return Err(CopyError::Length { buffer, spans: sum });
    }
    let mut cursor = Cursor { spans, index: 0, inside: 0 };
    let (mut done, mut batch) = (0, Vec::with_capacity(SPANS_PER_CALL.min(spans.len())));
    while done < buffer {
        cursor.fill(&mut batch);
        match call(done, &batch) {
            Ok(n) if n > 0 => {
                done += n;
                cursor.advance(n as u64);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::ESRCH) => return Err(CopyError::Gone { pid: process.pid() }),
            result => {
                let source = result.err().unwrap_or(Errno::EFAULT).into();
                return Err(CopyError::Fault { pid: process.pid(), addr: cursor.addr(), source });
            }
        }
    }
    Ok(())
}

struct Cursor<'a> {
    spans: &'a [Span],
    index: usize,
    inside: u64,
}

impl Cursor<'_> {
    fn addr(&self) -> u64 {
        self.spans.get(self.index).map_or(0, |s| s.addr.saturating_add(self.inside))
    }

    fn fill(&self, batch: &mut Vec<RemoteIoVec>) {
        batch.clear();
        let (mut room, mut inside) = (BATCH as u64, self.inside);
        for span in &self.spans[self.index..] {
            let len = (span.len - inside).min(room);
            if len > 0 {
                batch
                    .push(RemoteIoVec { base: span.addr.saturating_add(inside) as usize, len: len as usize });
            }
            room -= len;
            inside = 0;
            if room == 0 || batch.len() == SPANS_PER_CALL {
                break;
            }
        }
    }

    fn advance(&mut self, mut bytes: u64) {
        while let Some(span) = self.spans.get(self.index) {
            let left = span.len - self.inside;
            if bytes < left {
                self.inside += bytes;
                return;
            }
            bytes -= left;
            self.inside = 0;
            self.index += 1;
            if bytes == 0 {
                return;
            }
        }
    }
}
