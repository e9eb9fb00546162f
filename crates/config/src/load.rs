//! Reading a settings file and its drop-in folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use romulus_types::VmId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::Table;

use crate::ConfigError;
use crate::check::Invalid;
use crate::common::Log;

/// Most bytes in one settings file.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most files in a drop-in folder.
pub const DROP_INS_MAX: usize = 64;

/// What every daemon's settings have in common.
pub trait Settings: Default + DeserializeOwned + Serialize {
    /// The daemon's name, which names its file: `/etc/romulus/NAME.toml`.
    const NAME: &'static str;
    /// A commented file that holds every default.
    const EXAMPLE: &'static str;

    /// How the daemon logs.
    fn log(&self) -> &Log;

    /// Checks ranges and what values have to do with each other.
    ///
    /// # Errors
    /// [`Invalid`] names the first key that is not allowed.
    fn check(&self) -> Result<(), Invalid>;
}

/// The file that [`load`] reads unless the operator names another.
pub fn default_path<S: Settings>() -> PathBuf {
    format!("/etc/romulus/{}.toml", S::NAME).into()
}

/// Reads settings from `path`, or from [`default_path`] when none is named, and from its drop-in folder.
///
/// The folder is named like the file with `.d` for `.toml`; its `*.toml` files are read in the order of
/// their names, and a later value wins. The default file may be missing, a named one may not.
///
/// # Errors
/// [`ConfigError`] names the file and the key.
pub fn load<S: Settings>(path: Option<&Path>) -> Result<S, ConfigError> {
    load_over(path, None)
}

/// As [`load`], with a second file and its drop-in folder on top, where they exist: what one VM's daemon has for itself.
///
/// # Errors
/// As [`load`].
pub fn load_over<S: Settings>(path: Option<&Path>, over: Option<&Path>) -> Result<S, ConfigError> {
    let default = default_path::<S>();
    let main = path.unwrap_or(&default);
    let mut merged = Merged::default();
    if path.is_some() || main.exists() {
        merged.add::<S>(main)?;
    }
    let over_file = over.filter(|over| over.exists()).map(Path::to_owned);
    let mut later = drop_ins(&main.with_extension("d"))?;
    later.extend(over_file);
    if let Some(over) = over {
        later.extend(drop_ins(&over.with_extension("d"))?);
    }
    for file in later {
        merged.add::<S>(&file)?;
    }
    merged.finish()
}

/// The file that holds what is one VM's own: `/etc/romulus/vms/VM.toml`.
pub fn vm_path(vm: &VmId) -> PathBuf {
    format!("/etc/romulus/vms/{vm}.toml").into()
}

/// The keys whose values differ, in order: what an operator has changed since the daemon read its settings.
pub fn changed_keys<S: Settings>(before: &S, after: &S) -> Vec<String> {
    let flat = |settings: &S| {
        let mut all = BTreeMap::new();
        flatten("", table_of(settings), &mut all);
        all
    };
    let (before, after) = (flat(before), flat(after));
    let mut keys: Vec<String> = before
        .iter()
        .filter(|(key, value)| after.get(*key) != Some(value))
        .map(|(key, _)| key.clone())
        .collect();
    keys.extend(after.keys().filter(|key| !before.contains_key(*key)).cloned());
    keys.sort();
    keys
}

fn table_of<S: Settings>(settings: &S) -> Table {
    Table::try_from(settings).expect("settings are tables of values that TOML has")
}

fn flatten(prefix: &str, table: Table, into: &mut BTreeMap<String, toml::Value>) {
    for (key, value) in table {
        match value {
            toml::Value::Table(inner) => flatten(&format!("{prefix}{key}."), inner, into),
            value => drop(into.insert(format!("{prefix}{key}"), value)),
        }
    }
}

/// The `*.toml` files of a drop-in folder, in order. No folder is no file.
fn drop_ins(folder: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let unreadable = |source| ConfigError::Read {
        file: folder.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            files.push(path);
        }
        if files.len() > DROP_INS_MAX {
            return Err(ConfigError::TooManyFiles {
                folder: folder.to_owned(),
            });
        }
    }
    files.sort();
    Ok(files)
}

/// Tables merged so far, and the file that each key's value came from.
#[derive(Default)]
struct Merged {
    table: Table,
    origin: BTreeMap<String, PathBuf>,
}

impl Merged {
    fn add<S: Settings>(&mut self, file: &Path) -> Result<(), ConfigError> {
        let text = read(file)?;
        let syntax = |source| ConfigError::Syntax {
            file: file.to_owned(),
            source: Box::new(source),
        };
        // Each file is read as settings by itself: only then does the error carry its own line and column.
        toml::from_str::<S>(&text).map_err(syntax)?;
        let table: Table = toml::from_str(&text).map_err(syntax)?;
        merge(&mut self.table, table, "", file, &mut self.origin);
        Ok(())
    }

    fn finish<S: Settings>(self) -> Result<S, ConfigError> {
        // Over this daemon's own defaults: a section that it shares with others has theirs for what is not said otherwise.
        let mut table = table_of(&S::default());
        merge(&mut table, self.table, "", Path::new(""), &mut BTreeMap::new());
        let settings: S = table.try_into().map_err(|source| ConfigError::Merge {
            source: Box::new(source),
        })?;
        settings.check().map_err(|source| {
            let place = match self.origin.get(&source.key) {
                Some(file) => match line_of(file, &source.key) {
                    Some(line) => format!("{}, line {line}", file.display()),
                    None => file.display().to_string(),
                },
                // The key itself is a default then, which another key's value has ruled out.
                None => "the default settings".to_owned(),
            };
            ConfigError::Invalid { place, source }
        })?;
        Ok(settings)
    }
}

fn merge(into: &mut Table, from: Table, prefix: &str, file: &Path, origin: &mut BTreeMap<String, PathBuf>) {
    for (key, value) in from {
        let full = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new, &full, file, origin),
            (_, toml::Value::Table(new)) => {
                let mut fresh = Table::new();
                merge(&mut fresh, new, &full, file, origin);
                into.insert(key, toml::Value::Table(fresh));
            }
            (_, value) => {
                origin.insert(full, file.to_owned());
                into.insert(key, value);
            }
        }
    }
}

/// The line on which a file sets a key. The file was parsed before; what is not found stays without a line.
fn line_of(file: &Path, key: &str) -> Option<usize> {
    let text = read(file).ok()?;
    let mut section = String::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        let full = if line.starts_with('[') {
            section = line.trim_matches(['[', ']', ' ']).to_owned();
            section.clone()
        } else {
            let (name, _) = line.split_once('=').unwrap_or_default();
            match section.as_str() {
                "" => name.trim().to_owned(),
                section => format!("{section}.{}", name.trim()),
            }
        };
        if full == key {
            return Some(number);
        }
    }
    None
}

fn read(file: &Path) -> Result<String, ConfigError> {
    let unreadable = |source| ConfigError::Read {
        file: file.to_owned(),
        source,
    };
    let mut text = String::new();
    let opened = File::open(file).map_err(unreadable)?;
    opened
        .take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(ConfigError::TooLarge {
            file: file.to_owned(),
        });
    }
    Ok(text)
}
