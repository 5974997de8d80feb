//! Templates, their clones, and migrations of those that move only what they have written.

use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::images::qemu_img;
use crate::support::{BOOT, MOVE, World, idle, load, migrate, request};
use sterna_agent::Agent;
use sterna_agent::model::{MigrateRequest, MigrationView, RunRequest, TemplateRequest};
use sterna_lab::guest::{GuestSpec, Program};
use sterna_memory::{PAGE, PageRun, Process, Region, own};

/// Bytes of a guest's RAM, and pages.
pub(crate) const RAM: u64 = 192 << 20;

/// Two hosts, and template `web` on the first.
pub(crate) struct Scene {
    pub(crate) world: World,
    pub(crate) a: Arc<Agent>,
    pub(crate) b: Arc<Agent>,
}

impl Scene {
    pub(crate) fn new(version: &str, program: Program) -> Self {
        let world = World::new(version);
        let (a, b) = (world.agent("a"), world.agent("b"));
        let scene = Self { world, a, b };
        scene.make("web", |guest| GuestSpec { programs: vec![program], ..guest });
        scene
    }

    /// Boots a guest and makes a template of it.
    fn make(&self, name: &str, change: impl FnOnce(GuestSpec) -> GuestSpec) {
        let guest = change(self.world.parts.guest("golden"));
        let argv = self.world.argv(&guest);
        let clones = argv.iter().map(|argument| argument.replace("golden", "{vm}")).collect();
        self.a.run(RunRequest { name: "golden".into(), argv, template: None }).unwrap();
        let request =
            TemplateRequest { name: name.into(), vm: "golden".into(), end: false, argv: Some(clones) };
        self.a.check_template(&request).unwrap();
        // Not before its load has filled its memory.
        self.world.wait_for("golden", "LOAD t=", BOOT);
        let made = self.a.make_template(&request).unwrap();
        assert_eq!((made.name.as_str(), made.ram_bytes), (name, RAM));
        // The VM goes on.
        assert_eq!(self.a.vm("golden").unwrap().state, "running");
        self.a.stop("golden").unwrap();
    }

    /// Starts a clone; its console goes on from where the template was.
    pub(crate) fn clone_of(&self, template: &str, vm: &str) -> Duration {
        let began = Instant::now();
        let request = RunRequest { name: vm.into(), argv: Vec::new(), template: Some(template.into()) };
        let view = self.a.run(request).unwrap();
        let took = began.elapsed();
        assert_eq!((view.state.as_str(), view.template.as_deref()), ("running", Some(template)));
        took
    }

    pub(crate) fn moves(&self, from: &Arc<Agent>, to: &str, vm: &str) -> MigrationView {
        let view = migrate(from, MigrateRequest { timeout: Some(30.0), ..request(vm, to) });
        assert_eq!(view.status, "completed", "{view:?}");
        assert!(view.blocks_verified.is_some_and(|blocks| blocks >= 2), "{view:?}");
        view
    }

    pub(crate) fn lives(&self, vm: &str) {
        self.world.wait_for_more(vm, "LOAD", BOOT);
        assert!(!self.world.console(vm).contains("BAD"), "{}", self.world.console(vm));
    }
}

/// A clone's QEMU, the memory that it shares, and where it has it.
fn memory_of(agent: &Agent, vm: &str) -> (Process, Region, std::fs::File) {
    let pid = agent.vm(vm).unwrap().pid;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.contains("memfd:sterna-template")).expect("it is a clone");
    assert_eq!(line.split(' ').nth(1), Some("rw-p"), "copy-on-write");
    // It may be a piece of it: what the clone has in common with others lies between.
    let mut words = line.split(' ');
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let from = number(words.next().unwrap().split_once('-').unwrap().0);
    let region = Region { base: from - number(words.nth(1).unwrap()), bytes: RAM };
    let file = std::fs::File::options().read(true).write(true).open(format!("/proc/{pid}/fd/0")).unwrap();
    (Process::open(pid).unwrap(), region, file)
}

pub(crate) fn own_pages(agent: &Agent, vm: &str) -> u64 {
    let (process, region, _) = memory_of(agent, vm);
    let mut pages = Vec::new();
    own(&process, &region, &mut pages).unwrap();
    pages.iter().map(|run| run.pages).sum()
}

fn digest_of(file: &std::fs::File) -> blake3::Hash {
    let mut bytes = vec![0; RAM as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    blake3::hash(&bytes)
}

/// There, with the template sent before; back, where it is; and its sibling never notices.
fn clones_move_what_they_have_written(version: &str) {
    let scene = Scene::new(version, load(20));
    let took = scene.clone_of("web", "c0");
    scene.clone_of("web", "c1");
    println!("a clone runs after {took:?}");
    for vm in ["c0", "c1"] {
        scene.lives(vm);
    }
    let before = digest_of(&memory_of(&scene.a, "c1").2);
    let own = own_pages(&scene.a, "c0");
    assert!(own * PAGE < RAM / 2, "{own} pages are its own");

    let there = scene.moves(&scene.a, "b", "c0");
    println!("there: {:?}", there.ram);
    assert!(there.ram.template_bytes > 64 << 20, "the template went first: {there:?}");
    assert!(there.ram.template_pages * PAGE > 30 << 20, "{there:?}");
    scene.lives("c0");
    // It is a clone of the template there.
    let at_b = own_pages(&scene.b, "c0");
    assert!(at_b < own * 2, "{at_b} pages are its own at the target, {own} were");
    assert_eq!(scene.b.template("web").unwrap().digest, scene.a.template("web").unwrap().digest);
    assert_eq!(scene.b.vm("c0").unwrap().template.as_deref(), Some("web"));

    let back = scene.moves(&scene.b, "a", "c0");
    assert_eq!(back.ram.template_bytes, 0, "it is there: {back:?}");
    scene.lives("c0");
    scene.lives("c1");
    assert_eq!(before, digest_of(&memory_of(&scene.a, "c1").2), "nobody writes a template");
    for vm in ["c0", "c1"] {
        scene.a.stop(vm).unwrap();
    }
}

#[test]
fn clones_move_what_they_have_written_on_7_2() {
    clones_move_what_they_have_written("7.2");
}

#[test]
fn clones_move_what_they_have_written_on_10_0() {
    clones_move_what_they_have_written("10.0");
}

/// Post-copy of a clone: what it has written is fetched, all else is there.
fn clones_are_fetched(version: &str) {
    let scene = Scene::new(version, load(40));
    scene.clone_of("web", "c0");
    scene.lives("c0");
    type Change = fn(MigrateRequest) -> MigrateRequest;
    let ways: [(&str, Change); 2] = [
        ("at once", |request| MigrateRequest { postcopy: true, ..request }),
        ("after a round", |request| MigrateRequest {
            postcopy_after_precopy: true,
            max_bandwidth: Some(60_000_000),
            downtime_limit: 1,
            ..request
        }),
    ];
    for (way, change) in ways {
        for (from, to) in [(&scene.a, "b"), (&scene.b, "a")] {
            let own = own_pages(from, "c0");
            let view = migrate(from, MigrateRequest { timeout: None, ..change(request("c0", to)) });
            assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("completed", to), "{way}: {view:?}");
            assert!(view.postcopy.is_some() && view.notices.is_empty(), "{way}: {view:?}");
            assert!(view.blocks_verified.is_some_and(|blocks| blocks >= 1), "{way}: {view:?}");
            println!("{way}: {own} pages are its own, {:?} {:?}", view.downtime, view.ram);
            scene.lives("c0");
            assert!(view.ram.normal < own * 2, "{way}: {own} pages are its own: {view:?}");
        }
    }
    let own = own_pages(&scene.a, "c0");
    assert!(own * PAGE < RAM / 2, "it is a clone still: {own} pages are its own");
    scene.a.stop("c0").unwrap();
}

#[test]
fn clones_are_fetched_on_7_2() {
    clones_are_fetched("7.2");
}

#[test]
fn clones_are_fetched_on_10_0() {
    clones_are_fetched("10.0");
}

/// Most of what a clone has is its template's: it does not travel.
#[test]
fn a_clone_that_writes_nothing_sends_nearly_nothing() {
    let scene = Scene::new("7.2", idle());
    let pushed = scene
        .a
        .push_template("web", &sterna_agent::model::PushRequest { host: "b".into(), max_bandwidth: None })
        .unwrap();
    assert!(pushed.bytes > 64 << 20, "{pushed:?}");
    scene.clone_of("web", "c0");
    let view = scene.moves(&scene.a, "b", "c0");
    println!("{:?}", view.ram);
    assert_eq!(view.ram.template_bytes, 0);
    assert!(view.ram.transferred < 16 << 20, "{view:?}");
    assert!(view.ram.template_pages * PAGE > 100 << 20, "{view:?}");
    scene.b.stop("c0").unwrap();
}

/// What a balloon does: QEMU punches holes into the file behind the memory, which is the template. And a page that the guest has made
/// zero is not the template's at the target either.
#[test]
fn nobody_can_punch_holes_into_a_template() {
    let scene = Scene::new("7.2", idle());
    scene.clone_of("web", "c0");
    let (_, _, file) = memory_of(&scene.a, "c0");
    let before = digest_of(&file);
    let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    assert!(rustix::fs::fallocate(&file, hole, 0, RAM).is_err());
    assert!(file.write_all_at(&[1], 0).is_err() && file.set_len(0).is_err());
    assert_eq!(before, digest_of(&file));
    scene.clone_of("web", "c1");
    scene.lives_idle("c1");
    for vm in ["c0", "c1"] {
        scene.a.stop(vm).unwrap();
    }
}

impl Scene {
    /// A guest that writes nothing proves its memory when it is asked.
    fn lives_idle(&self, vm: &str) {
        assert_eq!(self.a.vm(vm).unwrap().state, "running");
        assert!(!self.world.console(vm).contains("BAD"));
    }
}

/// Pages that a clone has made zero, over a template that has content there.
#[test]
fn what_became_zero_is_zero_at_the_target() {
    let scene = Scene::new("7.2", idle());
    scene.clone_of("web", "c0");
    let (process, region, file) = memory_of(&scene.a, "c0");
    // In the place of the guest, for it has no reason to write there: the last page of the template's that has content.
    let mut page = vec![0; PAGE as usize];
    let last = (0..RAM / PAGE).rev().find(|at| {
        file.read_exact_at(&mut page, at * PAGE).unwrap();
        page.iter().any(|byte| *byte != 0)
    });
    let last = last.unwrap();
    let span = region.span(PageRun { first: last, pages: 1 });
    let memory = std::fs::File::options().write(true).open(format!("/proc/{}/mem", process.pid())).unwrap();
    memory.write_all_at(&vec![0; PAGE as usize], span.addr).unwrap();
    scene.moves(&scene.a, "b", "c0");
    let (process, region, _) = memory_of(&scene.b, "c0");
    let memory = std::fs::File::open(format!("/proc/{}/mem", process.pid())).unwrap();
    memory.read_exact_at(&mut page, region.base + last * PAGE).unwrap();
    assert_eq!(page, vec![0; PAGE as usize]);
    scene.b.stop("c0").unwrap();
}

/// A template that is damaged or another one is never used, and one that is used is not removed.
#[test]
fn a_template_is_what_its_digest_says() {
    let scene = Scene::new("7.2", idle());
    scene.clone_of("web", "c0");
    let refused = scene.a.remove_template("web").unwrap_err().to_string();
    assert!(refused.contains("c0"), "{refused}");
    let digest = scene.a.template("web").unwrap().digest;
    scene.moves(&scene.a, "b", "c0");
    scene.b.stop("c0").unwrap();

    // Another template of this name at the target.
    scene.b.remove_template("web").unwrap();
    let other = scene.world.path("a/state/templates");
    let there = scene.world.path("b/state/templates");
    let copy = |to: &str| {
        std::fs::create_dir_all(there.join(to)).unwrap();
        for file in ["manifest.json", "pages", "name"] {
            std::fs::copy(other.join(&digest).join(file), there.join(to).join(file)).unwrap();
        }
    };
    copy(&digest);
    let pages =
        std::fs::File::options().read(true).write(true).open(there.join(&digest).join("pages")).unwrap();
    pages.write_all_at(b"something else", 4096).unwrap();
    scene.clone_of("web", "c1");
    let view = migrate(&scene.a, request("c1", "b"));
    assert_eq!(view.status, "failed", "{view:?}");
    let told = format!("{:?} {:?}", view.error_desc, view.reasons);
    assert!(told.contains("digest"), "{told}");
    assert_eq!(scene.a.vm("c1").unwrap().state, "running");

    // A truncated one, and none: it is sent again.
    pages.set_len(4096).unwrap();
    let view = migrate(&scene.a, request("c1", "b"));
    assert_eq!(view.status, "failed", "{view:?}");
    std::fs::remove_dir_all(there.join(&digest)).unwrap();
    // The beginning came before: it is not sent again.
    let half = there.join(format!("{digest}.part"));
    std::fs::create_dir_all(&half).unwrap();
    let whole = std::fs::read(other.join(&digest).join("pages")).unwrap();
    std::fs::write(half.join("pages"), &whole[..whole.len() / 2]).unwrap();
    let view = scene.moves(&scene.a, "b", "c1");
    assert_eq!(view.ram.template_bytes, (whole.len() - whole.len() / 2) as u64);
    scene.b.stop("c1").unwrap();
    scene.a.remove_template("web").unwrap();
    assert!(scene.a.templates().is_empty());
}

/// A template of a peer's starts here in this host's words, and not at all with a program or a file that this host does not allow.
#[test]
fn what_a_peer_writes_into_a_template_is_not_trusted() {
    let scene = Scene::new("7.2", load(5));
    let push = sterna_agent::model::PushRequest { host: "b".into(), max_bandwidth: None };
    scene.a.push_template("web", &push).unwrap();
    let request =
        |template: &str| RunRequest { name: "c0".into(), argv: Vec::new(), template: Some(template.into()) };
    scene.b.run(request("web")).unwrap();
    scene.lives("c0");
    scene.b.stop("c0").unwrap();

    let there = scene.world.path("b/state/templates");
    let web = there.join(scene.b.template("web").unwrap().digest);
    assert_eq!(std::fs::read_to_string(web.join("origin")).unwrap(), "a");
    let manifest = std::fs::read_to_string(web.join("manifest.json")).unwrap();
    let qemu = scene.world.parts.qemu("7.2").display().to_string();
    let evil = manifest.replace(&qemu, "/bin/sh");
    assert_ne!(manifest, evil);
    let folder = there.join(blake3::hash(evil.as_bytes()).to_hex().as_str());
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("manifest.json"), &evil).unwrap();
    for (file, content) in [("name", "evil"), ("origin", "a")] {
        std::fs::write(folder.join(file), content).unwrap();
    }
    std::fs::copy(web.join("pages"), folder.join("pages")).unwrap();
    let why = scene.b.run(request("evil")).unwrap_err().to_string();
    assert!(why.contains("came from host a") && why.contains("/bin/sh"), "{why}");
}

/// A VM that cannot become a template says why, and runs on.
#[test]
fn what_cannot_be_a_template_says_why() {
    let world = World::new("7.2");
    let a = world.agent("a");
    let guest = GuestSpec {
        programs: vec![load(5)],
        extra: ["-device", "virtio-balloon-pci"].map(str::to_owned).to_vec(),
        ..world.parts.guest("vm")
    };
    world.boot(&a, &guest);
    let request = |name: &str| TemplateRequest { name: name.into(), vm: "vm".into(), end: false, argv: None };
    let why = a.make_template(&request("web")).unwrap_err().to_string();
    assert!(why.contains("balloon"), "{why}");
    assert!(a.make_template(&request("../web")).is_err());
    assert_eq!(a.vm("vm").unwrap().state, "running");
    world.wait_for_more("vm", "LOAD", MOVE);
    a.stop("vm").unwrap();
}

/// The golden guest, whose shell obeys, with a disk.
fn golden_with_disk(world: &World) -> Vec<String> {
    let disk = world.path("golden.qcow2").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", &disk, "32M"]);
    let mut argv =
        world.argv_with_orders(&GuestSpec { programs: vec![idle()], ..world.parts.guest("golden") });
    let drive = format!("file={disk},format=qcow2,if=none,id=d0");
    argv.extend(["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"].map(str::to_owned));
    argv
}

impl Scene {
    /// Has a guest write a word into a block of its disk.
    fn write_block(&self, host: &str, vm: &str, block: u32, word: &str) {
        let done = format!("WROTE-{block}-{word}");
        let line = format!(
            "printf %4096s {word} | dd of=/dev/vda bs=4096 seek={block} conv=notrunc,fsync 2>/dev/null; echo WROTE''-{block}-{word}"
        );
        self.world.order_until(host, vm, &line, || self.world.console(vm).contains(&done).then_some(()));
    }

    /// What a guest reads there.
    fn assert_block(&self, host: &str, vm: &str, block: u32, word: &str) {
        let line = format!(
            "echo 3 > /proc/sys/vm/drop_caches; echo READ''-{host}-{block}-$(dd if=/dev/vda bs=4096 skip={block} count=1 2>/dev/null | tr -d ' ')."
        );
        let found = self.world.order_until(host, vm, &line, || {
            let console = self.world.console(vm);
            let (_, after) = console.split_once(&format!("READ-{host}-{block}-"))?;
            Some(after.split_once('.')?.0.to_owned())
        });
        assert_eq!(found, word, "{vm} at {host}, block {block}");
    }

    fn image(&self, vm: &str) -> std::path::PathBuf {
        self.world.path(&format!("{vm}.qcow2"))
    }
}

/// Each clone finds on its disk what the template's VM has written, and writes into an image of its own, here and where it moves.
fn clones_write_disks_of_their_own(version: &str) {
    let world = World::new(version);
    let (a, b) = (world.agent("a"), world.agent("b"));
    let scene = Scene { world, a, b };
    let argv = golden_with_disk(&scene.world);
    let clones = argv.iter().map(|argument| argument.replace("golden", "{vm}")).collect();
    scene.a.run(RunRequest { name: "golden".into(), argv, template: None }).unwrap();
    scene.world.wait_for("golden", "READY", BOOT);
    scene.write_block("a", "golden", 0, "golden");
    let request = |end| TemplateRequest {
        name: "web".into(),
        vm: "golden".into(),
        end,
        argv: Some(Vec::clone(&clones)),
    };
    for refused in [scene.a.check_template(&request(false)), scene.a.make_template(&request(false)).map(drop)]
    {
        let why = refused.unwrap_err().to_string();
        assert!(why.contains("golden.qcow2") && why.contains("no --from"), "{why}");
    }
    scene.a.check_template(&request(true)).unwrap();
    assert_eq!(scene.a.vm("golden").unwrap().state, "running");
    let made = scene.a.make_template(&request(true)).unwrap();
    assert_eq!(made.disks, [scene.image("golden").display().to_string()]);
    assert!(scene.a.vm("golden").is_err(), "it would write on");
    let golden = std::fs::read(scene.image("golden")).unwrap();

    for vm in ["c0", "c1"] {
        scene.clone_of("web", vm);
        scene.assert_block("a", vm, 0, "golden");
        scene.write_block("a", vm, 1, vm);
    }
    for (host, from) in [("b", &scene.a), ("a", &scene.b)] {
        let view = scene.moves(from, host, "c0");
        println!("{:?}", view.ram);
        scene.assert_block(host, "c0", 0, "golden");
        scene.assert_block(host, "c0", 1, "c0");
        scene.write_block(host, "c0", 2, host);
    }
    scene.assert_block("a", "c1", 1, "c1");
    // The template went along, and has clones there too.
    let request = RunRequest { name: "c4".into(), argv: Vec::new(), template: Some("web".into()) };
    scene.b.run(request).unwrap();
    scene.assert_block("b", "c4", 0, "golden");
    scene.b.stop("c4").unwrap();
    for vm in ["c0", "c1"] {
        scene.a.stop(vm).unwrap();
        qemu_img(&["check", "-q", "-f", "qcow2", scene.image(vm).to_str().unwrap()]);
    }
    assert_eq!(golden, std::fs::read(scene.image("golden")).unwrap(), "what lies below was written");

    // What is there is somebody's.
    let run = |vm: &str| RunRequest { name: vm.into(), argv: Vec::new(), template: Some("web".into()) };
    let before = std::fs::read(scene.image("c0")).unwrap();
    let why = scene.a.run(run("c0")).unwrap_err().to_string();
    assert!(why.contains("c0.qcow2 is there already"), "{why}");
    assert_eq!(before, std::fs::read(scene.image("c0")).unwrap());
    // What fails leaves none.
    std::fs::create_dir(scene.world.path("sockets-a/c2.console")).unwrap();
    let why = scene.a.run(run("c2")).unwrap_err().to_string();
    assert!(!scene.image("c2").exists(), "{why}");
    // And what lies below is what the clones remember.
    std::fs::OpenOptions::new()
        .append(true)
        .open(scene.image("golden"))
        .unwrap()
        .write_all(&[0; 512])
        .unwrap();
    let why = scene.a.run(run("c3")).unwrap_err().to_string();
    assert!(why.contains("has been written since") && !scene.image("c3").exists(), "{why}");
}

#[test]
fn clones_write_disks_of_their_own_on_7_2() {
    clones_write_disks_of_their_own("7.2");
}

#[test]
fn clones_write_disks_of_their_own_on_10_0() {
    clones_write_disks_of_their_own("10.0");
}
