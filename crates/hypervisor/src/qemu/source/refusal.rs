//! What cannot be protected, found before anything is touched: devices that write memory unseen, output that no
//! gate holds, disks that are not replicated, work in progress.
//!
//! Pure: QEMU's answers in, refusals out. All of them at once, so that an operator sees the whole list.

use std::fmt;

use serde_json::Value;

use super::notes::StoppedBy;
use crate::source::Allowances;

/// One reason, with its remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A device that writes guest memory past QEMU's page tables.
    UntrackedDma {
        /// Its type.
        device: String,
        /// Its id, perhaps empty.
        id: String,
    },
    /// A device that talks to something outside without a gate.
    UngatedDevice {
        /// Its type.
        device: String,
        /// Its id, perhaps empty.
        id: String,
    },
    /// A network back end without a gate.
    UngatedNetdev {
        /// Its id, or its kind when it has none.
        id: String,
        /// Its kind (`user`, `socket`, `tap`, …).
        kind: String,
        /// The interface, for a tap.
        interface: Option<String>,
    },
    /// A tap that a gate was to hold, but QEMU does not use it.
    TapNotUsed(String),
    /// A character device of the guest whose output leaves.
    UngatedChardev {
        /// Its id.
        id: String,
        /// Where it leads.
        target: String,
    },
    /// A disk that the guest can write.
    WritableDisk {
        /// Its id.
        id: String,
        /// Its file.
        file: String,
    },
    /// Memory that goes away unseen: a balloon over shared memory.
    UntrackedDiscard {
        /// Its type.
        device: String,
    },
    /// A block job.
    BlockJob(String),
    /// A migration.
    Migration(String),
    /// The guest is not running.
    NotRunning(String),
    /// An earlier replicator stopped it.
    StoppedByReplicator(StoppedBy),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UntrackedDma { device, id } => write!(
                f,
                "device {device} ({id:?}) writes the guest's memory unseen: remove it or use an emulated or virtio one"
            ),
            Self::UngatedDevice { device, id } => write!(
                f,
                "device {device} ({id:?}) exchanges data with the host without a gate: remove it, or declare {id:?} disposable"
            ),
            Self::UngatedNetdev { id, kind, interface } => {
                write!(f, "network back end {id:?} ({kind}")?;
                if let Some(interface) = interface {
                    write!(f, " {interface}")?;
                }
                write!(f, ") is not gated: ")?;
                match interface {
                    Some(interface) => write!(
                        f,
                        "name its tap with --tap {interface}, or declare {id:?} disposable"
                    ),
                    None => write!(f, "use a tap, or declare {id:?} disposable"),
                }
            }
            Self::TapNotUsed(tap) => {
                write!(f, "tap {tap} is no network back end of this QEMU: correct --tap")
            }
            Self::UngatedChardev { id, target } => write!(
                f,
                "character device {id:?} leads to {target} without a gate: connect it to null, or declare {id:?} disposable"
            ),
            Self::WritableDisk { id, file } => write!(
                f,
                "disk {id:?} ({file}) is writable and not replicated: make it read-only, or declare {id:?} disposable"
            ),
            Self::UntrackedDiscard { device } => write!(
                f,
                "device {device} gives shared memory back unseen: remove it, or run the guest without a shared memory backend"
            ),
            Self::BlockJob(id) => write!(f, "block job {id:?} is under way: wait for its end or cancel it"),
            Self::Migration(state) => write!(f, "a migration is {state}: wait for its end or cancel it"),
            Self::NotRunning(state) if state == "paused" => write!(
                f,
                "the guest is paused: resume it first (QMP: cont), unless the witness's record says that another host speaks for it"
            ),
            Self::NotRunning(state) => {
                write!(f, "the guest is {state}, not running: start or resume it first")
            }
            Self::StoppedByReplicator(StoppedBy::Suspension) => write!(
                f,
                "an earlier replicator suspended the guest, as it did not know whether this host may still speak for it: if the witness's record lets this host speak, resume it yourself (QMP: cont) and protect it again; if not, end this QEMU"
            ),
            Self::StoppedByReplicator(StoppedBy::AnotherHost) => write!(
                f,
                "an earlier replicator stopped the guest for good, as another host speaks for it: do not resume it, end this QEMU"
            ),
        }
    }
}

/// Devices by the beginning of their type.
const UNTRACKED_DMA: &[&str] = &[
    "vfio-",
    "vhost-user-",
    "vhost-vdpa",
    "vhost-scsi",
    "ivshmem",
    "pvrdma",
    "virtio-pmem",
    "igd-passthrough",
    "xen-pci-passthrough",
];
const UNGATED_DEVICES: &[&str] = &[
    "vhost-vsock",
    "virtio-9p",
    "usb-host",
    "usb-mtp",
    "scsi-generic",
    "scsi-block",
    "ipmi-bmc-extern",
    "tpm-",
];
const DISCARDING: &[&str] = &["virtio-balloon", "virtio-mem"];

/// QEMU's answers.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// `query-status`
    pub(super) status: Value,
    /// `query-migrate`
    pub(super) migration: Value,
    /// `query-block-jobs`
    pub(super) block_jobs: Value,
    /// `query-block`
    pub(super) blocks: Value,
    /// `query-chardev`
    pub(super) chardevs: Value,
    /// `info network`
    pub(super) network: String,
    /// `info qtree`
    pub(super) device_tree: String,
    /// Character devices that the command line gives to monitors.
    pub(super) monitors: Vec<String>,
    /// Interfaces of the tun descriptors that QEMU holds: descriptor number, interface.
    pub(super) tun_fds: Vec<(u32, String)>,
    /// Whether the main RAM is shared.
    pub(super) shared_ram: bool,
    /// Who stopped the guest, if a replicator noted that it did.
    pub(super) stopped: Option<StoppedBy>,
}

/// Everything that speaks against protecting this machine.
pub(super) fn check(facts: &Facts, taps: &[String], allow: &Allowances) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let status = text(&facts.status, "status");
    match (status, facts.stopped) {
        ("running", _) => {}
        ("paused", Some(by)) => refusals.push(Refusal::StoppedByReplicator(by)),
        _ => refusals.push(Refusal::NotRunning(status.to_owned())),
    }
    let migration = text(&facts.migration, "status");
    if !matches!(migration, "" | "none" | "completed" | "failed" | "cancelled") {
        refusals.push(Refusal::Migration(migration.to_owned()));
    }
    let jobs = facts.block_jobs.as_array().into_iter().flatten();
    refusals.extend(jobs.map(|job| Refusal::BlockJob(text(job, "device").to_owned())));
    check_devices(facts, allow, &mut refusals);
    check_network(facts, taps, allow, &mut refusals);
    check_chardevs(facts, allow, &mut refusals);
    check_disks(facts, allow, &mut refusals);
    refusals
}

fn check_devices(facts: &Facts, allow: &Allowances, refusals: &mut Vec<Refusal>) {
    for (device, id) in devices(&facts.device_tree) {
        let is = |list: &[&str]| list.iter().any(|prefix| device.starts_with(prefix));
        if is(UNTRACKED_DMA) {
            refusals.push(Refusal::UntrackedDma {
                device: device.to_owned(),
                id: id.to_owned(),
            });
        } else if is(UNGATED_DEVICES) && !allow.covers([id]) {
            refusals.push(Refusal::UngatedDevice {
                device: device.to_owned(),
                id: id.to_owned(),
            });
        } else if facts.shared_ram && is(DISCARDING) {
            let refusal = Refusal::UntrackedDiscard {
                device: device.to_owned(),
            };
            if !refusals.contains(&refusal) {
                refusals.push(refusal);
            }
        }
    }
}

/// Types and ids in `info qtree`: lines `dev: TYPE, id "ID"`.
fn devices(tree: &str) -> impl Iterator<Item = (&str, &str)> {
    tree.lines().filter_map(|line| {
        let (device, id) = line.trim().strip_prefix("dev: ")?.split_once(", id ")?;
        Some((device, id.trim().trim_matches('"')))
    })
}

fn check_network(facts: &Facts, taps: &[String], allow: &Allowances, refusals: &mut Vec<Refusal>) {
    let mut used = Vec::new();
    for back_end in back_ends(&facts.network) {
        if matches!(back_end.kind, "nic" | "hubport") {
            continue;
        }
        let interface = match back_end.kind {
            "tap" => interface_of(&back_end, &facts.tun_fds),
            _ => None,
        };
        if let Some(interface) = &interface
            && taps.contains(interface)
        {
            used.push(interface.clone());
        } else if !allow.covers([back_end.handle()]) {
            refusals.push(Refusal::UngatedNetdev {
                id: back_end.handle().to_owned(),
                kind: back_end.kind.to_owned(),
                interface,
            });
        }
    }
    let unused = taps.iter().filter(|tap| !used.contains(tap));
    refusals.extend(unused.map(|tap| Refusal::TapNotUsed(tap.clone())));
}

struct BackEnd<'a> {
    id: &'a str,
    kind: &'a str,
    settings: &'a str,
}

impl BackEnd<'_> {
    /// What the operator calls it: QEMU gives nameless ones a new number at each start, so they go by their kind.
    fn handle(&self) -> &str {
        if self.id.starts_with('#') {
            self.kind
        } else {
            self.id
        }
    }
}

/// Lines ` \ NAME: index=N,type=KIND,…` of `info network`.
fn back_ends(network: &str) -> impl Iterator<Item = BackEnd<'_>> {
    network.lines().filter_map(|line| {
        let line = line.trim().trim_start_matches("\\ ");
        let (before, after) = line.split_once("index=")?;
        // A hub's port comes first on such a line: "hub0port1: #net150: ".
        let id = before.trim_end().trim_end_matches(':').rsplit(": ").next()?;
        let (_, after) = after.split_once("type=")?;
        let (kind, settings) = after.split_once(',').unwrap_or((after, ""));
        Some(BackEnd { id, kind, settings })
    })
}

/// The network cards with their hardware addresses.
pub(super) fn nics(network: &str) -> impl Iterator<Item = (&str, [u8; 6])> {
    back_ends(network)
        .filter(|end| end.kind == "nic")
        .filter_map(|nic| {
            let text = nic.settings.split(',').find_map(|s| s.strip_prefix("macaddr="))?;
            let mut mac = [0; 6];
            let mut parts = text.trim().split(':');
            for byte in &mut mac {
                *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
            }
            parts.next().is_none().then_some((nic.id, mac))
        })
}

fn interface_of(back_end: &BackEnd<'_>, tun_fds: &[(u32, String)]) -> Option<String> {
    let setting = |key: &str| back_end.settings.split(',').find_map(|s| s.strip_prefix(key));
    if let Some(name) = setting("ifname=") {
        return Some(name.to_owned());
    }
    if let Some(fd) = setting("fd=").and_then(|fd| fd.parse::<u32>().ok()) {
        return tun_fds
            .iter()
            .find(|(number, _)| *number == fd)
            .map(|(_, name)| name.clone());
    }
    // A tap from a helper says nothing about itself; it is certain only when there is no other.
    match tun_fds {
        [(_, name)] => Some(name.clone()),
        _ => None,
    }
}

fn check_chardevs(facts: &Facts, allow: &Allowances, refusals: &mut Vec<Refusal>) {
    for chardev in facts.chardevs.as_array().into_iter().flatten() {
        let (id, target) = (text(chardev, "label"), text(chardev, "filename"));
        // Not every device shows its character device, so whatever is no monitor counts as the guest's.
        let of_monitor = id.starts_with("compat_monitor") || facts.monitors.iter().any(|m| m == id);
        let kept_inside = matches!(target, "null" | "vc" | "ringbuf") || target.starts_with("vc:");
        if !of_monitor && !kept_inside && !allow.covers([id]) {
            refusals.push(Refusal::UngatedChardev {
                id: id.to_owned(),
                target: target.to_owned(),
            });
        }
    }
}

/// Ids of the character devices that a command line (zero bytes between its words) gives to monitors:
/// `-mon [chardev=]ID,…`, `-qmp chardev:ID` and their like.
pub(super) fn monitors(cmdline: &[u8]) -> Vec<String> {
    let words: Vec<String> = cmdline
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let of_pair = |pair: &[String]| {
        let value = pair[1].as_str();
        match pair[0].trim_start_matches('-') {
            "mon" => {
                let named = value.split(',').find_map(|part| part.strip_prefix("chardev="));
                Some(named.or_else(|| value.split(',').next())?.to_owned())
            }
            "monitor" | "qmp" | "qmp-pretty" => Some(value.strip_prefix("chardev:")?.to_owned()),
            _ => None,
        }
    };
    words.windows(2).filter_map(of_pair).collect()
}

/// Where a PC has its flash chips in QEMU's tree of objects.
const FIRMWARE_FLASH: &str = "/machine/system.flash";

fn check_disks(facts: &Facts, allow: &Allowances, refusals: &mut Vec<Refusal>) {
    for block in facts.blocks.as_array().into_iter().flatten() {
        let Some(inserted) = block.get("inserted") else {
            continue;
        };
        if inserted.get("ro").and_then(Value::as_bool) == Some(true) {
            continue;
        }
        let (device, qdev) = (text(block, "device"), text(block, "qdev"));
        // What the machine's flash holds is a block of memory, so it is in each checkpoint.
        if qdev.starts_with(FIRMWARE_FLASH) {
            continue;
        }
        let qdev_id = qdev
            .rsplit('/')
            .find(|part| *part != "virtio-backend")
            .unwrap_or("");
        let names = [device, qdev, qdev_id, text(inserted, "node-name")];
        let names = names.into_iter().filter(|name| !name.is_empty());
        if !allow.covers(names.clone()) {
            refusals.push(Refusal::WritableDisk {
                id: names.into_iter().next().unwrap_or("").to_owned(),
                file: text(inserted, "file").to_owned(),
            });
        }
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("")
}

#[cfg(test)]
#[path = "refusal_tests.rs"]
mod tests;
