//! Codes that go with closing a connection.

use std::fmt;

/// Most bytes of the text that goes with a close; more is cut off.
pub const REASON_BYTES_MAX: usize = 256;

/// Why a connection was closed, as a number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CloseCode(u32);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        impl CloseCode {
            $($(#[$doc])* pub const $name: Self = Self($value);)*
        }

        impl fmt::Display for CloseCode {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    $($value => f.write_str($text),)*
                    other => write!(f, "code {other}"),
                }
            }
        }
    };
}

codes! {
    /// The work is done.
    DONE = 0, "done";
    /// The daemon is shutting down.
    SHUTDOWN = 1, "shutting down";
    /// What the peer sent breaks the protocol.
    BAD_INPUT = 2, "bad input";
    /// The session was refused, for the reason that goes with it.
    REFUSED = 3, "refused";
    /// Another connection took this one's place.
    SUPERSEDED = 4, "superseded";
    /// The peer's certificate is not good for this.
    IDENTITY = 5, "identity";
    /// The daemon hit a limit of its own.
    LIMIT = 6, "limit";
    /// The daemon has a fault.
    FAULT = 7, "fault";
}

impl CloseCode {
    /// A code from its number.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number on the wire.
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// At most [`REASON_BYTES_MAX`] bytes of `reason`, cut at a character.
pub(crate) fn shorten(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(REASON_BYTES_MAX)]
}
