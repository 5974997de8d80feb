//! The crash matrix: each thing that can die, break or stand still, at each point of a migration, on real QEMUs.
//!
//! An agent is held exactly at the point, the fault strikes, what was killed is started again, and from then on nobody
//! helps: one host must run the guest (the watcher sees that there are never two), the guest must have lost nothing, and
//! nothing may be left behind. `table.rs` has what is to come of each; `docs/reliability.md` shows it to people.

mod cell;
mod fault;
mod recover;
mod row;
mod table;

use fault::Fault;

#[test]
fn the_sources_agent_is_killed() {
    row::survives(Fault::SourceAgent);
}

#[test]
fn the_targets_agent_is_killed() {
    row::survives(Fault::TargetAgent);
}

#[test]
fn both_agents_are_killed() {
    row::survives(Fault::BothAgents);
}

#[test]
fn the_sources_qemu_is_killed() {
    row::survives(Fault::SourceQemu);
}

#[test]
fn the_targets_qemu_is_killed() {
    row::survives(Fault::TargetQemu);
}

#[test]
fn the_link_is_cut() {
    row::survives(Fault::Cut);
}

#[test]
fn the_link_falls_silent() {
    row::survives(Fault::Silence);
}

#[test]
fn the_source_host_freezes() {
    row::survives(Fault::SourceFreezes);
}

#[test]
fn the_target_host_freezes() {
    row::survives(Fault::TargetFreezes);
}

#[test]
fn the_target_host_freezes_for_long() {
    row::survives(Fault::TargetFreezesLong);
}

#[test]
fn the_document_shows_the_table() {
    table::assert_document_has_all_rows();
}
