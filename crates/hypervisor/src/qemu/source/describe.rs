//! What a backup has to know of this machine, from QEMU's answers and its process.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use romulus_types::Digest;
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use super::error::AttachError;
use super::refusal::nics;
use crate::qemu::bootstrap::Bootstrap;
use crate::qemu::qmp::Monitor;
use crate::spec::{Disk, FileUse, Hypervisor, MachineSpec, Nic, SPEC_FORMAT};

/// Files up to this length are compared by content.
const DIGEST_BYTES_MAX: u64 = 256 << 20;
/// Options whose value is a file that the machine reads.
const FILE_OPTIONS: &[&str] = &["kernel", "initrd", "bios", "dtb", "pflash", "cdrom"];
/// Keys whose value is such a file, in options that are lists of `key=value`.
const FILE_KEYS: &[&str] = &["file=", "filename=", "file.filename=", "romfile=", "loader.file="];

/// Describes the machine of process `pid`.
pub(super) fn describe(
    monitor: &mut dyn Monitor,
    pid: u32,
    learnt: &Bootstrap,
    disposable: &BTreeSet<String>,
) -> Result<MachineSpec, AttachError> {
    let cpus = monitor.execute("query-cpus-fast", Value::Null)?;
    let cpus = cpus.as_array().map_or(&[][..], Vec::as_slice);
    let kvm = monitor.execute("query-kvm", Value::Null)?;
    let accelerator = if kvm.get("enabled").and_then(Value::as_bool) == Some(true) {
        "kvm"
    } else {
        "tcg"
    };
    let cpu_model = cpus
        .first()
        .and_then(|cpu| cpu.get("qom-type"))
        .and_then(Value::as_str)
        .unwrap_or("");
    let network = monitor.hmp("info network")?;
    let blocks = monitor.execute("query-block", Value::Null)?;
    let (argv, cwd) = process(pid)?;
    Ok(MachineSpec {
        format: SPEC_FORMAT,
        hypervisor: Hypervisor::Qemu,
        version: monitor.version().to_string(),
        accelerator: accelerator.to_owned(),
        cpu_model: cpu_model.to_owned(),
        host_cpu: host_cpu(),
        vcpus: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
        layout: learnt.layout.clone(),
        main: learnt.main,
        nics: nics(&network)
            .map(|(name, mac)| Nic {
                name: name.to_owned(),
                mac,
            })
            .collect(),
        files: files(pid, &argv, &cwd),
        disks: disks(&blocks),
        argv,
        cwd,
        disposable: disposable.iter().cloned().collect(),
        template: learnt.template.clone(),
    })
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
    Ok((argv, std::fs::read_link(&path).map_err(failed(&path))?))
}

fn host_cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(String::new, |(_, name)| name.trim().to_owned())
}

/// The files that a command line names and that exist in the process's file system.
fn files(pid: u32, argv: &[String], cwd: &Path) -> Vec<FileUse> {
    let mut paths = BTreeSet::new();
    for pair in argv.windows(2) {
        let option = pair[0].trim_start_matches('-');
        if pair[0].starts_with('-') && FILE_OPTIONS.contains(&option) {
            paths.insert(cwd.join(&pair[1]));
        }
        let values = pair[1]
            .split(',')
            .filter_map(|part| FILE_KEYS.iter().find_map(|key| part.strip_prefix(key)));
        paths.extend(values.map(|value| cwd.join(value)));
    }
    paths.into_iter().filter_map(|path| file_use(pid, path)).collect()
}

fn file_use(pid: u32, path: PathBuf) -> Option<FileUse> {
    let seen_by_qemu = PathBuf::from(format!("/proc/{pid}/root{}", path.display()));
    let mut file = File::open(seen_by_qemu).ok()?;
    let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let digest = if metadata.len() <= DIGEST_BYTES_MAX {
        digest(&mut file).ok()
    } else {
        None
    };
    Some(FileUse {
        path,
        bytes: metadata.len(),
        digest,
    })
}

fn digest(file: &mut File) -> io::Result<Digest> {
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Digest(hash.digest128())),
            bytes => hash.update(&buffer[..bytes]),
        }
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
    use super::*;

    #[test]
    fn files_that_the_command_line_names_are_found_and_others_are_not() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["vmlinuz", "disk.raw"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let argv = [
            "qemu",
            "-kernel",
            "vmlinuz",
            "-initrd",
            "missing",
            "-drive",
            "if=none,file=disk.raw,readonly=on",
        ];
        let argv: Vec<String> = argv.iter().map(|word| (*word).to_owned()).collect();
        let found = files(std::process::id(), &argv, folder.path());
        let names: Vec<_> = found
            .iter()
            .map(|file| (file.path.file_name().unwrap().to_owned(), file.bytes))
            .collect();
        assert_eq!(names, [("disk.raw".into(), 8), ("vmlinuz".into(), 7)]);
        assert!(found.iter().all(|file| file.digest.is_some()));
    }
}
