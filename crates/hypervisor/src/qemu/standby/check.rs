//! Is this host able to be the machine's standby?

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use romulus_types::Digest;
use xxhash_rust::xxh3::Xxh3;

use crate::qemu::qmp::QemuVersion;
use crate::spec::{FileUse, MachineSpec};
use crate::standby::StandbyError;

/// Each file that the standby reads must be the one that the primary has.
pub(super) fn files(spec: &MachineSpec, needed: &[PathBuf]) -> Result<(), StandbyError> {
    for path in needed {
        if path.is_dir() {
            continue;
        }
        let described = spec.files.iter().find(|file| file.path == *path);
        let described = described.ok_or_else(|| {
            StandbyError::plain(format!(
                "the primary needs {} and could not read it itself",
                path.display()
            ))
        })?;
        compare(described)?;
    }
    Ok(())
}

fn compare(described: &FileUse) -> Result<(), StandbyError> {
    let path = described.path.display();
    let missing = |error| {
        StandbyError::new(
            format!("the machine needs the file {path}: copy it from the primary to this host"),
            error,
        )
    };
    let differs = || {
        StandbyError::plain(format!(
            "the file {path} differs from the primary's: copy it from there to this host"
        ))
    };
    let file = File::open(&described.path).map_err(missing)?;
    let metadata = file.metadata().map_err(missing)?;
    if metadata.is_file() && metadata.len() != described.bytes {
        return Err(differs());
    }
    match described.digest {
        Some(digest) if digest_of(file, described.bytes).map_err(missing)? != digest => Err(differs()),
        _ => Ok(()),
    }
}

/// XXH3-128 of a file, of which no more than `bytes` are read.
fn digest_of(file: File, bytes: u64) -> std::io::Result<Digest> {
    let mut limited = file.take(bytes);
    let mut hash = Xxh3::new();
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        match limited.read(&mut buffer)? {
            0 => return Ok(Digest(hash.digest128())),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// Device state is known to load between equal versions only.
pub(super) fn version(spec: &MachineSpec, here: &QemuVersion) -> Result<(), StandbyError> {
    let series = format!("{}.{}.", here.major, here.minor);
    if spec.version.starts_with(&series) {
        return Ok(());
    }
    Err(StandbyError::plain(format!(
        "the primary runs QEMU {} and this host has {here}: install the same series on both",
        spec.version
    )))
}

/// A CPU model that this processor cannot be would change under the guest.
pub(super) fn cpu_features(spec: &MachineSpec, host_cpu: &str, stderr: &str) -> Result<(), StandbyError> {
    let lacks = stderr.contains("doesn't support requested feature");
    if spec.accelerator != "kvm" || spec.host_cpu == host_cpu || !lacks {
        return Ok(());
    }
    Err(StandbyError::plain(format!(
        "this host's processor ({host_cpu}) lacks features of the guest's CPU model: choose one that both hosts have ({stderr})"
    )))
}

/// The model name of this host's processor.
pub(super) fn host_cpu() -> String {
    let text = std::fs::read_to_string(Path::new("/proc/cpuinfo")).unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(String::new, |(_, name)| name.trim().to_owned())
}
