//! What a backup has to know of this machine, from QEMU's answers and its process.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use serde_json::Value;

use super::error::AttachError;
use super::refusal::nics;
use crate::host::processor;
use crate::qemu::bootstrap::Bootstrap;
use crate::qemu::cmdline::files_needed;
use crate::qemu::cpu::vcpus;
use crate::qemu::files::{DIGEST_BYTES_MAX, digest_of, open_regular};
use crate::qemu::qmp::Monitor;
use crate::spec::{Disk, FileUse, Hypervisor, MachineSpec, Nic, QemuMachine, SPEC_FORMAT};

/// Describes the machine of process `pid`.
///
/// # Errors
/// [`AttachError::Standby`] and [`AttachError::File`] when no standby could be derived from it.
pub(super) fn describe(
    monitor: &mut dyn Monitor,
    pid: u32,
    learnt: &Bootstrap,
    disposable: &BTreeSet<String>,
) -> Result<MachineSpec, AttachError> {
    let vcpus = vcpus(monitor)?;
    let kvm = monitor.execute("query-kvm", Value::Null)?;
    let accelerator = if kvm.get("enabled").and_then(Value::as_bool) == Some(true) {
        "kvm"
    } else {
        "tcg"
    };
    let network = monitor.hmp("info network")?;
    let blocks = monitor.execute("query-block", Value::Null)?;
    let (argv, cwd) = process(pid)?;
    let mut spec = MachineSpec {
        format: SPEC_FORMAT,
        version: monitor.version().to_string(),
        host_cpu: processor(),
        vcpus: vcpus.count,
        layout: learnt.layout.clone(),
        main: learnt.main,
        nics: nics(&network)
            .map(|(name, mac)| Nic {
                name: name.to_owned(),
                mac,
            })
            .collect(),
        disks: disks(&blocks),
        disposable: disposable.iter().cloned().collect(),
        hypervisor: Hypervisor::Qemu(QemuMachine {
            accelerator: accelerator.to_owned(),
            cpu_model: vcpus.model,
            cpu_features: Some(vcpus.features),
            argv,
            cwd,
            files: Vec::new(),
            template: learnt.template.clone(),
        }),
    };
    let files = files(pid, &spec)?;
    spec.qemu_mut().expect("made above").files = files;
    Ok(spec)
}

fn process(pid: u32) -> Result<(Vec<String>, PathBuf), AttachError> {
    let failed = |path: &str| {
        let path = PathBuf::from(path);
        move |source: io::Error| AttachError::Folder { path, source }
    };
    let path = format!("/proc/{pid}/cmdline");
    let bytes = std::fs::read(&path).map_err(failed(&path))?;
    let text = String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(&bytes)).into_owned();
    let argv = text.split('\0').map(str::to_owned).collect();
    let path = format!("/proc/{pid}/cwd");
    let cwd = std::fs::read_link(&path).map_err(failed(&path))?;
    if cwd.to_str().is_none() {
        let source = io::Error::new(io::ErrorKind::InvalidData, "the path is not UTF-8");
        return Err(failed(&path)(source));
    }
    Ok((argv, cwd))
}

/// The files that a standby of this machine needs, as they are in the process's file system.
fn files(pid: u32, spec: &MachineSpec) -> Result<Vec<FileUse>, AttachError> {
    let paths = files_needed(spec).map_err(AttachError::Standby)?;
    paths.into_iter().map(|path| file_use(pid, path)).collect()
}

fn file_use(pid: u32, path: PathBuf) -> Result<FileUse, AttachError> {
    let seen_by_qemu = PathBuf::from(format!("/proc/{pid}/root{}", path.display()));
    let described = open_regular(&seen_by_qemu).and_then(|(file, bytes)| {
        let short = bytes <= DIGEST_BYTES_MAX;
        let digest = short.then(|| digest_of(file, bytes)).transpose()?;
        Ok((bytes, digest))
    });
    match described {
        Ok((bytes, digest)) => Ok(FileUse { path, bytes, digest }),
        Err(source) => Err(AttachError::File { path, source }),
    }
}

fn disks(blocks: &Value) -> Vec<Disk> {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
    let blocks = blocks.as_array().into_iter().flatten();
    blocks
        .filter_map(|block| {
            let inserted = block.get("inserted")?;
            let device = text(block, "device");
            let id = if device.is_empty() {
                text(inserted, "node-name")
            } else {
                device
            };
            let bytes = inserted
                .get("image")
                .and_then(|image| image.get("virtual-size"))
                .and_then(Value::as_u64);
            Some(Disk {
                id,
                bytes: bytes.unwrap_or(0),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::spec::tests::{own, spec};

    fn described(folder: &std::path::Path, more: &[&str]) -> Result<Vec<FileUse>, AttachError> {
        let argv = [&["qemu-system-x86_64", "-nodefaults"], more].concat();
        let mut spec = spec(&argv, &[("pc.ram", 1 << 20)]);
        own(&mut spec).cwd = folder.to_owned();
        files(std::process::id(), &spec)
    }

    #[test]
    fn files_are_found_in_whatever_form_the_command_line_names_them() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["vmlinuz", "disk.raw", "rom.bin", "table.aml", "node,7.raw"];
        for name in names {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let argv = [
            "-L",
            ".",
            "-kernel",
            "vmlinuz",
            "-drive",
            "if=none,id=d,file=disk.raw,readonly=on",
            "-option-rom",
            "rom.bin",
            "-acpitable",
            "data=table.aml",
            "-blockdev",
            r#"{"driver":"raw","node-name":"n","read-only":true,"file":{"driver":"file","filename":"node,7.raw"}}"#,
        ];
        let found = described(folder.path(), &argv).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|file| {
                let name = file.path.file_name().unwrap().to_str().unwrap();
                assert!(file.digest.is_some());
                assert_eq!(file.bytes, name.len() as u64);
                name
            })
            .collect();
        assert_eq!(found, names);
    }

    #[test]
    fn what_no_standby_can_be_derived_from_is_refused_with_its_cause() {
        let folder = tempfile::tempdir().unwrap();
        let refused = described(folder.path(), &["-gdb", "tcp::1", "-no-such-option"]).unwrap_err();
        assert!(matches!(refused, AttachError::Standby(_)), "{refused}");
        assert!(refused.to_string().contains("-no-such-option"), "{refused}");
        for (value, why) in [("gone", "No such file"), (".", "directory")] {
            let refused = described(folder.path(), &["-initrd", value]).unwrap_err();
            assert!(matches!(refused, AttachError::File { .. }), "{refused}");
            assert!(refused.to_string().contains(why), "{refused}");
        }
    }

    #[test]
    fn a_working_directory_that_is_no_text_is_refused_before_it_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9"));
        std::fs::create_dir(&odd).unwrap();
        let mut command = Command::new("sleep");
        let mut child = command
            .arg("60")
            .current_dir(odd)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let refused = process(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(refused, Err(AttachError::Folder { .. })));
    }
}
