//! Migrations that were begun: list, status, abort, switch, set.

use super::migrate::outcome;
use crate::args::{Format, Set, Which};
use crate::client::{Client, segment};
use crate::exit::{Exit, Failure};
use crate::follow::{follow, is_final};
use crate::human::{age, bytes};
use crate::interrupt::Interrupts;
use crate::postcopy;
use crate::progress::Progress;
use crate::show;
use hyper::Method;
use sterna_agent::model::{MemoryReport, MemoryView, MigrationView, RamView, SetRequest, VmView};

/// `sterna migrations`
pub(crate) async fn list(client: &Client, format: Format) -> Result<Exit, Failure> {
    let views: Vec<MigrationView> = client.fetch("/v1/migrations").await?;
    let wide = format == Format::Wide;
    let columns: &[&str] = match wide {
        false => &["ID", "VM", "FROM", "TO", "STATUS", "BEGAN", "TOTAL MS", "DOWNTIME MS"],
        true => &["ID", "VM", "FROM", "TO", "STATUS", "BEGAN", "TOTAL MS", "DOWNTIME MS", "WIRE", "ERROR"],
    };
    show::list(format, &views, columns, |view| {
        let mut row = vec![view.id.clone(), view.vm.clone(), view.source.clone(), view.target.clone()];
        row.extend([
            view.status.clone(),
            format!("{} ago", age(view.began)),
            format!("{:.1}", view.total_time),
        ]);
        row.push(view.downtime.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}")));
        if wide {
            row.extend([bytes(view.wire_bytes), view.error_desc.clone().unwrap_or_default()]);
        }
        row
    })?;
    Ok(Exit::Done)
}

/// `sterna status`
pub(crate) async fn status(client: &Client, args: &Which) -> Result<Exit, Failure> {
    match find(client, &args.which).await? {
        Some(view) => {
            print_view(args.output.format, &view)?;
            tell_if_back(client, &view).await?;
        }
        None => print_none(client, args).await?,
    }
    Ok(Exit::Done)
}

/// A VM that left and is listed here again: what its migration says of it is history.
async fn tell_if_back(client: &Client, view: &MigrationView) -> Result<(), Failure> {
    let vms: Vec<VmView> = client.fetch("/v1/vms").await?;
    if view.status == "completed" && vms.iter().any(|vm| vm.name == view.vm && vm.state != "incoming") {
        let MigrationView { vm, source, .. } = view;
        eprintln!(
            "sterna: since then {vm} has come back to {source}, or a new VM was given its name; see `sterna ps`"
        );
    }
    Ok(())
}

/// The migration with this id, or the newest of the VM with this name.
async fn find(client: &Client, which: &str) -> Result<Option<MigrationView>, Failure> {
    let mut views: Vec<MigrationView> = client.fetch("/v1/migrations").await?;
    let found = views
        .iter()
        .position(|view| view.id == which)
        .or_else(|| views.iter().position(|view| view.vm == which));
    Ok(found.map(|index| views.swap_remove(index)))
}

/// A VM that was never moved has QEMU's status `none`.
async fn print_none(client: &Client, args: &Which) -> Result<(), Failure> {
    let vm: VmView = client.fetch(&format!("/v1/vms/{}", segment(&args.which))).await?;
    let json = serde_json::json!({ "vm": vm.name, "status": "none", "state": vm.state });
    match args.output.format {
        Format::Json => show::json(&json),
        Format::Jsonl => show::json_line(&json),
        Format::Table | Format::Wide => {
            show::pairs(&[("Job type", "None".to_owned()), ("VM", format!("{}, {}", vm.name, vm.state))])
        }
    }
}

fn print_view(format: Format, view: &MigrationView) -> Result<(), Failure> {
    match format {
        Format::Json => show::json(view),
        Format::Jsonl => show::json_line(view),
        Format::Table | Format::Wide => show::pairs(&job_info(view)),
    }
}

/// Labels and order of `virsh domjobinfo`; what it does not have comes last.
fn job_info(view: &MigrationView) -> Vec<(&'static str, String)> {
    let ram = &view.ram;
    let ms = |time: f64| format!("{time:.1} ms");
    let job = match view.status.as_str() {
        "completed" => "Completed",
        "failed" => "Failed",
        "cancelled" => "Cancelled",
        "unresolved" => "Unresolved",
        _ => "Unbounded",
    };
    let mut rows = vec![
        ("Job type", job.to_owned()),
        ("Operation", "Outgoing migration".to_owned()),
        ("Time elapsed", ms(view.total_time)),
        ("Data processed", bytes(ram.transferred.saturating_add(view.device_state))),
        ("Data remaining", bytes(ram.remaining)),
        ("Data total", bytes(ram.total)),
        ("Memory processed", bytes(ram.transferred)),
        ("Memory remaining", bytes(ram.remaining)),
        ("Memory total", bytes(ram.total)),
        ("Memory bandwidth", format!("{}/s", bytes((ram.mbps * 1e6 / 8.0) as u64))),
        ("Dirty rate", format!("{} pages/s", ram.dirty_pages_rate)),
        ("Page size", format!("{} bytes", ram.page_size)),
        ("Iteration", ram.dirty_sync_count.to_string()),
        ("Constant pages", ram.duplicate.to_string()),
        ("Normal pages", ram.normal.to_string()),
        ("Normal data", bytes(ram.normal_bytes)),
    ];
    rows.extend(savings(view));
    rows.extend(postcopy::rows(view));
    rows.extend(
        view.expected_downtime.filter(|_| !is_final(view)).map(|time| ("Expected downtime", ms(time))),
    );
    rows.extend(view.downtime.map(|time| ("Total downtime", ms(time))));
    rows.push(("Setup time", ms(view.setup_time)));
    rows.extend(our_rows(view));
    rows
}

/// What has gone of its template to a target that lacked it.
pub(super) fn template_sent(ram: &RamView) -> String {
    match ram.template_bytes < ram.template_total {
        true => format!("{} of {}", bytes(ram.template_bytes), bytes(ram.template_total)),
        false => bytes(ram.template_bytes),
    }
}

/// What did not have to travel; what saved nothing is left out.
fn savings(view: &MigrationView) -> impl Iterator<Item = (&'static str, String)> {
    let ram = &view.ram;
    let delta = format!("{} in {} pages", bytes(ram.delta_saved_bytes), ram.delta_pages);
    let throttle = format!("{} %", view.cpu_throttle_percentage);
    [
        ("Saved by postponing", ram.postponed_bytes, bytes(ram.postponed_bytes)),
        ("Shared with the template", ram.template_pages, bytes(ram.template_pages * ram.page_size)),
        ("Shared with others", ram.common_pages, bytes(ram.common_pages * ram.page_size)),
        ("Sent to be shared", ram.common_bytes, bytes(ram.common_bytes)),
        (
            "Not shared for want of mappings",
            ram.common_fallback_pages,
            bytes(ram.common_fallback_pages * ram.page_size),
        ),
        ("Template sent", ram.template_total, template_sent(ram)),
        ("Given to the balloon", ram.balloon_bytes, bytes(ram.balloon_bytes)),
        ("Saved by delta", ram.delta_saved_bytes, delta),
        ("Saved by compression", ram.compression_saved_bytes, bytes(ram.compression_saved_bytes)),
        // As virsh calls it.
        ("Auto converge throttle", view.cpu_throttle_percentage.into(), throttle),
    ]
    .into_iter()
    .filter(|(_, value, _)| *value > 0)
    .map(|(label, _, text)| (label, text))
}

fn our_rows(view: &MigrationView) -> Vec<(&'static str, String)> {
    let rate =
        |rate: Option<u64>| rate.map_or_else(|| "none".to_owned(), |rate| format!("{}/s", bytes(rate)));
    let runs_at = match (view.runs_at.as_str(), view.run_state.as_str()) {
        ("", _) => "nowhere: it is stopped".to_owned(),
        (host, "running") => host.to_owned(),
        (host, state) => format!("{host} ({state})"),
    };
    let mut rows = vec![
        ("VM", format!("{}, from {} to {}", view.vm, view.source, view.target)),
        ("Status", view.status.clone()),
        ("Runs at", runs_at),
        ("Bandwidth limit", rate(view.max_bandwidth)),
        ("Downtime limit", format!("{} ms", view.downtime_limit)),
        ("On the wire", bytes(view.wire_bytes)),
        ("Migration", view.id.clone()),
    ];
    rows.extend(memory(&view.memory));
    if view.min_bandwidth.is_some() {
        rows.push(("Bandwidth minimum", rate(view.min_bandwidth)));
        rows.push(("Pace", rate(view.pace)));
    }
    rows.extend(view.notices.iter().map(|text| ("Notice", text.clone())));
    rows.extend(view.error_desc.iter().map(|why| ("Error", why.clone())));
    rows.extend(view.reasons.iter().map(|reason| ("Reason", format!("{}: {}", reason.code, reason.text))));
    rows
}

/// What memory its QEMU takes, here and there.
fn memory(report: &MemoryReport) -> impl Iterator<Item = (&'static str, String)> {
    let text = |used: MemoryView| {
        let MemoryView { rss, pss, shared, own } = used;
        let (rss, pss, shared, own) = (bytes(rss), bytes(pss), bytes(shared), bytes(own));
        format!("RSS {rss}, PSS {pss}, shared {shared}, own {own}")
    };
    let head_room = |left: i64| {
        let size = bytes(left.unsigned_abs());
        if left < 0 {
            format!("{size} too little, if nothing were shared")
        } else {
            format!("{size}, if nothing were shared")
        }
    };
    [
        ("Memory at the source", report.source.map(text)),
        ("Memory at the target", report.target.map(text)),
        ("Head room there", report.head_room.map(head_room)),
    ]
    .into_iter()
    .filter_map(|(label, text)| Some((label, text?)))
}

/// The VM's migration that goes on.
async fn running(client: &Client, which: &str) -> Result<MigrationView, Failure> {
    match find(client, which).await? {
        Some(view) if !is_final(&view) => Ok(view),
        Some(view) => {
            let text = format!("VM {} is not being moved: its last migration is {}", view.vm, view.status);
            Err(Failure::new(Exit::Usage, text))
        }
        None => {
            let text = format!("{which} is not being moved: `sterna migrations` lists what is");
            Err(Failure::new(Exit::Usage, text))
        }
    }
}

/// `sterna abort`: done when the migration ended without moving the VM.
pub(crate) async fn abort(client: &Client, args: &Which) -> Result<Exit, Failure> {
    let mut interrupts = Interrupts::listen()?;
    let view = running(client, &args.which).await?;
    client.delete(&format!("/v1/migrations/{}", segment(&view.id))).await?;
    let view = follow(client, view, &mut Progress::Quiet, &mut interrupts).await?;
    match args.output.format {
        Format::Json => show::json(&view)?,
        Format::Jsonl => show::json_line(&view)?,
        Format::Table | Format::Wide => show::print(&format!("{}: {}\n", view.vm, aborted(&view)))?,
    }
    Ok(match outcome(&view) {
        Exit::Cancelled => Exit::Done,
        Exit::Attention => Exit::Attention,
        _ => Exit::Failed,
    })
}

fn aborted(view: &MigrationView) -> String {
    match view.status.as_str() {
        "cancelled" => format!("cancelled; it runs at {}", view.source),
        "completed" => format!("too late; it runs at {}", view.target),
        "failed" => format!("failed by itself; it runs at {}", view.source),
        _ => format!("{}; `sterna status {}` shows more", view.status, view.vm),
    }
}

/// `sterna postcopy`: done when the agent has taken it, as `virsh migrate-postcopy` is.
pub(crate) async fn postcopy(client: &Client, args: &Which) -> Result<Exit, Failure> {
    let view = running(client, &args.which).await?;
    let path = format!("/v1/migrations/{}/postcopy", segment(&view.id));
    let view: MigrationView = client.send(Method::POST, &path, &serde_json::json!({}), None).await?;
    print_changed(args.output.format, &view)
}

/// `sterna set`
pub(crate) async fn set(client: &Client, args: &Set) -> Result<Exit, Failure> {
    let view = running(client, &args.which.which).await?;
    let request = SetRequest {
        max_bandwidth: args.limits.bandwidth,
        min_bandwidth: args.limits.min_bandwidth,
        auto_converge: args.auto_converge,
        downtime_limit: args.limits.max_downtime,
    };
    let path = format!("/v1/migrations/{}", segment(&view.id));
    let view: MigrationView = client.send(Method::PATCH, &path, &request, None).await?;
    print_changed(args.which.output.format, &view)
}

/// Silence is success, as `virsh migrate-setspeed` has it.
fn print_changed(format: Format, view: &MigrationView) -> Result<Exit, Failure> {
    match format {
        Format::Json => show::json(view)?,
        Format::Jsonl => show::json_line(view)?,
        Format::Table | Format::Wide => {}
    }
    Ok(Exit::Done)
}
