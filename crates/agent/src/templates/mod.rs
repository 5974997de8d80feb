//! Templates: a VM that was booted once, from which others start in a moment and with which they share their memory.
//!
//! After Eswaran et al., "Template-aware live migration" (SEC 2023): a clone maps the template's memory copy-on-write, and its migration moves
//! only what it has written since. Here neither QEMU nor the kernel is changed: the template is a sealed memfd that QEMU is given as a
//! file for its RAM, and the page tables tell which pages are the clone's own ([`sterna_memory::own`]).
//!
//! ```text
//! format   the two files of a template          make     a template of a VM
//! mod      the store: found, loaded, removed    start    a clone of a template
//! base     what a clone maps                    push     a template to another host
//! disks    what each clone writes
//! ```

use crate::control::explain;
use crate::registry::{Registry, is_usable, lock};
use push::{Sending, push};
use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

mod base;
mod desk;
mod disks;
mod format;
mod make;
mod push;
mod start;

pub(crate) use base::Base;
use format::Pages;
pub(crate) use format::{Manifest, StoredBlock};
pub(crate) use make::{check, make};
pub(crate) use push::{Follower, Manners, Told, follow, receive};
pub(crate) use start::{Started, start};

const MANIFEST: &str = "manifest.json";
const PAGES: &str = "pages";
const NAME: &str = "name";
/// The host that a template came from. One that was made here has none.
const ORIGIN: &str = "origin";
/// How the folder of a template begins that is being made.
const NEW: &str = "new-";
/// How the folder of a template ends that is being made or received.
const UNFINISHED: &str = ".part";

/// A template of this host, as it lies in its folder.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// BLAKE3 of the manifest, in hexadecimal.
    pub(crate) digest: String,
    pub(crate) manifest: Manifest,
    pub(crate) created: jiff::Timestamp,
}

/// One whose memory is there for clones to share.
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) base: Arc<Base>,
    /// The host that it came from: what that wrote into its command line is not trusted.
    origin: Option<String>,
    pages: Pages,
}

/// The templates of a host.
#[derive(Debug)]
pub(crate) struct Templates {
    dir: PathBuf,
    /// By digest. Clones that are started one after the other share one memory.
    loaded: Mutex<HashMap<String, Arc<Template>>>,
    /// Held while one is made, received or removed: a host does one at a time.
    busy: Mutex<()>,
    /// Those that are on their way here, by digest.
    coming: Mutex<HashMap<String, Arc<Base>>>,
    /// Those that are on their way to another host, by that host and digest: who wants the same follows it.
    sending: Mutex<HashMap<(String, String), Arc<Sending>>>,
}

impl Templates {
    /// Those in this folder, which is made if it is not there.
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        // An earlier life of this agent ended while it made these. What came of a peer's is kept: the rest may follow.
        let folders = fs::read_dir(&dir)?.flatten().filter(|folder| {
            folder
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(NEW) && name.ends_with(UNFINISHED))
        });
        folders.for_each(|folder| drop(fs::remove_dir_all(folder.path())));
        Ok(Self {
            dir,
            loaded: Mutex::default(),
            busy: Mutex::default(),
            coming: Mutex::default(),
            sending: Mutex::default(),
        })
    }

    /// All that are complete, by name.
    pub(crate) fn list(&self) -> Vec<Entry> {
        let folders = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut entries: Vec<Entry> =
            folders.filter_map(|folder| self.entry(folder.file_name().to_str()?)).collect();
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        entries
    }

    /// The one of this name.
    pub(crate) fn find(&self, name: &str) -> Option<Entry> {
        self.list().into_iter().find(|entry| entry.name == name)
    }

    /// The one with this digest.
    pub(crate) fn entry(&self, digest: &str) -> Option<Entry> {
        if !is_digest(digest) {
            return None;
        }
        let folder = self.dir.join(digest);
        let bytes = fs::read(folder.join(MANIFEST)).ok()?;
        if blake3::hash(&bytes).to_hex().as_str() != digest {
            tracing::warn!(digest, "the manifest of a template is damaged; it is not used");
            return None;
        }
        let manifest = Manifest::decode(&bytes).ok()?;
        let name = fs::read_to_string(folder.join(NAME)).ok().filter(|name| is_usable(name))?;
        let created = folder.join(MANIFEST).metadata().and_then(|found| found.modified());
        let created = created.ok().and_then(|at| at.try_into().ok()).unwrap_or_default();
        Some(Entry { name, digest: digest.to_owned(), manifest, created })
    }

    /// What memory a template will take that is here and not loaded yet, or on its way here, in bytes; nothing where there is none.
    pub(crate) fn unloaded_bytes(&self, digest: &str) -> u64 {
        let is_loaded = lock(&self.loaded).contains_key(digest);
        let manifest = self.manifest(digest).filter(|_| !is_loaded);
        manifest.map_or(0, |manifest| manifest.main_block().bytes)
    }

    /// What a template is that is here, or on its way here.
    pub(crate) fn manifest(&self, digest: &str) -> Option<Manifest> {
        let coming = lock(&self.coming).get(digest).map(|base| base.manifest.clone());
        coming.or_else(|| self.entry(digest).map(|entry| entry.manifest))
    }

    /// What a clone of the template with this digest maps: at once where it is on its way here.
    pub(crate) fn base(&self, digest: &str) -> Result<Arc<Base>, String> {
        let coming = lock(&self.coming).get(digest).cloned();
        coming.map_or_else(|| self.load(digest).map(|template| template.base.clone()), Ok)
    }

    /// The template with this digest, its memory loaded and checked: that takes a while the first time.
    pub(crate) fn load(&self, digest: &str) -> Result<Arc<Template>, String> {
        let mut loaded = lock(&self.loaded);
        if let Some(template) = loaded.get(digest) {
            return Ok(template.clone());
        }
        let entry = self.entry(digest).ok_or_else(|| format!("there is no template {digest} here"))?;
        let shown = entry.name.clone();
        let failed = |why: io::Error| format!("template {shown} cannot be used: {}", explain(&why));
        let pages = File::open(self.dir.join(digest).join(PAGES))
            .and_then(|file| Pages::open(file, &entry.manifest))
            .map_err(failed)?;
        let memory = entry.manifest.memory().map_err(failed)?;
        pages.load(&entry.manifest, &memory).map_err(failed)?;
        let origin = match fs::read_to_string(self.dir.join(digest).join(ORIGIN)) {
            Err(why) if why.kind() == io::ErrorKind::NotFound => None,
            read => Some(read.map_err(failed)?),
        };
        let Entry { name, manifest, .. } = entry;
        let base = Base::here((name, digest.to_owned()), manifest, Arc::new(memory));
        let template = Arc::new(Template { base, origin, pages });
        loaded.insert(digest.to_owned(), template.clone());
        Ok(template)
    }

    /// Removes the files of a template, and lets its memory go.
    ///
    /// # Errors
    /// Which clones of it are on this host, or what the file system says.
    pub(crate) fn remove(&self, entry: &Entry, registry: &Registry) -> Result<(), String> {
        let _alone = lock(&self.busy);
        let users: Vec<String> = registry
            .all()
            .iter()
            .filter(|vm| vm.record().template.is_some_and(|used| used.digest == entry.digest))
            .map(|vm| vm.name())
            .collect();
        if !users.is_empty() {
            return Err(format!(
                "template {} is used by {}: stop or move them first",
                entry.name,
                users.join(", ")
            ));
        }
        let mut loaded = lock(&self.loaded);
        if loaded.get(&entry.digest).is_some_and(|template| Arc::strong_count(template) > 1) {
            return Err(format!("template {} is used by a VM that is being started", entry.name));
        }
        loaded.remove(&entry.digest);
        drop(loaded);
        fs::remove_dir_all(self.dir.join(&entry.digest))
            .map_err(|why| format!("template {} cannot be removed: {why}", entry.name))
    }

    /// Makes an unfinished template one of this host's, under its digest.
    fn adopt(
        &self,
        folder: &Path,
        name: &str,
        manifest: &[u8],
        digest: &str,
        origin: Option<&str>,
    ) -> io::Result<()> {
        let files = [(MANIFEST, manifest), (NAME, name.as_bytes())];
        for (file, content) in files.into_iter().chain(origin.map(|origin| (ORIGIN, origin.as_bytes()))) {
            fs::write(folder.join(file), content)?;
            File::open(folder.join(file))?.sync_all()?;
        }
        match fs::rename(folder, self.dir.join(digest)) {
            // The same was here already.
            Err(_) if self.entry(digest).is_some() => fs::remove_dir_all(folder),
            done => done,
        }?;
        File::open(&self.dir)?.sync_all()
    }

    /// A folder for one that is not complete.
    fn unfinished(&self, of: &str) -> io::Result<PathBuf> {
        let folder = self.dir.join(format!("{of}{UNFINISHED}"));
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        Ok(folder)
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

/// What a name and a manifest of somebody's may not be.
fn unusable_name(name: &str) -> String {
    format!("the name {name:?} of a template cannot be used: {}", crate::registry::NAME_RULE)
}
