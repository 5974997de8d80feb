//! `sterna migrate` of several VMs: they leave together, and each has a line of its own.

use super::migrate::{outcome, post, print_job, request, unhappy_end};
use crate::args::{Format, Migrate};
use crate::client::Client;
use crate::exit::{Exit, Failure};
use crate::follow::follow;
use crate::human::bytes;
use crate::interrupt::Interrupts;
use crate::progress::Progress;
use crate::show;
use std::collections::BTreeSet;
use sterna_agent::model::{GangRequest, GangView, MigrationView};

/// Moves several VMs, and waits for all of them.
pub(crate) async fn run(client: &Client, args: &Migrate) -> Result<Exit, Failure> {
    let names: BTreeSet<&String> = args.vms.iter().collect();
    if names.len() < args.vms.len() {
        return Err(Failure::new(Exit::Usage, "a VM is named twice"));
    }
    let format = args.output.format;
    let migrations = args.vms.iter().map(|vm| request(args, vm)).collect();
    // Before they begin: who interrupts in between cancels all of them.
    let interrupts = args.vms.iter().map(|_| Interrupts::listen()).collect::<Result<Vec<_>, _>>()?;
    let gang: GangView = post(client, "/v1/gangs", &GangRequest { migrations }).await?;
    if args.detach {
        match format {
            Format::Json => show::json(&gang.migrations)?,
            _ => gang.migrations.iter().try_for_each(|view| print_job(format, view))?,
        }
        return conclude(Vec::new(), &gang, Vec::new());
    }
    let mut following = Vec::new();
    let bars = Progress::several(format, args.quiet, gang.migrations.len());
    for ((first, mut progress), mut interrupts) in gang.migrations.iter().cloned().zip(bars).zip(interrupts) {
        let client = client.clone();
        following.push(tokio::spawn(async move {
            progress.show(&first);
            let end = follow(&client, first, &mut progress, &mut interrupts).await;
            progress.finish();
            end
        }));
    }
    let (mut ends, mut failures) = (Vec::new(), Vec::new());
    for follow in following {
        match follow.await {
            Ok(Ok(view)) => ends.push(view),
            Ok(Err(why)) => failures.push(why),
            Err(why) => failures.push(Failure::new(Exit::Attention, why.to_string())),
        }
    }
    if !ends.is_empty() || matches!(format, Format::Json | Format::Jsonl) {
        table(format, &ends)?;
    }
    conclude(ends, &gang, failures)
}

fn table(format: Format, ends: &[MigrationView]) -> Result<(), Failure> {
    let ms = |time: f64| format!("{time:.1}");
    let columns = ["VM", "FROM", "TO", "STATUS", "TOTAL MS", "DOWNTIME MS", "WIRE", "SHARED"];
    show::list(format, ends, &columns, |view| {
        let ram = &view.ram;
        let shared = (ram.template_pages + ram.common_pages) * ram.page_size;
        vec![
            view.vm.clone(),
            view.source.clone(),
            view.target.clone(),
            view.status.clone(),
            ms(view.total_time),
            view.downtime.map_or_else(|| "-".to_owned(), ms),
            bytes(view.wire_bytes + ram.common_bytes),
            if shared == 0 { "-".to_owned() } else { bytes(shared) },
        ]
    })
}

/// The gravest end is that of all.
fn conclude(ends: Vec<MigrationView>, gang: &GangView, failures: Vec<Failure>) -> Result<Exit, Failure> {
    let mut all = failures;
    for view in ends {
        let exit = outcome(&view);
        if exit != Exit::Done {
            all.push(Failure { exit, text: unhappy_end(exit, &view), reasons: view.reasons });
        }
    }
    for refused in &gang.refused {
        // Where others move it is no mere mistake: something was changed.
        let exit = if gang.migrations.is_empty() { Exit::Usage } else { Exit::Failed };
        let text = match refused.text.contains(&refused.vm) {
            true => refused.text.clone(),
            false => format!("VM {} was not moved: {}", refused.vm, refused.text),
        };
        all.push(Failure::new(exit, text));
    }
    let graveness = |failure: &Failure| match failure.exit {
        Exit::Attention => 0,
        Exit::Failed => 1,
        Exit::Refused => 2,
        Exit::Usage => 3,
        _ => 4,
    };
    all.sort_by_key(graveness);
    if all.is_empty() {
        return Ok(Exit::Done);
    }
    let gravest = all.remove(0);
    for failure in all {
        let _ = failure.report();
    }
    Err(gravest)
}
