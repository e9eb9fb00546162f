//! Placeholder.

pub mod bpf;
pub mod netns;
pub mod tap;
