//! `sterna recover`: where a VM runs whose owner the other host does not tell.

use crate::args::{Format, Recover};
use crate::client::{Client, segment};
use crate::exit::{Exit, Failure};
use crate::show;
use hyper::Method;
use sterna_agent::model::{RecoverRequest, RecoverView, Side, VmView};

/// Decides, and says where the VM runs.
pub(crate) async fn run(client: &Client, args: &Recover) -> Result<Exit, Failure> {
    let vm = segment(&args.vm);
    let request = RecoverRequest { runs: if args.here { Side::Here } else { Side::There } };
    let decided = client.send(Method::POST, &format!("/v1/vms/{vm}/recover"), &request, None).await;
    let view: RecoverView = match decided {
        Ok(view) => view,
        Err(why) => {
            let failure = Failure::from(why);
            let exit = if is_unresolved(client, &vm).await { Exit::Attention } else { failure.exit };
            return Err(Failure { exit, ..failure });
        }
    };
    match args.output.format {
        Format::Json => show::json(&view)?,
        Format::Jsonl => show::json_line(&view)?,
        Format::Table | Format::Wide => show::print(&format!("{}: runs at {}\n", view.vm, view.runs_at))?,
    }
    Ok(Exit::Done)
}

/// Whether the question is still open.
async fn is_unresolved(client: &Client, vm: &str) -> bool {
    let found: Result<VmView, _> = client.fetch(&format!("/v1/vms/{vm}")).await;
    found.is_ok_and(|vm| matches!(vm.state.as_str(), "released" | "unresolved"))
}
