//! The policies of pre-copy on real QEMUs, each alone and all at once: RAM is proved equal in every case, and the guest checks its own.

use std::time::Duration;

use crate::support::pair::{Pair, writer};
use crate::support::scene::{Scene, other, taken, to_the_other, until};
use crate::support::{BOOT, MOVE, World, idle, load, request, wait};
use serde_json::json;
use sterna_agent::Mechanism;
use sterna_agent::model::{CompressionMode, MigrateRequest, MigrationView, SetRequest};
use sterna_lab::guest::{GuestSpec, Ram};

/// Bytes per second of a link that a guest outruns.
const NARROW: u64 = 20_000_000;

/// What is written again is left for the next round; with the mechanism off nothing is.
#[test]
fn pages_that_are_written_again_wait_for_the_next_round() {
    let busy = |spec: GuestSpec| GuestSpec { programs: vec![writer(32, 60, &["--write=dense"])], ..spec };
    let slowly = |request| MigrateRequest { max_bandwidth: Some(60_000_000), timeout: Some(10.0), ..request };
    let pair = Pair::boot(World::new("7.2"), busy);
    let view = pair.moves(slowly);
    println!("{} bytes postponed, {} sent", view.ram.postponed_bytes, view.ram.transferred);
    assert!(view.ram.postponed_bytes > 1 << 20, "{view:?}");
    pair.end();
    let mut world = World::new("7.2");
    world.without = vec![Mechanism::Postponing];
    let pair = Pair::boot(world, busy);
    let without = pair.moves(slowly);
    assert_eq!(without.ram.postponed_bytes, 0, "{without:?}");
    pair.end();
}

/// Each kind of memory has a way of its own to change a part of a page.
#[test]
fn what_changed_a_little_travels_in_parts() {
    for ram in [Ram::Plain, Ram::SharedMemfd, Ram::PrivateMemfd] {
        let pair = Pair::boot(World::new("10.0"), |spec| GuestSpec {
            programs: vec![writer(16, 40, &["--write=sparse"])],
            ram,
            ..spec
        });
        for delta_cache in [None, Some(1 << 20)] {
            let view = moves_slowly_at_first(&pair, delta_cache);
            println!(
                "{ram:?}: {} pages in parts saved {} bytes",
                view.ram.delta_pages, view.ram.delta_saved_bytes
            );
            assert!(view.ram.delta_saved_bytes > 0, "{ram:?}: {view:?}");
        }
        let view = moves_slowly_at_first(&pair, Some(0));
        assert_eq!((view.ram.delta_pages, view.ram.delta_saved_bytes), (0, 0), "{view:?}");
        pair.end();
    }
}

/// At a pace that leaves the guest ahead, for what is postponed is not sent twice; until pages have been sent again in two rounds.
fn moves_slowly_at_first(pair: &Pair, delta_cache: Option<u64>) -> MigrationView {
    let from_a = pair.a.vms().iter().any(|vm| vm.name == "vm");
    let (from, to) = if from_a { (&pair.a, "b") } else { (&pair.b, "a") };
    let slowly = MigrateRequest {
        max_bandwidth: Some(30_000_000),
        downtime_limit: 0,
        timeout: None,
        delta_cache,
        ..request("vm", to)
    };
    let id = from.migrate(slowly, None).unwrap().id;
    let rounds = || from.migrations().into_iter().find(|view| view.id == id).unwrap().ram.dirty_sync_count;
    until("it is in its fourth round", MOVE, || (rounds() >= 4).then_some(()));
    let fast = SetRequest { max_bandwidth: Some(0), downtime_limit: Some(2000), ..SetRequest::default() };
    from.set(&id, fast).unwrap();
    let view = wait(from, &id);
    pair.assert_moved(&view);
    view
}

#[test]
fn every_way_to_compress_brings_equal_memory() {
    let pair = Pair::boot(World::new("7.2"), |spec| GuestSpec { programs: vec![load(20)], ..spec });
    let slowly = |request| MigrateRequest { max_bandwidth: Some(NARROW), downtime_limit: 2000, ..request };
    for compression in
        [CompressionMode::Lz4, CompressionMode::Zstd, CompressionMode::Auto, CompressionMode::None]
    {
        let view = pair.moves(|request| MigrateRequest { compression, ..slowly(request) });
        println!(
            "{compression:?} saved {} bytes, {} sent",
            view.ram.compression_saved_bytes, view.ram.transferred
        );
        assert_eq!(view.ram.compression_saved_bytes > 0, compression != CompressionMode::None, "{view:?}");
    }
    pair.end();
}

/// The first round goes at the minimum, no round leaves the limits, and new limits count at once.
#[test]
fn rounds_keep_between_their_limits() {
    let (min, max) = (15_000_000, 60_000_000);
    let pair = Pair::boot(World::new("7.2"), |spec| GuestSpec { programs: vec![load(20)], ..spec });
    let asked = MigrateRequest { min_bandwidth: Some(min), max_bandwidth: Some(max), ..request("vm", "b") };
    let id = pair.a.migrate(asked.clone(), None).unwrap().id;
    let watch = pair.a.watch(&id).unwrap();
    until("the first round", MOVE, || taken(&watch.borrow(), 0).then_some(()));
    assert_eq!(watch.borrow().pace, Some(min), "the first round goes at the minimum");
    let mut seen = Vec::new();
    until("the end", MOVE, || {
        let view = watch.borrow().clone();
        assert!(view.pace.is_some_and(|pace| (min..=max).contains(&pace)), "{view:?}");
        seen.push(view.pace.unwrap());
        (view.status == "completed").then_some(())
    });
    seen.dedup();
    println!("paces: {seen:?}");
    let view = wait(&pair.a, &id);
    pair.assert_moved(&view);
    assert!(seen.len() > 1, "a guest that writes 20 MB/s is outrun: {seen:?}");

    let id = pair.b.migrate(MigrateRequest { host: "a".into(), ..asked.clone() }, None).unwrap().id;
    let watch = pair.b.watch(&id).unwrap();
    until("the first round", MOVE, || taken(&watch.borrow(), 0).then_some(()));
    pair.b.set(&id, SetRequest { min_bandwidth: Some(50_000_000), ..SetRequest::default() }).unwrap();
    until("the new limit", Duration::from_secs(1), || {
        (watch.borrow().pace == Some(50_000_000)).then_some(())
    });
    let refused = pair.b.set(&id, SetRequest { min_bandwidth: Some(max + 1), ..SetRequest::default() });
    assert!(refused.unwrap_err().to_string().contains("give both in order"));
    pair.assert_moved(&wait(&pair.b, &id));
    let refused = pair.a.migrate(MigrateRequest { min_bandwidth: Some(max + 1), ..asked }, None);
    assert!(refused.unwrap_err().to_string().contains("give both in order"));
    pair.end();
}

/// A guest that outruns the link comes over all the same, and is not slow afterwards.
#[test]
fn a_guest_that_outruns_the_link_is_slowed_and_moves() {
    let pair = Pair::boot(World::new("7.2"), |spec| GuestSpec {
        programs: vec![writer(48, 0, &["--write=dense"])],
        ..spec
    });
    let pid = pair.a.vm("vm").unwrap().pid;
    let id = pair.a.migrate(stunned(request("vm", "b")), None).unwrap().id;
    let watch = pair.a.watch(&id).unwrap();
    let mut most = 0;
    until("the end", MOVE, || {
        let view = watch.borrow().clone();
        assert!(view.cpu_throttle_percentage <= 99, "{view:?}");
        most = view.cpu_throttle_percentage.max(most);
        (view.status == "completed").then_some(())
    });
    let view = wait(&pair.a, &id);
    println!("slowed by {most} %, {} rounds, downtime {:?}", view.ram.dirty_sync_count, view.downtime);
    assert!(most > 0, "it was not slowed: {view:?}");
    assert_eq!(view.notices, [""; 0]);
    pair.assert_moved(&view);
    assert!(!is_slowed(pid));
    pair.end();
}

/// Without a timeout: only slowing the guest ends it.
fn stunned(request: MigrateRequest) -> MigrateRequest {
    MigrateRequest {
        auto_converge: true,
        max_bandwidth: Some(NARROW),
        timeout: None,
        delta_cache: Some(0),
        ..request
    }
}

/// Whether there is a control group for slowed threads of this QEMU.
fn is_slowed(pid: i32) -> bool {
    let mut folders = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy() == format!("sterna-throttle-{pid}") {
                return true;
            }
            folders.extend(entry.file_type().is_ok_and(|kind| kind.is_dir()).then(|| entry.path()));
        }
    }
    false
}

/// Cancelled, cut off, or with its agent killed: a guest that was slowed has all of its time again.
#[test]
fn a_slowed_guest_is_let_go_whatever_happens() {
    let mut scene = Scene::boot_with(World::new("7.2"), vec![writer(48, 0, &["--write=dense"])]);
    let pid = scene.a.vm("vm").unwrap().pid;
    let slowed = |scene: &Scene, id: &str| {
        until("it is slowed", MOVE, || {
            (scene.a.migration(id).unwrap().cpu_throttle_percentage > 0).then_some(())
        });
        assert!(is_slowed(pid), "it is told to be slowed");
    };
    let let_go = || until("it is let go", Duration::from_secs(10), || (!is_slowed(pid)).then_some(()));
    // A limit that even a slowed guest does not keep: it goes on until something happens.
    let endless = || MigrateRequest { downtime_limit: 1, ..stunned(to_the_other("a")) };

    let id = scene.a.migrate(&endless()).unwrap();
    slowed(&scene, &id);
    scene.a.cancel(&id).unwrap();
    assert_eq!(scene.a.wait(&id).status, "cancelled");
    let_go();

    let id = scene.a.migrate(&endless()).unwrap();
    slowed(&scene, &id);
    scene.b.kill();
    assert_eq!(scene.a.wait(&id).status, "failed");
    let_go();
    scene.b.launch();

    let id = scene.a.migrate(&endless()).unwrap();
    slowed(&scene, &id);
    scene.a.set(&id, &json!({ "auto-converge": false })).unwrap();
    until("it is no longer slowed", MOVE, || {
        (scene.a.migration(&id).unwrap().cpu_throttle_percentage == 0).then_some(())
    });
    scene.a.set(&id, &json!({ "auto-converge": true })).unwrap();
    slowed(&scene, &id);
    scene.a.kill();
    let_go();
    scene.a.launch();
    assert_eq!(scene.settle(), "a", "{}", scene.tell());
    scene.assert_guest_goes_on();
    assert_eq!(other("a"), "b");
}

/// A guest with much page cache gives it away for its move, and has its memory again afterwards, at the target, where it was when the
/// move came to nothing, and after its agent was killed in the middle.
#[test]
fn a_balloon_takes_what_a_guest_can_do_without_and_gives_it_back() {
    let extra = ["-device", "virtio-balloon-pci"].map(str::to_owned).to_vec();
    let pair = Pair::boot(World::new("7.2"), |spec| GuestSpec {
        programs: vec![load(5)],
        extra,
        memory_mib: 384,
        ..spec
    });
    let size = |host: &str| {
        pair.world.qmp(host, "vm").execute("query-balloon", json!({})).unwrap()["actual"].as_u64().unwrap()
    };
    let whole = size("a");
    let cancelled =
        MigrateRequest { balloon: true, max_bandwidth: Some(1_000_000), timeout: None, ..request("vm", "b") };
    let id = pair.a.migrate(cancelled, None).unwrap().id;
    let watch = pair.a.watch(&id).unwrap();
    until("pages travel", MOVE, || taken(&watch.borrow(), 0).then_some(()));
    assert!(watch.borrow().ram.balloon_bytes > 16 << 20, "{:?}", watch.borrow());
    assert!(size("a") < whole);
    pair.a.cancel(&id).unwrap();
    assert_eq!(wait(&pair.a, &id).status, "cancelled");
    until("its memory is its own again", BOOT, || (size("a") == whole).then_some(()));
    let view = pair.moves(|request| MigrateRequest { balloon: true, ..request });
    println!("{} bytes were given away", view.ram.balloon_bytes);
    assert!(view.ram.balloon_bytes > 16 << 20, "{view:?}");
    until("its memory is its own again", BOOT, || (size("b") == whole).then_some(()));
    pair.end();

    let mut scene = Scene::boot_with_balloon(World::new("10.0"));
    let size = |scene: &Scene| {
        scene.world.qmp("a", "vm").execute("query-balloon", json!({})).unwrap()["actual"].as_u64().unwrap()
    };
    let whole = size(&scene);
    let slow = MigrateRequest { balloon: true, max_bandwidth: Some(1_000_000), ..to_the_other("a") };
    let id = scene.a.migrate(&slow).unwrap();
    until("it is small", MOVE, || (scene.a.migration(&id).unwrap().ram.balloon_bytes > 0).then_some(()));
    assert!(size(&scene) < whole);
    scene.a.kill();
    scene.a.launch();
    until("its memory is its own again", BOOT, || (size(&scene) == whole).then_some(()));
    assert_eq!(scene.settle(), "a", "{}", scene.tell());
}

/// What was asked for and cannot be done is said, and the VM moves all the same.
#[test]
fn a_guest_without_a_balloon_moves_whole_and_the_user_is_told() {
    let pair = Pair::boot(World::new("7.2"), |spec| GuestSpec { programs: vec![idle()], ..spec });
    let view = pair.moves(|request| MigrateRequest { balloon: true, ..request });
    assert_eq!(view.ram.balloon_bytes, 0);
    assert!(view.notices.iter().any(|notice| notice.contains("it has no balloon")), "{view:?}");
    pair.end();
}

#[test]
fn all_policies_at_once() {
    for version in ["7.2", "10.0"] {
        let pair = Pair::boot(World::new(version), |spec| GuestSpec {
            programs: vec![writer(32, 0, &["--write=sparse"])],
            ..spec
        });
        for parallel_connections in [Some(1), Some(3)] {
            let view = pair.moves(|request| MigrateRequest {
                min_bandwidth: Some(NARROW),
                max_bandwidth: Some(2 * NARROW),
                bandwidth_step: Some(1_000_000),
                auto_converge: true,
                parallel_connections,
                ..request
            });
            println!("{version}: {:?}", view.ram);
        }
        pair.end();
    }
}

/// A guest that converges is not slowed.
#[test]
fn an_idle_guest_keeps_its_time() {
    let pair = Pair::boot(World::new("7.2"), |spec| GuestSpec { programs: vec![idle()], ..spec });
    let view = pair.moves(|request| MigrateRequest { auto_converge: true, ..request });
    assert_eq!((view.cpu_throttle_percentage, view.notices.len()), (0, 0), "{view:?}");
    pair.end();
}
