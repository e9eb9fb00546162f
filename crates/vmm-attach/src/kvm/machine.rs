//! A whole machine over KVM, as the server wants it: [`Machine`] from run control, state, tracking and memory, and the
//! author's devices.
//!
//! Order of stopping: vCPUs, then devices, so that what a vCPU began is seen by its device, and what a device completes
//! reaches the interrupt chips before they are saved. Order of going on: devices, then vCPUs.

use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_ioctls::VmFd;
use romulus_host_sys::monotonic_ns;

use super::blob::{Blob, BlobWriter, DEVICE_BYTES_MAX, Kind};
use super::{DirtyTracker, Moment, SharedPages, StateSaver, Vcpus};
use crate::memory::GuestRam;
use crate::proto::MachineInfo;
use crate::server::{Description, Machine, MachineError, StateWriter, Stopped};

/// A failure of the author's own code.
pub type DeviceError = Box<dyn Error + Send + Sync>;

/// The author's devices: everything of the machine that neither the kernel nor guest memory holds. Devices begin quiet.
pub trait DeviceState: Send {
    /// Stands still: on return no request is half done, nothing writes guest memory, raises an interrupt or sends
    /// anything, and every interrupt that was raised has reached the kernel. The vCPUs stand still already.
    fn quiesce(&mut self);

    /// Appends what a restore needs, at most [`DEVICE_BYTES_MAX`] bytes. Called while quiet; must not write guest memory.
    fn save(&mut self, into: &mut Vec<u8>);

    /// Takes over what [`DeviceState::save`] wrote, while quiet. Guest memory is that of the checkpoint, and must not be written yet.
    ///
    /// # Errors
    /// What is wrong with it: the bytes come from another process.
    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError>;

    /// Works on. After a restore: doorbells and interrupts that were on their way when the state was saved are lost, so
    /// each device looks at its queues and raises one interrupt. The vCPUs run after this.
    fn unquiesce(&mut self);
}

/// What a machine is made of. The vCPUs stand still, the devices are quiet.
pub struct KvmParts<D> {
    /// The vCPUs.
    pub vcpus: Vcpus,
    /// The author's devices.
    pub devices: D,
    /// Dirty tracking; has the VM's memory slots.
    pub tracker: DirtyTracker,
    /// Saves and restores what the kernel holds.
    pub saver: StateSaver,
    /// The VM.
    pub vm: Arc<VmFd>,
    /// Guest memory.
    pub ram: GuestRam,
    /// What the machine is. Number of vCPUs, memory and tracking are filled in.
    pub info: MachineInfo,
}

/// How long a machine may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmLimits {
    /// For all vCPUs to stop.
    pub stop: Duration,
    /// For a vCPU to enter the guest when the machine is activated.
    pub entry: Duration,
}

impl Default for KvmLimits {
    fn default() -> Self {
        Self {
            stop: Duration::from_secs(1),
            entry: Duration::from_secs(5),
        }
    }
}

/// Builds a standby's machine, as described, on the memory that is given, which is that of an image: nothing may write it. The kernel
/// does when a vCPU's clock is switched on (`MSR_KVM_SYSTEM_TIME`); that is left to the activation.
pub type Build<D> = dyn Fn(&MachineInfo, GuestRam) -> Result<KvmParts<D>, DeviceError> + Send + Sync;

/// A machine over KVM, to be served.
pub struct KvmMachine<D> {
    state: Mutex<State<D>>,
    build: Option<Box<Build<D>>>,
    limits: KvmLimits,
}

struct State<D> {
    live: Option<Live<D>>,
    /// The saved state; kept, so that a checkpoint allocates nothing.
    blob: Vec<u8>,
    /// The machine stands still because the server said so, or has not been activated.
    held: bool,
}

/// [`KvmParts`], with the tracker shared with the vCPUs' threads. In this order: the threads end before the memory goes.
struct Live<D> {
    vcpus: Vcpus,
    devices: D,
    tracker: Arc<Mutex<DirtyTracker>>,
    saver: StateSaver,
    vm: Arc<VmFd>,
    ram: GuestRam,
    info: MachineInfo,
    /// Its memory is its own: a trial, of which nothing is kept.
    private: bool,
    /// What a restore has left to the activation, of each vCPU.
    shared_pages: Vec<SharedPages>,
}

/// A machine that stands still, in the hands of the VMM ([`KvmMachine::exclusively`]).
pub struct Exclusive<'a, D> {
    /// The vCPUs.
    pub vcpus: &'a Vcpus,
    /// The author's devices, quiet.
    pub devices: &'a mut D,
    /// The VM.
    pub vm: &'a VmFd,
    /// Guest memory.
    pub ram: &'a GuestRam,
}

impl<D: DeviceState> KvmMachine<D> {
    /// A machine that the VMM runs itself: it stands still until [`KvmMachine::start`].
    pub fn new(parts: KvmParts<D>, limits: KvmLimits) -> Self {
        Self::with(Some(Live::new(parts, false)), None, limits)
    }

    /// No machine yet: `build` is called when a client prepares one.
    pub fn standby(build: Box<Build<D>>, limits: KvmLimits) -> Self {
        Self::with(None, Some(build), limits)
    }

    fn with(live: Option<Live<D>>, build: Option<Box<Build<D>>>, limits: KvmLimits) -> Self {
        let state = State {
            live,
            blob: Vec::new(),
            held: true,
        };
        Self {
            state: Mutex::new(state),
            build,
            limits,
        }
    }

    /// Lets a machine of the VMM's own run for the first time.
    ///
    /// # Errors
    /// When there is no machine.
    pub fn start(&self) -> Result<(), MachineError> {
        let mut state = self.lock();
        state.live()?.go();
        state.held = false;
        Ok(())
    }

    /// Stops the machine, lets the VMM change it (a reset, a changed device), and lets it run again, unless it was standing
    /// still for the server. Meanwhile the server waits. Never from a handler of exits or a device's thread: they are waited for.
    ///
    /// # Errors
    /// When there is no machine, or a vCPU does not stop; then it runs on.
    pub fn exclusively<R>(&self, change: impl FnOnce(Exclusive<'_, D>) -> R) -> Result<R, MachineError> {
        let mut state = self.lock();
        let held = state.held;
        let live = state.live()?;
        if !held {
            live.stop(self.limits.stop)?;
        }
        let result = change(Exclusive {
            vcpus: &live.vcpus,
            devices: &mut live.devices,
            vm: &live.vm,
            ram: &live.ram,
        });
        if !held {
            live.go();
        }
        Ok(result)
    }

    fn lock(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D> State<D> {
    fn live(&mut self) -> Result<&mut Live<D>, MachineError> {
        self.live
            .as_mut()
            .ok_or_else(|| MachineError::new("there is no machine yet; prepare it first"))
    }
}

impl<D: DeviceState> Live<D> {
    fn new(parts: KvmParts<D>, private: bool) -> Self {
        let mut info = parts.info;
        info.vcpus = u16::try_from(parts.vcpus.count()).expect("KVM has fewer vCPUs");
        info.regions = parts.ram.regions().to_vec();
        info.tracking = parts.tracker.mode();
        let tracker = Arc::new(Mutex::new(parts.tracker));
        let (rings, bitmap) = (Arc::clone(&tracker), parts.ram.bitmap().clone());
        parts.vcpus.on_ring_full(Box::new(move || {
            let mut tracker = rings.lock().unwrap_or_else(PoisonError::into_inner);
            // A failed harvest is told to the client at its next one: it has to begin afresh.
            if let Err(error) = tracker.harvest(Moment::Live, &bitmap) {
                tracing::warn!(%error, "a full dirty ring could not be harvested");
                tracker.drain();
            }
        }));
        Self {
            vcpus: parts.vcpus,
            devices: parts.devices,
            tracker,
            saver: parts.saver,
            vm: parts.vm,
            ram: parts.ram,
            info,
            private,
            shared_pages: Vec::new(),
        }
    }

    fn stop(&mut self, limit: Duration) -> Result<Stopped, MachineError> {
        let started = monotonic_ns();
        self.vcpus
            .stop(limit)
            .map_err(|error| MachineError::because("the vCPUs did not stop", error))?;
        self.devices.quiesce();
        let stopped_at_ns = monotonic_ns();
        Ok(Stopped {
            stopped_at_ns,
            kick_ns: stopped_at_ns - started,
        })
    }

    fn go(&mut self) -> u64 {
        // Done already, unless the pause ended before its state was saved.
        if let Err(error) = self.tracker().protect() {
            // The client is told at its next harvest: it has to begin afresh.
            tracing::warn!(%error, "dirty pages could not be protected again");
        }
        self.devices.unquiesce();
        self.vcpus.run()
    }

    fn tracker(&self) -> MutexGuard<'_, DirtyTracker> {
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&mut self, blob: &mut Vec<u8>) -> Result<(), DeviceError> {
        let mut out = BlobWriter::begin(blob, self.info.vcpus);
        for index in 0..self.info.vcpus {
            let (saver, vm) = (&mut self.saver, &self.vm);
            let delivered = self.vcpus.timer_delivered(usize::from(index));
            let save = |fd: &_| saver.save_vcpu(vm, index, fd, delivered, &mut out);
            self.vcpus.with(usize::from(index), save)??;
        }
        self.saver.save_vm(&self.vm, &mut out)?;
        let bytes = out.section_with(Kind::Devices, 0, |out| {
            let start = out.len();
            self.devices.save(out);
            out.len() - start
        });
        if bytes > DEVICE_BYTES_MAX {
            return Err(format!("the devices saved {bytes} bytes, {DEVICE_BYTES_MAX} are allowed").into());
        }
        Ok(out.finish()?)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let blob = Blob::parse(state)?;
        if blob.vcpus() != self.info.vcpus {
            return Err(Box::new(super::StateError::VcpuCount {
                state: usize::from(blob.vcpus()),
                machine: usize::from(self.info.vcpus),
            }));
        }
        self.shared_pages.clear();
        let step = self.saver.restore_clock(&self.vm, &blob)?;
        for index in 0..self.info.vcpus {
            let (saver, vm) = (&self.saver, &self.vm);
            let restore = |fd: &_| saver.restore_vcpu(vm, index, fd, &blob, &step);
            let pages = self.vcpus.with(usize::from(index), restore)??;
            self.shared_pages.push(pages);
        }
        self.saver.restore_chips(&self.vm, &blob)?;
        self.devices.restore(blob.section(Kind::Devices, 0)?)?;
        if self.private {
            // It is never activated, and is to show that this host takes all of the state.
            self.share_pages()?;
        }
        Ok(())
    }

    /// Has the kernel write guest memory from here on, as the guest's state says.
    fn share_pages(&self) -> Result<(), DeviceError> {
        for (index, pages) in self.shared_pages.iter().enumerate() {
            self.vcpus.with(index, |fd| self.saver.share_pages(fd, pages))??;
        }
        Ok(())
    }
}

impl<D: DeviceState> Machine for KvmMachine<D> {
    fn describe(&self) -> Result<Description, MachineError> {
        let mut state = self.lock();
        let live = state.live()?;
        let copy = |fd: std::os::fd::BorrowedFd<'_>| {
            fd.try_clone_to_owned()
                .map_err(|error| MachineError::because("no file descriptor is left", error))
        };
        Ok(Description {
            info: live.info.clone(),
            regions: live.ram.files().map(copy).collect::<Result<_, _>>()?,
            bitmap: Some(copy(live.ram.bitmap().file())?),
        })
    }

    fn arm(&self) -> Result<(), MachineError> {
        let mut state = self.lock();
        let live = state.live()?;
        // Before tracking begins: what devices write from here on is told of.
        live.ram.bitmap().clear();
        let armed = live.tracker().arm();
        armed.map_err(|error| MachineError::because("dirty tracking could not be armed", error))
    }

    fn disarm(&self) {
        let mut state = self.lock();
        if let Ok(live) = state.live()
            && let Err(error) = live.tracker().disarm()
        {
            tracing::warn!(%error, "dirty tracking could not be switched off; the guest runs on, a little slower");
        }
    }

    fn harvest(&self) -> Result<u64, MachineError> {
        let mut state = self.lock();
        let held = state.held;
        let live = state.live()?;
        let harvested = if held {
            // It has stood still since the last harvest of this pause, if there was one.
            let protected = live.tracker().protect();
            protected.and_then(|()| live.tracker().harvest_still(live.ram.bitmap()))
        } else {
            live.tracker().harvest(Moment::Live, live.ram.bitmap())
        };
        harvested.map_err(|error| {
            MachineError::because(
                "the dirty pages could not be harvested; arm tracking again and copy everything",
                error,
            )
        })?;
        Ok(live.ram.bitmap().count())
    }

    fn pause(&self) -> Result<Stopped, MachineError> {
        let mut state = self.lock();
        if state.held {
            return Ok(Stopped {
                stopped_at_ns: monotonic_ns(),
                kick_ns: 0,
            });
        }
        let stopped = state.live()?.stop(self.limits.stop)?;
        state.held = true;
        Ok(stopped)
    }

    fn save(&self, into: &mut StateWriter<'_>) -> Result<(), MachineError> {
        let mut state = self.lock();
        // While the client copies what the harvest told of.
        let protected = state.live()?.tracker().protect();
        protected.map_err(|error| {
            MachineError::because(
                "the dirty pages could not be protected again; arm tracking again and copy everything",
                error,
            )
        })?;
        let mut blob = std::mem::take(&mut state.blob);
        let saved = state.live()?.save(&mut blob);
        let put = saved
            .map_err(|error| MachineError::because("the machine's state could not be saved", error))
            .and_then(|()| into.put(&blob));
        state.blob = blob;
        put
    }

    fn resume(&self) -> u64 {
        let mut state = self.lock();
        // Devices are not told to work on when they do.
        if !std::mem::take(&mut state.held) {
            return monotonic_ns();
        }
        state.live().map_or(0, Live::go)
    }

    fn prepare(&self, info: &MachineInfo, regions: Vec<OwnedFd>, private: bool) -> Result<(), MachineError> {
        let Some(build) = &self.build else {
            return Err(MachineError::unsupported("this VMM was not started as a standby"));
        };
        let ram = GuestRam::map(&info.regions, regions, private)
            .map_err(|error| MachineError::because("the memory cannot be used", error))?;
        let parts = build(info, ram)
            .map_err(|error| MachineError::because("the machine could not be built", error))?;
        let live = Live::new(parts, private);
        if live.info.vcpus != info.vcpus || live.info.regions != info.regions {
            return Err(MachineError::new(
                "the machine that was built is not the one that was described",
            ));
        }
        self.lock().live = Some(live);
        Ok(())
    }

    fn restore(&self, state: &[u8]) -> Result<(), MachineError> {
        let mut machine = self.lock();
        if !machine.held {
            return Err(MachineError::new(
                "the machine runs; a state is restored before that",
            ));
        }
        let restored = machine.live()?.restore(state);
        restored.map_err(|error| MachineError::because("the machine's state could not be restored", error))
    }

    fn activate(&self) -> Result<u64, MachineError> {
        let mut state = self.lock();
        let live = state.live()?;
        live.share_pages()
            .map_err(|error| MachineError::because("the guest's clock could not be switched on", error))?;
        live.devices.unquiesce();
        match live.vcpus.run_and_wait_entry(self.limits.entry) {
            Ok(entered) => {
                state.held = false;
                Ok(entered)
            }
            Err(error) => {
                live.stop(self.limits.stop)?;
                Err(MachineError::because("the guest was not entered", error))
            }
        }
    }
}
