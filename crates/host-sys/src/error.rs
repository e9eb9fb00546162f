//! The crate's one error type.

use std::io;

/// Why a wrapped call failed.
#[derive(Debug, thiserror::Error)]
pub enum SysError {
    /// The kernel refused a call.
    #[error("{call} failed: {source}")]
    Call {
        /// The call, as its manual page is named.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file under /proc could not be read, or does not look as documented.
    #[error("{path} cannot be used: {source}")]
    Proc {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The kernel does not let us trace the process.
    #[error(
        "process {pid} may not be traced ({source}); run as root or with CAP_SYS_PTRACE, and end any debugger attached to it"
    )]
    TraceRefused {
        /// The process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process is stopped by a signal, so nothing can be run in it.
    #[error("process {0} is stopped by a signal; continue it with SIGCONT first")]
    TargetStopped(u32),
    /// The process ended.
    #[error("process {0} is gone")]
    TargetGone(u32),
    /// The process did not reach a stop in time; it was let go.
    #[error("process {0} did not stop within the time limit; it may hang in the kernel")]
    TargetBusy(u32),
    /// The process's code has none of the instructions that a call needs.
    #[error("process {0} has no usable system call instruction in its code")]
    NoGadget(u32),
    /// A file that is to be mapped could be made shorter under us.
    #[error("the file can still shrink; it must be a memory fd that is sealed with F_SEAL_SHRINK")]
    NotSealed,
    /// A length or offset lies outside of the object.
    #[error("{what} at {offset} with {bytes} bytes lies outside of its {limit} bytes")]
    OutOfBounds {
        /// The object.
        what: &'static str,
        /// Where the access began.
        offset: u64,
        /// How long it was.
        bytes: u64,
        /// How long the object is.
        limit: u64,
    },
    /// Part of the other process's memory could not be read.
    #[error("only {read_bytes} of {wanted_bytes} bytes of the process's memory could be read")]
    ShortRead {
        /// Bytes that were asked for.
        wanted_bytes: usize,
        /// Bytes that came.
        read_bytes: usize,
    },
}

impl SysError {
    /// The error of the call that just failed, from `errno`.
    pub(crate) fn last(call: &'static str) -> Self {
        Self::Call {
            call,
            source: io::Error::last_os_error(),
        }
    }

    /// The error of a call that failed.
    pub fn call(call: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Call {
            call,
            source: source.into(),
        }
    }

    /// The kernel's error number, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Call { source, .. } | Self::Proc { source, .. } | Self::TraceRefused { source, .. } => {
                source.raw_os_error()
            }
            _ => None,
        }
    }
}
