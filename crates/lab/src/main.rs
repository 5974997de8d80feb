//! `sterna-lab`: the lab for people who want to play by hand.

#![forbid(unsafe_code)]

use std::io::Write;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use sterna_lab::client::{self, ClientOptions};
use sterna_lab::guest::{GuestSpec, HostSide, Nic, Program, Serial};
use sterna_lab::state::{self, State};
use sterna_lab::{Arrival, Lab, LabDir, LabSpec, Wiring, image, net, packages};

/// Hosts as network namespaces, with a shaped link between them and a client that reaches their guests.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Make a lab and keep it until Ctrl-C (or, detached, until `down` with its name)
    Up(Up),
    /// Remove labs whose owner is gone, or the one with the given name
    Down {
        /// The lab's name
        name: Option<String>,
    },
    /// Show all labs of this machine
    Status,
    /// Fetch packages and build the guests' image, and say where they are
    Setup,
    /// Print the command line of a guest with Redis and a beacon, as `qemu-system-x86_64` takes it
    GuestLine(GuestLine),
    /// Write numbered keys to a guest's Redis, listen to its beacon, play its game; print what was lost as JSON
    Client(ClientArgs),
}

#[derive(Args)]
struct Up {
    /// Number of hosts
    #[arg(long, default_value_t = 2)]
    hosts: u8,
    /// Rate of each host's migration link as `tc` writes it, or `none`
    #[arg(long, default_value = "1gbit")]
    rate: String,
    /// Taps for guests on each host
    #[arg(long, default_value_t = 2)]
    taps: u8,
    /// User that may open the taps
    #[arg(long)]
    tap_user: Option<u32>,
    /// One link for migrations and the guests' traffic, as in a host with one network card
    #[arg(long)]
    shared: bool,
    /// Return at once; the lab stays until `sterna-lab down`
    #[arg(long)]
    detach: bool,
}

#[derive(Args)]
struct GuestLine {
    /// The host's tap
    tap: String,
    /// The guest's number, which gives its address (10.77.0.10 is number 0)
    #[arg(long, default_value_t = 0)]
    number: u8,
    /// RAM
    #[arg(long, default_value_t = 1024)]
    memory_mib: u32,
    /// Where its console goes
    #[arg(long, default_value = "/tmp/sterna-guest.serial")]
    serial: PathBuf,
}

#[derive(Args)]
struct ClientArgs {
    /// The guest's Redis
    #[arg(long)]
    redis: Option<SocketAddrV4>,
    /// Port on which the beacon's datagrams arrive
    #[arg(long)]
    beacon: Option<u16>,
    /// The guest's game, to be played
    #[arg(long)]
    game: Option<SocketAddrV4>,
    /// Players of the game
    #[arg(long, default_value_t = client::PLAYERS)]
    players: u8,
    /// Stop after so many seconds; else when standard input ends, or at SIGTERM
    #[arg(long = "for")]
    seconds: Option<u64>,
    /// Writes a second
    #[arg(long, default_value_t = client::WRITES_PER_SECOND)]
    writes_per_second: u32,
    /// Different keys
    #[arg(long, default_value_t = client::KEYS)]
    keys: u32,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Action::Up(up) => bring_up(&up),
        Action::Down { name } => {
            net::down(name.as_deref())?.iter().for_each(|lab| println!("removed {lab}"));
            Ok(())
        }
        Action::Status => {
            state::all()?.iter().for_each(print_lab);
            Ok(())
        }
        Action::Setup => setup(),
        Action::GuestLine(line) => print_guest_line(&line),
        Action::Client(args) => run_client(&args),
    }
}

fn bring_up(up: &Up) -> anyhow::Result<()> {
    let rate = (up.rate != "none").then(|| up.rate.clone());
    let lab = Lab::up(&LabSpec {
        hosts: up.hosts,
        rate,
        taps: up.taps,
        wiring: if up.shared { Wiring::Shared } else { Wiring::Apart },
        tap_user: up.tap_user,
    })?;
    print_ways_in(&lab);
    if up.detach {
        println!("remove it: sterna-lab down {}", lab.detach()?);
        return Ok(());
    }
    println!("Ctrl-C removes it");
    std::io::stdout().flush()?;
    client::wait_for_the_end(None, client::Input::Ignored)?;
    lab.down()?;
    Ok(())
}

fn print_ways_in(lab: &Lab) {
    println!("lab {}", lab.name());
    for host in lab.hosts() {
        println!(
            "host {}: {}, taps {}...: ip netns exec {} sh",
            host.name,
            host.address,
            host.tap(0),
            host.namespace
        );
    }
    println!(
        "client: {}, guests from {}: ip netns exec {} sh",
        lab.client_address(),
        lab.guest_address(0),
        lab.client()
    );
}

fn print_lab(lab: &State) {
    let owner = match (lab.living_owner(), lab.owner) {
        (Some(owner), _) => format!("owner {}", owner.pid),
        (None, state::Owner::Detached) => "detached".to_owned(),
        (None, state::Owner::Process(id)) => format!("owner {} is gone: sterna-lab down", id.pid),
    };
    println!("{} ({owner}): {}", lab.name, lab.namespaces.join(" "));
}

fn setup() -> anyhow::Result<()> {
    let dir = LabDir::open()?;
    let found = packages::ensure(&dir)?;
    println!("QEMU 7.2: {}\nQEMU 10.0: {}", found.qemu_72.display(), found.qemu_10.display());
    println!("kernel: {}\ninitramfs: {}", found.kernel.display(), image::build(&dir, &found)?.display());
    Ok(())
}

fn print_guest_line(line: &GuestLine) -> anyhow::Result<()> {
    let dir = LabDir::open()?;
    let found = packages::ensure(&dir)?;
    let image = image::build(&dir, &found)?;
    let octet = line.number.saturating_add(10);
    let spec = GuestSpec {
        nic: Some(Nic::of_guest(line.number, std::net::Ipv4Addr::new(10, 77, 0, octet))),
        programs: vec![
            Program::Redis,
            Program::Beacon(SocketAddrV4::new([10, 77, 0, 1].into(), client::BEACON_PORT)),
        ],
        ..GuestSpec::plain("guest", line.memory_mib, &found.kernel, &image)
    };
    let serial = Serial::File(line.serial.clone());
    let side = HostSide { tap: Some(line.tap.clone()), serial, qmp: None, arrival: Arrival::Boot };
    let quoted = |a: String| if a.contains(' ') { format!("'{a}'") } else { a };
    println!("{}", spec.arguments(&side).into_iter().map(quoted).collect::<Vec<_>>().join(" "));
    Ok(())
}

fn run_client(args: &ClientArgs) -> anyhow::Result<()> {
    let report = client::run(&ClientOptions {
        redis: args.redis,
        beacon: args.beacon,
        game: args.game,
        players: args.players,
        limit: args.seconds.map(Duration::from_secs),
        writes_per_second: args.writes_per_second,
        keys: args.keys,
    })?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
