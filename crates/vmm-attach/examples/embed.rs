//! A whole VMM that can be attached to: one vCPU, 1 MiB, a guest of five instructions and a device that counts.
//!
//! ```text
//! cargo run -p romulus-vmm-attach --example embed -- run /tmp/embed.sock        a guest runs; a sidecar may attach
//! cargo run -p romulus-vmm-attach --example embed -- standby /tmp/other.sock    waits for a checkpoint of one
//! ```

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::{Kvm, VcpuExit};
use romulus_host_sys::kvm::KvmSlots;
use romulus_vmm_attach::kvm::{
    DeviceError, DeviceState, DirtyTracker, KvmLimits, KvmMachine, KvmParts, Next, StateSaver, Tracking,
    Vcpus,
};
use romulus_vmm_attach::memory::GuestRam;
use romulus_vmm_attach::proto::{MachineInfo, Region, Role};
use romulus_vmm_attach::server::{Events, Machine, ServeOptions, ServerHandle, bind, serve};
use vm_memory::{Bytes, GuestAddress};

/// 16-bit code, loaded at 0x1000: counts at 0x2000, and rings the device at every 1,024th step.
///
/// ```text
/// again: inc dword [0x2000]; test word [0x2000], 0x3ff; jnz again; out 0x10, al; jmp again
/// ```
const GUEST: [u8; 17] = [
    0x66, 0xff, 0x06, 0x00, 0x20, 0xf7, 0x06, 0x00, 0x20, 0xff, 0x03, 0x75, 0xf3, 0xe6, 0x10, 0xeb, 0xef,
];

/// The device: counts its rings. The vCPU's thread rings it, so it stands still whenever the vCPU does.
#[derive(Clone, Default)]
pub struct Counter(pub Arc<AtomicU64>);

impl DeviceState for Counter {
    fn quiesce(&mut self) {}

    fn save(&mut self, into: &mut Vec<u8>) {
        into.extend_from_slice(&self.0.load(Ordering::SeqCst).to_le_bytes());
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        self.0
            .store(u64::from_le_bytes(state.try_into()?), Ordering::SeqCst);
        Ok(())
    }

    fn unquiesce(&mut self) {}
}

/// Makes the machine on the memory that is given, standing still.
fn build(info: &MachineInfo, ram: GuestRam, device: Counter) -> Result<KvmParts<Counter>, DeviceError> {
    let tracking = Tracking::default();
    let kvm = Kvm::new()
        .map_err(|error| format!("/dev/kvm cannot be used ({error}): is the kvm module loaded?"))?;
    let vm = Arc::new(kvm.create_vm()?);
    tracking.enable(&vm)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_bindings::kvm_pit_config::default())?;
    let slots = KvmSlots::map(Arc::clone(&vm), ram.memory())?;

    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?)?;
    let mut special = vcpu.get_sregs()?;
    (special.cs.base, special.cs.selector) = (0, 0);
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_bindings::kvm_regs {
        rip: 0x1000,
        rflags: 2,
        ..Default::default()
    })?;

    let fds = vec![vcpu];
    let saver = StateSaver::new(&kvm, &vm, &fds[0])?;
    let tracker = DirtyTracker::new(slots, tracking, &fds)?;
    let counter = Arc::clone(&device.0);
    let vcpus = Vcpus::spawn(fds, |_| {
        let counter = Arc::clone(&counter);
        move |exit: Result<VcpuExit<'_>, kvm_ioctls::Error>| match exit {
            Ok(VcpuExit::IoOut(0x10, _)) => {
                counter.fetch_add(1, Ordering::SeqCst);
                Next::Run
            }
            other => {
                eprintln!("the guest cannot go on: {other:?}");
                Next::End
            }
        }
    })?;
    Ok(KvmParts {
        vcpus,
        devices: device,
        tracker,
        saver,
        vm,
        ram,
        info: info.clone(),
    })
}

/// Runs a guest, attachable at `socket`.
pub fn run(socket: &Path, device: Counter) -> Result<ServerHandle, Box<dyn Error + Send + Sync>> {
    let ram = GuestRam::create(&[Region {
        name: "ram".into(),
        gpa: 0,
        bytes: 1 << 20,
        fd_offset: 0,
    }])?;
    ram.memory().write_slice(&GUEST, GuestAddress(0x1000))?;
    let info = MachineInfo {
        vmm: "embed".into(),
        ..MachineInfo::default()
    };
    let machine = KvmMachine::new(build(&info, ram, device)?, KvmLimits::default());
    machine.start()?;
    attachable(socket, Role::Running, Arc::new(machine))
}

/// Waits at `socket` for a guest.
pub fn standby(socket: &Path, device: Counter) -> Result<ServerHandle, Box<dyn Error + Send + Sync>> {
    let build = move |info: &MachineInfo, ram: GuestRam| build(info, ram, device.clone());
    let machine = KvmMachine::standby(Box::new(build), KvmLimits::default());
    attachable(socket, Role::Empty, Arc::new(machine))
}

fn attachable(
    socket: &Path,
    role: Role,
    machine: Arc<dyn Machine>,
) -> Result<ServerHandle, Box<dyn Error + Send + Sync>> {
    let options = ServeOptions::new("embed", env!("CARGO_PKG_VERSION"), Events::new()?);
    Ok(serve(bind(socket)?, role, machine, options)?)
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let arguments: Vec<String> = std::env::args().collect();
    let device = Counter::default();
    let _server = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "run", socket] => run(Path::new(socket), device.clone())?,
        [_, "standby", socket] => standby(Path::new(socket), device.clone())?,
        _ => return Err("usage: embed run|standby SOCKET".into()),
    };
    loop {
        std::thread::sleep(std::time::Duration::from_secs(1));
        println!("the guest rang {} times", device.0.load(Ordering::SeqCst));
    }
}
