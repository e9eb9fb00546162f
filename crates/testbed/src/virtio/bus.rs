//! The machine's virtio devices: registers for the vCPUs, queues for the I/O thread, one lock for both.
//!
//! **Standing still.** Requests are served only by the I/O thread, each from beginning to end under the lock, and not
//! while [`Bus::quiesce`] holds. So after `quiesce` no request is half done, nothing of the devices writes guest memory,
//! and nothing is kept outside guest memory and [`Bus::save`]. The vCPUs must have been stopped before.
//!
//! **What a checkpoint can't hold** is a doorbell or an interrupt on its way through an eventfd. So after a restore every
//! queue is looked at, and every live device raises its interrupt once: a driver must bear both (virtio 1.2, 2.7.13, 4.2.4).

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use romulus_guest_core::abi;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::{Backend, Served};
use super::chain;
use super::transport::{Effect, Transport, TransportError, TransportState};

/// Requests served before the next queue has its turn, and before one interrupt tells of them all.
const TURN_REQUESTS: usize = 64;
/// Version of the bytes that [`Bus::save`] writes.
const STATE_VERSION: u16 = 1;

/// A device and what connects it with KVM.
struct Slot<M> {
    transport: Transport,
    backend: Box<dyn Backend<M>>,
    kicks: Vec<Arc<EventFd>>,
    interrupt: Arc<EventFd>,
}

struct Devices<M> {
    slots: Vec<Slot<M>>,
    memory: M,
    quiet: bool,
    restored: bool,
    ending: bool,
}

/// The devices of a machine, shared by vCPUs, I/O thread and whoever takes checkpoints.
pub struct Bus<M> {
    devices: Mutex<Devices<M>>,
    /// Set before the lock is asked for, so that the I/O thread leaves its turn early.
    quiescing: AtomicBool,
    let_go: Condvar,
    /// Wakes the I/O thread to look at every queue.
    look: EventFd,
}

/// What the I/O thread waits for on behalf of one device.
pub struct Wakes {
    /// One doorbell a queue.
    pub kicks: Vec<Arc<EventFd>>,
    /// Raises the device's interrupt.
    pub interrupt: Arc<EventFd>,
}

/// Why saved devices could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// Not what [`Bus::save`] writes.
    #[error("the devices' state can't be read: {0}")]
    Bytes(#[from] postcard::Error),
    /// Written by a VMM of another version.
    #[error(
        "the devices' state has version {got}, this VMM reads {STATE_VERSION}: use the same VMM on both hosts"
    )]
    Version {
        /// The version found.
        got: u16,
    },
    /// Another number of devices.
    #[error("the state has {got} devices, this machine {want}")]
    Count {
        /// Devices in the state.
        got: usize,
        /// Devices of this machine.
        want: usize,
    },
    /// One of them does not fit.
    #[error("device {index}: {source}")]
    Device {
        /// Which one, from 0.
        index: usize,
        /// What does not fit.
        source: TransportError,
    },
}

#[derive(Serialize, Deserialize)]
struct SavedDevices {
    version: u16,
    devices: Vec<TransportState>,
}

impl<M: GuestMemory + Send> Bus<M> {
    /// A bus with `backends` in the order of their addresses, on `memory`. It is quiet until [`Bus::unquiesce`].
    ///
    /// # Errors
    /// The error of `eventfd`.
    pub fn new(memory: M, backends: Vec<Box<dyn Backend<M>>>) -> std::io::Result<Self> {
        let slots = backends.into_iter().map(Slot::new).collect::<Result<_, _>>()?;
        Ok(Bus {
            devices: Mutex::new(Devices {
                slots,
                memory,
                quiet: true,
                restored: false,
                ending: false,
            }),
            quiescing: AtomicBool::new(true),
            let_go: Condvar::new(),
            look: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Devices<M>> {
        self.devices
            .lock()
            .expect("a device panicked: its state can't be trusted")
    }

    /// What connects each device with KVM and the I/O thread.
    #[must_use]
    pub fn wakes(&self) -> Vec<Wakes> {
        let devices = self.lock();
        let wakes = |slot: &Slot<M>| Wakes {
            kicks: slot.kicks.clone(),
            interrupt: slot.interrupt.clone(),
        };
        devices.slots.iter().map(wakes).collect()
    }

    /// What [`Bus::wakes`] is to the guest, this is to the host: see [`Backend::input`]. `visit` gets device and descriptor.
    ///
    /// # Errors
    /// The first error of `visit`.
    pub fn for_each_input<E>(
        &self,
        mut visit: impl FnMut(usize, BorrowedFd<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for (index, slot) in self.lock().slots.iter().enumerate() {
            if let Some(input) = slot.backend.input() {
                visit(index, input)?;
            }
        }
        Ok(())
    }

    /// Becomes readable when every queue has to be looked at, or [`Bus::end`] was called.
    #[must_use]
    pub fn look(&self) -> &EventFd {
        &self.look
    }

    fn look_at_all(&self) {
        // It fails only when it is at its maximum, and then it is readable anyway.
        let _ = self.look.write(1);
    }

    /// A vCPU reads a device's register or configuration. Everything that is no register reads as 0.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((index, offset)) = locate(address) else {
            return;
        };
        let devices = self.lock();
        let Some(slot) = devices.slots.get(index) else {
            return;
        };
        match offset.checked_sub(reg::VIRTIO_MMIO_CONFIG) {
            Some(at) => {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                let rest = slot.backend.config().get(at..).unwrap_or_default();
                data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
            }
            None => {
                if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
                    *word = slot.transport.read(offset).to_le_bytes();
                }
            }
        }
    }

    /// A vCPU writes a device's register. What is not a whole register is ignored.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        let Some((index, offset)) = locate(address) else {
            return;
        };
        let Ok(word) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let mut guard = self.lock();
        let devices = &mut *guard;
        let Some(slot) = devices.slots.get_mut(index) else {
            return;
        };
        let effect = slot
            .transport
            .write(offset, u32::from_le_bytes(word), &devices.memory);
        drop(guard);
        if effect == Effect::Notified {
            self.look_at_all();
        }
    }

    /// Gives one queue its turn; waits first while the bus is quiet. True: there may be more to do for it. `None`: the
    /// bus has ended.
    #[must_use]
    pub fn turn(&self, device: usize, queue: usize) -> Option<bool> {
        let mut guard = self.lock();
        // Also while somebody waits for the lock to make the bus quiet: whoever has just released it is faster.
        while self.quiescing.load(Ordering::Acquire) && !guard.ending {
            guard = self
                .let_go
                .wait(guard)
                .expect("a device panicked: its state can't be trusted");
        }
        if guard.ending {
            return None;
        }
        let devices = &mut *guard;
        let slot = devices.slots.get_mut(device)?;
        Some(slot.turn(device, queue, &devices.memory, &self.quiescing))
    }

    /// Lets the devices finish what they have begun, and holds them. The vCPUs stand still already.
    pub fn quiesce(&self) {
        self.quiescing.store(true, Ordering::Release);
        self.lock().quiet = true;
    }

    /// Lets the devices go on.
    pub fn unquiesce(&self) {
        let mut devices = self.lock();
        self.quiescing.store(false, Ordering::Release);
        devices.quiet = false;
        if std::mem::take(&mut devices.restored) {
            devices
                .slots
                .iter_mut()
                .filter(|slot| slot.transport.live())
                .for_each(Slot::interrupt);
            self.look_at_all();
        }
        drop(devices);
        self.let_go.notify_all();
    }

    /// Ends the I/O thread's waiting for good.
    pub fn end(&self) {
        self.lock().ending = true;
        self.let_go.notify_all();
        self.look_at_all();
    }

    /// Back to how all devices began, as after a reset of the machine.
    pub fn reset(&self) {
        self.lock()
            .slots
            .iter_mut()
            .for_each(|slot| slot.transport.reset());
    }

    /// Appends what another process needs to go on. Only while the bus is quiet.
    ///
    /// # Panics
    /// When the bus is not quiet.
    pub fn save(&self, into: &mut Vec<u8>) {
        let devices = self.lock();
        assert!(devices.quiet, "devices are saved only while they stand still");
        let saved = SavedDevices {
            version: STATE_VERSION,
            devices: devices.slots.iter().map(|slot| slot.transport.save()).collect(),
        };
        let bytes = postcard::to_stdvec(&saved).expect("plain numbers can be written into memory");
        into.extend_from_slice(&bytes);
    }

    /// Takes over what [`Bus::save`] wrote. The bus is quiet afterwards, until [`Bus::unquiesce`].
    ///
    /// # Errors
    /// [`DevicesError`] when the bytes are not of such a machine; the devices are to be reset then.
    pub fn restore(&self, state: &[u8]) -> Result<(), DevicesError> {
        self.quiesce();
        // The version comes first, so that it can be read whatever follows.
        let (got, _) = postcard::take_from_bytes::<u16>(state)?;
        if got != STATE_VERSION {
            return Err(DevicesError::Version { got });
        }
        let saved: SavedDevices = postcard::from_bytes(state)?;
        let mut guard = self.lock();
        let devices = &mut *guard;
        let (got, want) = (saved.devices.len(), devices.slots.len());
        if got != want {
            return Err(DevicesError::Count { got, want });
        }
        for (index, (slot, state)) in devices.slots.iter_mut().zip(&saved.devices).enumerate() {
            slot.transport
                .restore(state, &devices.memory)
                .map_err(|source| DevicesError::Device { index, source })?;
        }
        devices.restored = true;
        Ok(())
    }
}

impl<M: GuestMemory> Slot<M> {
    fn new(backend: Box<dyn Backend<M>>) -> std::io::Result<Self> {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let kicks = (0..backend.queue_count())
            .map(|_| eventfd())
            .collect::<Result<_, _>>()?;
        let transport = Transport::new(backend.virtio_id(), backend.features(), backend.queue_count());
        Ok(Slot {
            transport,
            backend,
            kicks,
            interrupt: eventfd()?,
        })
    }

    fn interrupt(&mut self) {
        self.transport.note_used();
        // It fails only when the counter is full, and then an interrupt is on its way.
        let _ = self.interrupt.write(1);
    }

    fn turn(&mut self, device: usize, index: usize, memory: &M, leave: &AtomicBool) -> bool {
        let Some(queue) = self.transport.live_queue(index) else {
            return false;
        };
        let mut used = false;
        let mut more = true;
        let mut fault = None;
        for _ in 0..TURN_REQUESTS {
            match self.backend.serve(index, queue, memory) {
                Ok(Served::Answered) => used = true,
                Ok(Served::Dropped) => {}
                Ok(Served::NoRequest | Served::NoInput) => {
                    more = false;
                    break;
                }
                Err(error) => {
                    fault = Some(error);
                    break;
                }
            }
            if leave.load(Ordering::Acquire) {
                break;
            }
        }
        let wanted = match chain::wants_interrupt(queue, memory) {
            Ok(wanted) => used && wanted,
            Err(error) => {
                fault.get_or_insert(error);
                false
            }
        };
        if let Some(error) = fault {
            // Said once: a device out of order serves nothing before its reset.
            tracing::warn!(device, queue = index, %error, "the guest's driver is wrong: the device needs a reset");
            self.transport.need_reset();
            more = false;
        }
        if wanted || !self.transport.live() {
            self.interrupt();
        }
        more
    }
}

/// Which device an address belongs to, and where in its registers it lies.
fn locate(address: u64) -> Option<(usize, u32)> {
    let distance = address.checked_sub(abi::VIRTIO_MMIO)?;
    let index = usize::try_from(distance / abi::VIRTIO_MMIO_STRIDE).ok()?;
    let offset = u32::try_from(distance % abi::VIRTIO_MMIO_STRIDE).ok()?;
    Some((index, offset))
}

#[cfg(test)]
#[path = "bus_tests.rs"]
mod tests;
