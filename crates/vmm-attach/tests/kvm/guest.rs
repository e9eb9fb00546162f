//! A machine with a tiny guest: 64-bit code in ring 3, so that it runs at native speed on nested hosts as well.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{Msrs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use romulus_host_sys::kvm::KvmSlots;
use romulus_vmm_attach::kvm::{
    DeviceError, DeviceState, DirtyTracker, KvmLimits, KvmMachine, KvmParts, Next, StateSaver, Tracking,
    Vcpus,
};
use romulus_vmm_attach::memory::GuestRam;
use romulus_vmm_attach::proto::{MachineInfo, PAGE_BYTES, Region};
use romulus_vmm_attach::server::Machine;
use vm_memory::{Bytes, GuestAddress};

/// Where the second region of memory lies; the first has an odd number of pages, so the bitmap's words straddle both.
pub const HIGH: u64 = 0x1000_0000;
const LOW_PAGES: u64 = 8192 + 17;
const HIGH_PAGES: u64 = 4096;
/// What vCPU n writes to at random, in pages.
const WORK_PAGES: u64 = 2048;
/// Counters of the vCPUs.
const COUNTERS: u64 = 0xa000;
/// Interrupts that the guest's handler saw.
pub const INTERRUPTS: u64 = 0xc000;
const CODE: u64 = 0x2_0000;
const TASK_STATES: u64 = 0xe_0000;
const MSR_KVMCLOCK: u32 = 0x4b56_4d01;
const PORT_FAILED: u16 = 0x501;
const PORT_ASK: u16 = 0x510;

/// Writes pages at random and counts; compares its counter in r10, xmm1 and memory, and the TSC with the last one.
///
/// ```text
/// work: cmp [r14], r10; jne fail; movq r11, xmm1; cmp r11, r10; jne fail
///       rdtsc; shl rdx, 32; or rax, rdx; cmp rax, r12; jb fail; mov r12, rax
///       inc r10; movq xmm1, r10; mov [r14], r10
///       imul rbx, r15; add rbx, r13; mov rax, rbx; shr rax, 33; and rax, r9; shl rax, 12; mov [r8+rax+8], r10; jmp work
/// fail: mov dx, 0x501; out dx, al; jmp fail
/// ```
pub const WORK: &[u8] = &[
    0x4d, 0x39, 0x16, 0x75, 0x42, 0x66, 0x49, 0x0f, 0x7e, 0xcb, 0x4d, 0x39, 0xd3, 0x75, 0x38, 0x0f, 0x31,
    0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0x4c, 0x39, 0xe0, 0x72, 0x2a, 0x49, 0x89, 0xc4, 0x49, 0xff,
    0xc2, 0x66, 0x49, 0x0f, 0x6e, 0xca, 0x4d, 0x89, 0x16, 0x49, 0x0f, 0xaf, 0xdf, 0x4c, 0x01, 0xeb, 0x48,
    0x89, 0xd8, 0x48, 0xc1, 0xe8, 0x21, 0x4c, 0x21, 0xc8, 0x48, 0xc1, 0xe0, 0x0c, 0x4d, 0x89, 0x54, 0x00,
    0x08, 0xeb, 0xb9, 0x66, 0xba, 0x01, 0x05, 0xee, 0xeb, 0xf9,
];
/// Sleeps in the kernel until an interrupt, and counts: `sleep: ud2; lock inc [r14]; jmp sleep` (the `ud2` handler below
/// executes HLT in ring 0).
pub const SLEEP: &[u8] = &[0x0f, 0x0b, 0xf0, 0x49, 0xff, 0x06, 0xeb, 0xf8];
/// Asks port 0x510 for numbers, each of which must be the next one: `ask: mov dx, 0x510; in eax, dx; cmp rax, r10;
/// jne fail; inc r10; mov [r14], r10; jmp ask`.
pub const ASK: &[u8] = &[
    0x66, 0xba, 0x10, 0x05, 0xed, 0x4c, 0x39, 0xd0, 0x75, 0x08, 0x49, 0xff, 0xc2, 0x4d, 0x89, 0x16, 0xeb,
    0xee, 0x66, 0xba, 0x01, 0x05, 0xee, 0xeb, 0xf9,
];
/// Arms the LAPIC's timer for one shot in a millisecond, waits for its interrupt, lets some time go by, sees that it came
/// once, and counts and arms anew. Its handler leaves the timer's registers alone.
///
/// ```text
///        mov edi, 0xfee00000; mov dword [rdi+0x3e0], 11; mov dword [rdi+0x320], 0x41
/// again: mov r10, [0xc000]; mov dword [rdi+0x380], 1000000; inc qword [r14]
/// wait:  pause; cmp [0xc000], r10; je wait
///        mov ecx, 1000000
/// idle:  dec ecx; jnz idle
///        mov rax, [0xc000]; sub rax, r10; cmp rax, 1; je again
/// fail:  mov dx, 0x501; out dx, al; jmp fail
/// ```
pub const TIMER: &[u8] = &[
    0xbf, 0x00, 0x00, 0xe0, 0xfe, 0xc7, 0x87, 0xe0, 0x03, 0x00, 0x00, 0x0b, 0x00, 0x00, 0x00, 0xc7, 0x87,
    0x20, 0x03, 0x00, 0x00, 0x41, 0x00, 0x00, 0x00, 0x4c, 0x8b, 0x14, 0x25, 0x00, 0xc0, 0x00, 0x00, 0xc7,
    0x87, 0x80, 0x03, 0x00, 0x00, 0x40, 0x42, 0x0f, 0x00, 0x49, 0xff, 0x06, 0xf3, 0x90, 0x4c, 0x39, 0x14,
    0x25, 0x00, 0xc0, 0x00, 0x00, 0x74, 0xf4, 0xb9, 0x40, 0x42, 0x0f, 0x00, 0xff, 0xc9, 0x75, 0xfc, 0x48,
    0x8b, 0x04, 0x25, 0x00, 0xc0, 0x00, 0x00, 0x4c, 0x29, 0xd0, 0x48, 0x83, 0xf8, 0x01, 0x74, 0xc5, 0x66,
    0xba, 0x01, 0x05, 0xee, 0xeb, 0xf9,
];
/// [`TIMER`] with shots of nine minutes: of 2^32 counts of 128 ns each (Intel SDM volume 3A, 12.5.4).
pub fn long_timer() -> Vec<u8> {
    let mut program = TIMER.to_vec();
    program[11] = 0b1010;
    program[39..43].copy_from_slice(&u32::MAX.to_le_bytes());
    program
}

/// Does nothing: `jmp $`.
pub const SPIN: &[u8] = &[0xeb, 0xfe];

const STUBS: u64 = 0xb000;
/// `ud: add qword [rsp], 2; sti; hlt; iretq`; at 16 `irq: push rax; lock inc qword [0xc000]; mov eax, 0xfee000b0;
/// mov dword [rax], 0; pop rax; iretq`.
const STUB_CODE: &[u8] = &[
    0x48, 0x83, 0x04, 0x24, 0x02, 0xfb, 0xf4, 0x48, 0xcf, 0, 0, 0, 0, 0, 0, 0, 0x50, 0xf0, 0x48, 0xff, 0x04,
    0x25, 0x00, 0xc0, 0x00, 0x00, 0xb8, 0xb0, 0x00, 0xe0, 0xfe, 0xc7, 0x00, 0x00, 0x00, 0x00, 0x00, 0x58,
    0x48, 0xcf,
];

/// Wants to be told once each time that it has to stand still or to work on, and never to save while it works.
pub struct Devices {
    quiet: bool,
    restored: u64,
}

impl DeviceState for Devices {
    fn quiesce(&mut self) {
        assert!(!self.quiet, "it was told to stand still before");
        self.quiet = true;
    }

    fn save(&mut self, into: &mut Vec<u8>) {
        assert!(self.quiet);
        into.extend_from_slice(&self.restored.to_le_bytes());
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let bytes: [u8; 8] = state.try_into()?;
        self.restored = u64::from_le_bytes(bytes) + 1;
        Ok(())
    }

    fn unquiesce(&mut self) {
        assert!(self.quiet, "it was told to work on before");
        self.quiet = false;
    }
}

/// What the guests of a test have in common, over all their machines.
#[derive(Clone, Default)]
pub struct Outside {
    pub failed: Arc<AtomicBool>,
    pub asked: Arc<AtomicU64>,
}

pub struct Guest {
    pub machine: KvmMachine<Devices>,
    pub ram: GuestRam,
    pub outside: Outside,
}

pub fn info(program: &[u8], vcpus: u16) -> MachineInfo {
    let region = |name: &str, gpa, pages| Region {
        name: name.into(),
        gpa,
        bytes: pages * PAGE_BYTES,
        fd_offset: 0,
    };
    MachineInfo {
        vmm: "test".into(),
        vcpus,
        regions: vec![region("low", 0, LOW_PAGES), region("high", HIGH, HIGH_PAGES)],
        config: program.to_vec(),
        ..MachineInfo::default()
    }
}

impl Guest {
    /// A machine with its guest loaded, running.
    pub fn run(program: &[u8], vcpus: u16, tracking: Tracking) -> Self {
        let (parts, outside) = Self::parts(program, vcpus, tracking);
        let guest = Self::of(parts, outside);
        guest.machine.start().unwrap();
        guest
    }

    /// The parts of a machine with its guest loaded, which stands still.
    pub fn parts(program: &[u8], vcpus: u16, tracking: Tracking) -> (KvmParts<Devices>, Outside) {
        let info = info(program, vcpus);
        let ram = GuestRam::create(&info.regions).unwrap();
        load(&ram, program);
        let outside = Outside::default();
        let parts = build(&info, ram, tracking, &outside).unwrap();
        switch_clocks_on(&parts.vcpus);
        (parts, outside)
    }

    pub fn of(parts: KvmParts<Devices>, outside: Outside) -> Self {
        let ram = parts.ram.clone();
        Self {
            machine: KvmMachine::new(parts, KvmLimits::default()),
            ram,
            outside,
        }
    }

    /// A machine on this one's memory (or a private copy of it) that waits for its state.
    pub fn standby(&self, info: &MachineInfo, private: bool) -> Self {
        let outside = self.outside.clone();
        let for_build = outside.clone();
        let ram = Arc::new(std::sync::Mutex::new(None));
        let built = Arc::clone(&ram);
        let build = move |info: &MachineInfo, ram: GuestRam| {
            *built.lock().unwrap() = Some(ram.clone());
            build(info, ram, Tracking::default(), &for_build)
        };
        let machine = KvmMachine::standby(Box::new(build), KvmLimits::default());
        let files = self
            .ram
            .files()
            .map(|file| file.try_clone_to_owned().unwrap())
            .collect();
        machine.prepare(info, files, private).unwrap();
        let ram = ram.lock().unwrap().take().unwrap();
        Self {
            machine,
            ram,
            outside,
        }
    }

    pub fn counter(&self, vcpu: u64) -> u64 {
        self.ram
            .memory()
            .read_obj(GuestAddress(COUNTERS + vcpu * 64))
            .unwrap()
    }

    /// Waits until every vCPU has counted on by `by`.
    pub fn progress(&self, vcpus: u64, by: u64) {
        let before: Vec<u64> = (0..vcpus).map(|vcpu| self.counter(vcpu)).collect();
        wait_for("the guest makes progress", || {
            assert!(
                !self.outside.failed.load(Ordering::SeqCst),
                "the guest found itself damaged"
            );
            (0..vcpus).all(|vcpu| self.counter(vcpu) >= before[usize::try_from(vcpu).unwrap()] + by)
        });
    }
}

/// Waits, long enough for any load of the host.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "{what}: not within a minute"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Not when a standby is built: the kernel writes the clock's page at that, and its memory is an image.
fn switch_clocks_on(vcpus: &Vcpus) {
    for index in 0..vcpus.count() {
        let clock = kvm_msr_entry {
            index: MSR_KVMCLOCK,
            data: (0xd000 + 64 * index as u64) | 1,
            ..Default::default()
        };
        let clock = Msrs::from_entries(&[clock]).unwrap();
        assert_eq!(vcpus.with(index, |fd| fd.set_msrs(&clock)).unwrap().unwrap(), 1);
    }
}

fn load(ram: &GuestRam, program: &[u8]) {
    let memory = ram.memory();
    let put = |address: u64, value: u64| memory.write_obj(value, GuestAddress(address)).unwrap();
    put(0x1000, 0x2000 | 7);
    for gib in 0..4 {
        put(0x2000 + gib * 8, (0x3000 + gib * 0x1000) | 7);
        for entry in 0..512 {
            put(0x3000 + gib * 0x1000 + entry * 8, gib << 30 | entry << 21 | 0x87);
        }
    }
    // Code of ring 0, data and code of ring 3.
    put(0x8010, 0x00af_9b00_0000_ffff);
    put(0x8028, 0x00cf_f300_0000_ffff);
    put(0x8030, 0x00af_fb00_0000_ffff);
    for vector in [6].into_iter().chain(32..256) {
        let handler = if vector == 6 { STUBS } else { STUBS + 16 };
        put(0x9000 + vector * 16, handler | 0x10 << 16 | 0xee00 << 32);
    }
    memory.write_slice(STUB_CODE, GuestAddress(STUBS)).unwrap();
    memory.write_slice(program, GuestAddress(CODE)).unwrap();
    for vcpu in 0..4 {
        let task = TASK_STATES + vcpu * 0x4000;
        memory
            .write_obj(0x6_0000 + (vcpu + 1) * 0x1000, GuestAddress(task + 4))
            .unwrap();
        memory.write_obj(0x68u16, GuestAddress(task + 0x66)).unwrap();
        memory
            .write_obj(0xffu8, GuestAddress(task + 0x68 + 8192))
            .unwrap();
    }
}

fn build(
    info: &MachineInfo,
    ram: GuestRam,
    tracking: Tracking,
    outside: &Outside,
) -> Result<KvmParts<Devices>, DeviceError> {
    let kvm =
        Kvm::new().expect("these tests need /dev/kvm: load the kvm module, run as a user who may open it");
    let vm = Arc::new(kvm.create_vm()?);
    tracking.enable(&vm)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_bindings::kvm_pit_config::default())?;
    let slots = KvmSlots::map(Arc::clone(&vm), ram.memory())?;
    let fds: Vec<VcpuFd> = (0..u64::from(info.vcpus))
        .map(|index| vcpu(&kvm, &vm, index))
        .collect::<Result<_, _>>()?;
    let saver = StateSaver::new(&kvm, &vm, &fds[0])?;
    let tracker = DirtyTracker::new(slots, tracking, &fds)?;
    let vcpus = Vcpus::spawn(fds, |_| {
        let outside = outside.clone();
        move |exit: Result<VcpuExit<'_>, kvm_ioctls::Error>| match handle(exit, &outside) {
            ControlFlow::Continue(()) => Next::Run,
            ControlFlow::Break(()) => {
                outside.failed.store(true, Ordering::SeqCst);
                Next::End
            }
        }
    })?;
    Ok(KvmParts {
        vcpus,
        devices: Devices {
            quiet: true,
            restored: 0,
        },
        tracker,
        saver,
        vm,
        ram,
        info: info.clone(),
    })
}

fn handle(exit: Result<VcpuExit<'_>, kvm_ioctls::Error>, outside: &Outside) -> ControlFlow<()> {
    match exit {
        Ok(VcpuExit::IoIn(PORT_ASK, data)) => {
            let number = outside.asked.fetch_add(1, Ordering::SeqCst);
            data.copy_from_slice(&number.to_le_bytes()[..data.len()]);
            ControlFlow::Continue(())
        }
        Ok(VcpuExit::IoOut(PORT_FAILED, _)) => ControlFlow::Break(()),
        other => {
            eprintln!("an exit that no test expects: {other:?}");
            ControlFlow::Break(())
        }
    }
}

fn vcpu(kvm: &Kvm, vm: &VmFd, index: u64) -> Result<VcpuFd, DeviceError> {
    let fd = vm.create_vcpu(index)?;
    let mut cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::try_from(index << 24)?,
            0xb => entry.edx = u32::try_from(index)?,
            _ => {}
        }
    }
    fd.set_cpuid2(&cpuid)?;
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 0x33,
        type_: 11,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        type_: 3,
        selector: 0x2b,
        l: 0,
        db: 1,
        ..code
    };
    let mut special = fd.get_sregs()?;
    (special.cr0, special.cr3, special.cr4, special.efer) = (0x8005_0033, 0x1000, 0x5_0620, 0xd01);
    special.cs = code;
    for segment in [
        &mut special.ds,
        &mut special.es,
        &mut special.fs,
        &mut special.gs,
        &mut special.ss,
    ] {
        *segment = data;
    }
    (special.gdt.base, special.gdt.limit) = (0x8000, 0x7f);
    (special.idt.base, special.idt.limit) = (0x9000, 0xfff);
    special.tr = kvm_segment {
        base: TASK_STATES + index * 0x4000,
        limit: 0x2068,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    fd.set_sregs(&special)?;
    fd.set_regs(&kvm_regs {
        rip: CODE,
        rflags: 0x3202,
        rsp: 0x8_0000 - 8 - index * 0x4000,
        r8: if index == 0 { 0x100_0000 } else { HIGH },
        r9: WORK_PAGES - 1,
        rbx: index + 1,
        r13: 1_442_695_040_888_963_407,
        r14: COUNTERS + index * 64,
        r15: 6_364_136_223_846_793_005,
        ..Default::default()
    })?;
    let mut lapic = fd.get_lapic()?;
    // Spurious-interrupt vector register: enabled, vector 255.
    (lapic.regs[0xf0], lapic.regs[0xf1]) = (-1, 1);
    fd.set_lapic(&lapic)?;
    fd.set_mp_state(kvm_mp_state::default())?;
    Ok(fd)
}
