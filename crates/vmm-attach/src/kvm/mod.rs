//! What a VMM built on kvm-ioctls and vm-memory needs to be paused, captured and restored.
//!
//! | part | what it does |
//! |---|---|
//! | [`Vcpus`] | runs the vCPUs on threads of their own, stops them and lets them go |
//! | [`StateSaver`], [`blob`] | what the kernel holds of a machine, as bytes |
//! | [`DirtyTracker`], [`Tracking`] | which pages the vCPUs wrote |
//! | [`KvmMachine`], [`DeviceState`] | all of it as a [`crate::server::Machine`], with the author's devices |

pub mod blob;
mod clock;
mod cpuid;
mod hot;
mod lapic;
mod machine;
mod state;
mod tracker;
mod vcpus;

pub use clock::ClockStep;
pub use machine::{Build, DeviceError, DeviceState, Exclusive, KvmLimits, KvmMachine, KvmParts};
pub use state::{SharedPages, StateError, StateSaver};
pub use tracker::{DirtyTracker, HotPageRule, Moment, TrackError, Tracking};
pub use vcpus::{Next, VcpuError, Vcpus};
