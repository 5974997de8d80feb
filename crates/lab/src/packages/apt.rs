//! apt-get and its relatives: which package, from which suite, unpacked where.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::UNPACK;
use crate::place::LabDir;
use crate::{LabError, run};

/// The suite that the lab's packages come from; QEMU 10.0 comes from its backports.
const SUITE: &str = "bookworm";
/// Debian signs both with keys in here.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A set of package sources: the machine's own, or ours that knows only the backports.
pub(super) struct Sources {
    options: Vec<String>,
    /// Ours has a list of its own, made from the machine's and fetched into the lab's directory.
    own_list: Option<PathBuf>,
    cache: PathBuf,
}

impl Sources {
    pub(super) fn of_the_machine(dir: &LabDir) -> Sources {
        Sources { options: Vec::new(), own_list: None, cache: dir.join("downloads") }
    }

    pub(super) fn backports(dir: &LabDir) -> Sources {
        let (list, lists) = (dir.join("apt/backports.list"), dir.join("apt/lists"));
        let options = vec![
            format!("Dir::Etc::sourcelist={}", list.display()),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={}", lists.display()),
            format!("Dir::Cache::pkgcache={}", dir.join("apt/pkgcache.bin").display()),
            format!("Dir::Cache::srcpkgcache={}", dir.join("apt/srcpkgcache.bin").display()),
            // The lab's directory need not be open to apt's own user.
            "APT::Sandbox::User=root".to_owned(),
        ];
        Sources { options, own_list: Some(list), cache: dir.join("downloads") }
    }

    /// Fetches lists of packages where there are none yet (a fresh machine has none).
    pub(super) fn refresh(&self) -> Result<(), LabError> {
        match &self.own_list {
            Some(list) => self.refresh_own(list),
            None if known("qemu-system-x86")? => Ok(()),
            None if !rustix::process::geteuid().is_root() => Err(LabError::Refused(
                "this machine has no lists of packages yet: run `apt-get update` as root".to_owned(),
            )),
            None => self.get(&["update"]).map(drop),
        }
    }

    fn refresh_own(&self, list: &Path) -> Result<(), LabError> {
        let partial = list.with_file_name("lists").join("partial");
        std::fs::create_dir_all(&partial).map_err(LabError::file("make", &partial))?;
        let mut text = String::new();
        // The suite itself is listed too: dependencies of the backports that did not change come from there.
        for suite in [SUITE.to_owned(), format!("{SUITE}-backports")] {
            let _ = writeln!(text, "deb [signed-by={KEYRING}] {} {suite} main", mirror()?);
        }
        crate::place::replace(list, text.as_bytes(), 0o644)?;
        self.get(&["update"]).map(drop)
    }

    /// Names one part of a QEMU so that apt takes the version that belongs to it.
    pub(super) fn part(&self, package: &str, version: &str) -> Result<String, LabError> {
        match (package, &self.own_list) {
            (qemu, _) if qemu.starts_with("qemu") => self.pin(qemu, version),
            // QEMU 10.0 asks for the backported firmware.
            ("seabios", Some(_)) => Ok(format!("{package}/{SUITE}-backports")),
            _ => Ok(format!("{package}/{SUITE}")),
        }
    }

    /// `package=version` for the newest version with this prefix.
    pub(super) fn pin(&self, package: &str, prefix: &str) -> Result<String, LabError> {
        let table = self.apt("apt-cache", &["madison", package])?;
        let versions = table.lines().filter_map(|l| l.split('|').nth(1)).map(str::trim);
        match versions.into_iter().find(|v| v.starts_with(prefix)) {
            Some(version) => Ok(format!("{package}={version}")),
            None => Err(LabError::NoSource { what: format!("{package} {prefix}*") }),
        }
    }

    /// The dependency of a package whose name starts with `prefix`.
    pub(super) fn dependency(&self, package: &str, prefix: &str) -> Result<String, LabError> {
        let text = self.apt("apt-cache", &["depends", package])?;
        let names = text.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
        let found = names.into_iter().find(|n| n.starts_with(prefix));
        found.map(str::to_owned).ok_or_else(|| LabError::NoSource { what: package.to_owned() })
    }

    /// Downloads packages and unpacks them into `to`; what they depend on is noted in the file `depends` there.
    pub(super) fn unpack(&self, packages: &[String], to: &Path) -> Result<(), LabError> {
        let own = self.cache.join(to.file_name().unwrap_or_default());
        crate::place::remove_tree(&own)?;
        std::fs::create_dir_all(&own).map_err(LabError::file("make", &own))?;
        let mut download = self.command("apt-get");
        run::output(download.arg("download").args(packages).current_dir(&own), run::DOWNLOAD)?;
        let mut depends = String::new();
        for entry in std::fs::read_dir(&own).map_err(LabError::file("list", &own))?.flatten() {
            let deb = entry.path();
            run::output(Command::new("dpkg-deb").arg("-x").args([&deb, to]), UNPACK)?;
            depends += &run::output(Command::new("dpkg-deb").arg("-f").arg(&deb).arg("Depends"), UNPACK)?;
            depends.push('\n');
        }
        std::fs::write(to.join("depends"), depends).map_err(LabError::file("write", to))?;
        crate::place::remove_tree(&own)
    }

    /// Installs packages as root; fails with their names otherwise.
    pub(super) fn install(&self, packages: Vec<String>) -> Result<(), LabError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LabError::MissingPackages { packages });
        }
        let mut words = vec!["install", "-y", "--no-install-recommends"];
        words.extend(packages.iter().map(String::as_str));
        if self.get(&words).is_err() {
            // Old lists name versions that the server no longer has.
            self.get(&["update"])?;
            self.get(&words)?;
        }
        Ok(())
    }

    fn get(&self, words: &[&str]) -> Result<String, LabError> {
        self.apt("apt-get", words)
    }

    fn apt(&self, program: &str, words: &[&str]) -> Result<String, LabError> {
        run::output(self.command(program).args(words), run::DOWNLOAD)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }
}

/// The names in `Depends:` lines: the first of alternatives, without versions.
pub(super) fn packages_of(depends: &str) -> impl Iterator<Item = String> + '_ {
    let first = |item: &str| item.split(['|', '(', ':']).next().map(|n| n.trim().to_owned());
    depends.split([',', '\n']).filter_map(first).filter(|n| !n.is_empty())
}

/// Those of the packages that dpkg does not hold as installed.
pub(super) fn not_installed(wanted: &[String]) -> Result<Vec<String>, LabError> {
    let format = "${db:Status-Abbrev} ${binary:Package}\n";
    let all = run::output(Command::new("dpkg-query").args(["-W", "-f", format]), run::QUICK)?;
    let installed: std::collections::BTreeSet<&str> =
        all.lines().filter_map(|l| l.strip_prefix("ii  ")).filter_map(|n| n.split(':').next()).collect();
    Ok(wanted.iter().filter(|p| !installed.contains(p.as_str())).cloned().collect())
}

/// Whether the machine's lists know a package.
fn known(package: &str) -> Result<bool, LabError> {
    Ok(!run::output(Command::new("apt-cache").args(["madison", package]), run::DOWNLOAD)?.trim().is_empty())
}

/// Where this machine takes Debian from.
fn mirror() -> Result<String, LabError> {
    // The sources may name the suite by its codename or by its place (`oldstable`): either column may hold it.
    let format = "$(REPO_URI) $(RELEASE) $(CODENAME)";
    let targets =
        run::output(Command::new("apt-get").args(["indextargets", "--format", format]), run::DOWNLOAD)?;
    let of_suite = |l: &&str| l.split_whitespace().skip(1).any(|w| w == SUITE);
    let uri = targets.lines().find(of_suite).and_then(|l| l.split_whitespace().next());
    uri.map(str::to_owned).ok_or_else(|| LabError::NoSource { what: format!("suite {SUITE}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_lose_versions_and_alternatives() {
        let text = "libaio1 (>= 0.3.93), liba:any | libb, seabios\nlibc6 (>= 2.34)\n\n";
        let names: Vec<_> = packages_of(text).collect();
        assert_eq!(names, ["libaio1", "liba", "seabios", "libc6"]);
    }

    #[test]
    fn what_is_installed_is_known() {
        let wanted = ["dpkg".to_owned(), "sterna-no-such-package".to_owned()];
        assert_eq!(not_installed(&wanted).unwrap(), ["sterna-no-such-package"]);
    }

    #[test]
    fn a_version_that_nobody_offers_is_named() {
        let dir = LabDir::open().unwrap();
        let error = Sources::of_the_machine(&dir).pin("dpkg", "99:99").unwrap_err();
        assert!(error.to_string().contains("dpkg 99:99"), "{error}");
    }
}
