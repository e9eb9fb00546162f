//! A machine of `testbed`, a network of its own, and hops of the machine from one process to another.
#![allow(dead_code, reason = "each test uses its part")]

pub mod datagrams;
pub mod hop;
pub mod network;
pub mod service;
pub mod steps;
pub mod tour;
pub mod vmm;
