//! One line of QMP, parsed. Pure: any bytes in, a value or a named error out.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// QEMU's version, from its greeting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuVersion {
    /// Major version.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
    /// Micro version.
    pub micro: u32,
    /// The distribution's words, for example `Debian 1:7.2+dfsg-7+deb12u18`.
    pub package: String,
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// An event, with the time at which QEMU raised it.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// Its name, for example `STOP`.
    pub name: String,
    /// Its data, or `Value::Null`.
    pub data: Value,
    /// Seconds of QEMU's wall clock.
    pub seconds: u64,
    /// Microseconds within the second.
    pub microseconds: u32,
}

impl QmpEvent {
    /// Microseconds of QEMU's wall clock since the epoch of Unix.
    pub fn at_us(&self) -> u64 {
        self.seconds
            .saturating_mul(1_000_000)
            .saturating_add(u64::from(self.microseconds))
    }
}

/// What one line says.
#[derive(Clone, Debug, PartialEq)]
pub enum QmpLine {
    /// The first line of a connection.
    Greeting(QemuVersion),
    /// A command succeeded.
    Return {
        /// The command's id, when it had a numeric one.
        id: Option<u64>,
        /// What it returned.
        value: Value,
    },
    /// A command failed.
    Error {
        /// The command's id, when it had a numeric one.
        id: Option<u64>,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// Something happened.
    Event(QmpEvent),
}

/// Why a line was refused.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// Not JSON.
    #[error("not JSON")]
    Json(#[from] serde_json::Error),
    /// JSON, but no message of QMP.
    #[error("JSON that is no QMP message: {0}")]
    Shape(&'static str),
}

/// Parses one line, without or with its end-of-line.
///
/// # Errors
/// [`LineError`] when it is not JSON or not one of QMP's four messages.
pub fn parse_line(line: &[u8]) -> Result<QmpLine, LineError> {
    let mut object = match serde_json::from_slice(line)? {
        Value::Object(object) => object,
        _ => return Err(LineError::Shape("not an object")),
    };
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(value) = object.remove("return") {
        return Ok(QmpLine::Return { id, value });
    }
    if let Some(error) = object.remove("error") {
        return Ok(QmpLine::Error {
            id,
            class: text(&error, "class")?,
            description: text(&error, "desc")?,
        });
    }
    if object.contains_key("event") {
        return event(object).map(QmpLine::Event);
    }
    match object.get("QMP") {
        Some(greeting) => version(greeting).map(QmpLine::Greeting),
        None => Err(LineError::Shape("neither return, error, event nor greeting")),
    }
}

fn text(object: &Value, key: &str) -> Result<String, LineError> {
    let text = object
        .get(key)
        .and_then(Value::as_str)
        .ok_or(LineError::Shape("an error without class or desc"))?;
    Ok(text.to_owned())
}

fn event(mut object: Map<String, Value>) -> Result<QmpEvent, LineError> {
    let stamp = object.get("timestamp");
    // QEMU writes -1 when it has no clock; such an event still counts.
    let part = |key: &str| {
        stamp
            .and_then(|s| s.get(key))
            .and_then(Value::as_u64)
            .unwrap_or(0)
    };
    let (seconds, microseconds) = (part("seconds"), part("microseconds"));
    let name = match object.remove("event") {
        Some(Value::String(name)) => name,
        _ => return Err(LineError::Shape("an event whose name is no text")),
    };
    Ok(QmpEvent {
        name,
        data: object.remove("data").unwrap_or(Value::Null),
        seconds,
        microseconds: u32::try_from(microseconds)
            .map_err(|_| LineError::Shape("microseconds out of range"))?,
    })
}

fn version(greeting: &Value) -> Result<QemuVersion, LineError> {
    let version = greeting
        .get("version")
        .ok_or(LineError::Shape("a greeting without a version"))?;
    let number = |key: &str| {
        let number = version
            .get("qemu")
            .and_then(|q| q.get(key))
            .and_then(Value::as_u64);
        number
            .and_then(|n| u32::try_from(n).ok())
            .ok_or(LineError::Shape("a greeting without version numbers"))
    };
    Ok(QemuVersion {
        major: number("major")?,
        minor: number("minor")?,
        micro: number("micro")?,
        package: version
            .get("package")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_kind_of_message_is_told_apart() {
        let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
        let QmpLine::Greeting(version) = parse_line(greeting).unwrap() else {
            panic!("not a greeting")
        };
        assert_eq!(version.to_string(), "7.2.22");
        assert_eq!(
            parse_line(br#"{"return": {}, "id": 3}"#).unwrap(),
            QmpLine::Return {
                id: Some(3),
                value: serde_json::json!({})
            }
        );
        let error = parse_line(br#"{"id": 4, "error": {"class": "GenericError", "desc": "no"}}"#).unwrap();
        assert!(matches!(error, QmpLine::Error { id: Some(4), description, .. } if description == "no"));
        let event = br#"{"timestamp": {"seconds": 5, "microseconds": 7}, "event": "STOP"}"#;
        let QmpLine::Event(event) = parse_line(event).unwrap() else {
            panic!("not an event")
        };
        assert_eq!((event.name.as_str(), event.at_us()), ("STOP", 5_000_007));
    }

    #[test]
    fn lines_that_are_no_qmp_are_named_errors() {
        for bad in [
            "",
            "{",
            "[]",
            "{}",
            "3",
            r#"{"event": 3}"#,
            r#"{"error": {}}"#,
            r#"{"QMP": {}}"#,
        ] {
            assert!(parse_line(bad.as_bytes()).is_err(), "{bad:?} was accepted");
        }
        let deep = [b"[".repeat(200_000), b"]".repeat(200_000)].concat();
        assert!(parse_line(&deep).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_line(&bytes);
        }
    }
}
