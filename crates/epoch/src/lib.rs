//! How long an epoch should be.
//!
//! A short epoch lets output leave early and costs the guest more pauses; a long one gathers writes to the same pages. What is
//! right depends on the guest and on what its operator wants, which is a [`Goal`].
//!
//! ```text
//!   Sample of each epoch ─► Steering: a window of them ─► Cost: what an epoch costs, as a function of its length
//!                                                          └─► the length that the goal asks for, approached step by step
//!   Measured at some lengths ─► Profile: what any length costs ─► the length on which steering would settle
//! ```
//!
//! No I/O, no clock, no chance: the replicator, the benchmark's predictions and the tests run the same code.
#![forbid(unsafe_code)]

mod cost;
mod goal;
mod profile;
mod steering;

pub use cost::Cost;
pub use goal::{Goal, Reach};
pub use profile::{Measured, Prediction, Profile};
pub use steering::{Limits, Sample, Steering, WINDOW_EPOCHS};
