//! Saving and restoring what the kernel holds of a machine: its vCPUs, interrupt chips, timer and clock.
//!
//! The vCPUs stand still meanwhile ([`super::Vcpus`]); nothing here stops the guest's clock or sets it back. Order of
//! restoring: clock, then each vCPU (special registers before XCR0 before XSAVE; the LAPIC before the MSRs, of which
//! the TSC deadline comes last), then the chips, which may raise interrupts. Until then guest memory is only read: the MSRs that name a
//! page which the kernel writes come right before the guest runs ([`SharedPages`]).
//! Source: `Documentation/virt/kvm/api.rst` of the kernel; for time, `devices/vcpu.rst` section 4.1.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use romulus_host_sys::SysError;
use romulus_host_sys::kvm::{get_tsc_offset, get_xsave, set_tsc_offset, set_xsave, xsave_area_bytes};
use zerocopy::IntoBytes;

use super::blob::{Blob, BlobError, BlobWriter, Kind};
use super::clock::{ClockState, ClockStep, TscState};
use super::lapic;

/// The TSC itself (Intel SDM volume 4, table 2-2).
const MSR_TSC: u32 = 0x10;
/// When the LAPIC's timer fires, in TSC-deadline mode: needs the TSC and the LAPIC to be right.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// MSRs by which a guest names pages that the kernel writes, some of them at once: KVM's clocks, their older numbers, steal time and the
/// like (`Documentation/virt/kvm/x86/msr.rst`); Hyper-V's (its functional specification, appendix F).
const SHARED_PAGE_MSRS: [std::ops::RangeInclusive<u32>; 3] =
    [0x11..=0x12, 0x4b56_4d00..=0x4b56_4dff, 0x4000_0000..=0x4000_01ff];
/// The interrupt chips of a PC: two PICs and the IOAPIC.
const CHIPS: [u16; 3] = [0, 1, 2];

/// Why a machine's state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The kernel refused a call.
    #[error("{call} failed: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// The kernel refused a call that kvm-ioctls does not have.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The bytes are not a machine's state.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The kernel does not give an MSR that is in its own list.
    #[error("MSR {0:#x} cannot be read")]
    MsrUnreadable(u32),
    /// The host refuses a value of an MSR.
    #[error(
        "MSR {index:#x} cannot be set to {value:#x}; this host's processor or kernel differs from the other's"
    )]
    MsrRefused {
        /// The MSR.
        index: u32,
        /// The value.
        value: u64,
    },
    /// The guest sees a processor feature that this host lacks.
    #[error(
        "the guest uses processor features that this host lacks (CPUID {function:#x}.{index}, bits {missing:#x}); give both machines the same CPUID"
    )]
    Cpuid {
        /// The leaf.
        function: u32,
        /// The subleaf.
        index: u32,
        /// What is missing, of the register that differs.
        missing: u32,
    },
    /// The TSC runs at another speed and cannot be scaled.
    #[error("the guest's TSC runs at {guest_khz} kHz, this host's at {host_khz} kHz, and it cannot scale it")]
    TscFrequency {
        /// What the guest has.
        guest_khz: u32,
        /// What the host has.
        host_khz: u32,
    },
    /// The state is of another machine.
    #[error("the state is of {state} vCPUs, this machine has {machine}")]
    VcpuCount {
        /// In the state.
        state: usize,
        /// Here.
        machine: usize,
    },
}

/// Turns an error of kvm-ioctls into ours.
fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { call, source }
}

/// The last of a vCPU's state: what has the kernel write guest memory. For [`StateSaver::share_pages`].
#[must_use = "the guest's clock stands still without it"]
#[derive(Debug)]
pub struct SharedPages(Vec<kvm_msr_entry>);

/// Saves and restores one machine. Keeps its buffers, so that a checkpoint allocates nothing.
#[derive(Debug)]
pub struct StateSaver {
    xsave: Vec<u8>,
    msrs: Msrs,
    tsc_khz: u32,
    /// The CPUID of each vCPU, which never changes once it has run.
    cpuid: Vec<Option<Vec<u8>>>,
    supported: Vec<kvm_cpuid_entry2>,
}

impl StateSaver {
    /// Asks the kernel what there is to save for a machine whose first vCPU is `vcpu`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(kvm_fd: &Kvm, vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, StateError> {
        let list = kvm_fd
            .get_msr_index_list()
            .map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
        let mut entries = Vec::new();
        for index in list.as_slice().iter().copied().take(KVM_MAX_MSR_ENTRIES) {
            let entry = kvm_msr_entry {
                index,
                ..Default::default()
            };
            // Some that are listed cannot be read on hosts that lack them: there is nothing to save then.
            let mut one = Msrs::from_entries(&[entry]).expect("one entry fits");
            if vcpu.get_msrs(&mut one).map_err(kvm("KVM_GET_MSRS"))? == 1 {
                entries.push(entry);
            }
        }
        let supported = kvm_fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self {
            xsave: vec![0; xsave_area_bytes(vm)],
            msrs: Msrs::from_entries(&entries).expect("at most as many as fit"),
            tsc_khz: vcpu.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?,
            cpuid: Vec::new(),
            supported: supported.as_slice().to_vec(),
        })
    }

    /// Saves one vCPU that stands still; `timer_delivered` is what [`super::Vcpus::timer_delivered`] says of it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn save_vcpu(
        &mut self,
        vm: &VmFd,
        index: u16,
        vcpu: &VcpuFd,
        timer_delivered: bool,
        out: &mut BlobWriter<'_>,
    ) -> Result<(), StateError> {
        // First, as asking for it settles what is pending for the others.
        let mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
        out.plain(Kind::MpState, index, &mp_state);
        out.plain(
            Kind::Registers,
            index,
            &vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?,
        );
        let special = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        out.plain(Kind::SpecialRegisters, index, &special);
        get_xsave(vm, vcpu, &mut self.xsave)?;
        out.section(Kind::Xsave, index, &self.xsave);
        out.plain(Kind::Xcrs, index, &vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?);
        let read = vcpu.get_msrs(&mut self.msrs).map_err(kvm("KVM_GET_MSRS"))?;
        if let Some(entry) = self.msrs.as_slice().get(read) {
            return Err(StateError::MsrUnreadable(entry.index));
        }
        out.section(Kind::Msrs, index, self.msrs.as_slice().as_bytes());
        let mut lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
        if timer_delivered {
            lapic::take_back(&mut lapic);
        }
        out.plain(Kind::Lapic, index, &lapic);
        let events = vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?;
        out.plain(Kind::Events, index, &events);
        let debug = vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?;
        out.plain(Kind::DebugRegisters, index, &debug);
        let offset = get_tsc_offset(vcpu).ok();
        out.section(Kind::Tsc, index, &TscState::new(self.tsc_khz, offset).to_bytes());
        out.section(Kind::Cpuid, index, self.cpuid(index, vcpu)?);
        Ok(())
    }

    /// Saves what is the VM's. Last, as it has the time of the checkpoint.
    ///
    /// # Errors
    /// The kernel's.
    pub fn save_vm(&mut self, vm: &VmFd, out: &mut BlobWriter<'_>) -> Result<(), StateError> {
        for chip in CHIPS {
            let mut state = kvm_irqchip {
                chip_id: u32::from(chip),
                ..Default::default()
            };
            vm.get_irqchip(&mut state).map_err(kvm("KVM_GET_IRQCHIP"))?;
            out.plain(Kind::Irqchip, chip, &state);
        }
        out.plain(Kind::Pit, 0, &vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?);
        let clock = ClockState::read(vm).map_err(kvm("KVM_GET_CLOCK"))?;
        out.section(Kind::Clock, 0, &clock.to_bytes());
        Ok(())
    }

    /// Sets the VM's clock: to what it was, and forward by the time that went by since. The first step.
    ///
    /// # Errors
    /// The kernel's, or [`StateError::Blob`].
    pub fn restore_clock(&self, vm: &VmFd, from: &Blob<'_>) -> Result<ClockStep, StateError> {
        let saved = ClockState::from_bytes(from.section(Kind::Clock, 0)?);
        let saved = saved.ok_or(BlobError::Missing {
            kind: Kind::Clock,
            index: 0,
        })?;
        saved.restore(vm).map_err(kvm("KVM_SET_CLOCK"))
    }

    /// Restores one vCPU that has not run yet, or stands still. After the clock, before the chips. Does not write guest memory:
    /// what would is left for later.
    ///
    /// # Errors
    /// The kernel's, and what is wrong with the state for this host.
    pub fn restore_vcpu(
        &self,
        vm: &VmFd,
        index: u16,
        vcpu: &VcpuFd,
        from: &Blob<'_>,
        step: &ClockStep,
    ) -> Result<SharedPages, StateError> {
        self.restore_cpuid(index, vcpu, from)?;
        let special: kvm_sregs = from.plain(Kind::SpecialRegisters, index)?;
        vcpu.set_sregs(&special).map_err(kvm("KVM_SET_SREGS"))?;
        let registers: kvm_regs = from.plain(Kind::Registers, index)?;
        vcpu.set_regs(&registers).map_err(kvm("KVM_SET_REGS"))?;
        let xcrs: kvm_xcrs = from.plain(Kind::Xcrs, index)?;
        vcpu.set_xcrs(&xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        set_xsave(vm, vcpu, from.section(Kind::Xsave, index)?)?;
        let mut lapic: kvm_lapic_state = from.plain(Kind::Lapic, index)?;
        lapic::advance(&mut lapic, step.forward_ns());
        vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        let later = self.restore_msrs(index, vcpu, from, step)?;
        let mp_state: kvm_mp_state = from.plain(Kind::MpState, index)?;
        vcpu.set_mp_state(mp_state).map_err(kvm("KVM_SET_MP_STATE"))?;
        let debug: kvm_debugregs = from.plain(Kind::DebugRegisters, index)?;
        vcpu.set_debug_regs(&debug).map_err(kvm("KVM_SET_DEBUGREGS"))?;
        let events: kvm_vcpu_events = from.plain(Kind::Events, index)?;
        vcpu.set_vcpu_events(&events)
            .map_err(kvm("KVM_SET_VCPU_EVENTS"))?;
        Ok(later)
    }

    /// The very last step, after the chips and right before the vCPU runs: from here on the kernel writes guest memory.
    ///
    /// # Errors
    /// The kernel's, and what is wrong with the state for this host.
    pub fn share_pages(&self, vcpu: &VcpuFd, pages: &SharedPages) -> Result<(), StateError> {
        set_msrs(vcpu, &pages.0)
    }

    /// Restores the interrupt chips and the timer. The last step but for [`StateSaver::share_pages`].
    ///
    /// # Errors
    /// The kernel's, or [`StateError::Blob`].
    pub fn restore_chips(&self, vm: &VmFd, from: &Blob<'_>) -> Result<(), StateError> {
        for chip in CHIPS {
            let mut state: kvm_irqchip = from.plain(Kind::Irqchip, chip)?;
            state.chip_id = u32::from(chip);
            vm.set_irqchip(&state).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        let pit: kvm_pit_state2 = from.plain(Kind::Pit, 0)?;
        vm.set_pit2(&pit).map_err(kvm("KVM_SET_PIT2"))
    }

    fn cpuid(&mut self, index: u16, vcpu: &VcpuFd) -> Result<&[u8], StateError> {
        let index = usize::from(index);
        if self.cpuid.len() <= index {
            self.cpuid.resize(index + 1, None);
        }
        if self.cpuid[index].is_none() {
            let cpuid = vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(kvm("KVM_GET_CPUID2"))?;
            self.cpuid[index] = Some(cpuid.as_slice().as_bytes().to_vec());
        }
        Ok(self.cpuid[index].as_deref().expect("read just now"))
    }

    fn restore_cpuid(&self, index: u16, vcpu: &VcpuFd, from: &Blob<'_>) -> Result<(), StateError> {
        let saved: Vec<kvm_cpuid_entry2> = from.list(Kind::Cpuid, index, KVM_MAX_CPUID_ENTRIES)?;
        let here = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_CPUID2"))?;
        if here.as_slice() == saved.as_slice() {
            return Ok(());
        }
        super::cpuid::check(&saved, &self.supported, here.as_slice())?;
        let cpuid = kvm_bindings::CpuId::from_entries(&saved).expect("the list is not longer than fits");
        vcpu.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))
    }

    fn restore_msrs(
        &self,
        index: u16,
        vcpu: &VcpuFd,
        from: &Blob<'_>,
        step: &ClockStep,
    ) -> Result<SharedPages, StateError> {
        let mut saved: Vec<kvm_msr_entry> = from.list(Kind::Msrs, index, KVM_MAX_MSR_ENTRIES)?;
        let tsc = TscState::from_bytes(from.section(Kind::Tsc, index)?).ok_or(BlobError::Missing {
            kind: Kind::Tsc,
            index,
        })?;
        let scaled = self.same_frequency(vcpu, tsc.khz)?;
        let offset = step.tsc_offset(&tsc).filter(|_| !scaled);
        let by_offset = offset.is_some_and(|offset| set_tsc_offset(vcpu, offset).is_ok());
        for entry in saved.iter_mut().filter(|entry| entry.index == MSR_TSC) {
            entry.data = entry.data.wrapping_add(step.tsc_ticks(tsc.khz));
        }
        let (shared, own): (Vec<_>, Vec<_>) = saved
            .into_iter()
            .filter(|entry| !(by_offset && entry.index == MSR_TSC))
            .partition(|entry| SHARED_PAGE_MSRS.iter().any(|range| range.contains(&entry.index)));
        let (deadline, others): (Vec<_>, Vec<_>) =
            own.into_iter().partition(|entry| entry.index == MSR_TSC_DEADLINE);
        set_msrs(vcpu, &others)?;
        set_msrs(vcpu, &deadline)?;
        Ok(SharedPages(shared))
    }

    /// Makes the TSC run as fast as the guest knows it. Whether the host scales it for that.
    fn same_frequency(&self, vcpu: &VcpuFd, guest_khz: u32) -> Result<bool, StateError> {
        // What the kernel takes for equal: 250 parts in a million.
        let close = u64::from(guest_khz.abs_diff(self.tsc_khz)) * 4000 <= u64::from(self.tsc_khz);
        if close {
            return Ok(false);
        }
        vcpu.set_tsc_khz(guest_khz)
            .map_err(|_| StateError::TscFrequency {
                guest_khz,
                host_khz: self.tsc_khz,
            })?;
        Ok(true)
    }
}

/// Sets MSRs. One that the host does not let us write is no harm when it has that value already.
fn set_msrs(vcpu: &VcpuFd, mut entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    while !entries.is_empty() {
        let msrs = Msrs::from_entries(entries).expect("the list is not longer than fits");
        let done = vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?;
        let Some(refused) = entries.get(done) else {
            return Ok(());
        };
        let mut here = Msrs::from_entries(&[kvm_msr_entry { data: 0, ..*refused }]).expect("one entry fits");
        let read = vcpu.get_msrs(&mut here).map_err(kvm("KVM_GET_MSRS"))?;
        if read != 1 || here.as_slice()[0].data != refused.data {
            return Err(StateError::MsrRefused {
                index: refused.index,
                value: refused.data,
            });
        }
        entries = &entries[done + 1..];
    }
    Ok(())
}
