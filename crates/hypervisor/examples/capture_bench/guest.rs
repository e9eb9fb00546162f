//! The guest that is measured when none is given: Debian's kernel under TCG, which dirties so many pages every 25 ms.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How the guest's memory is made.
#[derive(Clone, Copy)]
pub(crate) enum Memory {
    Plain,
    Memfd,
}

impl Memory {
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Plain => "plain memory (-m)",
            Self::Memfd => "shared memory (memfd)",
        }
    }
}

/// A QEMU, killed when dropped.
pub(crate) struct Guest {
    process: Child,
    pub(crate) qmp: PathBuf,
}

impl Guest {
    /// Boots it and waits until its workload runs.
    pub(crate) fn boot(
        assets: &Path,
        folder: &Path,
        memory: Memory,
        memory_mib: u64,
        dirty_pages: u64,
    ) -> Result<Self, Box<dyn Error>> {
        let (qmp, console) = (folder.join("qmp"), folder.join("console"));
        let _ = std::fs::remove_file(&console);
        let (kernel, initramfs) = (assets.join("vmlinuz"), assets.join("initramfs.cpio.gz"));
        if !kernel.exists() || !initramfs.exists() {
            return Err(format!("{} has no guest: run cargo xtask setup", assets.display()).into());
        }
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-display", "none", "-m", &memory_mib.to_string()]);
        match memory {
            Memory::Plain => command.args(["-M", "q35,accel=tcg"]),
            Memory::Memfd => command
                .arg("-object")
                .arg(format!(
                    "memory-backend-memfd,id=ram0,size={memory_mib}M,share=on"
                ))
                .args(["-M", "q35,accel=tcg,memory-backend=ram0"]),
        };
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
        command.arg("-append").arg(format!(
            "console=ttyS0 quiet panic=-1 wl=counter:500,dirty:{dirty_pages}:25"
        ));
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()));
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let mut guest = Self { process, qmp };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !std::fs::read_to_string(&console).is_ok_and(|text| text.contains("counter 4")) {
            if Instant::now() > deadline || guest.process.try_wait()?.is_some() {
                return Err("the guest did not boot".into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(guest)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
