//! Where the devices are: addresses, doorbells, interrupts.
//!
//! A doorbell is an ioeventfd on the register that the driver writes the queue's number to, so that no vCPU leaves the
//! guest for it. An interrupt is an irqfd that KVM turns into a message to vCPU 0's local APIC.

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use romulus_guest_core::abi;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;

use crate::config::MachineConfig;
use crate::error::KvmCall;
use crate::virtio::bus::Wakes;
use crate::virtio::{blk, net};

/// First interrupt line of the devices: behind those of the interrupt chips.
const FIRST_GSI: u32 = 24;
/// Address of a message to the local APIC of vCPU 0 (Intel SDM 3A, 11.11.1).
const MSI_ADDRESS: u32 = 0xfee0_0000;

fn gsi(index: u32) -> u32 {
    FIRST_GSI + index
}

fn vector(index: u32) -> u32 {
    u32::from(abi::DEVICE_VECTOR) + index
}

fn address(index: u32) -> u64 {
    abi::VIRTIO_MMIO + u64::from(index) * abi::VIRTIO_MMIO_STRIDE
}

/// What the guest is told of its devices: network cards first, then disks.
#[must_use]
pub fn devices(config: &MachineConfig) -> Vec<abi::Device> {
    let kinds = config
        .nics
        .iter()
        .map(|_| net::VIRTIO_ID)
        .chain(config.disks.iter().map(|_| blk::VIRTIO_ID));
    let device = |(index, virtio_id)| abi::Device {
        virtio_id,
        vector: vector(index),
        mmio: address(index),
        gsi: gsi(index),
    };
    (0..).zip(kinds).map(device).collect()
}

/// Connects the doorbells and interrupts of all devices with KVM.
///
/// # Errors
/// The kernel's.
pub fn connect(vm: &VmFd, devices: &[Wakes]) -> Result<(), KvmCall> {
    let routes: Vec<_> = (0..).zip(devices).map(|(index, _)| route(index)).collect();
    if routes.is_empty() {
        return Ok(());
    }
    let routes = KvmIrqRouting::from_entries(&routes).expect("four devices are within every limit");
    KvmCall::of("KVM_SET_GSI_ROUTING", vm.set_gsi_routing(&routes))?;
    for (index, device) in (0u32..).zip(devices) {
        let doorbell = IoEventAddress::Mmio(address(index) + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        for (queue, kick) in (0u32..).zip(&device.kicks) {
            KvmCall::of("KVM_IOEVENTFD", vm.register_ioevent(kick, &doorbell, queue))?;
        }
        KvmCall::of("KVM_IRQFD", vm.register_irqfd(&device.interrupt, gsi(index)))?;
    }
    Ok(())
}

fn route(index: u32) -> kvm_irq_routing_entry {
    let message = kvm_irq_routing_msi {
        address_lo: MSI_ADDRESS,
        data: vector(index),
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi: gsi(index),
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi: message },
        ..Default::default()
    }
}
