//! The loop of a daemon: one thread for all its tasks.

use tokio::runtime::{Builder, Runtime};

/// After so many turns of tasks the loop takes what other threads have woken, and asks the kernel what has arrived. tokio's own values, 31
/// and 61, are for tasks that are alike: here one may read megabytes, some tens of microseconds a turn, while others wait
/// for a word from a thread of theirs, and each of them holds a guest's output up.
const TURNS_BETWEEN_THREADS: u32 = 2;
const TURNS_BETWEEN_EVENTS: u32 = 7;

/// Makes it.
///
/// # Errors
/// When the kernel has no more files to watch others with.
pub fn runtime() -> std::io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .global_queue_interval(TURNS_BETWEEN_THREADS)
        .event_interval(TURNS_BETWEEN_EVENTS)
        .build()
}
