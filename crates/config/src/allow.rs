//! `[[allow]]`: which host may speak for which VMs, and `admin_group`. A certificate says who a host is; this says what it may do.

use romulus_types::{HostId, VmId};
use serde::{Deserialize, Serialize};

use crate::check::Invalid;

/// Most entries of one daemon.
pub const ALLOW_MAX: usize = 1024;
/// Most patterns of one entry.
const PATTERNS_MAX: usize = 1024;
/// Longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 128;

/// One host, or several, and their VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allow {
    /// The host's name in its certificate; `*` stands for any characters, `?` for one.
    pub host: String,
    /// Names of VMs, with `*` and `?` as above.
    pub vms: Vec<String>,
}

/// Whether `host` may speak for `vm`. An empty list allows everything to every host of the authority.
pub fn is_allowed(list: &[Allow], host: &HostId, vm: &VmId) -> bool {
    let fits = |entry: &Allow| {
        matches(&entry.host, host.as_str()) && entry.vms.iter().any(|vms| matches(vms, vm.as_str()))
    };
    list.is_empty() || list.iter().any(fits)
}

pub(crate) fn check(list: &[Allow]) -> Result<(), Invalid> {
    let refuse = |problem: String| Err(Invalid::new("allow", problem));
    if list.len() > ALLOW_MAX {
        return refuse(format!(
            "{} entries are over the limit of {ALLOW_MAX}: use patterns",
            list.len()
        ));
    }
    for entry in list {
        if entry.vms.is_empty() || entry.vms.len() > PATTERNS_MAX {
            return refuse(format!(
                "host {:?} needs 1 to {PATTERNS_MAX} names or patterns in vms; \"*\" is every VM",
                entry.host
            ));
        }
        for pattern in std::iter::once(&entry.host).chain(&entry.vms) {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'*' | b'?');
            if pattern.is_empty() || pattern.len() > PATTERN_BYTES_MAX || !pattern.bytes().all(plain) {
                return refuse(format!(
                    "{pattern:?} is no name or pattern: write letters, digits, '.', '_', '-', '*' and '?'"
                ));
            }
        }
    }
    Ok(())
}

/// A group's name or number, as `/etc/group` may have it.
pub(crate) fn check_group(group: Option<&str>) -> Result<(), Invalid> {
    let Some(name) = group else { return Ok(()) };
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        return Err(Invalid::new(
            "admin_group",
            format!("{name:?} is not the name or number of a group"),
        ));
    }
    Ok(())
}

/// Compares in time that is at most the product of the lengths: it never goes back by more than one `*`.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&b) if b == b'?' || b == name[n] => (p, n) = (p + 1, n + 1),
            _ => {
                let Some((at, taken)) = star else { return false };
                star = Some((at, taken + 1));
                (p, n) = (at + 1, taken + 1);
            }
        }
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(host: &str, vms: &[&str]) -> Allow {
        Allow {
            host: host.to_owned(),
            vms: vms.iter().map(|vm| (*vm).to_owned()).collect(),
        }
    }

    fn allowed(list: &[Allow], host: &str, vm: &str) -> bool {
        is_allowed(list, &HostId::new(host).unwrap(), &VmId::new(vm).unwrap())
    }

    #[test]
    fn a_host_may_speak_for_the_vms_that_an_entry_gives_it_and_for_no_other() {
        let list = [
            entry("kvm1", &["web-*", "db"]),
            entry("kvm?", &["shared"]),
            entry("lab-*", &["*"]),
        ];
        for (host, vm, expected) in [
            ("kvm1", "web-", true),
            ("kvm1", "web-12", true),
            ("kvm1", "web", false),
            ("kvm1", "my-web-1", false),
            ("kvm1", "db", true),
            ("kvm1", "db2", false),
            ("kvm2", "web-1", false),
            ("kvm2", "shared", true),
            ("kvm12", "shared", false),
            ("lab-9", "anything", true),
            ("stranger", "web-1", false),
        ] {
            assert_eq!(allowed(&list, host, vm), expected, "{host} {vm}");
        }
    }

    #[test]
    fn without_entries_every_host_of_the_authority_may_speak() {
        assert!(allowed(&[], "any", "vm"));
    }

    #[test]
    fn stars_match_anything_also_several_of_them_and_none() {
        assert!(matches("*a*b*", "xxaxxbxx") && matches("**", "x") && matches("a*", "a"));
        assert!(!matches("*a*b", "xxbxxa") && !matches("a", "") && !matches("?", ""));
        assert!(!matches(&"*a".repeat(60), &"a".repeat(59)));
    }

    #[test]
    fn entries_that_can_match_nothing_are_refused() {
        for bad in [entry("", &["a"]), entry("a", &[]), entry("a", &["b c"])] {
            assert_eq!(
                check(std::slice::from_ref(&bad)).unwrap_err().key,
                "allow",
                "{bad:?}"
            );
        }
        let many = vec![entry("a", &["*"]); ALLOW_MAX + 1];
        assert!(check(&many).is_err() && check(&many[1..]).is_ok());
    }
}
