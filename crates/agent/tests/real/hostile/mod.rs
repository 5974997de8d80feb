//! Peers that authenticate themselves and speak nonsense, strangers, and users' mistakes. Each gets an error, and the agent
//! goes on: a good migration succeeds afterwards.

mod mistakes;
mod peer;
mod source;
mod strangers;
mod target;
