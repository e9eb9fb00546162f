//! The small Debian with systemd that the lab boots as containers (`romulus_e2e::systemd`): made once by debootstrap, then only read.
//!
//! It is of this machine's release, so that binaries built here run there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use romulus_e2e::Paths;

use crate::{kernel, packages, sh};

/// What is in it beside Debian's smallest system.
const INCLUDE: &str = "systemd,systemd-sysv,dbus";
/// Units that only cost time in a container that lives for a minute.
const MASKED: &[&str] = &[
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "systemd-logind.service",
    "systemd-networkd.service",
    "systemd-timesyncd.service",
];
/// What the tree was made from; a change makes a new one.
const STAMP: &str = "etc/romulus-tree";
const FORMAT: u32 = 1;

/// Makes the tree unless it is there.
pub(crate) fn build(paths: &Paths) -> Result<()> {
    let tree = paths.systemd_tree();
    let release = release()?;
    let stamp = format!("{FORMAT} {release} {INCLUDE} {}\n", MASKED.join(","));
    if fs::read_to_string(tree.join(STAMP)).is_ok_and(|found| found == stamp) {
        sh::step("systemd: the containers' tree is up to date");
        return Ok(());
    }
    packages::need(&[("debootstrap", "debootstrap")])?;
    sh::step(&format!(
        "systemd: making a Debian {release} for containers (about a minute, 60 MB)"
    ));
    let partial = tree.with_extension("partial");
    kernel::recreate(&partial)?;
    let include = format!("--include={INCLUDE}");
    sh::output(
        Command::new("debootstrap")
            .args(["--variant=minbase", &include, &release])
            .arg(&partial),
    )?;
    for unit in MASKED {
        let link = partial.join("etc/systemd/system").join(unit);
        symlink("/dev/null", &link).with_context(|| format!("cannot make {}", link.display()))?;
    }
    for (folder, empty) in [("var/cache/apt/archives", true), ("usr/share/doc", false)] {
        let folder = partial.join(folder);
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        if empty {
            fs::create_dir_all(folder.join("partial"))?;
        }
    }
    // Empty: each container gets a number of its own.
    fs::write(partial.join("etc/machine-id"), "")?;
    fs::write(partial.join(STAMP), stamp)?;
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    }
    fs::rename(&partial, &tree).with_context(|| format!("cannot put {} in place", tree.display()))
}

/// The name of this machine's Debian release.
fn release() -> Result<String> {
    let text = fs::read_to_string(Path::new("/etc/os-release")).context("cannot read /etc/os-release")?;
    let Some(name) = text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
    else {
        bail!("/etc/os-release names no release: containers with systemd need a Debian");
    };
    Ok(name.trim_matches('"').to_owned())
}
