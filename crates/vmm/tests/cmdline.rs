//! The user's command line: read, kept, put into a target's words, and refused where a peer could harm the target.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use common::{Stage, chain, versions};
use proptest::prelude::*;
use sterna_vmm::qemu::{CommandLine, CommandLineError, HostMap, Launch, Refusal, TargetPolicy, huge_pages};
use sterna_vmm::{Code, RunState, Vmm, difference};
use tempfile::TempDir;

fn parse(args: &[&str]) -> CommandLine {
    let argv = std::iter::once("qemu-system-x86_64").chain(args.iter().copied()).map(str::to_owned).collect();
    CommandLine::parse(argv).unwrap()
}

/// A target host with a folder of images at another place than the source's.
struct Target {
    folder: TempDir,
    map: HostMap,
    policy: TargetPolicy,
}

impl Target {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path().join("images");
        fs::create_dir(&images).unwrap();
        for file in ["disk.qcow2", "vmlinuz", "initrd", "a,b.raw", "OVMF.fd"] {
            fs::write(images.join(file), "x").unwrap();
        }
        fs::write(folder.path().join("secret"), "x").unwrap();
        symlink("/etc/passwd", images.join("link")).unwrap();
        let pairs = |list: &[(&str, &str)]| -> BTreeMap<String, String> {
            list.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())).collect()
        };
        let map = HostMap {
            binaries: BTreeMap::new(),
            taps: pairs(&[("tap0", "vm7-tap")]),
            paths: pairs(&[("/srv/vm", images.to_str().unwrap())]),
            scripts: pairs(&[("/etc/up", "/opt/target/up")]),
            addresses: pairs(&[(":1", "127.0.0.1:7")]),
        };
        let policy =
            TargetPolicy { binaries: vec!["/opt/bin/qemu-system-x86_64".into()], path_roots: vec![images] };
        Self { folder, map, policy }
    }

    fn images(&self) -> PathBuf {
        fs::canonicalize(self.folder.path().join("images")).unwrap()
    }

    fn translate(&self, args: &[&str]) -> Result<Vec<String>, Vec<Refusal>> {
        let run_dir = Path::new("/run/sterna/x");
        parse(args).for_target(run_dir, "pc-q35-7.2", Some("qemu64"), &self.map, &self.policy)
    }

    /// One option of the translated line.
    fn option(&self, name: &str, value: &str) -> Result<String, Vec<Refusal>> {
        let argv = self.translate(&[name, value])?;
        let at = argv.iter().position(|arg| arg == name).unwrap();
        Ok(argv[at + 1].clone())
    }
}

#[test]
fn the_source_runs_what_the_user_wrote() {
    let args = [
        "-M",
        "q35",
        "--name",
        "x",
        "-drive",
        "file=/a,,b,if=virtio",
        "-no-such",
        "value",
        "-S2",
        "disk.img",
    ];
    let line = parse(&args);
    let argv = line.to_argv();
    assert_eq!(argv.iter().skip(1).map(String::as_str).collect::<Vec<_>>(), args);
    let source = line.for_source(Path::new("/run/a,b"));
    assert_eq!(source[..argv.len()], argv);
    assert_eq!(
        source[argv.len()..].join(" "),
        "-chardev socket,id=sterna-qmp,path=/run/a,,b/qmp.sock,server=on,wait=off -mon chardev=sterna-qmp,mode=control"
    );
}

#[test]
fn lines_that_cannot_be_watched_or_moved_are_refused_at_once() {
    let parse = |args: &[&str]| CommandLine::parse(args.iter().map(|arg| (*arg).to_owned()).collect());
    for never in [
        &["q", "-daemonize"][..],
        &["q", "--daemonize"],
        &["q", "-S"],
        &["q", "-incoming", "defer"],
        &["q", "-unknown", "-daemonize"],
        &["q", "-preconfig"],
        &["q", "-chardev", "null,id=sterna-qmp"],
    ] {
        let error = parse(never).unwrap_err();
        assert!(matches!(error, CommandLineError::Never { .. }), "{never:?}: {error}");
    }
    assert_eq!(parse(&[]), Err(CommandLineError::Empty));
    assert_eq!(parse(&["q", "-m"]), Err(CommandLineError::NoValue { option: "m".into() }));
    assert_eq!(parse(&["q", "a\0b"]), Err(CommandLineError::ZeroByte { at: 1 }));
    assert_eq!(parse(&["q"; 5000]), Err(CommandLineError::TooLong));
    // The value of another option is no option.
    assert!(parse(&["q", "-append", "-S"]).is_ok());
}

#[test]
fn the_target_gets_the_resolved_machine_and_processor() {
    let target = Target::new();
    let cases: [(&[&str], &str); 5] = [
        (&["-M", "q35,kernel-irqchip=on"], "-M pc-q35-7.2,kernel-irqchip=on"),
        (&["-machine", "type=q35,accel=tcg"], "-machine type=pc-q35-7.2,accel=tcg"),
        (&["-machine", "accel=tcg,type=q35"], "-machine accel=tcg,type=pc-q35-7.2"),
        (&["-M", "pc", "-machine", "vmport=off"], "-M pc-q35-7.2 -machine vmport=off"),
        (&["-nodefaults"], "-machine pc-q35-7.2 -nodefaults"),
    ];
    for (args, expected) in cases {
        let argv = target.translate(args).unwrap().join(" ");
        assert!(argv.contains(expected), "{args:?}: {argv}");
        assert!(argv.contains(" -cpu qemu64 "), "{argv}");
        assert!(argv.contains(" -incoming defer -S -chardev socket,id=sterna-qmp"), "{argv}");
        assert!(argv.starts_with("/opt/bin/qemu-system-x86_64 "), "{argv}");
    }
    let own = target.translate(&["-cpu", "host,-vmx"]).unwrap().join(" ");
    assert!(own.contains("-cpu host,-vmx") && !own.contains("qemu64"), "{own}");
    let evil = parse(&["-nodefaults"]).for_target(
        Path::new("/x"),
        "q35,dumpdtb=/etc/x",
        Some("host,x=/y"),
        &target.map,
        &target.policy,
    );
    assert!(evil.is_err_and(|refusals| refusals.len() >= 2));
}

/// Option, the source's value, and this host's: `IMAGES` stands for where its images are.
const TRANSLATED: &[(&str, &str, &str)] = &[
    (
        "-drive",
        "file=/srv/vm/disk.qcow2,if=virtio,format=qcow2",
        "file=IMAGES/disk.qcow2,if=virtio,format=qcow2",
    ),
    ("-drive", "format=raw,file=/srv/vm/a,,b.raw", "format=raw,file=IMAGES/a,,b.raw"),
    (
        "-drive",
        "if=pflash,format=raw,readonly=on,file=/srv/vm/OVMF.fd",
        "if=pflash,format=raw,readonly=on,file=IMAGES/OVMF.fd",
    ),
    (
        "-blockdev",
        r#"{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"/srv/vm/disk.qcow2"}}"#,
        r#"{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"IMAGES/disk.qcow2"}}"#,
    ),
    (
        "-blockdev",
        "driver=raw,node-name=n,file.driver=file,file.filename=/srv/vm/disk.qcow2",
        "driver=raw,node-name=n,file.driver=file,file.filename=IMAGES/disk.qcow2",
    ),
    (
        "-netdev",
        "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=on",
        "tap,id=n,ifname=vm7-tap,script=no,downscript=no,vhost=on",
    ),
    ("-netdev", "tap,id=n,ifname=tap0", "tap,id=n,ifname=vm7-tap,script=no,downscript=no"),
    (
        "-netdev",
        "tap,id=n,ifname=tap0,script=/etc/up,downscript=no",
        "tap,id=n,ifname=vm7-tap,script=/opt/target/up,downscript=no",
    ),
    (
        "-netdev",
        r#"{"type":"tap","id":"n","ifname":"tap0"}"#,
        r#"{"type":"tap","id":"n","ifname":"vm7-tap","script":"no","downscript":"no"}"#,
    ),
    ("-netdev", "user,id=n,net=10.0.2.0/24", "user,id=n,net=10.0.2.0/24"),
    ("-kernel", "/srv/vm/vmlinuz", "IMAGES/vmlinuz"),
    ("-append", "root=/dev/vda init=/bin/sh", "root=/dev/vda init=/bin/sh"),
    ("-bios", "bios-256k.bin", "bios-256k.bin"),
    ("-serial", "file:/srv/vm/serial.log", "file:IMAGES/serial.log"),
    ("-chardev", "socket,id=c,path=/srv/vm/c.sock,server=on", "socket,id=c,path=IMAGES/c.sock,server=on"),
    ("-qmp", "unix:/srv/vm/own.sock,server=on,wait=off", "unix:IMAGES/own.sock,server=on,wait=off"),
    ("-vnc", ":1", "127.0.0.1:7"),
    (
        "-object",
        "memory-backend-file,id=m,size=1G,mem-path=/srv/vm/disk.qcow2,share=on",
        "memory-backend-file,id=m,size=1G,mem-path=IMAGES/disk.qcow2,share=on",
    ),
    (
        "-device",
        "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56",
        "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56",
    ),
    ("-fw_cfg", "name=opt/org.x/y,string=a/b", "name=opt/org.x/y,string=a/b"),
    ("-m", "size=1G,slots=2,maxmem=4G", "size=1G,slots=2,maxmem=4G"),
];

#[test]
fn what_belongs_to_a_host_is_put_into_the_targets_words() {
    let target = Target::new();
    let images = target.images();
    for (name, value, expected) in TRANSLATED {
        let expected = expected.replace("IMAGES", images.to_str().unwrap());
        let found =
            target.option(name, value).unwrap_or_else(|refused| panic!("{name} {value}: {refused:?}"));
        if expected.starts_with('{') {
            let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
            assert_eq!(json(&found), json(&expected), "{name} {value}");
        } else {
            assert_eq!(found, expected, "{name} {value}");
        }
    }
}

/// What a peer that means harm could send.
const EVIL: &[(&str, &str)] = &[
    ("-netdev", "tap,id=n,ifname=tap0,script=/tmp/evil"),
    ("-netdev", "tap,id=n,ifname=tap0,downscript=/tmp/evil"),
    ("-netdev", "tap,id=n,ifname=tap0,script=no,script=/tmp/evil"),
    ("-netdev", "tap,id=n,ifname=eth0"),
    ("-netdev", "tap,id=n,ifname=tap0,helper=/bin/sh"),
    ("-netdev", "tap,id=n,fd=3"),
    ("-netdev", "tap,id=n"),
    ("-netdev", "tap,id=n,ifname=tap0,ifname=tap9,script,=x"),
    ("-netdev", r#"{"type":"tap","id":"n","ifname":"tap0","script":"/tmp/evil"}"#),
    ("-netdev", r#"{"type":"tap","id":"n","ifname":"tap0","script":{"x":"/tmp/evil"}}"#),
    ("-netdev", "bridge,id=n,helper=/bin/sh"),
    ("-netdev", "user,id=n,smb=/"),
    ("-netdev", "user,id=n,tftp=/etc"),
    ("-netdev", "user,id=n,guestfwd=tcp:10.0.2.100:80-cmd:/bin/sh"),
    ("-netdev", "user,id=n,hostfwd=tcp::22-:22"),
    ("-netdev", "socket,id=n,listen=:1234"),
    ("-netdev", "vhost-user,id=n,chardev=c"),
    ("-netdev", "passt,id=n"),
    ("-nic", "tap,ifname=tap0,helper=/bin/sh"),
    ("-nic", "bridge"),
    ("-net", "tap,script=/bin/sh"),
    ("-drive", "file=/etc/shadow,format=raw"),
    ("-drive", "file=/srv/vm/link,format=raw"),
    ("-drive", "file=/srv/vm/../secret,format=raw"),
    ("-drive", "file=/srv/vm/disk.qcow2"),
    ("-drive", "file=json:{\"driver\":\"file\"},format=raw"),
    ("-drive", "file=nbd:evil:1,format=raw"),
    ("-drive", "file=/srv/vm/disk.qcow2,format=raw,file=/etc/shadow"),
    ("-drive", "format=raw,file.driver=nbd,file.host=evil"),
    ("-drive", "format=raw,file.filename=/etc/shadow"),
    ("-drive", "file=ssh://evil/x,format=raw"),
    ("-drive", "file=fat:rw:/etc,format=raw"),
    ("-drive", "file=/srv/vm/disk.qcow2,format=qcow2,backing.file.filename=/etc/shadow"),
    ("-drive", "file=/srv/vm/missing,format=raw"),
    ("-drive", "file=disk.qcow2,format=raw"),
    ("-blockdev", r#"{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}"#),
    ("-blockdev", r#"{"driver":"nbd","server":{"type":"inet","host":"evil"}}"#),
    ("-blockdev", "driver=vvfat,node-name=n,dir=/etc"),
    ("-blockdev", "driver=file,filename=/srv/vm/link"),
    ("-blockdev", "{\"driver\":"),
    ("-chardev", "pipe,id=c,path=/srv/vm/p"),
    ("-chardev", "serial,id=c,path=/dev/sda"),
    ("-chardev", "socket,id=c,host=0.0.0.0,port=1,server=on"),
    ("-chardev", "file,id=c,path=/etc/cron.d/x"),
    ("-chardev", "null,id=c,logfile=/etc/cron.d/x"),
    ("-chardev", "udp,id=c,port=1"),
    ("-serial", "file:/etc/cron.d/x"),
    ("-serial", "tcp::4444,server=on"),
    ("-serial", "/dev/ttyS0"),
    ("-serial", "pipe:/tmp/x"),
    ("-monitor", "telnet::4444,server=on"),
    ("-monitor", "mon:unix:/tmp/x"),
    ("-qmp", "tcp:0.0.0.0:4444,server=on"),
    ("-qmp", "unix:/tmp/x,server=on"),
    ("-vnc", ":2"),
    ("-vnc", "unix:/tmp/x"),
    ("-vnc", ":1,tls-creds=x"),
    ("-vnc", ":1,websocket=80"),
    ("-display", "gtk"),
    ("-spice", "port=1"),
    ("-display", "egl-headless,rendernode=/dev/dri/renderD128"),
    ("-audiodev", "wav,id=a,path=/etc/x"),
    ("-device", "vfio-pci,host=00:01.0"),
    ("-device", "loader,file=/etc/shadow,addr=0"),
    ("-device", "nvme,drive=d"),
    ("-device", "virtio-net-pci,romfile=/etc/shadow"),
    ("-device", "virtio-input-host-pci,evdev=/dev/input/event0"),
    ("-device", "ivshmem-plain,memdev=m"),
    ("-device", "usb-host,hostbus=1"),
    ("-device", "virtio-net-pci,x=/etc/x"),
    ("-device", r#"{"driver":"virtio-net-pci","romfile":"/etc/shadow"}"#),
    ("-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/x"),
    ("-object", "rng-random,id=r,filename=/etc/x"),
    ("-object", "secret,id=s,file=/etc/shadow"),
    ("-object", "filter-dump,id=f,netdev=n,file=/etc/x"),
    ("-object", "input-linux,id=i,evdev=/dev/input/event0"),
    ("-object", "x-remote-object,id=r,fd=3"),
    ("-object", "can-host-socketcan,id=c,if=can0"),
    ("-machine", "q35,dumpdtb=/etc/x"),
    ("-machine", "q35,kernel=/etc/x"),
    ("-kernel", "/etc/shadow"),
    ("-initrd", "/srv/vm/initrd,/etc/shadow"),
    ("-bios", "/etc/shadow"),
    ("-bios", "../x"),
    ("-boot", "splash=/etc/shadow"),
    ("-fw_cfg", "name=opt/x,file=/etc/shadow"),
    ("-smbios", "file=/etc/shadow"),
    ("-smbios", "type=11,path=/etc/shadow"),
    ("-acpitable", "data=/etc/shadow"),
    ("-pidfile", "/etc/x"),
    ("-D", "/etc/x"),
    ("-global", "virtio-net-pci.romfile=/etc/shadow"),
    ("-global", "driver=virtio-net-pci,property=romfile,value=/x"),
    ("-L", "/etc"),
    ("-mem-path", "/etc"),
    ("-readconfig", "/srv/vm/disk.qcow2"),
    ("-plugin", "/srv/vm/disk.qcow2"),
    ("-set", "netdev.n.script=/bin/sh"),
    ("-trace", "file=/etc/x"),
    ("-tpmdev", "passthrough,id=t"),
    ("-gdb", "tcp::1"),
    ("-fsdev", "local,id=f,path=/"),
    ("-virtfs", "local,path=/"),
    ("-iscsi", "id=x"),
    ("-loadvm", "x"),
    ("-runas", "root"),
    ("-chroot", "/"),
    ("-run-with", "chroot=/"),
    ("-add-fd", "fd=3,set=1"),
    ("-hda", "/srv/vm/disk.qcow2"),
    ("-cdrom", "/srv/vm/disk.qcow2"),
    ("-usbdevice", "disk:/etc/x"),
    ("-no-such-option", "x"),
    ("-icount", "shift=1,rr=record,rrfile=/etc/x"),
];

/// Each of these would, at the target, run a program, reach a file outside of what is allowed, open a socket, or
/// hide one of these from a check that reads the line otherwise than QEMU does.
#[test]
fn a_hostile_line_is_refused() {
    let target = Target::new();
    for (name, value) in EVIL {
        match target.option(name, value) {
            Ok(passed) => panic!("{name} {value} became {passed}"),
            Err(refusals) => {
                assert_eq!(refusals.len(), 1, "{refusals:?}");
                assert!(refusals[0].option.contains(name) && refusals[0].reason.len() > 20, "{refusals:?}");
            }
        }
    }
    let alone = target.translate(&["/etc/shadow"]).unwrap_err();
    assert_eq!(alone.len(), 1, "{alone:?}");
    let sh = CommandLine::parse(vec!["/bin/sh".into()]).unwrap();
    assert!(sh.for_target(Path::new("/x"), "q35", None, &target.map, &target.policy).is_err());
}

/// What libvirt passes by descriptor or keeps in a file of one host, and the word that tells what to write instead.
const OF_LIBVIRT: &[(&str, &str, &str)] = &[
    (
        "-object",
        r#"{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/x.aes"}"#,
        "leave it out",
    ),
    ("-chardev", "socket,id=charmonitor,fd=24,server=on,wait=off", "path="),
    ("-netdev", r#"{"type":"tap","fd":"29","vhost":true,"vhostfd":"31","id":"n"}"#, "ifname=TAP"),
    ("-netdev", "tap,fd=29,id=n", "ifname"),
    ("-add-fd", "set=0,fd=26,opaque=x", "-blockdev"),
    ("-blockdev", r#"{"driver":"file","filename":"/dev/fdset/0","node-name":"n"}"#, "filename="),
    ("-device", r#"{"driver":"vhost-vsock-pci","id":"v","guest-cid":3,"vhostfd":"25"}"#, "not known to move"),
    ("-spice", "port=5900", "socket"),
    ("-drive", "file=/srv/vm/gone.img,format=raw", "No such file"),
];

#[test]
fn what_libvirt_keeps_to_one_host_is_refused_with_what_to_write() {
    let target = Target::new();
    for (option, value, instead) in OF_LIBVIRT {
        let refusals = target.option(option, value).expect_err(value);
        let expected = if value.contains("gone.img") { Code::Image } else { Code::CommandLine };
        assert!(refusals[0].reason.contains(instead), "{value}: {refusals:?}");
        assert_eq!(refusals[0].code, expected, "{value}");
    }
    let paused = CommandLine::parse(["q", "-S"].map(str::to_owned).to_vec()).unwrap_err();
    assert!(paused.to_string().contains("Sterna says so itself"), "{paused}");
}

/// What libvirt 10 writes for a VM with a disk, a CD drive, a network and a serial console, its descriptors replaced.
#[test]
fn a_line_of_libvirt_is_passed_on_as_it_is() {
    let target = Target::new();
    let line = [
        ("-name", "guest=web,debug-threads=on"),
        ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        ("-uuid", "8f1d1b0e-65d2-4a0e-9a3c-0f0d2a3f7c11"),
        ("-rtc", "base=utc,driftfix=slew"),
        ("-global", "kvm-pit.lost_tick_policy=delay"),
        ("-boot", "strict=on"),
        ("-msg", "timestamp=on"),
        ("-overcommit", "mem-lock=off"),
        ("-m", "size=1048576k"),
        ("-object", r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":1073741824}"#),
        ("-object", r#"{"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}"#),
        ("-audiodev", r#"{"id":"audio1","driver":"none"}"#),
        ("-mon", "chardev=charmonitor,id=monitor,mode=control"),
        ("-smp", "2,sockets=2,cores=1,threads=1"),
        (
            "-device",
            r#"{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x2"}"#,
        ),
        ("-device", r#"{"driver":"virtio-balloon-pci","id":"balloon0","bus":"pci.1","addr":"0x0"}"#),
        ("-device", r#"{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}"#),
        ("-vnc", ":1,audiodev=audio1"),
    ];
    for (option, value) in line {
        let found = target.option(option, value).unwrap_or_else(|refused| panic!("{value}: {refused:?}"));
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
        assert!(
            found == value.replace(":1,", "127.0.0.1:7,")
                || json(&found).is_some_and(|found| Some(found) == json(value)),
            "{found}"
        );
    }
}

#[test]
fn everything_that_is_refused_is_told_at_once() {
    let target = Target::new();
    let refusals =
        target.translate(&["-readconfig", "/x", "-m", "1G", "-kernel", "/etc/x", "-vnc", ":9"]).unwrap_err();
    let options: Vec<&str> = refusals.iter().map(|refusal| refusal.option.as_str()).collect();
    assert_eq!(options, ["-readconfig /x", "-kernel /etc/x", "-vnc :9"]);
}

#[test]
fn the_size_of_memory_is_what_qemu_would_give() {
    let cases: [(&[&str], u64); 9] = [
        (&[], 128 << 20),
        (&["-m", "64"], 64 << 20),
        (&["-m", "1G"], 1 << 30),
        (&["-m", "1.5g"], 3 << 29),
        (&["-m", "size=512M,slots=2,maxmem=4G"], 512 << 20),
        (&["-m", "64", "-m", "2048"], 2 << 30),
        (
            &[
                "-m",
                "1G",
                "-object",
                "memory-backend-ram,id=mem,size=1G",
                "-machine",
                "q35,memory-backend=mem",
            ],
            1 << 30,
        ),
        (
            &["-m", "1G", "-object", "memory-backend-ram,id=d,size=256M", "-device", "pc-dimm,memdev=d"],
            1280 << 20,
        ),
        (
            &[
                "-m",
                "1G",
                "-object",
                r#"{"qom-type":"memory-backend-ram","id":"d","size":1048576}"#,
                "-device",
                r#"{"driver":"pc-dimm","memdev":"d"}"#,
            ],
            (1 << 30) + (1 << 20),
        ),
    ];
    for (args, bytes) in cases {
        assert_eq!(parse(args).ram_bytes(), Ok(bytes), "{args:?}");
    }
    for wrong in ["x", "", "-1", "99999999E", "18446744073709551615", "1.x", "0xzz", "ä"] {
        let error = parse(&["-m", &format!("size={wrong}")]).ram_bytes().unwrap_err();
        assert!(matches!(error, CommandLineError::Size { .. }), "{wrong:?}");
    }
}

/// A source's own line, translated, is taken by a real QEMU and makes the same VM.
#[test]
fn a_translated_line_makes_the_same_vm() {
    for binary in versions() {
        let stage = Stage::new(&binary);
        let folder = fs::canonicalize(stage.folder.path()).unwrap();
        let mut argv = stage.argv(&[
            "-M",
            "q35",
            "-device",
            "VGA",
            "-smp",
            "2",
            "-object",
            "memory-backend-memfd,id=m0,size=64M,share=on",
            "-machine",
            "memory-backend=m0",
            "-netdev",
            "user,id=n0",
            "-device",
            "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01",
            "-serial",
            "null",
            "-device",
            "virtio-rng-pci",
            "-name",
            "guest=x",
            "-no-reboot",
        ]);
        argv.extend(["-drive".into(), format!("file={}/disk.raw,format=raw,if=virtio", folder.display())]);
        let line = CommandLine::parse(argv).unwrap();
        let launch = stage.launch("source", Vec::new(), None);
        let mut source = stage.start_launch(&Launch { argv: line.for_source(&launch.run_dir), ..launch });
        let (machine, cpu) = (source.qemu.machine_type().unwrap(), source.qemu.cpu_model().unwrap());
        let policy = TargetPolicy { binaries: vec![binary.clone()], path_roots: vec![folder] };
        let launch = stage.launch("target", Vec::new(), None);
        let argv = line.for_target(&launch.run_dir, &machine, Some(&cpu), &HostMap::default(), &policy);
        let argv = argv.unwrap_or_else(|refusals| panic!("{refusals:?}"));
        let mut target = stage.start_launch(&Launch { argv, ..launch });
        assert_eq!(target.qemu.status().unwrap(), RunState::Inmigrate);
        let (ours, theirs) = (source.qemu.fingerprint(), target.qemu.fingerprint());
        let ours = ours.unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(difference(&ours, &theirs.unwrap()), Vec::<String>::new());
        target.qemu.prepare_load().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_line_makes_it_panic(args in proptest::collection::vec("(-{0,2}(machine|M|m|device|drive|netdev|object|vnc|serial|x|))?[ -~ä]{0,24}", 0..12)) {
        let target = Target::new();
        if let Ok(line) = CommandLine::parse(args) {
            let _ = line.for_target(Path::new("/run/x"), "q35", Some("max"), &target.map, &target.policy);
            let _ = line.ram_bytes();
            prop_assert_eq!(&CommandLine::parse(line.to_argv()).unwrap(), &line);
        }
    }
}

#[test]
fn huge_pages_are_counted_by_size() {
    let of = |words: &str| {
        // As a target runs it.
        let argv: Vec<String> = format!("{words} -incoming defer -S").split(' ').map(str::to_owned).collect();
        huge_pages(&argv)
            .into_iter()
            .map(|pages| (pages.page_bytes >> 20, pages.bytes >> 20))
            .collect::<Vec<_>>()
    };
    let memfd = "q -object memory-backend-memfd,id=ram,size=1G,hugetlb=";
    assert_eq!(of(&format!("{memfd}on,hugetlbsize=2M")), [(2, 1024)]);
    assert_eq!(of(&format!("{memfd}true,hugetlbsize=1G")), [(1024, 1024)]);
    assert_eq!(of(&format!("{memfd}on")).len(), 1, "the kernel's own size");
    assert_eq!(of(&format!("{memfd}off")), []);
    assert_eq!(of(&format!("{memfd}on,hugetlbsize=2M,reserve=off")), []);
    assert_eq!(of("q -m 512 -mem-path /tmp -object memory-backend-ram,id=a,size=1G"), []);
    let json =
        r#"{"qom-type":"memory-backend-memfd","id":"a","size":4194304,"hugetlb":true,"hugetlbsize":2097152}"#;
    assert_eq!(of(&format!("q -object {json}")), [(2, 4)]);
}
