//! Hostile input from the network, against the real agent and the real witness on loopback: noise, strangers, liars and
//! broken streams.
//!
//! ```text
//!   strangers ───── UDP, QUIC ────┐
//!   liars ───────── good TLS ─────┼─► backup-agent, witness ◄── one good peer, all the time
//!   broken streams  good Hello ───┘         │
//!                                           └─► a named reason for the peer, a count for the operator
//! ```
//!
//! After every case: the refusal is named and counted, memory is bounded, the last commit stands, a good peer is served.

#[path = "hostile/cases.rs"]
mod cases;
#[path = "hostile/place.rs"]
mod place;
#[path = "hostile/primary.rs"]
mod primary;

#[path = "hostile/allowed.rs"]
mod allowed;
#[path = "hostile/at_agent.rs"]
mod at_agent;
#[path = "hostile/at_witness.rs"]
mod at_witness;
#[path = "hostile/certificates.rs"]
mod certificates;
#[path = "hostile/liars.rs"]
mod liars;
#[path = "hostile/storm.rs"]
mod storm;
