//! A network namespace of one's own for the calling thread: what tests of taps and bridges run in, so that they
//! neither see the host's network nor leave anything in it.

use std::io;

/// Moves the calling thread, and the threads and processes it starts from now on, into a new, empty network
/// namespace, which goes away with the last of them.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN`.
pub fn enter_new() -> io::Result<()> {
    // SAFETY: CLONE_NEWNET changes neither memory nor the descriptor table, only which network the thread sees.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.map_err(io::Error::from)
}
