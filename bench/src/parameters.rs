//! What tells the rows of a measure apart, by name: `epoch_ms` = 25, `dirty` = "random:1024:25", `vcpus` = 1.
//!
//! A case is a name for people; parameters are what a plot is drawn over.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::stats::float;

/// By name, with the unit last in the name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Parameters(BTreeMap<String, Parameter>);

/// One of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Parameter {
    Whole(u64),
    Number(f64),
    Text(String),
}

impl Parameters {
    pub(crate) fn get(&self, name: &str) -> Option<&Parameter> {
        self.0.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Parameter {
    /// Where it stands on an axis; a text stands on none.
    pub(crate) fn number(&self) -> Option<f64> {
        match self {
            Self::Whole(number) => Some(float(*number)),
            Self::Number(number) => Some(*number),
            Self::Text(_) => None,
        }
    }
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(number) => number.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

impl<const N: usize> From<[(&str, Parameter); N]> for Parameters {
    fn from(all: [(&str, Parameter); N]) -> Self {
        all.into_iter().collect()
    }
}

impl<'n> FromIterator<(&'n str, Parameter)> for Parameters {
    fn from_iter<I: IntoIterator<Item = (&'n str, Parameter)>>(all: I) -> Self {
        Self(
            all.into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        )
    }
}

impl From<u64> for Parameter {
    fn from(number: u64) -> Self {
        Self::Whole(number)
    }
}

impl From<u32> for Parameter {
    fn from(number: u32) -> Self {
        Self::Whole(number.into())
    }
}

impl From<u16> for Parameter {
    fn from(number: u16) -> Self {
        Self::Whole(number.into())
    }
}

impl From<usize> for Parameter {
    fn from(number: usize) -> Self {
        Self::Whole(number as u64)
    }
}

impl From<&str> for Parameter {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<&String> for Parameter {
    fn from(text: &String) -> Self {
        Self::Text(text.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_plain_json_and_come_back_as_they_were() {
        let parameters = Parameters::from([
            ("epoch_ms", 25_u32.into()),
            ("dirty", "random:1024:25".into()),
            ("share", Parameter::Number(0.5)),
        ]);
        let json = serde_json::to_string(&parameters).unwrap();
        assert_eq!(json, r#"{"dirty":"random:1024:25","epoch_ms":25,"share":0.5}"#);
        assert_eq!(serde_json::from_str::<Parameters>(&json).unwrap(), parameters);
    }
}
