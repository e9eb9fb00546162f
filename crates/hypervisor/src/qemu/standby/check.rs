//! Is this host able to be the machine's standby?

use std::path::PathBuf;

use crate::qemu::cpu::CpuFeatures;
use crate::qemu::files::{DIGEST_BYTES_MAX, digest_of, open_regular};
use crate::qemu::qmp::QemuVersion;
use crate::spec::{FileUse, MachineSpec, QemuMachine};
use crate::standby::StandbyError;

/// Each file that the standby reads must be the one that the primary has.
pub(super) fn files(machine: &QemuMachine, needed: &[PathBuf]) -> Result<(), StandbyError> {
    for path in needed {
        let described = machine.files.iter().find(|file| file.path == *path);
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
    let (file, bytes) = open_regular(&described.path).map_err(missing)?;
    if bytes != described.bytes {
        return Err(differs());
    }
    let Some(digest) = described.digest else {
        return Ok(());
    };
    // No primary of this release asks for it; how much is read here is not for a peer to say.
    if bytes > DIGEST_BYTES_MAX {
        return Err(StandbyError::plain(format!(
            "the file {path} has {bytes} bytes, too many for a digest (at most {DIGEST_BYTES_MAX}): run the same release on both hosts"
        )));
    }
    if digest_of(file, bytes).map_err(missing)? == digest {
        Ok(())
    } else {
        Err(differs())
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

/// A processor that has other features would change under the guest.
pub(super) fn cpu_features(
    spec: &MachineSpec,
    host_cpu: &str,
    here: &CpuFeatures,
) -> Result<(), StandbyError> {
    let there = spec.qemu().and_then(|own| own.cpu_features.as_ref());
    let Some(difference) = there.and_then(|there| there.difference(here)) else {
        return Ok(());
    };
    Err(StandbyError::plain(format!(
        "the guest's CPU model has other features on this host ({host_cpu}) than on the primary's ({}): choose a model of which \
         both processors have everything, and run the same kernel and QEMU on both ({difference})",
        spec.host_cpu
    )))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use romulus_types::Digest;

    use super::*;
    use crate::spec::tests::{own, spec};

    /// What `files` says of one file that the primary described so.
    fn verdict(path: &Path, bytes: u64, digest: Option<Digest>) -> String {
        let mut spec = spec(&["qemu-system-x86_64"], &[("pc.ram", 1 << 20)]);
        own(&mut spec).files = vec![FileUse {
            path: path.to_owned(),
            bytes,
            digest,
        }];
        match files(own(&mut spec), &[path.to_owned()]) {
            Ok(()) => "same".to_owned(),
            Err(error) => {
                let cause = std::error::Error::source(&error);
                format!(
                    "{error} ({})",
                    cause.map_or_else(String::new, ToString::to_string)
                )
            }
        }
    }

    #[test]
    fn a_file_of_the_same_content_is_accepted_and_another_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmlinuz");
        std::fs::write(&path, "kernel").unwrap();
        let digest = digest_of(File::open(&path).unwrap(), 6).unwrap();
        assert_eq!(verdict(&path, 6, Some(digest)), "same");
        assert_eq!(verdict(&path, 6, None), "same");
        assert!(verdict(&path, 7, None).contains("differs"));
        assert!(verdict(&path, 6, Some(Digest(digest.0 ^ 1))).contains("differs"));
    }

    #[test]
    fn what_a_peer_names_is_read_only_when_it_is_a_regular_file_within_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
        for special in [fifo.as_path(), folder.path(), Path::new("/dev/zero")] {
            let said = verdict(special, 0, Some(Digest(0)));
            assert!(said.contains(&special.display().to_string()), "{said}");
            assert!(said.contains("not a regular file"), "{said}");
        }
        let huge = folder.path().join("huge");
        File::create(&huge)
            .unwrap()
            .set_len(DIGEST_BYTES_MAX + 1)
            .unwrap();
        assert_eq!(verdict(&huge, DIGEST_BYTES_MAX + 1, None), "same");
        let said = verdict(&huge, DIGEST_BYTES_MAX + 1, Some(Digest(0)));
        assert!(said.contains("too many"), "{said}");
    }
}
