//! QEMU, reached from outside through nothing but its QMP monitor.

pub mod bootstrap;
pub mod qmp;
pub mod stream;
