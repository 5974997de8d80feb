//! The journal: one small file per VM, preallocated, so that the commit costs one overwrite that goes through to the disk.
//!
//! A file holds two slots of 512 bytes (a disk sector is written whole or not at all). A store writes the slot that is
//! not the latest, with the next sequence number and a digest. A slot that is neither empty nor whole makes the file
//! *damaged*: the slot beside it may be older than what was lost, and an older record must not decide who owns a VM.

use rustix::fs::{Advice, OFlags, fadvise};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use sterna_engine::handoff::{Activity, Generation, Journal, JournalError, MigrationId, Record, Step};

const SLOT_BYTES: usize = 512;
/// Digest bytes that guard a slot against torn writes.
const DIGEST_BYTES: usize = 16;
/// Longest name of a VM or host, so that a record fits its slot.
const NAME_BYTES_MAX: usize = 128;

/// How the name of a file ends that is being made.
const UNFINISHED: &str = ".unfinished";

/// What is on disk about a VM.
#[derive(Debug, PartialEq)]
pub(crate) enum Found {
    /// No migration of it was ever written down, or the file is gone.
    Nothing,
    Whole(Record),
    Damaged(Damage),
}

/// A file that is not what was written to it.
#[derive(Debug, PartialEq)]
pub(crate) struct Damage {
    /// What is wrong, with the file's name.
    pub(crate) why: String,
    /// What can be read. It may be older than what cannot.
    pub(crate) survivor: Option<Record>,
}

enum Slot {
    /// Never written.
    Empty,
    Whole {
        sequence: u64,
        record: Record,
    },
    Damaged,
}

/// The records of one host.
#[derive(Debug)]
pub(crate) struct FileJournal {
    folder: PathBuf,
}

impl FileJournal {
    pub(crate) fn open(folder: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir_all(&folder)?;
        crate::registry::remove_unfinished(&folder, UNFINISHED);
        File::open(&folder)?.sync_all()?;
        Ok(Self { folder })
    }

    /// VMs that have a record.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| {
                entry.file_name().into_string().ok()?.strip_suffix(".record").map(str::to_owned)
            })
            .collect();
        names.sort();
        names
    }

    /// Makes the VM's file, so that a later store finds it allocated and its name on disk. It appears with its slots: a
    /// file that is shorter was cut.
    pub(crate) fn prepare(&self, vm: &str) -> std::io::Result<()> {
        let path = self.path(vm);
        if path.exists() {
            return Ok(());
        }
        let fresh = self.folder.join(format!("{vm}{UNFINISHED}"));
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all_at(&[0; 2 * SLOT_BYTES], 0)?;
        file.sync_all()?;
        std::fs::rename(fresh, path)?;
        File::open(&self.folder)?.sync_all()
    }

    /// What is on disk about a VM, also when it is not as it should be.
    pub(crate) fn look(&self, vm: &str) -> Found {
        let path = self.path(vm);
        let damaged = |why: String, survivor| {
            Found::Damaged(Damage { why: format!("{}: {why}", path.display()), survivor })
        };
        let slots = match File::open(&path).map(|file| read_slots(&file)) {
            Ok(Ok(slots)) => slots,
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => return Found::Nothing,
            Ok(Err(why)) | Err(why) => return damaged(why.to_string(), None),
        };
        match newest(&slots).map(|(.., record)| record.clone()) {
            Some(record) if record.vm != vm => damaged(format!("it is the record of VM {}", record.vm), None),
            survivor if slots.iter().any(|slot| matches!(slot, Slot::Damaged)) => {
                damaged("a part of it is not what was written".into(), survivor)
            }
            Some(record) => Found::Whole(record),
            None => Found::Nothing,
        }
    }

    fn path(&self, vm: &str) -> PathBuf {
        self.folder.join(format!("{vm}.record"))
    }

    fn write(&self, record: &Record) -> std::io::Result<()> {
        self.prepare(&record.vm)?;
        let file = OpenOptions::new().read(true).write(true).open(self.path(&record.vm))?;
        let slots = read_slots(&file)?;
        let (sequence, slot) = newest(&slots).map_or((1, 0), |(sequence, slot, _)| (sequence + 1, 1 - slot));
        let text = encode(record, sequence).ok_or_else(|| std::io::Error::other("the names are too long"))?;
        let at = (slot * SLOT_BYTES) as u64;
        // The VM stands still meanwhile.
        if record.step == Step::Committed && newest(&slots).is_some() {
            match self.write_through(&record.vm, &text, at) {
                // Soon the next record is stored, which looks at both slots first: they are not in the page cache any more.
                Ok(()) => {
                    let _ = fadvise(&file, 0, None, Advice::WillNeed);
                    return Ok(());
                }
                Err(why) => tracing::debug!(vm = record.vm, %why, "the commit goes by the page cache"),
            }
        }
        file.write_all_at(&text, at)?;
        if newest(&slots).is_none() && !matches!(slots[1], Slot::Empty) {
            // Nothing that can be read is lost, and the file is whole again.
            file.write_all_at(&[0; SLOT_BYTES], SLOT_BYTES as u64)?;
        }
        if record.step.must_be_durable() { file.sync_data() } else { Ok(()) }
    }

    /// Writes a slot to the disk in one system call, past the page cache (O_DIRECT and O_DSYNC, open(2)): three quarters of the time of a
    /// write and an `fdatasync`. Not every file system can, nor every disk in units of a slot.
    fn write_through(&self, vm: &str, slot: &[u8; SLOT_BYTES], at: u64) -> std::io::Result<()> {
        let flags = OFlags::DIRECT | OFlags::DSYNC;
        let file =
            OpenOptions::new().write(true).custom_flags(flags.bits().cast_signed()).open(self.path(vm))?;
        let mut space = [0; 2 * SLOT_BYTES];
        let from = space.as_ptr().align_offset(SLOT_BYTES);
        let aligned = space.get_mut(from..from + SLOT_BYTES).ok_or(std::io::ErrorKind::Unsupported)?;
        aligned.copy_from_slice(slot);
        file.write_all_at(aligned, at)
    }
}

impl Journal for FileJournal {
    fn store(&mut self, record: &Record) -> Result<(), JournalError> {
        self.write(record).map_err(|why| failed(&record.vm, "stored", &self.path(&record.vm), &why))
    }

    fn load(&self, vm: &str) -> Result<Option<Record>, JournalError> {
        match self.look(vm) {
            Found::Nothing => Ok(None),
            Found::Whole(record) => Ok(Some(record)),
            Found::Damaged(Damage { why, .. }) => Err(JournalError { vm: vm.into(), what: "read", why }),
        }
    }
}

fn failed(vm: &str, what: &'static str, path: &Path, why: &std::io::Error) -> JournalError {
    JournalError { vm: vm.into(), what, why: format!("{}: {why}", path.display()) }
}

fn read_slots(file: &File) -> std::io::Result<[Slot; 2]> {
    let read = |slot: usize| {
        let mut raw = [0; SLOT_BYTES];
        match file.read_exact_at(&mut raw, (slot * SLOT_BYTES) as u64) {
            Ok(()) if raw == [0; SLOT_BYTES] => Ok(Slot::Empty),
            Ok(()) => {
                Ok(decode(&raw).map_or(Slot::Damaged, |(sequence, record)| Slot::Whole { sequence, record }))
            }
            Err(why) if why.kind() == std::io::ErrorKind::UnexpectedEof => Ok(Slot::Damaged),
            Err(why) => Err(why),
        }
    };
    Ok([read(0)?, read(1)?])
}

/// The whole slot with the highest sequence number: (sequence, slot, record).
fn newest(slots: &[Slot; 2]) -> Option<(u64, usize, &Record)> {
    let whole = slots.iter().enumerate().filter_map(|(at, slot)| match slot {
        Slot::Whole { sequence, record } => Some((*sequence, at, record)),
        _ => None,
    });
    whole.max_by_key(|(sequence, ..)| *sequence)
}

fn encode(record: &Record, sequence: u64) -> Option<[u8; SLOT_BYTES]> {
    if record.vm.len() > NAME_BYTES_MAX || record.peer.len() > NAME_BYTES_MAX {
        return None;
    }
    let Record { id, generation, vm, peer, step, activity } = record;
    let (generation, step, activity) = (generation.0, step.word(), activity.word());
    let text = format!("sterna 1\n{sequence}\n{id}\n{generation}\n{step}\n{vm}\n{peer}\n{activity}\n");
    let mut raw = [0; SLOT_BYTES];
    raw[DIGEST_BYTES..DIGEST_BYTES + text.len()].copy_from_slice(text.as_bytes());
    let digest = blake3::hash(&raw[DIGEST_BYTES..]);
    raw[..DIGEST_BYTES].copy_from_slice(&digest.as_bytes()[..DIGEST_BYTES]);
    Some(raw)
}

fn decode(raw: &[u8; SLOT_BYTES]) -> Option<(u64, Record)> {
    let digest = blake3::hash(&raw[DIGEST_BYTES..]);
    if digest.as_bytes()[..DIGEST_BYTES] != raw[..DIGEST_BYTES] {
        return None;
    }
    let text = std::str::from_utf8(&raw[DIGEST_BYTES..]).ok()?;
    let mut lines = text.split('\n');
    if lines.next()? != "sterna 1" {
        return None;
    }
    let sequence = lines.next()?.parse().ok()?;
    let id: MigrationId = lines.next()?.parse().ok()?;
    let generation = Generation(lines.next()?.parse().ok()?);
    let step = Step::from_word(lines.next()?)?;
    let (vm, peer) = (lines.next()?.to_owned(), lines.next()?.to_owned());
    let activity = lines.next().and_then(Activity::from_word).unwrap_or_default();
    Some((sequence, Record { id, generation, vm, peer, step, activity }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(generation: u64, step: Step) -> Record {
        let id = MigrationId([7; 16]);
        let (generation, activity) = (Generation(generation), Activity::Paused);
        Record { id, generation, vm: "db".into(), peer: "b".into(), step, activity }
    }

    #[test]
    fn the_latest_record_comes_back_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = FileJournal::open(folder.path().join("records")).unwrap();
        assert_eq!(journal.load("db").unwrap(), None);
        for (generation, step) in
            [(1, Step::Incoming), (1, Step::Committed), (1, Step::Running), (2, Step::Sending)]
        {
            journal.store(&record(generation, step)).unwrap();
            let again = FileJournal::open(folder.path().join("records")).unwrap();
            assert_eq!(again.load("db").unwrap(), Some(record(generation, step)));
        }
        assert_eq!(journal.names(), ["db"]);
    }

    /// What is done to a file, in words and in deed.
    type Damaging = (&'static str, fn(&File));

    /// A damaged file was read as the older of its two records: a source whose `released` was torn read `sending`, which
    /// says that the VM may be resumed.
    #[test]
    fn an_older_record_does_not_stand_in_for_a_damaged_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = FileJournal::open(folder.path().into()).unwrap();
        let path = folder.path().join("db.record");
        let damage: [Damaging; 6] = [
            ("the newer slot is torn", |file| file.write_all_at(b"torn", SLOT_BYTES as u64 + 100).unwrap()),
            ("the older slot is torn", |file| file.write_all_at(b"torn", 100).unwrap()),
            ("both are torn", |file| {
                file.write_all_at(b"torn", 100).unwrap();
                file.write_all_at(b"torn", SLOT_BYTES as u64 + 100).unwrap();
            }),
            ("the file is cut", |file| file.set_len(700).unwrap()),
            ("the file is empty", |file| file.set_len(0).unwrap()),
            ("the record is another VM's", |file| {
                let other = Record { vm: "web".into(), ..record(9, Step::Running) };
                file.write_all_at(&encode(&other, 9).unwrap(), 0).unwrap();
            }),
        ];
        for (what, damage) in damage {
            for next in [Step::Committed, Step::Kept] {
                drop(std::fs::remove_file(&path));
                journal.store(&record(1, Step::Sending)).unwrap();
                journal.store(&record(1, Step::Released)).unwrap();
                damage(&OpenOptions::new().write(true).open(&path).unwrap());
                let why = journal.load("db").expect_err(what).to_string();
                assert!(why.contains("db.record"), "{what}: {why}");
                // The next store is a whole record again.
                journal.store(&record(2, next)).unwrap();
                assert_eq!(journal.load("db").unwrap(), Some(record(2, next)), "{what}");
            }
        }
    }

    #[test]
    fn a_folder_in_the_place_of_a_record_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = FileJournal::open(folder.path().into()).unwrap();
        std::fs::create_dir(folder.path().join("db.record")).unwrap();
        assert!(matches!(journal.look("db"), Found::Damaged(Damage { survivor: None, .. })));
        assert!(journal.store(&record(1, Step::Sending)).is_err());
    }

    #[test]
    fn a_name_that_does_not_fit_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = FileJournal::open(folder.path().into()).unwrap();
        let long = Record { peer: "x".repeat(NAME_BYTES_MAX + 1), ..record(1, Step::Sending) };
        assert!(journal.store(&long).is_err());
    }
}
