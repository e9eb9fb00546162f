//! QEMU, reached from outside through nothing but its QMP monitor.

pub mod bootstrap;
pub mod cmdline;
pub mod cpu;
mod files;
pub mod qmp;
pub mod source;
pub mod standby;
pub mod stream;
