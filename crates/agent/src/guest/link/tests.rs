//! A guest that is a socket: helpful, absent, old or hostile.

use super::*;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

struct Scene {
    folder: tempfile::TempDir,
    listener: UnixListener,
    link: Arc<GuestLink>,
    now: Instant,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("port")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { folder, listener, link: Arc::default(), now: Instant::now() }
    }

    fn us() -> i32 {
        std::process::id().cast_signed()
    }

    fn keep(&self) {
        self.link.keep(Self::us(), || Some(self.folder.path().join("port")), self.now);
    }

    /// The agent connects; this is the guest's end.
    fn connect(&mut self) -> UnixStream {
        self.keep();
        let (guest, _) = self.listener.accept().expect("the agent connects");
        guest.set_nonblocking(false).unwrap();
        guest.set_read_timeout(Some(PATIENCE)).unwrap();
        guest
    }

    /// Whether the agent connects when it may.
    fn connects(&self) -> bool {
        self.keep();
        self.listener.accept().is_ok()
    }

    fn receive(&self) -> Vec<Request> {
        self.link.receive("vm", self.now)
    }

    /// A helper that has greeted, and the nonce.
    fn greeted(&mut self, hello: &str) -> (UnixStream, String) {
        let mut guest = self.connect();
        let nonce = nonce_of(&line(&mut guest));
        guest.write_all(format!("\nhello {}\n", hello.replace('@', &nonce)).as_bytes()).unwrap();
        assert_eq!(self.receive(), []);
        (guest, nonce)
    }
}

/// One line that is not empty.
fn line(guest: &mut UnixStream) -> String {
    let mut heard = BufReader::with_capacity(1, guest);
    let mut line = String::new();
    while line.trim().is_empty() {
        line.clear();
        assert!(heard.read_line(&mut line).unwrap() > 0, "the agent is gone");
    }
    line.trim_end().to_owned()
}

fn nonce_of(hello: &str) -> String {
    let words: Vec<&str> = hello.split(' ').collect();
    assert_eq!(words[..2], ["hello", "1"], "{hello}");
    words[2].to_owned()
}

const GOOD: &str = "1 @ migrate,stun sterna-guest/0.1.0";

#[test]
fn a_helper_is_known_and_stuns() {
    let mut scene = Scene::new();
    let (mut guest, _) = scene.greeted(GOOD);
    let helper = scene.link.is_there().expect("it has just greeted");
    assert_eq!((helper.version, helper.software.as_str()), (1, "sterna-guest/0.1.0"));
    assert!(scene.link.stun(70, 2000));
    assert_eq!(line(&mut guest), "stun 70 2000");
    guest.write_all(b"stunned 2 70\n").unwrap();
    scene.receive();
    assert_eq!(scene.link.stunned(), Some((2, 70)));
    scene.link.unstun();
    assert_eq!(line(&mut guest), "unstun");
    guest.write_all(b"running\n").unwrap();
    scene.receive();
    assert_eq!(scene.link.stunned(), None);
}

#[test]
fn without_a_port_nobody_is_there() {
    let link = GuestLink::default();
    link.keep(Scene::us(), || None, Instant::now());
    assert!(link.is_there().is_none() && !link.stun(50, 1000) && link.helper().is_none());
    link.unstun();
}

#[test]
fn a_guest_that_says_nothing_is_waited_for_shortly_and_not_written_full() {
    let mut scene = Scene::new();
    let mut guest = scene.connect();
    for _ in 0..3 {
        let began = Instant::now();
        assert!(scene.link.is_there().is_none());
        assert!(began.elapsed() >= THERE_WITHIN);
        assert!(!scene.link.stun(50, 1000));
    }
    for _ in 0..1000 {
        scene.link.lock().ask_who();
    }
    drop(scene.link);
    let mut text = String::new();
    guest.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("hello").count(), UNANSWERED_MAX as usize);
}

#[test]
fn is_there_hears_an_answer_that_comes_in_time() {
    let mut scene = Scene::new();
    let mut guest = scene.connect();
    let link = scene.link.clone();
    let asking = std::thread::spawn(move || link.is_there());
    let nonce = nonce_of(&line(&mut guest));
    guest.write_all(format!("hello {}\n", GOOD.replace('@', &nonce)).as_bytes()).unwrap();
    let end = Instant::now() + PATIENCE;
    while !asking.is_finished() {
        scene.now = Instant::now();
        scene.receive();
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
    // Late on a busy machine is known all the same.
    assert!(asking.join().unwrap().or(scene.link.helper()).is_some());
}

#[test]
fn an_old_helper_is_known_and_not_asked_to_stun() {
    for hello in ["0 @ migrate,stun old/0", "1 @ migrate sterna-guest/0.1.0", "1 @ fly sterna-guest/9"] {
        let mut scene = Scene::new();
        let (_guest, _) = scene.greeted(hello);
        assert!(scene.link.is_there().is_some(), "{hello}");
        assert!(!scene.link.stun(50, 1000), "{hello}");
    }
}

#[test]
fn a_helper_that_begins_later_asks_to_be_greeted() {
    let mut scene = Scene::new();
    let (mut guest, nonce) = scene.greeted("1 - migrate,stun sterna-guest/0.1.0");
    assert!(scene.link.helper().is_none());
    assert_eq!(line(&mut guest), format!("hello 1 {nonce}"));
    guest.write_all(format!("hello {}\n", GOOD.replace('@', &nonce)).as_bytes()).unwrap();
    scene.receive();
    assert!(scene.link.helper().is_some());
}

#[test]
fn requests_come_once_and_answers_go_back() {
    let mut scene = Scene::new();
    let (mut guest, nonce) = scene.greeted(GOOD);
    let request = format!("migrate {nonce} 1 b\n");
    guest.write_all(request.as_bytes()).unwrap();
    assert_eq!(scene.receive(), [Request { number: 1, host: "b".into() }]);
    guest.write_all(request.as_bytes()).unwrap();
    guest.write_all(b"migrate 00000000000000000000000000000000 2 b\n").unwrap();
    assert_eq!(scene.receive(), [], "replayed, or of another connection");
    scene.link.accept(1, "0123", "b");
    assert_eq!(line(&mut guest), "accepted 1 0123 b");
    scene.link.refuse(1, "not there");
    assert_eq!(line(&mut guest), "refused 1 not there");
}

#[test]
fn what_was_said_in_an_earlier_connection_means_nothing_in_the_next() {
    let mut scene = Scene::new();
    let (guest, old) = scene.greeted(GOOD);
    drop(guest);
    scene.receive();
    assert!(scene.link.helper().is_none());
    scene.now += RETRY;
    let (mut guest, new) = scene.greeted(GOOD);
    assert_ne!(old, new);
    guest.write_all(format!("migrate {old} 5 b\n").as_bytes()).unwrap();
    assert_eq!(scene.receive(), []);
}

#[test]
fn a_flood_is_cut_off_for_a_while() {
    let floods: [Vec<u8>; 4] = [
        vec![b'x'; 1 << 20],
        b"running\n".repeat(1 << 16),
        vec![b'\n'; 1 << 20],
        (0..100_000).flat_map(|n| format!("migrate n {n} b\n").into_bytes()).collect(),
    ];
    for flood in floods {
        let mut scene = Scene::new();
        let (mut guest, _) = scene.greeted(GOOD);
        let writing = std::thread::spawn(move || guest.write_all(&flood).is_err());
        let mut pieces = 0;
        while scene.link.socket().is_some() {
            assert_eq!(scene.receive(), []);
            pieces += 1;
            assert!(pieces < 1_000_000);
        }
        assert!(writing.join().unwrap(), "it was read to its end");
        assert!(scene.link.helper().is_none());
        scene.now += RETRY * 2;
        assert!(!scene.connects(), "it is back at once");
        scene.now += CUT_OFF;
        assert!(scene.connects());
    }
}

#[test]
fn a_guest_that_never_reads_costs_a_buffer_and_is_cut_off() {
    let mut scene = Scene::new();
    let (_guest, _) = scene.greeted(GOOD);
    let mut said = 0_usize;
    while scene.link.socket().is_some() {
        scene.link.refuse(1, "no");
        said += 1;
        assert!(said < 1_000_000);
        assert!(scene.link.lock().open.as_ref().is_none_or(|open| open.unsent.len() <= UNSENT_MAX));
    }
    assert!(!scene.link.stun(50, 1000));
}

/// QEMU writes what it reads from the socket into the guest's memory, stopped or not.
#[test]
fn nothing_passes_while_the_vm_is_stopped() {
    let mut scene = Scene::new();
    let (mut guest, nonce) = scene.greeted(GOOD);
    scene.link.hush();
    assert!(!scene.link.stun(50, 1000));
    scene.link.unstun();
    scene.link.refuse(1, "no");
    assert!(scene.link.is_there().is_some(), "what is known is told");
    guest.write_all(format!("migrate {nonce} 1 b\n").as_bytes()).unwrap();
    assert_eq!(scene.receive(), []);
    assert!(scene.link.socket().is_none());
    scene.link.leave();
    guest.set_nonblocking(true).unwrap();
    assert!(guest.read(&mut [0; 64]).is_err(), "something was said, or the socket was closed");
    scene.link.speak();
    assert_eq!(scene.receive(), [Request { number: 1, host: "b".into() }]);
}

#[test]
fn somebody_elses_socket_is_left_alone() {
    let scene = Scene::new();
    scene.link.keep(1, || Some(scene.folder.path().join("port")), scene.now);
    assert!(scene.link.socket().is_none());
    let (mut guest, _) = scene.listener.accept().unwrap();
    let mut text = String::new();
    guest.read_to_string(&mut text).unwrap();
    assert_eq!(text, "", "it was written to");
}

#[test]
fn a_helper_that_falls_silent_is_forgotten() {
    let mut scene = Scene::new();
    let (mut guest, nonce) = scene.greeted(GOOD);
    scene.now += ASK_EVERY * 2;
    scene.keep();
    assert_eq!(line(&mut guest), format!("hello 1 {nonce}"));
    assert!(scene.link.helper().is_some());
    scene.now += FRESH * 2;
    scene.keep();
    assert!(scene.link.helper().is_none());
}
