//! Safe wrappers around the Linux calls that Romulus needs: the only crate of the project's core with unsafe code.
//!
//! Each file wraps one kernel facility and knows nothing of virtual machines. A wrapper takes and returns owned
//! or borrowed Rust values, checks lengths before the kernel sees them, and turns every failure into a
//! [`SysError`] that names the call. What is unsafe about a call is said in its `SAFETY` line.
//!
//! ```text
//!  another process:  maps ─► ptrace (one system call in it) ─► pidfd (take the fd) ─► userfaultfd ─► pagemap
//!                    memory (read scattered ranges, map a shared one)
//!  ourselves:        killtimer, pipe, monotonic clock
//!  the kernel:       probe (what it can do, by name)
//! ```

mod clock;
mod error;
mod gadget;
mod killtimer;
mod maps;
mod memory;
mod pagemap;
mod pidfd;
mod pipe;
mod probe;
mod ptrace;
mod rescue_frame;
mod userfault;
mod view;

pub use clock::monotonic_ns;
pub use error::SysError;
pub use killtimer::KillTimer;
pub use maps::{read_maps, Mapping};
pub use memory::{ProcessMemory, RemoteRange};
pub use pagemap::{PageRegion, Pagemap};
pub use pidfd::PidFd;
pub use pipe::{grow_pipe, make_fifo, open_fifo_reader, pipe_bytes_waiting, read_nonblocking, ReadOutcome};
pub use probe::{probe_kernel, KernelFeature};
pub use ptrace::{call_in_process, CallStage, CALL_STAGES};
pub use userfault::{create_in_process, UserFault};
pub use view::SharedView;
