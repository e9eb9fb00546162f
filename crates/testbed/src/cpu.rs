//! How a vCPU begins: in ring 3 of 64-bit mode, with the tables that the loader has written.
//!
//! Ring 3, because there the guest runs natively on every KVM, also on one that emulates ring 0. What a ring-3 program
//! can't do (take interrupts, sleep) is done by short handlers of the image, which the interrupt gates lead to.

use kvm_bindings::{
    CpuId, KVM_MP_STATE_RUNNABLE, Msrs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
};
use kvm_bindings::{kvm_fpu, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuFd};
use romulus_guest_core::abi;

use crate::error::KvmCall;
use crate::loader::{task_selector, task_state};

/// CPUID entries that are asked for: as many as the kernel ever gives.
const CPUID_ENTRIES: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
/// Protection, paging, and the rest that 64-bit mode wants (PE, MP, ET, NE, WP, AM, PG).
const CR0: u64 = 0x8005_0033;
/// PAE, OSFXSR, OSXMMEXCPT, OSXSAVE.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18;
/// Ring 3 may read and write the bases of FS and GS.
const CR4_FSGSBASE: u64 = 1 << 16;
/// SYSCALL, long mode enabled and active, no-execute.
const EFER: u64 = 0xd01;
/// x87, SSE, AVX and AVX-512; what the CPU lacks is left out.
const XCR0: u64 = 0xe7;
/// Interrupts on, IOPL 3, the bit that is always set.
const RFLAGS: u64 = 0x3202;
/// Where a vCPU's kvmclock lies, bit 0: on (`MSR_KVM_SYSTEM_TIME_NEW`).
const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// The local APIC's spurious vector register, and what switches the APIC on.
const LAPIC_SPURIOUS: usize = 0xf0;
const LAPIC_ON: u32 = 0x1ff;

/// Tells a new vCPU what CPU it is: what this host can offer, under its own number.
///
/// # Errors
/// The kernel's.
pub fn set_cpuid(kvm: &Kvm, vcpu: &VcpuFd, number: u32) -> Result<(), KvmCall> {
    let mut cpuid = KvmCall::of("KVM_GET_SUPPORTED_CPUID", kvm.get_supported_cpuid(CPUID_ENTRIES))?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | number << 24,
            0xb | 0x1f => entry.edx = number,
            _ => {}
        }
    }
    KvmCall::of("KVM_SET_CPUID2", vcpu.set_cpuid2(&cpuid))
}

/// A vCPU as KVM made it, to begin with and to go back to.
pub struct Beginning {
    number: u32,
    system: kvm_sregs,
    fpu: kvm_fpu,
    apic: kvm_lapic_state,
    events: kvm_vcpu_events,
    xcr0: kvm_xcrs,
}

impl Beginning {
    /// Reads a vCPU that has not run yet, and makes of it what the guest expects.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(vcpu: &VcpuFd, number: u32) -> Result<Self, KvmCall> {
        let cpuid = KvmCall::of("KVM_GET_CPUID2", vcpu.get_cpuid2(CPUID_ENTRIES))?;
        let mut system = KvmCall::of("KVM_GET_SREGS", vcpu.get_sregs())?;
        system_registers(&mut system, number, &cpuid);
        let mut apic = KvmCall::of("KVM_GET_LAPIC", vcpu.get_lapic())?;
        set_apic_register(&mut apic, LAPIC_SPURIOUS, LAPIC_ON);
        Ok(Beginning {
            number,
            system,
            fpu: KvmCall::of("KVM_GET_FPU", vcpu.get_fpu())?,
            apic,
            events: KvmCall::of("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?,
            xcr0: xcr0(&cpuid),
        })
    }

    /// Has the vCPU, which stands still, begin the guest at `entry`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn enter(&self, vcpu: &VcpuFd, entry: u64) -> Result<(), KvmCall> {
        KvmCall::of("KVM_SET_SREGS", vcpu.set_sregs(&self.system))?;
        KvmCall::of("KVM_SET_XCRS", vcpu.set_xcrs(&self.xcr0))?;
        KvmCall::of("KVM_SET_FPU", vcpu.set_fpu(&self.fpu))?;
        let clock = abi::KVMCLOCK + u64::from(self.number) * abi::KVMCLOCK_STRIDE;
        let clock = kvm_msr_entry {
            index: MSR_SYSTEM_TIME,
            data: clock | 1,
            ..Default::default()
        };
        let clock = Msrs::from_entries(&[clock]).expect("one entry is within every limit");
        if KvmCall::of("KVM_SET_MSRS", vcpu.set_msrs(&clock))? != 1 {
            return Err(KvmCall::refused("KVM_SET_MSRS of the kvmclock"));
        }
        let registers = kvm_regs {
            rip: entry,
            rflags: RFLAGS,
            rsp: abi::user_stack_top(self.number),
            rdi: self.number.into(),
            rsi: abi::BOOT_INFO,
            ..Default::default()
        };
        KvmCall::of("KVM_SET_REGS", vcpu.set_regs(&registers))?;
        KvmCall::of("KVM_SET_LAPIC", vcpu.set_lapic(&self.apic))?;
        // Every vCPU enters at once; none waits for a start-up message.
        let running = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        KvmCall::of("KVM_SET_MP_STATE", vcpu.set_mp_state(running))?;
        KvmCall::of("KVM_SET_VCPU_EVENTS", vcpu.set_vcpu_events(&self.events))
    }
}

fn system_registers(system: &mut kvm_sregs, number: u32, cpuid: &CpuId) {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: abi::USER_CODE,
        type_: 11,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: abi::USER_DATA,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    system.cs = code;
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.tr = kvm_segment {
        base: task_state(number),
        limit: abi::TSS_LIMIT,
        selector: task_selector(number),
        type_: 11,
        present: 1,
        ..Default::default()
    };
    (system.gdt.base, system.gdt.limit) = (abi::GDT, 0xff);
    (system.idt.base, system.idt.limit) = (abi::IDT, 0xfff);
    system.cr0 = CR0;
    system.cr3 = abi::PML4;
    system.cr4 = CR4 | if has_fsgsbase(cpuid) { CR4_FSGSBASE } else { 0 };
    system.efer = EFER;
}

fn has_fsgsbase(cpuid: &CpuId) -> bool {
    cpuid
        .as_slice()
        .iter()
        .any(|entry| entry.function == 7 && entry.index == 0 && entry.ebx & 1 != 0)
}

fn xcr0(cpuid: &CpuId) -> kvm_xcrs {
    let state = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0xd && entry.index == 0);
    let mut registers = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    registers.xcrs[0].value = XCR0 & state.map_or(3, |entry| u64::from(entry.eax));
    registers
}

fn set_apic_register(apic: &mut kvm_lapic_state, at: usize, value: u32) {
    for (to, from) in apic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
        *to = from.cast_signed();
    }
}
