//! `sterna-guest`: the helper of Sterna inside of a guest.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use sterna_guest::helper::ask::{Answer, ask};
use sterna_guest::helper::daemon::Daemon;
use sterna_guest::helper::line::is_name;
use sterna_guest::helper::victims::Chooser;
use sterna_guest::helper::{port, watchdog};
use sterna_guest::options::Options;

const HELP: &str = "\
sterna-guest: lets a guest help with its own live migration (optional; guests move without it)

  sterna-guest daemon             serve the host's agent; run it as a service, as root
  sterna-guest migrate-me HOST    ask to be moved to HOST; says what was answered

Options:
  --port=PATH       the serial port; found by its name, org.sterna.guest.0, when absent
  --socket=PATH     where the daemon takes requests; /run/sterna-guest.sock when absent
  --spare=A,B       daemon: never slow these programs (names as ps -o comm shows them)
  --only=A,B        daemon: slow no others than these
  --help, --version

What the daemon does: while the guest is being moved, and writes memory faster than it can be copied, the
host may ask it to slow the processes that write most. They are stopped and let go some 25 times a second, never for more
than 95 % of their time, and for seconds at a time. They run as before when the move is over, when the host says nothing
more, when the daemon ends, and when it is killed. Spared are process 1, system services such as sshd, and --spare.

What the VM needs on its QEMU command line:
  -chardev socket,id=sterna,path=/srv/vm/web.guest,server=on,wait=off
  -device virtio-serial -device virtserialport,chardev=sterna,name=org.sterna.guest.0
The host decides where its guests may ask to go: may-migrate-to in its agent.toml. By default nowhere.

Exit codes: 0 done, 1 refused or no answer, 2 wrong arguments or nobody to ask.";
const SOCKET: &str = "/run/sterna-guest.sock";

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<String> = arguments.extract_if(.., |argument| !argument.starts_with('-')).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let known = ["port", "socket", "spare", "only", "help", "version"];
    let options = match Options::parse(arguments.into_iter(), &known) {
        Ok(options) => options,
        Err(why) => return usage(&why),
    };
    if options.has("help") {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    if options.has("version") {
        println!("sterna-guest {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let socket = Path::new(options.word("socket", SOCKET));
    let port = Some(options.word("port", "")).filter(|path| !path.is_empty()).map(PathBuf::from);
    let port = port.or_else(port::find);
    match words.as_slice() {
        ["daemon"] => serve(port.as_deref(), socket, &options),
        ["migrate-me", host] if is_name(host) => migrate(port.as_deref(), socket, host),
        ["migrate-me", host] => usage(&format!("{host:?} is no name of a host")),
        ["migrate-me"] => usage("migrate-me needs the name of a host"),
        [watchdog::WORD] => {
            watchdog::run();
            ExitCode::SUCCESS
        }
        [] => usage("nothing is to be done"),
        [word, ..] => usage(&format!("{word} is not understood")),
    }
}

fn usage(why: &str) -> ExitCode {
    eprintln!("sterna-guest: {why}; see sterna-guest --help");
    ExitCode::from(2)
}

fn serve(path: Option<&Path>, socket: &Path, options: &Options) -> ExitCode {
    let Some(path) = path else {
        return usage(&format!("this guest has no serial port named {}", port::NAME));
    };
    let opened = match port::open(path) {
        Ok(opened) => opened,
        Err(why) if port::is_taken(&why) => {
            return usage(&format!("{} is in use: another daemon?", path.display()));
        }
        Err(why) => return usage(&format!("{} cannot be opened: {why}", path.display())),
    };
    let names = |option: &str| -> Vec<String> {
        options.word(option, "").split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
    };
    let chooser = Chooser::new(&names("spare"), &names("only"));
    // Without us nobody would let the others go on; the kernel takes another when memory is short.
    drop(std::fs::write("/proc/self/oom_score_adj", "-900"));
    match Daemon::new(opened, socket, chooser).and_then(|mut daemon| daemon.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("sterna-guest: {}: {why}", path.display());
            ExitCode::FAILURE
        }
    }
}

fn migrate(port: Option<&Path>, socket: &Path, host: &str) -> ExitCode {
    match ask(socket, port, host) {
        Ok(Answer::Accepted { migration, host }) => {
            println!("accepted: migration {migration} to {host}");
            ExitCode::SUCCESS
        }
        Ok(Answer::Refused(why)) => {
            println!("refused: {why}");
            ExitCode::FAILURE
        }
        Err(why) => usage(&why),
    }
}
