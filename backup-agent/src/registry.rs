//! The VMs of this agent: each has a driver task, a store thread and a witness task. Bounded in number.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use romulus_config::{BackupAgent, VmLimits};
use romulus_daemon::RecordFile;
use romulus_host_sys::process_clock::Clock;
use romulus_hypervisor::spec::MachineSpec;
use romulus_image::{Places, StagingShare};
use romulus_protocol::{
    Answer, Ask, Backup, BackupConfig, BackupEvent, BackupOrder, ImageStatus, Mode, WitnessRequest,
};
use romulus_transport::WitnessClient;
use romulus_types::{Epoch, HostId, Nonce, VmId};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, error, info, warn};

use crate::admission::{Admission, Claims, staging_bytes};
use crate::guest::{Guest, GuestConfig};
use crate::inbox::{EventSink, INBOX_MAX, Input};
use crate::place;
use crate::refusals::RefusedCount;
use crate::standbys::Standbys;
use crate::starts::Starts;
use crate::status::VmStatus;
use crate::store::Store;
use crate::store_jobs::{StoreJob, StoreSender, store_channel};
use crate::supervise::Parts;
use crate::vm_driver::VmDriver;
use crate::vm_image::VmImage;

/// How long ending all standbys that wait may take.
const DISMISS_AT_MOST: Duration = Duration::from_secs(3);
/// Requests to the witness that wait, at most.
const REQUESTS_MAX: usize = 8;

/// What every VM's parts are made with.
pub struct Shared {
    /// Settings.
    pub settings: BackupAgent,
    /// This host.
    pub host: HostId,
    /// The witness.
    pub witness: WitnessClient,
    /// The process's clock.
    pub clock: Clock,
    /// Where state files lie.
    pub state_dir: PathBuf,
    /// Whose guest is started when.
    pub starts: Starts,
    /// Where images lie.
    pub places: Places,
}

/// Why a VM is not given up.
#[derive(Debug, thiserror::Error)]
pub enum ForgetError {
    /// Nothing of it is here.
    #[error("no VM {0} is backed up here")]
    Unknown(VmId),
    /// It may still be needed.
    #[error("{0}")]
    Refused(String),
}

/// One VM's handle.
#[derive(Clone)]
pub struct VmHandle {
    /// Its driver's inbox.
    pub inbox: mpsc::Sender<Input>,
    /// Its figures.
    pub status: Arc<VmStatus>,
    limits: VmLimits,
    image_bytes: Arc<AtomicU64>,
    store: mpsc::WeakSender<StoreJob>,
}

/// All VMs.
#[derive(Clone)]
pub struct Registry {
    shared: Arc<Shared>,
    vms: Arc<Mutex<BTreeMap<VmId, VmHandle>>>,
    refused: RefusedCount,
}

impl Registry {
    /// No VM yet.
    pub fn new(shared: Shared) -> Self {
        Self {
            shared: Arc::new(shared),
            vms: Arc::default(),
            refused: RefusedCount::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, VmHandle>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the parts of every VM that an earlier life of the agent left an image of.
    ///
    /// # Errors
    /// When the image folder can't be used.
    pub fn recover(&self) -> anyhow::Result<()> {
        let dir = &self.shared.settings.image_dir;
        private_folder(dir)?;
        let mut found: BTreeSet<VmId> = self.shared.places.shelf.vms()?.into_iter().collect();
        found.extend(VmImage::consumed(dir)?);
        for vm in found {
            if let Err(error) = self.vm(&mut self.lock(), &vm) {
                error!(
                    event = "image_unusable",
                    vm = vm.as_str(),
                    error = format!("{error:#}")
                );
            }
        }
        Ok(())
    }

    /// The settings.
    pub fn settings(&self) -> &BackupAgent {
        &self.shared.settings
    }

    /// The memory that the staging of all VMs shares.
    pub fn staging(&self) -> &StagingShare {
        &self.shared.places.share
    }

    /// Whether the parts of this VM are started.
    pub fn has(&self, vm: &VmId) -> bool {
        self.lock().contains_key(vm)
    }

    /// Reads the witness's record of a VM.
    ///
    /// # Errors
    /// When the witness does not answer.
    pub async fn read_record(&self, vm: &VmId) -> anyhow::Result<Answer> {
        let request = WitnessRequest {
            vm: vm.clone(),
            host: self.shared.host.clone(),
            nonce: Nonce(crate::seed()?),
            ask: Ask::Read,
        };
        Ok(self.shared.witness.ask(request).await?.answer)
    }

    /// The connection to the witness stands, as far as is known.
    pub fn witness_connected(&self) -> bool {
        self.shared.witness.is_connected()
    }

    /// The VM's handle, if there is room for this machine. Its parts are started when it is new, and the room is
    /// claimed, so that no two VMs are promised the same.
    ///
    /// # Errors
    /// When there is no room, there are too many VMs, or its image folder can't be used.
    pub fn admit(&self, vm: &VmId, machine: &MachineSpec, admission: &Admission) -> anyhow::Result<VmHandle> {
        let mut vms = self.lock();
        let mut others = Claims::default();
        for (other, handle) in vms.iter() {
            others.used_bytes += handle.status.usage().bytes();
            if other != vm {
                let image_bytes = handle.image_bytes.load(Ordering::Relaxed);
                others.image_bytes += image_bytes;
                others.staging_bytes += staging_bytes(image_bytes, &handle.limits);
            }
        }
        let image_bytes = machine.layout.bytes();
        admission.check_room(image_bytes, &self.shared.settings.limits_of(vm), &others)?;
        let handle = self.vm(&mut vms, vm)?;
        handle.image_bytes.fetch_max(image_bytes, Ordering::Relaxed);
        Ok(handle)
    }

    fn vm(&self, vms: &mut BTreeMap<VmId, VmHandle>, vm: &VmId) -> anyhow::Result<VmHandle> {
        if let Some(handle) = vms.get(vm) {
            return Ok(handle.clone());
        }
        let vms_max = usize::from(self.shared.settings.vms_max);
        if vms.len() >= vms_max {
            bail!("this agent backs up {vms_max} VMs already (setting vms_max)");
        }
        let status = Arc::new(VmStatus::new(vm.clone(), self.shared.host.as_str()));
        let handle = self.start(vm, status, Parts::FIRST_PAUSE)?;
        vms.insert(vm.clone(), handle.clone());
        Ok(handle)
    }

    /// Starts the parts of a VM that has given up again. When they give up soon, too, `pause` passes before it is done once more.
    ///
    /// # Errors
    /// When its image or what is remembered of it can't be used.
    pub fn start_again(&self, status: Arc<VmStatus>, pause: Duration) -> anyhow::Result<()> {
        let vm = status.vm_id().clone();
        let handle = self.start(&vm, status, pause)?;
        self.lock().insert(vm, handle);
        Ok(())
    }

    fn start(&self, vm: &VmId, status: Arc<VmStatus>, pause: Duration) -> anyhow::Result<VmHandle> {
        let shared = &self.shared;
        let vm_limits = shared.settings.limits_of(vm);
        let (inbox, inputs) = mpsc::channel(INBOX_MAX);
        let events = EventSink(inbox.clone());
        let limits = romulus_image::Limits {
            staging_bytes_max: vm_limits.staging_bytes_max.bytes(),
            ..romulus_image::Limits::default()
        };
        let mut image = VmImage::open(&shared.places, &shared.settings.image_dir, vm, limits)?;
        let guest = self.find_guest(vm, &mut image, &status);
        status.set_usage(image.usage());
        let known = image.machine().map_or(0, |machine| machine.layout.bytes());
        let image_bytes = Arc::new(AtomicU64::new(known));
        let image_status = image.status();
        if image.damaged_slots() > 0 {
            let text = "a commit slot of the image was torn or damaged: to be expected when the agent was killed while it \
                        wrote one; otherwise the last acknowledged commit may be lost, and the memory of this host is in doubt";
            warn!(event = "damaged_slots", vm = vm.as_str(), "{text}");
            status.event(
                "damaged_slots",
                &serde_json::json!({"slots": image.damaged_slots()}),
            );
            status.set_detail(text.to_owned());
        }
        let state_file = shared.state_dir.join(format!("{vm}.json"));
        let (record_file, remembered) = RecordFile::open(&state_file)?;
        let config = BackupConfig {
            vm: vm.clone(),
            host: shared.host.clone(),
            suspicion_ns: nanoseconds(shared.settings.failover.suspicion_timeout),
            retry_ns: 100_000_000,
            mute_ns_max: nanoseconds(shared.settings.failover.mute_limit),
            hello_wait_ns: nanoseconds(shared.settings.witness_wait),
        };
        let backup = Backup::new(
            config,
            remembered,
            image_status,
            crate::seed()?,
            shared.clock.now(),
        );
        shared.starts.add(vm, vm_limits.priority);
        let store = self.start_store(vm, image, guest, &events, &status)?;
        let weak_store = store.weak();
        let (witness, requests) = mpsc::channel(REQUESTS_MAX);
        tokio::spawn(ask_witness(shared.witness.clone(), requests, events.clone()));
        let driver = VmDriver {
            backup,
            inbox: inputs,
            events,
            store,
            witness,
            session: None,
            asking: Vec::new(),
            limits: vm_limits,
            starts: shared.starts.clone(),
            heard: std::time::Instant::now(),
            image_bytes: Arc::clone(&image_bytes),
            accepted_bytes: known,
            status: Arc::clone(&status),
            clock: shared.clock,
            acked: Cell::new(Epoch::NONE),
            remembered: Arc::new(Mutex::new(record_file)),
        };
        let parts = Parts {
            store: driver.store.store(),
            starts: shared.starts.clone(),
            driver,
            status: Arc::clone(&status),
            pause,
        };
        parts.run(self.clone());
        Ok(VmHandle {
            inbox,
            status,
            limits: vm_limits,
            image_bytes,
            store: weak_store,
        })
    }

    /// The guest that an earlier life of the agent activated, if it did. An activation that it did not live to see through
    /// gives the image back, to be activated again as the record says.
    fn find_guest(&self, vm: &VmId, image: &mut VmImage, status: &VmStatus) -> Guest {
        let settings = &self.shared.settings;
        let mut guest = Guest::new(GuestConfig {
            vm: vm.clone(),
            standby: settings.limits_of(vm).standby,
            standbys: Standbys {
                vmms: settings.vmm.clone(),
            },
            launcher: place::launcher(settings.standby_units, vm),
            bridge: settings.bridge.clone(),
            verify_activation: settings.verify_activation,
            // No VM's name begins with a dot, so this is taken for no image.
            run_dir: settings.image_dir.join(format!(".run-{vm}")),
        });
        if image.status() != ImageStatus::Consumed {
            status.set_standby("none", None);
            return guest;
        }
        let found = guest.adopt(image).and_then(|runs| {
            if runs {
                status.set_standby("active", guest.pid());
            } else {
                status.set_standby("none", None);
            }
            if !runs && image.reclaim()? {
                info!(
                    event = "activation_undone",
                    vm = vm.as_str(),
                    "no guest has run from the image: it can be activated"
                );
                status.event("activation_undone", &serde_json::json!({}));
            }
            Ok(())
        });
        if let Err(error) = found {
            let error = format!("{error:#}");
            warn!(event = "guest_not_found", vm = vm.as_str(), error);
            status.set_detail(format!(
                "whether a guest runs from the consumed image is not known: {error}"
            ));
        }
        guest
    }

    fn start_store(
        &self,
        vm: &VmId,
        image: VmImage,
        guest: Guest,
        events: &EventSink,
        status: &Arc<VmStatus>,
    ) -> anyhow::Result<StoreSender> {
        let (sender, jobs) = store_channel();
        let store = Arc::new(Mutex::new(Store {
            own_jobs: sender.downgrade(),
            events: events.clone(),
            image,
            guest,
            receiver: None,
            unapplied: None,
            status: Arc::clone(status),
            huge_pages: self.shared.settings.huge_pages,
            activation_retries_max: self.shared.settings.activation_retries_max,
            starts: self.shared.starts.clone(),
            vm: vm.clone(),
        }));
        let sender = StoreSender::new(sender, Arc::clone(&store));
        std::thread::Builder::new()
            .name(format!("store-{vm}"))
            .spawn(move || Store::run(&store, jobs))?;
        Ok(sender)
    }

    /// Ends the standbys that wait, of all VMs at once. One whose store is busy for too long is left to the agent's next life.
    pub async fn dismiss_standbys(&self) {
        let mut waits = Vec::new();
        for handle in self.lock().values() {
            let (done, wait) = oneshot::channel();
            let store = handle.store.upgrade();
            if store.is_some_and(|store| store.try_send(StoreJob::DismissStandby(done)).is_ok()) {
                waits.push(wait);
            }
        }
        let all = async {
            for wait in waits {
                let _ = wait.await;
            }
        };
        if tokio::time::timeout(DISMISS_AT_MOST, all).await.is_err() {
            warn!("not every standby that waits could be ended: the agent's next start does that");
        }
    }

    /// Where refused connections are counted.
    pub fn refused_count(&self) -> &RefusedCount {
        &self.refused
    }

    /// The statuses, by name.
    pub fn statuses(&self) -> Vec<Arc<VmStatus>> {
        self.lock()
            .values()
            .map(|handle| Arc::clone(&handle.status))
            .collect()
    }

    /// Gives a VM up that is not protected to here: removes its image, its waiting standby, what is remembered of it, and its
    /// place. With `force` also one that this host might have to take over, or did.
    ///
    /// # Errors
    /// [`ForgetError`]; nothing is removed then, or some of it and it may be tried again.
    pub async fn forget(&self, vm: &VmId, force: bool) -> Result<(), ForgetError> {
        let handle = self.lock().get(vm).cloned();
        let Some(handle) = handle else {
            return Err(ForgetError::Unknown(vm.clone()));
        };
        if !force {
            self.check_not_named(vm).await?;
        }
        let (done, wait) = oneshot::channel();
        let given_up = || {
            ForgetError::Refused(format!(
                "the agent has given {vm} up and begins with it again: try again soon"
            ))
        };
        let asked = handle.inbox.send(Input::Forget { force, done }).await;
        asked.map_err(|_| given_up())?;
        wait.await
            .map_err(|_| given_up())?
            .map_err(ForgetError::Refused)?;
        handle.inbox.closed().await;
        self.ended(vm);
        info!(event = "forgotten", vm = vm.as_str());
        Ok(())
    }

    /// The VM's driver has forgotten it. Until here a hello finds a driver that has ended, is refused, and comes again.
    pub fn ended(&self, vm: &VmId) {
        let mut vms = self.lock();
        // It may be here anew.
        if vms.get(vm).is_some_and(|handle| handle.inbox.is_closed()) {
            vms.remove(vm);
            self.shared.starts.remove(vm);
        }
    }

    /// The witness's record must not name this host.
    async fn check_not_named(&self, vm: &VmId) -> Result<(), ForgetError> {
        let read = tokio::time::timeout(self.shared.settings.witness_wait, self.read_record(vm)).await;
        let answer = match read {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => {
                return Err(ForgetError::Refused(
                    "the witness does not say who runs the VM: try again, or with force".into(),
                ));
            }
        };
        let named = match &answer {
            Answer::Current(record) => match &record.mode {
                Mode::Alone { host } => *host == self.shared.host,
                Mode::Paired { primary, backup, .. } => {
                    *primary == self.shared.host || *backup == self.shared.host
                }
                Mode::Ended => false,
            },
            _ => false,
        };
        if named {
            return Err(ForgetError::Refused(
                "the witness's record names this host for the VM: what is here may be its last copy".into(),
            ));
        }
        Ok(())
    }

    /// Gives an order to a VM's driver; `false` when there is no such VM.
    pub async fn order(&self, vm: &VmId, order: BackupOrder) -> bool {
        let Some(inbox) = self.lock().get(vm).map(|handle| handle.inbox.clone()) else {
            return false;
        };
        inbox.send(Input::Event(BackupEvent::Order(order))).await.is_ok()
    }
}

async fn ask_witness(client: WitnessClient, mut requests: mpsc::Receiver<WitnessRequest>, events: EventSink) {
    while let Some(request) = requests.recv().await {
        match client.ask(request).await {
            Ok(reply) => events.send_async(BackupEvent::Witness(reply)).await,
            Err(error) => debug!(%error, "the witness did not answer"),
        }
    }
}

/// Makes a folder that only we may enter, or checks that one which is there is such a folder: it lies where everybody
/// may make folders, and guests' memory goes into it.
fn private_folder(dir: &Path) -> anyhow::Result<()> {
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("could not make {}", parent.display()))?;
    }
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("could not make {}", dir.display()));
        }
        _ => {}
    }
    let found = std::fs::symlink_metadata(dir)?;
    anyhow::ensure!(
        found.is_dir() && found.uid() == rustix::process::geteuid().as_raw(),
        "{} must be a folder of this user: remove it, or name another with --image-dir",
        dir.display()
    );
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    Ok(())
}

fn nanoseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
