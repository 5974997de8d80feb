//! Real QEMUs move between two agents, and RAM is proved equal in every move.

mod support;

use support::{World, load, migrate, request};

#[test]
fn a_running_guest_moves_there_and_back() {
    let world = World::new("7.2");
    let (a, b) = (world.agent("a"), world.agent("b"));
    let guest = sterna_lab::GuestSpec { programs: vec![load(20)], ..world.parts.guest("vm") };
    world.boot(&a, &guest);
    world.wait_for_more("vm", "LOAD", support::BOOT);
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        let view = migrate(from, request("vm", to.name()));
        println!("{}", serde_json::to_string_pretty(&view).unwrap());
        assert_eq!(view.status, "completed", "{view:?}\n{}", world.console("vm"));
        assert!(view.blocks_verified.is_some_and(|blocks| blocks > 0), "{view:?}");
        assert!(from.vm("vm").is_err());
        assert_eq!(to.vm("vm").unwrap().state, "running");
        world.wait_for_more("vm", "LOAD", support::BOOT);
    }
    assert!(!world.console("vm").contains("BAD"), "{}", world.console("vm"));
    b.stop("vm").unwrap();
}
