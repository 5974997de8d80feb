//! `sterna-guest`: what a guest can do for its own migration. It speaks with the host's agent through a serial port.
//!
//! ```text
//! line       what is said on the port, in lines of text        port      the port: finds it, opens it
//! daemon     one loop: the port, clients, signals, pulses      ask       `migrate-me`: over the daemon or the port itself
//! stun       slows the processes that write most memory        victims   which these are
//! watchdog   a second process that lets them go when the daemon is killed
//! ```
//!
//! Stunning is what Clark et al. (NSDI 2005) do to processes that write memory faster than it can be copied: a thread inside
//! of the guest's kernel watched them and made them wait. Here a process does it, with signals, in any kernel.

pub mod ask;
pub mod daemon;
pub mod line;
pub mod port;
pub mod stun;
pub mod victims;
pub mod watchdog;
