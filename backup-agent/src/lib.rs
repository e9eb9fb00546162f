//! The part of the agent that receives checkpoints, which `bench` puts to the test without the rest of it.
#![forbid(unsafe_code)]

pub mod receive;
pub mod vm_image;
