//! One file per group of commands.

mod agent;
mod gang;
mod jobs;
mod migrate;
mod pki;
mod recover;
mod shell;
mod template;
mod vms;
mod wws;

pub(crate) use wws::Wws;

use crate::args::{Args, Command, DEFAULT_SOCKET};
use crate::client::Client;
use crate::exit::{Exit, Failure};

/// Does what the command line says.
pub(crate) fn run(args: Args) -> Result<Exit, Failure> {
    let socket = args.socket;
    match args.command {
        Command::Agent(args) => agent::run(&args, socket),
        Command::Pki(args) => pki::run(&args),
        Command::Completion { shell } => shell::completion(shell),
        Command::Man { dir } => shell::man(dir.as_deref()),
        command => {
            let client = Client::new(socket.unwrap_or_else(|| DEFAULT_SOCKET.into()));
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|why| Failure::new(Exit::Failed, format!("no runtime: {why}")))?;
            runtime.block_on(ask(&client, command))
        }
    }
}

/// The commands that ask an agent.
async fn ask(client: &Client, command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Run(args) => vms::run(client, args).await,
        Command::Template(command) => template::run(client, command).await,
        Command::Ps(output) => vms::ps(client, output.format).await,
        Command::Hosts(output) => vms::hosts(client, output.format).await,
        Command::Stop(args) => vms::stop(client, &args.name).await,
        Command::Migrate(args) => migrate::run(client, args).await,
        Command::Migrations(output) => jobs::list(client, output.format).await,
        Command::Status(args) => jobs::status(client, &args).await,
        Command::Abort(args) => jobs::abort(client, &args.which).await,
        Command::Postcopy(args) => jobs::postcopy(client, &args).await,
        Command::Set(args) => jobs::set(client, &args).await,
        Command::Recover(args) => recover::run(client, &args).await,
        Command::Wws(args) => wws::run(client, args).await,
        // These ask no agent: `run` has taken them.
        Command::Agent(_) | Command::Pki(_) | Command::Completion { .. } | Command::Man { .. } => {
            Ok(Exit::Usage)
        }
    }
}
