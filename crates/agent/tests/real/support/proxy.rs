//! A link that can be cut: a TCP proxy between two agents.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How often a thread looks whether the link was cut or silenced.
const LOOK: Duration = Duration::from_millis(5);

/// Forwards connections to an address, as long as it is told to.
pub(crate) struct Proxy {
    address: SocketAddr,
    link: Arc<Link>,
}

#[derive(Default)]
struct Link {
    /// Connections are refused.
    cut: AtomicBool,
    /// Connections stay, and nothing moves on them.
    silent: AtomicBool,
    over: AtomicBool,
    made: AtomicUsize,
    sockets: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    pub(crate) fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let (address, link) = (listener.local_addr().unwrap(), Arc::new(Link::default()));
        let of_thread = link.clone();
        std::thread::spawn(move || accept_all(&listener, &target, &of_thread));
        Self { address, link }
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Ends all connections, and refuses new ones until [`Proxy::mend`].
    pub(crate) fn cut(&self) {
        self.link.cut.store(true, Ordering::SeqCst);
        self.link.end_all();
    }

    /// Ends one connection, and no other: that after which so many were made.
    pub(crate) fn cut_one(&self, later: usize) {
        for socket in self.link.sockets.lock().unwrap().iter().rev().skip(2 * later).take(2) {
            drop(socket.shutdown(Shutdown::Both));
        }
    }

    /// How many connections were made so far.
    pub(crate) fn connections(&self) -> usize {
        self.link.made.load(Ordering::SeqCst)
    }

    /// Lets nothing through any more, and tells nobody: the network is gone, the hosts are not.
    pub(crate) fn silence(&self) {
        self.link.silent.store(true, Ordering::SeqCst);
    }

    /// New connections go through again. Those that were silenced stay silent for ever.
    pub(crate) fn mend(&self) {
        self.link.cut.store(false, Ordering::SeqCst);
        self.link.silent.store(false, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.link.over.store(true, Ordering::SeqCst);
        self.link.end_all();
    }
}

impl Link {
    fn end_all(&self) {
        for socket in self.sockets.lock().unwrap().drain(..) {
            drop(socket.shutdown(Shutdown::Both));
        }
    }
}

fn accept_all(listener: &TcpListener, target: &str, link: &Arc<Link>) {
    while !link.over.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((near, _)) if !link.cut.load(Ordering::SeqCst) => join(near, target, link),
            Ok(_) => {}
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

fn join(near: TcpStream, target: &str, link: &Arc<Link>) {
    let Ok(far) = TcpStream::connect(target) else { return };
    link.made.fetch_add(1, Ordering::SeqCst);
    near.set_nonblocking(false).unwrap();
    for socket in [&near, &far] {
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(LOOK)).unwrap();
        link.sockets.lock().unwrap().push(socket.try_clone().unwrap());
    }
    let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    for (from, to) in [(near, far), (far2, near2)] {
        let link = link.clone();
        std::thread::spawn(move || forward(from, to, &link));
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, link: &Link) {
    let (mut buffer, mut silenced) = (vec![0; 64 << 10], false);
    while !link.over.load(Ordering::SeqCst) {
        silenced |= link.silent.load(Ordering::SeqCst);
        if silenced {
            std::thread::sleep(LOOK);
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(_) if link.silent.load(Ordering::SeqCst) => {}
            Ok(bytes) => {
                if to.write_all(&buffer[..bytes]).is_err() {
                    break;
                }
            }
            Err(why)
                if matches!(why.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    drop(to.shutdown(Shutdown::Write));
}
