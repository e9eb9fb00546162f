//! The lab for end-to-end tests and for `cargo xtask demo`: hosts as network namespaces around a switch, a guest in a stock
//! QEMU or in our own test VMM, the real daemons as child processes, and instruments that know nothing of either.
//!
//! ```text
//!   client 10.77.0.1        primary 10.77.0.11       backup 10.77.0.12       witness 10.77.0.13
//!        │ eth0               tap0 ─ br0 ─ eth0        br0 ─ eth0                 │ eth0
//!        │                                 │                │                     │
//!        └────────────────────── sw0, the bridge of the namespace "switch" ───────┘
//!                                          ▲ sniffer        ▲ sniffer
//! ```
//!
//! The guest is 10.77.0.2. All times are of one machine's clock, so that what the daemons log, what the sniffers
//! saw and what the client was told can be compared. Dropping a [`Lab`] kills everything that runs in its namespaces
//! and removes them; making one removes what an earlier run with the same prefix left.
#![forbid(unsafe_code)]

pub mod accel;
pub mod audit;
pub mod benchmark;
pub mod campaign;
pub mod client;
pub mod crowd;
pub mod daemons;
pub mod dashboard;
pub mod guest;
mod lab;
mod ledger;
pub mod links;
mod namespace;
mod netns;
mod paths;
pub mod pinger;
pub mod plans;
pub mod probe;
pub mod process;
pub mod prometheus;
pub mod qmp;
pub mod report;
mod resp;
pub mod restarts;
pub mod scenario;
pub mod scrape;
pub mod sniffer;
pub mod soak;
pub mod stage;
mod stamp;
pub mod strangers;
pub mod systemd;
pub mod timeline;

pub use guest::Vmm;
pub use lab::{Lab, wait_for};
pub use netns::{BRIDGE, GUEST_IP, GUEST_IP6, Host, Net, TAP};
pub use paths::{Kernel, Paths};
pub use process::Process;
pub use stamp::Stamp;

/// What the names of the end-to-end tests' namespaces, folders and sockets begin with. Two checkouts that test on one
/// machine at once need different ones: set `ROMULUS_TEST_LAB` when building.
pub const TEST_LAB: &str = match option_env!("ROMULUS_TEST_LAB") {
    Some(name) => name,
    None => "romt",
};
