//! Hosts of the lab that boot a real systemd: for units, packages, and what the daemons have to do with it.
//!
//! ```text
//!   target/assets/systemd                a small Debian, made by `cargo xtask setup`; only ever read
//!     └ overlay, whose upper part is a tmpfs   /  of one container, gone with it
//!         └ systemd                      process, mount, IPC, host-name and cgroup namespaces of its own;
//!                                        the network is the lab's host's: eth0, br0, tap0, the lab's addresses
//! ```
//!
//! A [`Container`] is a host of a lab: whatever the lab's instruments see of that host, they see of the container. Several run at once.

mod agent_unit;
mod container;
mod installed;
mod vmm;

pub use agent_unit::AgentUnit;
pub use container::{BINARIES, Container};
pub use installed::{AGENT, REPLICATOR, WITNESS};
