//! Registers of a vCPU that kvm-ioctls has no safe call for.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET};
use kvm_ioctls::VcpuFd;

use super::{ioctl, request};
use crate::SysError;

/// The size that the two XSAVE ioctls carry in their numbers: that of the struct without its flexible end.
const XSAVE_BASE_BYTES: usize = 4096;
/// A limit on what the kernel may say an XSAVE area takes. AMX, the largest so far, needs about 11 KiB.
const XSAVE_BYTES_MAX: usize = 64 << 10;

const KVM_GET_XSAVE2: u64 = request(2, 0xcf, XSAVE_BASE_BYTES);
const KVM_SET_XSAVE: u64 = request(1, 0xa5, XSAVE_BASE_BYTES);

/// `struct kvm_device_attr`.
#[repr(C)]
struct DeviceAttribute {
    flags: u32,
    group: u32,
    attribute: u64,
    address: u64,
}

const KVM_SET_DEVICE_ATTR: u64 = request(1, 0xe1, size_of::<DeviceAttribute>());
const KVM_GET_DEVICE_ATTR: u64 = request(1, 0xe2, size_of::<DeviceAttribute>());

fn xsave_bytes(vcpu_area: &[u8], area_bytes: usize) -> Result<(), SysError> {
    if vcpu_area.len() == area_bytes && (XSAVE_BASE_BYTES..=XSAVE_BYTES_MAX).contains(&area_bytes) {
        return Ok(());
    }
    Err(SysError::OutOfBounds {
        what: "an XSAVE area",
        offset: 0,
        bytes: vcpu_area.len() as u64,
        limit: area_bytes as u64,
    })
}

/// Reads a vCPU's FPU and vector registers. `area_bytes` is what `vm` says for `KVM_CAP_XSAVE2`.
///
/// # Errors
/// The kernel's; [`SysError::OutOfBounds`] when `into` has not exactly that length.
pub fn get_xsave(vm: &kvm_ioctls::VmFd, vcpu: &VcpuFd, into: &mut [u8]) -> Result<(), SysError> {
    xsave_bytes(into, xsave_area_bytes(vm))?;
    // SAFETY: the kernel writes as many bytes as it says for KVM_CAP_XSAVE2 of this VM, which is the length of
    // `into`; bytes have no alignment.
    let result = unsafe { ioctl("KVM_GET_XSAVE2", vcpu, KVM_GET_XSAVE2, into.as_mut_ptr() as u64) };
    result.map(drop)
}

/// Writes a vCPU's FPU and vector registers.
///
/// # Errors
/// As [`get_xsave`]; EINVAL when `area` has features that this host lacks.
pub fn set_xsave(vm: &kvm_ioctls::VmFd, vcpu: &VcpuFd, area: &[u8]) -> Result<(), SysError> {
    xsave_bytes(area, xsave_area_bytes(vm))?;
    // SAFETY: the kernel reads at most as many bytes as it says for KVM_CAP_XSAVE2 of this VM.
    let result = unsafe { ioctl("KVM_SET_XSAVE", vcpu, KVM_SET_XSAVE, area.as_ptr() as u64) };
    result.map(drop)
}

/// Bytes of an XSAVE area of this VM's vCPUs.
pub fn xsave_area_bytes(vm: &kvm_ioctls::VmFd) -> usize {
    usize::try_from(vm.check_extension_int(kvm_ioctls::Cap::Xsave2))
        .unwrap_or(0)
        .max(XSAVE_BASE_BYTES)
}

/// What is added to the host's TSC to make the guest's (`KVM_VCPU_TSC_OFFSET`, devices/vcpu.rst section 4.1).
///
/// # Errors
/// ENXIO or EINVAL when this kernel does not have it.
pub fn get_tsc_offset(vcpu: &VcpuFd) -> Result<u64, SysError> {
    let mut offset = 0u64;
    let argument = tsc_offset(&raw mut offset as u64);
    // SAFETY: the argument and the number it points to live through the call; the kernel writes eight bytes.
    let result = unsafe {
        ioctl(
            "KVM_GET_DEVICE_ATTR",
            vcpu,
            KVM_GET_DEVICE_ATTR,
            &raw const argument as u64,
        )
    };
    result.map(|_| offset)
}

/// Sets what [`get_tsc_offset`] reads.
///
/// # Errors
/// As there.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), SysError> {
    let argument = tsc_offset(&raw const offset as u64);
    // SAFETY: the argument and the number it points to live through the call; the kernel reads eight bytes.
    let result = unsafe {
        ioctl(
            "KVM_SET_DEVICE_ATTR",
            vcpu,
            KVM_SET_DEVICE_ATTR,
            &raw const argument as u64,
        )
    };
    result.map(drop)
}

fn tsc_offset(address: u64) -> DeviceAttribute {
    DeviceAttribute {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attribute: u64::from(KVM_VCPU_TSC_OFFSET),
        address,
    }
}
