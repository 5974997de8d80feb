//! A laboratory for migrations on one machine.
//!
//! Hosts are network namespaces on a shaped link, guests are made of Debian packages (cloud kernel, busybox, Redis and
//! our own static programs), and a client in a namespace of its own reaches the guest before and after a move. The demo,
//! the tests and the benchmarks stand on it; `sterna-lab` gives it to people who want to play by hand.
//!
//! **Invariant:** nothing is made in the machine's own network namespace, and whatever happens to the owner of a lab,
//! everything that the lab made is removed, and nothing else.

#![forbid(unsafe_code)]

pub mod bare;
pub mod client;
pub mod error;
pub mod guest;
pub mod huge;
pub mod image;
pub mod ksm;
pub mod net;
pub mod packages;
pub mod place;
pub mod process;
pub mod qmp;
pub mod run;
pub mod setting;
pub mod state;
pub mod stock;

pub use error::LabError;
pub use guest::{Arrival, GuestSpec, Machine, Ram, Running};
pub use huge::HugePages;
pub use ksm::Ksm;
pub use net::{Host, Lab, LabSpec, LinkBytes, Wiring};
pub use packages::Packages;
pub use place::LabDir;
pub use setting::Setting;
