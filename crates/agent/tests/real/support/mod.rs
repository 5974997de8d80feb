//! Two agents on loopback, and guests under their care.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]
#![allow(dead_code, reason = "each test file uses its own part of this")]

pub(crate) mod cage;
pub(crate) mod daemon;
pub(crate) mod hold;
pub(crate) mod holdings;
pub(crate) mod pair;
pub(crate) mod proxy;
pub(crate) mod scene;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use sterna_agent::model::{MigrateRequest, MigrationView, RunRequest, VmView};
use sterna_agent::{Agent, Config, Mechanism};
use sterna_lab::guest::{Arrival, GuestSpec, HostSide, Program, Serial};
use sterna_lab::{LabDir, Packages, image, packages};
use sterna_transport::pki;

/// When a line is typed again that nothing came of.
const AGAIN: Duration = Duration::from_secs(10);
/// How long a guest may take to boot under TCG on a busy machine.
pub(crate) const BOOT: Duration = Duration::from_secs(120);
/// How long a migration of a test may take.
pub(crate) const MOVE: Duration = Duration::from_secs(120);

/// Bytes of a disk that nobody reads.
const IMAGE_BYTES: u64 = 1 << 20;

/// How often something is done: `short` in every run, `long` when `STERNA_LONG=1` asks for it (`cargo xtask test --long`).
pub(crate) fn count(short: u32, long: u32) -> u32 {
    match std::env::var("STERNA_LONG") {
        Ok(wanted) if wanted == "1" => long,
        _ => short,
    }
}

/// What guests are made of.
pub(crate) struct Parts {
    pub(crate) packages: Packages,
    pub(crate) initramfs: PathBuf,
}

impl Parts {
    pub(crate) fn find() -> Self {
        let dir = LabDir::open().unwrap();
        let packages = packages::ensure(&dir).expect("`cargo xtask test` fetches what guests are made of");
        let initramfs = image::build(&dir, &packages).unwrap();
        Self { packages, initramfs }
    }

    pub(crate) fn qemu(&self, version: &str) -> PathBuf {
        match version {
            "7.2" => self.packages.qemu_72.clone(),
            _ => self.packages.qemu_10.clone(),
        }
    }

    /// One whose pages no other test's kernel merging touches: what is counted of it is its own.
    pub(crate) fn guest(&self, name: &str) -> GuestSpec {
        GuestSpec { mergeable: false, ..self.mergeable_guest(name) }
    }

    /// As QEMU makes it: the kernel looks through all of these, whenever it merges pages.
    pub(crate) fn mergeable_guest(&self, name: &str) -> GuestSpec {
        GuestSpec::plain(name, 192, &self.packages.kernel, &self.initramfs)
    }
}

/// A folder with keys, and agents `a` and `b` in it.
pub(crate) struct World {
    pub(crate) parts: Parts,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) user: Option<String>,
    /// Where `a` looks for `b`, if not where it is.
    pub(crate) b_as_seen_from_a: Option<String>,
    /// The image of the scene's guest's disk, if it has one.
    pub(crate) image: Option<PathBuf>,
    /// Where `b` looks for `a`, if not where it is.
    pub(crate) a_as_seen_from_b: Option<String>,
    /// The only QEMU that `b` may start, if it is another one than `a`'s.
    pub(crate) qemu_at_b: Option<PathBuf>,
    /// Further entries of `b`'s map of paths.
    pub(crate) paths_at_b: Vec<(PathBuf, PathBuf)>,
    pub(crate) version: String,
    /// What the agents do without.
    pub(crate) without: Vec<Mechanism>,
    /// The most runs of pages in common that `b` maps, if it is limited.
    pub(crate) max_runs_at_b: Option<u32>,
    /// The hosts whose page streams leave TLS.
    pub(crate) clear: Vec<&'static str>,
    ports: [u16; 2],
}

impl World {
    pub(crate) fn new(version: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // QEMUs of other users reach their sockets through it.
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        pki::init(&folder.path().join("pki"), "test").unwrap();
        for host in ["a", "b"] {
            pki::issue(&folder.path().join("pki"), host, &[]).unwrap();
        }
        Self {
            parts: Parts::find(),
            folder,
            user: None,
            b_as_seen_from_a: None,
            image: None,
            a_as_seen_from_b: None,
            qemu_at_b: None,
            paths_at_b: Vec::new(),
            version: version.into(),
            without: Vec::new(),
            max_runs_at_b: None,
            clear: Vec::new(),
            ports: [free_port(), free_port()],
        }
    }

    /// A world whose host `b` has a QEMU of the same file name, which adds to its command line what
    /// [`World::set_wrapper`] says.
    pub(crate) fn with_wrapped_qemu_at_b(version: &str) -> Self {
        let mut world = Self::new(version);
        let (real, folder) = (world.parts.qemu(version), world.path("wrapped"));
        std::fs::create_dir(&folder).unwrap();
        let wrapper = folder.join(real.file_name().unwrap());
        let mode = world.path("mode");
        let script = format!("#!/bin/sh\n. {}\nexec {} \"$@\" $EXTRA\n", mode.display(), real.display());
        std::fs::write(&wrapper, script).unwrap();
        std::fs::set_permissions(&wrapper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        world.set_wrapper("EXTRA=\n");
        world.qemu_at_b = Some(wrapper);
        world
    }

    /// Shell lines that the wrapper runs before QEMU; they set `EXTRA`.
    pub(crate) fn set_wrapper(&self, lines: &str) {
        std::fs::write(self.path("mode"), lines).unwrap();
    }

    /// Gives the scene's guest a disk. Nobody reads it: its lock counts, which the QEMU that runs the guest has.
    pub(crate) fn add_disk(&mut self) {
        let image = self.path("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
        self.image = Some(image);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn config(&self, name: &str) -> String {
        let (dir, pki) = (self.path(name), self.path("pki"));
        let elsewhere = self.qemu_at_b.clone().filter(|_| name == "b");
        let qemu = elsewhere.unwrap_or_else(|| self.parts.qemu(&self.version));
        let a = self.a_as_seen_from_b.clone().filter(|_| name == "b");
        let b = self.b_as_seen_from_a.clone().filter(|_| name == "a");
        let user = self.user.as_ref().map(|user| format!("user = {user:?}\n")).unwrap_or_default();
        let lab = LabDir::open().unwrap().join("");
        let listen = self.ports[usize::from(name == "b")];
        format!(
            "name = {name:?}\nstate-dir = \"{dir}/state\"\nrun-dir = \"{dir}/run\"\nlisten = \"127.0.0.1:{listen}\"\n\
             attach-helper = {helper:?}\n\
             [tls]\nca = \"{pki}/ca.crt\"\ncert = \"{pki}/{name}.crt\"\nkey = \"{pki}/{name}.key\"\n{clear}\
             [hosts.a]\naddress = \"{a}\"\n[hosts.b]\naddress = \"{b}\"\n\
             [map.binaries]\n{binaries}\n[map.paths]\n{map}\n[qemu]\nbinaries = [{qemu:?}]\npath-roots = [{folder:?}, {lab:?}, \"/dev/shm\"]\n{user}{sharing}",
            dir = dir.display(),
            pki = pki.display(),
            sharing = match self.max_runs_at_b.filter(|_| name == "b") {
                Some(runs) => format!("[sharing]\nmax-runs = {runs}\n"),
                None => String::new(),
            },
            clear = if self.clear.contains(&name) { "page-streams = \"clear\"\n" } else { "" },
            a = a.unwrap_or_else(|| self.address("a")),
            b = b.unwrap_or_else(|| self.address("b")),
            folder = self.folder.path(),
            helper = helper(),
            map = self.map(name),
            binaries = self.binaries(name),
        )
    }

    /// Where a host's agent listens for peers.
    pub(crate) fn address(&self, name: &str) -> String {
        format!("127.0.0.1:{}", self.ports[usize::from(name == "b")])
    }

    /// Sockets have another folder at `b`: a QEMU that ends removes its own.
    fn map(&self, name: &str) -> String {
        std::fs::create_dir_all(self.path("sockets-a")).unwrap();
        std::fs::create_dir_all(self.path("sockets-b")).unwrap();
        match name {
            "b" => {
                let sockets = (self.path("sockets-a"), self.path("sockets-b"));
                let pairs = std::iter::once(&sockets).chain(&self.paths_at_b);
                pairs.map(|(from, to)| format!("{from:?} = {to:?}\n")).collect()
            }
            _ => String::new(),
        }
    }

    /// A QEMU of another name at `b` stands there for `a`'s, and the other way round.
    fn binaries(&self, name: &str) -> String {
        let (at_a, at_b) = (self.parts.qemu(&self.version), self.qemu_at_b.clone());
        let file = |path: &Path| path.file_name().unwrap().to_owned();
        match at_b.filter(|at_b| name == "b" && file(at_b) != file(&at_a)) {
            Some(at_b) => format!("{:?} = {at_b:?}", file(&at_a)),
            None => String::new(),
        }
    }

    /// The QMP connection that the user's own command line asks for, at this host.
    pub(crate) fn qmp(&self, host: &str, guest: &str) -> sterna_lab::qmp::Qmp {
        let path = self.path(&format!("sockets-{host}")).join(format!("{guest}.qmp"));
        sterna_lab::qmp::Qmp::connect(&path, BOOT).unwrap()
    }

    pub(crate) fn agent(&self, name: &str) -> Arc<Agent> {
        let path = self.path(&format!("{name}.toml"));
        std::fs::write(&path, self.config(name)).unwrap();
        let config = Config::load(&path).unwrap();
        Agent::start(self.without.iter().fold(config, |config, &mechanism| config.without(mechanism)))
            .unwrap()
    }

    /// The agent of a host with something switched off.
    pub(crate) fn agent_without(&self, name: &str, mechanism: Mechanism) -> Arc<Agent> {
        let path = self.path(&format!("{name}.toml"));
        std::fs::write(&path, self.config(name)).unwrap();
        Agent::start(Config::load(&path).unwrap().without(mechanism)).unwrap()
    }

    pub(crate) fn serial(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.serial"))
    }

    pub(crate) fn argv(&self, guest: &GuestSpec) -> Vec<String> {
        let serial = Serial::File(self.serial(&guest.name));
        // QEMU of another user may append to it.
        let file =
            std::fs::OpenOptions::new().create(true).append(true).open(self.serial(&guest.name)).unwrap();
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        let qmp = Some(self.path("sockets-a").join(format!("{}.qmp", guest.name)));
        let side = HostSide { tap: None, serial, qmp, arrival: Arrival::Boot };
        let mut argv = vec![self.parts.qemu(&self.version).display().to_string()];
        argv.extend(guest.arguments(&side));
        argv
    }

    /// The same with a console that takes orders: see [`World::order`].
    pub(crate) fn argv_with_orders(&self, guest: &GuestSpec) -> Vec<String> {
        let (log, socket) = (self.serial(&guest.name), self.console_socket("a", &guest.name));
        let socket = format!(
            "socket,id=console,path={},server=on,wait=off,logfile={},logappend=on",
            socket.display(),
            log.display()
        );
        let change = |argument: String| match argument.starts_with("file,id=console,") {
            true => socket.clone(),
            false => argument,
        };
        self.argv(guest).into_iter().map(change).collect()
    }

    fn console_socket(&self, host: &str, guest: &str) -> PathBuf {
        self.path(&format!("sockets-{host}")).join(format!("{guest}.console"))
    }

    /// Types a line at the guest's console, whose shell obeys.
    pub(crate) fn order(&self, host: &str, guest: &str, line: &str) {
        let echoed = self.type_line(host, guest, line, BOOT);
        assert!(echoed, "{guest} does not echo {line}:\n{}", tail(&self.console(guest)));
    }

    /// Types a line that may be obeyed twice until `look` sees what comes of it: a shell that has just ended a command throws away what was
    /// typed meanwhile.
    pub(crate) fn order_until<T>(
        &self,
        host: &str,
        guest: &str,
        line: &str,
        mut look: impl FnMut() -> Option<T>,
    ) -> T {
        let end = Instant::now() + BOOT;
        loop {
            self.type_line(host, guest, line, AGAIN);
            let until = Instant::now() + AGAIN;
            while Instant::now() < until {
                if let Some(seen) = look() {
                    return seen;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            assert!(Instant::now() < end, "{guest} does not obey {line}:\n{}", tail(&self.console(guest)));
        }
    }

    /// False if it is not echoed in this time.
    fn type_line(&self, host: &str, guest: &str, line: &str, within: Duration) -> bool {
        // The guest's echo shows that all of it has arrived; QEMU drops what is unread when we hang up.
        // What the guest prints meanwhile may come between any two characters of the echo.
        let before = self.console(guest).chars().count();
        let echoed = || holds_in_order(self.console(guest).chars().skip(before), line);
        let end = Instant::now() + within;
        let mut console = std::os::unix::net::UnixStream::connect(self.console_socket(host, guest)).unwrap();
        writeln!(console, "{line}").unwrap();
        while Instant::now() < end {
            if echoed() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    pub(crate) fn run(&self, agent: &Agent, guest: &GuestSpec) -> VmView {
        let request = RunRequest { name: guest.name.clone(), argv: self.argv(guest), template: None };
        agent.run(request).unwrap()
    }

    /// Starts a guest and waits until it says that it is ready.
    pub(crate) fn boot(&self, agent: &Agent, guest: &GuestSpec) {
        self.run(agent, guest);
        self.wait_for(&guest.name, "READY", BOOT);
    }

    pub(crate) fn console(&self, name: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.serial(name)).unwrap_or_default()).into_owned()
    }

    /// Waits until the console shows `word` once more than it does now.
    pub(crate) fn wait_for_more(&self, name: &str, word: &str, within: Duration) {
        let before = self.console(name).matches(word).count();
        let end = Instant::now() + within;
        while self.console(name).matches(word).count() <= before {
            assert!(
                Instant::now() < end,
                "no further {word:?} on the console:\n{}",
                tail(&self.console(name))
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until `look` says yes; shows the console of the guest named `vm` if it never does.
    pub(crate) fn wait_until(&self, what: &str, look: impl FnMut() -> bool) {
        self.wait_until_within(what, BOOT, look);
    }

    /// The same for guests that are slow.
    pub(crate) fn wait_until_within(&self, what: &str, within: Duration, mut look: impl FnMut() -> bool) {
        let end = Instant::now() + within;
        while !look() {
            assert!(Instant::now() < end, "not in {within:?}: {what}\n{}", tail(&self.console("vm")));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn wait_for(&self, name: &str, word: &str, within: Duration) {
        let end = Instant::now() + within;
        while !self.console(name).contains(word) {
            assert!(Instant::now() < end, "no {word:?} on the console:\n{}", tail(&self.console(name)));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for World {
    /// QEMUs outlive their agents, also those of a test that failed: each has this folder in its command line.
    fn drop(&mut self) {
        for pid in pids_naming(&self.folder.path().display().to_string()) {
            if let Ok(process) = sterna_memory::Process::open(pid) {
                drop(process.kill());
                process.wait_exit(MOVE);
            }
        }
    }
}

/// Processes that have `word` in their command lines.
pub(crate) fn pids_naming(word: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let names = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(word)
    };
    pids.filter(names).collect()
}

/// Memory that is filled and left alone.
pub(crate) fn idle() -> Program {
    Program::Load(vec!["--fill=64".into(), "--dirty=0".into(), "--check".into()])
}

/// A load that dirties `rate` MB/s of a 32 MB working set and checks every page for loss.
pub(crate) fn load(rate: u32) -> Program {
    Program::Load(vec!["--fill=64".into(), "--dirty=32".into(), format!("--rate={rate}"), "--check".into()])
}

pub(crate) fn request(vm: &str, host: &str) -> MigrateRequest {
    MigrateRequest { timeout: Some(30.0), verify: true, ..MigrateRequest::new(vm, host) }
}

/// Moves a VM and returns the last figures.
pub(crate) fn migrate(from: &Arc<Agent>, request: MigrateRequest) -> MigrationView {
    let id = from.migrate(request, None).unwrap().id;
    wait(from, &id)
}

pub(crate) fn wait(from: &Arc<Agent>, id: &str) -> MigrationView {
    let watch = from.watch(id).unwrap();
    let end = Instant::now() + MOVE;
    loop {
        let view = watch.borrow().clone();
        if matches!(view.status.as_str(), "completed" | "failed" | "cancelled") {
            // The source's last step is to free the VM.
            while from.vm(&view.vm).is_ok_and(|vm| vm.migration.is_some()) {
                assert!(Instant::now() < end);
                std::thread::sleep(Duration::from_millis(2));
            }
            return view;
        }
        assert!(Instant::now() < end, "the migration does not end: {view:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn helper() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let folder = exe.ancestors().find(|path| path.ends_with("debug") || path.ends_with("release"));
    folder.map(|path| path.join("sterna-attach")).filter(|path| path.is_file()).expect(
        "sterna-attach is not built; run `cargo build -p sterna-memory` first (`cargo xtask test` does)",
    )
}

/// A free port outside of the range that the kernel takes outgoing connections' from: a dead agent's port must stay free
/// until it is started again, however often its peer looks for it meanwhile.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let at = std::process::id().wrapping_mul(97).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 20_000 + (at % 12_000) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Whether a line's characters come one after another in a text, whatever is between them.
fn holds_in_order(mut text: impl Iterator<Item = char>, line: &str) -> bool {
    // A terminal breaks lines where it likes.
    let mut wanted = line.chars().filter(|letter| !letter.is_whitespace());
    wanted.all(|letter| text.any(|other| other == letter))
}

pub(crate) fn tail(text: &str) -> &str {
    let from = text.len().saturating_sub(2000);
    &text[(from..).find(|at| text.is_char_boundary(*at)).unwrap_or(0)..]
}

pub(crate) fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}
