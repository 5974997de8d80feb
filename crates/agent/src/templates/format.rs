//! A template as two files: what it is, and its pages.
//!
//! `manifest.json` names everything but the content; the BLAKE3 digest of its bytes is the template's own, and covers the pages by the digest
//! that it has of them. `pages` holds, one after the other: the pages of each block that are not zero, in ascending order; the device
//! state; and which pages those were, as runs of two little-endian numbers of 64 bits, the first page and how many.

use super::disks::StoredDisk;
use crate::control::explain;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use sterna_engine::wire::batch;
use sterna_engine::wire::control::STATE_BYTES_MAX;
use sterna_engine::wire::message::{Block, Offer};
use sterna_memory::{PAGE, PageRun, SealedMemory};

/// Bytes of a run in the file.
const RUN_BYTES: u64 = 16;
/// Bytes that are read at once.
const PIECE_BYTES: usize = 1 << 20;

/// What a template is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    /// The command line of the VM that it was made of, in the user's words; `{vm}` in it stands for the name of a clone.
    pub(crate) argv: Vec<String>,
    /// What that VM's QEMU resolved its machine type and processor to.
    pub(crate) machine: String,
    pub(crate) cpu: String,
    /// Its version.
    pub(crate) qemu: String,
    pub(crate) fingerprint: Vec<String>,
    pub(crate) blocks: Vec<StoredBlock>,
    /// The place of the block that clones map copy-on-write: main memory.
    pub(crate) main: usize,
    /// Bytes of device state.
    pub(crate) state_bytes: u64,
    /// Bytes of the file of pages, and its BLAKE3 digest in hexadecimal.
    pub(crate) bytes: u64,
    pub(crate) pages_digest: String,
    /// Disks that each clone has for itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) disks: Vec<StoredDisk>,
}

/// A block of RAM of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredBlock {
    pub(crate) name: String,
    /// Its length.
    pub(crate) bytes: u64,
    /// Whether its content is here at all: QEMU makes some blocks anew.
    pub(crate) travels: bool,
    /// How many pages are stored, in how many runs.
    pub(crate) pages: u64,
    pub(crate) runs: u64,
}

impl Manifest {
    /// As it is stored and sent, with its digest in hexadecimal.
    pub(crate) fn encode(&self) -> (Vec<u8>, String) {
        let bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        let digest = blake3::hash(&bytes).to_hex().to_string();
        (bytes, digest)
    }

    /// Reads one that may be anybody's.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|why| explain(&why))?;
        manifest.check().ok_or("its parts do not add up")?;
        Ok(manifest)
    }

    fn check(&self) -> Option<()> {
        let hex = self.pages_digest.len() == 64 && self.pages_digest.bytes().all(|c| c.is_ascii_hexdigit());
        let known = self.blocks.len() <= batch::BLOCKS_MAX && self.main < self.blocks.len();
        let (mut pages, mut runs) = (0u64, 0u64);
        for block in &self.blocks {
            let whole = block.bytes.div_ceil(PAGE);
            if whole > u32::MAX.into()
                || block.pages > whole
                || block.runs > block.pages
                || (!block.travels && block.pages > 0)
            {
                return None;
            }
            pages = pages.checked_add(block.pages)?;
            runs = runs.checked_add(block.runs)?;
        }
        let all = pages
            .checked_mul(PAGE)?
            .checked_add(self.state_bytes)?
            .checked_add(runs.checked_mul(RUN_BYTES)?)?;
        (hex && known && self.state_bytes <= STATE_BYTES_MAX && all == self.bytes).then_some(())
    }

    pub(crate) fn main_block(&self) -> &StoredBlock {
        &self.blocks[self.main]
    }

    /// Memory for clones to share, empty.
    pub(crate) fn memory(&self) -> io::Result<SealedMemory> {
        SealedMemory::new("sterna-template", self.main_block().bytes)
    }

    /// What a migration of its first VM would have offered: the same code fits a QEMU to both.
    pub(crate) fn as_offer(&self, vm: &str) -> Offer {
        let block = |block: &StoredBlock| Block {
            name: block.name.clone(),
            bytes: block.bytes,
            travels: block.travels,
        };
        Offer {
            vm: vm.to_owned(),
            argv: self.argv.clone(),
            machine: self.machine.clone(),
            cpu: self.cpu.clone(),
            qemu: self.qemu.clone(),
            fingerprint: self.fingerprint.clone(),
            blocks: self.blocks.iter().map(block).collect(),
            ..Offer::default()
        }
    }
}

#[cfg(test)]
impl Manifest {
    /// One with nothing in it.
    pub(super) fn empty() -> Self {
        Self {
            argv: vec!["qemu".into()],
            machine: "q35".into(),
            cpu: "max".into(),
            qemu: "10.0".into(),
            fingerprint: Vec::new(),
            blocks: Vec::new(),
            main: 0,
            state_bytes: 0,
            bytes: 0,
            pages_digest: String::new(),
            disks: Vec::new(),
        }
    }
}

/// The pages of a template, being read.
#[derive(Debug)]
pub(crate) struct Pages {
    file: File,
    /// Which pages each block has, and where in the file they begin.
    blocks: Vec<(Vec<PageRun>, u64)>,
    state: (u64, u64),
}

impl Pages {
    /// Reads which pages there are, and checks that they fit the blocks.
    pub(crate) fn open(file: File, manifest: &Manifest) -> io::Result<Self> {
        if file.metadata()?.len() != manifest.bytes {
            return Err(damaged("it is not as long as it was"));
        }
        let pages: u64 = manifest.blocks.iter().map(|block| block.pages).sum();
        let (mut at, mut offset) = (pages * PAGE + manifest.state_bytes, 0);
        let mut blocks = Vec::with_capacity(manifest.blocks.len());
        for block in &manifest.blocks {
            let mut raw = vec![0; (block.runs * RUN_BYTES) as usize];
            file.read_exact_at(&mut raw, at)?;
            at += raw.len() as u64;
            let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or_default();
            let run = |raw: &[u8]| PageRun { first: number(&raw[..8]), pages: number(&raw[8..]) };
            let runs: Vec<PageRun> = raw.chunks_exact(RUN_BYTES as usize).map(run).collect();
            if !fits(&runs, block) {
                return Err(damaged("its list of pages is wrong"));
            }
            blocks.push((runs, offset));
            offset += block.pages * PAGE;
        }
        Ok(Self { file, blocks, state: (offset, manifest.state_bytes) })
    }

    /// Reads all of it, checks it against its digest, and fills the memory that clones share, which is sealed then.
    pub(crate) fn load(&self, manifest: &Manifest, memory: &SealedMemory) -> io::Result<()> {
        let main = manifest.main_block();
        let (runs, begin) = &self.blocks[manifest.main];
        let mut into = Scatter { runs, at: 0, done: 0 };
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; PIECE_BYTES];
        let (mut at, end) = (0, begin + main.pages * PAGE);
        while at < manifest.bytes {
            // A piece is of that block or of none.
            let edge =
                [*begin, end, manifest.bytes].into_iter().find(|edge| *edge > at).unwrap_or(manifest.bytes);
            let piece = &mut buffer[..PIECE_BYTES.min((edge - at) as usize)];
            self.file.read_exact_at(piece, at)?;
            hasher.update(piece);
            if (*begin..end).contains(&at) {
                into.put(piece, |bytes, place| memory.write(bytes, place))?;
            }
            at += piece.len() as u64;
        }
        if hasher.finalize().to_hex().as_str() != manifest.pages_digest {
            return Err(damaged("its content is not what its digest says"));
        }
        memory.seal()
    }

    /// The pages of a block, in pieces of at most so many pages.
    pub(crate) fn read(
        &self,
        block: usize,
        most: u64,
        mut found: impl FnMut(PageRun, &[u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        let (runs, mut at) = (&self.blocks[block].0, self.blocks[block].1);
        let mut buffer = vec![0; (most * PAGE) as usize];
        for run in runs {
            for first in (run.first..run.end()).step_by(most as usize) {
                let piece = PageRun { first, pages: most.min(run.end() - first) };
                let bytes = &mut buffer[..piece.bytes() as usize];
                self.file.read_exact_at(bytes, at).map_err(|why| explain(&why))?;
                at += piece.bytes();
                found(piece, bytes)?;
            }
        }
        Ok(())
    }

    /// The device state.
    pub(crate) fn state(&self) -> io::Result<Vec<u8>> {
        let mut state = vec![0; self.state.1 as usize];
        self.file.read_exact_at(&mut state, self.state.0)?;
        Ok(state)
    }
}

/// Ascending, disjoint, within the block, and as many as the manifest says.
fn fits(runs: &[PageRun], block: &StoredBlock) -> bool {
    let mut end = 0;
    let mut pages = 0u64;
    for run in runs {
        let Some(next) = run.first.checked_add(run.pages) else { return false };
        if run.first < end || run.pages == 0 {
            return false;
        }
        (end, pages) = (next, pages + run.pages);
    }
    end <= block.bytes.div_ceil(PAGE) && pages == block.pages
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Puts a stream of bytes where its runs say.
struct Scatter<'a> {
    runs: &'a [PageRun],
    /// The run that is being filled, and how many bytes of it are.
    at: usize,
    done: u64,
}

impl Scatter<'_> {
    fn put(&mut self, mut bytes: &[u8], write: impl Fn(&[u8], u64) -> io::Result<()>) -> io::Result<()> {
        while !bytes.is_empty() {
            let run = self.runs.get(self.at).ok_or_else(|| damaged("it has more pages than it lists"))?;
            let (now, rest) = bytes.split_at(bytes.len().min((run.bytes() - self.done) as usize));
            write(now, run.first * PAGE + self.done)?;
            self.done += now.len() as u64;
            bytes = rest;
            if self.done == run.bytes() {
                (self.at, self.done) = (self.at + 1, 0);
            }
        }
        Ok(())
    }
}

/// The file of pages of a template that is being made.
pub(crate) struct PagesWriter {
    file: File,
    hasher: blake3::Hasher,
    at: u64,
}

impl PagesWriter {
    pub(crate) fn new(file: File) -> Self {
        Self { file, hasher: blake3::Hasher::new(), at: 0 }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Which pages were written, block by block; the file's length and digest.
    pub(crate) fn finish(mut self, runs: &[Vec<PageRun>]) -> io::Result<(u64, String)> {
        for run in runs.iter().flatten() {
            let mut raw = [0; RUN_BYTES as usize];
            raw[..8].copy_from_slice(&run.first.to_le_bytes());
            raw[8..].copy_from_slice(&run.pages.to_le_bytes());
            self.write(&raw)?;
        }
        self.file.sync_all()?;
        Ok((self.at, self.hasher.finalize().to_hex().to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { first, pages }
    }

    fn page(value: u8) -> Vec<u8> {
        vec![value; PAGE as usize]
    }

    /// Two blocks, of which the second is main memory.
    fn made(file: &File) -> Manifest {
        let runs = [vec![run(1, 1)], vec![run(0, 2), run(5, 1)]];
        let mut writer = PagesWriter::new(file.try_clone().unwrap());
        (1..=4).for_each(|value| writer.write(&page(value)).unwrap());
        writer.write(b"state").unwrap();
        let (bytes, pages_digest) = writer.finish(&runs).unwrap();
        let block = |name: &str, pages, runs| StoredBlock {
            name: name.into(),
            bytes: 8 * PAGE,
            travels: true,
            pages,
            runs,
        };
        let blocks = vec![block("bios", 1, 1), block("ram", 3, 2)];
        Manifest { blocks, main: 1, state_bytes: 5, bytes, pages_digest, ..Manifest::empty() }
    }

    #[test]
    fn what_is_written_comes_back_in_its_places() {
        let file = tempfile::tempfile().unwrap();
        let manifest = made(&file);
        let (encoded, digest) = manifest.encode();
        assert_eq!(Manifest::decode(&encoded).unwrap(), manifest);
        assert_eq!(digest.len(), 64);
        let pages = Pages::open(file, &manifest).unwrap();
        let memory = manifest.memory().unwrap();
        pages.load(&manifest, &memory).unwrap();
        let mut all = vec![0; 8 * PAGE as usize];
        memory.file().read_exact_at(&mut all, 0).unwrap();
        let firsts: Vec<u8> = all.chunks(PAGE as usize).map(|page| page[0]).collect();
        assert_eq!(firsts, [2, 3, 0, 0, 0, 4, 0, 0]);
        assert_eq!(pages.state().unwrap(), b"state");
        let mut seen = Vec::new();
        let read = pages.read(1, 1, |run, bytes| {
            seen.push((run.first, bytes[0]));
            Ok(())
        });
        read.unwrap();
        assert_eq!(seen, [(0, 2), (1, 3), (5, 4)]);
    }

    #[test]
    fn what_is_not_as_it_was_made_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let manifest = made(&file);
        let wrong = |change: &dyn Fn(&mut Manifest)| {
            let mut other = manifest.clone();
            change(&mut other);
            Manifest::decode(&other.encode().0).is_err()
        };
        assert!(wrong(&|m| m.main = 2));
        assert!(wrong(&|m| m.bytes += 1));
        assert!(wrong(&|m| m.blocks[1].pages = u64::MAX));
        assert!(wrong(&|m| m.blocks[1].runs = 9));
        assert!(wrong(&|m| m.state_bytes = u64::MAX));
        assert!(wrong(&|m| m.pages_digest = "short".into()));
        // Longer than the file, runs that overlap, and one byte that is another.
        let mut small = manifest.clone();
        small.blocks[1].bytes = 4 * PAGE;
        assert!(Pages::open(file.try_clone().unwrap(), &small).is_err());
        file.write_all_at(&[9], 2 * PAGE + 7).unwrap();
        let pages = Pages::open(file.try_clone().unwrap(), &manifest).unwrap();
        let memory = manifest.memory().unwrap();
        assert!(pages.load(&manifest, &memory).unwrap_err().to_string().contains("digest"));
        file.set_len(manifest.bytes - 1).unwrap();
        assert!(Pages::open(file, &manifest).is_err());
    }
}
