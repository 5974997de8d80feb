//! Real QEMUs for tests: found, started with a tiny guest, and killed in the end.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses its own part of this, and a test may panic"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sterna_vmm::qemu::{Exit, Launch, Qemu, User};
use sterna_vmm::{Layout, ProcessId, Vmm};
use tempfile::TempDir;

/// Long enough for a loaded machine; no test measures time.
pub(crate) const WITHIN: Duration = Duration::from_secs(30);
/// Where the guest counts its loops.
const LOOPS: u64 = 0x8000;
/// Where the guest counts its boots.
const BOOTS: u64 = 0x8004;

/// A boot sector that counts its boots, then loops, counting.
const BOOT_SECTOR: [u8; 16] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x66, 0xff, 0x06, 0x04, 0x80, // inc dword [0x8004]
    0x66, 0xff, 0x06, 0x00, 0x80, // inc dword [0x8000]
    0xeb, 0xf9, // jmp to the second inc
];

/// The QEMUs that everything is tried on.
pub(crate) fn versions() -> Vec<PathBuf> {
    let on_path = || {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&folders)
            .map(|folder| folder.join("qemu-system-x86_64"))
            .find(|file| file.is_file())
    };
    let find = |variable: &str| {
        std::env::var_os(variable).map(PathBuf::from).or_else(on_path).unwrap_or_else(|| {
            panic!(
                "no QEMU: set {variable} to a qemu-system-x86_64, or install one on the PATH; \
                 `cargo xtask test` does it all"
            )
        })
    };
    let mut found = vec![find("STERNA_QEMU_72"), find("STERNA_QEMU_10")];
    found.dedup();
    found
}

/// A folder with a disk that both ends see.
pub(crate) struct Stage {
    pub(crate) folder: TempDir,
    pub(crate) binary: PathBuf,
}

/// A running QEMU that does not survive its test.
pub(crate) struct Vm {
    pub(crate) qemu: Qemu,
    pub(crate) exit: Exit,
    pub(crate) run_dir: PathBuf,
    pub(crate) log: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.process().kill();
        let _ = self.exit.wait(WITHIN);
    }
}

impl Stage {
    pub(crate) fn new(binary: &Path) -> Self {
        let stage = Self { folder: tempfile::tempdir().unwrap(), binary: binary.to_owned() };
        let disk = File::create(stage.disk()).unwrap();
        disk.set_len(1 << 20).unwrap();
        disk.write_all_at(&BOOT_SECTOR, 0).unwrap();
        disk.write_all_at(&[0x55, 0xaa], 510).unwrap();
        stage
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.path().join("disk.raw")
    }

    pub(crate) fn disk_args(&self) -> Vec<String> {
        vec!["-drive".into(), format!("file={},format=raw,if=virtio,id=d0", self.disk().display())]
    }

    /// The user's own command line.
    pub(crate) fn argv(&self, extra: &[&str]) -> Vec<String> {
        let mut argv = vec![self.binary.to_str().unwrap().to_owned()];
        argv.extend(["-accel", "tcg", "-nodefaults", "-display", "none", "-m", "64"].map(str::to_owned));
        argv.extend(extra.iter().map(|arg| (*arg).to_owned()));
        argv
    }

    pub(crate) fn launch(&self, name: &str, argv: Vec<String>, user: Option<User>) -> Launch {
        let run_dir = self.folder.path().join(name);
        let log = self.folder.path().join(format!("{name}.log"));
        Launch { argv, name: name.to_owned(), run_dir, log, cwd: None, user, memory: None }
    }

    /// Starts a line as it is, with the QMP socket added.
    pub(crate) fn start(&self, name: &str, mut argv: Vec<String>) -> Vm {
        let socket = self.folder.path().join(name).join("qmp.sock");
        argv.extend([
            "-chardev".into(),
            format!("socket,id=sterna-qmp,path={},server=on,wait=off", socket.display()),
            "-mon".into(),
            "chardev=sterna-qmp,mode=control".into(),
        ]);
        self.start_launch(&self.launch(name, argv, None))
    }

    pub(crate) fn start_launch(&self, launch: &Launch) -> Vm {
        let started = launch.start(WITHIN).unwrap_or_else(|error| panic!("{}", chain(&error)));
        Vm {
            qemu: started.qemu,
            exit: started.exit,
            run_dir: launch.run_dir.clone(),
            log: launch.log.clone(),
        }
    }

    /// A VM that counts, from the disk of the stage.
    pub(crate) fn source(&self, extra: &[&str]) -> Vm {
        let mut argv = self.argv(extra);
        argv.extend(self.disk_args());
        self.start("source", argv)
    }

    /// A QEMU that waits to become that VM.
    pub(crate) fn target(&self, name: &str, extra: &[&str]) -> Vm {
        let mut argv = self.argv(extra);
        argv.extend(self.disk_args());
        argv.extend(["-incoming", "defer", "-S"].map(str::to_owned));
        self.start(name, argv)
    }
}

impl Vm {
    pub(crate) fn id(&self) -> ProcessId {
        self.qemu.process_id()
    }

    fn counter(&mut self, at: u64) -> u32 {
        let base = self.qemu.layout().unwrap().block("pc.ram").unwrap().hva.unwrap();
        let mut bytes = [0; 4];
        memory(self.id()).read_exact_at(&mut bytes, base + at).unwrap();
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn loops(&mut self) -> u32 {
        self.counter(LOOPS)
    }

    pub(crate) fn boots(&mut self) -> u32 {
        self.counter(BOOTS)
    }

    /// Sets the count of boots to none.
    pub(crate) fn forget_boots(&mut self) {
        let base = self.qemu.layout().unwrap().block("pc.ram").unwrap().hva.unwrap();
        memory(self.id()).write_all_at(&[0; 4], base + BOOTS).unwrap();
    }

    /// Waits until the guest has booted so many times and counts.
    pub(crate) fn wait_for_boot(&mut self, boots: u32) {
        eventually("the guest boots", || self.boots() == boots);
        let before = self.loops();
        eventually("the guest counts", || self.loops() != before);
    }

    /// Descriptors of the process, by what they lead to.
    pub(crate) fn descriptors(&self) -> Vec<String> {
        let listed = fs::read_dir(format!("/proc/{}/fd", self.id().pid)).unwrap().flatten();
        let links = listed.filter_map(|entry| fs::read_link(entry.path()).ok());
        links.map(|link| link.to_string_lossy().into_owned()).collect()
    }
}

/// Copies every block that has an address at both ends, holes included: for tests this is fast enough.
pub(crate) fn copy_ram(source: &mut Vm, target: &mut Vm) {
    copy_blocks(source, target, |_| true);
}

pub(crate) fn copy_blocks(source: &mut Vm, target: &mut Vm, wanted: impl Fn(&str) -> bool) {
    let (from, to): (Layout, Layout) = (source.qemu.layout().unwrap(), target.qemu.layout().unwrap());
    let (read, write) = (memory(source.id()), memory(target.id()));
    for block in from.blocks.iter().filter(|block| wanted(&block.name)) {
        let twin = to.block(&block.name).unwrap_or_else(|| panic!("no block {} at the target", block.name));
        assert_eq!(twin.bytes, block.bytes, "{}", block.name);
        if let (Some(from), Some(to)) = (block.hva, twin.hva) {
            let mut bytes = vec![0; usize::try_from(block.bytes).unwrap()];
            read.read_exact_at(&mut bytes, from).unwrap();
            write.write_all_at(&bytes, to).unwrap();
        }
    }
}

fn memory(id: ProcessId) -> File {
    File::options().read(true).write(true).open(format!("/proc/{}/mem", id.pid)).unwrap()
}

pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + WITHIN;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {WITHIN:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn is_alive(id: ProcessId) -> bool {
    id.open().is_ok_and(|process| process.is_alive())
}

/// An error with everything that caused it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}
