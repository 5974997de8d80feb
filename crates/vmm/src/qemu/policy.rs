//! What a target allows, and what it puts in the place of the source's own names: both from the target's own
//! configuration, never from the peer.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::types::Code;

/// What stands for the other hosts' names on this one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostMap {
    /// The file name of the source's program to the path of ours: another version of QEMU, say.
    pub binaries: BTreeMap<String, PathBuf>,
    /// The source's tap interface to ours.
    pub taps: BTreeMap<String, String>,
    /// The source's path, or the beginning of one, to ours. The longest that fits counts.
    pub paths: BTreeMap<String, String>,
    /// The source's network scripts to ours: the only programs that a moved VM can start.
    pub scripts: BTreeMap<String, String>,
    /// The source's addresses (`-vnc :1`) to ours, whole.
    pub addresses: BTreeMap<String, String>,
}

/// What a VM that comes from a peer may use on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TargetPolicy {
    /// The QEMU programs that may be started, by absolute path. A peer's is found among them by its file name.
    pub binaries: Vec<PathBuf>,
    /// The folders that every file of a VM must be in, symbolic links followed.
    pub path_roots: Vec<PathBuf>,
}

/// Something in a command line that this host refuses, with the reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The kind of reason.
    pub code: Code,
    /// The option, as the user wrote it.
    pub option: String,
    /// Why, and what to do.
    pub reason: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.option, self.reason)
    }
}

/// Why something is refused, with the kind of reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Why {
    pub(super) code: Code,
    pub(super) text: String,
}

impl From<String> for Why {
    fn from(text: String) -> Self {
        Self { code: Code::CommandLine, text }
    }
}

impl From<&str> for Why {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

/// Whether a file must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// An image or firmware: QEMU reads it.
    Required,
    /// A log or socket: QEMU makes it.
    Created,
}

/// The map and the policy of one host, applied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host<'a> {
    pub(super) map: &'a HostMap,
    pub(super) policy: &'a TargetPolicy,
}

impl Host<'_> {
    /// The program to start for a peer's `argv[0]`.
    pub(super) fn binary(self, asked: &str) -> Result<String, String> {
        let name = Path::new(asked).file_name();
        let mapped = name.and_then(|name| self.map.binaries.get(name.to_str()?));
        let fits = |path: &&PathBuf| path.is_absolute() && name.is_some() && path.file_name() == name;
        let found = mapped.filter(|path| path.is_absolute()).or(self.policy.binaries.iter().find(fits));
        let found = found.and_then(|path| path.to_str());
        found.map(str::to_owned).ok_or_else(|| {
            "this program may not be started here; add it to the target's qemu.binaries, or name the one that stands for \
             it in map.binaries"
                .to_owned()
        })
    }

    /// This host's file for the source's, as a path without symbolic links below an allowed folder.
    pub(super) fn path(self, asked: &str, presence: Presence) -> Result<String, String> {
        let mapped = self.mapped(asked);
        if !mapped.is_absolute() {
            return Err(format!("{asked:?} is no absolute path; a relative one means another file here"));
        }
        let real = match presence {
            Presence::Required => fs::canonicalize(&mapped),
            Presence::Created => canonicalize_new(&mapped),
        };
        let real =
            real.map_err(|error| format!("{} cannot be used on this host: {error}", mapped.display()))?;
        self.within_roots(&mapped, &real)
    }

    /// Whether a file that is not in the command line may be opened, under its own name.
    pub(super) fn allows(self, path: &Path) -> Result<String, String> {
        let real = fs::canonicalize(path).map_err(|error| error.to_string())?;
        self.within_roots(path, &real)
    }

    /// Whether a file that the command line names is not there.
    pub(super) fn lacks(self, asked: &str) -> bool {
        let mapped = self.mapped(asked);
        mapped.is_absolute() && mapped.try_exists().is_ok_and(|there| !there)
    }

    fn within_roots(self, mapped: &Path, real: &Path) -> Result<String, String> {
        let roots = self.policy.path_roots.iter().filter_map(|root| fs::canonicalize(root).ok());
        if !roots.into_iter().any(|root| real.starts_with(&root)) {
            return Err(format!(
                "{} is {} here, which is in none of the folders that this host allows",
                mapped.display(),
                real.display()
            ));
        }
        let text = real.to_str().map(str::to_owned);
        text.ok_or_else(|| format!("{} has a name that cannot be passed on", real.display()))
    }

    /// This host's tap for the source's.
    pub(super) fn tap(self, asked: &str) -> Result<String, String> {
        let found = self.map.taps.get(asked).cloned();
        found.ok_or_else(|| format!("no tap of this host stands for {asked:?}; add it to the target's map"))
    }

    /// This host's script for the source's. `no` means none, everywhere.
    pub(super) fn script(self, asked: &str) -> Result<String, String> {
        if asked == "no" {
            return Ok("no".to_owned());
        }
        let found = self.map.scripts.get(asked).cloned();
        found.ok_or_else(|| {
            format!("{asked:?} would run a program; give script=no, or let the target's map name its own")
        })
    }

    /// This host's address for the source's.
    pub(super) fn address(self, asked: &str) -> Result<String, String> {
        let found = self.map.addresses.get(asked).cloned();
        found.ok_or_else(|| {
            format!("{asked:?} opens a socket; let the target's map name an address of its own")
        })
    }

    fn mapped(self, asked: &str) -> PathBuf {
        let asked = Path::new(asked);
        let fitting = self.map.paths.iter().filter(|(from, _)| asked.starts_with(from));
        let longest = fitting.max_by_key(|(from, _)| from.len());
        match longest {
            Some((from, to)) => match asked.strip_prefix(from) {
                Ok(rest) if rest.as_os_str().is_empty() => PathBuf::from(to),
                Ok(rest) => Path::new(to).join(rest),
                Err(_) => asked.to_owned(),
            },
            None => asked.to_owned(),
        }
    }
}

/// This host's file for a peer's, which need not be there yet, as a path without symbolic links below an allowed folder.
///
/// # Errors
/// Why this host does not allow it.
pub fn new_file(map: &HostMap, policy: &TargetPolicy, asked: &str) -> Result<String, String> {
    Host { map, policy }.path(asked, Presence::Created)
}

/// The real path of a file that need not be there yet: its folder must be.
fn canonicalize_new(path: &Path) -> std::io::Result<PathBuf> {
    match fs::canonicalize(path) {
        // A link that leads nowhere would be made into a file wherever it points.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && path.symlink_metadata().is_err() => {}
        done => return done,
    }
    let (Some(parent), Some(Component::Normal(name))) = (path.parent(), path.components().next_back()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    Ok(fs::canonicalize(parent)?.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn host_with<T>(run: impl FnOnce(&Path, Host<'_>) -> T) -> T {
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("images");
        fs::create_dir_all(images.join("sub")).unwrap();
        fs::write(images.join("disk"), "x").unwrap();
        fs::write(folder.path().join("secret"), "x").unwrap();
        symlink(folder.path().join("secret"), images.join("link")).unwrap();
        symlink(folder.path().join("not-yet"), images.join("dangling")).unwrap();
        let map = HostMap {
            paths: BTreeMap::from([
                ("/srv".to_owned(), "/nowhere".to_owned()),
                ("/srv/images".to_owned(), images.to_str().unwrap().to_owned()),
            ]),
            binaries: BTreeMap::from([
                ("qemu-old".to_owned(), "/opt/qemu-new".into()),
                ("sh".to_owned(), "relative".into()),
            ]),
            ..HostMap::default()
        };
        let policy = TargetPolicy { binaries: vec!["/opt/qemu-x".into()], path_roots: vec![images] };
        run(folder.path(), Host { map: &map, policy: &policy })
    }

    #[test]
    fn a_file_below_a_root_is_found_by_the_longest_mapping() {
        host_with(|folder, host| {
            let expected = fs::canonicalize(folder.join("images/disk")).unwrap();
            let found = host.path("/srv/images/disk", Presence::Required).unwrap();
            assert_eq!(Path::new(&found), expected);
            assert!(host.path("/srv/images/sub/new.log", Presence::Created).is_ok());
            assert!(host.path("/srv/images/new.img", Presence::Required).is_err());
        });
    }

    #[test]
    fn nothing_leads_out_of_the_roots() {
        let out = [
            "/srv/images/link",
            "/srv/images/dangling",
            "/srv/images/../secret",
            "/srv/images/..",
            "/srv/images/sub/../../secret",
            "/etc/passwd",
            "etc/passwd",
            "",
            "/",
            "nbd:localhost:1",
            "json:{}",
            "/dev/fdset/1",
            "/srv/imagesdisk",
        ];
        host_with(|_, host| {
            for path in out {
                for presence in [Presence::Required, Presence::Created] {
                    assert!(host.path(path, presence).is_err(), "{path:?} {presence:?}");
                }
            }
        });
    }

    #[test]
    fn only_a_listed_program_is_started() {
        host_with(|_, host| {
            assert_eq!(host.binary("/tmp/evil/qemu-x").unwrap(), "/opt/qemu-x");
            assert_eq!(host.binary("qemu-x").unwrap(), "/opt/qemu-x");
            assert_eq!(host.binary("/usr/bin/qemu-old").unwrap(), "/opt/qemu-new");
            for evil in ["sh", "", "/", "..", "/opt/qemu-x/.."] {
                assert!(host.binary(evil).is_err(), "{evil:?}");
            }
        });
    }
}
