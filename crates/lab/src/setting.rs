//! Settings of the kernel, changed for a test or a benchmark and put back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::LabError;

/// What this process has changed, with what it was before.
static CHANGED: Mutex<Vec<(PathBuf, String)>> = Mutex::new(Vec::new());

/// A file below `/sys` or `/proc/sys` that holds something else as long as this lives.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
}

impl Setting {
    /// Changes it.
    ///
    /// # Errors
    /// There is no such setting, or it does not take the value: nothing has changed then.
    pub fn change(path: &Path, value: &str) -> Result<Self, LabError> {
        let failed = |action| move |source| LabError::File { action, path: path.to_owned(), source };
        let mut changed = changed();
        let before = fs::read_to_string(path).map_err(failed("read"))?;
        fs::write(path, value).map_err(failed("write"))?;
        changed.push((path.to_owned(), before.trim().to_owned()));
        Ok(Self { path: path.to_owned() })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let mut changed = changed();
        if let Some(at) = changed.iter().rposition(|(path, _)| *path == self.path) {
            put_back(changed.remove(at));
        }
    }
}

/// Puts back whatever this process has changed: for who ends it without dropping anything.
pub fn put_all_back() {
    changed().drain(..).rev().for_each(put_back);
}

fn put_back((path, before): (PathBuf, String)) {
    // There is nobody left to tell of an error.
    let _ = fs::write(path, before);
}

fn changed() -> MutexGuard<'static, Vec<(PathBuf, String)>> {
    CHANGED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_is_put_back_one_by_one_and_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("setting");
        fs::write(&path, "9\n").unwrap();
        let holds = |value: &str| assert_eq!(fs::read_to_string(&path).unwrap().trim(), value);
        let first = Setting::change(&path, "11").unwrap();
        let second = Setting::change(&path, "12").unwrap();
        holds("12");
        drop(second);
        holds("11");
        drop(first);
        holds("9");
        let kept = Setting::change(&path, "11").unwrap();
        put_all_back();
        holds("9");
        fs::write(&path, "8").unwrap();
        drop(kept);
        holds("8");
        assert!(Setting::change(&folder.path().join("none"), "1").is_err());
    }
}
