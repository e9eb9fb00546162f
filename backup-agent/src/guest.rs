//! The standby of one VM: proven by a trial load, waiting if it is warm, and the guest that it becomes.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use net_buffer::{Announcer, Announcing, LearntAddress, Mac, join_bridge};
use romulus_config::StandbyKind;
use romulus_hypervisor::fault;
use romulus_hypervisor::launcher::Launcher;
use romulus_hypervisor::spec::Nic;
use romulus_hypervisor::standby::{Committed, Standby, StandbyError};
use romulus_types::{BlockId, VmId};
use romulus_wire::unpack_guest_state;
use serde_json::{Value, json};
use tracing::{error, info, warn};

use crate::standbys::Standbys;
use crate::vm_image::VmImage;

/// Where and how standbys run.
pub struct GuestConfig {
    /// The VM.
    pub vm: VmId,
    /// Warm or cold.
    pub standby: StandbyKind,
    /// How standbys are made.
    pub standbys: Standbys,
    /// What starts them.
    pub launcher: Launcher,
    /// The bridge that its taps join at activation.
    pub bridge: Option<String>,
    /// Compare the standby's memory with the commit before its guest runs.
    pub verify_activation: bool,
    /// Folder for sockets and logs of its hypervisor.
    pub run_dir: PathBuf,
}

/// The standby of one VM.
pub struct Guest {
    config: GuestConfig,
    standby: Option<Box<dyn Standby>>,
    announcing: Vec<Announcing>,
    /// Why it can't be told whether a guest runs from the image, if it can't.
    doubt: Option<String>,
}

/// The last commit's files and state, taken apart.
struct Checkpoint {
    ram: Vec<PathBuf>,
    state: Vec<u8>,
}

impl Checkpoint {
    fn of(image: &VmImage) -> anyhow::Result<Self> {
        Ok(Self {
            ram: ram_paths(image)?,
            state: image.guest_state()?,
        })
    }

    /// The primary's notes, and the checkpoint as the hypervisor wants it.
    fn parts(&self) -> anyhow::Result<(Vec<LearntAddress>, Committed<'_>)> {
        let (notes, device_state) = unpack_guest_state(&self.state)?;
        let learnt = serde_json::from_slice(notes).context("the addresses that the primary learnt")?;
        Ok((
            learnt,
            Committed {
                ram: &self.ram,
                device_state,
                memory: None,
            },
        ))
    }
}

/// What is announced on the tap of the machine's network card `number`: what was learnt of its MAC, and the MAC itself.
/// With a single card everything learnt is its own, whatever MAC the guest uses.
fn addresses_of(nics: &[Nic], number: usize, learnt: &[LearntAddress]) -> Vec<LearntAddress> {
    let Some(nic) = nics.get(number) else {
        return learnt.to_vec();
    };
    let own = Mac(nic.mac);
    let mut addresses: Vec<_> = learnt
        .iter()
        .filter(|address| nics.len() == 1 || address.mac == own)
        .cloned()
        .collect();
    if addresses.iter().all(|address| address.mac != own) {
        addresses.push(LearntAddress {
            mac: own,
            vlan: None,
            ip: None,
            router: false,
        });
    }
    addresses
}

/// The files of its memory blocks, in their order.
///
/// # Errors
/// When there is no image.
pub fn ram_paths(image: &VmImage) -> anyhow::Result<Vec<PathBuf>> {
    let blocks = image.machine()?.layout.blocks().len();
    (0..blocks)
        .map(|block| image.ram_path(BlockId(u16::try_from(block)?)))
        .collect()
}

impl Guest {
    /// No standby yet.
    pub fn new(config: GuestConfig) -> Self {
        Self {
            config,
            standby: None,
            announcing: Vec::new(),
            doubt: None,
        }
    }

    fn standby(&mut self, image: &VmImage) -> anyhow::Result<&mut dyn Standby> {
        if self.standby.is_none() {
            let machine = image.machine()?;
            let (run_dir, taps) = (&self.config.run_dir, self.tap_prefix());
            let launcher = self.config.launcher.clone();
            let standby = self.config.standbys.prepare(machine, run_dir, &taps, launcher)?;
            for difference in standby.differences() {
                info!(
                    vm = self.config.vm.as_str(),
                    difference, "the standby differs from the primary"
                );
            }
            self.standby = Some(standby);
        }
        Ok(self.standby.as_deref_mut().expect("made above"))
    }

    /// Finds the guest that an earlier life of the agent activated: whether it runs. A machine that has never run is ended.
    ///
    /// # Errors
    /// When it can't be told whether a guest runs.
    pub fn adopt(&mut self, image: &VmImage) -> anyhow::Result<bool> {
        let found = self.find(image);
        self.doubt = found.as_ref().err().map(|error| format!("{error:#}"));
        self.standby = found?;
        Ok(self.standby.is_some())
    }

    fn find(&self, image: &VmImage) -> anyhow::Result<Option<Box<dyn Standby>>> {
        let (machine, run_dir) = (image.machine()?, &self.config.run_dir);
        self.config.standbys.adopt(machine, run_dir, &self.tap_prefix())
    }

    /// Whether it is known that a guest runs from the image, or that none does.
    ///
    /// # Errors
    /// When it is not, with the cause and what to do.
    pub fn ensure_known(&self) -> anyhow::Result<()> {
        match &self.doubt {
            None => Ok(()),
            Some(cause) => bail!(
                "whether a guest runs here since an earlier takeover is not known ({cause}): look for its VMM (in a scope \
                 romulus-standby-{vm}-*, if it has one); if the VM runs elsewhere, end what is found, and then: romulus forget {vm} --force",
                vm = self.config.vm.as_str()
            ),
        }
    }

    /// Shows that a standby with this configuration loads the last commit.
    ///
    /// # Errors
    /// What the hypervisor said.
    pub fn prove(&mut self, image: &VmImage) -> anyhow::Result<()> {
        let checkpoint = Checkpoint::of(image)?;
        let (_, committed) = checkpoint.parts()?;
        let report = self.standby(image)?.trial_load(&committed)?;
        info!(event = "trial", vm = self.config.vm.as_str(), detail = %json!(report));
        Ok(())
    }

    /// Has a standby waiting, if they are warm here.
    ///
    /// # Errors
    /// What the hypervisor said.
    pub fn wait_warm(&mut self, image: &VmImage) -> anyhow::Result<Option<u32>> {
        if self.config.standby == StandbyKind::Cold {
            return Ok(None);
        }
        let ram = ram_paths(image)?;
        let standby = self.standby(image)?;
        standby.start_waiting(&ram)?;
        Ok(standby.pid())
    }

    /// Lets the guest run from the last commit, joins its taps to the bridge and announces its addresses. `consume` marks the
    /// image, right before the guest may read it.
    ///
    /// # Errors
    /// What the hypervisor said; no guest runs then.
    pub fn activate(
        &mut self,
        image: &VmImage,
        consume: &mut dyn FnMut() -> Result<(), StandbyError>,
    ) -> anyhow::Result<Value> {
        let checkpoint = Checkpoint::of(image)?;
        let (learnt, mut committed) = checkpoint.parts()?;
        if self.config.verify_activation {
            committed.memory = Some(image.digest()?);
        }
        let standby = self.standby(image)?;
        if standby.is_waiting() {
            // The guest's first frame must find the way out open.
            self.join();
        }
        fault::point("agent.joined");
        let report = self.standby(image)?.activate(&committed, consume)?;
        if let (Some(digest), Some(verify_us)) = (committed.memory, report.verify_us) {
            info!(
                event = "activation_verified",
                vm = self.config.vm.as_str(),
                %digest,
                verify_us,
            );
        }
        self.join();
        self.announce(&image.machine()?.nics, &learnt);
        Ok(json!({"activation": report, "announced": learnt}))
    }

    fn taps(&self) -> Vec<String> {
        self.standby
            .as_ref()
            .map_or_else(Vec::new, |standby| standby.taps().to_vec())
    }

    fn join(&self) {
        let Some(bridge) = &self.config.bridge else { return };
        for tap in self.taps() {
            if let Err(error) = join_bridge(&tap, bridge) {
                let (vm, error) = (
                    self.config.vm.as_str(),
                    format!("{:#}", anyhow::Error::from(error)),
                );
                warn!(
                    event = "not_joined",
                    vm, tap, error, "the guest's tap is not on the bridge"
                );
            }
        }
    }

    fn announce(&mut self, nics: &[Nic], learnt: &[LearntAddress]) {
        for (number, tap) in self.taps().into_iter().enumerate() {
            let addresses = addresses_of(nics, number, learnt);
            match Announcer::prepare(&tap).and_then(|announcer| announcer.repeat(addresses)) {
                Ok(announcing) => self.announcing.push(announcing),
                Err(error) => {
                    let (vm, error) = (
                        self.config.vm.as_str(),
                        format!("{:#}", anyhow::Error::from(error)),
                    );
                    warn!(
                        event = "not_announced",
                        vm, tap, error, "the guest's addresses are not announced"
                    );
                }
            }
        }
    }

    /// Whether the guest runs here.
    pub fn is_active(&mut self) -> bool {
        self.standby.as_mut().is_some_and(|standby| standby.is_active())
    }

    /// How the guest that was activated here ended, if it did; its addresses are not announced any more.
    pub fn end(&mut self) -> Option<String> {
        let end = self.standby.as_mut()?.guest_end()?;
        self.announcing.clear();
        Some(end)
    }

    /// The process that waits or runs.
    pub fn pid(&self) -> Option<u32> {
        self.standby.as_ref().and_then(|standby| standby.pid())
    }

    /// Makes way for a session that was accepted, which may have another machine: what waits is ended. So is a guest that
    /// was taken over earlier: the record names another host since, where the VM runs now.
    ///
    /// # Errors
    /// When it is not known whether there is one.
    pub fn make_way(&mut self) -> anyhow::Result<()> {
        self.ensure_known()?;
        self.announcing.clear();
        if let Some(mut standby) = self.standby.take() {
            if standby.is_active() {
                warn!(
                    event = "guest_ended",
                    vm = self.config.vm.as_str(),
                    "another host speaks for the VM and protects it to here: the guest that was taken over is ended"
                );
                standby.kill();
            } else {
                standby.dismiss();
            }
        }
        Ok(())
    }

    /// Ends what waits: the agent is told to end, and the next one starts standbys of its own. A guest that runs goes on.
    pub fn dismiss_waiting(&mut self) {
        if let Some(mut standby) = self.standby.take_if(|standby| !standby.is_active()) {
            standby.dismiss();
        }
    }

    /// Ends the guest for good: another host speaks for it.
    pub fn stop(&mut self) {
        if let Err(error) = self.ensure_known() {
            error!(
                event = "guest_not_ended",
                vm = self.config.vm.as_str(),
                error = format!("{error:#}")
            );
        }
        self.announcing.clear();
        if let Some(mut standby) = self.standby.take() {
            standby.kill();
        }
    }

    /// Ends what waits, what an earlier agent left waiting as well, and removes the folder of its hypervisor.
    ///
    /// # Errors
    /// When a guest runs, or the folder can't be removed.
    pub fn forget(&mut self, image: &VmImage) -> anyhow::Result<()> {
        if self.config.run_dir.exists()
            && self.standby.is_none()
            && let Err(error) = self.adopt(image)
        {
            let (vm, error) = (self.config.vm.as_str(), format!("{error:#}"));
            info!(vm, error, "whatever is left of a standby cannot be looked for");
        }
        ensure!(
            !self.is_active(),
            "the guest runs here: it was taken over, and nothing else is known to run it"
        );
        self.announcing.clear();
        self.doubt = None;
        if let Some(mut standby) = self.standby.take() {
            standby.dismiss();
        }
        match std::fs::remove_dir_all(&self.config.run_dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("could not remove {}", self.config.run_dir.display()))
            }
            _ => Ok(()),
        }
    }

    /// The beginning of the standby's tap names: short, and different for each VM.
    fn tap_prefix(&self) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in self.config.vm.as_str().bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        format!("rom{:06x}", hash >> 40)
    }
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
