//! Locks on image files: QEMU's own, and marks of ours that only the same file can show to another host.
//!
//! Open file description locks (fcntl(2)): they belong to who opened the file, not to a process, so QEMU's, ours and
//! those of another agent in this process are told apart, and a file system of several hosts passes them on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Where QEMU's lock bytes begin: `RAW_LOCK_PERM_BASE`, block/file-posix.c.
const QEMU_FIRST: u64 = 100;
/// How many there are: `RAW_LOCK_SHARED_BASE` is 200, and a hundred follow.
const QEMU_BYTES: u64 = 200;
/// The lock byte of whoever writes: `RAW_LOCK_PERM_BASE` and the bit `BLK_PERM_WRITE`.
const QEMU_WRITES: u64 = 101;
/// Our marks are far beyond QEMU's bytes and what it may use one day, and what every file system can lock.
const MARK_MIN: u64 = 1 << 32;
/// See [`MARK_MIN`]; offsets of files are signed.
const MARK_MAX: u64 = 1 << 62;

/// A file that can be an image, opened to look at it and to lock it. Never written.
#[derive(Debug)]
pub(super) struct ImageFile {
    file: File,
    /// Bytes in it.
    pub(super) bytes: u64,
}

/// How far the QEMU of a VM has a file open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// It has not.
    Closed,
    /// Without a lock.
    Unlocked,
    /// It locked it to read.
    Reads,
    /// It locked it to write.
    Writes,
}

impl ImageFile {
    /// Opens it, or says why it cannot be an image.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let mut options = OpenOptions::new();
        // A pipe would wait for who writes into it.
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(|why| why.to_string())?;
        let known = file.metadata().map_err(|why| why.to_string())?;
        if known.file_type().is_block_device() {
            return Err("it is a block device, whose locks hold for one host only, so that nothing would keep two QEMUs \
                        from writing it; use a file on shared storage"
                .to_owned());
        }
        match known.is_file() {
            true => Ok(Self { file, bytes: known.len() }),
            false => Err("it is no file".to_owned()),
        }
    }

    /// Locks a random byte, for as long as the returned file is kept.
    pub(super) fn mark(self) -> io::Result<(u64, File)> {
        let mut random = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let mark = MARK_MIN + u64::from_le_bytes(random) % (MARK_MAX - MARK_MIN);
        let lock = lock_of(libc::F_RDLCK, mark, 1);
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock))?;
        Ok((mark, self.file))
    }

    /// Whether somebody has locked this byte, and it can be one of our marks.
    pub(super) fn shows(&self, mark: u64) -> io::Result<bool> {
        Ok((MARK_MIN..MARK_MAX).contains(&mark) && self.is_locked(mark, 1)?)
    }

    /// Whether any QEMU has it locked.
    pub(super) fn is_in_use(&self) -> io::Result<bool> {
        self.is_locked(QEMU_FIRST, QEMU_BYTES)
    }

    fn is_locked(&self, first: u64, bytes: u64) -> io::Result<bool> {
        let mut lock = lock_of(libc::F_WRLCK, first, bytes);
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
    }

    /// A digest of its content.
    pub(super) fn digest(&self) -> io::Result<Vec<u8>> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&self.file)?;
        Ok(hasher.finalize().as_bytes().to_vec())
    }

    /// The open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// What this QEMU does with it, as the kernel lists its locks (`lock:` in proc_pid_fdinfo(5)).
    pub(super) fn held_by(&self, pid: i32) -> io::Result<Held> {
        let ours = self.file.metadata()?;
        let mut held = Held::Closed;
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let same = fs::metadata(entry.path())
                .is_ok_and(|theirs| (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()));
            if !same {
                continue;
            }
            let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_string_lossy());
            let found = held_as(&fs::read_to_string(info).unwrap_or_default());
            held = if (found as u8) > (held as u8) { found } else { held };
        }
        Ok(held)
    }
}

/// Reads the lines `lock:  1: OFDLCK ADVISORY  READ -1 fe:00:123 100 101`.
fn held_as(fdinfo: &str) -> Held {
    let ranges = fdinfo.lines().filter(|line| line.starts_with("lock:")).filter_map(|line| {
        let mut fields = line.split_whitespace().rev();
        // A lock to the end of the file says EOF.
        let last = fields.next()?.parse().unwrap_or(u64::MAX);
        Some((fields.next()?.parse::<u64>().ok()?, last))
    });
    let qemus = ranges.filter(|(first, _)| (QEMU_FIRST..QEMU_FIRST + QEMU_BYTES).contains(first));
    qemus.fold(Held::Unlocked, |held, (first, last)| match held {
        Held::Writes => held,
        _ if (first..=last).contains(&QEMU_WRITES) => Held::Writes,
        _ => Held::Reads,
    })
}

fn lock_of(kind: libc::c_int, first: u64, bytes: u64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: first as libc::off_t,
        l_len: bytes as libc::off_t,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_shows_on_the_same_file_alone_and_as_long_as_it_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let [one, copy, link] = ["one", "copy", "link"].map(|name| folder.path().join(name));
        fs::write(&one, "x").unwrap();
        fs::copy(&one, &copy).unwrap();
        fs::hard_link(&one, &link).unwrap();
        let (mark, kept) = ImageFile::open(&one).unwrap().mark().unwrap();
        let shows = |path: &Path, mark| ImageFile::open(path).unwrap().shows(mark).unwrap();
        assert!(shows(&one, mark) && shows(&link, mark));
        assert!(!shows(&copy, mark) && !shows(&one, mark + 1));
        drop(kept);
        assert!(!shows(&one, mark));
        assert!(!ImageFile::open(&one).unwrap().is_in_use().unwrap());
    }

    #[test]
    fn what_is_locked_is_read_as_qemu_means_it() {
        let line =
            |range: &str| format!("flags:\t02100002\nlock:\t1: OFDLCK ADVISORY  READ -1 fe:00:7 {range}\n");
        assert_eq!(held_as("flags:\t0\n"), Held::Unlocked);
        assert_eq!(held_as(&line("100 101")), Held::Writes);
        assert_eq!(held_as(&format!("{}{}", line("101 101"), line("201 201"))), Held::Writes);
        assert_eq!(held_as(&line("100 100")), Held::Reads);
        assert_eq!(held_as(&line("0 EOF")), Held::Unlocked, "not QEMU's");
        assert_eq!(held_as(&line("x y")), Held::Unlocked);
    }

    #[test]
    fn what_is_no_file_is_no_image() {
        let folder = tempfile::tempdir().unwrap();
        let why = |path: &Path| ImageFile::open(path).unwrap_err();
        assert!(why(folder.path()).contains("no file"));
        assert!(why(&folder.path().join("missing")).contains("No such file"));
        assert!(why(Path::new("/dev/null")).contains("no file"));
    }
}
