//! virtio devices: registers ([`transport`]), requests ([`chain`]), what each kind does ([`net`], [`blk`]), and the
//! [`bus`] that holds them together and can make them stand still.

pub mod backend;
pub mod blk;
pub mod bus;
pub mod chain;
pub mod io_thread;
pub mod net;
pub mod transport;

#[cfg(test)]
mod driver;
