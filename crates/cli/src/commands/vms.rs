//! VMs and hosts: run, list, stop.

use crate::args::{Format, Run};
use crate::client::{Client, segment};
use crate::exit::{Exit, Failure, tell};
use crate::human::{age, short_bytes};
use crate::show;
use hyper::Method;
use sterna_agent::model::{HostView, MemoryView, RunRequest, VmView};

/// `sterna run`
pub(crate) async fn run(client: &Client, args: Run) -> Result<Exit, Failure> {
    let request = RunRequest { name: args.name, argv: args.argv, template: args.template };
    let vm: VmView = client.send(Method::POST, "/v1/vms", &request, None).await?;
    print_vms(args.output.format, &[vm], One::Only)
}

/// `sterna ps`
pub(crate) async fn ps(client: &Client, format: Format) -> Result<Exit, Failure> {
    let path = if matches!(format, Format::Wide | Format::Json) { "/v1/vms?memory=true" } else { "/v1/vms" };
    let vms: Vec<VmView> = client.fetch(path).await?;
    print_vms(format, &vms, One::OfMany)
}

/// Whether JSON is the object itself or a list of it.
#[derive(PartialEq, Eq)]
enum One {
    Only,
    OfMany,
}

fn print_vms(format: Format, vms: &[VmView], one: One) -> Result<Exit, Failure> {
    let wide = format == Format::Wide;
    let columns: &[&str] = match wide {
        false => &["NAME", "STATE", "PID", "RAM", "AGE", "MIGRATION"],
        true => &[
            "NAME",
            "STATE",
            "PID",
            "RAM",
            "AGE",
            "MIGRATION",
            "RSS",
            "PSS",
            "SHARED",
            "OWN",
            "GENERATION",
            "TEMPLATE",
            "LOG",
            "COMMAND",
        ],
    };
    let row = |vm: &VmView| {
        let migration = vm.migration.clone().unwrap_or_else(|| "-".to_owned());
        let (pid, ram) = (vm.pid.to_string(), short_bytes(vm.ram_bytes));
        let mut row = vec![vm.name.clone(), vm.state.clone(), pid, ram, age(vm.since), migration];
        if wide {
            let memory = vm.memory.as_ref();
            let figure = |of: fn(&MemoryView) -> u64| {
                memory.map_or_else(|| "-".to_owned(), |found| short_bytes(of(found)))
            };
            row.extend([
                figure(|of| of.rss),
                figure(|of| of.pss),
                figure(|of| of.shared),
                figure(|of| of.own),
            ]);
            let template = vm.template.clone().unwrap_or_else(|| "-".to_owned());
            row.extend([vm.generation.to_string(), template, vm.log.clone(), vm.argv.join(" ")]);
        }
        row
    };
    match (format, vms) {
        (Format::Json, [vm]) if one == One::Only => show::json(vm)?,
        _ => show::list(format, vms, columns, row)?,
    }
    // JSON has the notices in its objects; a table has no room for sentences.
    if matches!(format, Format::Table | Format::Wide) {
        for vm in vms {
            vm.notice.iter().for_each(|notice| tell(&format!("{}: {notice}", vm.name)));
        }
    }
    Ok(Exit::Done)
}

/// `sterna hosts`
pub(crate) async fn hosts(client: &Client, format: Format) -> Result<Exit, Failure> {
    let hosts: Vec<HostView> = client.fetch("/v1/hosts").await?;
    show::list(format, &hosts, &["NAME", "ADDRESS", ""], |host| {
        let mark = if host.local { "this host" } else { "" };
        vec![host.name.clone(), host.address.clone(), mark.to_owned()]
    })?;
    Ok(Exit::Done)
}

/// `sterna stop`
pub(crate) async fn stop(client: &Client, name: &str) -> Result<Exit, Failure> {
    client.delete(&format!("/v1/vms/{}", segment(name))).await?;
    Ok(Exit::Done)
}
