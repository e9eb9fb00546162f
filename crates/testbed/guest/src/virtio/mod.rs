//! Drivers for virtio devices, by the virtio 1.2 specification: mmio transport (4.2), split queues (2.7), network (5.1),
//! block (5.2).

pub mod blk;
pub mod mmio;
pub mod net;
pub mod queue;
