//! Attaching to a running VMM, and reading its machine again when it has changed.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use romulus_host_sys::{PidFd, SysError};
use romulus_types::{BlockId, RamBlock, RamLayout};
use romulus_vmm_attach::client::{Attachment, Client, ClientError};
use romulus_vmm_attach::proto::MachineInfo;

use super::error::AttachError;
use super::memory::{Memory, RegionFile};
use super::refusal::{Refusal, check};
use crate::fault;
use crate::host::processor;
use crate::source::{Allowances, CHECKPOINT_PAGES_MAX, GuestEvent, PAUSE_LIMIT_NS};
use crate::spec::{Disk, Hypervisor, KvmMachine, MachineSpec, Nic, SPEC_FORMAT};

/// What we call ourselves in the VMM's log.
const NAME: &str = "replicator";
/// How long the VMM may take to welcome us, and to notice that an earlier connection of ours has ended.
const WELCOME_LIMIT: Duration = Duration::from_secs(5);
/// Between two tries meanwhile.
const WELCOME_RETRY: Duration = Duration::from_millis(20);

/// Which VMM, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// The VMM's attach socket.
    pub socket: PathBuf,
    /// Taps that a packet gate holds.
    pub taps: Vec<String>,
    /// What is allowed.
    pub allow: Allowances,
    /// How long the guest may stand still for a checkpoint before the VMM lets it run, in nanoseconds.
    pub pause_limit_ns: u64,
    /// Pages that one checkpoint may have: they are copied while the guest stands still.
    pub checkpoint_pages_max: u64,
}

impl AttachOptions {
    /// Options with defaults for everything but the socket.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            taps: Vec::new(),
            allow: Allowances::default(),
            pause_limit_ns: PAUSE_LIMIT_NS,
            checkpoint_pages_max: CHECKPOINT_PAGES_MAX,
        }
    }
}

/// Whether the guest stands still because of us, besides the pauses of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Halt {
    /// It does not.
    None,
    /// Until we know more; the VMM lets it run when we die or say nothing.
    ForNow,
    /// Another host speaks for the VM.
    ForGood,
}

/// What belongs to one connection.
pub(super) struct Attached {
    pub(super) client: Client,
    pub(super) machine: MachineSpec,
    pub(super) memory: Memory,
    pub(super) pause_limit: Duration,
}

/// A running guest of a VMM that checkpoints are taken of.
pub struct KvmSource {
    pub(super) options: AttachOptions,
    /// `None` only while a lost connection is being replaced.
    pub(super) attached: Option<Attached>,
    /// What the last connection saw, for as long as there is no other.
    pub(super) machine: MachineSpec,
    /// The VMM's process.
    pub(super) process: PidFd,
    pub(super) events: VecDeque<GuestEvent>,
    pub(super) armed: bool,
    /// The machine changed, or the connection broke: it has to be read again.
    pub(super) stale: bool,
    pub(super) halt: Halt,
    pub(super) ended: bool,
    /// Pages that the next checkpoint has room for before its pause.
    pub(super) room_pages: usize,
}

impl KvmSource {
    /// Attaches to the VMM behind `options.socket`. Its guest runs on without a pause.
    ///
    /// # Errors
    /// [`AttachError`] names everything that is to be changed. Nothing of the attempt stays behind.
    pub fn attach(options: AttachOptions) -> Result<Self, AttachError> {
        let attached = connect(&options)?;
        let process = PidFd::open(attached.client.vmm_pid())?;
        fault::point("attach.registered");
        Ok(Self {
            options,
            machine: attached.machine.clone(),
            attached: Some(attached),
            process,
            events: VecDeque::new(),
            armed: false,
            stale: false,
            halt: Halt::None,
            ended: false,
            room_pages: super::capture::ROOM_PAGES_MIN,
        })
    }

    /// Connects anew and reads the machine again, unless it has become one that is refused.
    pub(super) fn attach_again(&mut self) -> Result<(), AttachError> {
        // One client at a time, and the VMM lets a guest run whose client is gone: a halt is asked for again at once.
        self.attached = None;
        self.armed = false;
        let mut attached = connect(&self.options)?;
        self.process = PidFd::open(attached.client.vmm_pid())?;
        if self.halt == Halt::ForNow {
            attached.client.halt(false)?;
        }
        self.machine = attached.machine.clone();
        self.attached = Some(attached);
        self.stale = false;
        Ok(())
    }

    /// Whether the VMM's process has ended, or does so within `limit`.
    pub(super) fn has_ended(&self, limit: Duration) -> Result<bool, SysError> {
        self.process.wait_ended(limit)
    }
}

fn welcome(options: &AttachOptions) -> Result<(Client, Attachment), ClientError> {
    let deadline = Instant::now() + WELCOME_LIMIT;
    loop {
        match Client::connect(&options.socket, NAME, WELCOME_LIMIT) {
            // Perhaps it is our own last connection that is there.
            Err(ClientError::Busy { .. }) if Instant::now() < deadline => std::thread::sleep(WELCOME_RETRY),
            connected => return connected,
        }
    }
}

/// A connection to whatever machine is there, only to stop it.
pub(super) fn connect_plainly(options: &AttachOptions) -> Result<Client, ClientError> {
    Ok(welcome(options)?.0)
}

fn connect(options: &AttachOptions) -> Result<Attached, AttachError> {
    let (client, attachment) = welcome(options)?;
    let Attachment {
        welcome,
        regions,
        bitmap,
    } = attachment;
    let refusals = check(&welcome, &options.taps, &options.allow);
    if !refusals.is_empty() {
        return Err(AttachError::Refused(refusals));
    }
    let (Some(info), Some(bitmap)) = (&welcome.machine, bitmap) else {
        return Err(AttachError::Refused(vec![Refusal::NoTracking]));
    };
    let machine = describe(info, &options.allow)?;
    let files = regions
        .into_iter()
        .zip(&info.regions)
        .map(|(file, region)| RegionFile {
            file,
            offset: region.fd_offset,
        })
        .collect();
    let memory = Memory::map(&machine.layout, files, &bitmap)?;
    let limit_ns = options.pause_limit_ns.min(welcome.pause_limit_ns_max);
    Ok(Attached {
        client,
        machine,
        memory,
        pause_limit: Duration::from_nanos(limit_ns),
    })
}

/// What a backup has to know of the machine.
fn describe(info: &MachineInfo, allow: &Allowances) -> Result<MachineSpec, AttachError> {
    let blocks = info.regions.iter().map(|region| RamBlock {
        name: region.name.clone(),
        bytes: region.bytes,
    });
    let spec = MachineSpec {
        format: SPEC_FORMAT,
        version: info.vmm_version.clone(),
        host_cpu: processor(),
        vcpus: info.vcpus.into(),
        layout: RamLayout::new(blocks.collect())?,
        main: BlockId(0),
        nics: info
            .nics
            .iter()
            .map(|nic| Nic {
                name: nic.name.clone(),
                mac: nic.mac,
            })
            .collect(),
        disks: info
            .disks
            .iter()
            .map(|disk| Disk {
                id: disk.id.clone(),
                bytes: disk.bytes,
            })
            .collect(),
        disposable: allow.disposable.iter().cloned().collect(),
        hypervisor: Hypervisor::Kvm(KvmMachine {
            vmm: info.vmm.clone(),
            tracking: info.tracking,
            gpas: info.regions.iter().map(|region| region.gpa).collect(),
            config: info.config.clone(),
        }),
    };
    spec.check()?;
    Ok(spec)
}
