//! What the test guest is made of besides its hardware.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod abi;
