//! Guests in a stock QEMU, started as any operator would, with nothing of ours on the command line.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use super::{MAC, console, qmp, second_qmp};
use crate::lab::word;
use crate::netns::{GUEST_IP, GUEST_IP6, TAP};
use crate::{Kernel, Lab};

/// Debian's firmware for UEFI machines, and its empty variables.
const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// How the guest's memory is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Plain `-m`: private anonymous memory.
    Plain,
    /// A shared memfd, as libvirt gives guests that share memory.
    Memfd,
}

/// The guest's network card on the lab's tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nic {
    /// virtio, by `-netdev` and `-device`.
    Virtio,
    /// Whatever the machine has by default, by `-nic tap`: e1000, or e1000e on q35. Needs [`Kernel::Ordinary`].
    Default,
}

/// What starts before the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// `SeaBIOS`, which QEMU brings along.
    Bios,
    /// OVMF in two flash chips: its code, and a copy of its variables that the guest can write.
    Ovmf,
}

/// What to start.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// `tcg` or `kvm`.
    pub accel: String,
    /// The machine type; empty for QEMU's own default.
    pub machine: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// How the memory is made.
    pub memory: Memory,
    /// Virtual processors.
    pub vcpus: u32,
    /// The kernel that it boots.
    pub kernel: Kernel,
    /// Its network card.
    pub nic: Nic,
    /// Its firmware.
    pub firmware: Firmware,
    /// The user that QEMU becomes once it has opened its files.
    pub user: Option<String>,
    /// A file that QEMU gets as its descriptor 3, as a management program hands over a tap.
    pub descriptor: Option<PathBuf>,
    /// Programs to be measured at work are there, too; needs [`Kernel::Cloud`].
    pub programs: bool,
    /// What runs in the guest; see `tests/guest/init`.
    pub workload: String,
    /// More for the kernel's command line, each word after a blank.
    pub kernel_args: String,
    /// Whether the guest steers its clock by the RTC.
    pub clock_remedy: bool,
    /// Give it a second monitor, as an operator may, so that a test can ask beside the replicator.
    pub second_monitor: bool,
    /// Leave out QEMU's default devices.
    pub no_defaults: bool,
    /// Further arguments of QEMU.
    pub extra: Vec<String>,
}

impl Default for QemuConfig {
    fn default() -> QemuConfig {
        QemuConfig {
            accel: "tcg".to_owned(),
            machine: "q35".to_owned(),
            memory_mib: 256,
            memory: Memory::Plain,
            vcpus: 1,
            kernel: Kernel::Cloud,
            nic: Nic::Virtio,
            firmware: Firmware::Bios,
            user: None,
            descriptor: None,
            programs: false,
            workload: "redis".to_owned(),
            kernel_args: String::new(),
            clock_remedy: false,
            second_monitor: false,
            no_defaults: true,
            extra: Vec::new(),
        }
    }
}

impl QemuConfig {
    /// Has the guest write so many pages every 25 ms beside its redis.
    #[must_use]
    pub fn dirty_pages(self, pages: u32) -> QemuConfig {
        QemuConfig {
            workload: match pages {
                0 => "redis".to_owned(),
                pages => format!("redis,dirty:{pages}:25"),
            },
            ..self
        }
    }

    /// QEMU's command line, for a guest on the primary.
    pub(super) fn argv(&self, lab: &Lab) -> Vec<String> {
        let mut argv = Vec::new();
        if let Some(file) = &self.descriptor {
            argv.extend(["bash", "-c", "exec \"$@\" 3<>\"$0\""].map(str::to_owned));
            argv.push(word(file));
        }
        argv.extend(["qemu-system-x86_64", "-name", "demo", "-display", "none"].map(str::to_owned));
        if let Some(user) = &self.user {
            argv.extend(["-runas".to_owned(), user.clone()]);
        }
        if self.no_defaults {
            argv.push("-nodefaults".to_owned());
        }
        self.add_machine(&mut argv);
        self.add_boot(lab, &mut argv);
        self.add_net(&mut argv);
        let mut add = |words: [&str; 2]| argv.extend(words.map(str::to_owned));
        add([
            "-chardev",
            &format!("file,id=console,path={}", word(&console(lab))),
        ]);
        add(["-serial", "chardev:console"]);
        add(["-qmp", &format!("unix:{},server=on,wait=off", word(&qmp(lab)))]);
        if self.second_monitor {
            add([
                "-qmp",
                &format!("unix:{},server=on,wait=off", word(&second_qmp(lab))),
            ]);
        }
        argv.extend(self.extra.iter().cloned());
        argv
    }

    fn add_machine(&self, argv: &mut Vec<String>) {
        let mut add = |option: &str, value: String| argv.extend([option.to_owned(), value]);
        let mut machine: Vec<String> = Vec::new();
        if !self.machine.is_empty() {
            machine.push(self.machine.clone());
        }
        machine.push(format!("accel={}", self.accel));
        if self.memory == Memory::Memfd {
            machine.push("memory-backend=ram0".to_owned());
            add(
                "-object",
                format!("memory-backend-memfd,id=ram0,size={}M,share=on", self.memory_mib),
            );
        }
        add("-M", machine.join(","));
        add("-m", self.memory_mib.to_string());
        add("-smp", self.vcpus.to_string());
    }

    fn add_boot(&self, lab: &Lab, argv: &mut Vec<String>) {
        let mut add = |option: &str, value: String| argv.extend([option.to_owned(), value]);
        if self.firmware == Firmware::Ovmf {
            let flash = |file: &str, more: &str| format!("if=pflash,format=raw,unit={more},file={file}");
            add("-drive", flash(OVMF_CODE, "0,readonly=on"));
            add("-drive", flash(&word(&variables(lab)), "1"));
        }
        add("-kernel", word(&lab.paths.kernel(self.kernel)));
        add("-initrd", word(&self.initramfs(lab)));
        add("-append", self.kernel_line());
    }

    fn initramfs(&self, lab: &Lab) -> PathBuf {
        if self.programs {
            lab.paths.initramfs_with_programs()
        } else {
            lab.paths.initramfs(self.kernel)
        }
    }

    fn add_net(&self, argv: &mut Vec<String>) {
        let tap = format!("ifname={TAP},script=no,downscript=no");
        match self.nic {
            Nic::Virtio => argv.extend([
                "-netdev".to_owned(),
                format!("tap,id=net0,{tap}"),
                "-device".to_owned(),
                format!("virtio-net-pci,netdev=net0,mac={MAC}"),
            ]),
            Nic::Default => argv.extend(["-nic".to_owned(), format!("tap,mac={MAC},{tap}")]),
        }
    }

    fn kernel_line(&self) -> String {
        let clock = if self.clock_remedy { " clock=remedy" } else { "" };
        format!(
            "console=ttyS0 quiet panic=-1 no_timer_check ip4={GUEST_IP}/24 ip6={GUEST_IP6}/64 gw=10.77.0.1 wl={}{clock}{}",
            self.workload, self.kernel_args
        )
    }

    /// Makes what the command line names and is not there yet.
    ///
    /// # Errors
    /// When the guest has not been built, or a file cannot be made.
    pub(super) fn prepare(&self, lab: &Lab) -> Result<()> {
        for needed in [lab.paths.kernel(self.kernel), self.initramfs(lab)] {
            if !needed.exists() {
                bail!("{} is missing: run `cargo xtask setup`", needed.display());
            }
        }
        if self.firmware == Firmware::Ovmf {
            fs::copy(OVMF_VARS, variables(lab))
                .with_context(|| format!("cannot copy {OVMF_VARS}; is the package ovmf installed?"))?;
        }
        Ok(())
    }
}

/// The guest's copy of the firmware's variables.
fn variables(lab: &Lab) -> PathBuf {
    lab.run_path("vars.fd")
}
