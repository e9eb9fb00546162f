//! Safe wrappers around the Linux calls that Romulus needs: the only crate of the project's core with unsafe code.
//!
//! Each file wraps one kernel facility and knows nothing of virtual machines. A wrapper takes and returns owned
//! or borrowed Rust values, checks lengths before the kernel sees them, and turns every failure into a
//! [`SysError`] that names the call. What is unsafe about a call is said in its `SAFETY` line.
//!
//! ```text
//!  another process:  maps ─► ptrace (one system call in it) ─► pidfd (take the fd) ─► userfaultfd ─► pagemap
//!                    memory (read scattered ranges, map a shared one)
//!  ourselves:        killtimer, pipe, open_watch, clock, durable (files that survive a crash whole),
//!                    resident (memory that is there before it is needed), huge (huge pages under files in memory), child, inherited (files from the service manager)
//!  the network:      tap, bpf, netns, packet
//!  a VMM's own:      kvm (feature `kvm`), shared_words (a bitmap that two processes write)
//!  the kernel:       probe (what it can do, by name)
//! ```

pub mod bpf;
pub mod child;
mod clock;
pub mod durable;
mod error;
mod gadget;
mod huge;
mod inherited;
mod killtimer;
#[cfg(feature = "kvm")]
pub mod kvm;
mod maps;
mod memory;
pub mod netns;
mod open_watch;
pub mod packet;
mod pagemap;
mod peer;
mod pidfd;
mod pipe;
pub mod priority;
mod probe;
pub mod process_clock;
mod ptrace;
pub mod random;
mod rescue_frame;
mod resident;
mod shared_words;
mod spans;
pub mod tap;
mod userfault;
mod view;

pub use clock::{monotonic_ns, process_cpu_ns, thread_cpu_ns, wall_clock_offset_ns};
pub use error::SysError;
pub use huge::{HugePages, use_huge_pages};
pub use inherited::take_inherited_files;
pub use killtimer::KillTimer;
pub use maps::{Mapping, read_maps};
pub use memory::{ProcessMemory, RemoteRange};
pub use open_watch::OpenWatch;
pub use pagemap::{PageRegion, Pagemap};
pub use peer::socket_peer_pid;
pub use pidfd::PidFd;
pub use pipe::{ReadOutcome, make_fifo, open_fifo_reader, pipe_bytes_waiting, read_nonblocking, resize_pipe};
pub use probe::{KernelFeature, probe_kernel};
pub use ptrace::{CALL_STAGES, CallStage, call_in_process};
pub use resident::resident_buffer;
pub use shared_words::SharedWords;
pub use userfault::{UserFault, create_here, create_in_process};
pub use view::SharedView;
