//! The guest: in a stock QEMU, or in our own test VMM.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use rustix::process::{Pid, Signal};

use crate::lab::wait_for;
use crate::netns::Host;
use crate::qmp::Qmp;
use crate::resp::Redis;
use crate::{Lab, Process};

mod qemu;
mod testbed;

pub use qemu::{Firmware, Memory, Nic, QemuConfig};
pub use testbed::TestbedConfig;
pub(crate) use testbed::runs as runs_guest;

/// The guest's Ethernet address.
pub const MAC: &str = "52:54:00:77:00:02";
/// The same, as it stands in a frame.
pub(crate) const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0x00, 0x77, 0x00, 0x02];
/// The port of its redis.
pub const REDIS_PORT: u16 = 6379;

/// The socket of the guest's monitor.
#[must_use]
pub fn qmp(lab: &Lab) -> PathBuf {
    lab.run_path("qmp.sock")
}

/// The socket of its second monitor.
#[must_use]
pub fn second_qmp(lab: &Lab) -> PathBuf {
    lab.run_path("qmp2.sock")
}

/// Where the guest's console goes.
#[must_use]
pub fn console(lab: &Lab) -> PathBuf {
    lab.logs.join("console.log")
}

/// The socket at which the testbed lets itself be attached to.
#[must_use]
pub fn attach(lab: &Lab) -> PathBuf {
    lab.run_path("attach.sock")
}

/// What runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vmm {
    /// A stock QEMU.
    #[default]
    Qemu,
    /// Our own test VMM, over KVM.
    Testbed,
}

impl Vmm {
    /// What it is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Vmm::Qemu => "qemu",
            Vmm::Testbed => "testbed",
        }
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub enum GuestConfig {
    /// A Linux with redis in a stock QEMU.
    Qemu(QemuConfig),
    /// The testbed with the guest that it brings along.
    Testbed(TestbedConfig),
}

impl GuestConfig {
    /// What runs it.
    #[must_use]
    pub fn vmm(&self) -> Vmm {
        match self {
            GuestConfig::Qemu(_) => Vmm::Qemu,
            GuestConfig::Testbed(_) => Vmm::Testbed,
        }
    }

    /// The command line of its VMM, with all made that it names.
    ///
    /// # Errors
    /// When the guest has not been built, or a file cannot be made.
    pub fn argv(&self, lab: &Lab) -> Result<Vec<String>> {
        match self {
            GuestConfig::Qemu(config) => {
                config.prepare(lab)?;
                Ok(config.argv(lab))
            }
            GuestConfig::Testbed(config) => config.argv(lab),
        }
    }
}

impl Default for GuestConfig {
    fn default() -> GuestConfig {
        QemuConfig::default().into()
    }
}

impl From<QemuConfig> for GuestConfig {
    fn from(config: QemuConfig) -> GuestConfig {
        GuestConfig::Qemu(config)
    }
}

impl From<TestbedConfig> for GuestConfig {
    fn from(config: TestbedConfig) -> GuestConfig {
        GuestConfig::Testbed(config)
    }
}

/// A guest that runs on the primary.
#[derive(Debug)]
pub struct Guest {
    vmm: Vmm,
    process: Process,
    console: PathBuf,
}

impl Guest {
    /// Starts it; it takes some seconds to boot.
    ///
    /// # Errors
    /// When the guest has not been built or its VMM cannot be started.
    ///
    /// # Panics
    /// When the lab is one for another VMM.
    pub fn start(lab: &Lab, config: &GuestConfig) -> Result<Guest> {
        let vmm = config.vmm();
        assert_eq!(lab.vmm, vmm, "the daemons of a lab are told which VMM there is");
        let argv = config.argv(lab)?;
        let console = console(lab);
        // What an earlier guest said there must not be taken for this one's.
        File::create(&console).with_context(|| format!("cannot create {}", console.display()))?;
        let process = lab.spawn(Host::Primary, vmm.name(), &argv)?;
        Ok(Guest {
            vmm,
            process,
            console,
        })
    }

    /// Waits until it has said that it is ready.
    ///
    /// # Errors
    /// When the VMM ends or the time is over.
    pub fn wait_ready(&mut self, at_most: Duration) -> Result<()> {
        let ready = match self.vmm {
            Vmm::Qemu => "guest: ready",
            Vmm::Testbed => "guest: ",
        };
        let waited = wait_for("the guest's boot", at_most, || {
            if let Some(ended) = self.ended() {
                return Some(Err(ended));
            }
            if has_line(&self.console, "Kernel panic") {
                return Some(Err(anyhow!(
                    "the guest's kernel panics; see {}",
                    self.console.display()
                )));
            }
            has_line(&self.console, ready).then_some(Ok(()))
        });
        waited.map_err(|error| {
            anyhow!(
                "{error}; the console: {}",
                crate::process::tail_of(&self.console, 5)
            )
        })?
    }

    /// Waits until its redis answers a client, wherever it runs by now.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_redis(&mut self, lab: &Lab, at_most: Duration) -> Result<()> {
        wait_for("redis in the guest", at_most, || {
            Redis::connect(lab, Duration::from_millis(500)).ok()?.ping().ok()
        })
    }

    /// Whether it runs, by its VMM's word, or, of the testbed, by what the kernel says of its virtual processors.
    ///
    /// # Errors
    /// When the VMM is gone, or QEMU has no second monitor or is busy with a checkpoint.
    pub fn runs(&self, lab: &Lab) -> Result<bool> {
        match self.vmm {
            Vmm::Qemu => Ok(Qmp::connect(lab)?.status()? == "running"),
            Vmm::Testbed => testbed::runs(self.pid()?),
        }
    }

    /// What to say of a VMM that has ended.
    fn ended(&mut self) -> Option<anyhow::Error> {
        let status = self.process.ended()?;
        Some(anyhow!(
            "{} ended ({status}): {}",
            self.vmm.name(),
            self.process.tail()
        ))
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its process, to be waited for or killed.
    pub fn process_mut(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The id of its process.
    ///
    /// # Errors
    /// As [`Process::pid`].
    pub fn pid(&self) -> Result<Pid> {
        self.process.pid()
    }

    /// Kills it at once.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn kill_now(&self) -> Result<()> {
        self.process.signal(Signal::KILL)
    }
}

fn has_line(path: &Path, text: &str) -> bool {
    let bytes = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).contains(text)
}
