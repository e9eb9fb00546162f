//! Programs of Debian for guests that are measured at work: `redis-benchmark`, `stress-ng`, `sqlite3` and `tcc`, with their libraries.
//!
//! They come as a second archive behind the guest's root file system, which the kernel unpacks over the first: no other guest becomes
//! larger by them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use romulus_e2e::{Kernel, Paths};

use crate::{initramfs, kernel, packages, setup, sh};

/// Packages, each with its program.
const PROGRAMS: [(&str, &str); 4] = [
    ("redis-tools", "/usr/bin/redis-benchmark"),
    ("stress-ng", "/usr/bin/stress-ng"),
    ("sqlite3", "/usr/bin/sqlite3"),
    ("tcc", "/usr/bin/tcc"),
];

/// Makes the archive unless it is there and newer than the guest's root file system.
pub(crate) fn build(paths: &Paths) -> Result<()> {
    let base = paths.initramfs(Kernel::Cloud);
    let archive = paths.initramfs_with_programs();
    let name = archive.file_name().unwrap_or_default().to_string_lossy();
    let sources = [base.clone(), sh::root().join("xtask/src/programs.rs")];
    if setup::is_newer_than_all(&archive, &sources) {
        sh::step(&format!("guest: {name} is up to date"));
        return Ok(());
    }
    packages::need(&PROGRAMS)?;
    sh::step(&format!("guest: building {name}"));
    let root = paths.assets.join("programs");
    kernel::recreate(&root)?;
    for (_, program) in PROGRAMS {
        let program = Path::new(program);
        let place = PathBuf::from("bin").join(program.file_name().unwrap_or_default());
        initramfs::put_program(program, &root, &place)?;
    }
    let programs = paths.assets.join("programs.cpio.gz");
    initramfs::pack(&root, &programs)?;
    join(&[&base, &programs], &archive)?;
    fs::remove_file(&programs).with_context(|| format!("cannot remove {}", programs.display()))
}

/// One archive after the other, as the kernel takes them.
fn join(parts: &[&Path], whole: &Path) -> Result<()> {
    let partial = whole.with_extension("partial");
    let mut out = File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    for part in parts {
        let mut file = File::open(part).with_context(|| format!("cannot open {}", part.display()))?;
        io::copy(&mut file, &mut out).with_context(|| format!("cannot copy {}", part.display()))?;
    }
    fs::rename(&partial, whole).with_context(|| format!("cannot put {} in place", whole.display()))
}
