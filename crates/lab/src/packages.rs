//! What the lab takes from Debian, and how it comes here.
//!
//! Two QEMUs stand side by side: 7.2 of Debian 12 and 10.0 of its backports. They are unpacked and not installed, since
//! the machine may hold a version of its own that conflicts with either; only the shared libraries that they ask for are
//! installed. The guests' kernel and the firmware are unpacked too: nothing here changes what the machine boots or runs.
//! Everything is fetched once into [`LabDir`]; later runs work without a network and take no time.

mod apt;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::place::{LabDir, replace};
use crate::{LabError, run};
use apt::Sources;

/// Packages that must be installed on the machine itself, beside the libraries that the two QEMUs ask for.
/// `redis-tools` has the server's program as well; the package `redis-server` would start a server on this machine.
const INSTALLED: &[&str] = &["busybox-static", "redis-tools", "qemu-utils", "iproute2", "util-linux"];
/// The parts of a QEMU that are unpacked, in the order of `apt-get download`.
const QEMU_PARTS: &[&str] =
    &["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios", "ipxe-qemu"];
/// Installed for the guests' servers and their clients, beside what the web server's program asks for.
const OF_SERVERS: &[&str] = &["iperf3", "wrk"];
/// Asked for by the web server's package and of no use where it is only unpacked.
const NOT_OF_SERVERS: &[&str] = &["nginx-common"];
/// Raise it when the unpacking changes, so that old directories are made anew.
const RECIPE: &str = "1";
/// Unpacking the largest package takes 2 s.
const UNPACK: Duration = Duration::from_secs(300);

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Packages {
    /// Starts QEMU 7.2, the version of Debian 12.
    pub qemu_72: PathBuf,
    /// Starts QEMU 10.0, the version of Debian 12's backports.
    pub qemu_10: PathBuf,
    /// The guests' kernel image.
    pub kernel: PathBuf,
    /// The kernel's modules: a directory below which `kernel/drivers/...` lies.
    pub modules: PathBuf,
    /// UEFI firmware, code part, to be mapped read-only.
    pub ovmf_code: PathBuf,
    /// UEFI firmware, template of the variables.
    pub ovmf_vars: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// The Redis server.
    pub redis_server: PathBuf,
}

/// Fetches, unpacks and installs whatever is missing. Takes a few milliseconds when nothing is.
pub fn ensure(dir: &LabDir) -> Result<Packages, LabError> {
    let _one_at_a_time = dir.lock()?;
    let stock = Sources::of_the_machine(dir);
    let old = qemu(dir, &stock, "7.2", "1:7.2")?;
    let new = qemu(dir, &Sources::backports(dir), "10.0", "1:10.0")?;
    let kernel = kernel(dir, &stock, "kernel", "linux-image-cloud-amd64")?;
    let ovmf = dir.once("ovmf", RECIPE, |to| stock.unpack(&["ovmf".into()], to))?;
    install(&stock, &[&old, &new])?;
    let packages = Packages {
        qemu_72: wrapper(dir, &old, "7.2")?,
        qemu_10: wrapper(dir, &new, "10.0")?,
        kernel: only_entry(&kernel.join("boot"), "vmlinuz-")?,
        modules: only_entry(&kernel.join("lib/modules"), "")?,
        ovmf_code: ovmf.join("usr/share/OVMF/OVMF_CODE.fd"),
        ovmf_vars: ovmf.join("usr/share/OVMF/OVMF_VARS.fd"),
        busybox: "/bin/busybox".into(),
        redis_server: "/usr/bin/redis-check-rdb".into(),
    };
    packages.check()?;
    Ok(packages)
}

/// A kernel and its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The image.
    pub image: PathBuf,
    /// A directory below which `kernel/drivers/...` lies.
    pub modules: PathBuf,
}

/// Debian's kernel for any machine, for guests with devices that the one for clouds has no drivers for. It boots slower.
pub fn every_driver(dir: &LabDir) -> Result<Kernel, LabError> {
    let _one_at_a_time = dir.lock()?;
    let root = kernel(dir, &Sources::of_the_machine(dir), "kernel-full", "linux-image-amd64")?;
    Ok(Kernel {
        image: only_entry(&root.join("boot"), "vmlinuz-")?,
        modules: only_entry(&root.join("lib/modules"), "")?,
    })
}

/// Servers for guests; their clients are installed with them.
#[derive(Debug, Clone)]
pub struct Servers {
    /// The web server nginx.
    pub nginx: PathBuf,
    /// iperf3, which is its own client.
    pub iperf3: PathBuf,
}

/// Fetches what only guests with servers need. The web server is unpacked: its package would start one on this machine.
pub fn servers(dir: &LabDir) -> Result<Servers, LabError> {
    let _one_at_a_time = dir.lock()?;
    let sources = Sources::of_the_machine(dir);
    let nginx = dir.once("nginx", RECIPE, |to| {
        sources.refresh()?;
        sources.unpack(&["nginx".into()], to)
    })?;
    let depends = nginx.join("depends");
    let text = std::fs::read_to_string(&depends).map_err(LabError::file("read", &depends))?;
    let wanted = apt::packages_of(&text).filter(|p| !NOT_OF_SERVERS.contains(&p.as_str()));
    install_missing(&sources, OF_SERVERS.iter().map(|p| (*p).to_owned()).chain(wanted).collect())?;
    let servers = Servers { nginx: nginx.join("usr/sbin/nginx"), iperf3: "/usr/bin/iperf3".into() };
    all_there(&[&servers.nginx, &servers.iperf3])?;
    Ok(servers)
}

impl Packages {
    /// Every file is there: a package that changed its layout is found here and not in the middle of a test.
    fn check(&self) -> Result<(), LabError> {
        let files = [
            &self.qemu_72,
            &self.qemu_10,
            &self.kernel,
            &self.modules,
            &self.ovmf_code,
            &self.ovmf_vars,
            &self.busybox,
            &self.redis_server,
        ];
        all_there(&files)
    }
}

fn all_there(files: &[&PathBuf]) -> Result<(), LabError> {
    match files.iter().find(|f| !f.exists()) {
        Some(missing) => Err(LabError::unexpected(
            "not where its package should have put it",
            missing.display().to_string(),
        )),
        None => Ok(()),
    }
}

fn qemu(dir: &LabDir, sources: &Sources, version: &str, prefix: &str) -> Result<PathBuf, LabError> {
    dir.once(&format!("qemu-{version}"), RECIPE, |to| {
        sources.refresh()?;
        let wanted =
            QEMU_PARTS.iter().map(|part| sources.part(part, prefix)).collect::<Result<Vec<_>, _>>()?;
        sources.unpack(&wanted, to)
    })
}

fn kernel(dir: &LabDir, sources: &Sources, name: &str, package: &str) -> Result<PathBuf, LabError> {
    dir.once(name, RECIPE, |to| {
        sources.refresh()?;
        let image = sources.dependency(package, "linux-image-")?;
        sources.unpack(&[image], to)
    })
}

/// Installs missing packages as root; says exactly which are missing otherwise.
fn install(sources: &Sources, qemus: &[&PathBuf]) -> Result<(), LabError> {
    let mut wanted: Vec<String> = INSTALLED.iter().map(|p| (*p).to_owned()).collect();
    for qemu in qemus {
        let depends = qemu.join("depends");
        let text = std::fs::read_to_string(&depends).map_err(LabError::file("read", &depends))?;
        wanted.extend(apt::packages_of(&text).filter(|p| !QEMU_PARTS.contains(&p.as_str())));
    }
    install_missing(sources, wanted)
}

fn install_missing(sources: &Sources, mut wanted: Vec<String>) -> Result<(), LabError> {
    wanted.sort();
    wanted.dedup();
    let missing = apt::not_installed(&wanted)?;
    if missing.is_empty() { Ok(()) } else { sources.install(missing) }
}

/// A script that starts an unpacked QEMU. 7.2 finds its firmware beside itself, 10.0 does not: both are told.
fn wrapper(dir: &LabDir, root: &Path, version: &str) -> Result<PathBuf, LabError> {
    let root = root.display();
    let script = format!(
        "#!/bin/sh\n# QEMU {version}, unpacked from its Debian packages.\n\
         export QEMU_MODULE_DIR={root}/usr/lib/x86_64-linux-gnu/qemu\n\
         exec {root}/usr/bin/qemu-system-x86_64 -L {root}/usr/share/qemu -L {root}/usr/share/seabios \
         -L {root}/usr/lib/ipxe/qemu \"$@\"\n"
    );
    let path = dir.join(format!("bin/qemu-{version}"));
    replace(&path, script.as_bytes(), 0o755)?;
    // The same under the name that people type: put the directory first on PATH.
    replace(&dir.join(format!("bin/{version}/qemu-system-x86_64")), script.as_bytes(), 0o755)?;
    Ok(path)
}

fn only_entry(dir: &Path, prefix: &str) -> Result<PathBuf, LabError> {
    let entries = std::fs::read_dir(dir).map_err(LabError::file("list", dir))?;
    let mut found = entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(prefix));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one.path()),
        _ => Err(LabError::unexpected(
            format!("expected one entry `{prefix}*` in {}", dir.display()),
            "none or several",
        )),
    }
}

/// The versions of both QEMUs in their own words, for reports.
pub fn qemu_version(program: &Path) -> Result<String, LabError> {
    let text = run::output(std::process::Command::new(program).arg("--version"), run::QUICK)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_run_and_a_second_time_needs_nothing() {
        let dir = LabDir::open().unwrap();
        let packages = ensure(&dir).unwrap();
        assert!(qemu_version(&packages.qemu_72).unwrap().contains("version 7.2"));
        assert!(qemu_version(&packages.qemu_10).unwrap().contains("version 10.0"));
        let stamp = |p: &str| std::fs::metadata(dir.join(p)).unwrap().modified().unwrap();
        let before = (stamp("qemu-7.2/.recipe"), stamp("qemu-10.0/.recipe"), stamp("kernel/.recipe"));
        ensure(&dir).unwrap();
        assert_eq!(before, (stamp("qemu-7.2/.recipe"), stamp("qemu-10.0/.recipe"), stamp("kernel/.recipe")));
    }
}
