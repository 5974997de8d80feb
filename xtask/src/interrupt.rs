//! Ctrl-C: whoever interrupts a measurement gets the prompt back when the lab is gone, not before.
//!
//! SIGKILL needs nothing here: a lab removes itself when its owner is gone.

use std::process::exit;

use sterna_lab::process::ProcessId;
use sterna_lab::state::{self, Owner, State};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

/// What shells report for a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// From now on SIGINT and SIGTERM remove this process' labs and end it. Programs that it starts do not inherit this.
pub(crate) fn clean_up_when_interrupted() -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        eprintln!("\ninterrupted: removing the lab");
        remove_own_labs();
        end_children();
        sterna_lab::setting::put_all_back();
        exit(INTERRUPTED);
    });
    Ok(())
}

/// Commands that were waited for: without their agents they would ask for a minute where those are.
fn end_children() {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let children = tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .collect::<String>();
    let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.filter_map(ProcessId::of).for_each(|child| drop(child.kill()));
}

fn remove_own_labs() {
    let own = |lab: &State| matches!(lab.owner, Owner::Process(id) if id.pid == std::process::id());
    for lab in state::all().unwrap_or_default().iter().filter(|lab| own(lab)) {
        if let Err(why) = lab.remove() {
            eprintln!("{}: {why}; run `sterna-lab down`", lab.name);
        }
    }
}
