//! Guests of the lab: what they are made of, as QEMU's command line, and as a running process.

mod running;
mod spec;

pub use running::Running;
pub use spec::{Arrival, Disk, GuestSpec, HostSide, Machine, Nic, Program, Ram, Serial, Vga};
