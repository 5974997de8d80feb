//! Agents that die around the hand-off: one host runs the VM afterwards, and never two.

use std::time::Duration;

use super::{moment, wait_stopping};
use crate::support::scene::{Scene, Watcher, other, to_the_other};
use crate::support::{World, count};

/// Moments that are tried, from the stop of the VM on. In every run, and in a long one: see [`count`].
const MOMENTS: (u32, u32) = (8, 20);
/// What they are spread over: the stop-and-copy with its digests, the hand-off, and the end of the source's QEMU.
const HANDOFF: Duration = Duration::from_millis(240);

#[derive(Clone, Copy)]
enum Victim {
    Source,
    Target,
    Both,
}

/// Kills one agent or both at this moment of a hand-off; returns where the VM runs in the end.
fn kill_at(
    scene: &mut Scene,
    from: &'static str,
    victim: Victim,
    after: Duration,
    verify: bool,
) -> &'static str {
    let mut request = to_the_other(from);
    request.verify = verify;
    let id = scene.host(from).migrate(&request).unwrap();
    wait_stopping(scene.host(from), &id);
    std::thread::sleep(after);
    let victims: &[&str] = match victim {
        Victim::Source => &[from],
        Victim::Target => &[other(from)],
        Victim::Both => &[from, other(from)],
    };
    victims.iter().for_each(|host| scene.host_mut(host).kill());
    victims.iter().rev().for_each(|host| scene.host_mut(host).launch());
    scene.settle()
}

fn survives(victim: Victim) {
    let mut scene = Scene::boot(World::new("7.2"));
    let watcher = Watcher::start(&scene.world);
    let (mut host, mut moved) = ("a", 0);
    let moments = count(MOMENTS.0, MOMENTS.1);
    for at in 0..moments {
        // Without digests the stop-and-copy is a tenth as long: every other try looks at it more closely.
        let verify = at % 2 == 0;
        let whole = if verify { HANDOFF } else { HANDOFF / 4 };
        let now = kill_at(&mut scene, host, victim, moment(at, moments, whole), verify);
        moved += u32::from(now != host);
        host = now;
        scene.assert_guest_is_well();
    }
    println!("{moved} of {moments} moved in spite of it");
    scene.assert_guest_goes_on();
    scene.move_verified(host);
    watcher.finish();
}

/// The folder of the source's QEMU stayed behind for ever when its agent died in the middle of forgetting the VM.
#[test]
fn the_sources_agent_killed_at_any_moment_of_the_handoff() {
    survives(Victim::Source);
}

#[test]
fn the_targets_agent_killed_at_any_moment_of_the_handoff() {
    survives(Victim::Target);
}

#[test]
fn both_agents_killed_at_any_moment_of_the_handoff() {
    survives(Victim::Both);
}
