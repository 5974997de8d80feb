//! Real QEMUs started, found again, silent, and gone.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Stage, WITHIN, chain, copy_ram, eventually, is_alive, versions};
use serde_json::Value;
use sterna_vmm::qemu::{CommandLine, Launch, LaunchError, Qemu, Qmp, QmpError, User};
use sterna_vmm::{ProcessError, ProcessId, RunState, Vmm, VmmError};

/// What no test may take for a deadline that is too short for an answer.
const SHORT: Duration = Duration::from_millis(300);

/// The user `nobody` of every Linux.
fn nobody() -> User {
    User { uid: 65534, gid: 65534, groups: Vec::new() }
}

/// The line that Sterna itself makes, from start to end: the log is private, the socket is the user's, and nothing
/// stays behind.
#[test]
fn a_users_own_line_starts_and_ends_and_leaves_nothing() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let line = CommandLine::parse(stage.argv(&["-M", "q35"])).unwrap();
        let launch = stage.launch("own", Vec::new(), None);
        let launch = Launch { argv: line.for_source(&launch.run_dir), ..launch };
        let mut vm = stage.start_launch(&launch);
        assert_eq!(vm.qemu.status().unwrap(), RunState::Running);
        assert_eq!(fs::metadata(&vm.log).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&vm.run_dir).unwrap().mode() & 0o777, 0o700);
        let id = vm.id();
        let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", id.pid)).unwrap();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let unified = |text: &str| text.lines().find(|line| line.starts_with("0::")).map(str::to_owned);
        if unified(&own).is_some() {
            assert_ne!(unified(&cgroup), unified(&own), "a scope of its own");
        }
        vm.qemu.quit(WITHIN).unwrap();
        assert!(vm.exit.wait(WITHIN).unwrap().success());
        assert!(!is_alive(id));
        let left = unified(&cgroup).and_then(|line| line.split_once("::/").map(|(_, path)| path.to_owned()));
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        if let Some(left) = left.filter(|path| path.starts_with("sterna")) {
            eventually("the cgroup is removed", || roots.iter().all(|root| !root.join(&left).exists()));
        }
    }
}

/// A QEMU that is not root's moves like another.
#[test]
fn an_ordinary_users_qemu_moves() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        // Others must reach the folder, and the disk is the user's own.
        fs::set_permissions(stage.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(stage.disk(), Some(65534), Some(65534)).unwrap();
        let mut argv = stage.argv(&["-M", "q35"]);
        argv.extend(stage.disk_args());
        let line = CommandLine::parse(argv).unwrap();
        let start = |name: &str, more: &[&str]| {
            let launch = stage.launch(name, Vec::new(), Some(nobody()));
            let mut argv = line.for_source(&launch.run_dir);
            argv.extend(more.iter().map(|arg| (*arg).to_owned()));
            stage.start_launch(&Launch { argv, ..launch })
        };
        let (mut source, mut target) = (start("source", &[]), start("target", &["-incoming", "defer", "-S"]));
        let status = fs::read_to_string(format!("/proc/{}/status", source.id().pid)).unwrap();
        assert!(status.contains("\nUid:\t65534\t65534\t65534\t65534\n"), "{status}");
        assert!(status.contains("\nCapEff:\t0000000000000000\n"), "{status}");
        assert_eq!(fs::metadata(&source.run_dir).unwrap().uid(), 65534);

        source.wait_for_boot(1);
        target.qemu.prepare_load().unwrap();
        source.qemu.prepare_save().unwrap();
        source.qemu.pause().unwrap();
        let ticket = source.qemu.save_begin().unwrap();
        let state = source.qemu.save_finish(ticket).unwrap();
        copy_ram(&mut source, &mut target);
        target.qemu.load(&state).unwrap_or_else(|error| panic!("{}", chain(&error)));
        target.qemu.resume().unwrap();
        target.wait_for_boot(1);
    }
}

/// What QEMU says when it does not start reaches the user, and no process stays.
#[test]
fn a_line_that_qemu_refuses_fails_at_once_with_its_words() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let launch = stage.launch("wrong", stage.argv(&["-device", "no-such-device"]), None);
        let error = launch.start(WITHIN).unwrap_err();
        assert!(matches!(error, VmmError::Launch(LaunchError::Exited { .. })), "{error:?}");
        assert!(chain(&error).contains("no-such-device"), "{}", chain(&error));
    }
}

#[test]
fn a_program_that_is_no_qemu_is_killed_in_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let launch = Launch {
        argv: ["sleep", "1000"].map(str::to_owned).to_vec(),
        name: "sleeper".into(),
        run_dir: folder.path().join("run"),
        log: folder.path().join("log"),
        cwd: None,
        user: None,
        memory: None,
    };
    let error = launch.start(SHORT).unwrap_err();
    assert!(matches!(error, VmmError::Launch(LaunchError::Silent { .. })), "{error:?}");
    let own = std::process::id().to_string();
    let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
    let sleeps =
        |pid: &&str| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.contains("1000"));
    assert_eq!(children.split_whitespace().filter(sleeps).count(), 0);
}

#[test]
fn a_name_that_could_leave_its_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["", "..", "a/b", ".hidden", "-x", "ä", &"x".repeat(65)] {
        let launch = Launch {
            argv: vec!["true".into()],
            name: name.into(),
            run_dir: folder.path().join("run"),
            log: folder.path().join("log"),
            cwd: None,
            user: None,
            memory: None,
        };
        let error = launch.start(SHORT).unwrap_err();
        assert!(matches!(error, VmmError::Launch(LaunchError::Name { .. })), "{name:?}: {error:?}");
    }
}

/// Not a test of its own: what [`qemu_outlives_whoever_started_it`] starts and kills.
#[test]
#[ignore = "started by another test"]
fn launcher() {
    let Some(folder) = std::env::var_os("STERNA_TEST_LAUNCHER").map(PathBuf::from) else { return };
    let argv = fs::read_to_string(folder.join("argv")).unwrap().lines().map(str::to_owned).collect();
    let launch = Launch {
        argv,
        name: "outliving".into(),
        run_dir: folder.join("outliving"),
        log: folder.join("outliving.log"),
        cwd: None,
        user: None,
        memory: None,
    };
    let started = launch.start(WITHIN).unwrap();
    let id = serde_json::to_string(&started.qemu.process_id()).unwrap();
    fs::write(folder.join("id.new"), id).unwrap();
    fs::rename(folder.join("id.new"), folder.join("id")).unwrap();
    std::thread::sleep(Duration::from_secs(3600));
}

/// The agent's death disturbs no guest, and the next agent finds it by what it wrote down.
#[test]
fn qemu_outlives_whoever_started_it() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let folder = stage.folder.path();
        let line = CommandLine::parse(stage.argv(&["-M", "q35"])).unwrap();
        fs::write(folder.join("argv"), line.for_source(&folder.join("outliving")).join("\n")).unwrap();
        let mut launcher = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "launcher", "--ignored"])
            .env("STERNA_TEST_LAUNCHER", folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the launcher has launched", || folder.join("id").exists());
        launcher.kill().unwrap();
        launcher.wait().unwrap();

        let id: ProcessId = serde_json::from_str(&fs::read_to_string(folder.join("id")).unwrap()).unwrap();
        let socket = folder.join("outliving/qmp.sock");
        let mut qemu =
            Qemu::attach(id, &socket, None, WITHIN).unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(qemu.status().unwrap(), RunState::Running);
        let other = ProcessId { start_time: id.start_time + 1, ..id };
        let reused = Qemu::attach(other, &socket, None, SHORT).unwrap_err();
        assert!(matches!(reused, VmmError::Process(ProcessError::Reused { .. })), "{reused}");
        qemu.quit(WITHIN).unwrap();
        let gone = Qemu::attach(id, &socket, None, SHORT).unwrap_err();
        assert!(matches!(gone, VmmError::Process(ProcessError::Gone { .. })), "{gone}");
    }
}

/// A socket that belongs to another VM than the one that was meant: nothing may be done to it.
#[test]
fn another_vms_socket_is_not_taken_for_ours() {
    let binary = versions().remove(0);
    let stage = Stage::new(&binary);
    let (mut one, two) = (stage.start("one", stage.argv(&[])), stage.start("two", stage.argv(&[])));
    one.qemu.qmp().shutdown();
    let error = Qemu::attach(two.id(), &one.run_dir.join("qmp.sock"), None, WITHIN).unwrap_err();
    assert!(matches!(error, VmmError::WrongProcess { .. }), "{error}");
}

/// A QEMU that hangs is told from one that is gone; when it comes to itself, the connection is still good.
#[test]
fn a_silent_qemu_runs_into_the_deadline_and_is_usable_after() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.start("silent", stage.argv(&["-M", "q35"]));
        let pid = rustix::process::Pid::from_raw(vm.id().pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let error = vm.qemu.qmp().execute("query-status", Value::Null, SHORT).unwrap_err();
        assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
        let again = Qmp::connect(&vm.run_dir.join("qmp.sock"), SHORT).unwrap_err();
        assert!(matches!(again, QmpError::NoGreeting { .. }), "{again}");
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        // The late answer to the first question is not taken for one to the second.
        assert_eq!(vm.qemu.machine_type().unwrap().split('-').nth(1), Some("q35"));
    }
}

/// A QEMU that does not even answer to `quit` is killed.
#[test]
fn a_stopped_qemu_is_ended_all_the_same() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.start("stuck", stage.argv(&["-M", "q35"]));
        let id = vm.id();
        let pid = rustix::process::Pid::from_raw(id.pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        vm.qemu.quit(SHORT).unwrap();
        assert!(!is_alive(id));
    }
}

/// One client a socket: the second is told what is likely the matter.
#[test]
fn a_second_client_is_told_of_the_first() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let vm = stage.start("held", stage.argv(&[]));
        let socket = vm.run_dir.join("qmp.sock");
        // More of them than QEMU's queue holds: connect(2) itself must not hang either.
        let waiting: Vec<_> = (0..4)
            .map(|_| {
                let socket = socket.clone();
                std::thread::spawn(move || Qmp::connect(&socket, SHORT).unwrap_err())
            })
            .collect();
        for thread in waiting {
            let error = thread.join().unwrap();
            assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
            assert!(error.to_string().contains("one client"), "{error}");
        }
    }
}

/// When QEMU dies under us, its last words are in the error.
#[test]
fn a_killed_qemu_is_reported_as_gone() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let mut vm = stage.start("killed", stage.argv(&[]));
        fs::write(&vm.log, "the last words").unwrap();
        vm.qemu.process().kill().unwrap();
        vm.exit.wait(WITHIN).unwrap();
        let error = vm.qemu.status().unwrap_err();
        assert!(matches!(error, VmmError::Exited { .. }), "{error}");
        assert!(error.to_string().contains("the last words"), "{error}");
    }
}
