//! The `key=value,key=value` of one QEMU option, or its JSON form.

use std::fmt;

use serde_json::Value;

use super::CmdlineError;

/// Most keys of one option.
const KEYS_MAX: usize = 256;
/// Longest key: nested objects repeat the outer key in each inner one.
const KEY_BYTES_MAX: usize = 256;

/// Keys and values in their order. A bare key counts as `on`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Props {
    items: Vec<(String, String)>,
}

impl Props {
    /// Parses `text`. A first part without `=` is the value of `implied`, where the option has such a key.
    pub(super) fn parse(text: &str, implied: Option<&str>) -> Result<Self, CmdlineError> {
        if text.trim_start().starts_with('{') {
            return Self::parse_json(text);
        }
        let mut props = Self::default();
        for (position, part) in split(text).into_iter().enumerate() {
            let (key, value) = match (part.split_once('='), implied) {
                (None, Some(implied)) if position == 0 => (implied.to_owned(), part),
                (None, _) => (part, "on".to_owned()),
                (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
            };
            props.push(key, value)?;
        }
        Ok(props)
    }

    fn parse_json(text: &str) -> Result<Self, CmdlineError> {
        let value: Value = serde_json::from_str(text).map_err(CmdlineError::Json)?;
        let mut props = Self::default();
        let Value::Object(object) = value else {
            unreachable!("it begins with a brace")
        };
        for (key, value) in object {
            props.flatten(key, value)?;
        }
        Ok(props)
    }

    /// Nested keys are joined with dots, as QEMU itself does.
    fn flatten(&mut self, key: String, value: Value) -> Result<(), CmdlineError> {
        if key.len() > KEY_BYTES_MAX {
            return Err(CmdlineError::LongKey(KEY_BYTES_MAX));
        }
        match value {
            Value::Object(object) => object
                .into_iter()
                .try_for_each(|(inner, value)| self.flatten(format!("{key}.{inner}"), value)),
            Value::Array(list) => list
                .into_iter()
                .enumerate()
                .try_for_each(|(n, value)| self.flatten(format!("{key}.{n}"), value)),
            Value::Bool(on) => self.push(key, if on { "on" } else { "off" }.to_owned()),
            Value::String(text) => self.push(key, text),
            Value::Number(number) => self.push(key, number.to_string()),
            Value::Null => Ok(()),
        }
    }

    fn push(&mut self, key: String, value: String) -> Result<(), CmdlineError> {
        if self.items.len() == KEYS_MAX {
            return Err(CmdlineError::TooManyKeys);
        }
        self.items.push((key, value));
        Ok(())
    }

    /// The last value of a key, as QEMU takes it.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.items
            .iter()
            .rev()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
    }

    pub(super) fn is_on(&self, key: &str) -> bool {
        matches!(self.get(key), Some("on" | "yes" | "true" | "y"))
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.items.iter().map(|(key, _)| key.as_str())
    }

    /// Removes a key; `true` when it was there.
    pub(super) fn remove(&mut self, key: &str) -> bool {
        let before = self.items.len();
        self.items.retain(|(k, _)| k != key);
        self.items.len() < before
    }

    /// Removes all keys that are not in `kept`; returns the names of those.
    pub(super) fn retain(&mut self, kept: &[&str]) -> Vec<String> {
        let (keep, gone) = std::mem::take(&mut self.items)
            .into_iter()
            .partition(|(key, _): &(String, String)| kept.contains(&key.as_str()));
        self.items = keep;
        gone.into_iter().map(|(key, _)| key).collect()
    }

    pub(super) fn set(&mut self, key: &str, value: impl Into<String>) {
        let value = value.into();
        match self.items.iter().rposition(|(k, _)| k == key) {
            Some(last) => self.items[last].1 = value,
            None => self.items.push((key.to_owned(), value)),
        }
    }

    /// Takes over the keys of `later`, which win.
    pub(super) fn merge(&mut self, later: Self) {
        for (key, value) in later.items {
            self.set(&key, value);
        }
    }
}

impl fmt::Display for Props {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (key, value)) in self.items.iter().enumerate() {
            let comma = if position == 0 { "" } else { "," };
            write!(f, "{comma}{key}={}", value.replace(',', ",,"))?;
        }
        Ok(())
    }
}

/// Splits at commas; a doubled comma stands for one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let last = parts.last_mut().expect("there is always one part");
        match character {
            ',' if characters.peek() == Some(&',') => {
                characters.next();
                last.push(',');
            }
            ',' => parts.push(String::new()),
            other => last.push(other),
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubled_commas_implied_keys_and_bare_keys_are_understood() {
        let props = Props::parse("tap,id=n0,ifname=a,,b,vhost", Some("type")).unwrap();
        assert_eq!(
            (props.get("type"), props.get("ifname"), props.get("vhost")),
            (Some("tap"), Some("a,b"), Some("on"))
        );
        assert_eq!(props.to_string(), "type=tap,id=n0,ifname=a,,b,vhost=on");
    }

    #[test]
    fn json_becomes_the_same_dotted_keys() {
        let props = Props::parse(
            r#"{"driver":"raw","file":{"driver":"file","n":[1,2]},"read-only":true}"#,
            None,
        );
        let props = props.unwrap();
        assert_eq!(props.get("file.driver"), Some("file"));
        assert_eq!(props.get("file.n.1"), Some("2"));
        assert!(props.is_on("read-only"));
        assert!(Props::parse("{", None).is_err());
    }

    #[test]
    fn a_long_key_is_refused_before_it_is_repeated() {
        let text = format!(r#"{{"{}":{{"a":1}}}}"#, "k".repeat(KEY_BYTES_MAX + 1));
        assert!(matches!(Props::parse(&text, None), Err(CmdlineError::LongKey(_))));
    }
}
