//! The journal: one small file per VM, preallocated, so that the commit costs one overwrite and one `fdatasync`.
//!
//! A file holds two slots of 512 bytes (a disk sector is written whole or not at all). A store writes the slot that is
//! not the latest, with the next sequence number and a digest; a torn write leaves the other slot as it was.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use sterna_engine::handoff::{Activity, Generation, Journal, JournalError, MigrationId, Record, Step};

const SLOT_BYTES: usize = 512;
/// Digest bytes that guard a slot against torn writes.
const DIGEST_BYTES: usize = 16;
/// Longest name of a VM or host, so that a record fits its slot.
const NAME_BYTES_MAX: usize = 128;

/// The records of one host.
#[derive(Debug)]
pub(crate) struct FileJournal {
    folder: PathBuf,
}

impl FileJournal {
    pub(crate) fn open(folder: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir_all(&folder)?;
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

    /// Makes the VM's file, so that a later store finds it allocated and its name on disk.
    pub(crate) fn prepare(&self, vm: &str) -> std::io::Result<()> {
        let path = self.path(vm);
        if path.exists() {
            return Ok(());
        }
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        file.write_all_at(&[0; 2 * SLOT_BYTES], 0)?;
        file.sync_all()?;
        File::open(&self.folder)?.sync_all()
    }

    fn path(&self, vm: &str) -> PathBuf {
        self.folder.join(format!("{vm}.record"))
    }

    fn write(&self, record: &Record) -> std::io::Result<()> {
        self.prepare(&record.vm)?;
        let file = OpenOptions::new().read(true).write(true).open(self.path(&record.vm))?;
        let (sequence, slot) = match latest(&file)? {
            Some((sequence, slot, _)) => (sequence + 1, 1 - slot),
            None => (1, 0),
        };
        let text = encode(record, sequence).ok_or_else(|| std::io::Error::other("the names are too long"))?;
        file.write_all_at(&text, (slot * SLOT_BYTES) as u64)?;
        if record.step.must_be_durable() { file.sync_data() } else { Ok(()) }
    }
}

impl Journal for FileJournal {
    fn store(&mut self, record: &Record) -> Result<(), JournalError> {
        self.write(record).map_err(|why| failed(&record.vm, "stored", &self.path(&record.vm), &why))
    }

    fn load(&self, vm: &str) -> Result<Option<Record>, JournalError> {
        let path = self.path(vm);
        let read = match File::open(&path) {
            Ok(file) => latest(&file),
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(why) => Err(why),
        };
        let found = read.map_err(|why| failed(vm, "read", &path, &why))?;
        Ok(found.map(|(_, _, record)| record).filter(|record| record.vm == vm))
    }
}

fn failed(vm: &str, what: &'static str, path: &Path, why: &std::io::Error) -> JournalError {
    JournalError { vm: vm.into(), what, why: format!("{}: {why}", path.display()) }
}

/// The valid slot with the highest sequence number: (sequence, slot, record).
fn latest(file: &File) -> std::io::Result<Option<(u64, usize, Record)>> {
    let mut found: Option<(u64, usize, Record)> = None;
    for slot in 0..2 {
        let mut raw = [0; SLOT_BYTES];
        match file.read_exact_at(&mut raw, (slot * SLOT_BYTES) as u64) {
            Ok(()) => {}
            Err(why) if why.kind() == std::io::ErrorKind::UnexpectedEof => continue,
            Err(why) => return Err(why),
        }
        if let Some((sequence, record)) = decode(&raw)
            && found.as_ref().is_none_or(|(best, ..)| sequence > *best)
        {
            found = Some((sequence, slot, record));
        }
    }
    Ok(found)
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
    let activity = Activity::from_word(lines.next()?)?;
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

    #[test]
    fn a_torn_write_leaves_the_record_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = FileJournal::open(folder.path().into()).unwrap();
        journal.store(&record(1, Step::Incoming)).unwrap();
        journal.store(&record(1, Step::Committed)).unwrap();
        let file = OpenOptions::new().write(true).open(folder.path().join("db.record")).unwrap();
        file.write_all_at(b"torn", SLOT_BYTES as u64 + 100).unwrap();
        assert_eq!(journal.load("db").unwrap(), Some(record(1, Step::Incoming)));
        file.set_len(700).unwrap();
        assert_eq!(journal.load("db").unwrap(), Some(record(1, Step::Incoming)));
        file.set_len(0).unwrap();
        assert_eq!(journal.load("db").unwrap(), None);
    }

    #[test]
    fn a_name_that_does_not_fit_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = FileJournal::open(folder.path().into()).unwrap();
        let long = Record { peer: "x".repeat(NAME_BYTES_MAX + 1), ..record(1, Step::Sending) };
        assert!(journal.store(&long).is_err());
    }
}
