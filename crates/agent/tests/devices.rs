//! Devices that do not move are refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod support;

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use sterna_agent::model::RunRequest;
use sterna_memory::{Process, footprint};
use support::scene::left_in_qemu;
use support::{World, migrate, request};

/// Each is named with what to do, in one answer, and the VM is as it was.
#[test]
fn devices_that_do_not_move_are_refused() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let backends = ["net.sock", "fs.sock"].map(|name| Backend::start(&world.path(name)));
    std::fs::File::create(world.path("disk")).unwrap().set_len(1 << 20).unwrap();
    let folder = world.folder.path().display();
    let options = format!(
        "-nodefaults -display none -machine q35,memory-backend=ram -accel tcg \
         -m 64 -object memory-backend-memfd,id=ram,size=64M,share=on \
         -fsdev local,id=f,path={folder},security_model=none -device virtio-9p-pci,fsdev=f,mount_tag=t \
         -drive file={folder}/disk,format=raw,if=none,id=d -device nvme,drive=d,serial=x \
         -object memory-backend-memfd,id=shared,size=1M,share=on -device ivshmem-plain,memdev=shared \
         -chardev socket,id=c0,path={folder}/net.sock -netdev vhost-user,id=n,chardev=c0 \
         -device virtio-net-pci,netdev=n \
         -chardev socket,id=c1,path={folder}/fs.sock -device vhost-user-fs-pci,chardev=c1,tag=fs"
    );
    let mut argv = vec![world.parts.qemu("7.2").display().to_string()];
    argv.extend(options.split_whitespace().map(str::to_owned));
    let vm = a.run(RunRequest { name: "vm".into(), argv }).unwrap();
    let process = Process::open(vm.pid).unwrap();
    let before = footprint(&process).unwrap();
    let view = migrate(&a, request("vm", "b"));
    assert_eq!((view.status.as_str(), view.runs_at.as_str()), ("failed", "a"), "{view:?}");
    for (device, remedy) in [
        ("virtio-9p", "unmount and unplug it"),
        ("nvme", "use virtio-blk"),
        ("ivshmem", "unplug it before the move"),
        ("network of type vhost-user", "use a tap"),
        ("vhost-user-fs", "use a virtio device"),
    ] {
        let told =
            view.reasons.iter().any(|reason| reason.text.contains(device) && reason.text.contains(remedy));
        assert!(told, "{device}: {:#?}", view.reasons);
    }
    assert_eq!(a.vm("vm").unwrap().state, "running");
    assert!(b.vms().is_empty());
    assert_eq!(left_in_qemu(&before, &footprint(&process).unwrap()), [""; 0]);
    a.stop("vm").unwrap();
    drop(backends);
}

/// Just enough of a vhost-user back end that QEMU starts: it has one feature, and says yes.
struct Backend(std::path::PathBuf);

impl Backend {
    fn start(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                std::thread::spawn(move || drop(serve(stream)));
            }
        });
        Self(path.to_owned())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// Answers what must be answered (docs/interop/vhost-user.rst of QEMU): request, flags, size, payload.
fn serve(mut stream: UnixStream) -> std::io::Result<()> {
    const ASKS: [u32; 4] = [1, 11, 15, 17];
    const VERSION_1: u64 = 1 << 32;
    const PROTOCOL_FEATURES: u64 = 1 << 30;
    loop {
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let (request, size) = (word(0), word(8));
        stream.read_exact(&mut vec![0; size as usize])?;
        if ASKS.contains(&request) {
            let mut answer = [request, 5, 8].map(u32::to_le_bytes).concat();
            let value: u64 = match request {
                1 => VERSION_1 | PROTOCOL_FEATURES,
                15 => 0,
                _ => 1,
            };
            answer.extend(value.to_le_bytes());
            stream.write_all(&answer)?;
        }
    }
}
