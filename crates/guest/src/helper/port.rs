//! The port: a virtio-serial port of a known name, which the host gives to the VM.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// The port's name, on QEMU's command line and in the guest.
pub const NAME: &str = "org.sterna.guest.0";
/// Where the kernel lists ports, each with a file `name`.
const LIST: &str = "/sys/class/virtio-ports";

/// The device of the port, if this VM has one.
#[must_use]
pub fn find() -> Option<PathBuf> {
    find_in(Path::new(LIST))
}

fn find_in(list: &Path) -> Option<PathBuf> {
    let named = |entry: &std::fs::DirEntry| {
        std::fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == NAME)
    };
    let found = std::fs::read_dir(list).ok()?.flatten().find(named)?;
    Some(Path::new("/dev").join(found.file_name()))
}

/// Opens a port, or connects to it where it is a socket. Nobody is waited for on it.
///
/// # Errors
/// Those of the system; [`is_taken`] tells the one that says that another program has the port.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    if std::fs::metadata(path)?.file_type().is_socket() {
        let socket = UnixStream::connect(path)?;
        socket.set_nonblocking(true)?;
        return Ok(socket.into());
    }
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    Ok(OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?.into())
}

/// A port has one user at a time.
#[must_use]
pub fn is_taken(why: &io::Error) -> bool {
    why.kind() == ErrorKind::ResourceBusy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_found_by_its_name() {
        let list = std::env::temp_dir().join(format!("sterna-ports-{}", std::process::id()));
        for (port, name) in [("vport0p1", "org.qemu.guest_agent.0\n"), ("vport0p2", "org.sterna.guest.0\n")] {
            std::fs::create_dir_all(list.join(port)).unwrap();
            assert_eq!(find_in(&list), None);
            std::fs::write(list.join(port).join("name"), name).unwrap();
        }
        assert_eq!(find_in(&list), Some("/dev/vport0p2".into()));
        std::fs::remove_dir_all(&list).unwrap();
    }
}
