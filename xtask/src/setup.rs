//! `cargo xtask setup`: everything the demo and the end-to-end tests need, and nothing twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use romulus_e2e::{Kernel, Paths};

use crate::{initramfs, kernel, packages, programs, sh, systemd_tree};

/// Runs the task.
pub(crate) fn run() -> Result<ExitCode> {
    let paths = prepare()?;
    programs::build(&paths)?;
    systemd_tree::build(&paths)?;
    sh::step("setup: done");
    Ok(ExitCode::SUCCESS)
}

/// Installs packages and builds the guest, as far as either is missing or out of date.
pub(crate) fn prepare() -> Result<Paths> {
    packages::install()?;
    let paths = Paths::of_checkout(&sh::root());
    fs::create_dir_all(&paths.assets).with_context(|| format!("cannot create {}", paths.assets.display()))?;
    let guest_tool = build_guest_tool(&paths)?;
    for (flavour, which) in [
        (kernel::CLOUD, Kernel::Cloud),
        (kernel::ORDINARY, Kernel::Ordinary),
    ] {
        build_guest(&paths, flavour, which, &guest_tool)?;
    }
    Ok(paths)
}

/// One kernel and the initramfs with its modules.
fn build_guest(paths: &Paths, flavour: kernel::Flavour, which: Kernel, guest_tool: &Path) -> Result<()> {
    let unpacked = kernel::fetch(&paths.assets, flavour)?;
    let (image, initramfs) = (paths.kernel(which), paths.initramfs(which));
    let sources = [
        guest_tool.to_owned(),
        sh::root().join("tests/guest/init"),
        sh::root().join("xtask/src/initramfs.rs"),
    ];
    let name = initramfs.file_name().unwrap_or_default().to_string_lossy();
    if is_newer_than_all(&initramfs, &sources) && image.exists() {
        sh::step(&format!("guest: {name} is up to date"));
        return Ok(());
    }
    sh::step(&format!("guest: building {name}"));
    fs::copy(&unpacked.image, &image).context("cannot copy the guest's kernel")?;
    initramfs::build(&unpacked, guest_tool, &paths.assets.join("root"), &initramfs)
}

/// Fails early, with what to do, where the lab cannot be built.
pub(crate) fn need_lab_rights() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the lab makes network namespaces and attaches to a process of another user: run this as root");
    }
    if !Path::new("/dev/net/tun").exists() {
        bail!("/dev/net/tun is missing: `modprobe tun`, or start this container with --device /dev/net/tun");
    }
    Ok(())
}

/// A static binary for the guest, which has no libraries of its own.
fn build_guest_tool(paths: &Paths) -> Result<PathBuf> {
    sh::run(&mut sh::cargo(&[
        "rustc",
        "--quiet",
        "--release",
        "--package",
        "romulus-guest-tool",
        "--bin",
        "guest-tool",
        "--",
        "-C",
        "target-feature=+crt-static",
        "-C",
        "strip=symbols",
    ]))?;
    Ok(paths.release.join("guest-tool"))
}

/// Whether a file is there and none of the others was changed after it was made.
pub(crate) fn is_newer_than_all(file: &Path, sources: &[PathBuf]) -> bool {
    let changed = |path: &Path| -> Option<SystemTime> { fs::metadata(path).ok()?.modified().ok() };
    let Some(built) = changed(file) else { return false };
    sources
        .iter()
        .all(|source| changed(source).is_some_and(|when| when <= built))
}
