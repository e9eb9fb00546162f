//! Plans: TOML files that say what to measure, how often, and within which bounds.
//!
//! ```toml
//! name = "parts"            # of the plan, in the report
//! about = "…"
//! seed = 1                  # of everything random; default 1
//! repetitions = 5           # of each measure, 1 to 100; default 5
//!
//! [[measure]]
//! measure = "memory.copy"   # which; `bench list` names all
//! ratio_max = 3.0           # bound on value / reference
//! value_max = 0.3           # bound on the value, in its unit
//! pages = [64, 1024]        # the rest is the measure's own
//! ```
//!
//! A plan is checked to its last line before anything is measured.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::measures::{self, Measure};

/// The plans that are in the binary, found by file name.
pub(crate) const BUILT_IN: &[(&str, &str)] = &[
    ("parts.toml", include_str!("../plans/parts.toml")),
    ("kvm.toml", include_str!("../plans/kvm.toml")),
    ("limits.toml", include_str!("../plans/limits.toml")),
    ("backup-host.toml", include_str!("../plans/backup-host.toml")),
    ("epoch.toml", include_str!("../plans/epoch.toml")),
    ("epoch-linux.toml", include_str!("../plans/epoch-linux.toml")),
    ("peers.toml", include_str!("../plans/peers.toml")),
    ("scale.toml", include_str!("../plans/scale.toml")),
];

const REPETITIONS_MAX: u32 = 100;
const PLAN_BYTES_MAX: u64 = 1 << 20;
/// Keys that every measure has.
const COMMON: [&str; 3] = ["measure", "ratio_max", "value_max"];

/// What is wrong with a plan.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    #[error("cannot read the plan {}; built in are {}", path.display(), built_in())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the plan is longer than {PLAN_BYTES_MAX} bytes")]
    TooLong,
    #[error("the plan is not as it should be")]
    Toml(#[source] Box<toml::de::Error>),
    #[error("repetitions = {0}: it must be 1 to {REPETITIONS_MAX}")]
    Repetitions(u32),
    #[error("a [[measure]] needs measure = \"NAME\", one of {}", measures::names())]
    NoName,
    #[error("there is no measure {name:?}, only {}", measures::names())]
    Unknown { name: String },
    #[error("measure {name}: {}", source.message())]
    Settings {
        name: String,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("measure {name}: {problem}")]
    Setting { name: String, problem: String },
    #[error("no measure of the plan is named {0}*")]
    NothingLeft(String),
}

/// What to measure.
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) about: String,
    pub(crate) seed: u64,
    pub(crate) repetitions: u32,
    pub(crate) measures: Vec<Planned>,
}

/// One `[[measure]]`.
pub(crate) struct Planned {
    pub(crate) name: &'static str,
    pub(crate) bounds: Bounds,
    pub(crate) measure: Box<dyn Measure>,
}

/// What must hold of each row of a measure.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Bounds {
    pub(crate) ratio_max: Option<f64>,
    pub(crate) value_max: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    #[serde(default)]
    about: String,
    #[serde(default = "one")]
    seed: u64,
    #[serde(default = "five")]
    repetitions: u32,
    measure: Vec<toml::Table>,
}

const fn one() -> u64 {
    1
}

const fn five() -> u32 {
    5
}

impl Plan {
    /// Reads the plan at a path; if there is no such file, the one that is built in under that file name.
    pub(crate) fn find(path: &str) -> Result<Self, PlanError> {
        Self::parse(&text_of(path)?)
    }

    /// The same, after `change` was made to each `[[measure]]`.
    pub(crate) fn find_changed(
        path: &str,
        mut change: impl FnMut(&str, &mut toml::Table),
    ) -> Result<Self, PlanError> {
        let mut file: File =
            toml::from_str(&text_of(path)?).map_err(|error| PlanError::Toml(Box::new(error)))?;
        for table in &mut file.measure {
            let name = table
                .get("measure")
                .and_then(toml::Value::as_str)
                .unwrap_or_default()
                .to_owned();
            change(&name, table);
        }
        Self::of(file)
    }

    /// Checks a plan's text.
    pub(crate) fn parse(text: &str) -> Result<Self, PlanError> {
        Self::of(toml::from_str(text).map_err(|error| PlanError::Toml(Box::new(error)))?)
    }

    fn of(file: File) -> Result<Self, PlanError> {
        if !(1..=REPETITIONS_MAX).contains(&file.repetitions) {
            return Err(PlanError::Repetitions(file.repetitions));
        }
        Ok(Self {
            name: file.name,
            about: file.about,
            seed: file.seed,
            repetitions: file.repetitions,
            measures: file.measure.into_iter().map(planned).collect::<Result<_, _>>()?,
        })
    }

    /// The plan with only the measures whose names begin with one of `prefixes`; with all when there are none.
    pub(crate) fn only(mut self, prefixes: &[String]) -> Result<Self, PlanError> {
        for prefix in prefixes {
            if !self
                .measures
                .iter()
                .any(|planned| planned.name.starts_with(prefix))
            {
                return Err(PlanError::NothingLeft(prefix.clone()));
            }
        }
        self.measures.retain(|planned| {
            prefixes.is_empty() || prefixes.iter().any(|prefix| planned.name.starts_with(prefix))
        });
        Ok(self)
    }
}

/// The text of a plan.
fn text_of(path: &str) -> Result<String, PlanError> {
    let path = Path::new(path);
    let unreadable = |source| PlanError::Read {
        path: path.to_owned(),
        source,
    };
    match std::fs::metadata(path) {
        Ok(file) if file.len() > PLAN_BYTES_MAX => Err(PlanError::TooLong),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => match built_in_as(path) {
            Some(text) => Ok(text.to_owned()),
            None => Err(unreadable(source)),
        },
        _ => std::fs::read_to_string(path).map_err(unreadable),
    }
}

fn planned(mut table: toml::Table) -> Result<Planned, PlanError> {
    let [name, ratio_max, value_max] = COMMON.map(|key| table.remove(key));
    let Some(toml::Value::String(name)) = name else {
        return Err(PlanError::NoName);
    };
    let kind = measures::ALL
        .iter()
        .find(|kind| kind.name == name)
        .ok_or(PlanError::Unknown { name })?;
    let name = kind.name;
    let bounds = Bounds {
        ratio_max: bound(name, COMMON[1], ratio_max)?,
        value_max: bound(name, COMMON[2], value_max)?,
    };
    let measure = (kind.parse)(table).map_err(|source| PlanError::Settings {
        name: name.to_owned(),
        source: Box::new(source),
    })?;
    if let Some(problem) = measure.problem() {
        return Err(PlanError::Setting {
            name: name.to_owned(),
            problem,
        });
    }
    Ok(Planned {
        name,
        bounds,
        measure,
    })
}

fn bound(name: &str, key: &str, value: Option<toml::Value>) -> Result<Option<f64>, PlanError> {
    let number = match &value {
        None => return Ok(None),
        Some(toml::Value::Float(number)) => Some(*number),
        Some(other) => other.clone().try_into().ok(),
    };
    match number {
        Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
        _ => Err(PlanError::Setting {
            name: name.to_owned(),
            problem: format!("{key} must be a number over 0"),
        }),
    }
}

fn built_in_as(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?;
    let found = BUILT_IN
        .iter()
        .find(|(built_in, _)| Path::new(built_in) == name || Path::new(built_in).file_stem() == Some(name));
    found.map(|(_, text)| *text)
}

fn built_in() -> String {
    BUILT_IN
        .iter()
        .map(|(name, _)| *name)
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> String {
        match Plan::parse(text) {
            Ok(_) => "a plan".to_owned(),
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                format!("{error} {}", source.unwrap_or_default())
            }
        }
    }

    #[test]
    fn every_plan_that_is_built_in_is_right() {
        for (name, text) in BUILT_IN {
            let plan = Plan::parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(!plan.measures.is_empty(), "{name}");
            assert!(!plan.about.is_empty(), "{name}");
        }
    }

    #[test]
    fn a_plan_has_its_bounds_and_defaults() {
        let text = "name = 'x'\n[[measure]]\nmeasure = 'memory.copy'\npages = [1]\nratio_max = 2\n\
                    [[measure]]\nmeasure = 'digest'\nvalue_max = 0.5";
        let plan = Plan::parse(text).unwrap();
        assert_eq!((plan.seed, plan.repetitions), (1, 5));
        assert_eq!(plan.measures[0].bounds.ratio_max, Some(2.0));
        assert_eq!(plan.measures[1].bounds.value_max, Some(0.5));
        assert_eq!(plan.only(&["memory".to_owned()]).unwrap().measures.len(), 1);
    }

    #[test]
    fn what_is_wrong_is_named_beside_what_there_is() {
        let measure = |rest: &str| words(&format!("name = 'x'\n[[measure]]\n{rest}"));
        assert!(words("nam = 'x'\nmeasure = []").contains("unknown field `nam`, expected one of `name`"));
        assert!(words("name = 'x'\nrepetitions = 0\nmeasure = []").contains("1 to 100"));
        assert!(measure("pages = [1]").contains("memory.copy"));
        let unknown = measure("measure = 'memory.cpy'");
        assert!(
            unknown.contains("memory.cpy") && unknown.contains("memory.copy"),
            "{unknown}"
        );
        let key = measure("measure = 'memory.copy'\npage = [1]");
        assert!(
            key.contains("unknown field `page`") && key.contains("`pages`"),
            "{key}"
        );
        assert!(measure("measure = 'digest'\nratio_max = 0").contains("ratio_max"));
        assert!(measure("measure = 'digest'\nvalue_max = 'x'").contains("value_max"));
        assert!(measure("measure = 'memory.copy'\npages = [0]").contains("pages"));
        assert!(measure("measure = 'kvm.speed'\ndirty = ['sometimes:1:25']").contains("sometimes"));
        assert!(measure("measure = 'kvm.pause'\ntracking = 'ring'").contains("ring"));
    }

    #[test]
    fn a_plan_that_is_nowhere_is_an_error_and_one_built_in_is_found_by_its_name() {
        assert!(Plan::find("/nowhere/parts.toml").is_ok());
        assert!(Plan::find("parts").is_ok());
        assert!(matches!(
            Plan::find("/nowhere/x.toml"),
            Err(PlanError::Read { .. })
        ));
        let plan = Plan::find("parts").unwrap();
        assert!(matches!(
            plan.only(&["nothing".to_owned()]),
            Err(PlanError::NothingLeft(_))
        ));
    }
}
