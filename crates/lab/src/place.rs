//! Where the lab keeps what it downloads and builds.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::LabError;

/// The directory of packages, guest programs and images: `target/lab` of this workspace, or `STERNA_LAB_DIR`.
#[derive(Debug, Clone)]
pub struct LabDir(PathBuf);

impl LabDir {
    /// The directory, made if it is missing.
    pub fn open() -> Result<LabDir, LabError> {
        let path = std::env::var_os("STERNA_LAB_DIR").map_or_else(default_path, PathBuf::from);
        std::fs::create_dir_all(&path).map_err(LabError::file("make", &path))?;
        let path = path.canonicalize().map_err(LabError::file("find", &path))?;
        Ok(LabDir(path))
    }

    /// A path in it.
    #[must_use]
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }

    /// Holds off every other process that prepares this directory until the result is dropped.
    pub(crate) fn lock(&self) -> Result<File, LabError> {
        let path = self.join(".lock");
        let file = File::create(&path).map_err(LabError::file("make", &path))?;
        file.lock().map_err(LabError::file("lock", &path))?;
        Ok(file)
    }

    /// Runs `make` into a fresh directory that becomes `name` only when it is complete; does nothing when `name` was made
    /// by the same `recipe` before. Returns where it is.
    pub(crate) fn once(
        &self,
        name: &str,
        recipe: &str,
        make: impl FnOnce(&Path) -> Result<(), LabError>,
    ) -> Result<PathBuf, LabError> {
        let done = self.join(name);
        let stamp = |dir: &Path| dir.join(".recipe");
        if std::fs::read_to_string(stamp(&done)).is_ok_and(|r| r == recipe) {
            return Ok(done);
        }
        let fresh = self.join(format!("{name}.new"));
        remove_tree(&fresh)?;
        std::fs::create_dir_all(&fresh).map_err(LabError::file("make", &fresh))?;
        make(&fresh)?;
        std::fs::write(stamp(&fresh), recipe).map_err(LabError::file("write", stamp(&fresh)))?;
        remove_tree(&done)?;
        std::fs::rename(&fresh, &done).map_err(LabError::file("rename", &fresh))?;
        Ok(done)
    }
}

/// Writes a file so that readers see either the old or the new content, and leaves it alone when nothing changed.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), LabError> {
    use std::os::unix::fs::PermissionsExt;
    if std::fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(LabError::file("make", dir))?;
    let fresh = tempfile::NamedTempFile::new_in(dir).map_err(LabError::file("make a file in", dir))?;
    std::fs::write(fresh.path(), content).map_err(LabError::file("write", fresh.path()))?;
    std::fs::set_permissions(fresh.path(), std::fs::Permissions::from_mode(mode))
        .map_err(LabError::file("set the mode of", fresh.path()))?;
    fresh.persist(path).map_err(|e| LabError::File {
        action: "write",
        path: path.into(),
        source: e.error,
    })?;
    Ok(())
}

/// Removes a directory with all in it, if it is there.
pub(crate) fn remove_tree(path: &Path) -> Result<(), LabError> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(LabError::file("remove", path)(e)),
        _ => Ok(()),
    }
}

/// The root of the source tree that this program was built from.
pub(crate) fn workspace() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).unwrap_or(crate_dir).to_owned()
}

fn default_path() -> PathBuf {
    workspace().join("target/lab")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_made_once_and_again_for_a_new_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let lab = LabDir(dir.path().to_owned());
        let make = |text: &'static str| {
            move |p: &Path| std::fs::write(p.join("f"), text).map_err(LabError::file("write", p))
        };
        let part = lab.once("part", "1", make("one")).unwrap();
        lab.once("part", "1", make("never")).unwrap();
        assert_eq!(std::fs::read_to_string(part.join("f")).unwrap(), "one");
        lab.once("part", "2", make("two")).unwrap();
        assert_eq!(std::fs::read_to_string(part.join("f")).unwrap(), "two");
    }

    #[test]
    fn a_part_that_failed_is_not_taken_for_made() {
        let dir = tempfile::tempdir().unwrap();
        let lab = LabDir(dir.path().to_owned());
        lab.once("part", "1", |_| Err(LabError::Refused("no".into()))).unwrap_err();
        assert!(!dir.path().join("part").exists());
        lab.once("part", "1", |_| Ok(())).unwrap();
    }
}
