//! Messages ↔ bytes. Decoding refuses what is not exactly one well-formed message within the limits.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::VERSION;
use super::header::{HEADER_BYTES, Header, PAYLOAD_BYTES_MAX};
use super::machine::{MachineError, NAME_BYTES_MAX};
use super::message::{Reply, Request, Role, TEXT_BYTES_MAX, Welcome};

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum ProtoError {
    /// The first four bytes are others.
    #[error("the peer does not speak the attach protocol: a message begins with other bytes than RATT")]
    Magic,
    /// The payload is over its limit.
    #[error("a message announces {0} bytes of payload, over the limit of {PAYLOAD_BYTES_MAX}")]
    TooLong(u32),
    /// The version is not the one that was agreed.
    #[error("a message has version {0} of the attach protocol where {VERSION} was agreed on")]
    Version(u16),
    /// No message has this number, or not in this direction.
    #[error("no message of this direction has the kind {0:#x}")]
    Kind(u16),
    /// The payload is not that of its kind.
    #[error("the payload of a message of kind {kind:#x} can't be read")]
    Payload {
        /// The message's kind.
        kind: u16,
        /// What is wrong.
        #[source]
        source: postcard::Error,
    },
    /// Something follows the payload.
    #[error("{bytes} bytes follow the payload of a message of kind {kind:#x}")]
    Trailing {
        /// The message's kind.
        kind: u16,
        /// How many.
        bytes: usize,
    },
    /// A name or text over its limit.
    #[error("a text in a message of kind {0:#x} is longer than allowed")]
    Text(u16),
    /// A machine that can't be.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A welcome that contradicts itself.
    #[error("the welcome contradicts itself: {0}")]
    Welcome(&'static str),
    /// Our own message is too long to be sent.
    #[error("a message of {0} bytes is over the limit of {PAYLOAD_BYTES_MAX}")]
    TooLarge(usize),
}

/// Numbers of the requests. Never reused.
mod request_kind {
    pub const HELLO: u16 = 0x01;
    pub const ARM: u16 = 0x02;
    pub const HARVEST: u16 = 0x03;
    pub const PAUSE: u16 = 0x04;
    pub const RESUME: u16 = 0x05;
    pub const HALT: u16 = 0x06;
    pub const GO: u16 = 0x07;
    pub const ALIVE: u16 = 0x08;
    pub const PREPARE: u16 = 0x09;
    pub const RESTORE: u16 = 0x0a;
    pub const ACTIVATE: u16 = 0x0b;
    pub const DETACH: u16 = 0x0c;
}

/// Numbers of the replies. Never reused.
mod reply_kind {
    pub const WELCOME: u16 = 0x101;
    pub const ARMED: u16 = 0x102;
    pub const HARVESTED: u16 = 0x103;
    pub const PAUSED: u16 = 0x104;
    pub const RESUMED: u16 = 0x105;
    pub const HALTED: u16 = 0x106;
    pub const GOING: u16 = 0x107;
    pub const CAPTURED: u16 = 0x108;
    pub const PREPARED: u16 = 0x109;
    pub const RESTORED: u16 = 0x10a;
    pub const ACTIVATED: u16 = 0x10b;
    pub const DETACHED: u16 = 0x10c;
    pub const ERROR: u16 = 0x1ff;
    pub const EVENT: u16 = 0x201;
}

impl Request {
    /// The whole message.
    ///
    /// # Errors
    /// [`ProtoError::TooLarge`].
    pub fn encode(&self, number: u32) -> Result<Vec<u8>, ProtoError> {
        use request_kind as kind;
        match self {
            Self::Hello(hello) => message(kind::HELLO, number, hello),
            Self::Arm => message(kind::ARM, number, &()),
            Self::Harvest => message(kind::HARVEST, number, &()),
            Self::Pause(pause) => message(kind::PAUSE, number, pause),
            Self::Resume => message(kind::RESUME, number, &()),
            Self::Halt(halt) => message(kind::HALT, number, halt),
            Self::Go => message(kind::GO, number, &()),
            Self::Alive => message(kind::ALIVE, number, &()),
            Self::Prepare(prepare) => message(kind::PREPARE, number, prepare),
            Self::Restore(restore) => message(kind::RESTORE, number, restore),
            Self::Activate => message(kind::ACTIVATE, number, &()),
            Self::Detach => message(kind::DETACH, number, &()),
        }
    }

    /// The request in a payload that came after `header`.
    ///
    /// # Errors
    /// [`ProtoError`] names what is wrong with it.
    pub fn decode(header: &Header, payload: &[u8]) -> Result<Self, ProtoError> {
        use request_kind as kind;
        if header.version != VERSION && header.kind != kind::HELLO {
            return Err(ProtoError::Version(header.version));
        }
        let request = match header.kind {
            kind::HELLO => Self::Hello(read(header.kind, payload)?),
            kind::ARM => empty(header.kind, payload, Self::Arm)?,
            kind::HARVEST => empty(header.kind, payload, Self::Harvest)?,
            kind::PAUSE => Self::Pause(read(header.kind, payload)?),
            kind::RESUME => empty(header.kind, payload, Self::Resume)?,
            kind::HALT => Self::Halt(read(header.kind, payload)?),
            kind::GO => empty(header.kind, payload, Self::Go)?,
            kind::ALIVE => empty(header.kind, payload, Self::Alive)?,
            kind::PREPARE => Self::Prepare(read(header.kind, payload)?),
            kind::RESTORE => Self::Restore(read(header.kind, payload)?),
            kind::ACTIVATE => empty(header.kind, payload, Self::Activate)?,
            kind::DETACH => empty(header.kind, payload, Self::Detach)?,
            other => return Err(ProtoError::Kind(other)),
        };
        match &request {
            Self::Hello(hello) if hello.client.len() > NAME_BYTES_MAX => Err(ProtoError::Text(header.kind)),
            Self::Prepare(prepare) => {
                prepare.machine.check()?;
                Ok(request)
            }
            _ => Ok(request),
        }
    }
}

impl Reply {
    /// The whole message.
    ///
    /// # Errors
    /// [`ProtoError::TooLarge`].
    pub fn encode(&self, number: u32) -> Result<Vec<u8>, ProtoError> {
        use reply_kind as kind;
        match self {
            Self::Welcome(welcome) => message(kind::WELCOME, number, welcome),
            Self::Armed => message(kind::ARMED, number, &()),
            Self::Harvested(harvested) => message(kind::HARVESTED, number, harvested),
            Self::Paused(paused) => message(kind::PAUSED, number, paused),
            Self::Captured(captured) => message(kind::CAPTURED, number, captured),
            Self::Resumed(resumed) => message(kind::RESUMED, number, resumed),
            Self::Halted => message(kind::HALTED, number, &()),
            Self::Going => message(kind::GOING, number, &()),
            Self::Prepared => message(kind::PREPARED, number, &()),
            Self::Restored(restored) => message(kind::RESTORED, number, restored),
            Self::Activated(activated) => message(kind::ACTIVATED, number, activated),
            Self::Detached => message(kind::DETACHED, number, &()),
            Self::Error(refusal) => message(kind::ERROR, number, refusal),
            Self::Event(event) => message(kind::EVENT, number, event),
        }
    }

    /// The reply in a payload that came after `header`.
    ///
    /// # Errors
    /// [`ProtoError`] names what is wrong with it.
    pub fn decode(header: &Header, payload: &[u8]) -> Result<Self, ProtoError> {
        use reply_kind as kind;
        if header.version != VERSION && header.kind != kind::ERROR {
            return Err(ProtoError::Version(header.version));
        }
        let reply = match header.kind {
            kind::WELCOME => Self::Welcome(read(header.kind, payload)?),
            kind::ARMED => empty(header.kind, payload, Self::Armed)?,
            kind::HARVESTED => Self::Harvested(read(header.kind, payload)?),
            kind::PAUSED => Self::Paused(read(header.kind, payload)?),
            kind::CAPTURED => Self::Captured(read(header.kind, payload)?),
            kind::RESUMED => Self::Resumed(read(header.kind, payload)?),
            kind::HALTED => empty(header.kind, payload, Self::Halted)?,
            kind::GOING => empty(header.kind, payload, Self::Going)?,
            kind::PREPARED => empty(header.kind, payload, Self::Prepared)?,
            kind::RESTORED => Self::Restored(read(header.kind, payload)?),
            kind::ACTIVATED => Self::Activated(read(header.kind, payload)?),
            kind::DETACHED => empty(header.kind, payload, Self::Detached)?,
            kind::ERROR => Self::Error(read(header.kind, payload)?),
            kind::EVENT => Self::Event(read(header.kind, payload)?),
            other => return Err(ProtoError::Kind(other)),
        };
        match &reply {
            Self::Error(refusal) if refusal.text.len() > TEXT_BYTES_MAX => Err(ProtoError::Text(header.kind)),
            Self::Welcome(welcome) => {
                check_welcome(welcome)?;
                Ok(reply)
            }
            _ => Ok(reply),
        }
    }
}

fn check_welcome(welcome: &Welcome) -> Result<(), ProtoError> {
    if welcome.vmm.len() > NAME_BYTES_MAX || welcome.vmm_version.len() > NAME_BYTES_MAX {
        return Err(ProtoError::Text(reply_kind::WELCOME));
    }
    if welcome.version != VERSION {
        return Err(ProtoError::Version(welcome.version));
    }
    if welcome.pause_limit_ns_max == 0 || welcome.halt_limit_ns == 0 || welcome.state_bytes_max == 0 {
        return Err(ProtoError::Welcome("a limit is 0"));
    }
    match (welcome.role, &welcome.machine) {
        (Role::Empty, None) if welcome.bitmap_bytes == 0 => Ok(()),
        (Role::Empty, _) => Err(ProtoError::Welcome(
            "the VMM is empty and has a machine or a bitmap",
        )),
        (_, None) => Err(ProtoError::Welcome("the VMM is not empty and has no machine")),
        (role, Some(machine)) => {
            machine.check()?;
            let tracked = welcome.bitmap_bytes == machine.bitmap_bytes();
            if !tracked && (welcome.bitmap_bytes != 0 || role == Role::Running) {
                return Err(ProtoError::Welcome(
                    "the bitmap's length is not that of the memory",
                ));
            }
            Ok(())
        }
    }
}

fn message<T: Serialize>(kind: u16, number: u32, payload: &T) -> Result<Vec<u8>, ProtoError> {
    let header = Header {
        version: VERSION,
        kind,
        length: 0,
        number,
    };
    let bytes = postcard::to_extend(payload, header.encode().to_vec())
        .map_err(|source| ProtoError::Payload { kind, source })?;
    finish(header, bytes)
}

/// Puts the payload's length into the header.
fn finish(header: Header, mut bytes: Vec<u8>) -> Result<Vec<u8>, ProtoError> {
    let payload_bytes = bytes.len() - HEADER_BYTES;
    let length = u32::try_from(payload_bytes)
        .ok()
        .filter(|_| payload_bytes <= PAYLOAD_BYTES_MAX);
    let length = length.ok_or(ProtoError::TooLarge(payload_bytes))?;
    bytes[..HEADER_BYTES].copy_from_slice(&Header { length, ..header }.encode());
    Ok(bytes)
}

fn read<T: DeserializeOwned>(kind: u16, payload: &[u8]) -> Result<T, ProtoError> {
    let (value, rest) =
        postcard::take_from_bytes(payload).map_err(|source| ProtoError::Payload { kind, source })?;
    empty(kind, rest, value)
}

fn empty<T>(kind: u16, rest: &[u8], value: T) -> Result<T, ProtoError> {
    if rest.is_empty() {
        return Ok(value);
    }
    Err(ProtoError::Trailing {
        kind,
        bytes: rest.len(),
    })
}
