//! What a clone maps: a template's memory, which may still be on its way here.

use super::{Manifest, Templates};
use crate::registry::{UsedTemplate, lock};
use std::sync::{Arc, Mutex};
use sterna_memory::SealedMemory;

/// Hears whether it has come.
type Watch = Box<dyn FnOnce(Result<(), String>) + Send>;

/// A template as a clone needs it.
#[derive(Debug)]
pub(crate) struct Base {
    pub(crate) name: String,
    pub(crate) digest: String,
    pub(crate) manifest: Manifest,
    pub(crate) memory: Arc<SealedMemory>,
    fate: Mutex<Fate>,
}

enum Fate {
    Coming(Vec<Watch>),
    /// All of it is here, and as its digest says.
    Here,
    Lost(String),
}

impl Base {
    /// One whose memory is filled, checked and sealed.
    pub(super) fn here(
        (name, digest): (String, String),
        manifest: Manifest,
        memory: Arc<SealedMemory>,
    ) -> Arc<Self> {
        Arc::new(Self { name, digest, manifest, memory, fate: Mutex::new(Fate::Here) })
    }

    /// As a clone's record has it.
    pub(crate) fn used(&self) -> UsedTemplate {
        let (name, digest) = (self.name.clone(), self.digest.clone());
        UsedTemplate { name, digest, block: self.manifest.main_block().name.clone() }
    }

    /// Whether all of it is here; an error says why it never will be.
    pub(crate) fn is_here(&self) -> Result<bool, String> {
        match &*lock(&self.fate) {
            Fate::Coming(_) => Ok(false),
            Fate::Here => Ok(true),
            Fate::Lost(why) => Err(why.clone()),
        }
    }

    /// Tells, now or later, whether it has come.
    pub(crate) fn tell(&self, watch: impl FnOnce(Result<(), String>) + Send + 'static) {
        let mut fate = lock(&self.fate);
        if let Fate::Coming(watches) = &mut *fate {
            return watches.push(Box::new(watch));
        }
        drop(fate);
        watch(self.is_here().map(drop));
    }

    fn ends(&self, how: Result<(), String>) {
        let new = how.clone().map_or_else(Fate::Lost, |()| Fate::Here);
        let before = std::mem::replace(&mut *lock(&self.fate), new);
        if let Fate::Coming(watches) = before {
            watches.into_iter().for_each(|watch| watch(how.clone()));
        }
    }
}

impl std::fmt::Debug for Fate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Coming(_) => "coming",
            Self::Here => "here",
            Self::Lost(_) => "lost",
        })
    }
}

/// One on its way here, that VMs may map already. Lost unless it is said to have come.
pub(super) struct Coming<'a> {
    templates: &'a Templates,
    pub(super) base: Arc<Base>,
    told: bool,
}

impl<'a> Coming<'a> {
    /// Lists it: who comes with this digest finds it.
    pub(super) fn list(
        templates: &'a Templates,
        (name, digest): (String, String),
        manifest: Manifest,
        memory: SealedMemory,
    ) -> Self {
        let fate = Mutex::new(Fate::Coming(Vec::new()));
        let base = Arc::new(Base { name, digest, manifest, memory: Arc::new(memory), fate });
        lock(&templates.coming).insert(base.digest.clone(), base.clone());
        Self { templates, base, told: false }
    }

    /// All of it is here, and listed among those that are.
    pub(super) fn has_come(mut self) {
        self.told = true;
        self.base.ends(Ok(()));
    }

    pub(super) fn will_not_come(mut self, why: &str) {
        self.told = true;
        self.base.ends(Err(why.to_owned()));
    }
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        lock(&self.templates.coming).remove(&self.base.digest);
        if !self.told {
            self.base.ends(Err("nobody sends it any more".into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn templates() -> (tempfile::TempDir, Templates) {
        let folder = tempfile::tempdir().unwrap();
        let templates = Templates::open(folder.path().join("templates")).unwrap();
        (folder, templates)
    }

    fn coming(templates: &Templates) -> Coming<'_> {
        let memory = SealedMemory::new("test", 1 << 20).unwrap();
        let manifest = Manifest::empty();
        Coming::list(templates, ("web".into(), "d".into()), manifest, memory)
    }

    #[test]
    fn who_maps_one_that_comes_hears_what_becomes_of_it() {
        let (_folder, templates) = templates();
        for come in [true, false] {
            let one = coming(&templates);
            let base = templates.base("d").unwrap();
            assert_eq!(base.is_here(), Ok(false));
            let (tell, hear) = channel();
            base.tell(move |how| tell.send(how).unwrap());
            assert!(hear.try_recv().is_err());
            if come {
                one.has_come()
            } else {
                drop(one)
            }
            assert_eq!(hear.recv().unwrap().is_ok(), come);
            assert_eq!(base.is_here().is_ok(), come);
            let (tell, hear) = channel();
            base.tell(move |how| tell.send(how).unwrap());
            assert_eq!(hear.recv().unwrap().is_ok(), come, "who comes late hears it at once");
            assert!(templates.base("d").is_err(), "it is listed as coming no more");
        }
    }
}
