//! What a QEMU lets its guest see of a processor.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::qmp::{Monitor, QmpError};

/// Most words and most names of features that are taken from a peer.
const FEATURES_MAX: usize = 1024;
/// Longest name of either, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// The features that a vCPU has: those of the model that the command line asks for, without what the host's processor, its kernel
/// or QEMU lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// The bits of each register of CPUID that holds features, by a name such as `CPUID.0DH.01H:EAX`.
    pub words: BTreeMap<String, u32>,
    /// What the model has and the vCPU lacks, by QEMU's names. Some of it is in no word: QEMU does not show those that stand in MSRs.
    pub lacking: BTreeSet<String>,
}

impl CpuFeatures {
    /// Whether it is what a QEMU could have said.
    pub(crate) fn is_sane(&self) -> bool {
        let mut names = self.words.keys().chain(&self.lacking);
        self.words.len().max(self.lacking.len()) <= FEATURES_MAX
            && names.all(|name| name.len() <= NAME_BYTES_MAX)
    }

    /// What a standby's differ in from these, the primary's, in words; `None` when they are the same.
    pub(super) fn difference(&self, standby: &Self) -> Option<String> {
        let only = |of: &Self, than: &Self| {
            let names: Vec<&str> = of.lacking.difference(&than.lacking).map(String::as_str).collect();
            (!names.is_empty()).then(|| names.join(" "))
        };
        let mut parts = Vec::new();
        parts.extend(only(standby, self).map(|names| format!("lacking here: {names}")));
        parts.extend(only(self, standby).map(|names| format!("lacking there: {names}")));
        parts.extend(self.differing_words(standby));
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    fn differing_words(&self, standby: &Self) -> Vec<String> {
        let names: BTreeSet<&String> = self.words.keys().chain(standby.words.keys()).collect();
        let bits = |of: &Self, name: &String| of.words.get(name).copied().unwrap_or(0);
        let both = names
            .into_iter()
            .map(|name| (name, bits(self, name), bits(standby, name)));
        both.filter(|(_, there, here)| there != here)
            .map(|(name, there, here)| format!("{name} {there:#x} there, {here:#x} here"))
            .collect()
    }
}

/// A machine's vCPUs; the first one stands for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vcpus {
    /// How many there are.
    pub count: u32,
    /// Their type, such as `qemu64-x86_64-cpu`.
    pub model: String,
    /// What they have.
    pub features: CpuFeatures,
}

/// Asks QEMU for its vCPUs.
///
/// # Errors
/// [`QmpError`] when it does not answer, or says something else.
pub fn vcpus(monitor: &mut dyn Monitor) -> Result<Vcpus, QmpError> {
    let command = "query-cpus-fast";
    let cpus = monitor.execute(command, Value::Null)?;
    let cpus = cpus.as_array().map_or(&[][..], Vec::as_slice);
    let text = |key: &str| cpus.first()?.get(key)?.as_str();
    let path = text("qom-path").ok_or_else(|| lacks(command, "a vCPU with a path"))?;
    Ok(Vcpus {
        count: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
        model: text("qom-type").unwrap_or_default().to_owned(),
        features: CpuFeatures {
            words: property(monitor, path, "feature-words", word)?,
            lacking: property(monitor, path, "unavailable-features", name)?,
        },
    })
}

/// What QEMU's answer has not.
fn lacks(command: &str, what: &'static str) -> QmpError {
    QmpError::Reply {
        command: command.to_owned(),
        what,
    }
}

/// A property of a vCPU that is a list.
fn property<T, C: FromIterator<T>>(
    monitor: &mut dyn Monitor,
    path: &str,
    property: &'static str,
    item: impl Fn(&Value) -> Option<T>,
) -> Result<C, QmpError> {
    let command = "qom-get";
    let list = monitor.execute(command, json!({"path": path, "property": property}))?;
    let items = list.as_array().and_then(|list| list.iter().map(item).collect());
    items.ok_or_else(|| lacks(command, property))
}

fn name(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn word(word: &Value) -> Option<(String, u32)> {
    let number = |key: &str| word.get(key).and_then(Value::as_u64);
    let mut name = format!("CPUID.{:02X}H", number("cpuid-input-eax")?);
    if let Some(index) = number("cpuid-input-ecx") {
        let _ = write!(name, ".{index:02X}H");
    }
    let _ = write!(name, ":{}", word.get("cpuid-register")?.as_str()?);
    Some((name, u32::try_from(number("features")?).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_named_as_the_processors_manual_does() {
        let of = |value| word(&value);
        let plain = json!({"cpuid-register": "EDX", "cpuid-input-eax": 1, "features": 126_614_525});
        assert_eq!(of(plain), Some(("CPUID.01H:EDX".to_owned(), 126_614_525)));
        let nested =
            json!({"cpuid-register": "EAX", "cpuid-input-eax": 13, "cpuid-input-ecx": 1, "features": 7});
        assert_eq!(of(nested), Some(("CPUID.0DH.01H:EAX".to_owned(), 7)));
        for bad in [
            json!(null),
            json!({"cpuid-register": "EAX", "cpuid-input-eax": 1}),
            json!({"cpuid-register": 3, "cpuid-input-eax": 1, "features": 1}),
            json!({"cpuid-register": "EAX", "cpuid-input-eax": 1, "features": 1_u64 << 32}),
        ] {
            assert_eq!(of(bad.clone()), None, "{bad}");
        }
    }

    fn features(words: &[(&str, u32)], lacking: &[&str]) -> CpuFeatures {
        let words = words.iter().map(|(name, bits)| ((*name).to_owned(), *bits));
        CpuFeatures {
            words: words.collect(),
            lacking: lacking.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn what_one_has_and_the_other_lacks_is_told_and_a_word_without_bits_is_no_difference() {
        let primary = features(&[("CPUID.01H:ECX", 5), ("CPUID.14H.00H:ECX", 0)], &["rtm", "pni"]);
        assert_eq!(primary.difference(&primary), None);
        let same = features(&[("CPUID.01H:ECX", 5)], &["pni", "rtm"]);
        assert_eq!(primary.difference(&same), None);
        let standby = features(
            &[("CPUID.01H:ECX", 4), ("CPUID.07H.00H:EBX", 16)],
            &["pni", "rdctl-no"],
        );
        assert_eq!(
            primary.difference(&standby).unwrap(),
            "lacking here: rdctl-no; lacking there: rtm; CPUID.01H:ECX 0x5 there, 0x4 here; \
             CPUID.07H.00H:EBX 0x0 there, 0x10 here"
        );
    }

    #[test]
    fn too_many_or_too_long_names_are_not_sane() {
        assert!(features(&[("CPUID.01H:ECX", 5)], &["pni"]).is_sane());
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        assert!(!features(&[], &[&long]).is_sane());
        assert!(!features(&[(&long, 0)], &[]).is_sane());
        let many = CpuFeatures {
            lacking: (0..=FEATURES_MAX).map(|number| number.to_string()).collect(),
            ..CpuFeatures::default()
        };
        assert!(!many.is_sane());
    }
}
