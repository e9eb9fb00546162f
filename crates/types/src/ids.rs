//! Names and numbers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest name of a VM or a host, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty, or longer than [`NAME_BYTES_MAX`].
    #[error("a name must have 1 to {NAME_BYTES_MAX} bytes, this one has {0}")]
    Length(usize),
    /// A character outside `[A-Za-z0-9._-]`, or a leading dot or dash.
    #[error("a name may hold letters, digits, '.', '_' and '-', and starts with a letter or digit: {0:?}")]
    Character(String),
}

fn check_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(NameError::Length(name.len()));
    }
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if !plain || !name.as_bytes()[0].is_ascii_alphanumeric() {
        return Err(NameError::Character(name.to_owned()));
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Checks `name` and wraps it.
            ///
            /// # Errors
            /// [`NameError`] when the length or a character is not allowed.
            pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
                let name = name.into();
                check_name(&name)?;
                Ok(Self(name))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl std::str::FromStr for $type {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// The name of a protected VM, unique at its witness.
    VmId
}
name! {
    /// The name of a host: a primary or a backup.
    HostId
}

macro_rules! number {
    ($(#[$doc:meta])* $type:ident($inner:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $type(pub $inner);

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
    };
}

number! {
    /// An epoch: the interval that ends with the checkpoint of the same number. Counted from 1 in each session;
    /// 0 stands for "none yet".
    Epoch(u64), "{}"
}
number! {
    /// The number of the witness's record for one VM. Every change of the record makes a new, higher one.
    Term(u64), "{}"
}
number! {
    /// Names one uninterrupted connection of a pair. Drawn at random; it is in every message of the session.
    Session(u128), "{:032x}"
}
number! {
    /// Names one request to the witness, so that a repeated request gets the same answer. Drawn at random.
    Nonce(u128), "{:032x}"
}
number! {
    /// Names one life of a witness's store. A store restored from an old copy must get a new one.
    WitnessInstance(u128), "{:032x}"
}
number! {
    /// A 128-bit digest: of a section of a checkpoint or of a whole memory image.
    Digest(u128), "{:032x}"
}

impl Epoch {
    /// No epoch yet.
    pub const NONE: Self = Self(0);

    /// The epoch after this one.
    ///
    /// # Panics
    /// When 2^64 epochs have passed.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("epochs are never exhausted"))
    }
}

impl Term {
    /// The term after this one.
    ///
    /// # Panics
    /// When 2^64 terms have passed.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("terms are never exhausted"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_path_or_shell_characters_are_refused() {
        for bad in ["", "../etc", "a b", "-rf", ".hidden", "a/b", "ü", &"x".repeat(65)] {
            assert!(VmId::new(bad).is_err(), "{bad:?} was accepted");
        }
        assert_eq!(VmId::new("web-1.prod_a").unwrap().as_str(), "web-1.prod_a");
    }
}
