//! Byte sizes and durations as people write them: `256MiB`, `25ms`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes, written as `4096`, `64KiB`, `256MiB`, `16GiB` or `1TiB`.
///
/// Decimal units (`MB`) are refused: they are mistaken for binary ones too easily.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "SizeText", into = "String")]
pub struct ByteSize(u64);

/// Why a text is not a [`ByteSize`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No number, or a unit other than B, KiB, MiB, GiB, TiB.
    #[error("{0:?} is not a size: write a whole number and B, KiB, MiB, GiB or TiB, such as \"256MiB\"")]
    Form(String),
    /// More than 2^64 bytes.
    #[error("{0:?} is more than 2^64 bytes")]
    TooLarge(String),
}

const UNITS: [(&str, u32); 6] = [
    ("TiB", 40),
    ("GiB", 30),
    ("MiB", 20),
    ("KiB", 10),
    ("B", 0),
    ("", 0),
];

impl ByteSize {
    /// `bytes` bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// `mib` times 2^20 bytes.
    pub const fn from_mib(mib: u32) -> Self {
        Self((mib as u64) << 20)
    }

    /// `gib` times 2^30 bytes.
    pub const fn from_gib(gib: u32) -> Self {
        Self((gib as u64) << 30)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The number of bytes as a length in memory; saturates where addresses are shorter than 64 bits.
    pub fn as_len(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim_start();
        let shift = UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .map(|(_, shift)| *shift);
        let (Some(shift), false) = (shift, number.is_empty()) else {
            return Err(SizeError::Form(text.to_owned()));
        };
        let too_large = || SizeError::TooLarge(text.to_owned());
        let number: u64 = number.parse().map_err(|_| too_large())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(too_large)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |shift: u32| self.0 != 0 && self.0.trailing_zeros() >= shift;
        let (unit, shift) = UNITS.iter().find(|(_, shift)| fits(*shift)).unwrap_or(&("B", 0));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

/// What a file may hold where a size is wanted: a text, or a bare number of bytes.
#[derive(Deserialize)]
#[serde(untagged)]
enum SizeText {
    Bytes(u64),
    Text(String),
}

impl TryFrom<SizeText> for ByteSize {
    type Error = SizeError;
    fn try_from(text: SizeText) -> Result<Self, SizeError> {
        match text {
            SizeText::Bytes(bytes) => Ok(Self(bytes)),
            SizeText::Text(text) => text.parse(),
        }
    }
}

/// Serde glue for durations in humantime's form.
pub(crate) mod duration {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*value))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        humantime::parse_duration(&text).map_err(|error| {
            D::Error::custom(format!(
                "{text:?} is not a duration such as \"25ms\" or \"60s\": {error}"
            ))
        })
    }
}

/// As [`duration`], for a value that may be missing.
pub(crate) mod optional_duration {
    use std::time::Duration;

    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::duration::serialize(value, to),
            None => to.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        super::duration::deserialize(from).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_reads_back_as_it_is_written() {
        for bytes in [
            0,
            1,
            1023,
            1024,
            3 << 20,
            (3 << 20) + 1,
            5 << 30,
            7 << 40,
            u64::MAX,
        ] {
            let size = ByteSize::from_bytes(bytes);
            assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size, "{size}");
        }
        assert_eq!("64 MiB".parse::<ByteSize>().unwrap(), ByteSize::from_mib(64));
    }

    #[test]
    fn sizes_that_could_be_misread_are_refused() {
        for bad in [
            "",
            "MiB",
            "1MB",
            "1.5GiB",
            "-1",
            "10 apples",
            "1mib",
            "18446744073709551616",
            "16777216TiB",
        ] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad:?} was accepted");
        }
    }
}
