//! What a QEMU lets its guest see of a processor.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::qmp::{Monitor, QmpError};

/// The features that a vCPU has: the bits of each register of CPUID that holds features, by a name such as
/// `CPUID.0DH.01H:EAX`. They are what is left of the model that the command line asks for after everything that the host's
/// processor, its kernel or QEMU lacks has been taken away.
pub type CpuFeatures = BTreeMap<String, u32>;

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
    let lacks = |what| {
        move || QmpError::Reply {
            command: command.to_owned(),
            what,
        }
    };
    let cpus = monitor.execute(command, Value::Null)?;
    let cpus = cpus.as_array().map_or(&[][..], Vec::as_slice);
    let first = cpus.first().ok_or_else(lacks("a vCPU"))?;
    let text = |key: &str| first.get(key).and_then(Value::as_str);
    Ok(Vcpus {
        count: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
        model: text("qom-type").unwrap_or_default().to_owned(),
        features: features(monitor, text("qom-path").ok_or_else(lacks("a vCPU's path"))?)?,
    })
}

fn features(monitor: &mut dyn Monitor, path: &str) -> Result<CpuFeatures, QmpError> {
    let command = "qom-get";
    let words = monitor.execute(command, json!({"path": path, "property": "feature-words"}))?;
    let words = words
        .as_array()
        .and_then(|words| words.iter().map(word).collect());
    words.ok_or_else(|| QmpError::Reply {
        command: command.to_owned(),
        what: "the vCPU's features",
    })
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

/// What differs between the features of a primary's vCPU and of its standby's, in words; `None` when they are the same.
pub(super) fn difference(primary: &CpuFeatures, standby: &CpuFeatures) -> Option<String> {
    let names = primary
        .keys()
        .chain(standby.keys().filter(|name| !primary.contains_key(*name)));
    let bits = |of: &CpuFeatures, name: &str| of.get(name).copied().unwrap_or(0);
    let differing: Vec<String> = names
        .map(|name| (name, bits(primary, name), bits(standby, name)))
        .filter(|(_, primary, standby)| primary != standby)
        .map(|(name, primary, standby)| format!("{name} {primary:#x} there, {standby:#x} here"))
        .collect();
    (!differing.is_empty()).then(|| differing.join("; "))
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

    #[test]
    fn what_one_has_and_the_other_lacks_is_told_and_a_word_without_bits_is_no_difference() {
        let features = |words: &[(&str, u32)]| -> CpuFeatures {
            words
                .iter()
                .map(|(name, bits)| ((*name).to_owned(), *bits))
                .collect()
        };
        let primary = features(&[("CPUID.01H:ECX", 5), ("CPUID.14H.00H:ECX", 0)]);
        assert_eq!(difference(&primary, &primary), None);
        assert_eq!(difference(&primary, &features(&[("CPUID.01H:ECX", 5)])), None);
        let standby = features(&[("CPUID.01H:ECX", 4), ("CPUID.07H.00H:EBX", 16)]);
        assert_eq!(
            difference(&primary, &standby).unwrap(),
            "CPUID.01H:ECX 0x5 there, 0x4 here; CPUID.07H.00H:EBX 0x0 there, 0x10 here"
        );
    }
}
