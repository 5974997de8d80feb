//! Copying memory of another process, in batches: `process_vm_readv(2)` and `process_vm_writev(2)`.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use crate::backing::{Access, BackingError, Kind, Mappings};
use crate::page::{Region, Span};
use crate::process::Process;
use crate::shared::may_merge;

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
    /// Where pages are to stay shared.
    mem: Option<File>,
    /// What is read by its file, ascending.
    in_files: Vec<InFile>,
}

/// Shared memory in huge pages of hugetlbfs.
#[derive(Debug)]
struct InFile {
    start: u64,
    end: u64,
    /// Offset in the file of the byte at `start`.
    offset: u64,
    file: File,
}

impl Reader {
    /// For this process; gently, if the kernel merges its pages with others.
    pub fn new(process: &Process) -> Result<Reader, crate::ProcessError> {
        if may_merge(process) {
            return Reader::gentle(process);
        }
        Ok(Reader { process: process.try_clone()?, mem: None, in_files: Vec::new() })
    }

    /// For these regions of a process that runs. Shared huge pages are read by their file, where a hole reads as zeros and stays one. To
    /// read it in the process would make a page there, which a tracker that had seen the page before takes for the same one: its
    /// entry is still marked, so that it looks as if nobody had written it.
    ///
    /// # Errors
    /// The mappings cannot be read, or a file cannot be opened.
    pub fn of(process: &Process, regions: &[Region]) -> Result<Reader, BackingError> {
        let mut reader = Reader::new(process)?;
        let mappings = Mappings::of(process, regions)?;
        for region in regions {
            for segment in
                mappings.segments(region)?.into_iter().filter(|segment| segment.kind == Kind::Shared)
            {
                let file = segment.open(process, Access::Read)?;
                if segment.huge_page_bytes(&file).is_some() {
                    let (start, end, offset) = (segment.start, segment.end, segment.offset);
                    reader.in_files.push(InFile { start, end, offset, file });
                }
            }
        }
        reader.in_files.sort_unstable_by_key(|part| part.start);
        Ok(reader)
    }

    /// One that leaves pages shared. `process_vm_readv(2)` pins what it reads, and what is pinned must be the process's own: the kernel gives
    /// it a copy of each page that it shares with others, be it merged by KSM or after a fork(2) (`gup_must_unshare`, mm/gup.c), which
    /// looks like a write too. `/proc/PID/mem` pins nothing; it takes up to twice as long.
    pub fn gentle(process: &Process) -> Result<Reader, crate::ProcessError> {
        let mem = Some(process.open_proc("mem")?);
        Ok(Reader { process: process.try_clone()?, mem, in_files: Vec::new() })
    }

    /// Fills the buffer with the bytes of the spans, one after the other.
    ///
    /// Give no holes: reading them allocates memory in the target, see [`crate::populated`].
    pub fn read(&self, runs: &[Span], buf: &mut [u8]) -> Result<(), CopyError> {
        if self.in_files.is_empty() {
            return self.read_in_process(runs, buf);
        }
        let spans = length(runs);
        if spans != buf.len() as u64 {
            return Err(CopyError::Length { buffer: buf.len(), spans });
        }
        let mut rest = buf;
        for runs in runs.chunk_by(|one, next| self.in_file(one) == self.in_file(next)) {
            let (part, after) = rest.split_at_mut(length(runs) as usize);
            rest = after;
            match self.in_file(&runs[0]).map(|at| &self.in_files[at]) {
                Some(of) => self.read_by(&of.file, |addr| of.offset + (addr - of.start), runs, part)?,
                None => self.read_in_process(runs, part)?,
            }
        }
        Ok(())
    }

    /// Which file has all of a span.
    fn in_file(&self, span: &Span) -> Option<usize> {
        let at = self.in_files.partition_point(|part| part.end <= span.addr);
        self.in_files.get(at).filter(|part| part.start <= span.addr && span.addr + span.len <= part.end)?;
        Some(at)
    }

    fn read_in_process(&self, runs: &[Span], buf: &mut [u8]) -> Result<(), CopyError> {
        if let Some(mem) = &self.mem {
            return self.read_by(mem, |addr| addr, runs, buf);
        }
        let pid = Pid::from_raw(self.process.pid());
        transfer(&self.process, runs, buf.len(), |from, spans| {
            let part = &mut buf[from..from + total(spans)];
            process_vm_readv(pid, &mut [IoSliceMut::new(part)], spans)
        })?;
        // Alive after all: so the pid was its own all the time.
        check_alive(&self.process)
    }
}

impl Reader {
    /// Fills the buffer from a file in which an address has a place.
    fn read_by(
        &self,
        file: &File,
        place: impl Fn(u64) -> u64,
        spans: &[Span],
        buf: &mut [u8],
    ) -> Result<(), CopyError> {
        let sum = length(spans);
        if sum != buf.len() as u64 {
            return Err(CopyError::Length { buffer: buf.len(), spans: sum });
        }
        let mut rest = buf;
        for span in spans {
            let (part, after) = rest.split_at_mut(span.len as usize);
            rest = after;
            if let Err(source) = file.read_exact_at(part, place(span.addr)) {
                check_alive(&self.process)?;
                return Err(CopyError::Fault { pid: self.process.pid(), addr: span.addr, source });
            }
        }
        // It is the process that was opened, whatever has its number now; a dead one reads as nothing.
        check_alive(&self.process)
    }
}

/// Looks at the spans, whatever they hold.
pub(crate) fn touch(process: &Process, spans: &[Span]) -> Result<(), CopyError> {
    let reader =
        Process::try_clone(process).map(|process| Reader { process, mem: None, in_files: Vec::new() });
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

fn length(spans: &[Span]) -> u64 {
    spans.iter().fold(0, |sum, span| sum.saturating_add(span.len))
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
    let sum = length(spans);
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
