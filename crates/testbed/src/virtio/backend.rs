//! What a kind of device does, apart from its registers: one request at a time, nothing kept between two.
//!
//! A backend holds no state that a checkpoint would miss. A request is either still in its queue or answered, and so
//! a device stands still as soon as nobody is inside [`Backend::serve`].

use std::os::fd::BorrowedFd;

use virtio_queue::Queue;

use super::chain::QueueFault;

/// What came of a look into a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// A request was answered; there may be more.
    Answered,
    /// Something was used up without an answer (a frame without a place to go); there may be more.
    Dropped,
    /// The queue has no request.
    NoRequest,
    /// The queue has requests, but the host has nothing for them.
    NoInput,
}

/// One kind of device on a guest's memory of type `M`.
pub trait Backend<M>: Send {
    /// virtio's number of this kind.
    fn virtio_id(&self) -> u32;
    /// Features beyond `VERSION_1`.
    fn features(&self) -> u64;
    /// Queues that it has.
    fn queue_count(&self) -> usize;
    /// Its configuration space.
    fn config(&self) -> &[u8];
    /// What makes it look at queue 0 without the guest's doing: a descriptor that becomes readable. It does not block.
    fn input(&self) -> Option<BorrowedFd<'_>>;
    /// Serves one request of queue `index`, from beginning to end.
    ///
    /// # Errors
    /// [`QueueFault`] when the guest wrote what no driver may write. The device is then out of order until its reset.
    fn serve(&mut self, index: usize, queue: &mut Queue, memory: &M) -> Result<Served, QueueFault>;
}
