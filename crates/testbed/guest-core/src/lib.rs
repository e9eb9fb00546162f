//! What the test guest is made of besides its hardware: the contract with the VMM, the key-value service, the dirtier
//! and the self-checks. Nothing here touches a device, allocates, or reads a clock: memory, time and random seeds are
//! passed in, so that all of it is tested on the host.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod abi;
pub mod block_log;
pub mod clock;
pub mod command;
pub mod dirty;
pub mod frames;
pub mod page;
pub mod random;
pub mod reply;
pub mod resp;
pub mod settings;
pub mod store;
pub mod timer;
