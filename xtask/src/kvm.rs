//! What the tasks need to run with our own test VMM: no package, only `/dev/kvm`.

use std::fs::File;
use std::io::ErrorKind;

use anyhow::{Context as _, Result, bail};
use romulus_e2e::Paths;
use romulus_e2e::accel::Accel;
use romulus_e2e::guest::{GuestConfig, TestbedConfig};

use crate::sh;

const KVM: &str = "/dev/kvm";

/// Fails early, with what to do, where KVM is not to be had.
pub(crate) fn need() -> Result<()> {
    let opened = File::options().read(true).write(true).open(KVM);
    match opened {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "there is no {KVM}: `modprobe kvm_intel` or `modprobe kvm_amd`, after switching virtualisation on in the firmware \
             (or nested virtualisation, for a virtual machine); start a container with --device {KVM}. Without KVM, \
             `cargo xtask demo` does the same with a stock QEMU"
        ),
        Err(error) => Err(error).with_context(|| {
            format!("cannot open {KVM}; without KVM, `cargo xtask demo` does the same with a stock QEMU")
        }),
    }
}

/// Where things are; nothing has to be installed or built before cargo does its part.
pub(crate) fn paths() -> Paths {
    Paths::of_checkout(&sh::root())
}

/// A guest that writes so many pages every 25 ms beside its service.
pub(crate) fn guest(dirty_pages: u32) -> GuestConfig {
    TestbedConfig::default().dirty_pages(dirty_pages).into()
}

/// What runs that guest.
pub(crate) fn accel() -> Accel {
    Accel {
        name: "kvm".to_owned(),
        why: "the test VMM of this checkout, which has its guest built in".to_owned(),
    }
}
