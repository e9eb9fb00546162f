//! What starts a standby's process. It execs the hypervisor, so that the process stays the same: its number, its files, its
//! end.

use romulus_host_sys::random::random_u128;

use crate::standby::StandbyError;

/// The slice that holds all scopes of standbys.
const SLICE: &str = "romulus-standby.slice";

/// What starts a standby's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// A session of its own, in the unit of whoever starts it.
    Session,
    /// A session and a systemd scope of its own, named after the VM: `romulus-standby-VM-….scope`. Stopping the unit of whoever
    /// started it does not end it. It keeps the sandbox of that unit.
    Scope {
        /// The VM: letters, digits, '.', '_' and '-'.
        vm: String,
    },
}

impl Launcher {
    /// The words in front of the command. A scope's are different at every call: while the last one's is being removed the
    /// next one may start already.
    pub(crate) fn words(&self) -> Result<Vec<String>, StandbyError> {
        let mut words = Vec::new();
        if let Self::Scope { vm } = self {
            let number = random_u128().map_err(|error| {
                StandbyError::new("the kernel gave no random number for a unit's name", error)
            })?;
            words.extend(["systemd-run", "--scope", "--quiet", "--collect"].map(str::to_owned));
            words.push(format!("--slice={SLICE}"));
            words.push(format!("--unit=romulus-standby-{vm}-{:08x}.scope", number >> 96));
            words.push(format!("--description=Romulus standby of {vm}"));
            words.push("--".to_owned());
        }
        words.push("setsid".to_owned());
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_named_after_its_vm_and_no_two_are_the_same() {
        let launcher = Launcher::Scope { vm: "web.1".into() };
        let unit = || {
            let words = launcher.words().unwrap();
            assert_eq!(words.last().map(String::as_str), Some("setsid"));
            words
                .into_iter()
                .find(|word| word.starts_with("--unit="))
                .unwrap()
        };
        assert!(unit().starts_with("--unit=romulus-standby-web.1-"));
        assert_ne!(unit(), unit());
        assert_eq!(Launcher::Session.words().unwrap(), ["setsid"]);
    }
}
