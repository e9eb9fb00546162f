//! Builds a machine out of its description and what its host gives it, in the form that the attach library runs.
//!
//! Order, because KVM wants it: VM, tracking, interrupt chips, memory, vCPUs; then doorbells and interrupts of the
//! devices. A machine is built standing still, for `run` with a guest loaded, for `standby` with nothing in it.

use std::os::fd::OwnedFd;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_pit_config;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use romulus_guest_core::abi;
use romulus_host_sys::kvm::KvmSlots;
use romulus_vmm_attach::kvm::{
    DeviceError, DeviceState, DirtyTracker, KvmParts, StateSaver, Tracking, Vcpus,
};
use romulus_vmm_attach::memory::{GuestRam, SharedBitmap};
use romulus_vmm_attach::proto::{Disk, MachineInfo, Nic, Output, Region};
use vm_memory::GuestMemoryMmap;

use crate::config::MachineConfig;
use crate::cpu;
use crate::error::{BuildError, KvmCall};
use crate::host::{DiskFile, Serial, SerialTarget};
use crate::loader::{self, Boot};
use crate::ports::{Exits, Request};
use crate::virtio::backend::Backend;
use crate::virtio::blk::Blk;
use crate::virtio::bus::Bus;
use crate::virtio::io_thread::IoThread;
use crate::virtio::net::Net;
use crate::wiring;

/// Guest memory, with the bitmap of what devices write.
pub type Memory = GuestMemoryMmap<SharedBitmap>;
/// Name by which sidecars know this VMM.
pub const VMM: &str = "testbed";
/// Where Intel's CPUs want three pages that no guest has: in the hole under 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What the host gives a machine.
pub struct Host {
    /// A tap for each network card: its name and its descriptor.
    pub taps: Vec<(String, OwnedFd)>,
    /// A file for each disk.
    pub disks: Vec<DiskFile>,
    /// Where the console goes.
    pub serial: SerialTarget,
    /// How writes of the guest are found.
    pub tracking: Tracking,
}

/// A guest to start with.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its ELF file.
    pub image: Vec<u8>,
    /// Its command line.
    pub cmdline: String,
}

/// The machine's devices, as the attach library stops and saves them.
pub struct Devices {
    bus: Arc<Bus<Memory>>,
    serial: Arc<Mutex<Serial>>,
    _io: IoThread,
}

impl Devices {
    /// All devices as they were when the machine began.
    pub fn reset(&self) {
        self.bus.reset();
    }

    /// The guest's console.
    #[must_use]
    pub fn serial(&self) -> &Arc<Mutex<Serial>> {
        &self.serial
    }
}

impl DeviceState for Devices {
    fn quiesce(&mut self) {
        self.bus.quiesce();
    }

    fn save(&mut self, into: &mut Vec<u8>) {
        self.bus.save(into);
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        Ok(self.bus.restore(state)?)
    }

    fn unquiesce(&mut self) {
        self.bus.unquiesce();
    }
}

/// A machine that stands still.
pub struct Built {
    /// For the attach library.
    pub parts: KvmParts<Devices>,
    /// How each vCPU looked before its first instruction, for a reset.
    pub beginnings: Vec<cpu::Beginning>,
    /// Ticks of the time stamp counter in a millisecond.
    pub tsc_khz: u32,
}

/// New memory for a machine.
///
/// # Errors
/// [`BuildError::Library`] when there is none.
pub fn new_memory(config: &MachineConfig) -> Result<GuestRam, BuildError> {
    GuestRam::create(&regions(config)).map_err(BuildError::library)
}

fn regions(config: &MachineConfig) -> Vec<Region> {
    let region = |(name, gpa, bytes): (&str, u64, u64)| Region {
        name: name.to_owned(),
        gpa,
        bytes,
        fd_offset: 0,
    };
    config.ram().into_iter().map(region).collect()
}

/// Builds the machine on `ram`; loads `guest` when there is one. What the guest asks of the whole machine goes to
/// `requests`.
///
/// # Errors
/// [`BuildError`], which says what to do.
pub fn build(
    config: &MachineConfig,
    ram: GuestRam,
    host: Host,
    guest: Option<&Guest>,
    requests: SyncSender<Request>,
) -> Result<Built, BuildError> {
    let (nics, taps) = (config.nics.len(), host.taps.len());
    if nics != taps {
        return Err(BuildError::Taps { nics, taps });
    }
    let info = describe(config, &host);
    let serial = Arc::new(Mutex::new(Serial::open(&host.serial)?));
    let (kvm, vm) = create_vm(host.tracking)?;
    let slots = KvmSlots::map(vm.clone(), ram.memory()).map_err(BuildError::library)?;
    let vcpus = create_vcpus(config, &kvm, &vm)?;
    let tsc_khz = KvmCall::of("KVM_GET_TSC_KHZ", vcpus[0].get_tsc_khz())?;
    let backends = backends(config, host.taps, host.disks);
    let bus = Arc::new(Bus::new(ram.memory().clone(), backends).map_err(BuildError::system("an eventfd"))?);
    wiring::connect(&vm, &bus.wakes())?;
    let mut beginnings = Vec::new();
    for (number, vcpu) in (0u32..).zip(&vcpus) {
        beginnings.push(cpu::Beginning::of(vcpu, number)?);
    }
    if let Some(guest) = guest {
        start_anew(config, ram.memory(), guest, tsc_khz, &beginnings, |index, set| {
            set(&vcpus[index])
        })?;
    }
    let saver = StateSaver::new(&kvm, &vm, &vcpus[0]).map_err(BuildError::library)?;
    let tracker = DirtyTracker::new(slots, host.tracking, &vcpus).map_err(BuildError::library)?;
    let exits = Exits {
        bus: bus.clone(),
        serial: serial.clone(),
        requests,
    };
    let vcpus = Vcpus::spawn(vcpus, |number| {
        let exits = exits.clone();
        move |exit: Result<_, _>| exits.handle(number, exit)
    });
    let vcpus = vcpus.map_err(BuildError::library)?;
    let io = IoThread::start(bus.clone()).map_err(BuildError::system("the devices' thread"))?;
    let devices = Devices { bus, serial, _io: io };
    Ok(Built {
        parts: KvmParts {
            vcpus,
            devices,
            tracker,
            saver,
            vm,
            ram,
            info,
        },
        beginnings,
        tsc_khz,
    })
}

/// Loads the guest and has every vCPU begin with it; `with_vcpu` hands out a vCPU that stands still.
///
/// # Errors
/// [`BuildError`].
pub fn start_anew(
    config: &MachineConfig,
    memory: &Memory,
    guest: &Guest,
    tsc_khz: u32,
    beginnings: &[cpu::Beginning],
    mut with_vcpu: impl FnMut(usize, &mut dyn FnMut(&VcpuFd) -> Result<(), KvmCall>) -> Result<(), KvmCall>,
) -> Result<(), BuildError> {
    let boot = Boot {
        image: &guest.image,
        vcpus: config.vcpus,
        ram_low_bytes: config.ram_low_bytes(),
        ram_high_bytes: config.ram_high_bytes(),
        tsc_khz: tsc_khz.into(),
        cmdline: &guest.cmdline,
        devices: &wiring::devices(config),
    };
    let entry = loader::load(memory, &boot)?;
    for (index, beginning) in beginnings.iter().enumerate() {
        with_vcpu(index, &mut |vcpu| beginning.enter(vcpu, entry))?;
    }
    Ok(())
}

fn create_vm(tracking: Tracking) -> Result<(Kvm, Arc<VmFd>), BuildError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => BuildError::NoKvm,
        libc::EACCES | libc::EPERM => BuildError::KvmForbidden,
        _ => BuildError::Kvm(error),
    })?;
    let vm = Arc::new(KvmCall::of("KVM_CREATE_VM", kvm.create_vm())?);
    tracking.enable(&vm).map_err(BuildError::library)?;
    KvmCall::of("KVM_SET_TSS_ADDR", vm.set_tss_address(TSS_ADDRESS))?;
    KvmCall::of("KVM_CREATE_IRQCHIP", vm.create_irq_chip())?;
    KvmCall::of("KVM_CREATE_PIT2", vm.create_pit2(kvm_pit_config::default()))?;
    Ok((kvm, vm))
}

fn create_vcpus(config: &MachineConfig, kvm: &Kvm, vm: &VmFd) -> Result<Vec<VcpuFd>, BuildError> {
    let create = |number: u32| {
        let vcpu = KvmCall::of("KVM_CREATE_VCPU", vm.create_vcpu(number.into()))?;
        cpu::set_cpuid(kvm, &vcpu, number)?;
        Ok(vcpu)
    };
    (0..config.vcpus).map(create).collect()
}

fn backends(
    config: &MachineConfig,
    taps: Vec<(String, OwnedFd)>,
    disks: Vec<DiskFile>,
) -> Vec<Box<dyn Backend<Memory>>> {
    let nics = config
        .nics
        .iter()
        .zip(taps)
        .map(|(mac, (_, tap))| Box::new(Net::new(tap, *mac)) as Box<_>);
    let disk = |(index, disk): (usize, DiskFile)| {
        Box::new(Blk::new(disk.file, disk.bytes, &disk_name(index))) as Box<dyn Backend<Memory>>
    };
    nics.chain(disks.into_iter().enumerate().map(disk)).collect()
}

fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// What sidecars are told of the machine. Paths and taps are for people to read; a standby goes by `config` alone.
fn describe(config: &MachineConfig, host: &Host) -> MachineInfo {
    let nic = |(index, (mac, (tap, _))): (usize, (&crate::mac::Mac, &(String, OwnedFd)))| Nic {
        name: format!("net{index}"),
        mac: *mac.bytes(),
        tap: tap.clone(),
    };
    let disk = |(index, disk): (usize, &DiskFile)| Disk {
        id: disk_name(index),
        bytes: disk.bytes,
        path: disk
            .path
            .as_ref()
            .map_or_else(String::new, |path| path.display().to_string()),
    };
    let output = |to| Output {
        id: "serial".to_owned(),
        to,
    };
    MachineInfo {
        vmm: VMM.to_owned(),
        vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
        vcpus: u16::try_from(config.vcpus).unwrap_or(u16::MAX),
        regions: regions(config),
        nics: config.nics.iter().zip(&host.taps).enumerate().map(nic).collect(),
        disks: host.disks.iter().enumerate().map(disk).collect(),
        outputs: host.serial.describe().map(output).into_iter().collect(),
        config: config.to_bytes(),
        ..MachineInfo::default()
    }
}

/// The room of the channel to which the guest's requests go: the first one decides, the rest may be lost.
pub const REQUESTS_MAX: usize = 2 * abi::VCPUS_MAX as usize;
