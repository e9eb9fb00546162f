//! The guest: a stock QEMU, started as any operator would, with nothing of ours on its command line.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::process::{Pid, Signal};

pub use crate::guest_config::{Firmware, GuestConfig, Memory, Nic};
use crate::lab::wait_for;
use crate::netns::Host;
use crate::resp::Redis;
use crate::{Lab, Process};

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

/// A guest that runs on the primary.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    console: PathBuf,
}

impl Guest {
    /// Starts it; it takes some seconds to boot.
    ///
    /// # Errors
    /// When the guest has not been built or QEMU cannot be started.
    pub fn start(lab: &Lab, config: &GuestConfig) -> Result<Guest> {
        for needed in [
            lab.paths.kernel(config.kernel),
            lab.paths.initramfs(config.kernel),
        ] {
            if !needed.exists() {
                bail!("{} is missing: run `cargo xtask setup`", needed.display());
            }
        }
        config.prepare(lab)?;
        let console = console(lab);
        // What an earlier guest said there must not be taken for this one's.
        File::create(&console).with_context(|| format!("cannot create {}", console.display()))?;
        let process = lab.spawn(Host::Primary, "qemu", &config.argv(lab))?;
        Ok(Guest { process, console })
    }

    /// Waits until its first process has said that it is ready.
    ///
    /// # Errors
    /// When QEMU ends or the time is over.
    pub fn wait_ready(&mut self, at_most: Duration) -> Result<()> {
        let waited = wait_for("the guest's boot", at_most, || {
            if let Some(status) = self.process.ended() {
                return Some(Err(anyhow!("QEMU ended ({status}): {}", self.process.tail())));
            }
            if has_line(&self.console, "Kernel panic") {
                return Some(Err(anyhow!(
                    "the guest's kernel panics; see {}",
                    self.console.display()
                )));
            }
            has_line(&self.console, "guest: ready").then_some(Ok(()))
        });
        waited.map_err(|error| {
            anyhow!(
                "{error}; the console: {}",
                crate::process::tail_of(&self.console, 5)
            )
        })?
    }

    /// Waits until its redis answers a client.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_redis(&mut self, lab: &Lab, at_most: Duration) -> Result<()> {
        wait_for("redis in the guest", at_most, || {
            Redis::connect(lab, Duration::from_millis(500)).ok()?.ping().ok()
        })
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
