//! Where requests of guests to be moved are decided. The answers tell a guest nothing of the host but what was done.

use super::link::Request;
use crate::Agent;
use crate::journal::Found;
use crate::model::MigrateRequest;
use crate::registry::Vm;
use std::time::Duration;
use sterna_engine::Step;

/// A guest may begin one migration in this time, and none within it after it came: each costs two hosts work.
const PAUSE: Duration = Duration::from_secs(60);

const NOT_THERE: &str =
    "this VM's host does not let it move to that host by itself (may-migrate-to in its agent.toml)";
const TOO_SOON: &str = "this VM moved, or began to, less than a minute ago; ask again later";
const BUSY: &str = "this VM is being worked on; ask again later";
const IMPOSSIBLE: &str = "this VM cannot be moved there at present; the log of its host's agent says why";

/// What is known when a guest asks.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// The configuration lets it ask for this host.
    allowed: bool,
    /// What works on the VM already, and where a migration leads to.
    running: Option<(String, Option<String>)>,
    /// Since it last began to move, or came.
    moved: Option<Duration>,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision {
    Begin,
    /// It has what it wants, or something like it: a migration goes on.
    Known(String, String),
    Refuse(&'static str),
}

fn decide(facts: Facts) -> Decision {
    match facts {
        Facts { allowed: false, .. } => Decision::Refuse(NOT_THERE),
        Facts { running: Some((id, Some(host))), .. } => Decision::Known(id, host),
        Facts { running: Some((_, None)), .. } => Decision::Refuse(BUSY),
        Facts { moved: Some(ago), .. } if ago < PAUSE => Decision::Refuse(TOO_SOON),
        _ => Decision::Begin,
    }
}

/// Decides, does it, and says so.
pub(super) fn answer(agent: &std::sync::Arc<Agent>, vm: &Vm, request: &Request) {
    let name = vm.name();
    match decide(facts(agent, vm, &request.host)) {
        Decision::Known(id, host) => vm.guest().accept(request.number, &id, &host),
        Decision::Refuse(why) => {
            tracing::debug!(vm = name, to = request.host, why, "a request of the guest is refused");
            vm.guest().refuse(request.number, why);
        }
        Decision::Begin => {
            vm.guest().begins();
            let wanted = MigrateRequest::new(&name, &request.host);
            match agent.migrate(wanted, None) {
                Ok(view) => {
                    tracing::info!(
                        vm = name,
                        to = view.target,
                        migration = view.id,
                        "the guest has asked for it"
                    );
                    vm.guest().accept(request.number, &view.id, &view.target);
                }
                Err(why) => {
                    tracing::warn!(vm = name, to = request.host, %why, "a request of the guest cannot be met");
                    vm.guest().refuse(request.number, IMPOSSIBLE);
                }
            }
        }
    }
}

fn facts(agent: &Agent, vm: &Vm, host: &str) -> Facts {
    let record = vm.record();
    let running = vm.migration().map(|id| {
        let to = record.leaving.filter(|leaving| leaving.id == id).map(|leaving| leaving.to);
        (id, to)
    });
    // One that was started here may go at once; one that came has been moved.
    let came = match agent.host().journal().look(&record.name) {
        Found::Whole(last) if last.step == Step::Running => {
            let ago = jiff::Timestamp::now().duration_since(record.since).unsigned_abs();
            Some(ago)
        }
        _ => None,
    };
    let moved = vm.guest().began().into_iter().chain(came).min();
    let allowed = agent.host().config().guests.may_migrate(&record.name, host);
    Facts { allowed, running, moved }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> Facts {
        Facts { allowed: true, ..Facts::default() }
    }

    #[test]
    fn by_default_nobody_may() {
        assert_eq!(decide(Facts::default()), Decision::Refuse(NOT_THERE));
        assert_eq!(decide(allowed()), Decision::Begin);
        // Not even learn of a migration.
        let running = Some(("1".into(), Some("b".into())));
        assert_eq!(decide(Facts { running, ..Facts::default() }), Decision::Refuse(NOT_THERE));
    }

    #[test]
    fn a_repeated_request_learns_of_the_migration_that_goes_on() {
        let running = Some(("1".to_owned(), Some("b".to_owned())));
        let facts = Facts { running, moved: Some(Duration::ZERO), ..allowed() };
        assert_eq!(decide(facts), Decision::Known("1".into(), "b".into()));
        let stopping = Facts { running: Some(("stop".into(), None)), ..allowed() };
        assert_eq!(decide(stopping), Decision::Refuse(BUSY));
    }

    #[test]
    fn one_a_minute() {
        for (seconds, decision) in
            [(0, Decision::Refuse(TOO_SOON)), (59, Decision::Refuse(TOO_SOON)), (60, Decision::Begin)]
        {
            let facts = Facts { moved: Some(Duration::from_secs(seconds)), ..allowed() };
            assert_eq!(decide(facts), decision, "{seconds} s");
        }
    }
}
