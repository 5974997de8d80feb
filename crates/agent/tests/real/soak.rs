//! Many migrations of one guest in a row, that succeed and that fail: it loses nothing, and nothing piles up in agents,
//! QEMUs and folders. `STERNA_LONG=1` makes it a hundred of each.

use std::time::{Duration, Instant};

use crate::support::holdings::{Holdings, scopes_of};
use crate::support::proxy::Proxy;
use crate::support::scene::{AT_REST, Scene, Watcher, left_in_qemu, other, to_the_other, until};
use crate::support::{World, count};
use sterna_agent::model::MigrateRequest;

/// Bytes per second that keep a migration going long enough to break it.
const SLOW: u64 = 20_000_000;
/// What the moments of failures are spread over: the setup, and the first round at that rate.
const FIRST_ROUND: Duration = Duration::from_millis(900);
/// Moments over which they are spread.
const MOMENTS: u32 = 10;
/// Ways to fail.
const KINDS: u32 = 5;

#[test]
fn a_vm_that_moves_to_and_fro() {
    let moves = count(6, 100);
    let scene = Scene::boot(World::new("7.2"));
    // The first ones fill what is allocated once: each thread of the allocator's keeps the largest buffer that it ever had.
    for host in ["a", "b"].into_iter().cycle().take(count(2, 20) as usize) {
        scene.move_verified(host);
    }
    let (watcher, before) = (Watcher::start(&scene.world), Holdings::of(&scene));
    let (mut host, mut pids, mut downtimes) = ("a", Vec::new(), Vec::new());
    for _ in 0..moves {
        pids.push(scene.host(host).vm("vm").unwrap().pid);
        let view = scene.move_verified(host);
        downtimes.push(view.downtime.unwrap());
        host = other(host);
    }
    watcher.finish();
    before.assert_not_grown(&scene);
    assert_eq!(scopes_of(&pids), Vec::<std::path::PathBuf>::new());
    downtimes.sort_by(f64::total_cmp);
    println!(
        "{moves} moves, downtime: median {} ms, longest {} ms",
        downtimes[downtimes.len() / 2],
        downtimes[downtimes.len() - 1]
    );
}

#[test]
fn a_vm_whose_migrations_fail_in_every_way() {
    let failures = count(8, 100);
    let mut world = World::with_wrapped_qemu_at_b("7.2");
    let proxy = Proxy::to(world.address("b"));
    world.b_as_seen_from_a = Some(proxy.address());
    let mut scene = Scene::boot(world);
    scene.move_verified("a");
    scene.move_verified("b");
    let (before, qemu, began) = (Holdings::of(&scene), scene.footprint("a"), Instant::now());
    for at in 0..failures {
        let moment = FIRST_ROUND * (at / KINDS % MOMENTS) / MOMENTS;
        fail(&mut scene, &proxy, at % KINDS, moment);
        assert_eq!(scene.settle(), "a");
        scene.assert_guest_is_well();
    }
    println!("{failures} failures in {:?}", began.elapsed());
    scene.assert_guest_goes_on();
    before.assert_not_grown(&scene);
    until("QEMU is as it was", AT_REST, || {
        left_in_qemu(&qemu, &scene.footprint("a")).is_empty().then_some(())
    });
    scene.world.set_wrapper("EXTRA=\n");
    scene.move_verified("a");
}

/// Lets one try fail, this long after it began.
fn fail(scene: &mut Scene, proxy: &Proxy, kind: u32, moment: Duration) {
    let refuse = kind == KINDS - 1;
    scene.world.set_wrapper(if refuse { "EXTRA='-device virtio-rng-pci'\n" } else { "EXTRA=\n" });
    let request = MigrateRequest { max_bandwidth: Some(SLOW), ..to_the_other("a") };
    let id = scene.a.migrate(&request).unwrap();
    if kind == 1 {
        // An agent that comes back while the source still checks is none that failed.
        until("pages move", AT_REST, || (scene.a.migration(&id).unwrap().status == "active").then_some(()));
    }
    std::thread::sleep(if refuse { Duration::ZERO } else { moment });
    match kind {
        0 => drop(scene.a.cancel(&id).unwrap()),
        1 => {
            scene.b.kill();
            scene.b.launch();
        }
        2 => {
            scene.a.kill();
            return scene.a.launch();
        }
        3 => proxy.cut(),
        _ => {}
    }
    let view = scene.a.wait(&id);
    proxy.mend();
    assert!(matches!(view.status.as_str(), "failed" | "cancelled"), "{view:?}\n{}", scene.tell());
    assert_eq!(view.runs_at, "a", "{view:?}");
}
