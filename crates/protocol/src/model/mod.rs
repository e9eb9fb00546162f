//! An exhaustive model of one VM: every interleaving, within a budget, of the *real* primary, backup and witness with
//! crashes, restarts, lost, late, repeated and reordered messages, broken sessions, partitions, operators' orders and a
//! witness that is restored from an old copy.
//!
//! ```text
//!   P's host: guest, gate, remembered ── Primary ⇄ sessions (ordered, breaking) ⇄ Backup ── B's host: image, remembered
//!                                            ⇅   a set of requests and replies,   ⇅
//!                                            each delivered any number of times, in any order
//!                                                          Witness
//! ```
//!
//! There is no clock: any silence may become long enough for a suspicion at any moment, on each side by itself. What a
//! client has seen is a number: the guest's output is numbered by the interval between two captures that it left in.
//! A checkpoint covers the output of all intervals up to its own.

mod act;
mod carry_out;
mod tests;
mod world;

pub(crate) use act::Act;
pub(crate) use world::{Budget, Scenario};
