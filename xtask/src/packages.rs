//! The Debian packages that the demo and the tests need, installed when they are missing.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::sh;

/// What is needed, and a file that shows it is there: a program in the path, or an absolute path.
const NEEDED: &[(&str, &str)] = &[
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("busybox-static", "busybox"),
    // Holds the server's binary under another name, and unlike redis-server starts no service here.
    ("redis-tools", "/usr/bin/redis-check-rdb"),
    ("iproute2", "ip"),
    ("util-linux", "setpriv"),
    ("ovmf", "/usr/share/OVMF/OVMF_CODE_4M.fd"),
    ("xz-utils", "xz"),
    // Its promtool looks at what the daemons show.
    ("prometheus", "promtool"),
    ("libc6-dev", "/usr/lib/x86_64-linux-gnu/libc.a"),
];

/// Installs what is missing of all that the demo and most tests need.
pub(crate) fn install() -> Result<()> {
    need(NEEDED)
}

/// Installs what is missing of these: packages, each with a file that shows it is there.
pub(crate) fn need(wanted: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = wanted
        .iter()
        .filter(|(_, proof)| !present(proof))
        .map(|(name, _)| *name)
        .collect();
    if missing.is_empty() {
        sh::step("packages: everything is installed");
        return Ok(());
    }
    let list = missing.join(" ");
    if !sh::has("apt-get") {
        bail!("these Debian packages are missing and there is no apt-get here: {list}; install them by hand");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("these packages are missing: {list}; run this as root, or `sudo apt-get install {list}`");
    }
    sh::step(&format!("packages: installing {list}"));
    if apt_install(&missing).is_err() {
        // A fresh machine has no package lists, and an old one lists that no longer hold.
        update()?;
        apt_install(&missing)?;
    }
    let still: Vec<&str> = wanted
        .iter()
        .filter(|(_, proof)| !present(proof))
        .map(|(_, proof)| *proof)
        .collect();
    if !still.is_empty() {
        bail!(
            "installed, but not found afterwards: {}; is this a Debian for amd64?",
            still.join(" ")
        );
    }
    Ok(())
}

/// Fetches the lists of packages.
pub(crate) fn update() -> Result<()> {
    sh::step("packages: apt-get update");
    sh::output(&mut apt(&["update"]))?;
    Ok(())
}

/// An apt-get command that asks nothing.
pub(crate) fn apt(words: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-y"])
        .args(words);
    command
}

fn apt_install(names: &[&str]) -> Result<()> {
    sh::output(apt(&["install", "--no-install-recommends"]).args(names))?;
    Ok(())
}

fn present(proof: &str) -> bool {
    if proof.starts_with('/') {
        Path::new(proof).exists()
    } else {
        sh::has(proof)
    }
}
