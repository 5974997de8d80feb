//! `sterna template`

use crate::args::{Format, Template, TemplateCreate};
use crate::client::{Client, segment};
use crate::exit::{Exit, Failure, tell};
use crate::human::{age, bytes, short_bytes};
use crate::interrupt::Interrupts;
use crate::show;
use hyper::Method;
use std::path::Path;
use std::time::{Duration, Instant};
use sterna_agent::model::{PushRequest, PushView, RunRequest, TemplateRequest, TemplateView, VmView};

/// How often it is looked whether a guest is ready.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The end of a console that is looked through: a line is found before so much follows it.
const CONSOLE_BYTES_MAX: u64 = 1 << 20;
/// What stands for a VM's name in a template's command line.
const PLACEHOLDER: &str = "{vm}";

pub(crate) async fn run(client: &Client, command: Template) -> Result<Exit, Failure> {
    match command {
        Template::Create(args) => create(client, args).await,
        Template::List(output) => {
            let all: Vec<TemplateView> = client.fetch("/v1/templates").await?;
            list(output.format, &all)
        }
        Template::Inspect { name, output } => {
            let one: TemplateView = client.fetch(&format!("/v1/templates/{}", segment(&name))).await?;
            inspect(output.format, &one)
        }
        Template::Push { name, host, bandwidth, output } => {
            let request = PushRequest { host, max_bandwidth: bandwidth.filter(|rate| *rate > 0) };
            let path = format!("/v1/templates/{}/push", segment(&name));
            let mut view: PushView = client.send(Method::POST, &path, &request, None).await?;
            while !view.complete {
                tell(&format!("{name}: {} were sent, and more follows", bytes(view.bytes)));
                let more: PushView = client.send(Method::POST, &path, &request, None).await?;
                view = PushView { bytes: view.bytes + more.bytes, ..more };
            }
            match (output.format, view.bytes) {
                (Format::Json, _) => show::json(&view)?,
                (_, 0) => println!("host {} has template {} already", view.host, view.name),
                (_, sent) => {
                    println!("template {} is on host {}: {} were sent", view.name, view.host, bytes(sent))
                }
            }
            Ok(Exit::Done)
        }
        Template::Remove { name } => {
            client.delete(&format!("/v1/templates/{}", segment(&name))).await?;
            Ok(Exit::Done)
        }
    }
}

async fn create(client: &Client, args: TemplateCreate) -> Result<Exit, Failure> {
    let made = match &args.from {
        Some(vm) => make(client, &args.name, vm, false, None).await,
        None => boot(client, &args).await,
    };
    list(args.output.format, &[made?])
}

async fn make(
    client: &Client,
    name: &str,
    vm: &str,
    end: bool,
    argv: Option<Vec<String>>,
) -> Result<TemplateView, Failure> {
    let request = TemplateRequest { name: name.to_owned(), vm: vm.to_owned(), end, argv };
    Ok(client.send(Method::POST, "/v1/templates", &request, None).await?)
}

/// Boots a VM under the template's name, makes it the template when it is ready, and ends it in any case.
async fn boot(client: &Client, args: &TemplateCreate) -> Result<TemplateView, Failure> {
    if args.until_line.is_none() && args.until_command.is_none() && args.after.is_none() {
        let text = "say when the VM is ready: --until-line, --until-command or --after";
        return Err(Failure::new(Exit::Usage, text));
    }
    let name = &args.name;
    let argv: Vec<String> = args.argv.iter().map(|argument| argument.replace(PLACEHOLDER, name)).collect();
    // What an earlier VM wrote to the same file is not this one's.
    let before = args.console.as_deref().map_or(0, length);
    let request = RunRequest { name: name.clone(), argv, template: None };
    // From here on there is a VM that nobody else ends.
    let mut interrupts = Interrupts::listen()?;
    let _: VmView = client.send(Method::POST, "/v1/vms", &request, None).await?;
    let making = async {
        // What keeps it from becoming one is known before its guest is ready.
        let request = TemplateRequest {
            name: name.clone(),
            vm: name.clone(),
            end: true,
            argv: Some(args.argv.clone()),
        };
        client.submit("/v1/template-checks", &request).await?;
        tell(&format!("{name}: started; waiting until it is ready"));
        ready(client, args, before).await?;
        tell(&format!("{name}: ready; its memory is written down"));
        make(client, name, name, true, Some(args.argv.clone())).await
    };
    let made = tokio::select! {
        made = making => made,
        () = interrupts.next() => {
            Err(Failure::new(Exit::Cancelled, format!("template {name} was not made: interrupted; its VM was ended")))
        }
    };
    if made.is_err() {
        // It may have ended by itself, and why is known better.
        drop(client.delete(&format!("/v1/vms/{}", segment(name))).await);
    }
    made
}

async fn ready(client: &Client, args: &TemplateCreate, before: u64) -> Result<(), Failure> {
    let end = Instant::now() + Duration::from_secs_f64(args.within);
    let name = &args.name;
    let given_up = |what: &str| {
        let text = format!("VM {name} was not ready within {} s: {what}; it was ended", args.within);
        Failure::new(Exit::Failed, text)
    };
    if let (Some(line), Some(console)) = (&args.until_line, &args.console) {
        while !has_line(console, before, line) {
            alive(client, name).await?;
            if Instant::now() >= end {
                return Err(given_up(&format!("{line:?} is not in {}", console.display())));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    if let Some(command) = &args.until_command {
        while !succeeds(command) {
            alive(client, name).await?;
            if Instant::now() >= end {
                return Err(given_up(&format!("`{command}` does not succeed")));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    tokio::time::sleep(Duration::from_secs_f64(args.after.unwrap_or(0.0))).await;
    alive(client, name).await
}

/// A VM that has ended is never ready.
async fn alive(client: &Client, name: &str) -> Result<(), Failure> {
    let vm: VmView = client.fetch(&format!("/v1/vms/{}", segment(name))).await?;
    match vm.state.as_str() {
        "stopped" => Err(Failure::new(Exit::Failed, format!("VM {name} has ended: see {}", vm.log))),
        _ => Ok(()),
    }
}

fn succeeds(command: &str) -> bool {
    use std::process::{Command, Stdio};
    let quiet = |command: &mut Command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()
    };
    quiet(Command::new("sh").args(["-c", command])).is_ok_and(|status| status.success())
}

fn length(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |found| found.len())
}

/// Whether a file has this text behind what it had `before`. One that became shorter was begun anew.
fn has_line(file: &Path, before: u64, text: &str) -> bool {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let len = length(file);
    let from = if len < before { 0 } else { before }.max(len.saturating_sub(CONSOLE_BYTES_MAX));
    let mut bytes = Vec::new();
    let read = std::fs::File::open(file).and_then(|mut file| {
        file.seek(SeekFrom::Start(from))?;
        file.take(CONSOLE_BYTES_MAX).read_to_end(&mut bytes)
    });
    read.is_ok() && String::from_utf8_lossy(&bytes).contains(text)
}

fn list(format: Format, all: &[TemplateView]) -> Result<Exit, Failure> {
    let columns = &["NAME", "DIGEST", "RAM", "SIZE", "QEMU", "AGE", "CLONES"];
    show::list(format, all, columns, |template| {
        let digest = template.digest.chars().take(if format == Format::Wide { 64 } else { 12 }).collect();
        let clones = if template.clones.is_empty() { "-".to_owned() } else { template.clones.join(" ") };
        vec![
            template.name.clone(),
            digest,
            short_bytes(template.ram_bytes),
            short_bytes(template.bytes),
            template.qemu.clone(),
            age(template.created),
            clones,
        ]
    })?;
    Ok(Exit::Done)
}

fn inspect(format: Format, one: &TemplateView) -> Result<Exit, Failure> {
    if format == Format::Json {
        show::json(one)?;
        return Ok(Exit::Done);
    }
    let clones = if one.clones.is_empty() { "none on this host".to_owned() } else { one.clones.join(" ") };
    for (label, value) in [
        ("Name:", one.name.clone()),
        ("Digest:", one.digest.clone()),
        ("Created:", one.created.to_string()),
        ("RAM:", bytes(one.ram_bytes)),
        ("Size:", bytes(one.bytes)),
        ("QEMU:", one.qemu.clone()),
        ("Machine:", one.machine.clone()),
        (
            "Disks:",
            if one.disks.is_empty() { "none that it may write".to_owned() } else { one.disks.join(" ") },
        ),
        ("Clones:", clones),
        ("Command:", one.argv.join(" ")),
    ] {
        println!("{label:<17}{value}");
    }
    Ok(Exit::Done)
}
