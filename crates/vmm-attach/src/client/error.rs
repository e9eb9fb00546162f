//! Why a request failed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::EVENTS_MAX;
use crate::channel::ChannelError;
use crate::memfd::FileError;
use crate::proto::{ErrorCode, ProtoError, Refusal};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no VMM at the socket.
    #[error("no VMM can be reached at {path}: is it running, with its attach socket there?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another client is attached to the VMM.
    #[error("the VMM, process {pid}, did not let us in: {text}")]
    Busy {
        /// The VMM's process; 0 when it can't be seen from here.
        pid: u32,
        /// Who is attached.
        text: String,
    },
    /// The connection failed. The VMM has let the guest run.
    #[error("the connection to the VMM failed")]
    Channel(#[from] ChannelError),
    /// What the VMM sent can't be understood.
    #[error("the VMM's answer can't be understood")]
    Proto(#[from] ProtoError),
    /// A file that the VMM sent can't be used.
    #[error("a file from the VMM can't be used")]
    File(#[from] FileError),
    /// A message came with another number of file descriptors than it says.
    #[error("the VMM sent {came} file descriptors with its {reply}, where {wanted} belong to it")]
    Descriptors {
        /// The message.
        reply: &'static str,
        /// What came.
        came: usize,
        /// What its payload announces.
        wanted: usize,
    },
    /// The VMM answered something else than what was asked.
    #[error("the VMM answered {request} with {reply}, or with another number")]
    Unexpected {
        /// What was asked.
        request: &'static str,
        /// What came.
        reply: &'static str,
    },
    /// It did not answer.
    #[error("the VMM did not answer {request} within {limit:?}")]
    NoAnswer {
        /// What was asked.
        request: &'static str,
        /// How long we waited.
        limit: Duration,
    },
    /// The guest was let go before: what was copied since the pause is void.
    #[error("the guest was let go before the checkpoint was complete: {0}")]
    PauseExpired(String),
    /// The machine is not the one of the attachment any more.
    #[error("the VMM's machine changed: {0}")]
    MachineChanged(String),
    /// The VMM refused.
    #[error("the VMM refused {request} ({code:?}): {text}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// Why, as a code.
        code: ErrorCode,
        /// Why, in words.
        text: String,
    },
    /// More events than we keep came unasked.
    #[error("the VMM sent more than {EVENTS_MAX} events at once")]
    TooManyEvents,
    /// The connection failed before.
    #[error("the connection to the VMM has failed before: connect anew")]
    Broken,
    /// A state could not be handed over or read.
    #[error("the state's memory file can't be used")]
    State(#[source] io::Error),
}

/// A refusal, with the ones that a client has to tell apart as variants of their own.
pub(super) fn refused(request: &'static str, refusal: Refusal) -> ClientError {
    let Refusal { code, text } = refusal;
    match code {
        ErrorCode::PauseExpired => ClientError::PauseExpired(text),
        ErrorCode::MachineChanged => ClientError::MachineChanged(text),
        code => ClientError::Refused { request, code, text },
    }
}
