//! A guest that was stopped and saved: what a standby is given, and whether the guest goes on in it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use romulus_hypervisor::host::processor;
use romulus_hypervisor::qemu::bootstrap::{Bootstrap, Options, bootstrap};
use romulus_hypervisor::qemu::cmdline;
use romulus_hypervisor::qemu::cpu::vcpus;
use romulus_hypervisor::qemu::qmp::{Monitor, Qmp};
use romulus_hypervisor::qemu::standby::StandbyOptions;
use romulus_hypervisor::spec::{Disk, FileUse, Hypervisor, MachineSpec, QemuMachine, SPEC_FORMAT};
use romulus_hypervisor::standby::Committed;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Guest, counters, read_lossy, wait_for};

/// What the guests do: count, and check their memory.
pub(crate) const WORK: &str = "counter:50,check:500";

/// A guest's last checkpoint on what stands for the backup's disk.
pub(crate) struct Saved {
    pub(crate) dir: TempDir,
    pub(crate) spec: MachineSpec,
    pub(crate) ram: Vec<PathBuf>,
    pub(crate) state: Vec<u8>,
    /// The primary's console up to the checkpoint.
    pub(crate) console: String,
}

impl Saved {
    pub(crate) fn committed(&self) -> Committed<'_> {
        Committed {
            ram: &self.ram,
            device_state: &self.state,
            memory: None,
        }
    }

    pub(crate) fn options(&self) -> StandbyOptions {
        let mut options = StandbyOptions::new(self.dir.path().join("run"), "hvt");
        options.log_serial = true;
        options
    }

    pub(crate) fn serial(&self) -> PathBuf {
        self.dir.path().join("run/machine/serial")
    }

    pub(crate) fn main_ram(&self) -> &Path {
        &self.ram[usize::from(self.spec.main.0)]
    }
}

pub(crate) fn describe(guest: &Guest, qmp: &mut Qmp, learnt: &Bootstrap) -> MachineSpec {
    let kvm = qmp.execute("query-kvm", Value::Null).unwrap()["enabled"] == true;
    let blocks = qmp.execute("query-block", Value::Null).unwrap();
    let disks = blocks.as_array().unwrap().iter().filter_map(|block| {
        let bytes = block["inserted"]["image"]["virtual-size"].as_u64()?;
        Some(Disk {
            id: block["device"].as_str()?.to_owned(),
            bytes,
        })
    });
    let vcpus = vcpus(qmp).unwrap();
    let mut spec = MachineSpec {
        format: SPEC_FORMAT,
        version: qmp.version().to_string(),
        host_cpu: processor(),
        vcpus: vcpus.count,
        layout: learnt.layout.clone(),
        main: learnt.main,
        nics: vec![],
        disks: disks.collect(),
        disposable: vec!["user".into()],
        hypervisor: Hypervisor::Qemu(QemuMachine {
            accelerator: if kvm { "kvm" } else { "tcg" }.into(),
            cpu_model: vcpus.model,
            cpu_features: Some(vcpus.features),
            argv: guest.argv.clone(),
            cwd: "/".into(),
            files: vec![],
            template: learnt.template.clone(),
        }),
    };
    let files = cmdline::files_needed(&spec).unwrap().into_iter();
    let uses = files.map(|path| FileUse {
        bytes: fs::metadata(&path).unwrap().len(),
        path,
        digest: None,
    });
    spec.qemu_mut().unwrap().files = uses.collect();
    // As it travels.
    MachineSpec::from_json(&spec.to_json()).unwrap()
}

/// Saves a running guest: `stop`, its memory by `pmemsave` or its blocks, its devices by `xen-save-devices-state`.
pub(crate) fn save(guest: Guest, shared: bool) -> Saved {
    guest.wait_for("counter 5");
    save_now(guest, shared)
}

/// The same of a guest that says nothing.
pub(crate) fn save_now(mut guest: Guest, shared: bool) -> Saved {
    let mut qmp = guest.qmp();
    let learnt = bootstrap(&mut qmp, &Options::new(shared), &mut || {}).unwrap();
    let spec = describe(&guest, &mut qmp, &learnt);
    let dir = tempfile::Builder::new()
        .prefix("romulus-hv-")
        .tempdir_in("/dev/shm")
        .unwrap();
    qmp.execute("stop", Value::Null).unwrap();
    let state = dir.path().join("state");
    let arguments = json!({ "filename": state.display().to_string(), "live": false });
    qmp.execute("xen-save-devices-state", arguments).unwrap();
    let blocks = learnt.template.blocks.iter().enumerate();
    let ram: Vec<PathBuf> = blocks
        .map(|(position, block)| {
            let path = dir.path().join(format!("ram-{position}"));
            if position == usize::from(learnt.main.0) {
                copy_block(&guest, block.bytes, &path);
            } else {
                fs::write(&path, learnt.contents[position].as_ref().unwrap()).unwrap();
            }
            path
        })
        .collect();
    let console = guest.serial();
    Saved {
        spec,
        ram,
        state: fs::read(&state).unwrap(),
        console,
        dir,
    }
}

/// Copies the largest mapping of exactly this size out of the stopped QEMU.
pub(crate) fn copy_block(guest: &Guest, bytes: u64, to: &Path) {
    let maps = fs::read_to_string(format!("/proc/{}/maps", guest.process.id())).unwrap();
    let address = maps.lines().find_map(|line| {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        let (from, to) = (
            u64::from_str_radix(from, 16).ok()?,
            u64::from_str_radix(to, 16).ok()?,
        );
        (to - from == bytes).then_some(from)
    });
    let memory = fs::File::open(format!("/proc/{}/mem", guest.process.id())).unwrap();
    let file = fs::File::create(to).unwrap();
    file.set_len(bytes).unwrap();
    let mut chunk = vec![0u8; 1 << 20];
    for at in (0..bytes).step_by(chunk.len()) {
        memory
            .read_exact_at(&mut chunk, address.expect("the block is mapped whole") + at)
            .unwrap();
        if chunk.iter().any(|b| *b != 0) {
            file.write_all_at(&chunk, at).unwrap();
        }
    }
}

pub(crate) fn went_on(saved: &Saved) {
    let last = *counters(&saved.console).last().unwrap();
    wait_for(&saved.serial(), &format!("counter {}", last + 20));
    let console = read_lossy(&saved.serial());
    let after = counters(&console);
    let expected: Vec<u64> = (after[0]..).take(after.len()).collect();
    assert_eq!(after, expected, "the counter has no gap");
    // A line that was half written at the checkpoint belongs to neither console as a whole.
    assert!(
        after[0] == last + 1 || after[0] == last + 2,
        "{last} then {}",
        after[0]
    );
    assert!(!console.contains("check BAD"), "{console}");
}
