//! Range checks that name the key they are about.

use std::path::Path;
use std::time::Duration;

use crate::quantity::ByteSize;

/// A value that is not allowed, before it is known which file it came from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct Invalid {
    /// The key's full path, such as `failover.heartbeat_interval`.
    pub key: String,
    /// What is wrong and what is allowed.
    pub problem: String,
}

impl Invalid {
    pub(crate) fn new(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            problem: problem.into(),
        }
    }
}

/// Checks of one section's keys; every check gives the checker back, so that they chain.
pub(crate) struct Checks {
    section: &'static str,
}

impl Checks {
    /// `section` is empty for keys outside any section.
    pub(crate) fn new(section: &'static str) -> Self {
        Self { section }
    }

    fn key(&self, key: &str) -> String {
        if self.section.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.section)
        }
    }

    pub(crate) fn duration(
        self,
        key: &str,
        value: Duration,
        min: Duration,
        max: Duration,
    ) -> Result<Self, Invalid> {
        if (min..=max).contains(&value) {
            return Ok(self);
        }
        let text = humantime::format_duration;
        let problem = format!("{} is not within {} and {}", text(value), text(min), text(max));
        Err(Invalid::new(self.key(key), problem))
    }

    pub(crate) fn number(self, key: &str, value: u64, min: u64, max: u64) -> Result<Self, Invalid> {
        if (min..=max).contains(&value) {
            return Ok(self);
        }
        Err(Invalid::new(
            self.key(key),
            format!("{value} is not within {min} and {max}"),
        ))
    }

    pub(crate) fn size(
        self,
        key: &str,
        value: ByteSize,
        min: ByteSize,
        max: ByteSize,
    ) -> Result<Self, Invalid> {
        if (min..=max).contains(&value) {
            return Ok(self);
        }
        Err(Invalid::new(
            self.key(key),
            format!("{value} is not within {min} and {max}"),
        ))
    }

    pub(crate) fn absolute(self, key: &str, value: &Path) -> Result<Self, Invalid> {
        if value.is_absolute() {
            return Ok(self);
        }
        Err(Invalid::new(
            self.key(key),
            format!("{} is not an absolute path", value.display()),
        ))
    }
}
