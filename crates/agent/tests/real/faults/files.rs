//! State files that are torn, gone, old, of another VM, or of another boot. Whatever an agent finds, it starts, says what
//! it found, resumes nothing that may run elsewhere, and ends nothing by mistake.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command};

use serde_json::{Value, json};
use sterna_memory::Process;

use super::{slow, wait_active};
use crate::support::daemon::Daemon;
use crate::support::scene::{AT_REST, Scene, guest, to_the_other, until};
use crate::support::{World, exists};

/// Bytes of a slot in a record's file: there are two.
const SLOT_BYTES: usize = 512;
/// Identity of a migration that the tests make up.
const ID: &str = "0123456789abcdef0123456789abcdef";

/// What happens to the files of a VM, in words and in deed.
type Harm = (&'static str, fn(&Files));

/// The files that a host keeps about a VM.
struct Files {
    record: PathBuf,
    vm: PathBuf,
}

impl Files {
    fn of(scene: &Scene, host: &str, vm: &str) -> Self {
        let state = scene.world.path(host).join("state");
        Self { record: state.join(format!("records/{vm}.record")), vm: state.join(format!("vms/{vm}.json")) }
    }

    /// Writes a record's file as the agent does; a slot that is `None` is torn.
    fn write_record(&self, slots: [Option<&str>; 2]) {
        let generation = self.json()["generation"].as_u64().unwrap();
        let slots = slots.iter().zip(1..).map(|(step, sequence)| match step {
            Some(step) => slot(&format!("sterna 1\n{sequence}\n{ID}\n{generation}\n{step}\nvm\nb\n")),
            None => vec![b'?'; SLOT_BYTES],
        });
        std::fs::write(&self.record, slots.collect::<Vec<_>>().concat()).unwrap();
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&std::fs::read(&self.vm).unwrap()).unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut Value)) {
        let mut json = self.json();
        change(&mut json);
        std::fs::write(&self.vm, json.to_string()).unwrap();
    }
}

fn slot(text: &str) -> Vec<u8> {
    let mut raw = [0; SLOT_BYTES];
    raw[16..16 + text.len()].copy_from_slice(text.as_bytes());
    let digest = blake3::hash(&raw[16..]);
    raw[..16].copy_from_slice(&digest.as_bytes()[..16]);
    raw.to_vec()
}

/// Stops the agent, lets `change` do what it likes to its files, and starts it again.
fn restart(scene: &mut Scene, host: &str, change: impl FnOnce(&Files)) {
    let files = Files::of(scene, host, "vm");
    scene.host_mut(host).kill();
    change(&files);
    scene.host_mut(host).launch();
}

fn is_running(scene: &Scene, host: &str) -> bool {
    let status = scene.world.qmp(host, "vm").execute("query-status", json!({})).unwrap();
    status["running"] == true
}

fn notice(daemon: &Daemon) -> String {
    daemon.vm("vm").unwrap().notice.unwrap_or_default()
}

/// Its agent read the older of the two records, `sending`, and resumed a VM that it may have handed out.
#[test]
fn a_stopped_vm_whose_record_is_lost_is_resumed_only_when_the_target_proves_a_death() {
    let mut scene = Scene::boot(World::new("7.2"));
    a_vm_that_runs_is_ours(&mut scene);
    strangers_are_left_alone(&mut scene);
    a_vm_without_its_file_is_shown_and_kept(&mut scene);
    scene.world.qmp("a", "vm").execute("stop", json!({})).unwrap();
    scene.b.kill();
    let lost: [Harm; 5] = [
        ("released is torn", |files| files.write_record([Some("sending"), None])),
        ("both are torn", |files| files.write_record([None, None])),
        ("the file is empty", |files| std::fs::write(&files.record, "").unwrap()),
        ("the file is gone", |files| drop(std::fs::remove_file(&files.record))),
        ("the record is of an older try, from a backup", |files| {
            files.write_record([Some("sending"), Some("kept")]);
            files.change(|vm| vm["generation"] = json!(vm["generation"].as_u64().unwrap() + 1));
        }),
    ];
    for (what, lose) in lost {
        restart(&mut scene, "a", |files| {
            files.change(|vm| vm["leaving"] = json!({ "id": ID, "to": "b" }));
            lose(files);
        });
        let vm = scene.a.vm("vm").unwrap();
        assert_eq!(vm.state, "released", "{what}: {vm:?}");
        assert!(notice(&scene.a).contains("host b"), "{what}: {vm:?}");
        assert!(!is_running(&scene, "a"), "{what}: it may run at b");
        let refused = scene.a.migrate(&to_the_other("a")).expect_err(what);
        assert!(refused.contains("in migration"), "{what}: {refused}");
    }
    the_targets_proof_ends_it(&mut scene);
    scene.move_verified("a");
}

/// `b` has heard nothing of that try: it proves nothing. Then its record says that its QEMU is dead.
fn the_targets_proof_ends_it(scene: &mut Scene) {
    scene.b.launch();
    until("the target was asked, and knows nothing", AT_REST * 2, || {
        let view = scene.a.migration(ID).unwrap();
        (view.status == "unresolved").then_some(())
    });
    assert!(!is_running(scene, "a"));
    scene.b.kill();
    let generation = Files::of(scene, "a", "vm").json()["generation"].as_u64().unwrap();
    let dead = slot(&format!("sterna 1\n1\n{ID}\n{generation}\ndead\nvm\na\n"));
    std::fs::write(Files::of(scene, "b", "vm").record, [dead, vec![0; SLOT_BYTES]].concat()).unwrap();
    scene.b.launch();
    until("the VM is resumed", AT_REST * 2, || is_running(scene, "a").then_some(()));
    assert_eq!(scene.settle(), "a");
    scene.assert_guest_goes_on();
}

fn a_vm_that_runs_is_ours(scene: &mut Scene) {
    let damage: [Harm; 4] = [
        ("torn", |files| files.write_record([Some("kept"), None])),
        ("cut", |files| std::fs::write(&files.record, [7; 700]).unwrap()),
        ("of another VM", |files| {
            let other = slot(&format!("sterna 1\n9\n{ID}\n99\nreleased\nother\nb\n"));
            std::fs::write(&files.record, [other, vec![0; SLOT_BYTES]].concat()).unwrap();
        }),
        ("a folder", |files| {
            std::fs::remove_file(&files.record).unwrap();
            std::fs::create_dir(&files.record).unwrap();
        }),
    ];
    for (what, damage) in damage {
        restart(scene, "a", |files| {
            files.change(|vm| vm["leaving"] = json!({ "id": ID, "to": "b" }));
            damage(files);
        });
        assert_eq!(scene.a.vm("vm").unwrap().state, "running", "{what}");
        assert!(scene.a.log().contains("record is damaged"), "{what}: {}", scene.a.log());
    }
    // It cannot be written down: it cannot be moved, and runs on. The error names the file.
    let id = scene.a.migrate(&to_the_other("a")).unwrap();
    let view = scene.a.wait(&id);
    let why = view.error_desc.clone().unwrap_or_default();
    assert!(view.status == "failed" && why.contains("vm.record"), "{view:?}");
    std::fs::remove_dir(Files::of(scene, "a", "vm").record).unwrap();
    assert_eq!(scene.settle(), "a");
}

/// A process that has nothing to do with VMs.
struct Bystander(Child);

impl Bystander {
    fn start() -> Self {
        Self(Command::new("sleep").arg("600").spawn().unwrap())
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Files of VMs that name a pid which is another process' by now: after a reboot even with the same start time.
fn strangers_are_left_alone(scene: &mut Scene) {
    let bystander = Bystander::start();
    let pid = i32::try_from(bystander.0.id()).unwrap();
    let start_time = Process::open(pid).unwrap().start_time();
    scene.a.kill();
    let template = Files::of(scene, "a", "vm").json();
    for (name, boot, start_time) in [("reboot", "another boot", start_time), ("reused", "", start_time - 1)] {
        let files = Files::of(scene, "a", name);
        let mut vm = template.clone();
        (vm["name"], vm["incoming"], vm["leaving"]) = (json!(name), json!(true), Value::Null);
        vm["run_dir"] = json!(scene.world.path("a").join("run/vms").join(name));
        (vm["boot"], vm["process"]) = (json!(boot), json!({ "pid": pid, "start_time": start_time }));
        std::fs::write(&files.vm, vm.to_string()).unwrap();
        let record = slot(&format!("sterna 1\n1\n{ID}\n{}\nincoming\n{name}\nb\n", vm["generation"]));
        std::fs::write(&files.record, [record, vec![0; SLOT_BYTES]].concat()).unwrap();
    }
    let vms = scene.world.path("a").join("state/vms");
    std::fs::create_dir(vms.join("folder.json")).unwrap();
    std::fs::create_dir(vms.join("folder.new")).unwrap();
    std::fs::File::create(vms.join("torn.json")).unwrap().write_all(b"{\"name\": \"to").unwrap();
    scene.a.launch();
    assert!(exists(pid) && Process::open(pid).is_ok(), "a stranger was killed");
    assert!(scene.a.log().contains("torn.json"), "{}", scene.a.log());
    for name in ["folder.json", "folder.new"] {
        std::fs::remove_dir(vms.join(name)).unwrap();
    }
    std::fs::remove_file(vms.join("torn.json")).unwrap();
    assert_eq!(scene.settle(), "a");
}

/// Its QEMU was killed at the start if its record said `incoming`, and nobody saw it otherwise.
fn a_vm_without_its_file_is_shown_and_kept(scene: &mut Scene) {
    let (pid, kept) = (scene.a.vm("vm").unwrap().pid, scene.world.path("kept.json"));
    let lose: [Harm; 3] = [
        ("the file is gone", |files| std::fs::remove_file(&files.vm).unwrap()),
        ("the file is empty", |files| std::fs::write(&files.vm, "").unwrap()),
        ("the file is of an earlier QEMU, from a backup", |files| {
            files.change(|vm| vm["process"] = json!({ "pid": 1, "start_time": 0 }));
        }),
    ];
    for (what, lose) in lose {
        restart(scene, "a", |files| {
            std::fs::copy(&files.vm, &kept).unwrap();
            files.write_record([Some("incoming"), Some("incoming")]);
            lose(files);
        });
        let found = scene.a.vm("vm");
        let vm = found.unwrap_or_else(|why| panic!("{what}: {why}\n{}", scene.tell()));
        assert_eq!((vm.state.as_str(), vm.pid), ("running", pid), "{what}: {vm:?}\n{}", scene.tell());
        assert!(notice(&scene.a).contains("state-dir"), "{what}: {vm:?}");
        assert!(
            scene.a.run("vm", scene.world.argv(&guest(&scene.world))).unwrap_err().contains("already"),
            "{what}"
        );
        assert!(scene.a.migrate(&to_the_other("a")).unwrap_err().contains("cannot be moved"), "{what}");
        restart(scene, "a", |files| {
            std::fs::copy(&kept, &files.vm).unwrap();
            std::fs::remove_file(&files.record).unwrap();
        });
        assert_eq!(scene.settle(), "a", "{what}");
    }
}

/// A target that had read `incoming` beside a torn record ended a QEMU to which the VM may have been handed over.
#[test]
fn a_qemu_that_may_have_got_the_vm_is_neither_run_nor_ended() {
    let mut scene = Scene::boot(World::new("7.2"));
    let id = scene.a.migrate(&slow("a")).unwrap();
    wait_active(&scene.a, &id);
    scene.b.kill();
    assert_eq!(scene.a.wait(&id).status, "failed");
    let waiting = scene.qemus("b");
    assert_eq!(waiting.len(), 1);
    Files::of(&scene, "b", "vm").write_record([Some("incoming"), None]);
    scene.b.launch();
    assert_eq!(scene.qemus("b"), waiting, "{}", scene.tell());
    assert!(notice(&scene.b).contains("nobody can tell"), "{}", scene.tell());
    assert!(!is_running(&scene, "b"));
    let id = scene.a.migrate(&to_the_other("a")).unwrap();
    assert!(scene.a.wait(&id).reasons.iter().any(|reason| reason.code == "name-taken"));
    scene.b.stop("vm").unwrap();
    assert_eq!(scene.settle(), "a");
    restart(&mut scene, "b", |files| drop(std::fs::remove_file(&files.record)));
    scene.move_verified("a");

    // A record from before the hand-over, of a VM that runs here by now.
    let pid = scene.b.vm("vm").unwrap().pid;
    restart(&mut scene, "b", |files| {
        files.write_record([Some("incoming"), Some("incoming")]);
        files.change(|vm| vm["incoming"] = json!(true));
    });
    assert_eq!(scene.b.vm("vm").unwrap().pid, pid);
    assert_eq!(scene.settle(), "b");
    scene.assert_guest_goes_on();
    scene.move_verified("b");
}
