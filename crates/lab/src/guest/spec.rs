//! A guest as data, and the command line that QEMU gets for it.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Kernel options that make an emulated guest start soon and keep its clock: 1.6 s instead of 2.3 s to the first process.
/// The time-stamp counter is declared good, since the watchdog of an emulated CPU that had to wait would discard it.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet mitigations=off tsc=reliable no_timer_check nokaslr \
    random.trust_cpu=on rcupdate.rcu_expedited=1 cryptomgr.notests audit=0 panic=-1";

/// A guest that is the same on every host; what differs between hosts is in [`HostSide`].
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// QEMU's `-name`.
    pub name: String,
    /// RAM.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// The machine type, without a version.
    pub machine: Machine,
    /// What RAM is made of on the host.
    pub ram: Ram,
    /// The host's kernel may merge its pages with others that are equal, as QEMU has it by default.
    pub mergeable: bool,
    /// A video card.
    pub vga: Vga,
    /// A network card.
    pub nic: Option<Nic>,
    /// A virtio disk.
    pub disk: Option<Disk>,
    /// Further arguments for QEMU, as they are: devices and what belongs to them.
    pub extra: Vec<String>,
    /// What runs inside.
    pub programs: Vec<Program>,
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

/// QEMU's machine types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// The current PC: PCI Express.
    Q35,
    /// The old PC: PCI.
    Pc,
    /// No PCI, few devices.
    Microvm,
}

/// What guest RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ram {
    /// `-m` alone: private anonymous memory.
    Plain,
    /// A memfd that is mapped copy-on-write.
    PrivateMemfd,
    /// A memfd that is mapped shared.
    SharedMemfd,
    /// A memfd in huge pages of 2 MiB that is mapped copy-on-write.
    PrivateHuge,
    /// A memfd in huge pages of 2 MiB that is mapped shared.
    SharedHuge,
    /// A nameless file on tmpfs that is mapped copy-on-write.
    PrivateFile,
    /// A nameless file on tmpfs that is mapped shared.
    SharedFile,
}

/// The video card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vga {
    /// None.
    Absent,
    /// QEMU's standard card, with 16 MiB of video memory.
    Standard,
}

/// The network card, as the guest sees it.
#[derive(Debug, Clone)]
pub struct Nic {
    /// Its hardware address.
    pub mac: String,
    /// The address that the guest takes, on a network of 24 bits.
    pub address: Ipv4Addr,
}

impl Nic {
    /// The card of the guest with this number in a lab.
    #[must_use]
    pub fn of_guest(number: u8, address: Ipv4Addr) -> Nic {
        // 52:54:00 is QEMU's own range.
        Nic { mac: format!("52:54:00:76:00:{number:02x}"), address }
    }
}

/// A disk image that both hosts reach under the same path.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// Its format in QEMU's words: `raw`, `qcow2`.
    pub format: String,
}

/// What the guest runs.
#[derive(Debug, Clone)]
pub enum Program {
    /// A Redis server on port 6379.
    Redis,
    /// A web server on port 80 (only in the image with servers).
    Web,
    /// An iperf3 server on its usual port (only in the image with servers).
    Iperf3,
    /// A game's server on port 27960, which moves 20 times a second.
    Game,
    /// A datagram to this address every millisecond.
    Beacon(SocketAddrV4),
    /// The memory load with its options (`--fill=200`, `--dirty=64`, `--rate=20`, `--check`, ...).
    Load(Vec<String>),
    /// Uses whatever devices there are, all the time.
    UseDevices,
    /// Sterna's helper; it needs a port ([`GuestSpec::with_helper_port`]).
    Helper,
}

impl Program {
    fn text(&self) -> String {
        match self {
            Program::Redis => "redis".to_owned(),
            Program::Web => "web".to_owned(),
            Program::Iperf3 => "iperf3".to_owned(),
            Program::Game => "game".to_owned(),
            Program::Beacon(to) => format!("beacon:{to}"),
            Program::UseDevices => "use".to_owned(),
            Program::Helper => "helper".to_owned(),
            Program::Load(options) => format!("load:{}", options.join("+")),
        }
    }
}

/// Where the guest's console goes.
#[derive(Debug, Clone)]
pub enum Serial {
    /// Into a file, at its end.
    File(PathBuf),
    /// To whoever connects to the socket, and into the file in any case.
    Socket {
        /// The socket.
        socket: PathBuf,
        /// The file.
        log: PathBuf,
    },
}

impl Serial {
    /// The file with everything that the guest printed.
    #[must_use]
    pub fn log(&self) -> &Path {
        match self {
            Serial::File(log) | Serial::Socket { log, .. } => log,
        }
    }
}

/// Whether QEMU boots the guest or waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// It boots here.
    Boot,
    /// It will be migrated to here: `-incoming defer`.
    Incoming,
}

/// What differs from host to host.
#[derive(Debug, Clone)]
pub struct HostSide {
    /// The tap that the network card is joined to.
    pub tap: Option<String>,
    /// The console.
    pub serial: Serial,
    /// A QMP socket, if the command line shall ask for one.
    pub qmp: Option<PathBuf>,
    /// Boots or waits.
    pub arrival: Arrival,
}

impl GuestSpec {
    /// A 1-CPU q35 with plain RAM and nothing else, to be changed by struct update.
    #[must_use]
    pub fn plain(name: &str, memory_mib: u32, kernel: &Path, initramfs: &Path) -> GuestSpec {
        GuestSpec {
            name: name.to_owned(),
            memory_mib,
            vcpus: 1,
            machine: Machine::Q35,
            ram: Ram::Plain,
            mergeable: true,
            vga: Vga::Absent,
            nic: None,
            disk: None,
            extra: Vec::new(),
            programs: Vec::new(),
            kernel: kernel.to_owned(),
            initramfs: initramfs.to_owned(),
        }
    }

    /// The same guest with the port for Sterna's helper, which the host reaches at `socket`.
    #[must_use]
    pub fn with_helper_port(mut self, socket: &Path) -> GuestSpec {
        let mut line = Line(self.extra);
        line.add("-chardev", &format!("socket,id=helper,path={},server=on,wait=off", path(socket)));
        let bus = if self.machine == Machine::Microvm { "device" } else { "pci" };
        line.add("-device", &format!("virtio-serial-{bus}"));
        line.add("-device", "virtserialport,chardev=helper,name=org.sterna.guest.0");
        self.extra = line.0;
        self
    }

    /// QEMU's arguments, without the program.
    #[must_use]
    pub fn arguments(&self, side: &HostSide) -> Vec<String> {
        let mut line = Line::default();
        line.add("-name", &self.name).flag("-nodefaults").flag("-no-user-config").add("-display", "none");
        line.add("-accel", "tcg")
            .add("-smp", &self.vcpus.to_string())
            .add("-m", &self.memory_mib.to_string());
        self.add_ram(&mut line);
        if self.vga == Vga::Standard {
            line.add("-device", "VGA");
        }
        self.add_nic(&mut line, side);
        self.add_disk(&mut line);
        line.0.extend(self.extra.iter().cloned());
        line.add("-kernel", &path(&self.kernel))
            .add("-initrd", &path(&self.initramfs))
            .add("-append", &self.kernel_line());
        add_serial(&mut line, &side.serial);
        if let Some(qmp) = &side.qmp {
            line.add("-qmp", &format!("unix:{},server=on,wait=off", path(qmp)));
        }
        if side.arrival == Arrival::Incoming {
            line.add("-incoming", "defer");
        }
        line.0
    }

    /// The kernel's command line.
    #[must_use]
    pub fn kernel_line(&self) -> String {
        let mut words = vec![KERNEL_OPTIONS.to_owned()];
        if self.machine == Machine::Microvm {
            words.push(format!("tsc_early_khz={}", host_clock_khz()));
        }
        words.extend(self.nic.as_ref().map(|n| format!("sterna.ip={}/24", n.address)));
        if !self.programs.is_empty() {
            let programs: Vec<_> = self.programs.iter().map(Program::text).collect();
            words.push(format!("sterna.run={}", programs.join(",")));
        }
        words.join(" ")
    }

    fn add_ram(&self, line: &mut Line) {
        let machine = match self.machine {
            Machine::Q35 => "q35",
            Machine::Pc => "pc",
            Machine::Microvm => "microvm",
        };
        let merging = if self.mergeable { "" } else { ",mem-merge=off" };
        let kind = match self.ram {
            Ram::Plain => {
                line.add("-machine", &format!("{machine}{merging}"));
                return;
            }
            Ram::PrivateMemfd => "memory-backend-memfd,share=off",
            Ram::SharedMemfd => "memory-backend-memfd,share=on",
            Ram::PrivateHuge => "memory-backend-memfd,share=off,hugetlb=on,hugetlbsize=2M",
            Ram::SharedHuge => "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
            // Given a directory, QEMU makes a file in it and removes its name at once.
            Ram::PrivateFile => "memory-backend-file,share=off,mem-path=/dev/shm",
            Ram::SharedFile => "memory-backend-file,share=on,mem-path=/dev/shm",
        };
        line.add("-object", &format!("{kind},id=ram,size={}M", self.memory_mib));
        line.add("-machine", &format!("{machine}{merging},memory-backend=ram"));
    }

    fn add_nic(&self, line: &mut Line, side: &HostSide) {
        let (Some(nic), Some(tap)) = (&self.nic, &side.tap) else { return };
        line.add("-netdev", &format!("tap,id=net0,ifname={tap},script=no,downscript=no"));
        line.add("-device", &format!("{},netdev=net0,mac={}", self.virtio("net"), nic.mac));
    }

    fn add_disk(&self, line: &mut Line) {
        let Some(disk) = &self.disk else { return };
        line.add("-drive", &format!("file={},format={},if=none,id=disk0", path(&disk.path), disk.format));
        line.add("-device", &format!("{},drive=disk0", self.virtio("blk")));
    }

    /// A machine without PCI has virtio devices of another kind.
    fn virtio(&self, device: &str) -> String {
        let bus = if self.machine == Machine::Microvm { "device" } else { "pci" };
        format!("virtio-{device}-{bus}")
    }
}

fn add_serial(line: &mut Line, serial: &Serial) {
    let chardev = match serial {
        Serial::File(log) => format!("file,id=console,path={},append=on", path(log)),
        Serial::Socket { socket, log } => format!(
            "socket,id=console,path={},server=on,wait=off,logfile={},logappend=on",
            path(socket),
            path(log)
        ),
    };
    line.add("-chardev", &chardev).add("-serial", "chardev:console");
}

/// The host's clock rate, which is that of an emulated CPU's time-stamp counter. A microvm has no clock good enough to
/// measure it by: on a busy machine one boot in three found no rate, and then no timer. All others measure it themselves.
fn host_clock_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    /// A wrong rate only lets the guest's clock run at another speed.
    const UNKNOWN: u64 = 2_000_000;
    *KHZ.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let mhz = text
            .lines()
            .find_map(|l| l.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok());
        mhz.map_or(UNKNOWN, |m| (m * 1e3) as u64)
    })
}

/// A path as QEMU's option parser wants it: commas doubled.
fn path(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, option: &str) -> &mut Line {
        self.0.push(option.to_owned());
        self
    }

    fn add(&mut self, option: &str, value: &str) -> &mut Line {
        self.flag(option).flag(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> GuestSpec {
        GuestSpec::plain("vm", 256, Path::new("/k"), Path::new("/i"))
    }

    fn side() -> HostSide {
        HostSide {
            tap: Some("atap0".into()),
            serial: Serial::File("/s".into()),
            qmp: None,
            arrival: Arrival::Boot,
        }
    }

    #[test]
    fn a_machine_without_pci_gets_other_devices() {
        let nic = Some(Nic::of_guest(0, Ipv4Addr::new(10, 77, 0, 10)));
        let micro = GuestSpec { machine: Machine::Microvm, nic: nic.clone(), ..spec() };
        assert!(
            micro
                .arguments(&side())
                .join(" ")
                .contains("virtio-net-device,netdev=net0,mac=52:54:00:76:00:00")
        );
        let q35 = GuestSpec { nic, ..spec() };
        assert!(
            q35.arguments(&side())
                .join(" ")
                .contains("ifname=atap0,script=no,downscript=no -device virtio-net-pci")
        );
    }

    #[test]
    fn only_a_waiting_qemu_waits() {
        assert!(!spec().arguments(&side()).contains(&"-incoming".to_owned()));
        let waiting = HostSide { arrival: Arrival::Incoming, ..side() };
        assert!(spec().arguments(&waiting).contains(&"-incoming".to_owned()));
    }

    #[test]
    fn a_guest_whose_pages_are_left_alone_says_so() {
        assert!(!spec().arguments(&side()).join(" ").contains("mem-merge"));
        let alone = GuestSpec { mergeable: false, ..spec() };
        assert!(alone.arguments(&side()).contains(&"q35,mem-merge=off".to_owned()));
        let file = GuestSpec { ram: Ram::SharedMemfd, ..alone };
        assert!(file.arguments(&side()).contains(&"q35,mem-merge=off,memory-backend=ram".to_owned()));
    }

    #[test]
    fn the_kernel_line_says_what_to_run() {
        let programs = vec![Program::Redis, Program::Load(vec!["--fill=64".into(), "--check".into()])];
        let line = GuestSpec { programs, ..spec() }.kernel_line();
        assert!(line.ends_with(" sterna.run=redis,load:--fill=64+--check"), "{line}");
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        let disk = Some(Disk { path: "/a,b".into(), format: "raw".into() });
        assert!(GuestSpec { disk, ..spec() }.arguments(&side()).join(" ").contains("file=/a,,b,format=raw"));
    }
}
