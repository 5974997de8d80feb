//! A migration until it ends, whatever happens to the agent, the stream or the person meanwhile.

use crate::client::{Client, ClientError, Views, segment};
use crate::exit::{Exit, Failure};
use crate::interrupt::Interrupts;
use crate::postcopy;
use crate::progress::Progress;
use std::time::Duration;
use sterna_agent::model::{MigrationView, VmView};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How often an agent that is gone is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// How long it is asked: a service manager restarts an agent within seconds, and a person should hear of more.
const LOST_DEADLINE: Duration = Duration::from_secs(60);

/// How long an `unresolved` migration is watched: a target whose link or agent was gone for a moment answers in this time.
const UNRESOLVED_GRACE: Duration = Duration::from_secs(10);

/// Waits for the end of `first`'s migration. Interrupts cancel it; the second one leaves it alone.
///
/// # Errors
/// [`Exit::Attention`] when it is not known how it ended.
pub(crate) async fn follow(
    client: &Client,
    first: MigrationView,
    progress: &mut Progress,
    interrupts: &mut Interrupts,
) -> Result<MigrationView, Failure> {
    let mut watch = Watch::new(client.clone(), first);
    let mut cancelling: Option<JoinHandle<Result<(), ClientError>>> = None;
    let (mut asked_to_cancel, mut told_late, mut told) = (false, false, 0);
    loop {
        // What was asked for and cannot be done must not be missed.
        watch.last.notices.iter().skip(told).for_each(|notice| progress.note(notice));
        told = watch.last.notices.len().max(told);
        tokio::select! {
            next = watch.next(progress) => match next? {
                Next::View => progress.show(&watch.last),
                Next::End => {
                    if asked_to_cancel && !told_late && watch.last.status == "completed" {
                        progress.note("too late to cancel: the VM had been handed over");
                    }
                    return Ok(watch.last);
                }
            },
            () = interrupts.next() => {
                if asked_to_cancel {
                    return Err(left(&watch.last));
                }
                asked_to_cancel = true;
                if postcopy::detail(&watch.last).is_some() {
                    told_late = true;
                    let MigrationView { vm, target, .. } = &watch.last;
                    progress.note(&format!(
                        "too late to cancel: VM {vm} runs at {target}, and its missing pages follow (Ctrl-C again leaves without waiting)"
                    ));
                    continue;
                }
                progress.note("cancelling; the VM stays where it runs (Ctrl-C again leaves without waiting)");
                cancelling = Some(tokio::spawn(cancel(client.clone(), watch.last.id.clone())));
            }
            result = joined(&mut cancelling), if cancelling.is_some() => {
                cancelling = None;
                if let Some(why) = result {
                    progress.note(&format!("not cancelled: {why}"));
                }
            }
        }
    }
}

async fn cancel(client: Client, id: String) -> Result<(), ClientError> {
    client.delete(&format!("/v1/migrations/{}", segment(&id))).await
}

/// What was said against the cancellation.
async fn joined(task: &mut Option<JoinHandle<Result<(), ClientError>>>) -> Option<String> {
    match task.as_mut()?.await {
        Ok(result) => result.err().map(|why| why.to_string()),
        Err(why) => Some(why.to_string()),
    }
}

fn left(view: &MigrationView) -> Failure {
    let text = format!("left while VM {0} was being moved: `sterna status {0}` shows how it ends", view.vm);
    Failure::new(Exit::Attention, text)
}

/// What came of waiting.
enum Next {
    View,
    End,
}

struct Watch {
    client: Client,
    last: MigrationView,
    views: Option<Views<MigrationView>>,
    lost_since: Option<Instant>,
    unresolved_since: Option<Instant>,
}

impl Watch {
    fn new(client: Client, last: MigrationView) -> Self {
        Self { client, last, views: None, lost_since: None, unresolved_since: None }
    }

    /// May be dropped while it waits: everything it knows is in `self`.
    async fn next(&mut self, progress: &mut Progress) -> Result<Next, Failure> {
        loop {
            if is_final(&self.last) {
                return Ok(Next::End);
            }
            match self.views.as_mut() {
                None => self.open(progress).await?,
                Some(views) => {
                    let grace_over = grace_over(self.unresolved_since);
                    tokio::select! {
                        next = views.next() => if let Some(next) = self.arrived(next, progress) { return Ok(next) },
                        () = grace_over => return Ok(Next::End),
                    }
                }
            }
        }
    }

    /// Nothing when the stream is over and has to be opened again.
    fn arrived(
        &mut self,
        next: Result<Option<MigrationView>, String>,
        progress: &mut Progress,
    ) -> Option<Next> {
        match next {
            Ok(Some(view)) => {
                self.lost_since = None;
                self.unresolved_since = match view.status == "unresolved" {
                    true => self.unresolved_since.or_else(|| Some(Instant::now())),
                    false => None,
                };
                self.last = view;
                return Some(Next::View);
            }
            // The agent closed the stream by itself: it does not expect to learn more.
            Ok(None) if self.last.status == "unresolved" => return Some(Next::End),
            Ok(None) => self.lose("it ended the stream", progress),
            Err(why) => self.lose(&why, progress),
        }
        None
    }

    fn lose(&mut self, why: &str, progress: &mut Progress) {
        self.views = None;
        if self.lost_since.is_none() {
            let seconds = LOST_DEADLINE.as_secs();
            progress.note(&format!("lost the agent ({why}); asking again for up to {seconds} s"));
        }
        self.lost_since.get_or_insert_with(Instant::now);
    }

    /// Opens the stream; once it was lost, not more often than it makes sense.
    async fn open(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        if let Some(since) = self.lost_since {
            if since.elapsed() > LOST_DEADLINE {
                return Err(lost(&self.last));
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
        match self.client.views(&self.last.id).await {
            Ok(views) => self.views = Some(views),
            Err(error) if error.is_not_found() => return Err(self.forgotten().await),
            Err(error) => self.lose(&error.to_string(), progress),
        }
        Ok(())
    }

    /// The agent was restarted and does not know the migration any more: where the VM is tells how it ended.
    async fn forgotten(&self) -> Failure {
        let MigrationView { vm, source, target, .. } = &self.last;
        let path = format!("/v1/vms/{}", segment(vm));
        match self.client.fetch::<VmView>(&path).await {
            Ok(found) if matches!(found.state.as_str(), "running" | "paused") => {
                let text = format!(
                    "the agent was restarted while it moved VM {vm} to {target}; the VM is {} at {source}: try again",
                    found.state
                );
                Failure::new(Exit::Failed, text)
            }
            Ok(found) => {
                let text = format!(
                    "the agent was restarted while it moved VM {vm} to {target}; at {source} it is {} now: {}",
                    found.state,
                    found.notice.unwrap_or_else(|| format!("see `sterna ps` at {source} and {target}"))
                );
                Failure::new(Exit::Attention, text)
            }
            Err(error) if error.is_not_found() => {
                let text = format!(
                    "the agent was restarted while it moved VM {vm}; the VM has left {source}: `sterna ps` at {target} \
                     must show it"
                );
                Failure::new(Exit::Attention, text)
            }
            Err(_) => lost(&self.last),
        }
    }
}

async fn grace_over(since: Option<Instant>) {
    match since {
        Some(since) => tokio::time::sleep_until(since + UNRESOLVED_GRACE).await,
        None => std::future::pending().await,
    }
}

fn lost(view: &MigrationView) -> Failure {
    let text = format!(
        "the agent has been gone for {} s while VM {vm} was being moved to {}: start it again, then `sterna status {vm}` \
         or `sterna ps` on both hosts shows where the VM runs",
        LOST_DEADLINE.as_secs(),
        view.target,
        vm = view.vm
    );
    Failure::new(Exit::Attention, text)
}

/// True when nothing more will happen by itself.
pub(crate) fn is_final(view: &MigrationView) -> bool {
    matches!(view.status.as_str(), "completed" | "failed" | "cancelled")
}
