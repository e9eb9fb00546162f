//! This machine's QEMU in a container: both are of the same release.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::Container;

/// What a QEMU of Debian's reads beside its libraries; not all of them are on every machine.
const FOLDERS: [&str; 4] = [
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/lib/ipxe",
    "/usr/lib/x86_64-linux-gnu/qemu",
];
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// What a container has to share in which QEMU is to run.
pub(super) fn folders<'a>() -> impl Iterator<Item = &'a Path> {
    FOLDERS
        .into_iter()
        .map(Path::new)
        .filter(|folder| folder.exists())
}

impl Container {
    /// Copies QEMU and the libraries that the container lacks.
    pub(super) fn copy_qemu(&self) -> Result<()> {
        self.copy_in(Path::new(QEMU), QEMU)?;
        let listed = Command::new("ldd").arg(QEMU).output().context("cannot run ldd")?;
        ensure!(listed.status.success(), "ldd does not know {QEMU}");
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        // `libx.so.1 => /lib/x86_64-linux-gnu/libx.so.1 (0x…)`
        let libraries = listed
            .lines()
            .filter_map(|line| line.split_once("=> ")?.1.split_whitespace().next());
        for library in libraries.filter(|library| library.starts_with('/')) {
            if !self.path(library).exists() {
                self.copy_in(Path::new(library), library)?;
            }
        }
        Ok(())
    }
}
