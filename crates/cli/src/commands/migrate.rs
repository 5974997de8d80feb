//! `sterna migrate`: asks, waits, and tells what became of the VM.

use super::gang;
use super::jobs::template_sent;
use crate::args::{Format, Migrate, SendTemplate};
use crate::client::{Client, ClientError, segment};
use crate::exit::{Exit, Failure};
use crate::follow::follow;
use crate::human::bytes;
use crate::interrupt::Interrupts;
use crate::postcopy;
use crate::progress::Progress;
use crate::show;
use hyper::Method;
use sterna_agent::model::{MigrateRequest, MigrationView, default_downtime_limit};

/// Each boot of a kernel makes new ones; nothing else has to be unique about it.
const RANDOM_UUID: &str = "/proc/sys/kernel/random/uuid";

/// Answers may be lost this often before we give up: once is an agent's restart.
const TRIES: u32 = 2;

/// `sterna migrate`
pub(crate) async fn run(client: &Client, args: Migrate) -> Result<Exit, Failure> {
    if let Some(why) = contradiction(&args) {
        return Err(Failure::new(Exit::Usage, why));
    }
    let format = args.output.format;
    let [vm] = &args.vms[..] else { return gang::run(client, &args).await };
    let request = request(&args, vm);
    if args.detach {
        let view = begin(client, &request).await?;
        print_job(format, &view)?;
        return Ok(Exit::Done);
    }
    let mut interrupts = Interrupts::listen()?;
    let mut progress = Progress::choose(format, args.quiet);
    let first = begin_or_interrupt(client, &request, &mut interrupts, &progress).await?;
    progress.show(&first);
    let end = follow(client, first, &mut progress, &mut interrupts).await;
    progress.finish();
    conclude(format, &end?)
}

/// Flags of which each says when the VM is to run at the target. Who knows virsh writes `--postcopy` beside another of them.
fn contradiction(args: &Migrate) -> Option<&'static str> {
    match (args.postcopy, args.postcopy_after_precopy, args.timeout_postcopy) {
        (true, true, _) | (true, _, true) => Some(
            "--postcopy means at once: leave it out, no migration needs it to be switched later (--postcopy-after-precopy, \
             --timeout-postcopy, `sterna postcopy VM`)",
        ),
        (_, true, true) => Some(
            "--postcopy-after-precopy and --timeout-postcopy: give one of them; `sterna postcopy VM` switches at any time",
        ),
        (false, ..) if args.send_template == SendTemplate::After => Some(
            "--send-template after: the VM runs at the target before its template is there, so give --postcopy too",
        ),
        (true, ..) if args.timeout.is_some() => {
            Some("--timeout: with --postcopy the VM runs at the target at once; leave one of them out")
        }
        _ => None,
    }
}

/// What is asked for one of the VMs.
pub(crate) fn request(args: &Migrate, vm: &str) -> MigrateRequest {
    MigrateRequest {
        max_bandwidth: args.limits.bandwidth.filter(|rate| *rate > 0),
        min_bandwidth: args.limits.min_bandwidth.filter(|rate| *rate > 0),
        bandwidth_step: args.bandwidth_step,
        auto_converge: args.auto_converge,
        balloon: args.balloon,
        compression: args.compression.into(),
        delta_cache: args.delta_cache,
        dedup: args.dedup.into(),
        send_template: args.send_template.into(),
        downtime_limit: args.limits.max_downtime.unwrap_or_else(default_downtime_limit),
        postcopy: args.postcopy,
        postcopy_after_precopy: args.postcopy_after_precopy,
        timeout_postcopy: args.timeout_postcopy,
        timeout: args.timeout,
        verify: args.verify,
        parallel_connections: args.parallel_connections,
        ..MigrateRequest::new(vm, &args.host)
    }
}

/// Asks for the migration. A lost answer is asked for again with the same key: it begins once.
async fn begin(client: &Client, request: &MigrateRequest) -> Result<MigrationView, Failure> {
    post(client, "/v1/migrations", request).await
}

/// Asks for something that is to begin once.
pub(crate) async fn post<T: serde::de::DeserializeOwned>(
    client: &Client,
    path: &str,
    request: &impl serde::Serialize,
) -> Result<T, Failure> {
    let key = std::fs::read_to_string(RANDOM_UUID)
        .map_err(|why| Failure::new(Exit::Failed, format!("{RANDOM_UUID} cannot be read: {why}")))?;
    let mut tries = 0;
    loop {
        tries += 1;
        match client.send(Method::POST, path, request, Some(key.trim())).await {
            Err(ClientError::Silent { .. }) if tries < TRIES => {}
            answer => return Ok(answer?),
        }
    }
}

/// The first interrupt waits for the answer, since only that says what to cancel; [`follow`] sees none of the two.
async fn begin_or_interrupt(
    client: &Client,
    request: &MigrateRequest,
    interrupts: &mut Interrupts,
    progress: &Progress,
) -> Result<MigrationView, Failure> {
    let answer = begin(client, request);
    tokio::pin!(answer);
    let mut cancel = false;
    loop {
        tokio::select! {
            view = &mut answer => {
                let view = view?;
                if cancel && let Err(why) = client.delete(&format!("/v1/migrations/{}", segment(&view.id))).await {
                    progress.note(&format!("not cancelled: {why}"));
                }
                return Ok(view);
            }
            () = interrupts.next() => {
                if cancel {
                    let text = format!("left before the agent answered: `sterna status {}` shows what it does", request.vm);
                    return Err(Failure::new(Exit::Attention, text));
                }
                cancel = true;
                progress.note("cancelling as soon as the agent answers (Ctrl-C again leaves without waiting)");
            }
        }
    }
}

pub(crate) fn print_job(format: Format, view: &MigrationView) -> Result<(), Failure> {
    match format {
        Format::Json => show::json(view),
        Format::Jsonl => show::json_line(view),
        Format::Table | Format::Wide => show::print(&format!("{}\n", view.id)),
    }
}

/// The result on stdout; what went wrong as an error.
fn conclude(format: Format, view: &MigrationView) -> Result<Exit, Failure> {
    match format {
        Format::Json => show::json(view)?,
        Format::Jsonl => show::json_line(view)?,
        Format::Table | Format::Wide if view.status == "completed" => show::pairs(&result(format, view))?,
        Format::Table | Format::Wide => {}
    }
    match outcome(view) {
        Exit::Done => Ok(Exit::Done),
        exit => Err(Failure { exit, text: unhappy_end(exit, view), reasons: view.reasons.clone() }),
    }
}

/// The exit code of a migration that has ended.
pub(crate) fn outcome(view: &MigrationView) -> Exit {
    match view.status.as_str() {
        "completed" => Exit::Done,
        "failed" if !view.reasons.is_empty() => Exit::Refused,
        // It runs nowhere: its QEMU has ended, or could not be resumed. Or it stands still at the target, without pages that are lost.
        "failed" if view.runs_at != view.source => Exit::Attention,
        "failed" => Exit::Failed,
        "cancelled" => Exit::Cancelled,
        _ => Exit::Attention,
    }
}

/// The agent's own words, which say where the VM is; ours where it has none.
pub(crate) fn unhappy_end(exit: Exit, view: &MigrationView) -> String {
    let MigrationView { vm, source, target, .. } = view;
    match (exit, &view.error_desc) {
        (Exit::Attention, Some(why)) => format!("VM {vm} needs attention: {why}"),
        (Exit::Attention, None) => format!(
            "VM {vm} needs attention: it was handed to {target}, which has not said that it runs it. Do not start it \
             anywhere: look with `sterna ps` at {target}, and with `sterna status {vm}` here"
        ),
        (_, Some(why)) => why.clone(),
        (Exit::Refused, None) => format!("VM {vm} cannot move to {target}; it runs at {source} as before"),
        (Exit::Cancelled, None) => format!("VM {vm} was not moved: cancelled; it runs at {source}"),
        (_, None) => format!("VM {vm} was not moved to {target}; the agent's log may say why"),
    }
}

fn result(format: Format, view: &MigrationView) -> Vec<(&'static str, String)> {
    let ms = |time: f64| format!("{time:.1} ms");
    let verified = match view.blocks_verified {
        Some(blocks) => format!("{blocks} blocks of RAM equal"),
        None => "no (ask with --verify)".to_owned(),
    };
    let split: Vec<String> =
        view.downtime_split.iter().map(|span| format!("{} {:.1}", span.name, span.ms)).collect();
    let mut rows = vec![
        ("VM", format!("{}, from {} to {}", view.vm, view.source, view.target)),
        ("Total time", ms(view.total_time)),
        ("Total downtime", view.downtime.map_or_else(|| "unknown".to_owned(), ms)),
        ("Downtime split", if split.is_empty() { "-".to_owned() } else { split.join(", ") + " ms" }),
        ("Rounds", view.ram.dirty_sync_count.to_string()),
        ("Memory processed", bytes(view.ram.transferred)),
        ("On the wire", bytes(view.wire_bytes)),
        ("Throughput", format!("{:.1} mbps", throughput(view))),
        ("Verified", verified),
    ];
    if view.ram.template_total > 0 {
        rows.push(("Template sent", template_sent(&view.ram)));
    }
    rows.extend(shared(view));
    rows.extend(postcopy::rows(view));
    if format == Format::Wide {
        rows.extend([
            ("Memory total", bytes(view.ram.total)),
            ("Constant pages", view.ram.duplicate.to_string()),
            ("Normal pages", view.ram.normal.to_string()),
            ("Device state", bytes(view.device_state)),
            ("Setup time", ms(view.setup_time)),
            ("Target ready after", view.target_setup_time.map_or_else(|| "-".to_owned(), ms)),
            ("Migration", view.id.clone()),
        ]);
    }
    rows
}

/// What of its memory it shares at the target.
fn shared(view: &MigrationView) -> Option<(&'static str, String)> {
    let ram = &view.ram;
    let pages = ram.template_pages + ram.common_pages;
    let text = match (ram.template_pages, ram.common_pages) {
        (0, _) => "with others".to_owned(),
        (_, 0) => "with its template".to_owned(),
        (template, common) => format!(
            "in all, {} with its template, {} with others",
            bytes(template * ram.page_size),
            bytes(common * ram.page_size)
        ),
    };
    (pages > 0).then(|| ("Shared memory", format!("{} {text}", bytes(pages * ram.page_size))))
}

/// Over the whole migration, as the wire saw it.
fn throughput(view: &MigrationView) -> f64 {
    match view.total_time > 0.0 {
        true => view.wire_bytes as f64 * 8.0 / view.total_time / 1e3,
        false => 0.0,
    }
}
