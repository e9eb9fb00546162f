//! `[[allow]]` in a daemon that runs: read at each request, changed at SIGHUP.

use std::sync::{Arc, PoisonError, RwLock};

use romulus_config::{Allow, is_allowed};
use romulus_types::{HostId, VmId};

/// Which host may speak for which VMs, as the settings said last. Clones share the list.
#[derive(Clone, Debug)]
pub struct AllowList(Arc<RwLock<Vec<Allow>>>);

impl AllowList {
    /// With the entries of the settings that the daemon began with.
    pub fn new(entries: Vec<Allow>) -> Self {
        Self(Arc::new(RwLock::new(entries)))
    }

    /// Whether `host` may speak for `vm`, see [`is_allowed`].
    pub fn allows(&self, host: &HostId, vm: &VmId) -> bool {
        is_allowed(&self.0.read().unwrap_or_else(PoisonError::into_inner), host, vm)
    }

    /// From now on other entries hold. What was let in before stays.
    pub fn replace(&self, entries: Vec<Allow>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = entries;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_list_holds_at_once_and_in_every_clone() {
        let entry = |host: &str| Allow {
            host: host.into(),
            vms: vec!["*".into()],
        };
        let (kvm1, web) = (HostId::new("kvm1").unwrap(), VmId::new("web").unwrap());
        let list = AllowList::new(vec![entry("kvm1")]);
        let shared = list.clone();
        assert!(shared.allows(&kvm1, &web));
        list.replace(vec![entry("kvm2")]);
        assert!(!shared.allows(&kvm1, &web));
    }
}
