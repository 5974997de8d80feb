//! The Unix socket: who may open it, and what becomes of one that was left behind.

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Whoever can open the socket can start programs as the agent, so nobody else can.
const MODE: u32 = 0o600;

/// Clients that may wait to be accepted: as many as a script may start at once, and far below the kernel's limit.
const BACKLOG: i32 = 128;

/// A socket that is removed with its owner.
pub(crate) struct Bound {
    path: PathBuf,
    inode: (u64, u64),
    listener: UnixListener,
}

impl Bound {
    /// Binds `path`, replacing the socket of an agent that is dead.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let context = |why: io::Error| io::Error::new(why.kind(), format!("{}: {why}", path.display()));
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(context)?;
        }
        remove_stale(path)?;
        let listener = bind_private(path).map_err(context)?;
        let inode = inode(path).map_err(context)?;
        Ok(Self { path: path.to_owned(), inode, listener })
    }

    /// The listening end, for tokio.
    pub(crate) fn listener(&self) -> io::Result<UnixListener> {
        let listener = self.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Only our own: another agent may have put its socket there since.
        if inode(&self.path).is_ok_and(|now| now == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Sets the mode between `bind` and `listen`: nobody can have connected before it holds.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))?;
    listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        let text = format!("{} is there already and no socket: move it away", path.display());
        return Err(io::Error::new(ErrorKind::AlreadyExists, text));
    }
    match UnixStream::connect(path) {
        Err(why) if why.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(why) => Err(io::Error::new(why.kind(), format!("{}: {why}", path.display()))),
        Ok(_) => {
            let text = format!("another agent answers at {}: stop it, or use another socket", path.display());
            Err(io::Error::new(ErrorKind::AddrInUse, text))
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_agents_socket_is_replaced_and_a_living_ones_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/agent.sock");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file, as a killed agent does");

        let bound = Bound::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        let second = Bound::bind(&path).err().unwrap();
        assert_eq!(second.kind(), ErrorKind::AddrInUse, "{second}");
        UnixStream::connect(&path).expect("the refused agent left the first one's socket alone");
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "x").unwrap();
        assert_eq!(Bound::bind(&path).err().unwrap().kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "x");
    }
}
