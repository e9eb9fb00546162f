//! The registers of a virtio-mmio device (virtio 1.2, 4.2.2, version 2 only) and what they remember.
//!
//! ```text
//!   status:  0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK ─► (NEEDS_RESET) ─► 0
//!                                features may change      queues live   nothing is served
//! ```
//!
//! Nothing that a guest writes here fails: what makes no sense is not taken, and a queue whose rings are not in RAM
//! does not become ready. Queues are served between `DRIVER_OK` and a reset or a fault.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemory;

/// `virt` in ASCII, as the specification wants it.
const MAGIC: u32 = 0x7472_6976;
/// Version of the register layout.
const LAYOUT_VERSION: u32 = 2;
/// A vendor number of no vendor.
const VENDOR: u32 = 0x524f_4d55;
/// Entries that a queue may have.
pub const QUEUE_SIZE_MAX: u16 = 256;

/// What the driver has to be told to do after a write to a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// A queue has requests, or may be served from now on.
    Notified,
    /// The device was reset: it forgets what it had begun.
    Reset,
}

/// Registers and queues of one device.
#[derive(Debug)]
pub struct Transport {
    device_id: u32,
    features_offered: u64,
    features_driver: u64,
    features_selected: u32,
    driver_features_selected: u32,
    queue_selected: u32,
    status: u32,
    interrupt_status: u32,
    queues: Vec<Queue>,
}

/// What has to come over to another process for the device to go on. The queues' contents are in guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    device_id: u32,
    features_driver: u64,
    features_selected: u32,
    driver_features_selected: u32,
    queue_selected: u32,
    status: u32,
    interrupt_status: u32,
    queues: Vec<SavedQueue>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    size: u16,
    ready: bool,
    next_avail: u16,
    next_used: u16,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

/// Why a saved device does not fit this one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TransportError {
    /// Another kind of device, or another number of queues.
    #[error("the state is of a device of kind {got} with {queues} queues, this machine has kind {want} here")]
    Kind {
        /// Kind in the state.
        got: u32,
        /// Kind of this device.
        want: u32,
        /// Queues in the state.
        queues: usize,
    },
    /// Features that this device does not offer.
    #[error(
        "the state's driver uses features {0:#x} that this device does not offer: VMMs of different versions"
    )]
    Features(u64),
    /// A queue that no device can have.
    #[error("the state's queue {0} has an impossible size or address")]
    Queue(usize),
}

impl Transport {
    /// A device fresh from reset, of virtio's number `device_id`.
    ///
    /// # Panics
    /// Never: the queues' size is a power of two.
    #[must_use]
    pub fn new(device_id: u32, features: u64, queue_count: usize) -> Self {
        let queue = || Queue::new(QUEUE_SIZE_MAX).expect("a power of two");
        Transport {
            device_id,
            features_offered: features | 1 << VIRTIO_F_VERSION_1,
            features_driver: 0,
            features_selected: 0,
            driver_features_selected: 0,
            queue_selected: 0,
            status: 0,
            interrupt_status: 0,
            queues: (0..queue_count).map(|_| queue()).collect(),
        }
    }

    /// Whether requests may be served: the driver is ready and nothing has gone wrong.
    #[must_use]
    pub fn live(&self) -> bool {
        self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET) == VIRTIO_CONFIG_S_DRIVER_OK
    }

    /// The queue of that number when it may be served.
    pub fn live_queue(&mut self, index: usize) -> Option<&mut Queue> {
        let live = self.live();
        self.queues.get_mut(index).filter(|queue| live && queue.ready())
    }

    /// Says in the registers that the device has used a buffer.
    pub fn note_used(&mut self) {
        self.interrupt_status |= reg::VIRTIO_MMIO_INT_VRING;
    }

    /// Says in the registers that the device is out of order until the driver resets it.
    pub fn need_reset(&mut self) {
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.interrupt_status |= reg::VIRTIO_MMIO_INT_CONFIG;
    }

    /// Back to how the device began.
    pub fn reset(&mut self) {
        *self = Transport::new(self.device_id, self.features_offered, self.queues.len());
    }

    /// The register at `offset`, below the device's own configuration. Unknown ones read as 0.
    #[must_use]
    pub fn read(&self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => LAYOUT_VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device_id,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.features_offered, self.features_selected),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |queue| queue.max_size().into()),
            reg::VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |queue| queue.ready().into()),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status,
            reg::VIRTIO_MMIO_STATUS => self.status,
            _ => 0,
        }
    }

    /// Writes the register at `offset`; `memory` is what the queues must lie in.
    pub fn write<M: GuestMemory>(&mut self, offset: u32, value: u32, memory: &M) -> Effect {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.features_selected = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_selected = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_selected = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => return Effect::Notified,
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt_status &= !value,
            reg::VIRTIO_MMIO_STATUS => return self.set_status(value),
            reg::VIRTIO_MMIO_QUEUE_READY => self.set_ready(value, memory),
            _ => self.set_queue_field(offset, value),
        }
        Effect::None
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_selected).ok()?)
    }

    /// A driver may choose features until it has said that it is done.
    fn accept_features(&mut self, value: u32) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_features_selected {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let kept = self.features_driver & !(u64::from(u32::MAX) << shift);
        self.features_driver = kept | u64::from(value) << shift;
    }

    fn set_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        let mut next = value | self.status & VIRTIO_CONFIG_S_NEEDS_RESET;
        let asks = next & !self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if asks && !self.features_fit() {
            next &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if next & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            next &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status = next;
        if self.live() {
            Effect::Notified
        } else {
            Effect::None
        }
    }

    fn features_fit(&self) -> bool {
        let modern = self.features_driver & 1 << VIRTIO_F_VERSION_1 != 0;
        modern && self.features_driver & !self.features_offered == 0
    }

    /// Makes the selected queue ready, if its rings lie in RAM.
    fn set_ready<M: GuestMemory>(&mut self, value: u32, memory: &M) {
        let Some(queue) = selected_mut(&mut self.queues, self.queue_selected) else {
            return;
        };
        queue.set_ready(value == 1);
        if value == 1 && !queue.is_valid(memory) {
            queue.set_ready(false);
        }
    }

    /// Size and addresses, which can change only while the queue is not ready.
    fn set_queue_field(&mut self, offset: u32, value: u32) {
        let Some(queue) = selected_mut(&mut self.queues, self.queue_selected) else {
            return;
        };
        if queue.ready() {
            return;
        }
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => {
                // A size that is no power of two is not taken, and the driver finds its queue not working.
                let _ = u16::try_from(value).map(|size| queue.try_set_size(size));
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// What another process needs to go on.
    #[must_use]
    pub fn save(&self) -> TransportState {
        TransportState {
            device_id: self.device_id,
            features_driver: self.features_driver,
            features_selected: self.features_selected,
            driver_features_selected: self.driver_features_selected,
            queue_selected: self.queue_selected,
            status: self.status,
            interrupt_status: self.interrupt_status,
            queues: self
                .queues
                .iter()
                .map(|queue| SavedQueue::from(queue.state()))
                .collect(),
        }
    }

    /// Takes over what [`Transport::save`] gave; unchanged when it does not fit.
    ///
    /// # Errors
    /// [`TransportError`] when the state is of another device, or no device can have it.
    pub fn restore<M: GuestMemory>(
        &mut self,
        state: &TransportState,
        memory: &M,
    ) -> Result<(), TransportError> {
        if state.device_id != self.device_id || state.queues.len() != self.queues.len() {
            let (got, want) = (state.device_id, self.device_id);
            return Err(TransportError::Kind {
                got,
                want,
                queues: state.queues.len(),
            });
        }
        let unknown = state.features_driver & !self.features_offered;
        if unknown != 0 && state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return Err(TransportError::Features(unknown));
        }
        let mut queues = Vec::with_capacity(state.queues.len());
        for (index, saved) in state.queues.iter().enumerate() {
            let queue = Queue::try_from(QueueState::from(saved)).map_err(|_| TransportError::Queue(index))?;
            if queue.ready() && !queue.is_valid(memory) {
                return Err(TransportError::Queue(index));
            }
            queues.push(queue);
        }
        self.queues = queues;
        self.features_driver = state.features_driver;
        self.features_selected = state.features_selected;
        self.driver_features_selected = state.driver_features_selected;
        self.queue_selected = state.queue_selected;
        self.status = state.status;
        self.interrupt_status = state.interrupt_status;
        Ok(())
    }
}

fn selected_mut(queues: &mut [Queue], selected: u32) -> Option<&mut Queue> {
    queues.get_mut(usize::try_from(selected).ok()?)
}

/// One half of 64 feature bits; there are no others.
fn half(features: u64, selected: u32) -> u32 {
    let shifted = match selected {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        SavedQueue {
            size: state.size,
            ready: state.ready,
            next_avail: state.next_avail,
            next_used: state.next_used,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl From<&SavedQueue> for QueueState {
    fn from(saved: &SavedQueue) -> Self {
        QueueState {
            max_size: QUEUE_SIZE_MAX,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            event_idx_enabled: false,
            size: saved.size,
            ready: saved.ready,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        }
    }
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
