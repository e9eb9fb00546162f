//! A bounded pool of checkpoint buffers: the capture thread takes one for each epoch, the encoder gives it back.
//!
//! The pool is what bounds the memory of captured, not yet encoded checkpoints. Buffers are kept at the size that
//! they once grew to; the source makes them larger before a pause that may need it, so that the pause does not pay for page faults.

use std::sync::mpsc;

use romulus_hypervisor::source::Checkpoint;

/// The capture thread's end.
pub struct BufferPool {
    free: mpsc::Receiver<Checkpoint>,
}

/// The encoder's end.
#[derive(Clone)]
pub struct BufferReturn {
    free: mpsc::SyncSender<Checkpoint>,
}

/// A pool of `count` buffers.
pub fn buffer_pool(count: usize) -> (BufferPool, BufferReturn) {
    let (sender, receiver) = mpsc::sync_channel(count);
    for _ in 0..count {
        sender
            .try_send(Checkpoint::default())
            .expect("the pool holds as many as it was made for");
    }
    (BufferPool { free: receiver }, BufferReturn { free: sender })
}

impl BufferPool {
    /// The next free buffer; waits for the encoder when there is none, `None` when it is gone.
    pub fn take(&self) -> Option<Checkpoint> {
        self.free.recv().ok()
    }
}

impl BufferReturn {
    /// Gives a buffer back.
    pub fn give(&self, mut buffer: Checkpoint) {
        buffer.clear();
        // A pool whose other end is gone has no use for it.
        let _ = self.free.try_send(buffer);
    }
}
