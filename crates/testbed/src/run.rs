//! `testbed run` and `testbed standby`: from settings to a running machine, and what happens when it ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use romulus_guest_core::abi::{self, End};
use romulus_vmm_attach::kvm::{DeviceError, KvmLimits, KvmMachine, KvmParts};
use romulus_vmm_attach::memory::GuestRam;
use romulus_vmm_attach::proto::{Event, MachineInfo, Role};
use romulus_vmm_attach::server::{self, Events, ServeOptions, ServerHandle};
use vm_memory::{Bytes, GuestAddress};

use crate::cli::{RunOptions, StandbyOptions};
use crate::config::MachineConfig;
use crate::cpu::Beginning;
use crate::error::{BuildError, KvmCall};
use crate::host::{self, Serial};
use crate::loader;
use crate::mac::Mac;
use crate::machine::{self, Built, Devices, Guest, Host, REQUESTS_MAX, VMM};
use crate::ports::Request;

/// The guest that was built together with this program.
static BUILT_IN_GUEST: &[u8] = include_bytes!(env!("ROMULUS_GUEST_ELF"));

/// What is needed beyond the attach library's parts when the guest ends or begins anew.
struct Life {
    config: MachineConfig,
    beginnings: Vec<Beginning>,
    tsc_khz: u32,
    serial: Arc<Mutex<Serial>>,
}

/// Runs a machine until it ends.
///
/// # Errors
/// [`BuildError`] when it can't begin.
pub fn run(options: &RunOptions) -> Result<ExitCode, BuildError> {
    let guest = Guest {
        image: read_guest(options.guest.as_deref())?,
        cmdline: options.cmdline.clone(),
    };
    let disks = options
        .disk
        .iter()
        .map(|path| host::open_disk(path))
        .collect::<Result<Vec<_>, _>>()?;
    let config = MachineConfig {
        vcpus: options.vcpus,
        nics: macs(options)?,
        disks: disks.iter().map(|disk| disk.bytes).collect(),
        cmdline: guest.cmdline.clone(),
        guest_crc: crc32fast::hash(&guest.image),
        ..MachineConfig::new(&options.name, options.memory.saturating_mul(1 << 20))
    };
    let config = config.check()?;
    let host = Host {
        taps: open_taps(&options.tap)?,
        disks,
        serial: options.serial.clone(),
        tracking: options.tracking.resolve(Default::default()),
    };
    let (requests_in, requests) = sync_channel(REQUESTS_MAX);
    let built = machine::build(
        &config,
        machine::new_memory(&config)?,
        host,
        Some(&guest),
        requests_in,
    )?;
    let (parts, life) = split(config, built);
    let machine = Arc::new(KvmMachine::new(parts, KvmLimits::default()));
    let events = new_events()?;
    let serving = match &options.attach {
        Some(socket) => Some(serve(socket, Role::Running, machine.clone(), events.clone())?),
        None => None,
    };
    machine.start().map_err(BuildError::library)?;
    tracing::info!(
        name = life.config.name,
        vcpus = life.config.vcpus,
        memory_mib = options.memory,
        "the guest runs"
    );
    let end = Ending {
        machine,
        events,
        _serving: serving,
        image: guest.image,
    };
    Ok(end.wait(&requests, &Mutex::new(Some(life))))
}

/// Waits to be made another process's machine, and runs that until it ends.
///
/// # Errors
/// [`BuildError`] when it can't even wait.
pub fn standby(options: StandbyOptions) -> Result<ExitCode, BuildError> {
    let image = read_guest(options.guest.as_deref())?;
    let socket = options.attach.clone();
    let (requests_in, requests) = sync_channel(REQUESTS_MAX);
    let life = Arc::new(Mutex::new(None));
    let lives = life.clone();
    let build = move |info: &MachineInfo, ram: GuestRam| -> Result<KvmParts<Devices>, DeviceError> {
        let (parts, life) = build_standby(&options, info, ram, requests_in.clone())?;
        *lock(&lives) = Some(life);
        Ok(parts)
    };
    let machine = Arc::new(KvmMachine::standby(Box::new(build), KvmLimits::default()));
    let events = new_events()?;
    let serving = serve(&socket, Role::Empty, machine.clone(), events.clone())?;
    tracing::info!(socket = %socket.display(), "waiting for a machine");
    let end = Ending {
        machine,
        events,
        _serving: Some(serving),
        image,
    };
    Ok(end.wait(&requests, &life))
}

/// A machine that stands still, with a guest loaded, without network, disk, console or socket: to be measured.
///
/// # Errors
/// [`BuildError`].
pub fn build(options: &RunOptions) -> Result<KvmParts<Devices>, BuildError> {
    let guest = Guest {
        image: read_guest(options.guest.as_deref())?,
        cmdline: options.cmdline.clone(),
    };
    let config = MachineConfig {
        vcpus: options.vcpus,
        ..MachineConfig::new(&options.name, options.memory.saturating_mul(1 << 20))
    };
    let config = config.check()?;
    let tracking = options.tracking.resolve(Default::default());
    let host = Host {
        taps: Vec::new(),
        disks: Vec::new(),
        serial: host::SerialTarget::None,
        tracking,
    };
    let (requests, _) = sync_channel(REQUESTS_MAX);
    Ok(machine::build(
        &config,
        machine::new_memory(&config)?,
        host,
        Some(&guest),
        requests,
    )?
    .parts)
}

fn build_standby(
    options: &StandbyOptions,
    info: &MachineInfo,
    ram: GuestRam,
    requests: SyncSender<Request>,
) -> Result<(KvmParts<Devices>, Life), BuildError> {
    let config = MachineConfig::from_bytes(&info.config)?;
    let given = ram
        .regions()
        .iter()
        .map(|region| (region.name.as_str(), region.gpa, region.bytes));
    if !given.eq(config.ram()) {
        return Err(BuildError::Regions(format!("{:?}", ram.regions())));
    }
    let host = Host {
        taps: open_taps(&options.tap)?,
        disks: host::standby_disks(&config, &options.disk)?,
        serial: options.serial.clone(),
        tracking: options.tracking.resolve(info.tracking),
    };
    let built = machine::build(&config, ram, host, None, requests)?;
    Ok(split(config, built))
}

fn split(config: MachineConfig, built: Built) -> (KvmParts<Devices>, Life) {
    let serial = built.parts.devices.serial().clone();
    (
        built.parts,
        Life {
            config,
            beginnings: built.beginnings,
            tsc_khz: built.tsc_khz,
            serial,
        },
    )
}

fn open_taps(names: &[String]) -> Result<Vec<(String, std::os::fd::OwnedFd)>, BuildError> {
    names
        .iter()
        .map(|name| Ok((name.clone(), host::open_tap(name)?)))
        .collect()
}

/// The addresses of the network cards: those given, then the defaults.
fn macs(options: &RunOptions) -> Result<Vec<Mac>, BuildError> {
    let (nics, taps) = (options.mac.len(), options.tap.len());
    if nics > taps {
        return Err(BuildError::Taps { nics, taps });
    }
    let default = |index: usize| {
        let last = u8::try_from(index + 2).unwrap_or(u8::MAX);
        Mac::from([2, 0, 0, 0, 0, last])
    };
    let mac = |index| options.mac.get(index).copied().unwrap_or_else(|| default(index));
    Ok((0..taps).map(mac).collect())
}

fn read_guest(path: Option<&Path>) -> Result<Vec<u8>, BuildError> {
    let Some(path) = path else {
        return Ok(BUILT_IN_GUEST.to_vec());
    };
    let wrong = |source| BuildError::File {
        what: "the guest's file",
        path: PathBuf::from(path),
        source,
    };
    fs::read(path).map_err(wrong)
}

fn new_events() -> Result<Events, BuildError> {
    Events::new().map_err(BuildError::system("an eventfd"))
}

fn serve(
    socket: &Path,
    role: Role,
    machine: Arc<KvmMachine<Devices>>,
    events: Events,
) -> Result<ServerHandle, BuildError> {
    let wrong = |source| BuildError::File {
        what: "the attach socket",
        path: PathBuf::from(socket),
        source,
    };
    let listener = server::bind(socket).map_err(wrong)?;
    let options = ServeOptions::new(VMM, env!("CARGO_PKG_VERSION"), events);
    server::serve(listener, role, machine, options).map_err(wrong)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What goes on while the guest runs, until it ends.
struct Ending {
    machine: Arc<KvmMachine<Devices>>,
    events: Events,
    _serving: Option<ServerHandle>,
    image: Vec<u8>,
}

impl Ending {
    /// Waits for the guest's end; begins anew when the guest resets itself.
    fn wait(&self, requests: &Receiver<Request>, life: &Mutex<Option<Life>>) -> ExitCode {
        loop {
            // The channel lives as long as the vCPUs, which live as long as `self.machine`.
            let request = requests.recv().expect("the vCPUs are there");
            let Some(life) = &*lock(life) else { continue };
            let (event, code) = match request {
                Request::Reset => match self.reset(life, requests) {
                    Ok(()) => {
                        self.events.post(Event::Reset);
                        continue;
                    }
                    Err(error) => {
                        tracing::error!(%error, "the machine can't be reset");
                        (Event::Crashed, 1)
                    }
                },
                Request::End(End::PowerOff) => (Event::PoweredOff, 0),
                Request::End(End::SelfCheckFailed) => (Event::Crashed, 10),
                Request::End(End::Panic) => (Event::Crashed, 11),
                Request::End(End::Fault) => {
                    self.tell_fault();
                    (Event::Crashed, 12)
                }
                Request::Stuck(vcpu, why) => {
                    tracing::error!(vcpu, why, "a vCPU can't go on");
                    (Event::Crashed, 13)
                }
            };
            lock(&life.serial).flush();
            tracing::info!(?event, code, "the guest has ended");
            self.events.post(event);
            return ExitCode::from(code);
        }
    }

    /// Says what the guest's handler of exceptions has left behind.
    fn tell_fault(&self) {
        let record = self.machine.exclusively(|machine| {
            let word = |index: u64| {
                machine
                    .ram
                    .memory()
                    .read_obj(GuestAddress(abi::FAULT_RECORD + index * 8))
            };
            (0..5).map(word).collect::<Result<Vec<u64>, _>>()
        });
        if let Ok(Ok(record)) = record {
            let [vector, code, rip, cr2, rsp] = record[..] else {
                return;
            };
            tracing::error!(
                "exception {vector} in the guest: code {code:#x}, rip {rip:#x}, cr2 {cr2:#x}, rsp {rsp:#x}"
            );
        }
    }

    fn reset(&self, life: &Life, requests: &Receiver<Request>) -> Result<(), BuildError> {
        let (got, want) = (crc32fast::hash(&self.image), life.config.guest_crc);
        if got != want {
            return Err(BuildError::OtherGuest { got, want });
        }
        tracing::info!("the guest resets the machine");
        let guest = Guest {
            image: self.image.clone(),
            cmdline: life.config.cmdline.clone(),
        };
        let change = |machine: romulus_vmm_attach::kvm::Exclusive<'_, Devices>| {
            machine.devices.reset();
            // The guest wrote to the port until its vCPUs were stopped.
            while requests.try_recv().is_ok() {}
            let vcpus = machine.vcpus;
            let ram = life
                .config
                .ram()
                .into_iter()
                .map(|(_, start, bytes)| (start, bytes));
            loader::forget(machine.ram.memory(), ram)?;
            machine::start_anew(
                &life.config,
                machine.ram.memory(),
                &guest,
                life.tsc_khz,
                &life.beginnings,
                |index, set| {
                    vcpus
                        .with(index, set)
                        .map_err(|_| KvmCall::refused("a vCPU that stands still"))?
                },
            )
        };
        self.machine.exclusively(change).map_err(BuildError::library)?
    }
}
