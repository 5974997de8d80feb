//! What lies behind a region: which of its parts are anonymous, which belong to a file or memfd, and where that has data.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{SeekFrom, seek};

use crate::maps::{self, Map, Whose};
use crate::page::{PAGE, Region, Span};
use crate::process::{Process, ProcessError};

/// File system type of memfds, shared anonymous memory and tmpfs (`TMPFS_MAGIC` of linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// File system type of memory in huge pages (`HUGETLBFS_MAGIC` of linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// How QEMU aligns blocks of anonymous memory on this architecture (`QEMU_VMALLOC_ALIGN`).
const BLOCK_ALIGN: u64 = 2 << 20;

/// Why the mappings behind a region could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// The process could not be asked.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A part of the region is not mapped.
    #[error("nothing is mapped at {addr:#x} of process {pid}; the RAM layout has changed, read it again")]
    Unmapped {
        /// The process's pid.
        pid: i32,
        /// The first address without a mapping.
        addr: u64,
    },
    /// The region is empty, not whole pages, or wraps around.
    #[error("a region of {bytes} bytes at {base:#x} is not a range of whole pages")]
    Malformed {
        /// Its base.
        base: u64,
        /// Its length.
        bytes: u64,
    },
    /// The file behind a mapping could not be opened or asked.
    #[error("cannot use the file mapped at {addr:#x} of process {pid}; run as root or with CAP_SYS_ADMIN")]
    File {
        /// The process's pid.
        pid: i32,
        /// Address of the mapping.
        addr: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What kind of memory a part of a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Private, no file: plain `-m` RAM.
    Anonymous,
    /// A shared mapping of a file, memfd, or shared anonymous memory: `share=on`.
    Shared,
    /// A private mapping of a file or memfd: `share=off`.
    Private,
    /// A private mapping of pages that several VMs have in common ([`crate::shared`]): what it shows where the process has no page of its own
    /// never changes.
    Common,
}

/// A part of a region behind which there is one mapping.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) kind: Kind,
    /// Offset in the file of the byte at `start`.
    pub(crate) offset: u64,
    map: (u64, u64),
    dev: u64,
    inode: u64,
}

/// How a file is to be opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    ReadWrite,
}

/// Mappings of a process at one moment: with many of them, looking at each takes milliseconds.
pub(crate) struct Mappings {
    pid: i32,
    maps: Vec<Map>,
}

impl Mappings {
    /// Those of these regions.
    pub(crate) fn of(process: &Process, regions: &[Region]) -> Result<Self, BackingError> {
        let ranges = regions.iter().map(|region| region.base..region.base.saturating_add(region.bytes));
        Ok(Self { pid: process.pid(), maps: maps::within(process, ranges)? })
    }

    /// All that it has.
    pub(crate) fn all(process: &Process) -> Result<Self, BackingError> {
        Ok(Self { pid: process.pid(), maps: maps::all(process)? })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.maps.len()
    }

    /// Where QEMU has put a block of so many bytes, if there is one place only that it can be: an anonymous private mapping of just this length,
    /// aligned and with a page behind it that nobody may touch, as `qemu_ram_mmap` (util/mmap-alloc.c) makes them.
    pub(crate) fn lone_block(&self, bytes: u64, taken: &[Region]) -> Option<u64> {
        let fits = |pair: &&[Map]| {
            let (block, guard) = (&pair[0], &pair[1]);
            let (from, to) = block.address;
            let private = !block.shared && !guard.shared;
            let (read_write, nothing) = (maps::Rights::ReadWrite, maps::Rights::Nothing);
            to - from == bytes
                && from % BLOCK_ALIGN == 0
                && private
                && (block.rights, block.inode) == (read_write, 0)
                && (guard.rights, guard.address) == (nothing, (to, to + PAGE))
                && !taken.iter().any(|region| region.base < to && from < region.end())
        };
        let mut found = self.maps.windows(2).filter(fits);
        let place = found.next()?[0].address.0;
        found.next().is_none().then_some(place)
    }

    /// The segments of a region, ascending, without a gap.
    pub(crate) fn segments(&self, region: &Region) -> Result<Vec<Segment>, BackingError> {
        if !region.is_valid() {
            return Err(BackingError::Malformed { base: region.base, bytes: region.bytes });
        }
        let mut segments = Vec::new();
        let mut at = region.base;
        let first = self.maps.partition_point(|map| map.address.1 <= at);
        for map in &self.maps[first..] {
            let (from, to) = map.address;
            if from > at || at >= region.end() {
                break;
            }
            let (start, end) = (at, to.min(region.end()));
            let kind = match (map.inode, map.shared) {
                (0, false) => Kind::Anonymous,
                (_, true) => Kind::Shared,
                (_, false) if map.file == Whose::Common => Kind::Common,
                (_, false) => Kind::Private,
            };
            let offset = map.offset + (start - from);
            let (map, dev, inode) = (map.address, map.dev, map.inode);
            segments.push(Segment { start, end, kind, offset, map, dev, inode });
            at = end;
        }
        match at < region.end() {
            true => Err(BackingError::Unmapped { pid: self.pid, addr: at }),
            false => Ok(segments),
        }
    }
}

/// The segments of a region, ascending, without a gap.
pub(crate) fn segments(process: &Process, region: &Region) -> Result<Vec<Segment>, BackingError> {
    Mappings::of(process, std::slice::from_ref(region))?.segments(region)
}

impl Segment {
    /// Opens the file behind it: through the mapping itself, else through a descriptor of the process for the same file.
    pub(crate) fn open(&self, process: &Process, access: Access) -> Result<File, BackingError> {
        let pid = process.pid();
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::ReadWrite);
        let file = options.open(format!("/proc/{pid}/map_files/{:x}-{:x}", self.map.0, self.map.1));
        let file = file.or_else(|e| self.descriptor(pid).ok_or(e).and_then(|path| options.open(path)));
        if !process.is_alive() {
            return Err(process.gone().into());
        }
        file.map_err(|source| self.failed(process, source))
    }

    fn descriptor(&self, pid: i32) -> Option<std::path::PathBuf> {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        let same = |m: std::fs::Metadata| m.dev() == self.dev && m.ino() == self.inode;
        fds.flatten().map(|fd| fd.path()).find(|path| std::fs::metadata(path).is_ok_and(same))
    }

    /// Calls `found(start, end)` with the addresses of each stretch of `within` that has data in the file, ascending, in whole
    /// pages.
    pub(crate) fn data(
        &self,
        process: &Process,
        file: &File,
        within: Range<u64>,
        mut found: impl FnMut(u64, u64),
    ) -> Result<(), BackingError> {
        let end = self.offset + (within.end - self.start);
        let mut at = self.offset + (within.start - self.start);
        while at < end {
            let from = match seek(file, SeekFrom::Data(at)) {
                Ok(from) => from,
                Err(rustix::io::Errno::NXIO) => break,
                // A file system that cannot tell: all of it may be data.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => at,
                Err(e) => return Err(self.failed(process, e.into())),
            };
            let to = match seek(file, SeekFrom::Hole(from)) {
                Ok(to) if to > from => to,
                _ => end,
            };
            let (from, to) = (from / PAGE * PAGE, to.next_multiple_of(PAGE).min(end));
            let from = from.max(at);
            if from < to {
                found(self.start + (from - self.offset), self.start + (to - self.offset));
            }
            at = to.max(at + PAGE);
        }
        Ok(())
    }

    /// Its addresses.
    pub(crate) fn span(&self) -> Span {
        Span { addr: self.start, len: self.end - self.start }
    }

    /// Whether `UFFDIO_COPY` can fill a mapping of this file: tmpfs and memfds only (`fs/userfaultfd.c`).
    pub(crate) fn fillable(&self, file: &File) -> bool {
        rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC)
    }

    /// Whether the file can be written with `pwrite(2)`: huge pages of hugetlbfs only through a mapping.
    pub(crate) fn storable(&self, file: &File) -> bool {
        rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type != HUGETLBFS_MAGIC)
    }

    /// The size of the pages behind it, if they are huge ones of hugetlbfs.
    pub(crate) fn huge_page_bytes(&self, file: &File) -> Option<u64> {
        let fs = rustix::fs::fstatfs(file).ok().filter(|fs| fs.f_type == HUGETLBFS_MAGIC)?;
        u64::try_from(fs.f_bsize).ok().filter(|bytes| bytes.is_power_of_two())
    }

    /// Addresses of the mapping that the segment is a part of.
    pub(crate) fn mapping(&self) -> (u64, u64) {
        self.map
    }

    pub(crate) fn failed(&self, process: &Process, source: io::Error) -> BackingError {
        BackingError::File { pid: process.pid(), addr: self.start, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mappings(text: &str) -> Mappings {
        Mappings { pid: 1, maps: maps::parse(text.as_bytes()).unwrap() }
    }

    /// As QEMU 7.2 has them: main memory, video memory, both with their guards; a thread's stack; what a library has mapped.
    const QEMU: &str = "7f0000000000-7f0020000000 rw-p 00000000 00:00 0 \n\
                        7f0020000000-7f0020001000 ---p 00000000 00:00 0 \n\
                        7f0021000000-7f0022000000 rw-p 00000000 00:00 0 \n\
                        7f0022000000-7f0022001000 ---p 00000000 00:00 0 \n\
                        7f0023000000-7f0023800000 rw-p 00000000 00:00 0 \n\
                        7f0024000000-7f0025000000 rw-s 00000000 00:01 7 /memfd:other (deleted)\n\
                        7f0025000000-7f0025001000 ---p 00000000 00:00 0 \n";

    #[test]
    fn a_block_is_found_where_it_alone_can_be() {
        let all = mappings(QEMU);
        assert_eq!(all.lone_block(16 << 20, &[]), Some(0x7f00_2100_0000));
        assert_eq!(all.lone_block(512 << 20, &[]), Some(0x7f00_0000_0000));
        assert_eq!(all.lone_block(8 << 20, &[]), None, "nothing is behind it");
        assert_eq!(all.lone_block(4 << 20, &[]), None, "none is of this length");
        let taken = Region { base: 0x7f00_21f0_0000, bytes: 0x10_0000 };
        assert_eq!(all.lone_block(16 << 20, &[taken]), None, "it is another block's");
        let second = "7f0031000000-7f0032000000 rw-p 00000000 00:00 0 \n7f0032000000-7f0032001000 ---p 00000000 00:00 0 \n";
        let two = mappings(&format!("{QEMU}{second}"));
        assert_eq!(two.lone_block(16 << 20, &[]), None, "who knows which");
        let crooked = mappings(
            &QEMU
                .replace("7f0021000000-7f0022000000", "7f0021001000-7f0022001000")
                .replace("7f0022000000-7f0022001000", "7f0022001000-7f0022002000"),
        );
        assert_eq!(crooked.lone_block(16 << 20, &[]), None, "QEMU aligns what it maps");
    }
}
