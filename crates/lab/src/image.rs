//! The guests' initramfs: busybox, Redis with its libraries, our static programs, and the few kernel modules they need.
//!
//! It is not compressed: an emulated CPU unpacks it in no time, and inflating would cost more than reading. The same
//! input gives the same bytes, so two hosts that build it boot the same image.

mod cpio;
mod modules;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::packages::{Kernel, Servers};
use crate::place::{LabDir, replace, workspace};
use crate::{LabError, Packages, run};
use cpio::Archive;

/// Our programs that run inside guests.
const PROGRAMS: &[&str] = &["load", "beacon", "game", "sterna-guest"];
/// A cold build compiles the standard library's few dependencies on a loaded machine.
const BUILD: Duration = Duration::from_secs(600);
/// Modules whose devices the lab's guests may have; what these need is found.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_net",
    "virtio_blk",
    "virtio_balloon",
    "virtio_console",
    "pvpanic-mmio",
];
/// The same for guests with every kind of device, whose kernel has drivers for them.
const EVERY_MODULE: &[&str] = &[
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_balloon",
    "virtio_scsi",
    "sd_mod",
    "virtio_console",
    "virtio_rng",
    "virtio_gpu",
    "xhci_pci",
    "usbhid",
    "hid_generic",
    "evdev",
    "e1000e",
    "ahci",
];
/// What `init.sh` and `use.sh` call, and what a person at the console misses first.
const APPLETS: &[&str] = &[
    "sh", "mount", "cat", "cut", "echo", "free", "grep", "insmod", "ip", "ls", "nc", "poweroff", "printf",
    "ps", "reboot", "sleep", "tr", "usleep", "dd", "md5sum", "ping", "kill", "dmesg", "mkdir", "sync",
    "true", "test", "head", "tail", "blockdev", "cmp", "seq",
];
/// The first process.
const INIT: &str = include_str!("init.sh");
/// Uses all devices.
const USE: &str = include_str!("use.sh");

/// What the web server does.
const WEB: &str = include_str!("nginx.conf");
/// What it serves as `/file`: an emulated processor sends some hundreds of these each second.
const WEB_FILE_BYTES: usize = 64 << 10;
/// And as `/large`: the file of Clark et al., NSDI 2005.
const WEB_LARGE_FILE_BYTES: usize = 512 << 10;

/// Builds the guest programs and the image, and returns the image's path. Does nothing anew when nothing changed.
pub fn build(dir: &LabDir, packages: &Packages) -> Result<PathBuf, LabError> {
    build_as(dir, packages, "initramfs.cpio", &packages.modules, MODULES, None)
}

/// The same with a web server and iperf3 in it, which every other guest would only carry in its memory.
pub fn build_with_servers(dir: &LabDir, packages: &Packages, servers: &Servers) -> Result<PathBuf, LabError> {
    build_as(dir, packages, "initramfs-servers.cpio", &packages.modules, MODULES, Some(servers))
}

/// The same for a kernel with drivers for every device.
pub fn build_with_every_driver(
    dir: &LabDir,
    packages: &Packages,
    kernel: &Kernel,
) -> Result<PathBuf, LabError> {
    build_as(dir, packages, "initramfs-full.cpio", &kernel.modules, EVERY_MODULE, None)
}

fn build_as(
    dir: &LabDir,
    packages: &Packages,
    name: &str,
    tree: &Path,
    wanted: &[&str],
    servers: Option<&Servers>,
) -> Result<PathBuf, LabError> {
    let _one_at_a_time = dir.lock()?;
    let programs = guest_programs()?;
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "lib", "lib64", "modules", "proc", "sys", "tmp"] {
        archive.directory(directory);
    }
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("bin/use", 0o755, USE.as_bytes());
    archive.file("bin/busybox", 0o755, &read(&packages.busybox)?);
    APPLETS.iter().for_each(|a| archive.link(&format!("bin/{a}"), "busybox"));
    for program in PROGRAMS {
        archive.file(&format!("bin/{program}"), 0o755, &read(&programs.join(program))?);
    }
    let mut inside = BTreeSet::new();
    add_with_libraries(&mut archive, &mut inside, "bin/redis-server", &packages.redis_server)?;
    if let Some(servers) = servers {
        add_with_libraries(&mut archive, &mut inside, "bin/nginx", &servers.nginx)?;
        add_with_libraries(&mut archive, &mut inside, "bin/iperf3", &servers.iperf3)?;
        add_web(&mut archive);
    }
    add_modules(&mut archive, tree, wanted)?;
    let image = dir.join(name);
    replace(&image, &archive.finish(), 0o644)?;
    Ok(image)
}

/// Compiles the programs for guests, linked statically, and returns the directory in which they lie.
pub fn guest_programs() -> Result<PathBuf, LabError> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let root = workspace();
    let into = root.join("target/guest");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "sterna-guest",
        "--target",
        TARGET,
        "--target-dir",
    ]);
    // A libc of its own inside each: the guest has none. The flags replace what the caller's build uses.
    cargo
        .arg(&into)
        .current_dir(&root)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    run::output(&mut cargo, BUILD)?;
    Ok(into.join(TARGET).join("release"))
}

fn add_modules(archive: &mut Archive, tree: &Path, wanted: &[&str]) -> Result<(), LabError> {
    let mut order = String::new();
    for module in modules::in_order(tree, wanted)? {
        let name = format!("{}.ko", module.name);
        archive.file(&format!("modules/{name}"), 0o644, &module.content);
        order += &name;
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(())
}

/// A program and the libraries that it would load, each where it asks for it, unless it is `inside` already.
fn add_with_libraries(
    archive: &mut Archive,
    inside: &mut BTreeSet<PathBuf>,
    name: &str,
    program: &Path,
) -> Result<(), LabError> {
    archive.file(name, 0o755, &read(program)?);
    for library in libraries(program)? {
        let path = library.strip_prefix("/").unwrap_or(&library).to_owned();
        let parents: Vec<_> = path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).collect();
        for parent in parents.iter().rev() {
            if inside.insert(parent.to_path_buf()) {
                archive.directory(&parent.to_string_lossy());
            }
        }
        if inside.insert(path.clone()) {
            archive.file(&path.to_string_lossy(), 0o755, &read(&library)?);
        }
    }
    Ok(())
}

/// What the web server reads: whom it runs as, what it does, and the file that it serves.
fn add_web(archive: &mut Archive) {
    archive.directory("etc");
    archive.directory("www");
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file("etc/nginx.conf", 0o644, WEB.as_bytes());
    // Any content will do; it is the same in each image.
    for (name, bytes) in [("www/file", WEB_FILE_BYTES), ("www/large", WEB_LARGE_FILE_BYTES)] {
        let page: Vec<u8> = (0..bytes).map(|n| (n * 31 % 251) as u8).collect();
        archive.file(name, 0o644, &page);
    }
}

/// ldd(1) prints `name => /path (address)` or `/path (address)`; the vdso has no path.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, LabError> {
    let text = run::output(Command::new("ldd").arg(program), run::QUICK)?;
    if text.contains("not found") {
        return Err(LabError::unexpected(format!("libraries of {}", program.display()), text));
    }
    let path = |line: &str| line.split_whitespace().find(|w| w.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(path).collect())
}

fn read(path: &Path) -> Result<Vec<u8>, LabError> {
    std::fs::read(path).map_err(LabError::file("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(image: &Path) -> String {
        run::output(Command::new("busybox").args(["cpio", "-t", "-F"]).arg(image), run::QUICK).unwrap()
    }

    #[test]
    fn servers_bring_their_libraries_and_bring_them_once() {
        let dir = LabDir::open().unwrap();
        let packages = crate::packages::ensure(&dir).unwrap();
        let servers = crate::packages::servers(&dir).unwrap();
        let listing = listing(&build_with_servers(&dir, &packages, &servers).unwrap());
        for name in ["bin/nginx", "bin/iperf3", "bin/redis-server", "etc/nginx.conf", "www/file", "www/large"]
        {
            assert!(listing.lines().any(|l| l == name), "{name} is not in {listing}");
        }
        assert_eq!(listing.lines().filter(|l| l.ends_with("/libcrypto.so.3")).count(), 1, "{listing}");
    }

    #[test]
    fn the_image_has_all_parts_and_is_the_same_each_time() {
        let dir = LabDir::open().unwrap();
        let packages = crate::packages::ensure(&dir).unwrap();
        let image = build(&dir, &packages).unwrap();
        let first = read(&image).unwrap();
        let listing = listing(&image);
        for name in [
            "init",
            "bin/load",
            "bin/beacon",
            "bin/game",
            "bin/sterna-guest",
            "modules/virtio_console.ko",
            "bin/redis-server",
            "modules/virtio_net.ko",
            "modules/order",
        ] {
            assert!(listing.lines().any(|l| l == name), "{name} is not in {listing}");
        }
        let written = |p: &Path| std::fs::metadata(p).unwrap().modified().unwrap();
        let before = written(&image);
        build(&dir, &packages).unwrap();
        assert_eq!(read(&image).unwrap(), first);
        assert_eq!(written(&image), before);
    }
}
