//! tmp
mod support;
use support::{World, load, migrate, request};
#[test]
fn tmp() {
    let version = std::env::var("V").unwrap_or("7.2".into());
    let world = World::new(&version);
    let (a, b) = (world.agent("a"), world.agent("b"));
    let rate: u32 = std::env::var("R").ok().and_then(|r| r.parse().ok()).unwrap_or(20);
    let guest = sterna_lab::GuestSpec { programs: vec![load(rate)], ..world.parts.guest("vm") };
    world.boot(&a, &guest);
    world.wait_for_more("vm", "LOAD", support::BOOT);
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b), (&b, &a)] {
        let mut r = request("vm", to.name());
        r.verify = false;
        r.max_bandwidth = std::env::var("B").ok().and_then(|r| r.parse().ok());
        let view = migrate(from, r);
        print!(
            "{} total {:.0} setup {:.0} down {:.2} rounds {} mbps {:.0} wire {} err {:?} :",
            view.status,
            view.total_time,
            view.setup_time,
            view.downtime.unwrap_or(0.),
            view.ram.dirty_sync_count,
            view.ram.mbps,
            view.wire_bytes,
            view.error_desc
        );
        for s in &view.downtime_split {
            print!(" {} {:.2}", s.name, s.ms);
        }
        println!();
        world.wait_for_more("vm", "LOAD", support::BOOT);
    }
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    b.stop("vm").ok();
    a.stop("vm").ok();
}
