//! Whether this machine's KVM can run the guest, found out by trying.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::guest::{Guest, QemuConfig};
use crate::{Lab, Paths};

/// How long a boot under KVM may take before it is taken as impossible. A working one takes two seconds.
const BOOT_AT_MOST: Duration = Duration::from_secs(8);

/// What to run the guest with, and why.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Accel {
    /// `kvm` or `tcg`.
    pub name: String,
    /// Why this one.
    pub why: String,
}

/// Tries KVM in a lab of its own, named by `prefix`.
///
/// # Errors
/// When no lab can be built at all.
pub fn choose(paths: &Paths, prefix: &str) -> Result<Accel> {
    if !Path::new("/dev/kvm").exists() {
        return Ok(tcg("there is no /dev/kvm on this machine"));
    }
    let lab = Lab::new(paths.clone(), prefix)?;
    let config = QemuConfig {
        accel: "kvm".to_owned(),
        workload: "idle".to_owned(),
        ..QemuConfig::default()
    };
    let booted = Guest::start(&lab, &config.into())?.wait_ready(BOOT_AT_MOST);
    Ok(match booted {
        Ok(()) => Accel {
            name: "kvm".to_owned(),
            why: "Linux boots under KVM here".to_owned(),
        },
        Err(error) => tcg(&format!(
            "KVM does not boot Linux here{}: {}",
            backend(),
            first_part(&error.to_string())
        )),
    })
}

/// QEMU's own emulation, for this reason.
#[must_use]
pub fn tcg(why: &str) -> Accel {
    Accel {
        name: "tcg".to_owned(),
        why: why.to_owned(),
    }
}

fn backend() -> &'static str {
    if Path::new("/sys/module/kvm_pvm").exists() {
        " (its backend is PVM, which emulates ring 0: the processor offers neither VMX nor SVM)"
    } else if Path::new("/sys/module/kvm_intel").exists() || Path::new("/sys/module/kvm_amd").exists() {
        " although the processor offers VMX or SVM"
    } else {
        ""
    }
}

fn first_part(text: &str) -> &str {
    text.split(['\n', ';']).next().unwrap_or(text)
}
