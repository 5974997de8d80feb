//! Attaching: whatever a thread of the process is doing, it goes on as if nothing had happened.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{Random, Victim, attach, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sterna_memory::{
    AttachError, PAGE, PageRun, Process, ProcessError, Reader, Region, TrackError, Tracker, WpAsyncTracker,
    footprint, populated, touch_heap,
};

/// Attaches and detaches once (tracking nothing).
fn touch(process: &Process) -> Result<(), TrackError> {
    Box::new(WpAsyncTracker::start(process, vec![], &attach())?).stop()
}

/// Attaches many times while the victim sits in a call that checks itself.
fn undisturbed(kind: &str, times: u32) {
    let mut victim = Victim::start();
    let before = footprint(&victim.process).unwrap();
    assert_eq!(victim.tell(&format!("sit {kind}")), "sitting");
    let mut random = Random(u64::from(times));
    for _ in 0..times {
        std::thread::sleep(Duration::from_micros(random.below(3000)));
        touch(&victim.process).unwrap();
    }
    let told = victim.stand_up();
    println!("{kind}: {told}");
    assert!(told.starts_with("fine"), "{kind}: {told}");
    let after = footprint(&victim.process).unwrap();
    assert_eq!(before.descriptors, after.descriptors);
}

#[test]
fn a_thread_in_futex_goes_on() {
    undisturbed("futex", 200);
}

#[test]
fn a_thread_in_poll_goes_on() {
    undisturbed("poll", 200);
}

#[test]
fn a_thread_in_ppoll_goes_on() {
    undisturbed("ppoll", 200);
}

#[test]
fn a_thread_in_nanosleep_goes_on() {
    undisturbed("nanosleep", 200);
}

#[test]
fn a_thread_in_read_goes_on() {
    undisturbed("read", 200);
}

#[test]
fn a_running_thread_keeps_its_registers() {
    undisturbed("spin", 200);
}

#[test]
fn a_thousand_attaches_do_no_harm() {
    let victim = Victim::start();
    let before = footprint(&victim.process).unwrap();
    for _ in 0..1000 {
        touch(&victim.process).unwrap();
    }
    let after = footprint(&victim.process).unwrap();
    common::assert_same(&before, &after, "");
}

#[test]
fn no_signal_is_lost_or_doubled() {
    let mut victim = Victim::start();
    victim.tell("sit signals");
    let pid = victim.process.pid();
    let sender = std::thread::spawn(move || {
        let mut random = Random(7);
        for i in 0..500 {
            // Every tenth is a signal that faults raise; of these, several that are pending become one.
            let signal = if i % 10 == 0 { nix::libc::SIGBUS } else { nix::libc::SIGRTMIN() + 5 };
            // SAFETY:
            // - Plain numbers.
            let sent = unsafe { nix::libc::kill(pid, signal) };
            assert_eq!(sent, 0);
            std::thread::sleep(Duration::from_micros(2000 + random.below(1000)));
        }
    });
    while !sender.is_finished() {
        touch(&victim.process).unwrap();
    }
    sender.join().unwrap();
    let told = victim.stand_up();
    assert!(told.starts_with("fine [] signals 450 faults ") && !told.contains(" faults 0 "), "{told}");
}

#[test]
fn a_stopped_process_stays_stopped() {
    let mut victim = Victim::start();
    let pid = Pid::from_raw(victim.process.pid());
    kill(pid, Signal::SIGSTOP).unwrap();
    victim.wait_state('T');
    for _ in 0..50 {
        touch(&victim.process).unwrap();
        victim.wait_state('T');
    }
    kill(pid, Signal::SIGCONT).unwrap();
    assert_eq!(victim.tell("blocks"), "0");
}

#[test]
fn a_process_stopped_and_continued_meanwhile_is_none_the_worse() {
    let mut victim = Victim::start();
    victim.tell("sit nanosleep");
    let pid = Pid::from_raw(victim.process.pid());
    let stopper = std::thread::spawn(move || {
        let mut random = Random(3);
        for i in 0..300 {
            let signal = if i % 2 == 0 { Signal::SIGSTOP } else { Signal::SIGCONT };
            kill(pid, signal).unwrap();
            std::thread::sleep(Duration::from_micros(random.below(1500)));
        }
    });
    while !stopper.is_finished() {
        touch(&victim.process).unwrap();
    }
    stopper.join().unwrap();
    let told = victim.stand_up();
    assert!(told.starts_with("fine"), "{told}");
}

#[test]
fn disk_sleep_is_waited_for_until_the_deadline_and_no_longer() {
    let mut victim = Victim::start();
    victim.send("vfork 1500");
    victim.wait_state('D');
    let mut impatient = attach();
    impatient.deadline = Duration::from_millis(100);
    let error = WpAsyncTracker::start(&victim.process, vec![], &impatient).err().unwrap();
    assert!(matches!(error, TrackError::Attach(AttachError::NoThread { .. })), "{error}");
    assert_eq!(victim.state(), 'D', "it gave up before the sleep was over");
    // With more patience it works as soon as the sleep is over.
    touch(&victim.process).unwrap();
    assert_eq!(victim.read(), "ok");
}

#[test]
fn another_thread_is_taken_when_one_is_in_disk_sleep() {
    let mut victim = Victim::start();
    victim.tell("park");
    victim.send("vfork 1500");
    victim.wait_state('D');
    touch(&victim.process).unwrap();
    assert_eq!(victim.state(), 'D', "it did not wait for the sleep to be over");
    assert_eq!(victim.read(), "ok");
}

#[test]
fn a_seccomp_filter_does_not_see_our_calls() {
    let mut victim = Victim::start();
    victim.tell("seccomp");
    touch(&victim.process).unwrap();
    assert_eq!(victim.tell("blocks"), "0");
}

#[test]
fn two_attaches_at_once_take_turns() {
    let mut victim = Victim::start();
    victim.tell("sit ppoll");
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..100).for_each(|_| touch(&victim.process).unwrap()));
        }
    });
    let told = victim.stand_up();
    assert!(told.starts_with("fine"), "{told}");
}

#[test]
fn a_traced_process_is_refused_with_the_tracers_pid() {
    let mut victim = Victim::start();
    let pid = Pid::from_raw(victim.process.pid());
    nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()).unwrap();
    match touch(&victim.process) {
        Err(TrackError::Attach(AttachError::Traced { tracer, .. })) => {
            assert_eq!(tracer.unsigned_abs(), std::process::id());
        }
        other => panic!("{other:?}"),
    }
    nix::sys::ptrace::interrupt(pid).unwrap();
    nix::sys::wait::waitpid(pid, None).unwrap();
    nix::sys::ptrace::detach(pid, None).unwrap();
    touch(&victim.process).unwrap();
    assert_eq!(victim.tell("blocks"), "0");
}

#[test]
fn a_dead_process_is_an_error_everywhere() {
    let victim = Victim::start();
    let (pid, started) = (victim.process.pid(), victim.process.start_time());
    let process = Process::open_as(pid, started).unwrap();
    assert!(matches!(Process::open_as(pid, started + 1), Err(ProcessError::Reused { .. })));
    assert!(process.is_alive() && !process.wait_exit(Duration::from_millis(1)));
    process.kill().unwrap();
    // A zombie until the victim is dropped: dead all the same.
    assert!(process.wait_exit(common::PATIENCE) && !process.is_alive());
    assert!(
        matches!(touch(&process), Err(TrackError::Attach(AttachError::Gone { .. }))),
        "{:?}",
        touch(&process)
    );
    assert!(matches!(Process::open(pid), Err(ProcessError::Gone { .. })));
    drop(victim);
    assert!(matches!(Process::open(pid), Err(ProcessError::Gone { .. })));
    assert!(matches!(Process::open(0), Err(ProcessError::Gone { .. })));
    assert!(matches!(Process::open(-1), Err(ProcessError::Gone { .. })));
    process.kill().unwrap();
}

#[test]
fn the_pid_of_another_start_is_refused_by_the_helper() {
    let victim = Victim::start();
    let request = format!(
        "{{\"pid\":{},\"start_time\":{},\"deadline_ms\":1000,\"op\":{{\"userfaultfd\":{{\"device_fd\":null}}}}}}\n",
        victim.process.pid(),
        victim.process.start_time() + 1
    );
    assert_eq!(raw_request(&request), "{\"failed\":\"gone\"}\n");
}

#[test]
fn the_helper_answers_nonsense_with_an_error() {
    let own = std::process::id();
    let itself = format!(
        "{{\"pid\":-{own},\"start_time\":0,\"deadline_ms\":1,\"op\":{{\"close\":{{\"fds\":[]}}}}}}\n"
    );
    for request in ["garbage\n", "{}\n", "", &itself, &"x".repeat(5 << 20)] {
        let answer = raw_request(request);
        assert!(answer.starts_with("{\"failed\":{\"other\":"), "{answer}");
    }
}

/// Speaks to the helper directly; what it answers.
fn raw_request(request: &str) -> String {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut child = std::process::Command::new(attach().helper)
        .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    let mut writer = ours.try_clone().unwrap();
    let request = request.to_owned();
    // The helper does not read an endless request to its end.
    let writing = std::thread::spawn(move || {
        let _ = writer.write_all(request.as_bytes());
        let _ = writer.shutdown(std::net::Shutdown::Write);
    });
    let mut answer = Vec::new();
    // Closing with unread bytes resets the connection after the answer has come.
    let _ = ours.read_to_end(&mut answer);
    child.wait().unwrap();
    writing.join().unwrap();
    String::from_utf8(answer).unwrap()
}

#[test]
fn a_missing_helper_is_told() {
    let victim = Victim::start();
    let mut attach = attach();
    attach.helper = "/nonexistent/sterna-attach".into();
    let error = WpAsyncTracker::start(&victim.process, vec![], &attach).err().unwrap();
    assert!(matches!(error, TrackError::Attach(AttachError::Start { .. })), "{error}");
}

#[test]
fn an_ordinary_user_is_attached_to_with_and_without_the_device() {
    let (mut victim, number) = Victim::start_unprivileged();
    let region = victim.map("anon", 64, "");
    victim.tell("fill 0 64 1");
    let before = footprint(&victim.process).unwrap();
    for device_fd in [None, Some(number)] {
        let mut attach = attach();
        attach.device_fd = device_fd;
        let mut tracker = WpAsyncTracker::start(&victim.process, vec![region], &attach).unwrap();
        victim.tell("fill 3 2 2");
        let mut runs = Vec::new();
        tracker.collect(0, &mut runs).unwrap();
        assert_eq!(runs, [common::run(3, 2)], "device {device_fd:?}");
        Box::new(tracker).stop().unwrap();
        let after = footprint(&victim.process).unwrap();
        common::assert_same(&before, &after, "");
    }
}

#[test]
fn a_wrong_device_number_is_an_error_of_the_call() {
    let victim = Victim::start();
    let mut attach = attach();
    attach.device_fd = Some(999);
    let error = WpAsyncTracker::start(&victim.process, vec![], &attach).err().unwrap();
    assert!(matches!(error, TrackError::Attach(AttachError::Call { .. })), "{error:?}");
}

/// SIGKILL of whoever asked for an attach, at any moment of it, leaves the target as it was.
#[test]
fn a_parent_killed_in_the_middle_of_an_attach_leaves_nothing() {
    let mut victim = Victim::start();
    let region = victim.map("anon", 256, "");
    victim.tell("fill 0 256 1");
    // The command reader's buffers are there now, so nothing but an attach can change the footprint.
    victim.tell("blocks");
    let before = footprint(&victim.process).unwrap();
    victim.tell("sit nanosleep");
    let mut random = Random(11);
    for _ in 0..200 {
        let mut tracker = Victim::command("tracker")
            .env("STERNA_TEST_PID", victim.process.pid().to_string())
            .env("STERNA_TEST_BASE", region.base.to_string())
            .env("STERNA_TEST_BYTES", region.bytes.to_string())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(500 + random.below(8000)));
        tracker.kill().unwrap();
        tracker.wait().unwrap();
    }
    let told = victim.stand_up();
    assert!(told.starts_with("fine"), "{told}");
    victim.tell("verify 0 256 1");
    // A helper may still be finishing.
    wait_until("the footprint to be as before", || footprint(&victim.process).unwrap() == before);
    touch(&victim.process).unwrap();
}

#[test]
fn preflight_is_fine_here_and_tells_what_an_ordinary_user_lacks() {
    use std::os::unix::process::CommandExt;
    assert_eq!(sterna_memory::preflight(), Ok(()));
    let output = Victim::command("preflight").uid(65534).gid(65534).output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(
        told.starts_with("Err([") && told.contains("CAP_SYS_PTRACE and CAP_SYS_ADMIN is missing"),
        "{told}"
    );
}

/// What a process has in its heap stays; what of it was never written is there all the same.
#[test]
fn a_heap_is_there_before_it_is_written() {
    let victim = Victim::start();
    // read(2) of its standard input: it writes nothing by itself any more.
    let call = || std::fs::read_to_string(format!("/proc/{}/syscall", victim.process.pid())).unwrap();
    wait_until("it to wait for a line", || call().starts_with("0 0x0 "));
    let maps = || std::fs::read_to_string(format!("/proc/{}/maps", victim.process.pid())).unwrap();
    let line = |maps: &str| maps.lines().find(|line| line.ends_with("[heap]")).unwrap().to_owned();
    let range = |line: &str| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        Region { base: start, bytes: end - start }
    };
    let heap = range(&line(&maps()));
    let there = |region: &Region| {
        let mut runs = Vec::new();
        populated(&victim.process, region, &mut runs).unwrap();
        runs
    };
    let before = there(&heap);
    let pages = |runs: &[PageRun]| runs.iter().map(|run| run.pages).sum::<u64>();
    assert!(pages(&before) < heap.bytes / PAGE, "some of a heap is never written: {before:?}");
    let reader = Reader::new(&victim.process).unwrap();
    let content = || {
        let spans: Vec<_> = before.iter().map(|run| heap.span(*run)).collect();
        let mut bytes = vec![0; (pages(&before) * PAGE) as usize];
        reader.read(&spans, &mut bytes).unwrap();
        bytes
    };
    let was = content();
    touch_heap(&victim.process, &attach()).unwrap();
    assert_eq!(range(&line(&maps())), heap);
    assert_eq!(pages(&there(&heap)), heap.bytes / PAGE);
    assert!(content() == was, "its heap has changed");
}
